"""co_detr.py: the authors' recordings part by part and whole, then one test per claim of the
paper."""
import multiprocessing
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import co_detr
import data
import dino
import recordings
import train
from boxes import box_xyxy_to_cxcywh
from co_detr import (RECIPE, SMALL, VARIANTS, Candidates, CoDETR, Config, Criterion, build,
                     choose_rows, customized_mask, detect, param_groups, quality_focal_loss)
from engine import authors_names, released
from engine.errors import UserError
from engine.recipe import configure, override
from head_recordings import levels, recorded_batch, t
from heads import anchors
from heads.adapter import multi_scale_adapter
from heads.anchors import by_anchor
from heads.fcos import centerness_targets
from host_waits import HostWaits
from matcher import Weights, focal_loss, match_cost
from recordings import GivenMaps, batch, close, overfit


def first(n, k):
    """The first k of n, in place of k at random."""
    return torch.arange(n)[:k]


@pytest.fixture
def recorded(golden):
    """`recorded("anchors")` opens one recording of the Co-DETR code."""
    return lambda name: golden(f"co_detr/{name}")


@pytest.fixture
def first_k(monkeypatch):
    """The recordings' deterministic choice."""
    monkeypatch.setattr(anchors, "draw", first)


# ---- parts against the recordings

def test_elementary_losses_equal_the_authors(recorded):
    rec = recorded("elementary_losses")
    logits, labels = t(rec["pred"]).requires_grad_(), t(rec["labels"])
    quality = t(rec["quality"])
    # the IoU of the unit box with a slice of itself is the slice's width
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0]]).expand(20, -1)
    half, one = torch.full_like(quality, 0.5), torch.ones_like(quality)
    slices = torch.stack((quality / 2, half, quality, one), -1)
    weight = t(rec["weight"])[:, None]
    loss = (quality_focal_loss(logits, labels, boxes, slices) * weight).sum() / 7
    close(loss, rec["qfl"], 1e-5, "quality focal loss")
    close(torch.autograd.grad(loss, logits)[0], rec["qfl_grad"], 1e-5, "its gradient")
    loss = 2 * (focal_loss(logits, labels, None, None) * weight).sum() / 7
    close(loss, rec["focal_weight2"], 2e-5, "focal loss")
    close(torch.autograd.grad(loss, logits)[0], rec["focal_grad"], 1e-5, "its gradient")


@pytest.mark.parametrize("source", ["atss", "atss_empty", "rcnn"])
@pytest.mark.parametrize("padding", ["neg", "zero"])
@pytest.mark.parametrize("most", [300, 16])
def test_customized_queries_and_their_losses_equal_the_authors(recorded, first_k, source, padding,
                                                               most):
    rec = recorded("aux_queries")
    if source == "rcnn":
        features = [t(rec[f"rcnn/feats{i}"]) for i in range(2)]
    else:
        features = torch.cat([x.flatten(2).transpose(1, 2) for x in levels(rec, "feat")], 1)
    candidates = []
    for i in range(2):
        columns = [t(rec[f"{source}/{name}{i}"]) for name in ("coords", "labels", "targets")]
        candidates.append(Candidates(*columns, features[i]))
    cfg = Config(aux_queries=most, aux_negatives=padding == "neg")
    chosen = choose_rows(candidates, t(rec["image_sizes"]), 11, cfg)
    weights = chosen.weights
    at = f"{source}/{padding}_max{most}/"
    close(chosen.boxes, rec[at + "coords"], 1e-5, "boxes")
    assert torch.equal(chosen.labels, t(rec[at + "labels"]))
    close(chosen.features, rec[at + "feats"], 1e-5, "features")
    close(weights, rec[at + "label_weights"], 0, "weights")
    positive = chosen.labels < 11
    close(chosen.targets[positive], rec[at + "targets"][positive.numpy()], 1e-5, "targets")
    assert torch.equal(positive, t(rec[at + "box_weights"])[..., 0] > 0)
    if padding == "zero":
        # the same mask in the rows of queries that exist
        ours, theirs = customized_mask([weights])[:, 0], t(rec[at + "attn_mask_per_image"])
        assert torch.equal(ours[weights > 0], theirs[weights > 0])

    forms = {"deformable": dict(loss_class=2.0, quality_focal=False), "dino": {}}
    for form, settings in forms.items():
        scores = t(rec[at + "dec_scores"]).requires_grad_()
        boxes = t(rec[at + "dec_boxes"]).requires_grad_()
        layers = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(scores, boxes)]
        criterion = Criterion(replace(cfg, **settings))
        losses = criterion.query_losses(layers, chosen.labels, chosen.targets, weights,
                                        positive.sum().clamp(min=1))
        names = [f"{layer}{term}" for layer in ("aux0.", "") for term in ("cls", "l1", "giou")]
        ours = [losses[name].item() for name in names]
        np.testing.assert_allclose(ours, rec[at + f"{form}_losses"], rtol=2e-5)
        if at + f"{form}_grad_scores" in rec:
            sum(losses.values()).backward()
            close(scores.grad, rec[at + f"{form}_grad_scores"], 1e-5, "gradient of scores")
            close(boxes.grad, rec[at + f"{form}_grad_boxes"], 1e-4, "gradient of boxes")


@pytest.mark.parametrize("form", ["deformable", "dino"])
def test_matching_equals_the_authors(recorded, form):
    prefix = f"match_{form}/"
    rec = recorded("embeddings_matching_denoising")
    rec = {key.removeprefix(prefix): x for key, x in rec.items() if key.startswith(prefix)}
    image = torch.tensor([200.0, 150.0, 200.0, 150.0])
    targets = [{"labels": t(rec["labels"]), "boxes": box_xyxy_to_cxcywh(t(rec["gt"])) / image}]
    logits, boxes = t(rec["logits"])[None, None], t(rec["boxes"])[None, None]
    cost = match_cost(logits, boxes, targets, Weights(2, 5, 2))
    close(cost[0, 0], rec["cost"], 1e-4, "cost")
    outputs = {"pred_logits": logits[0], "pred_boxes": boxes[0]}
    (query, index), = Criterion(Config()).match(outputs, targets)
    assigned = torch.zeros(30, dtype=torch.int64).index_put((query,), index + 1)
    assert torch.equal(assigned, t(rec["assigned"]))


