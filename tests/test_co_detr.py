"""co_detr.py: the authors' recordings part by part and whole, then one test per claim of the paper."""
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.recipe import override
from engine import authors_names
from engine import released
import co_detr
import dino
import recordings
from boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh
from co_detr import (ATSS_SIDES, BACKGROUND, IGNORED, NINE_SIDES, RECIPE, SMALL, VARIANTS, Candidates, CoDETR, Config, Criterion,
                     Objects, Pyramid, atss_assign, best_proposals, build, choose_rows, detect, grid_anchors, keep_apart,
                     max_iou_assign, param_groups, quality_focal_loss, region_detections, retinanet_assign, rpn_targets,
                     sample, valid_anchors)
from matcher import Weights, focal_loss, match_cost
from recordings import GivenMaps, batch, close, overfit, tensor


@pytest.fixture
def recorded(golden):
    """`recorded("anchors")` opens one recording of the Co-DETR code."""
    return lambda name: golden(f"co_detr/{name}")


@pytest.fixture
def first_k(monkeypatch):
    """The recordings' deterministic choice: the first k of n."""
    monkeypatch.setattr(co_detr, "draw", lambda n, k: torch.arange(n)[:k])


def t(array):
    """Recorded array -> tensor of float32 or int64."""
    array = np.asarray(array)
    return torch.as_tensor(array.astype(np.float32 if array.dtype.kind == "f" else np.int64 if array.dtype.kind in "iu"
                                        else bool))


def pyramid_of(shapes, strides):
    return Pyramid([], [tuple(s) for s in np.asarray(shapes).tolist()], list(strides))


def levels(rec, prefix):
    """prefix0, prefix1, ...: the levels of one head's output."""
    return [t(rec[key]) for key in sorted(k for k in rec if re.fullmatch(re.escape(prefix) + r"\d", k))]


def objects_of(rec, case, sizes, labels=True):
    return [Objects(t(rec[f"{case}/labels{i}"]) if labels else torch.zeros(len(rec[f"{case}/gt{i}"]), dtype=torch.int64),
                    t(rec[f"{case}/gt{i}"]), size) for i, size in enumerate(t(sizes))]


# --------------------------------------------------------------------------------------- parts against the recordings

@pytest.mark.parametrize("name, sides", [("atss5", ATSS_SIDES), ("atss6", ATSS_SIDES), ("rpn5", NINE_SIDES),
                                         ("rpn6", NINE_SIDES)])
def test_anchors_and_their_validity_equal_the_authors(recorded, name, sides):
    rec = recorded("anchors")
    pyramid = pyramid_of(rec[f"{name}/sizes"], rec[f"{name}/strides"].tolist())
    for level, anchors in enumerate(grid_anchors(pyramid, sides, "cpu")):
        close(anchors, rec[f"{name}/anchors{level}"], 1e-4, f"level {level}")
    for level, valid in enumerate(valid_anchors(pyramid, t(rec[f"{name}/pad_shape"])[None], len(sides))):
        assert torch.equal(valid[0], t(rec[f"{name}/valid{level}"]))


@pytest.mark.parametrize("case", ["random5", "random5b", "no_gt", "outside", "overlapping", "tiny_gt", "random6", "no_gt6",
                                  "image_sized"])
def test_atss_assignment_equals_the_authors(recorded, case):
    rec = recorded("atss_assigner")
    which = str(rec[f"{case}/which"])
    assigned = atss_assign(t(rec[which]), rec[f"{which}_num_level"].tolist(), t(rec[f"{case}/gt"]))
    assert torch.equal(assigned + 1, t(rec[f"{case}/assigned"]))
    labels, _ = co_detr.look_up(assigned, Objects(t(rec[f"{case}/gt_labels"]), t(rec[f"{case}/gt"]), None), 11)
    assert torch.equal(torch.where(labels == 11, -1, labels), t(rec[f"{case}/labels"]))


def test_atss_assignment_with_ties_agrees_up_to_the_ties(recorded):
    rec = recorded("atss_assigner")
    assigned = atss_assign(t(rec["anchors5"]), rec["anchors5_num_level"].tolist(), t(rec["ties/gt"]))
    assert ((assigned + 1 > 0) != (t(rec["ties/assigned"]) > 0)).sum() <= 6


def test_atss_assignment_ignores_anchors_of_the_padding(recorded):
    rec = recorded("atss_assigner")
    valid = t(rec["padded/valid"])
    assigned = atss_assign(t(rec["anchors5"])[valid], rec["padded/num_level_valid"].tolist(), t(rec["padded/gt"]))
    assert torch.equal(assigned + 1, t(rec["padded/assigned_valid_only"]))


@pytest.mark.parametrize("case", ["random", "no_gt", "outside", "low_quality", "ties", "many"])
def test_max_iou_assignment_and_sampling_equal_the_authors(recorded, first_k, case):
    rec = recorded("max_iou_assigner_sampler")
    gt = t(rec[f"rpn/{case}/gt"])
    assigned = max_iou_assign(t(rec["anchors"]), gt, 0.7, 0.3, 0.3)
    theirs = t(rec[f"rpn/{case}/assigned"])
    assert torch.equal(assigned + 1, torch.where(theirs < 0, -1, theirs))
    for ours, name in zip(sample(assigned, 64, 0.5), ("pos", "neg")):
        assert torch.equal(ours, t(rec[f"rpn/{case}/sample_identity/{name}"]))
    gt, boxes = t(rec[f"rcnn/{case}/gt"]), t(rec[f"rcnn/{case}/proposals"])
    assigned = max_iou_assign(boxes, gt, 0.5, 0.5)
    assert torch.equal(assigned + 1, t(rec[f"rcnn/{case}/assigned"]))
    model = small(roi_samples=24)[1]
    (rois, labels, targets), = model.sample_rois([boxes], [Objects(t(rec[f"rcnn/{case}/gt_labels"]), gt, None)])
    close(rois, rec[f"rcnn/{case}/sample_identity/boxes"], 0, "rois")
    positive = labels < 5 if len(gt) == 0 else targets.abs().sum(1) > 0
    assert torch.equal(labels[positive], t(rec[f"rcnn/{case}/sample_identity/pos_labels"]))
    close(targets[positive], rec[f"rcnn/{case}/sample_identity/pos_gt_boxes"], 0, "objects")


