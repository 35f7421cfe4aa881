"""detr.py: the authors' recordings, then one test per claim of the paper."""
import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import detr
import matcher
import recordings
import train
from detr import (DETR, RECIPE, SMALL, VARIANTS, Config, Criterion, DecoderLayer, EncoderLayer,
                  Memory, build, detect, param_groups, sine_positions)
from engine import authors_names, class_rows, released
from engine.machine import Machine
from engine.models import load_model
from engine.recipe import override
from recordings import batch, close, config_fields, given_maps, overfit, tensor


def recorded_config(rec):
    s = recordings.settings(rec)
    return Config(**config_fields(rec), no_object=s["eos_coef"], dilation=s["dilation"], top_k=100)


def in_query_order(outputs, sizes, cfg):
    """Detections as the authors list them."""
    detections = detect(outputs, sizes, cfg)
    return [{name: x[d["query"].argsort()] for name, x in d.items()} for d in detections]


# ------------------------------------------------------------------------------ recordings

@pytest.mark.parametrize("case", ["tiny", "tiny_one_empty"])
def test_tiny_models_equal_the_authors_forward_and_backward(golden, case):
    rec = golden(f"14_detr_{case}")
    cfg = recorded_config(rec)
    model = DETR(given_maps(rec), cfg, 11)
    outputs = recordings.check_model(rec, model, Criterion(cfg), "detr", detect=in_query_order)
    close(outputs["queries"], rec["inner.hs"][-1], 1e-4, "last states")


@pytest.mark.parametrize("case", ["tiny", "tiny_one_empty"])
def test_tiny_models_equal_the_authors_in_double_precision(golden, case):
    rec = golden(f"14_detr_{case}")
    cfg = recorded_config(rec)
    model = DETR(given_maps(rec, torch.float64), cfg, 11)
    recordings.load(model, recordings.weights(rec), "detr", torch.float64)
    images, padding = recordings.images_and_padding(rec, torch.float64, None)
    outputs = model(images, padding)
    layers = outputs["aux_outputs"] + [outputs]
    close(recordings.stacked(layers, "pred_logits"), rec["out.logits"], 1e-9, "logits")
    close(recordings.stacked(layers, "pred_boxes"), rec["out.boxes"], 1e-9, "boxes")
    losses = Criterion(cfg)(outputs, recordings.read_targets(rec, dtype=torch.float64))
    recordings.check_losses(rec, losses, rtol=1e-8)
    sum(losses.values()).backward()
    recordings.check_gradients(rec, model, "detr", 1e-8)


def test_a_tiny_model_in_evaluation_mode_equals_the_authors(golden):
    rec = golden("14_detr_tiny")
    cfg = recorded_config(rec)
    model = DETR(given_maps(rec), cfg, 11)
    recordings.load(model, recordings.weights(rec), "detr", torch.float32)
    outputs = model.eval()(*recordings.images_and_padding(rec, torch.float32, None))
    layers = outputs["aux_outputs"] + [outputs]
    close(recordings.stacked(layers, "pred_logits"), rec["eval.logits"], 2e-4, "logits")
    close(recordings.stacked(layers, "pred_boxes"), rec["eval.boxes"], 5e-5, "boxes")


@pytest.mark.parametrize("variant", ["r50", "r50_dc5"])
def test_full_size_models_equal_the_authors(golden, recipe, variant):
    rec = golden(f"14_detr_full_{variant}")
    cfg = replace(recorded_config(rec), dropout=0.0)
    assert cfg.dilation == ("dc5" in variant)
    model, criterion = build(cfg, 91)
    recordings.check_model(rec, model, criterion, "detr", recipe=recipe, detect=in_query_order)