def recorded_noise(draws):
    """Four recorded draws in place of `dino.draw_noise`."""
    relabel, labels, sign, amount = draws

    def draw(copies, objects, num_classes, device):
        drawn = torch.zeros(copies * objects, dtype=torch.int64)
        drawn[relabel < 0.25] = labels
        shape = (copies, objects)
        return dino.Noise(relabel.view(shape), drawn.view(shape), sign.view(*shape, 4) * 2.0 - 1,
                          amount.view(*shape, 4))

    return draw


@pytest.fixture
def ten_pairs(monkeypatch):
    """The recordings have 10 denoising pairs; DINO's own rule for fewer than 50 is another."""
    def groups(number, fullest, copies):
        return max(1, number // fullest) if fullest else 1

    monkeypatch.setattr(dino, "denoising_groups", groups)


@pytest.mark.parametrize("case", ["two", "one_empty", "many", "none"])
def test_denoising_queries_equal_the_authors(recorded, monkeypatch, ten_pairs, case):
    rec = recorded("embeddings_matching_denoising")
    sizes = torch.tensor([[200.0, 150.0, 200.0, 150.0], [160.0, 120.0, 160.0, 120.0]])
    targets = []
    for i in range(2):
        boxes = box_xyxy_to_cxcywh(t(rec[f"dn/{case}/gt{i}"])) / sizes[i]
        targets.append({"labels": t(rec[f"dn/{case}/labels{i}"]), "boxes": boxes})
    table = torch.nn.Embedding.from_pretrained(t(rec["dn/label_embedding"]))
    draws = [t(rec[key]) for key in sorted(rec) if key.startswith(f"dn/{case}/draw")]
    monkeypatch.setattr(dino, "draw_noise", recorded_noise(draws))
    queries = dino.denoising_queries(targets, table, 11, dino.Config(dn_number=10), 30)
    assert queries.groups == int(rec[f"dn/{case}/groups"])
    assert queries.content.shape[1] == int(rec[f"dn/{case}/pad_size"])
    close(queries.content, rec[f"dn/{case}/label_query"], 1e-6, "content")
    reference = 1 / (1 + np.exp(-rec[f"dn/{case}/box_query_logit"]))
    close(queries.reference, reference, 1e-6, "boxes")
    assert torch.equal(queries.attn_mask, t(rec[f"dn/{case}/attn_mask"]))


@pytest.mark.parametrize("name, top_k, threshold", [
    ("topk20", 20, 0.0), ("topk20_rescaled", 20, 0.0), ("topk50_score0.2", 50, 0.0),
    ("softnms0.8", 25, 0.8)])
def test_selected_detections_equal_the_authors(recorded, name, top_k, threshold):
    rec = recorded("select_detections")
    sizes = t(rec["image_sizes"]).double()
    if name.endswith("rescaled"):
        sizes = sizes / t(rec["scale_factor"]).double()[:, [1, 0]]
    outputs = {"pred_logits": t(rec["scores_logit"]), "pred_boxes": t(rec["boxes"])}
    compare(detect(outputs, sizes, Config(top_k=top_k, soft_nms=threshold)), rec, name)


def compare(detections, rec, name, tolerance=0.02):
    """Detections against a recorded list, both sorted by score."""
    for i, image in enumerate(detections):
        theirs, labels = rec[f"{name}/dets{i}"], rec[f"{name}/labels{i}"]
        order = np.argsort(-theirs[:, 4], kind="stable")
        close(image["scores"], theirs[order, 4], 1e-4, f"{name}: scores")
        close(image["boxes"], theirs[order, :4], tolerance, f"{name}: boxes")
        assert torch.equal(image["labels"], t(labels[order])), f"{name}: labels"


# ---- recorded models

SIZES = dict(dim=32, num_heads=8, encoder_layers=2, decoder_layers=2, ffn_dim=48, num_queries=30,
             rpn_pre_nms=200, rpn_proposals=80, test_pre_nms=200, test_proposals=80,
             rpn_samples=64, roi_samples=48, roi_dim=40, dn_number=10, backbone_weights="imagenet")
FORMS = {"co_dino": {}, "co_deformable": VARIANTS["co_deformable"]}
CASES = {"plain": {}, "second_image_empty": {},
         "max12_lambda": dict(aux_queries=12, lambda_queries=0.5),
         "zero_padding": dict(aux_negatives=False),
         "zero_padding_max12": dict(aux_negatives=False, aux_queries=12), "no_padding_mask": {}}
ALL_CASES = [("co_dino", case) for case in CASES]
ALL_CASES += [("co_deformable", case) for case in list(CASES)[:3]]


def recorded_model(rec, family, **changes):
    cfg = override(Config(), {**FORMS[family], **SIZES, "top_k": 100, **changes})
    maps = [x.requires_grad_() for x in levels(rec, "in/feat")]
    model = CoDETR(GivenMaps(maps), cfg, 11)
    weights = {key[3:]: t(x) for key, x in rec.items() if key.startswith("sd/")}
    model.load_state_dict(authors_names.from_authors(weights, family))
    return cfg, model, Criterion(cfg)


def our_name(name):
    """The authors' name of a loss, levels summed -> ours."""
    layer, name = re.fullmatch(r"(?:d(\d)\.)?(.*)", name.split("[")[0]).groups()
    term = {"cls": "cls", "bbox": "l1", "iou": "giou", "centerness": "centerness"}
    aux = re.fullmatch(r"loss_(cls|bbox|iou)_aux(\d)", name)
    head = re.fullmatch(r"loss_(cls|bbox|centerness)(\d)", name)
    rpn = re.fullmatch(r"loss_rpn_(cls|bbox)", name)
    plain = re.fullmatch(r"(enc_|dn_)?loss_(cls|bbox|iou)", name)
    where = "" if layer is None else f"aux{layer}."
    if aux:
        return f"{('rcnn', 'atss')[int(aux[2])]}.queries.{where}{term[aux[1]]}"
    if head:
        box = "giou" if head[1] == "bbox" else head[1]
        return f"{('rcnn', 'atss')[int(head[2])]}.{box}"
    if rpn:
        return f"rpn.{term[rpn[1]]}"
    return (plain[1] or "").replace("_", ".") + where + term[plain[2]]


@pytest.mark.parametrize("family, case", ALL_CASES)
def test_tiny_models_equal_the_authors_forward_and_backward(recorded, monkeypatch, first_k,
                                                            ten_pairs, family, case):
    rec = recorded(f"{family}_tiny")
    cfg, model, criterion = recorded_model(rec, family, **CASES[case])
    if family == "co_dino":
        draws = [t(rec[key]) for key in sorted(rec) if key.startswith(f"{case}/dn_draw")]
        monkeypatch.setattr(dino, "draw_noise", recorded_noise(draws))

        # their Co-DINO has a pass for each head, but does not mask padding queries
        def mask(weights):
            return customized_mask([torch.ones_like(weight) for weight in weights])

        monkeypatch.setattr(co_detr, "customized_mask", mask)
    images, padding, targets = recorded_batch(rec, case)
    outputs = model.train()(images, padding, targets)
    if case == "plain":
        check_inner(recorded(f"{family}_tiny_inner"), model, outputs)
    losses = criterion(outputs, targets)
    theirs = {}
    names = rec[f"{case}/loss_names"].tolist()
    for name, value in zip(names, rec[f"{case}/loss_values"].tolist()):
        if name != "acc0":
            theirs[our_name(name)] = theirs.get(our_name(name), 0.0) + value
    assert losses.keys() == theirs.keys()
    for name, value in theirs.items():
        assert losses[name].item() == pytest.approx(value, rel=5e-5, abs=1e-5), name
    total = sum(losses.values())
    assert total.item() == pytest.approx(float(rec[f"{case}/total"]), rel=1e-5)

    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients = authors_names.to_authors(gradients, family)
    assert sorted(gradients) == sorted(rec["param_names"].tolist())
    largest = rec[f"{case}/grad_norm"].max()
    for name, norm in zip(rec["param_names"].tolist(), rec[f"{case}/grad_norm"]):
        difference = abs(float(gradients[name].norm()) - norm)
        assert difference < 1e-3 * max(norm, largest / 1000), name
    given = [x.grad.norm().item() for x in model.detector.backbone.maps if x is not None]
    np.testing.assert_allclose(given, rec[f"{case}/feat_grad_norm"], rtol=1e-3)


def check_inner(rec, model, outputs):
    """Intermediate values, in the order in which they arise."""
    pyramid = model.pyramid(outputs["memory"])
    co = outputs["co_outputs"]
    for i, x in enumerate(pyramid.maps):
        close(x, rec[f"encoded{i}"], 1e-4, f"encoded{i}")
    dn = outputs.get("dn_outputs")
    layers = outputs["aux_outputs"] + [outputs]
    for ours, theirs in (("pred_logits", "dec_scores"), ("pred_boxes", "dec_boxes")):
        x = recordings.stacked(layers, ours)
        if dn:
            x = torch.cat((recordings.stacked(dn["aux_outputs"] + [dn], ours), x), 2)
        close(x, rec[theirs], 1e-4, theirs)
    enc = outputs["enc_outputs"]
    if dn:
        close(enc["pred_logits"], rec["topk_scores"], 1e-4, "proposals' scores")
        close(enc["pred_boxes"], rec["topk_boxes"], 1e-4, "proposals' boxes")
    else:
        scores = rec["enc_scores_first_channel"]
        close(enc["pred_logits"][..., 0], scores, 1e-4, "proposals' scores")
        close(outputs["anchors"], rec["init_reference"], 1e-4, "first references")

    parts = {"rpn_cls": (co["rpn"]["logits"], 9), "rpn_reg": (co["rpn"]["deltas"], 9),
             "atss_cls": (co["atss"]["logits"], 1), "atss_reg": (co["atss"]["deltas"], 1),
             "atss_cen": (co["atss"]["centerness"], 1)}
    start = 0
    for i, (h, w) in enumerate(pyramid.shapes):
        end = start + h * w
        for name, (values, per_cell) in parts.items():
            if f"{name}{i}" in rec:
                level = values[:, per_cell * start:per_cell * end].flatten(1)
                theirs = by_anchor(t(rec[f"{name}{i}"]), 1).flatten(1).numpy()
                close(level, theirs, 1e-4, f"{name}{i}")
        start = end
    close(co["rcnn"]["logits"], rec["roi_scores"], 2e-4, "roi scores")
    close(co["rcnn"]["deltas"].flatten(1), rec["roi_deltas"], 2e-4, "roi deltas")
    rois = np.concatenate([rec["roi_boxes0"], rec["roi_boxes1"]])
    close(co["rcnn"]["rois"], rois, 1e-3, "rois")
    for i, head in enumerate(("rcnn", "atss")):
        part = co[f"{head}.queries"]
        assert torch.equal(part["labels"], t(rec[f"plain/aux{i}_labels"]))
        close(part["weights"], rec[f"plain/aux{i}_label_weights"], 0, "weights")
        for ours, theirs in (("pred_logits", "scores"), ("pred_boxes", "boxes")):
            values = recordings.stacked(part["layers"], ours)
            close(values, rec[f"plain/aux{i}_{theirs}"], 2e-4, f"{head} {theirs}")


@pytest.mark.parametrize("family", FORMS)
def test_detections_of_tiny_models_equal_the_authors(recorded, family):
    rec = recorded(f"{family}_tiny")
    sizes = t(rec["image_sizes"]).double()
    rescaled = sizes / t(rec["scale_factor"]).double()[:, [1, 0]]
    for head, name, top_k in (("detr", "detr", 30 if family == "co_dino" else 100),
                              ("atss", "one-stage", 100), ("rcnn", "two-stage", 100)):
        cfg, model, _ = recorded_model(rec, family, eval_head=head, top_k=top_k)
        images, padding, _ = recorded_batch(rec, "plain")
        with torch.no_grad():
            outputs = model.eval()(images, padding)
        compare(detect(outputs, sizes, cfg), rec, f"infer/{name}")
        compare(detect(outputs, rescaled, cfg), rec, f"infer/{name}_rescaled")
        if f"infer/{name}_without_nms/dets0" in rec:
            without = replace(cfg, soft_nms=0.0, top_k=300)
            compare(detect(outputs, sizes, without), rec, f"infer/{name}_without_nms")


@pytest.mark.parametrize("family, file, trained, kept", [
    ("co_dino", "co_dino_5scale_r50", 65_204_005, 48_044_300),
    ("co_deformable", "co_deformable_detr_r50", 65_129_894, 47_594_380)])
def test_released_checkpoints_map_one_to_one(shared, family, file, trained, kept):
    lines = (shared / "golden" / "co_detr" / f"keys_{file}.txt").read_text().split("\n")
    keys = dict(line.split() for line in lines if line and not line.startswith("#"))
    shape = {}
    for key, text in keys.items():
        shape[key] = () if text == "scalar" else tuple(map(int, text.split("x")))
    authors = {key: torch.empty(s, device="meta") for key, s in shape.items()}
    recognized, found = released.recognize(authors)
    assert recognized == family
    expected = override(Config(), FORMS[family])
    assert override(Config(), found) == expected
    with torch.device("meta"):
        model, _ = build(expected, 80)
    ours = authors_names.from_authors(authors, family)
    expected = model.state_dict()
    assert {k: x.shape for k, x in ours.items()} == {k: x.shape for k, x in expected.items()}
    counters = {key for key in authors if key.endswith("num_batches_tracked")}
    back = authors_names.to_authors(ours, family)
    assert back.keys() == authors.keys() - counters
    assert all(back[key].shape == authors[key].shape for key in back)

    learned = [key for key in authors if key not in counters and "running_" not in key]
    assert sum(int(np.prod(shape[key])) for key in learned) == trained
    # what is left at test time: no label embedding
    at_test = [x for key, x in ours.items() if key.startswith("detector.") and "running_" not in key
               and not key.startswith("detector.label_enc.")]
    assert sum(x.numel() for x in at_test) == kept


# ---- claims and corner cases

def small(variant="", **changes):
    """A two-layer model of width 32 on the tiny backbone; forward and backward in milliseconds."""
    torch.manual_seed(0)
    sizes = dict(dim=32, ffn_dim=48, decoder_layers=2, num_queries=9, roi_dim=32)
    values = {**SMALL, **VARIANTS.get(variant, {}), **sizes, **changes}
    cfg = override(Config(), values)
    return (cfg, *build(cfg, 5))


BOTH = ["", "co_deformable_small"]
PLAIN = "plain_deformable_small"


@pytest.mark.parametrize("variant", BOTH)
@pytest.mark.parametrize("heads", ["none", "atss", "rcnn", "retinanet", "fcos", "gfl",
                                   "retinanet,rcnn,atss"])
@pytest.mark.parametrize("objects", [(3, 0), (0, 0), (14, 1)])
def test_every_parameter_gets_a_finite_gradient(variant, heads, objects):
    cfg, model, criterion = small(variant, aux_heads=heads)
    check_gradients(cfg, model, criterion, objects)


@pytest.mark.parametrize("variant, levels, adapter", [
    (PLAIN, 4, "auto"), (PLAIN, 1, "auto"), (PLAIN, 1, "identity"), ("", 1, "pyramid")])
def test_plain_and_single_scale_detectors_train_with_their_heads(variant, levels, adapter):
    """Single-scale: `dim` 64, as a map of one cell needs two channels a group."""
    cfg, model, criterion = small(variant, num_feature_levels=levels, adapter=adapter, dim=64)
    assert model.strides == {"identity": [32, 64]}.get(adapter, [8, 16, 32, 64, 128])
    check_gradients(cfg, model, criterion, (3, 1))


def check_gradients(cfg, model, criterion, objects):
    heads = cfg.aux_heads
    images, padding, targets = batch((64, 96), (48, 64), objects=objects)
    losses = criterion(model(images, padding, targets), targets)
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    named = set(heads.split(",")) - {"none"}
    if "rcnn" in named:
        named.add("rpn")
    found = {name.split(".")[0] for name in losses}
    assert found & {"rpn", "rcnn", "atss", "retinanet", "fcos", "gfl"} == named


@pytest.mark.parametrize("variant", BOTH)
def test_it_overfits_four_scenes(variant):
    cfg, model, criterion = small(variant)
    groups = param_groups(model, override(RECIPE, SMALL))
    seen = [sum(losses.values()) for losses in overfit(model, criterion, groups)]
    assert sum(seen[-5:]) / 5 < 0.6 * seen[0]


@pytest.mark.parametrize("variant", BOTH)
def test_at_test_time_the_plain_detector_remains(variant):
    """Bit-identical to the detector alone, whatever the heads' weights are."""
    cfg, model, _ = small(variant)
    images, padding, targets = batch((64, 96), (48, 64))
    model.eval()
    for p in model.detector.class_embed.parameters():
        p.data += 0.05 * torch.randn_like(p)
    plain = model.detector(images, padding)
    wrapped = model(images, padding, targets)
    assert wrapped.keys() == plain.keys()
    for name in ("pred_logits", "pred_boxes", "queries", "anchors"):
        assert torch.equal(plain[name], wrapped[name])
    for name, p in model.named_parameters():
        if not name.startswith("detector."):
            p.data.fill_(torch.nan)
    assert torch.equal(model(images, padding)["pred_boxes"], plain["pred_boxes"])


@pytest.mark.parametrize("variant", BOTH)
def test_heads_teach_the_encoder(variant):
    """Section 3.2: the loss of every head and of its queries reaches the encoder and the
    backbone."""
    cfg, model, criterion = small(variant, aux_heads="rcnn,atss,retinanet,fcos")
    images, padding, targets = batch((64, 96), (48, 64), objects=(3, 2))
    losses = criterion(model(images, padding, targets), targets)
    for prefix in ("rpn.", "rcnn.", "atss.", "retinanet.", "fcos.", "rcnn.queries.",
                   "atss.queries.", "retinanet.queries.", "fcos.queries."):
        model.zero_grad()
        part = sum(value for name, value in losses.items() if name.startswith(prefix))
        part.backward(retain_graph=True)
        assert model.detector.encoder[0].linear1.weight.grad.abs().sum() > 0, prefix
        assert model.detector.backbone.conv1.weight.grad.abs().sum() > 0, prefix


def test_groups_of_customized_queries_do_not_see_each_other(first_k):
    """Other queries of one head leave all other losses bit-identical."""
    cfg, model, criterion = small(backbone_norm="group", dn_number=1, dn_label_noise=0.0,
                                  dn_box_noise=0.0, aux_heads="rcnn,atss,retinanet")
    images, padding, targets = batch((64, 96), (48, 64), objects=(3, 2))
    before = criterion(model(images, padding, targets), targets)
    model.aux_queries["atss"].pos_norm.bias.data += 1
    after = criterion(model(images, padding, targets), targets)
    changed = {name for name in before if before[name] != after[name]}
    assert changed and all(name.startswith("atss.queries.") for name in changed)


@pytest.mark.parametrize("variant", BOTH)
def test_one_decoder_pass_for_all_heads_is_a_pass_for_each(variant, monkeypatch):
    cfg, model, _ = small(variant, aux_heads="rcnn,atss,retinanet", backbone_norm="group")
    calls, decode = [], model.detector.decode

    def recording_decode(*args):
        calls.append(args)
        return decode(*args)

    monkeypatch.setattr(model.detector, "decode", recording_decode)
    images, padding, targets = batch((64, 96), (48, 64), objects=(3, 1))
    co = model(images, padding, targets)["co_outputs"]
    assert len(calls) == 2   # the detector's, and this one
    memory, joined, _ = calls[1]
    start = 0
    for head in model.heads:
        part = co[f"{head}.queries"]
        end = start + part["labels"].shape[1]
        own = type(joined)(*(None if x is None else x[:, start:end] for x in joined))
        alone, _ = decode(memory, own, customized_mask([part["weights"]]))
        for ours, layer in zip(part["layers"], alone):
            for name in layer:
                torch.testing.assert_close(ours[name], layer[name], rtol=1e-5, atol=1e-6)
        start = end
    assert start == joined.content.shape[1]


def test_candidates_of_one_cell_share_its_feature():
    """Nine anchors a cell: row 9 c + i reads feature c."""
    features = torch.arange(4.0)[:, None].expand(4, 8)
    labels = torch.full((36,), 5)
    labels[[0, 10, 35]] = 1
    candidates = Candidates(torch.rand(36, 4), labels, torch.rand(36, 4), features)
    chosen = choose_rows([candidates], torch.ones(1, 2), 5, Config(aux_negatives=False))
    assert chosen.features[0, :3, 0].tolist() == [0, 1, 3]


def test_content_of_co_dinos_queries_is_coordinates_only():
    with_features = co_detr.CustomizedQueries(32, True)
    without = co_detr.CustomizedQueries(32, False)
    boxes = torch.rand(1, 4, 4)
    a, b = torch.randn(2, 1, 4, 32)
    assert torch.equal(without(boxes, a).content, without(boxes, b).content)
    assert without(boxes, a).position is None
    assert not torch.equal(with_features(boxes, a).content, with_features(boxes, b).content)


def test_the_published_factors():
    """6 layers and lambda_2 = 2: 12 for the RPN, 12 and 120 for the second stage, 12, 24 and 12 for
    ATSS."""
    cfg = Config()
    assert cfg.lambda_heads * cfg.decoder_layers == 12
    assert co_detr.HEAD_LOSSES["rcnn"].__globals__["GIOU_WEIGHT"] == 10
    assert co_detr.HEAD_LOSSES["atss"].__globals__["GIOU_WEIGHT"] == 2


def test_images_with_fewer_positives_get_negatives_then_padding_queries():
    def image(positives, negatives):
        n = positives + negatives
        labels = torch.tensor([1] * positives + [5] * negatives, dtype=torch.int64)
        return Candidates(torch.rand(n, 4), labels, torch.rand(n, 4), torch.rand(n, 8))

    def weights_of(images, **changes):
        return choose_rows(images, torch.ones(len(images), 2), 5, Config(**changes)).weights

    images = [image(20, 100), image(3, 100), image(3, 4)]
    chosen = choose_rows(images, torch.ones(3, 2), 5, Config())
    weights = chosen.weights
    assert (chosen.labels < 5).sum(1).tolist() == [20, 3, 3]
    assert weights.sum(1).tolist() == [20, 20, 7]
    mask = customized_mask([weights])
    assert not mask[:2].any() and mask[2, 0, :, 7:].sum() == 20 * 13 - 13
    assert weights_of(images[1:]).shape == (2, 9)
    assert weights_of(images, aux_queries=12).shape == (3, 12)
    assert weights_of(images, aux_negatives=False).sum(1).tolist() == [20, 3, 3]
    assert weights_of([image(0, 0), image(0, 0)]).sum() == 0


def test_padding_queries_change_nothing_for_the_others():
    cfg, model, _ = small("co_deformable_small", backbone_norm="group")
    memory = model.detector.encode(*batch((64, 96), (48, 64))[:2])
    boxes, features = torch.rand(2, 12, 4) / 2 + 0.2, torch.rand(2, 12, 32)
    weights = torch.ones(2, 12)
    weights[:, 9:] = 0
    make = model.aux_queries["atss"]
    few, _ = model.detector.decode(memory, make(boxes[:, :9], features[:, :9]))
    padded, _ = model.detector.decode(memory, make(boxes, features), customized_mask([weights]))
    boxes = padded[-1]["pred_boxes"]
    assert torch.allclose(few[-1]["pred_boxes"], boxes[:, :9], atol=1e-6)
    assert boxes.isfinite().all()


def test_co_dino_has_untied_heads_and_as_many_labels_as_classes():
    _, model, _ = small()
    assert len({id(head) for head in model.detector.bbox_embed}) == 2
    assert model.detector.label_enc.num_embeddings == 5
    assert all(projection[0].bias is None for projection in model.detector.input_proj)


def test_learning_rates_come_in_groups():
    for variant, count in (("", 2), ("co_deformable_small", 3)):
        cfg, model, _ = small(variant)
        groups = param_groups(model, RECIPE)
        assert len(groups) == count
        grouped = sum(p.numel() for group in groups for p in group["params"])
        assert grouped == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("size", [(16, 16), (8, 200), (33, 65)])
@pytest.mark.parametrize("variant", BOTH)
def test_tiny_and_thin_images(size, variant):
    cfg, model, criterion = small(variant, dim=64, backbone_norm="group")
    images, padding, targets = batch(size, objects=(2,))
    losses = criterion(model(images, padding, targets), targets)
    assert sum(losses.values()).isfinite()
    outputs = model.eval()(images, padding)
    detections = detect(outputs, torch.tensor([size]), replace(cfg, top_k=10_000))
    assert detections[0]["scores"].isfinite().all()


@pytest.mark.parametrize("head", ["atss", "atss2", "rcnn", "retinanet", "fcos", "gfl"])
def test_each_head_can_detect_on_its_own(head):
    heads = "rcnn,atss,atss,retinanet,fcos,gfl"
    cfg, model, _ = small(eval_head=head, aux_heads=heads, top_k=20)
    nn.init.normal_(model.gfl.reg.weight)   # at the start its boxes are all alike
    images, padding, _ = batch((64, 96), (48, 64))
    sizes = ((128, 192), (48, 64))
    detections = detect(model.eval()(images, padding), torch.tensor(sizes), cfg)
    for image, (h, w) in zip(detections, sizes):
        assert len(image["scores"]) == 20 and (image["scores"].diff() <= 0).all()
        assert (image["boxes"] >= 0).all()
        assert (image["boxes"] <= torch.tensor([w, h, w, h])).all()


def test_misspelt_heads_name_the_choices():
    with pytest.raises(UserError, match="none or some of rcnn, atss, retinanet, fcos, gfl"):
        small(aux_heads="atss,paa")
    with pytest.raises(UserError, match="eval_head detr or one of"):
        small(aux_heads="atss", eval_head="rcnn")
    with pytest.raises(UserError, match="base dino, h_detr, deformable_detr, got 'detr'"):
        small(base="detr")


def test_heads_and_adapters_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="rcnn once in aux_heads"):
        small(aux_heads="rcnn,atss,rcnn")
    with pytest.raises(UserError, match="adapter auto, identity or pyramid, got 'fpn'"):
        small(adapter="fpn")
    with pytest.raises(UserError, match="pyramid with a single feature level.*got 3"):
        small(adapter="pyramid")