@pytest.mark.parametrize("case", ["random", "many", "ties", "no_gt"])
def test_random_samples_are_those_of_the_recorded_permutations(recorded, monkeypatch, case):
    rec = recorded("max_iou_assigner_sampler")
    permutations = [t(rec[k]) for k in sorted(rec) if k.startswith(f"rpn/{case}/sample_random/perm")]
    monkeypatch.setattr(co_detr, "draw", lambda n, k: permutations.pop(0)[:k].sort().values if k < n else torch.arange(n))
    found = sample(max_iou_assign(t(rec["anchors"]), t(rec[f"rpn/{case}/gt"]), 0.7, 0.3, 0.3), 64, 0.5)
    for ours, name in zip(found, ("pos", "neg")):
        assert torch.equal(ours, t(rec[f"rpn/{case}/sample_random/{name}"]))


def test_proposals_equal_the_authors(recorded):
    rec = recorded("rpn_coder_nms")
    maps = list(zip(levels(rec, "rpn/cls"), levels(rec, "rpn/reg")))
    pyramid = pyramid_of([m.shape[-2:] for m, _ in maps], rec["rpn/strides"].tolist())
    logits = torch.cat([co_detr.by_anchor(m, 1)[..., 0] for m, _ in maps], 1)
    deltas = torch.cat([co_detr.by_anchor(d, 4) for _, d in maps], 1)
    found = best_proposals(logits, deltas, grid_anchors(pyramid, NINE_SIDES, "cpu"), t(rec["rpn/img_shapes"]), 60, 50)
    for i, boxes in enumerate(found):
        close(boxes, rec[f"rpn/im{i}/proposals"][:, :4], 1e-3, f"image {i}")


def test_elementary_losses_equal_the_authors(recorded):
    rec = recorded("elementary_losses")
    logits, labels = t(rec["pred"]).requires_grad_(), t(rec["labels"])
    quality = t(rec["quality"])
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0]]).expand(20, -1)                    # IoU with a slice of itself: its width
    slices = torch.stack((quality / 2, torch.full_like(quality, 0.5), quality, torch.ones_like(quality)), -1)
    weight = t(rec["weight"])[:, None]
    loss = (quality_focal_loss(logits, labels, boxes, slices) * weight).sum() / 7
    close(loss, rec["qfl"], 1e-5, "quality focal loss")
    close(torch.autograd.grad(loss, logits)[0], rec["qfl_grad"], 1e-5, "its gradient")
    loss = 2 * (focal_loss(logits, labels, None, None) * weight).sum() / 7
    close(loss, rec["focal_weight2"], 2e-5, "focal loss")
    close(torch.autograd.grad(loss, logits)[0], rec["focal_grad"], 1e-5, "its gradient")


@pytest.mark.parametrize("case", ["both", "second_empty", "no_gt"])
def test_atss_losses_equal_the_authors(recorded, case):
    rec = recorded("atss_losses")
    maps = [[x.requires_grad_() for x in levels(rec, f"{case}/{name}")] for name in ("cls", "reg", "cen")]
    pyramid = pyramid_of([m.shape[-2:] for m in maps[0]], rec["strides"].tolist())
    objects = objects_of(rec, case, rec["image_sizes"])
    head = co_detr.DenseHead(32, 11, 5, ATSS_SIDES, atss_assign, True)
    targets = head.targets(pyramid, grid_anchors(pyramid, ATSS_SIDES, "cpu"), objects)
    for i in range(2):
        assert torch.equal(targets["labels"][i], t(rec[f"{case}/target_labels{i}"]))
        close(targets["anchors"][i], rec[f"{case}/target_anchors{i}"], 1e-4, "anchors")
        close(targets["boxes"][i], rec[f"{case}/target_boxes{i}"], 1e-4, "boxes")
    assert torch.equal(targets["weights"].float(), t(rec[f"{case}/label_weights"]))
    logits, deltas, centerness = (torch.cat([co_detr.by_anchor(x, k) for x in m], 1) for m, k in zip(maps, (11, 4, 1)))
    terms = Criterion(Config()).dense(logits, deltas, centerness[..., 0], **targets)
    for term, name in (("cls", "cls"), ("giou", "bbox"), ("centerness", "centerness")):
        theirs = rec[f"{case}/loss_{name}"].sum()
        assert 4 * terms[term].item() == pytest.approx(float(theirs), rel=1e-5, abs=1e-5), term
    if case == "both":
        (4 * sum(terms.values())).backward()
        for m, name in zip(maps, ("cls", "reg", "cen")):
            for i, x in enumerate(m):
                close(x.grad, rec[f"{case}/grad_{name}{i}"], 1e-5, f"gradient of {name}{i}")


