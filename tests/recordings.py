"""Runs a model of ours on a recording of the authors' code and compares everything the recording holds."""
import json

import numpy as np
import torch
from torch import nn

import checkpoints


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
    names = dict(dim="hidden_dim", num_heads="nheads", encoder_layers="enc_layers", decoder_layers="dec_layers",
                 ffn_dim="dim_feedforward", num_feature_levels="num_feature_levels", num_points="enc_n_points",
                 dropout="dropout", num_queries="num_queries", loss_class="cls_loss_coef", loss_l1="bbox_loss_coef",
                 loss_giou="giou_loss_coef", cost_class="set_cost_class", cost_l1="set_cost_bbox",
                 cost_giou="set_cost_giou", with_box_refine="with_box_refine", two_stage="two_stage")
    return {ours: s[theirs] for ours, theirs in names.items() if theirs in s} | {"backbone_weights": "imagenet"}


def images_and_padding(rec, dtype, image):
    """images (B, 3, H, W) and padding (B, H, W). `image(i, h, w, seed)` makes image i where none is recorded."""
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


def given_maps(rec, dtype, grad=False):
    maps = [tensor(rec[k], dtype).requires_grad_(grad) for k in sorted(rec) if k.startswith("feature") and "_" not in k]
    return GivenMaps(maps)


def weights(rec, recipe=None):
    """State dict in the authors' names: recorded, or made by the recipe from names and shapes."""
    if "key_names" in rec:
        shapes = [tuple(int(x) for x in str(s).split()) for s in rec["key_shapes"]]
        names = [str(n) for n in rec["key_names"]]
        state = recipe.state_dict(zip(names, shapes), int(rec["seed"]), bool(rec["tied_heads"]))
        return {k: torch.as_tensor(v) for k, v in state.items()}
    return {k[3:]: tensor(v) for k, v in rec.items() if k.startswith("sd.")}


def load(model, state, family, dtype):
    model.load_state_dict(checkpoints.from_authors(state, family))
    return model.to(dtype)


# our loss name -> the authors'
TERMS = {"cls": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}


def authors_loss(name):
    """`aux0.cls` -> `loss_ce_0`, `enc.l1` -> `loss_bbox_enc`, `dn.aux1.giou` -> `loss_giou_dn_1`."""
    *where, term = name.split(".")
    return "_".join([TERMS[term], *(w.removeprefix("aux") for w in where)])


def check_losses(rec, losses, prefix="", rtol=1e-5, enc="enc"):
    """Every weighted term and the total."""
    values = dict(zip(rec[prefix + "loss_names"].tolist(), rec[prefix + "loss_values"] * rec[prefix + "loss_weights"]))
    expected = {k: v for k, v in values.items() if k.startswith(tuple(TERMS.values())) and
                dict(zip(rec[prefix + "loss_names"].tolist(), rec[prefix + "loss_weights"]))[k] != 0}
    ours = {authors_loss(name).replace("enc", enc): float(value) for name, value in losses.items()}
    for name, value in expected.items():
        np.testing.assert_allclose(ours.pop(name, 0.0), value, rtol=rtol, atol=1e-6, err_msg=name)
    assert all(v == 0 for v in ours.values()), f"losses the authors do not have: {ours}"
    np.testing.assert_allclose(float(sum(losses.values())), float(rec[prefix + "total"]), rtol=rtol / 5)


def check_matches(rec, matches, name, prefix=""):
    for i, (query, index) in enumerate(matches):
        expected = rec[f"{prefix}match_{name}_img{i}"]
        assert sorted(zip(query.tolist(), index.tolist())) == sorted(zip(*expected.tolist())), f"{name}, image {i}"


def check_gradients(rec, model, family):
    """Norm and a fixed projection of every parameter's gradient, under the authors' names."""
    grads = {n: p.grad for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    theirs = checkpoints.to_authors(grads, family)
    largest = rec["grad_norm"].max()
    dot_tolerance = max(1e-3, 20 * float(rec["noise.grad_dot_rel"])) if "noise.grad_dot_rel" in rec else 1e-3
    for name, norm, dot in zip(rec["grad_names"].tolist(), rec["grad_norm"], rec["grad_dot"]):
        grad = theirs[name].double().flatten().numpy()
        scale = max(norm, largest / 1000)
        assert abs(np.linalg.norm(grad) - norm) < 1e-3 * scale, f"gradient norm of {name}"
        projected = grad @ np.cos(0.7 * (np.arange(grad.size) + 1.0))
        assert abs(projected - dot) < dot_tolerance * scale, f"gradient of {name}"
    silent = set(rec["no_grad_names"].tolist()) - {""}
    expected = set(rec["grad_names"].tolist()) | silent
    canonical = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(expected) == len(canonical), "every trainable parameter is recorded once"