def test_the_adapter_makes_five_maps_of_one_and_adds_one_to_many():
    """Section 3.2. Sizes of an image of 25 x 42 cells; with convolutions that average what lies in
    the map, a constant map stays constant."""
    class Mean(nn.Module):
        def __init__(self, stride):
            super().__init__()
            self.stride = stride

        def forward(self, x):
            return nn.functional.avg_pool2d(x, 3, self.stride, 1, count_include_pad=False)

    one = torch.full((1, 4, 25, 42), 3.0)
    strides = [8, 16, 32, 64, 128]
    finer = [Mean(1), Mean(1)]
    coarser = [Mean(2), Mean(2)]
    maps = multi_scale_adapter([one], finer, coarser, strides, (800, 1333))
    sizes = [tuple(x.shape[2:]) for x in maps]
    assert sizes == [(100, 167), (50, 84), (25, 42), (13, 21), (7, 11)]
    assert maps[2] is one
    for x in maps:
        assert torch.allclose(x, torch.full_like(x, 3.0))
    many = [torch.rand(1, 4, 8, 12), torch.rand(1, 4, 4, 6)]
    maps = multi_scale_adapter(many, [], [Mean(2)], [16, 32, 64], (128, 192))
    assert maps[:2] == many and maps[2].shape[2:] == (2, 3)