@pytest.mark.parametrize("case", ["both", "second_empty", "no_gt"])
def test_rpn_losses_equal_the_authors(recorded, first_k, case):
    rec = recorded("rpn_losses")
    maps = [[x.requires_grad_() for x in levels(rec, f"{case}/{name}")] for name in ("cls", "reg")]
    pyramid = pyramid_of([m.shape[-2:] for m in maps[0]], rec["strides"].tolist())
    objects = objects_of(rec, case, rec["image_sizes"], labels=False)
    targets = rpn_targets(pyramid, grid_anchors(pyramid, NINE_SIDES, "cpu"), objects, 256)
    assert torch.equal(targets["sampled"], t(rec[f"{case}/label_weights"]) > 0)
    assert torch.equal(targets["positive"], (t(rec[f"{case}/target_labels"]) == 0) & targets["sampled"])
    close(targets["to_object"], rec[f"{case}/target_deltas"], 1e-5, "deltas")
    logits, deltas = (torch.cat([co_detr.by_anchor(x, k) for x in m], 1) for m, k in zip(maps, (1, 4)))
    terms = Criterion(Config()).rpn(logits[..., 0], deltas, **targets)
    for term, name in (("cls", "cls"), ("l1", "bbox")):
        assert 4 * terms[term].item() == pytest.approx(float(rec[f"{case}/loss_rpn_{name}"].sum()), rel=1e-5, abs=1e-6)
    if case == "both":
        (4 * sum(terms.values())).backward()
        for m, name in zip(maps, ("cls", "reg")):
            for i, x in enumerate(m):
                close(x.grad, rec[f"{case}/grad_{name}{i}"], 1e-6, f"gradient of {name}{i}")


@pytest.mark.parametrize("case", ["both", "second_empty", "no_gt"])
def test_rcnn_losses_equal_the_authors(recorded, first_k, case):
    rec = recorded("rcnn_losses")
    model = small(roi_samples=512)[1]
    model.num_classes = 11
    objects = [Objects(t(rec[f"{case}/labels{i}"]), t(rec[f"{case}/gt{i}"]), None) for i in range(2)]
    samples = model.sample_rois([t(rec[f"{case}/proposals{i}"])[:, :4] for i in range(2)], objects)
    rois, labels, boxes = (torch.cat(parts) for parts in zip(*samples))
    close(rois, rec[f"{case}/rois"][:, 1:], 1e-4, "rois")
    assert torch.equal(labels, t(rec[f"{case}/target_labels"]))
    close(boxes, rec[f"{case}/target_boxes"], 1e-4, "boxes")
    logits, deltas = t(rec[f"{case}/cls"]).requires_grad_(), t(rec[f"{case}/reg"]).requires_grad_()
    terms = Criterion(Config()).rcnn(logits, deltas.unflatten(1, (11, 4)), rois, labels, boxes)
    assert 4 * terms["cls"].item() == pytest.approx(float(rec[f"{case}/loss_cls"]), rel=1e-5)
    assert 4 * terms["giou"].item() == pytest.approx(float(rec[f"{case}/loss_bbox"]), rel=1e-5)
    (4 * sum(terms.values())).backward()
    close(logits.grad, rec[f"{case}/grad_cls"], 1e-5, "gradient of classes")
    close(deltas.grad, rec[f"{case}/grad_reg"], 1e-5, "gradient of boxes")
    found = region_detections(2 * logits.detach(), deltas.detach().unflatten(1, (11, 4)), rois, torch.tensor([160, 192]), 30)
    kept = found["scores"] > 0.05   # the recording's threshold; NMS does not depend on lower scores
    close(found["boxes"][kept], rec[f"{case}/infer_dets"][:, :4], 1e-3, "boxes")
    close(found["scores"][kept], rec[f"{case}/infer_dets"][:, 4], 1e-5, "scores")
    assert torch.equal(found["labels"][kept], t(rec[f"{case}/infer_labels"]))


@pytest.mark.parametrize("name, strides", [("extract4", 8), ("extract5", 4)])
def test_regions_read_the_level_of_their_size(recorded, name, strides):
    rec = recorded("roi_align")
    maps = levels(rec, f"{name}/feat")
    rois = t(rec[f"{name}/rois"])
    model = small()[1]
    model.strides = rec[f"{name}/strides"].tolist()
    memory = type("Memory", (), dict(tokens=torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1),
                                     shapes=[tuple(m.shape[-2:]) for m in maps]))
    order = rois[:, 0].argsort(stable=True)
    counts = torch.bincount(rois[:, 0].long(), minlength=2).tolist()
    ours = model.pool(memory, rois[order, 1:], counts)
    close(ours.permute(0, 3, 1, 2), rec[f"{name}/out"][order.numpy()], 2e-5, "pooled")


@pytest.mark.parametrize("source", ["atss", "atss_empty", "rcnn"])
@pytest.mark.parametrize("padding", ["neg", "zero"])
@pytest.mark.parametrize("most", [300, 16])
def test_customised_queries_and_their_losses_equal_the_authors(recorded, first_k, source, padding, most):
    rec = recorded("aux_queries")
    if source == "rcnn":
        features = [t(rec[f"rcnn/feats{i}"]) for i in range(2)]
    else:
        features = torch.cat([m.flatten(2).transpose(1, 2) for m in levels(rec, "feat")], 1)
    candidates = [Candidates(*(t(rec[f"{source}/{name}{i}"]) for name in ("coords", "labels", "targets")), features[i])
                  for i in range(2)]
    scales = t(rec["image_sizes"])[:, [1, 0, 1, 0]].float()
    cfg = Config(aux_queries=most, aux_negatives=padding == "neg")
    chosen, weights = choose_rows(candidates, scales, 11, cfg)
    at = f"{source}/{padding}_max{most}/"
    close(chosen.boxes, rec[at + "coords"], 1e-5, "boxes")
    assert torch.equal(chosen.labels, t(rec[at + "labels"]))
    close(chosen.features, rec[at + "feats"], 1e-5, "features")
    close(weights, rec[at + "label_weights"], 0, "weights")
    positive = chosen.labels < 11
    close(chosen.targets[positive], rec[at + "targets"][positive.numpy()], 1e-5, "targets")
    assert torch.equal(positive, t(rec[at + "box_weights"])[..., 0] > 0)
    if padding == "zero" and keep_apart([weights]) is not None:   # rows of queries that exist: the same mask
        assert torch.equal(keep_apart([weights])[:, 0][weights > 0], t(rec[at + "attn_mask_per_image"])[weights > 0])
    for form, ours in (("deformable", dict(loss_class=2.0, quality_focal=False)), ("dino", {})):
        scores, boxes = (t(rec[at + f"dec_{name}"]).requires_grad_() for name in ("scores", "boxes"))
        layers = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(scores, boxes)]
        terms = Criterion(replace(cfg, **ours)).queries(layers, chosen.labels, chosen.targets, weights)
        names = [f"{layer}{term}" for layer in ("aux0.", "") for term in ("cls", "l1", "giou")]
        np.testing.assert_allclose([float(terms[n].detach()) for n in names], rec[at + f"{form}_losses"], rtol=2e-5)
        if at + f"{form}_grad_scores" in rec:
            sum(terms.values()).backward()
            close(scores.grad, rec[at + f"{form}_grad_scores"], 1e-5, "gradient of scores")
            close(boxes.grad, rec[at + f"{form}_grad_boxes"], 1e-4, "gradient of boxes")