@pytest.mark.parametrize("mask", ["nomask", "mask"])
def test_encoder_and_decoder_layers_equal_the_authors(golden, mask):
    rec = golden("14_detr_layers")
    cfg = replace(Config(), dim=32, num_heads=4, ffn_dim=48, dropout=0.0)
    inputs = {}
    for name in ("src", "tgt", "query_pos", "memory", "pos"):
        inputs[name] = tensor(rec[name], torch.float64).requires_grad_()
    padding = torch.as_tensor(rec["padding_mask"])
    if mask == "nomask":
        padding = torch.zeros_like(padding)
    for part, layer in (("enc", EncoderLayer(cfg)), ("dec", DecoderLayer(cfg))):
        state = {k[7:].replace("multihead_attn", "cross_attn"): tensor(v)
                 for k, v in rec.items() if k.startswith(f"{part}.sd.")}
        layer.load_state_dict(state)
        layer.double()
        for x in inputs.values():
            x.grad = None
        if part == "enc":
            output = layer(Memory(inputs["src"], inputs["pos"], padding, [(3, 4)]))
            used = ("src", "pos")
        else:
            memory = Memory(inputs["memory"], inputs["pos"], padding, [(3, 4)])
            output = layer(inputs["tgt"], inputs["query_pos"], memory)
            used = ("tgt", "query_pos", "memory", "pos")
        close(output, rec[f"{part}.{mask}.output"], 1e-9, f"{part} output")
        (output * tensor(rec[f"{part}.grad_output"], torch.float64)).sum().backward()
        for name in used:
            close(inputs[name].grad, rec[f"{part}.{mask}.grad.{name}"], 1e-8, f"{part} {name}")
        for name, parameter in layer.named_parameters():
            theirs = name.replace("cross_attn", "multihead_attn")
            close(parameter.grad, rec[f"{part}.{mask}.grad.{theirs}"], 1e-8, f"{part} {name}")


def test_sine_positions_equal_the_authors(golden):
    rec = golden("14_detr_positions")
    for suffix in ("", "_1x1", "_big"):
        mask = torch.as_tensor(rec[f"mask{suffix}"])
        for features in (16, 128):
            ours = sine_positions(mask, 2 * features, dtype=torch.float64)
            ours = ours.transpose(1, 2).unflatten(2, mask.shape[1:])
            name = f"sine_nf{features}{suffix}"
            if name in rec:
                close(ours, rec[name], 1e-9, name)
            if f"{name}_samples" in rec:
                close(ours.flatten()[::997], rec[f"{name}_samples"], 1e-9, name)


@pytest.mark.parametrize("case", "abcd")
def test_costs_and_matches_equal_the_authors(golden, case):
    rec = golden("14_detr_matcher")
    targets = recordings.read_targets(rec, f"{case}_", torch.float64)
    logits = tensor(rec[f"{case}_logits"], torch.float64)
    boxes = tensor(rec[f"{case}_boxes"], torch.float64)
    set_loss = Criterion(Config()).set_loss
    cost = matcher.match_cost(logits[None], boxes[None], targets, set_loss.cost,
                              class_cost=matcher.softmax_cost)
    start = 0
    for image, target in enumerate(targets):
        n = len(target["labels"])
        close(cost[0, image, :, :n], rec[f"{case}_cost"][image, :, start:start + n], 1e-9, "cost")
        start += n
    matches = Criterion(Config()).match({"pred_logits": logits, "pred_boxes": boxes}, targets)
    recordings.check_matches({k.replace("match_", "match_x_"): v for k, v in rec.items()},
                             matches, "x", f"{case}_")


@pytest.mark.parametrize("case", "abcd")
def test_losses_and_their_gradients_equal_the_authors(golden, case):
    """Three and five objects, none in one image, none at all, and more objects than queries."""
    rec = golden("14_detr_criterion")
    layers = []
    for i in range(3):
        logits, boxes = (tensor(rec[f"{case}_layer{i}_{name}"], torch.float64).requires_grad_()
                         for name in ("logits", "boxes"))
        layers.append({"pred_logits": logits, "pred_boxes": boxes})
    outputs = {**layers[-1], "aux_outputs": layers[:-1]}
    targets = recordings.read_targets(rec, f"{case}_", torch.float64)
    criterion = Criterion(Config())
    losses = criterion(outputs, targets)
    recordings.check_losses(rec, losses, f"{case}_", rtol=1e-9)
    recordings.check_matches(rec, criterion.match(outputs, targets), "final", f"{case}_")
    sum(losses.values()).backward()
    for i, layer in enumerate(layers):
        for name in ("logits", "boxes"):
            expected = rec[f"{case}_layer{i}_grad_{name}"]
            close(layer[f"pred_{name}"].grad, expected, 1e-8, f"gradient of {name} {i}")