def test_equal_heads_with_equal_weights_double_the_loss():
    """Each has parameters and queries of its own; K = 2 leaves the weights of the losses alone."""
    cfg, model, criterion = small(aux_heads="atss,atss", backbone_norm="group")
    assert model.heads == ["atss", "atss2"]
    images, padding, targets = batch((64, 96), (48, 64), objects=(3, 2))
    losses = criterion(model(images, padding, targets), targets)
    assert losses["atss.cls"] != losses["atss2.cls"]
    model.atss2.load_state_dict(model.atss.state_dict())
    losses = criterion(model(images, padding, targets), targets)
    for term in ("cls", "giou", "centerness"):
        assert losses[f"atss.{term}"] == losses[f"atss2.{term}"]
    assert model(images, padding, targets)["co_outputs"]["atss2.queries"]["layers"]


@pytest.mark.parametrize("heads, shares", [
    ("atss,rcnn,gfl", {"rpn": 1, "atss": 1, "gfl": 1}),
    ("atss,rcnn,gfl,fcos", {"rpn": 1 / 2, "atss": 1 / 2, "gfl": 1 / 4}),
    ("atss,atss,atss,atss,atss,atss", {"atss": 1 / 3, "atss6": 1 / 3})])
def test_more_than_three_heads_share_their_weights(heads, shares):
    """As in the authors' configurations: halves of four heads, thirds of six; GFL half of it."""
    names = co_detr.head_names(heads)
    for name, share in shares.items():
        assert co_detr.loss_share(name, names) == pytest.approx(share)