@pytest.mark.parametrize("form", ["deformable", "dino"])
def test_matching_equals_the_authors(recorded, form):
    rec = {k.split("/", 1)[1]: v for k, v in recorded("embeddings_matching_denoising").items()
           if k.startswith(f"match_{form}/")}
    image = torch.tensor([200.0, 150.0, 200.0, 150.0])
    targets = [{"labels": t(rec["labels"]), "boxes": box_xyxy_to_cxcywh(t(rec["gt"])) / image}]
    logits, boxes = t(rec["logits"])[None, None], t(rec["boxes"])[None, None]
    cost = match_cost(logits, boxes, targets, Weights(2, 5, 2))
    close(cost[0, 0], rec["cost"], 1e-4, "cost")
    (query, index), = Criterion(Config()).match({"pred_logits": logits[0], "pred_boxes": boxes[0]}, targets)
    assigned = torch.zeros(30, dtype=torch.int64).index_put((query,), index + 1)
    assert torch.equal(assigned, t(rec["assigned"]))


def recorded_noise(draws):
    """Four recorded draws in place of `dino.draw_noise`."""
    chance, labels, sign, amount = draws

    def draw(copies, objects, num_classes, device):
        drawn = torch.zeros(copies * objects, dtype=torch.int64)
        drawn[chance < 0.25] = labels
        return dino.Noise(chance.view(copies, objects), drawn.view(copies, objects),
                          sign.view(copies, objects, 4) * 2.0 - 1, amount.view(copies, objects, 4))
    return draw


