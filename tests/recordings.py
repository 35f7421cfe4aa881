"""Run a model on a recording of the authors' code and compare everything the recording holds."""
import json
from dataclasses import replace

import numpy as np
import torch
from torch import nn

import train
from engine import authors_names
from engine.machine import Machine
from backbones.resnet import Bottleneck, ResNet


class GivenMaps(nn.Module):
    """A backbone that returns recorded feature maps; missing finer levels are None."""

    def __init__(self, maps):
        super().__init__()
        self.maps = [None] * (4 - len(maps)) + maps
        self.channels = [0 if m is None else m.shape[1] for m in self.maps]

    def forward(self, images):
        return self.maps


def tensor(array, dtype=torch.float32):
    array = torch.as_tensor(np.asarray(array))
    return array.to(dtype) if array.is_floating_point() else array


def read_targets(rec, prefix="", dtype=torch.float32):
    """Ground truth of a recording: arrays of all images one after the other, split by count."""
    counts = rec[prefix + "target_counts"].tolist()
    labels = tensor(rec[prefix + "target_labels"]).split(counts)
    boxes = tensor(rec[prefix + "target_boxes"], dtype).split(counts)
    return [{"labels": l, "boxes": b} for l, b in zip(labels, boxes)]


def settings(rec):
    return json.loads(str(rec["config_json"]))


def config_fields(rec):
    """The authors' names for settings -> ours."""
    s = settings(rec)
    names = dict(
        dim="hidden_dim", num_heads="nheads", encoder_layers="enc_layers",
        decoder_layers="dec_layers", ffn_dim="dim_feedforward", dropout="dropout",
        num_feature_levels="num_feature_levels", num_points="enc_n_points",
        num_queries="num_queries", loss_class="cls_loss_coef", loss_l1="bbox_loss_coef",
        loss_giou="giou_loss_coef", cost_class="set_cost_class", cost_l1="set_cost_bbox",
        cost_giou="set_cost_giou", with_box_refine="with_box_refine", two_stage="two_stage")
    fields = {ours: s[theirs] for ours, theirs in names.items() if theirs in s}
    return {**fields, "backbone_weights": "imagenet"}