def test_detections_equal_the_authors(golden):
    rec = golden("14_detr_postprocess")
    outputs = {"pred_logits": tensor(rec["logits"]), "pred_boxes": tensor(rec["boxes"])}
    detections = in_query_order(outputs, tensor(rec["image_sizes_hw"]), Config())
    for name, tolerance in (("scores", 1e-6), ("labels", 0), ("boxes", 1e-3)):
        ours = torch.stack([d[name] for d in detections])
        close(ours, rec[f"post_{name}"], tolerance, name)


# ------------------------------------------------------------------------------ weights

def released_names(shared, recipe, backbone):
    """Names and shapes of a released file. R101's third stage has 23 blocks like its second."""
    keys = dict(recipe.read_keys(shared / "golden" / "keys_detr_r50.txt"))
    if backbone == "r101":
        second = {k: v for k, v in keys.items() if k.startswith("backbone.0.body.layer3.1.")}
        for i in range(6, 23):
            keys |= {k.replace("layer3.1.", f"layer3.{i}."): v for k, v in second.items()}
    return keys


@pytest.mark.parametrize("backbone, tensors, parameters", [
    ("r50", 458, 41_524_768), ("r101", 713, 60_464_672)])
def test_released_checkpoints_map_one_to_one(shared, recipe, backbone, tensors, parameters):
    keys = released_names(shared, recipe, backbone)
    assert len(keys) == tensors
    with torch.device("meta"):
        model, _ = build(override(Config(), VARIANTS.get(backbone, {})), 91)
        authors = {name: torch.empty(shape) for name, shape in keys.items()}
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters - 222_400
    family, overrides = released.recognize(authors)
    assert (family, overrides["backbone"]) == ("detr", model.cfg.backbone)
    assert replace(model.cfg, **overrides) == model.cfg
    ours = authors_names.from_authors(authors, family)
    assert shapes(ours) == shapes(model.state_dict())
    assert shapes(authors_names.to_authors(ours, family)) == {
        name: torch.Size(shape) for name, shape in keys.items()}


def shapes(state):
    return {name: value.shape for name, value in state.items()}


@pytest.mark.parametrize("name, flag, expected", [
    ("detr-r50-e632da11.pth", "", (False, "resnet50")),
    ("detr-r50-dc5-f0fb7ef5.pth", "", (True, "resnet50")),
    ("detr-r101-2c7b67e5.pth", "", (False, "resnet101")),
    ("detr-r101-dc5-a2e86def.pth", "", (True, "resnet101")),
    ("weights.pth", "dc5", (True, "resnet50"))])
def test_the_four_released_files_are_recognised(shared, recipe, name, flag, expected):
    """No tensor shows DC5: the file's name does, or --variant."""
    keys = released_names(shared, recipe, "r101" if "r101" in name else "r50")
    with torch.device("meta"):
        weights = {key: torch.empty(shape) for key, shape in keys.items()}
    state = released.convert({"model": weights}, name, flag)
    cfg = override(Config(), state["config"])
    assert state["model_name"] == "detr" and len(state["class_names"]) == 91
    assert (cfg.dilation, cfg.backbone, cfg.num_queries, cfg.num_heads) == (*expected, 100, 8)


def test_unused_class_columns_go_and_the_no_object_column_stays_last():
    _, model, _ = small()
    cfg = model.cfg
    wide, _ = build(cfg, 91)
    fitted, names = class_rows.without_unused(wide, detr, cfg, class_rows.coco_columns())
    assert len(names) == 80 and fitted.class_embed.out_features == 81
    rows = class_rows.COCO_IDS + [91]
    assert torch.equal(fitted.class_embed.weight, wide.class_embed.weight[rows])