@pytest.fixture
def ten_pairs(monkeypatch):
    """The recordings have 10 denoising pairs; DINO's own rule for fewer than 50 is another."""
    monkeypatch.setattr(dino, "denoising_groups", lambda number, fullest, copies: max(1, number // fullest) if fullest else 1)


@pytest.mark.parametrize("case", ["two", "one_empty", "many", "none"])
def test_denoising_queries_equal_the_authors(recorded, ten_pairs, case):
    rec = recorded("embeddings_matching_denoising")
    sizes = torch.tensor([[200.0, 150.0, 200.0, 150.0], [160.0, 120.0, 160.0, 120.0]])
    targets = [{"labels": t(rec[f"dn/{case}/labels{i}"]),
                "boxes": box_xyxy_to_cxcywh(t(rec[f"dn/{case}/gt{i}"])) / sizes[i]} for i in range(2)]
    table = torch.nn.Embedding.from_pretrained(t(rec["dn/label_embedding"]))
    draws = [t(rec[k]) for k in sorted(rec) if k.startswith(f"dn/{case}/draw")]
    found = dino.denoising_queries(targets, table, 11, dino.Config(dn_number=10), 30, recorded_noise(draws))
    assert found.groups == int(rec[f"dn/{case}/groups"]) and found.content.shape[1] == int(rec[f"dn/{case}/pad_size"])
    close(found.content, rec[f"dn/{case}/label_query"], 1e-6, "content")
    close(found.reference, 1 / (1 + np.exp(-rec[f"dn/{case}/box_query_logit"])), 1e-6, "boxes")
    assert torch.equal(found.attn_mask, t(rec[f"dn/{case}/attn_mask"]))


@pytest.mark.parametrize("name, top_k, threshold", [("topk20", 20, 0.0), ("topk20_rescaled", 20, 0.0),
                                                    ("topk50_score0.2", 50, 0.0), ("softnms0.8", 25, 0.8)])
def test_selected_detections_equal_the_authors(recorded, name, top_k, threshold):
    rec = recorded("select_detections")
    sizes = t(rec["image_sizes"]).double()
    if name.endswith("rescaled"):
        sizes = sizes / t(rec["scale_factor"]).double()[:, [1, 0]]
    outputs = {"pred_logits": t(rec["scores_logit"]), "pred_boxes": t(rec["boxes"])}
    compare(detect(outputs, sizes, Config(top_k=top_k, soft_nms=threshold)), rec, name)


def compare(found, rec, name, tolerance=0.02):
    """Detections against a recorded list, both sorted by score."""
    for i, image in enumerate(found):
        dets, labels = rec[f"{name}/dets{i}"], rec[f"{name}/labels{i}"]
        order = np.argsort(-dets[:, 4], kind="stable")
        close(image["scores"], dets[order, 4], 1e-4, f"{name}: scores")
        close(image["boxes"], dets[order, :4], tolerance, f"{name}: boxes")
        assert torch.equal(image["labels"], t(labels[order])), f"{name}: labels"


# ------------------------------------------------------------------------------------------------- recorded models

SIZES = dict(dim=32, num_heads=8, encoder_layers=2, decoder_layers=2, ffn_dim=48, num_queries=30, rpn_pre_nms=200,
             rpn_proposals=80, rpn_samples=64, roi_samples=48, roi_dim=40, dn_number=10, backbone_weights="imagenet")
FORMS = {"co_dino": {}, "co_deformable": VARIANTS["co_deformable"]}
CASES = {"plain": {}, "second_image_empty": {}, "max12_lambda": dict(aux_queries=12, lambda_queries=0.5),
         "zero_padding": dict(aux_negatives=False), "zero_padding_max12": dict(aux_negatives=False, aux_queries=12),
         "no_padding_mask": {}}
ALL_CASES = [("co_dino", case) for case in CASES] + [("co_deformable", case) for case in list(CASES)[:3]]


def recorded_model(rec, family, **changes):
    cfg = override(Config(), {**FORMS[family], **SIZES, "top_k": 100, **changes})
    maps = [m.requires_grad_() for m in levels(rec, "in/feat")]
    model = CoDETR(GivenMaps(maps), cfg, 11)
    weights = {k[3:]: t(v) for k, v in rec.items() if k.startswith("sd/")}
    model.load_state_dict(authors_names.from_authors(weights, family))
    return cfg, model, Criterion(cfg)


def recorded_batch(rec, case):
    sizes, (H, W) = t(rec["image_sizes"]), rec["padded_size"].tolist()
    padding = torch.ones(2, H, W, dtype=torch.bool)
    for mask, (h, w) in zip(padding, sizes.tolist()):
        mask[:h, :w] = False
    if case == "no_padding_mask":
        padding[:] = False
    targets = []
    for i, size in enumerate(sizes):
        keep = slice(0, 0) if case == "second_image_empty" and i == 1 else slice(None)
        h, w = (H, W) if case == "no_padding_mask" else size.tolist()
        boxes = box_xyxy_to_cxcywh(t(rec[f"in/gt{i}"])[keep]) / torch.tensor([w, h, w, h])
        targets.append({"labels": t(rec[f"in/labels{i}"])[keep], "boxes": boxes, "size": size})
    return torch.zeros(2, 3, H, W), padding, targets


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
        return f"{('rcnn', 'atss')[int(head[2])]}.{'giou' if head[1] == 'bbox' else head[1]}"
    if rpn:
        return f"rpn.{term[rpn[1]]}"
    return (plain[1] or "").replace("_", ".") + where + term[plain[2]]


@pytest.mark.parametrize("family, case", ALL_CASES)
def test_tiny_models_equal_the_authors_forward_and_backward(recorded, monkeypatch, first_k, ten_pairs, family, case):
    rec = recorded(f"{family}_tiny")
    cfg, model, criterion = recorded_model(rec, family, **CASES[case])
    if cfg.base == "dino":
        draws = [t(rec[k]) for k in sorted(rec) if k.startswith(f"{case}/dn_draw")]
        monkeypatch.setattr(dino, "draw_noise", recorded_noise(draws))
        monkeypatch.setattr(co_detr, "keep_apart",   # their Co-DINO hides heads from each other, but not padding
                            lambda weights: keep_apart([torch.ones_like(w) for w in weights]))
    images, padding, targets = recorded_batch(rec, case)
    outputs = model.train()(images, padding, targets)
    if case == "plain":
        check_inner(recorded(f"{family}_tiny_inner"), model, outputs)
    losses = criterion(outputs, targets)
    theirs = {}
    for name, value in zip(rec[f"{case}/loss_names"].tolist(), rec[f"{case}/loss_values"].tolist()):
        if name != "acc0":
            theirs[our_name(name)] = theirs.get(our_name(name), 0.0) + value
    assert losses.keys() == theirs.keys()
    for name, value in theirs.items():
        assert losses[name].item() == pytest.approx(value, rel=5e-5, abs=1e-5), name
    total = sum(losses.values())
    assert total.item() == pytest.approx(float(rec[f"{case}/total"]), rel=1e-5)
    total.backward()
    grads = authors_names.to_authors({n: p.grad for n, p in model.named_parameters()}, family)
    assert sorted(grads) == sorted(rec["param_names"].tolist())
    largest = rec[f"{case}/grad_norm"].max()
    for name, norm in zip(rec["param_names"].tolist(), rec[f"{case}/grad_norm"]):
        assert abs(float(grads[name].norm()) - norm) < 1e-3 * max(norm, largest / 1000), name
    given = [m.grad.norm().item() for m in model.detector.backbone.maps if m is not None]
    np.testing.assert_allclose(given, rec[f"{case}/feat_grad_norm"], rtol=1e-3)


def check_inner(rec, model, outputs):
    """Intermediate values, in the order in which they arise."""
    memory, co = outputs["memory"], outputs["co_outputs"]
    pyramid = model.pyramid(memory)
    for i, x in enumerate(pyramid.maps):
        close(x, rec[f"encoded{i}"], 1e-4, f"encoded{i}")
    dn = outputs.get("dn_outputs")
    layers = outputs["aux_outputs"] + [outputs]
    for ours, theirs in (("pred_logits", "dec_scores"), ("pred_boxes", "dec_boxes")):
        found = recordings.stacked(layers, ours)
        if dn:
            found = torch.cat((recordings.stacked(dn["aux_outputs"] + [dn], ours), found), 2)
        close(found, rec[theirs], 1e-4, theirs)
    if dn:
        close(outputs["enc_outputs"]["pred_logits"], rec["topk_scores"], 1e-4, "proposals' scores")
        close(outputs["enc_outputs"]["pred_boxes"], rec["topk_boxes"], 1e-4, "proposals' boxes")
    else:
        close(outputs["enc_outputs"]["pred_logits"][..., 0], rec["enc_scores_first_channel"], 1e-4, "proposals' scores")
        close(outputs["anchors"], rec["init_reference"], 1e-4, "first references")
    counts, start = [h * w for h, w in pyramid.shapes], 0
    for i, n in enumerate(counts):
        for name, values, per_cell in (("rpn_cls", co["rpn"]["logits"], 9), ("rpn_reg", co["rpn"]["deltas"], 9),
                                       ("atss_cls", co["atss"]["logits"], 1), ("atss_reg", co["atss"]["deltas"], 1),
                                       ("atss_cen", co["atss"]["centerness"], 1)):
            if f"{name}{i}" in rec:
                found = values[:, per_cell * start:per_cell * (start + n)]
                close(found.flatten(1), co_detr.by_anchor(t(rec[f"{name}{i}"]), 1).flatten(1).numpy(), 1e-4, f"{name}{i}")
        start += n
    close(co["rcnn"]["logits"], rec["roi_scores"], 2e-4, "roi scores")
    close(co["rcnn"]["deltas"].flatten(1), rec["roi_deltas"], 2e-4, "roi deltas")
    close(co["rcnn"]["rois"], np.concatenate([rec["roi_boxes0"], rec["roi_boxes1"]]), 1e-3, "rois")
    for i, head in enumerate(("rcnn", "atss")):
        part = co[f"{head}.queries"]
        assert torch.equal(part["labels"], t(rec[f"plain/aux{i}_labels"]))
        close(part["weights"], rec[f"plain/aux{i}_label_weights"], 0, "weights")
        for ours, theirs in (("pred_logits", "scores"), ("pred_boxes", "boxes")):
            close(recordings.stacked(part["layers"], ours), rec[f"plain/aux{i}_{theirs}"], 2e-4, f"{head} {theirs}")


@pytest.mark.parametrize("family", FORMS)
def test_detections_of_tiny_models_equal_the_authors(recorded, family):
    rec = recorded(f"{family}_tiny")
    for head, name, top_k in (("detr", "detr", 30 if family == "co_dino" else 100), ("atss", "one-stage", 100),
                              ("rcnn", "two-stage", 100)):
        cfg, model, _ = recorded_model(rec, family, eval_head=head)
        cfg = replace(cfg, top_k=top_k)
        images, padding, _ = recorded_batch(rec, "plain")
        with torch.no_grad():
            outputs = model.eval()(images, padding)
        sizes = t(rec["image_sizes"]).double()
        compare(detect(outputs, sizes, cfg), rec, f"infer/{name}")
        compare(detect(outputs, sizes / t(rec["scale_factor"]).double()[:, [1, 0]], cfg), rec, f"infer/{name}_rescaled")
        if f"infer/{name}_without_nms/dets0" in rec:
            compare(detect(outputs, sizes, replace(cfg, soft_nms=0.0, top_k=300)), rec, f"infer/{name}_without_nms")


@pytest.mark.parametrize("family, file, trained, kept", [
    ("co_dino", "co_dino_5scale_r50", 65_204_005, 48_044_300),
    ("co_deformable", "co_deformable_detr_r50", 65_129_894, 47_594_380)])
def test_released_checkpoints_map_one_to_one(shared, family, file, trained, kept):
    lines = (shared / "golden" / "co_detr" / f"keys_{file}.txt").read_text().split("\n")
    keys = dict(line.split() for line in lines if line and not line.startswith("#"))
    shape = {k: () if v == "scalar" else tuple(map(int, v.split("x"))) for k, v in keys.items()}
    authors = {k: torch.empty(s, device="meta") for k, s in shape.items()}
    found_family, found = released.recognize(authors)
    assert found_family == family
    expected = override(Config(), FORMS[family])
    assert override(Config(), found) == expected
    with torch.device("meta"):
        model, _ = build(expected, 80)
    ours = authors_names.from_authors(authors, family)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}
    counters = {k for k in authors if k.endswith("num_batches_tracked")}
    back = authors_names.to_authors(ours, family)
    assert back.keys() == authors.keys() - counters
    assert all(back[k].shape == authors[k].shape for k in back)
    learned = [k for k in authors if k not in counters and "running_" not in k]
    assert sum(int(np.prod(shape[k])) for k in learned) == trained
    own = ("detector.label_enc.",)
    mine = sum(v.numel() for k, v in ours.items() if k.startswith("detector.") and "running_" not in k
               and not k.startswith(own))
    assert mine == kept


# ------------------------------------------------------------------------------------------ claims and corner cases

def small(variant="", **changes):
    """A two-layer model of width 32 on the tiny backbone; forward and backward in milliseconds."""
    torch.manual_seed(0)
    cfg = override(Config(), {**SMALL, **VARIANTS.get(variant, {}), **dict(dim=32, ffn_dim=48, decoder_layers=2,
                               num_queries=9, roi_dim=32), **changes})
    return (cfg, *build(cfg, 5))


BOTH = ["", "co_deformable_small"]


@pytest.mark.parametrize("variant", BOTH)
@pytest.mark.parametrize("heads", ["none", "atss", "rcnn", "retinanet", "retinanet,rcnn,atss"])
@pytest.mark.parametrize("objects", [(3, 0), (0, 0), (14, 1)])
def test_every_parameter_gets_a_finite_gradient(variant, heads, objects):
    cfg, model, criterion = small(variant, aux_heads=heads)
    images, padding, targets = batch((64, 96), (48, 64), objects=objects)
    losses = criterion(model(images, padding, targets), targets)
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    named = set(heads.split(",")) - {"none"}
    assert {n.split(".")[0] for n in losses} & {"rpn", "rcnn", "atss", "retinanet"} == named | (
        {"rpn"} if "rcnn" in heads else set())


@pytest.mark.parametrize("variant", BOTH)
def test_it_overfits_four_scenes(variant):
    cfg, model, criterion = small(variant)
    seen = [sum(losses.values()) for losses in overfit(model, criterion, param_groups(model, override(RECIPE, SMALL)))]
    assert sum(seen[-5:]) / 5 < 0.6 * seen[0]


@pytest.mark.parametrize("variant", BOTH)
def test_at_test_time_the_plain_detector_remains(variant):
    """Same bytes as the detector alone, with the heads' weights anywhere."""
    cfg, model, _ = small(variant)
    images, padding, targets = batch((64, 96), (48, 64))
    model.eval()
    for p in model.detector.class_embed.parameters():
        p.data += 0.05 * torch.randn_like(p)
    plain, wrapped = model.detector(images, padding), model(images, padding, targets)
    assert wrapped.keys() == plain.keys()
    for name in ("pred_logits", "pred_boxes", "queries", "anchors"):
        assert torch.equal(plain[name], wrapped[name])
    heads = [p for n, p in model.named_parameters() if not n.startswith("detector.")]
    for p in heads:
        p.data.fill_(torch.nan)
    assert torch.equal(model(images, padding)["pred_boxes"], plain["pred_boxes"])


@pytest.mark.parametrize("variant", BOTH)
def test_heads_teach_the_encoder(variant):
    """Section 3.2: the loss of every head and of its queries reaches the encoder and the backbone."""
    cfg, model, criterion = small(variant, aux_heads="rcnn,atss,retinanet")
    images, padding, targets = batch((64, 96), (48, 64), objects=(3, 2))
    losses = criterion(model(images, padding, targets), targets)
    for prefix in ("rpn.", "rcnn.", "atss.", "retinanet.", "rcnn.queries.", "atss.queries.", "retinanet.queries."):
        model.zero_grad()
        sum(v for k, v in losses.items() if k.startswith(prefix)).backward(retain_graph=True)
        assert model.detector.encoder[0].linear1.weight.grad.abs().sum() > 0, prefix
        assert model.detector.backbone.conv1.weight.grad.abs().sum() > 0, prefix


def test_groups_of_customised_queries_do_not_meet(monkeypatch):
    """Other queries of one head leave the other heads' losses and the detector's as they were, to the bit."""
    cfg, model, criterion = small(backbone_norm="group", dn_number=1, dn_label_noise=0.0, dn_box_noise=0.0,
                                  aux_heads="rcnn,atss,retinanet")
    images, padding, targets = batch((64, 96), (48, 64), objects=(3, 2))
    monkeypatch.setattr(co_detr, "draw", lambda n, k: torch.arange(n)[:k])
    first = criterion(model(images, padding, targets), targets)
    model.aux_queries["atss"].pos_norm.bias.data += 1
    second = criterion(model(images, padding, targets), targets)
    changed = {k for k in first if first[k] != second[k]}
    assert changed and all(k.startswith("atss.queries.") for k in changed)


@pytest.mark.parametrize("variant", BOTH)
def test_one_decoder_pass_for_all_heads_is_a_pass_for_each(variant, monkeypatch):
    cfg, model, _ = small(variant, aux_heads="rcnn,atss,retinanet", backbone_norm="group")
    calls, decode = [], model.detector.decode
    monkeypatch.setattr(model.detector, "decode", lambda *args: calls.append(args) or decode(*args))
    images, padding, targets = batch((64, 96), (48, 64), objects=(3, 1))
    co = model(images, padding, targets)["co_outputs"]
    assert len(calls) == 2                                                         # the detector's, and this one
    memory, joined, _ = calls[1]
    start = 0
    for head in model.heads:
        part = co[f"{head}.queries"]
        end = start + part["labels"].shape[1]
        alone = decode(memory, type(joined)(*(x if x is None else x[:, start:end] for x in joined)),
                       keep_apart([part["weights"]]))[0]
        for ours, layer in zip(part["layers"], alone):
            for name in layer:
                torch.testing.assert_close(ours[name], layer[name], rtol=1e-5, atol=1e-6)
        start = end
    assert start == joined.content.shape[1]


def test_retinanet_assignment_by_hand():
    anchors = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 20], [0, 0, 10, 22], [0, 0, 10, 24.9], [0, 0, 10, 26], [50, 50, 90, 90]])
    boxes = torch.tensor([[0, 0, 10, 10], [50, 50, 60, 60], [200, 200, 210, 210]]).float()
    assert retinanet_assign(anchors, [6], boxes).tolist() == [0, 0, IGNORED, IGNORED, BACKGROUND, 1]   # IoU 0.0625 is rescued
    assert retinanet_assign(anchors, [6], boxes[:0]).tolist() == [BACKGROUND] * 6