def images_and_padding(rec, dtype, image):
    """images (B, 3, H, W) and padding (B, H, W). `image(i, h, w, seed)` makes image i where none is
    recorded."""
    if "images" in rec:
        sizes = rec["image_sizes"].tolist()
        images = tensor(rec["images"], dtype)
    else:
        sizes = rec["image_sizes"].tolist()
        H, W = max(h for h, _ in sizes), max(w for _, w in sizes)
        images = torch.zeros(len(sizes), 3, H, W, dtype=dtype)
        if image is not None:
            for i, (h, w) in enumerate(sizes):
                images[i, :, :h, :w] = tensor(image(i, h, w, int(rec["seed"])), dtype)
    padding = torch.ones(len(sizes), *images.shape[-2:], dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        padding[i, :h, :w] = False
    return images, padding


def given_maps(rec, dtype=torch.float32, grad=True):
    names = [name for name in sorted(rec) if name.startswith("feature") and "_" not in name]
    return GivenMaps([tensor(rec[name], dtype).requires_grad_(grad) for name in names])


def weights(rec, recipe=None):
    """State dict in the authors' names: recorded, or made by the recipe from names and shapes."""
    if "key_names" in rec:
        shapes = [tuple(int(x) for x in str(s).split()) for s in rec["key_shapes"]]
        names = [str(n) for n in rec["key_names"]]
        state = recipe.state_dict(zip(names, shapes), int(rec["seed"]), bool(rec["tied_heads"]))
        return {k: torch.as_tensor(v) for k, v in state.items()}
    return {k[3:]: tensor(v) for k, v in rec.items() if k.startswith("sd.")}


def load(model, state, family, dtype):
    model.load_state_dict(authors_names.from_authors(state, family))
    return model.to(dtype)


# our loss name -> the authors'
TERMS = {"cls": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}


def authors_loss(name):
    """aux0.cls -> loss_ce_0, enc.l1 -> loss_bbox_enc, dn.aux1.giou -> loss_giou_dn_1."""
    *where, term = name.split(".")
    return "_".join([TERMS[term], *(w.removeprefix("aux") for w in where)])


def check_losses(rec, losses, prefix="", rtol=1e-5, enc="enc", atol=1e-6):
    """Every weighted term and the total."""
    expected = {}
    columns = [rec[prefix + column] for column in ("loss_names", "loss_values", "loss_weights")]
    for name, value, weight in zip(*columns):
        if weight != 0 and str(name).startswith(tuple(TERMS.values())):
            expected[str(name)] = value * weight
    ours = {}
    for name, value in losses.items():
        ours[authors_loss(name).replace("enc", enc)] = float(value)
    for name, value in expected.items():
        np.testing.assert_allclose(ours.pop(name, 0.0), value, rtol=rtol, atol=atol, err_msg=name)
    assert all(v == 0 for v in ours.values()), f"losses the authors do not have: {ours}"
    total = float(sum(losses.values()))
    np.testing.assert_allclose(total, float(rec[prefix + "total"]), rtol=rtol / 5)


class TrainingRun:
    """train.py's optimizer, learning rates and step on one process, for recorded batches."""

    def __init__(self, paper, model, criterion, recipe):
        self.model, self.criterion, self.recipe = model, criterion, recipe
        groups = paper.param_groups(model, recipe)
        self.optimizer = torch.optim.AdamW(
            groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        model.train()

    def step(self, number, steps_per_epoch, batch):
        """Step `number`, counted from 0 -> weighted losses, gradient norm before clipping."""
        factor = train.lr_factor(self.recipe, number, steps_per_epoch)
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * factor
        images, padding, targets = batch
        targets = [{**t, "index": i} for i, t in enumerate(targets)]
        losses, norm, finite = train.step(
            self.model, self.model, self.criterion, self.optimizer, train.make_ema(self.model, 0.0),
            [(images, padding, targets)], self.recipe.clip, Machine())
        assert finite
        return losses, norm


def check_matches(rec, matches, name, prefix=""):
    for i, (query, index) in enumerate(matches):
        expected = sorted(zip(*rec[f"{prefix}match_{name}_img{i}"].tolist()))
        assert sorted(zip(query.tolist(), index.tolist())) == expected, f"{name}, image {i}"


def check_gradients(rec, model, family, tolerance=1e-3):
    """Norm and a fixed projection of every parameter's gradient, under the authors' names."""
    grads = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.grad is not None:
            grads[name] = p.grad
    theirs = authors_names.to_authors(grads, family)
    largest = rec["grad_norm"].max()
    waves = np.cos(0.7 * (np.arange(max(p.numel() for p in model.parameters())) + 1.0))
    dot_tolerance = tolerance
    if tolerance > 1e-4:   # float32
        dot_tolerance = max(tolerance, 20 * float(rec.get("noise.grad_dot_rel", 0)))
    for name, norm, dot in zip(rec["grad_names"].tolist(), rec["grad_norm"], rec["grad_dot"]):
        grad = theirs[name].double().flatten().numpy()
        scale = max(norm, largest / 1000)
        assert abs(np.linalg.norm(grad) - norm) < tolerance * scale, f"gradient norm of {name}"
        projected = grad @ waves[:grad.size]
        assert abs(projected - dot) < dot_tolerance * scale, f"gradient of {name}"
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(rec["grad_names"]) == len(trainable), "every trainable parameter is recorded once"
    assert all(p.grad is not None for p in trainable.values())


def check_model(rec, model, criterion, family, dtype=torch.float32, recipe=None, enc="enc",
                detect=None):
    """Outputs, queries, losses, matches, gradients and detections of one recorded run."""
    load(model, weights(rec, recipe), family, dtype)
    model.train(settings(rec)["mode"] == "train")
    images, padding = images_and_padding(rec, dtype, recipe and recipe.image)
    targets = read_targets(rec, dtype=dtype)
    outputs = model(images, padding, targets)
    check_outputs(rec, outputs)
    losses = criterion(outputs, targets)
    check_losses(rec, losses, enc=enc)
    check_matches(rec, criterion.match(outputs, targets), "final")
    if model.training:
        sum(losses.values()).backward()
        check_gradients(rec, model, family)
        for i, given in enumerate(m for m in getattr(model.backbone, "maps", []) if m is not None):
            expected = rec[f"feature{i}_grad"]
            close(given.grad, expected, 1e-3 * np.abs(expected).max(), f"feature{i}_grad")
    if "post.scores" in rec:
        cfg = replace(model.cfg, top_k=rec["post.scores"].shape[1])
        found = detect(outputs, tensor(rec["post_sizes"]), cfg)
        for name, tolerance in (("scores", 1e-4), ("labels", 0), ("boxes", 1e-2)):
            ours = torch.stack([image[name] for image in found])
            close(ours, rec[f"post.{name}"], tolerance, f"post.{name}")
    return outputs


def check_outputs(rec, outputs):
    """Logits and boxes of every layer, the encoder, and its input; tolerances are those that the
    recordings state."""
    layers = outputs["aux_outputs"] + [outputs]
    close(stacked(layers, "pred_logits"), rec["out.logits"], 2e-4, "logits")
    close(stacked(layers, "pred_boxes"), rec["out.boxes"], 5e-5, "boxes")
    if "out.enc_logits" in rec and "enc_outputs" in outputs:
        close(outputs["enc_outputs"]["pred_logits"], rec["out.enc_logits"], 2e-4, "encoder logits")
        close(outputs["enc_outputs"]["pred_boxes"], rec["out.enc_boxes"], 5e-5, "encoder boxes")
    if "out.dn_logits" in rec and rec["out.dn_logits"].size:
        dn = outputs["dn_outputs"]["aux_outputs"] + [outputs["dn_outputs"]]
        close(stacked(dn, "pred_logits"), rec["out.dn_logits"], 4e-4, "denoising logits")
        close(stacked(dn, "pred_boxes"), rec["out.dn_boxes"], 5e-5, "denoising boxes")
    memory = outputs["memory"]
    assert [list(s) for s in memory.shapes] == rec["inner.shapes"].tolist()
    for name, field, tolerance in (("memory", "tokens", 1e-4),
                                   ("encoder_pos", "positions", 1e-4),
                                   ("pos", "positions", 1e-4),
                                   ("valid_ratios", "valid_ratios", 1e-6),
                                   ("padding_mask_flat", "padding", 0)):
        if f"inner.{name}" in rec:
            close(getattr(memory, field), rec[f"inner.{name}"], tolerance, name)
    if "inner.memory_mean_abs_per_image" in rec:
        mean = memory.tokens.abs().mean((1, 2))
        close(mean, rec["inner.memory_mean_abs_per_image"], 1e-5, "mean of memory")


def stacked(layers, name):
    return torch.stack([layer[name] for layer in layers])


def close(ours, theirs, tolerance, name):
    """Largest absolute difference at most `tolerance`."""
    assert tuple(ours.shape) == theirs.shape, f"{name}: {tuple(ours.shape)} against {theirs.shape}"
    difference = np.abs(ours.detach().double().numpy() - theirs).max(initial=0.0)
    assert difference <= tolerance, f"{name}: off by {difference:.3g}, allowed {tolerance:.3g}"


def check_initialization(path, model, family):
    """Every parameter outside the backbone has the recorded shape and constancy and, as far as a
    random sample can, the recorded mean and standard deviation."""
    fresh = authors_names.to_authors(dict(model.named_parameters(remove_duplicate=False)), family)
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    for line in lines:
        name, shape, *numbers = line.split(" | ")
        mean, std, low, high = (float(x) for x in numbers)
        value = fresh[name].detach()
        assert list(value.shape) == [int(x) for x in shape.split("x")], name
        tolerance = 8 * std / value.numel() ** 0.5 + 1e-4 * abs(high) + 1e-6
        assert abs(float(value.mean()) - mean) < tolerance, f"{name}: mean"
        assert abs(float(value.std(correction=0)) - std) < tolerance, f"{name}: deviation"
        assert (std == 0) == bool(value.min() == value.max()), f"{name}: constant or not"
    assert len(lines) > 100


def check_names(ours, model, family, keys):
    """Names and shapes fit the model, and translate back to all of the authors' (name, shape)."""
    def shapes(state):
        return {name: value.shape for name, value in state.items()}
    assert shapes(ours) == shapes(model.state_dict())
    theirs = authors_names.to_authors(ours, family)
    assert shapes(theirs) == {name: torch.Size(shape) for name, shape in keys}


def narrow_resnet(dilation=False):
    """ResNet-50 with a sixteenth of the channels, frozen as a published one."""
    backbone = ResNet(Bottleneck, (3, 4, 6, 3), (4, 8, 16, 32), 4, dilation=dilation)
    backbone.conv1.requires_grad_(False)
    backbone.layer1.requires_grad_(False)
    return backbone


def batch(*sizes, objects=(3, 0)):
    """Noise images of these (height, width), padded to a batch: images, padding, and targets with
    `objects` per image."""
    generator = torch.Generator().manual_seed(1)
    H, W = max(h for h, _ in sizes), max(w for _, w in sizes)
    images = torch.zeros(len(sizes), 3, H, W)
    padding = torch.ones(len(sizes), H, W, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        images[i, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        padding[i, :h, :w] = False
    targets = [{"labels": torch.randint(5, (n,), generator=generator),
                "boxes": torch.rand(n, 4, generator=generator) * 0.4 + 0.2} for n in objects]
    return images, padding, targets


def randomize_heads(model):
    """Add noise to class and box heads: at the start all boxes are their references."""
    generator = torch.Generator().manual_seed(2)
    for head in (*model.bbox_embed, *model.class_embed):
        for p in head.parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=generator)


def overfit(model, criterion, groups):
    """Train 40 steps on four images at three times the learning rates -> losses of each step by
    name, as numbers."""
    images, padding, targets = batch((64, 64), (64, 64), (64, 64), (64, 64), objects=(1, 2, 1, 2))
    groups = [{**group, "lr": 3 * group["lr"]} for group in groups]
    optimizer = torch.optim.AdamW(groups, fused=True)
    seen = []
    for _ in range(40):
        losses = criterion(model(images, padding, targets), targets)
        seen.append({name: loss.item() for name, loss in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return seen