@pytest.mark.parametrize("heads, waits", [("none", 1), ("atss", 5), ("retinanet", 5), ("rcnn", 9),
                                          ("rcnn,atss", 12)])
def test_forward_and_losses_wait_for_the_device_as_often_as_stated(heads, waits):
    """Once for the matching, once for the region of the objects; every head for its positives, the
    rows of its queries, and their positives; Faster R-CNN also for its samples (2) and proposals
    (one an image). NMS waits after each round besides, which depends on the boxes."""
    _, model, criterion = small(aux_heads=heads)
    inputs = batch((64, 96), (48, 64), objects=(3, 2))
    model(*inputs)   # the kernel tests itself at its first use
    with HostWaits([list(model.state_dict().values()), inputs]) as found:
        criterion(model(*inputs), inputs[-1])
    assert len(found.found) == waits, found.found


# ---- recipes

PUBLISHED = {   # variant: epochs, epoch of the drop, drop path, as in the released configurations
    "": (12, 11, 0.0), "24_epochs": (24, 20, 0.0), "36_epochs": (36, 30, 0.0),
    "swin_l": (12, 11, 0.3), "swin_l_24_epochs": (24, 20, 0.5), "swin_l_36_epochs": (36, 30, 0.6),
    "swin_l_o365": (16, 8, 0.3), "vit_l": (12, 7, 0.4), "co_deformable": (12, 11, 0.0),
    "lsj": (12, 11, 0.0), "lsj_36_epochs": (36, 30, 0.0), "lsj_9_encoder_layers": (12, 11, 0.0),
    "lsj_9_encoder_layers_36_epochs": (36, 30, 0.0), "lsj_swin_l": (12, 11, 0.3),
    "lsj_swin_l_24_epochs": (24, 20, 0.5), "lsj_swin_l_36_epochs": (36, 30, 0.5),
    "lvis": (12, 11, 0.0), "lsj_lvis": (12, 11, 0.0), "lsj_swin_l_lvis": (36, 30, 0.3),
    "lsj_swin_l_o365_lvis": (16, 8, 0.3),
    "co_deformable_swin_t": (12, 11, 0.2), "co_deformable_swin_t_36_epochs": (36, 30, 0.3),
    "co_deformable_swin_s": (12, 11, 0.2), "co_deformable_swin_s_36_epochs": (36, 30, 0.4),
    "co_deformable_swin_b": (12, 11, 0.2), "co_deformable_swin_b_36_epochs": (36, 30, 0.4),
    "co_deformable_swin_l": (12, 11, 0.3), "co_deformable_swin_l_900q": (36, 30, 0.6)}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_every_length_has_its_published_drop_path(variant):
    cfg, recipe = configure(co_detr, VARIANTS.get(variant, {}))
    assert (recipe.epochs, recipe.lr_drop, cfg.drop_path) == PUBLISHED[variant]
    decay = 0.05 if "co_deformable_swin" in variant else 0.01 if variant == "vit_l" else 1e-4
    assert recipe.weight_decay == decay and recipe.batch_size == (64 if variant == "vit_l" else 16)