def test_other_classes_keep_the_no_object_row():
    _, model, _ = small()
    old, new = model.state_dict(), build(model.cfg, 2)[0].state_dict()
    fitted, _ = class_rows.fit(old, list("abcde"), new, ["x", "c"])
    assert torch.equal(fitted["class_embed.bias"][1:], old["class_embed.bias"][[2, 5]])
    assert torch.equal(fitted["class_embed.bias"][0], new["class_embed.bias"][0])


def test_a_fresh_model_has_the_statistics_of_the_authors(shared):
    torch.manual_seed(0)
    model, _ = build(Config(), 91)
    recordings.check_initialization(shared / "golden" / "init_detr_r50.txt", model, "detr")


def test_files_of_transformers_give_the_same_boxes_here(tmp_path):
    """An independent implementation: random weights, two images of different size in a batch."""
    peer = pytest.importorskip("transformers")
    stages = peer.ResNetConfig(embedding_size=64, hidden_sizes=[256, 512, 1024, 2048],
                               depths=[3, 4, 6, 3], out_features=["stage4"])
    torch.manual_seed(0)
    theirs = peer.DetrForObjectDetection(peer.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=stages, d_model=64,
        num_queries=20, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96,
        id2label=dict(enumerate("abcdefg")))).eval()
    generator = torch.Generator().manual_seed(1)
    for name, p in theirs.named_parameters():
        if "backbone" not in name:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    for name, b in theirs.named_buffers():
        if "running" in name:
            b.data.uniform_(0.5, 1.5, generator=generator)
    theirs.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    ours, _, cfg, _, meta, _ = load_model(tmp_path / "model.safetensors")
    assert (cfg.num_heads, cfg.num_queries, "".join(meta["class_names"])) == (4, 20, "abcdefg")
    same = load_model(tmp_path / "pytorch_model.bin").model
    for a, b in zip(ours.state_dict().values(), same.state_dict().values()):
        assert torch.equal(a, b)
    images, padding, _ = batch((96, 128), (64, 88), objects=())
    with torch.no_grad():
        expected = theirs(pixel_values=images, pixel_mask=(~padding).long())
        outputs = ours(images, padding)
    assert torch.allclose(outputs["pred_logits"], expected.logits, atol=1e-5)
    assert torch.allclose(outputs["pred_boxes"], expected.pred_boxes, atol=1e-5)


# ----------------------------------------------------------------------------- claims, corner cases

def small(**changes):
    """A two-layer model of width 32 on the tiny backbone, for five classes."""
    torch.manual_seed(0)
    sizes = dict(dim=32, ffn_dim=48, decoder_layers=2, num_queries=9)
    cfg = override(Config(), {**SMALL, **sizes, **changes})
    return (cfg, *build(cfg, 5))