def test_ignored_and_invalid_anchors_cost_nothing():
    _, model, criterion = small(aux_heads="retinanet")
    head = model.retinanet
    pyramid = pyramid_of([(8, 8), (4, 4)], [8, 16])
    objects = [Objects(torch.tensor([2, 4]), torch.tensor([[5.0, 7, 40, 44], [20, 20, 60, 50]]), torch.tensor([40, 56]))]
    targets = head.targets(pyramid, grid_anchors(pyramid, NINE_SIDES, "cpu"), objects)
    weights, anchors = targets["weights"][0], torch.cat(grid_anchors(pyramid, NINE_SIDES, "cpu"))
    valid = torch.cat(valid_anchors(pyramid, objects[0].size[None], 9), 1)[0]
    ignored = valid & ~weights
    iou = co_detr.box_iou(anchors, objects[0].boxes)[0].amax(1)
    assert ignored.any() and (~valid).any() and ((iou >= 0.4) & (iou < 0.5))[ignored].all() and not weights[~valid].any()
    assert (targets["labels"][0, ~weights] == 5).all() and not targets["boxes"][0, ~weights].any()
    logits, deltas = torch.randn(1, len(anchors), 5), torch.randn(1, len(anchors), 4)
    first = criterion.dense(logits, deltas, None, **targets)
    logits[0, ~weights], deltas[0, targets["labels"][0] == 5] = 9.0, 9.0
    second = criterion.dense(logits, deltas, None, **targets)
    assert first == second and first.keys() == {"cls", "giou"}