def test_jitter_and_lvis_change_what_the_configurations_change():
    sides = {"lsj": 1024, "lsj_9_encoder_layers": 1024, "lsj_swin_l": 1280, "lsj_swin_l_lvis": 1280,
             "lsj_swin_l_o365_lvis": 1536, "lsj_vit_l_lvis": 1536}
    for variant, side in sides.items():
        cfg, recipe = configure(co_detr, VARIANTS[variant])
        assert (recipe.augment, recipe.lsj_size) == ("lsj", side)
        assert recipe.oversample == (0.001 if "lvis" in variant else 0)
        assert cfg.encoder_layers == (9 if "9" in variant else 6)
    cfg, recipe = configure(co_detr, VARIANTS["lsj_vit_l_lvis"])
    assert (recipe.batch_size, recipe.clip, recipe.weight_decay) == (64, 0, 0.05)
    assert [drop * recipe.epochs for drop in recipe.lr_drops] == [9, 15]
    cfg, recipe = configure(co_detr, VARIANTS["plain_deformable"])
    assert (cfg.ffn_dim, cfg.dropout, recipe.batch_size, recipe.lr) == (1024, 0.1, 32, 2e-4)


def test_another_number_of_epochs_takes_the_published_recipe_of_that_length():
    paper = ["--model", "co_detr", "--preset", "paper"]
    _, cfg, recipe = train.parse([*paper, "--variant", "swin_l", "--epochs", "24"])
    assert (recipe.epochs, recipe.lr_drop, cfg.drop_path) == (24, 20, 0.5)
    _, cfg, recipe = train.parse([*paper, "--variant", "co_deformable_swin_s", "--epochs", "36"])
    assert (recipe.lr_drop, cfg.drop_path, cfg.num_queries) == (30, 0.4, 300)
    _, cfg, recipe = train.parse([*paper, "--epochs", "36"])
    assert (recipe.lr_drop, cfg.drop_path) == (30, 0.0)
    # nobody published 48 epochs: the drop moves in proportion; what is asked for stays
    _, cfg, recipe = train.parse([*paper, "--variant", "swin_l", "--epochs", "48"])
    assert (recipe.lr_drop, cfg.drop_path) == (44, 0.3)
    drop_path = ["--drop_path", "0.2"]
    _, cfg, recipe = train.parse([*paper, "--variant", "swin_l", "--epochs", "24", *drop_path])
    assert (recipe.lr_drop, cfg.drop_path) == (20, 0.2)