def test_shapes():
    _, model, criterion = small(num_queries=7)
    images, padding, targets = batch((64, 96), (48, 64))
    outputs = model(images, padding)
    assert outputs["pred_logits"].shape == (2, 7, 5 + 1)
    assert outputs["pred_boxes"].shape == (2, 7, 4)
    assert len(outputs["aux_outputs"]) == 1
    assert outputs["memory"].tokens.shape == (2, 4 * 6, 32)   # stride 16
    assert {name for name in criterion(outputs, targets)} == {
        "cls", "l1", "giou", "aux0.cls", "aux0.l1", "aux0.giou"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_build(variant):
    with torch.device("meta"):
        model, _ = build(override(Config(), VARIANTS[variant]), 91)
    stride = model.backbone.layer4[0].conv2.stride
    assert stride == ((1, 1) if "dc5" in variant else (2, 2))


@pytest.mark.parametrize("objects", [(3, 0), (0, 0), (14, 1)])
def test_every_parameter_gets_a_finite_gradient(objects):
    """With objects in one image only, with none, and with more objects than queries."""
    _, model, criterion = small()
    images, padding, targets = batch((64, 96), (48, 64), objects=objects)
    losses = criterion(model(images, padding), targets)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_it_overfits_four_scenes():
    _, model, criterion = small()
    first, *_, last = overfit(model, criterion, param_groups(model, override(RECIPE, SMALL)))
    assert sum(last.values()) < sum(first.values()) / 2


def test_content_of_padding_changes_nothing():
    """Padding is blocked as a key, in the encoder and in the decoder."""
    _, model, _ = small(encoder_layers=2)
    model.eval()
    memory = model.encode(*batch((64, 96), (40, 64))[:2])
    disturbed = memory._replace(tokens=memory.tokens.masked_fill(memory.padding[..., None], 9.0))
    assert memory.padding.any()
    for a, b in zip(model.decode(memory), model.decode(disturbed)):
        assert torch.equal(a["queries"], b["queries"])
    for layer in model.encoder:
        memory = memory._replace(tokens=layer(memory))
        disturbed = disturbed._replace(tokens=layer(disturbed))
    assert torch.equal(memory.tokens[~memory.padding], disturbed.tokens[~memory.padding])


@pytest.mark.parametrize("divisor, same", [(32, True), (1, False)])
def test_small_images_have_the_same_valid_cells_alone_and_beside_others(divisor, same):
    _, model, _ = small(size_divisor=divisor)
    images, padding, _ = batch((113, 130), (85, 90))
    together = model.encode(images, padding)
    alone = model.encode(images[1:, :, :85, :90], padding[1:, :85, :90])
    cells = [(~memory.padding[-1]).sum() for memory in (together, alone)]
    assert (cells[0] == cells[1]) == same


def test_positions_count_from_the_far_side_of_valid_cells():
    """One row of two cells, then padding: x is half and all of the width, and padding repeats."""
    x = sine_positions(torch.tensor([[[False, False, True]]]), 8)[0, :, 4:]        # (3, 4)
    expected = torch.tensor([[0.0, -1.0], [0.0, 1.0], [0.0, 1.0]])   # sin and cos of pi, 2 pi
    assert torch.allclose(x[:, :2], expected, atol=1e-5)


def test_positions_never_reach_the_values():
    """A.1: where queries and keys ignore their input, positions change nothing."""
    _, model, _ = small()
    memory = model.encode(*batch((64, 96))[:2])
    layer = model.encoder[0]
    layer.self_attn.in_proj_weight.data[:64] = 0
    moved = memory._replace(positions=memory.positions + 1)
    assert torch.equal(layer(memory), layer(moved))


def test_positions_are_added_in_every_layer():
    """Table 3: sine at attention, in the encoder and in the decoder."""
    _, model, _ = small(encoder_layers=2)
    memory = model.encode(*batch((64, 96))[:2])
    moved = memory._replace(positions=memory.positions.flip(1))
    content = torch.randn(1, 9, 32)
    position = model.query_embed.weight[None]
    for layer in model.encoder:
        assert not torch.allclose(layer(memory), layer(moved))
    for layer in model.decoder:
        output = layer(content, position, memory)
        assert not torch.allclose(output, layer(content, position, moved))
        assert not torch.allclose(output, layer(content, 2 * position, memory))


def test_the_encoder_is_equivariant_to_the_order_of_its_tokens():
    """Without positions attention is permutation-invariant, which is why they are needed (3.2)."""
    _, model, _ = small()
    memory = model.encode(*batch((64, 96))[:2])
    order = torch.randperm(memory.tokens.shape[1])
    shuffled = Memory(memory.tokens[:, order], memory.positions[:, order], memory.padding[:, order],
                      memory.shapes)
    layer = model.encoder[0]
    assert torch.allclose(layer(memory)[:, order], layer(shuffled), atol=1e-5)


def test_only_the_learned_queries_tell_the_outputs_apart():
    """Section 3.2: the content starts at zero, so equal queries give equal boxes."""
    _, model, _ = small()
    model.query_embed.weight.data[:] = model.query_embed.weight.data[0].clone()
    boxes = model(*batch((64, 96))[:2])["pred_boxes"]
    assert torch.allclose(boxes, boxes[:, :1].expand_as(boxes), atol=1e-6)


def test_the_norm_is_for_the_heads_only_and_shared_by_all_layers():
    """The state that a layer hands to the next one is not normalized by the decoder's norm."""
    _, model, _ = small(decoder_layers=3)
    inputs = []
    for layer in model.decoder:
        layer.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    model.decoder_norm.weight.data.fill_(3.0)
    first = model.decode(model.encode(*batch((64, 96))[:2]))[0]["queries"]
    assert torch.allclose(model.decoder_norm(inputs[1]), first)
    assert not torch.allclose(inputs[1], first)


def test_auxiliary_losses_match_every_layer_anew():
    """Swapping the queries of one layer changes its assignment but not its loss."""
    _, model, criterion = small()
    images, padding, targets = batch((64, 96), (48, 64), objects=(3, 2))
    outputs = model(images, padding)
    first = outputs["aux_outputs"][0]
    flipped = {name: x.flip(1) for name, x in first.items()}
    losses = criterion(outputs, targets)
    again = criterion({**outputs, "aux_outputs": [flipped]}, targets)
    for name in losses:
        assert torch.allclose(losses[name], again[name], atol=1e-6), name


def test_the_class_loss_is_a_weighted_mean():
    """One image, one object: (a + 0.1 * the sum of 99 others) / 10.9."""
    logits = torch.randn(1, 100, 4, generator=torch.Generator().manual_seed(0))
    outputs = {"pred_logits": logits, "pred_boxes": torch.rand(1, 100, 4), "aux_outputs": []}
    targets = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
    criterion = Criterion(Config())
    (query, _), = criterion.match(outputs, targets)
    nll = -logits[0].log_softmax(-1)
    matched = nll[query, 2].sum()
    others = nll[:, 3].sum() - nll[query, 3].sum()
    expected = (matched + 0.1 * others) / (1 + 9.9)
    assert torch.allclose(criterion(outputs, targets)["cls"], expected)


def test_uniform_logits_cost_the_logarithm_of_the_number_of_columns():
    outputs = {"pred_logits": torch.zeros(2, 9, 92), "pred_boxes": torch.rand(2, 9, 4),
               "aux_outputs": []}
    for objects in ((0, 0), (3, 1)):
        targets = batch((8, 8), (8, 8), objects=objects)[2]
        assert float(Criterion(Config())(outputs, targets)["cls"]) == pytest.approx(np.log(92))


def test_box_losses_are_divided_by_the_objects_of_the_whole_step():
    """A.2: not by those of this micro-batch or rank; the class loss is a mean of its queries."""
    _, model, criterion = small()
    images, padding, targets = batch((64, 96), (48, 64), objects=(3, 1))
    outputs = model(images, padding)
    alone = criterion(outputs, targets)
    halved = criterion(outputs, targets, num_boxes=8.0)
    for name in alone:
        factor = 1 if name.endswith("cls") else 2
        assert torch.allclose(factor * halved[name], alone[name]), name


@pytest.mark.parametrize("objects", [1, 2, 3])
def test_the_matching_is_the_cheapest_one(objects):
    """Equation 1 against all assignments: minus probability + 5 L1 - 2 GIoU."""
    generator = torch.Generator().manual_seed(objects)
    outputs = {"pred_logits": torch.randn(1, 5, 4, generator=generator),
               "pred_boxes": torch.rand(1, 5, 4, generator=generator) * 0.4 + 0.3}
    labels = torch.randint(3, (objects,), generator=generator)
    boxes = torch.rand(objects, 4, generator=generator) * 0.4 + 0.3
    p = outputs["pred_logits"][0].softmax(-1)[:, labels]
    l1 = torch.cdist(outputs["pred_boxes"][0], boxes, p=1)
    corners = [detr.box_cxcywh_to_xyxy(x) for x in (outputs["pred_boxes"][0], boxes)]
    cost = -p + 5 * l1 - 2 * matcher.generalized_box_iou(*corners)
    best = min(itertools.permutations(range(5), objects),
               key=lambda chosen: sum(cost[q, j] for j, q in enumerate(chosen)))
    (query, index), = Criterion(Config()).match(outputs, [{"labels": labels, "boxes": boxes}])
    assert [int(query[index == j]) for j in range(objects)] == list(best)


def test_every_query_gives_one_detection_even_where_no_object_wins():
    """Section 4: the second best class replaces "no object"."""
    p = torch.tensor([[0.006, 0.004, 0.99], [0.2, 0.7, 0.1]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4]] * 2])
    outputs = {"pred_logits": p.log()[None], "pred_boxes": boxes}
    detection, = detect(outputs, torch.tensor([[100, 200]]), Config(top_k=10))
    assert detection["query"].tolist() == [1, 0] and detection["labels"].tolist() == [1, 0]
    assert detection["scores"].tolist() == pytest.approx([0.7, 0.006])
    assert detection["boxes"][0].tolist() == pytest.approx([80, 30, 120, 70])
    detection, = detect(outputs, torch.tensor([[100, 200]]), Config(top_k=1))
    assert detection["query"].tolist() == [1]