def test_candidates_of_one_cell_share_its_feature():
    """Nine anchors a cell: row 9 c + i reads feature c."""
    c = Candidates(torch.rand(36, 4), torch.full((36,), 5), torch.rand(36, 4), torch.arange(4.0)[:, None].expand(4, 8))
    c.labels[[0, 10, 35]] = 1
    chosen, _ = choose_rows([c], torch.ones(1, 4), 5, Config(aux_negatives=False))
    assert chosen.features[0, :3, 0].tolist() == [0, 1, 3]


def test_content_of_co_dinos_queries_is_coordinates_only():
    with_features, without = (co_detr.CustomisedQueries(32, features) for features in (True, False))
    boxes = torch.rand(1, 4, 4)
    a, b = torch.randn(2, 1, 4, 32)
    assert torch.equal(without(boxes, a).content, without(boxes, b).content) and without(boxes, a).position is None
    assert not torch.equal(with_features(boxes, a).content, with_features(boxes, b).content)


def test_the_published_factors():
    """Unit losses become 12 (RPN), 12 and 120 (RoI head), 12, 24 and 12 (ATSS) with 6 layers and lambda_2 = 2."""
    cfg = Config()
    assert cfg.lambda_heads * cfg.decoder_layers == 12
    criterion = Criterion(cfg)
    far = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    terms = criterion.rcnn(torch.zeros(1, 3), torch.zeros(1, 2, 4), far, torch.tensor([0]), far + 1e6)
    assert float(12 * terms["giou"]) == pytest.approx(120 * 2, rel=1e-3)   # 1 - GIoU of boxes worlds apart is 2