def test_the_detector_that_starts_from_objects365_has_its_own_denoising_and_batch():
    cfg, recipe = configure(co_detr, VARIANTS["swin_l_o365"])
    assert (cfg.dn_number, cfg.dn_box_noise, recipe.batch_size, recipe.lr) == (500, 0.4, 16, 1e-4)


def test_vit_l_trains_on_longer_images_than_it_is_evaluated_on():
    _, recipe = configure(co_detr, VARIANTS["vit_l"])
    assert data.train_transform(recipe).max_size == 2400
    assert data.eval_transform(recipe).max_size == 2048
    assert data.train_transform(RECIPE).max_size == data.eval_transform(RECIPE).max_size == 1333


def test_the_second_stage_of_vit_l_is_tested_with_settings_of_its_own():
    cfg, _ = configure(co_detr, VARIANTS["vit_l"])
    assert (cfg.test_pre_nms, cfg.test_proposals, cfg.test_proposal_nms) == (8000, 2000, 0.9)
    assert (cfg.rpn_pre_nms, cfg.rpn_proposals) == (4000, 1000)   # in training
    assert (cfg.rcnn_soft_nms, cfg.dense_soft_nms, cfg.soft_nms, cfg.top_k) == (0.5, 0.6, 0.8, 1000)


@pytest.mark.parametrize("head", ["rcnn", "atss"])
def test_settings_of_a_head_at_test_time_are_used(head):
    """Soft-NMS keeps boxes that NMS drops; more proposals survive a higher IoU threshold."""
    soft = {"rcnn": "rcnn_soft_nms", "atss": "dense_soft_nms"}[head]
    images, padding, _ = batch((64, 96), (48, 64))

    def detections(**changes):
        cfg, model, _ = small(eval_head=head, top_k=10_000, **changes)
        nn.init.zeros_(model.atss.cls.bias)
        with torch.no_grad():
            return model.eval()(images, padding)["head_detections"][0]

    plain = detections()
    softened = detections(**{soft: 0.3})
    assert len(softened["scores"]) > len(plain["scores"])
    if head == "rcnn":
        proposals = detections(test_proposal_nms=0.9, test_pre_nms=500, test_proposals=300)
        assert proposals["query"].max() >= 64 * 5 > plain["query"].max()   # five classes each