def test_under_autocast_boxes_and_detections_are_float32():
    """In bfloat16 a coordinate near 1 is rounded to 1/256: 5 pixels of 1333."""
    _, model, criterion = small()
    images, padding, targets = batch((64, 96), objects=(3,))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images, padding)
        losses = criterion(outputs, targets)
    assert outputs["pred_boxes"].dtype == outputs["pred_logits"].dtype == torch.float32
    assert {x.dtype for x in losses.values()} == {torch.float32}
    detection, = detect(outputs, torch.tensor([[64, 96]]), Config(top_k=3))
    assert detection["boxes"].dtype == detection["scores"].dtype == torch.float32


@pytest.mark.parametrize("size", [(16, 16), (8, 200), (33, 65)])
def test_tiny_and_thin_images(size):
    _, model, criterion = small(backbone_norm="group")
    images, padding, targets = batch(size, objects=(2,))
    outputs = model(images, padding)
    assert sum(criterion(outputs, targets).values()).isfinite()
    assert len(detect(outputs, torch.tensor([size]), Config())[0]["scores"]) == 9


def test_without_encoder_layers_it_still_detects():
    """The first row of Table 2."""
    _, model, criterion = small(encoder_layers=0)
    images, padding, targets = batch((64, 96), (48, 64))
    assert sum(criterion(model(images, padding), targets).values()).isfinite()