def test_images_with_fewer_positives_get_negatives_then_hidden_rows():
    def image(positives, negatives):
        n = positives + negatives
        return Candidates(torch.rand(n, 4), torch.tensor([1] * positives + [5] * negatives), torch.rand(n, 4),
                          torch.rand(n, 8))
    images = [image(20, 100), image(3, 100), image(3, 4)]
    chosen, weights = choose_rows(images, torch.ones(3, 4), 5, Config())
    assert (chosen.labels < 5).sum(1).tolist() == [20, 3, 3] and weights.sum(1).tolist() == [20, 20, 7]
    mask = keep_apart([weights])
    assert not mask[:2].any() and mask[2, 0, :, 7:].sum() == 20 * 13 - 13
    assert choose_rows(images[1:], torch.ones(2, 4), 5, Config())[1].shape == (2, 9)
    assert choose_rows(images, torch.ones(3, 4), 5, Config(aux_queries=12))[1].shape == (3, 12)
    assert choose_rows(images, torch.ones(3, 4), 5, Config(aux_negatives=False))[1].sum(1).tolist() == [20, 3, 3]
    empty = image(0, 0)
    assert choose_rows([empty, empty], torch.ones(2, 4), 5, Config())[1].sum() == 0


def test_hidden_rows_change_nothing_for_the_others():
    cfg, model, _ = small("co_deformable_small", backbone_norm="group")
    memory = model.detector.encode(*batch((64, 96), (48, 64))[:2])
    boxes, features = torch.rand(2, 12, 4) / 2 + 0.2, torch.rand(2, 12, 32)
    weights = torch.ones(2, 12)
    weights[:, 9:] = 0
    few = model.detector.decode(memory, model.aux_queries["atss"](boxes[:, :9], features[:, :9]))[0][-1]
    all_rows = model.detector.decode(memory, model.aux_queries["atss"](boxes, features), keep_apart([weights]))[0][-1]
    assert torch.allclose(few["pred_boxes"], all_rows["pred_boxes"][:, :9], atol=1e-6)
    assert all_rows["pred_boxes"].isfinite().all()


def test_co_dino_has_untied_heads_and_as_many_labels_as_classes():
    _, model, _ = small()
    assert len({id(h) for h in model.detector.bbox_embed}) == 2 and model.detector.label_enc.num_embeddings == 5
    assert all(p[0].bias is None for p in model.detector.input_proj)


def test_learning_rates_come_in_groups():
    for variant, count in (("", 2), ("co_deformable_small", 3)):
        cfg, model, _ = small(variant)
        groups = param_groups(model, RECIPE)
        assert len(groups) == count
        assert sum(p.numel() for g in groups for p in g["params"]) == sum(
            p.numel() for p in model.parameters() if p.requires_grad)


def test_losses_of_heads_are_weighed_by_objects_over_micro_batches():
    cfg, model, criterion = small()
    images, padding, targets = batch((64, 96), (48, 64), objects=(3, 1))
    outputs = model(images, padding, targets)
    alone, among = criterion(outputs, targets), criterion(outputs, targets, 16.0)
    assert all(float(among[k]) == pytest.approx(float(alone[k]) / 4, rel=1e-5) for k in alone)


@pytest.mark.parametrize("size", [(16, 16), (8, 200), (33, 65)])
@pytest.mark.parametrize("variant", BOTH)
def test_tiny_and_thin_images(size, variant):
    cfg, model, criterion = small(variant, dim=64, backbone_norm="group")
    images, padding, targets = batch(size, objects=(2,))
    assert sum(criterion(model(images, padding, targets), targets).values()).isfinite()
    assert detect(model.eval()(images, padding), torch.tensor([size]), replace(cfg, top_k=10_000))[0]["scores"].isfinite().all()


@pytest.mark.parametrize("head", ["atss", "rcnn", "retinanet"])
def test_each_head_can_detect_on_its_own(head):
    cfg, model, _ = small(eval_head=head, aux_heads="rcnn,atss,retinanet")
    found = detect(model.eval()(*batch((64, 96), (48, 64))[:2]), torch.tensor([[128, 192], [48, 64]]), replace(cfg, top_k=20))
    for image, (h, w) in zip(found, ((128, 192), (48, 64))):
        assert len(image["scores"]) == 20 and (image["scores"].diff() <= 0).all()
        assert (image["boxes"] >= 0).all() and (image["boxes"] <= torch.tensor([w, h, w, h])).all()


def test_misspelt_heads_name_the_choices():
    with pytest.raises(ValueError, match="none or some of rcnn, atss, retinanet"):
        small(aux_heads="atss,fcos")
    with pytest.raises(ValueError, match="eval_head detr or one of"):
        small(aux_heads="atss", eval_head="rcnn")
    with pytest.raises(ValueError, match="base dino or h_detr"):
        small(base="detr")