# ---- normalizers over ranks and micro-batches

SHARES = [(1, 0), (9, 4)]   # objects of the two images of two micro-batches: 7 on average
LOCAL = ("rpn.", "rcnn.cls", "rcnn.giou", "retinanet.cls", "retinanet.giou")


def losses_of(variant, objects, num_boxes, seed=0):
    """Outputs and losses of one micro-batch, images of equal size."""
    heads = "rcnn,atss,retinanet,fcos"
    _, model, criterion = small(variant, aux_heads=heads, backbone_norm="group")
    images, padding, targets = batch(*[(64, 96)] * 4, objects=SHARES[0] + SHARES[1])
    rows = slice(0, 2) if objects == SHARES[0] else slice(4 - len(objects), 4)
    torch.manual_seed(seed)
    outputs = model(images[rows], padding[rows], targets[rows])
    return outputs, criterion(outputs, targets[rows], num_boxes)


def rank_losses(rank, folder, variant):
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    _, losses = losses_of(variant, SHARES[rank], num_boxes=7.0, seed=rank)
    torch.save({name: value.item() for name, value in losses.items()}, folder / f"{rank}.pt")


@pytest.fixture(scope="module", params=BOTH)
def two_ranks(request, tmp_path_factory):
    """The variant, and its losses on two gloo processes with one micro-batch of SHARES each."""
    folder = tmp_path_factory.mktemp("ranks")
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=rank_losses, args=(rank, folder, request.param), daemon=True)
                 for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    return request.param, [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def local_counts(outputs, objects):
    """What the docstring of Criterion counts, by hand: {beginning of the losses' names: count}."""
    co = outputs["co_outputs"]
    counts = {}
    for name, part in co.items():
        if name.endswith(".queries"):
            counts[f"{name}."] = int((part["labels"] < 5).sum())
    atss = co["atss"]
    positive = atss["labels"] < 5
    near = centerness_targets(atss["anchors"][positive], atss["boxes"][positive])
    counts["atss.giou"] = float(near.sum())
    counts["atss."] = sum(max(1, int(image.sum())) for image in positive)
    if "dn_outputs" in outputs:
        counts["dn."] = sum(objects) * outputs["dn_outputs"]["groups"]
    fcos = co["fcos"]
    positive = fcos["labels"] < 5
    near = centerness_targets(fcos["anchors"][positive], fcos["boxes"][positive])
    counts["fcos.giou"] = float(near.sum())
    counts["fcos."] = int(positive.sum())
    counts[""] = sum(objects)
    return counts


def test_two_ranks_divide_by_the_counts_of_the_table(two_ranks):
    variant, ranks = two_ranks
    alone, counts = [], []
    for rank, objects in enumerate(SHARES):
        outputs, losses = losses_of(variant, objects, None, seed=rank)
        alone.append(losses)
        counts.append(local_counts(outputs, objects))
    assert all(counts[0][name] != counts[1][name] for name in counts[0])
    for ours, losses, own in zip(ranks, alone, counts):
        assert ours.keys() == losses.keys()
        for name, value in ours.items():
            expected = losses[name].item()
            if not name.startswith(LOCAL):
                prefix = next(prefix for prefix in own if name.startswith(prefix))
                mean = (counts[0][prefix] + counts[1][prefix]) / 2
                least = 1e-6 if prefix == "fcos.giou" else 1
                expected *= max(least, own[prefix]) / max(least, mean)
            assert value == pytest.approx(expected, rel=1e-5, abs=1e-7), name


def test_two_ranks_compute_the_losses_of_one_where_the_table_predicts_it(two_ranks):
    """Divided by means over GPUs, a loss is that of one large batch; RetinaNet's is not."""
    variant, ranks = two_ranks
    _, one = losses_of(variant, SHARES[0] + SHARES[1], num_boxes=14.0)
    compared = 0
    for name, value in one.items():
        mean = (ranks[0][name] + ranks[1][name]) / 2
        if "queries" not in name and not name.startswith((*LOCAL, "dn.")):
            assert mean == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
            compared += 1
        elif name.startswith("retinanet.") and "queries" not in name:
            assert mean != pytest.approx(value.item(), rel=1e-2), name
    assert compared == 3 * 3 + 3 + 3   # two layers and the proposals; ATSS; FCOS


def test_heads_of_a_micro_batch_weigh_as_much_as_those_of_any_other():
    """Four objects here, 16 in the average micro-batch: the detector's own losses are divided by
    16."""
    cfg, model, criterion = small()
    images, padding, targets = batch((64, 96), (48, 64), objects=(3, 1))
    outputs = model(images, padding, targets)
    alone, among = criterion(outputs, targets), criterion(outputs, targets, 16.0)
    for name, value in alone.items():
        own = name.startswith(("rpn.", "rcnn.", "atss.", "dn."))
        assert among[name].item() == pytest.approx(value.item() / (1 if own else 4), rel=1e-5), name