@pytest.mark.parametrize("term", ["l1", "giou"])
def test_a_box_loss_can_be_left_out(term):
    """Table 4."""
    _, model, criterion = small(**{f"loss_{term}": 0.0})
    images, padding, targets = batch((64, 96), (48, 64))
    losses = criterion(model(images, padding), targets)
    assert losses[term] == 0 and losses["cls"] > 0


def test_learning_rates_come_in_two_groups():
    with torch.device("meta"):
        model, _ = build(Config(), 91)
    rest, backbone = param_groups(model, RECIPE)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)].split(".")[0] for p in backbone["params"]} == {"backbone"}
    assert "backbone" not in {names[id(p)].split(".")[0] for p in rest["params"]}
    assert sum(p.numel() for group in (rest, backbone) for p in group["params"]) == 41_302_368
    assert [rest["lr"], backbone["lr"]] == [1e-4, 1e-5]


def test_dropout_acts_only_in_training():
    _, model, _ = small(dropout=0.5)
    images, padding, _ = batch((64, 64), objects=(0,))
    model.eval()
    assert torch.equal(model(images, padding)["pred_logits"], model(images, padding)["pred_logits"])
    model.train()
    first, second = (model(images, padding)["pred_logits"] for _ in range(2))
    assert not torch.equal(first, second)


def test_two_micro_batches_make_the_step_of_both():
    """Box losses are exact; the class loss is the mean of the micro-batches' means."""
    _, model, criterion = small(backbone_norm="group", loss_l1=0.0, loss_giou=0.0)
    optimizer = torch.optim.AdamW(param_groups(model, RECIPE), fused=True)
    half = batch((64, 96), (48, 64), objects=(3, 1))
    for target in half[2]:
        target["index"] = 0
    norms = []
    for batches in ([half], [half, half]):
        state = copy.deepcopy(model.state_dict())
        _, norm, _ = train.step(model, model, criterion, optimizer, train.make_ema(model, 0.0),
                                batches, 0.0, Machine())
        norms.append(float(norm))
        model.load_state_dict(state)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
