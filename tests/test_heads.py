"""heads/: the authors' recordings of every part, then each rule by hand."""
import ast
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import heads
from boxes import box_iou
from head_recordings import levels, objects_of, pyramid_of, t
from heads import anchors as anchors_module
from heads import atss, fcos
from heads.anchors import (BACKGROUND, DELTA_STD, IGNORED, NINE_SIZES, Objects, Pyramid,
                           assign_by_iou, assigned_objects, by_anchor, detections_after_nms,
                           grid_anchors, sample, valid_anchors)
from heads.atss import ATSS
from heads.fcos import FCOS
from heads.gfl import (GFL, REG_MAX, distribution_focal_loss, gfl_counts, gfl_losses,
                       mean_distances)
from heads.faster_rcnn import (RPN, RoIHead, best_proposals, detect_regions, pool_regions,
                               roi_losses, rpn_losses, rpn_targets, sample_regions)
from heads.regions import decode_deltas
from heads.retinanet import RetinaNet, retinanet_losses
from recordings import close


@pytest.fixture
def recorded(golden):
    """`recorded("anchors")` opens one recording of the Co-DETR code."""
    return lambda name: golden(f"co_detr/{name}")


@pytest.fixture
def first_k(monkeypatch):
    """The recordings' deterministic choice: the first k of n."""
    monkeypatch.setattr(anchors_module, "draw", lambda n, k: torch.arange(n)[:k])


def test_heads_import_boxes_and_matcher_only():
    allowed = {"math", "typing", "torch", "boxes", "matcher", "heads"}
    for path in Path(anchors_module.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in allowed, path


def test_the_example_in_the_docstring_of_the_package_runs():
    example = heads.__doc__.partition("RetinaNet no counts):\n\n")[2]
    own = {"torch": torch, "Pyramid": Pyramid, "Objects": Objects, **vars(atss)}
    exec(textwrap.dedent(example), own)
    assert own["losses"].keys() == {"cls", "giou", "centerness"}
    assert own["losses"]["giou"].requires_grad
    assert own["detections"][0].keys() >= {"scores", "labels", "boxes"}


# ---- parts against the recordings

@pytest.mark.parametrize("name, sizes", [("atss5", ATSS.anchor_sizes), ("atss6", ATSS.anchor_sizes),
                                         ("rpn5", NINE_SIZES), ("rpn6", NINE_SIZES)])
def test_anchors_and_their_validity_equal_the_authors(recorded, name, sizes):
    rec = recorded("anchors")
    pyramid = pyramid_of(rec[f"{name}/sizes"], rec[f"{name}/strides"].tolist())
    for level, anchors in enumerate(grid_anchors(pyramid, sizes)):
        close(anchors, rec[f"{name}/anchors{level}"], 1e-4, f"level {level}")
    counts = [len(anchors) for anchors in grid_anchors(pyramid, sizes)]
    start = 0
    valid = valid_anchors(pyramid, rec[f"{name}/pad_shape"].tolist(), len(sizes))
    for level, (rows, count) in enumerate(zip(valid, counts)):
        mask = torch.zeros(count, dtype=torch.bool)
        mask[rows - start] = True
        assert torch.equal(mask, t(rec[f"{name}/valid{level}"]))
        start += count


@pytest.mark.parametrize("case", ["random5", "random5b", "no_gt", "outside", "overlapping",
                                  "tiny_gt", "random6", "no_gt6", "image_sized"])
def test_atss_assignment_equals_the_authors(recorded, case):
    rec = recorded("atss_assigner")
    which = str(rec[f"{case}/which"])
    counts = rec[f"{which}_num_level"].tolist()
    assigned = ATSS.assign(t(rec[which]), counts, t(rec[f"{case}/gt"]))
    assert torch.equal(assigned + 1, t(rec[f"{case}/assigned"]))
    image = Objects(t(rec[f"{case}/gt_labels"]), t(rec[f"{case}/gt"]), None)
    labels, _ = assigned_objects(assigned, image, 11)
    assert torch.equal(torch.where(labels == 11, -1, labels), t(rec[f"{case}/labels"]))


def test_atss_assignment_with_ties_agrees_up_to_the_ties(recorded):
    rec = recorded("atss_assigner")
    counts = rec["anchors5_num_level"].tolist()
    assigned = ATSS.assign(t(rec["anchors5"]), counts, t(rec["ties/gt"]))
    assert ((assigned + 1 > 0) != (t(rec["ties/assigned"]) > 0)).sum() <= 6


def test_atss_assignment_ignores_anchors_of_the_padding(recorded):
    rec = recorded("atss_assigner")
    anchors = t(rec["anchors5"])[t(rec["padded/valid"])]
    counts = rec["padded/num_level_valid"].tolist()
    assigned = ATSS.assign(anchors, counts, t(rec["padded/gt"]))
    assert torch.equal(assigned + 1, t(rec["padded/assigned_valid_only"]))


def test_atss_assignment_by_hand():
    """16 anchors of 8 px and two of 32 px; 11 candidates an object.

    Object 0 has IoUs of 1/2 (twice), 1/8 and 0: the threshold is 0.10 + 0.20. Object 1 takes one of
    its two anchors away, with 8/9. Object 2 lies between four anchors: their IoU exceeds its
    threshold, but their centers lie outside."""
    centers = [(8 * i + 4, 8 * j + 4, 4) for j in range(4) for i in range(4)]
    centers += [(16, 16, 16), (48, 16, 16)]
    anchors = torch.tensor([[x - r, y - r, x + r, y + r] for x, y, r in centers]).float()
    boxes = torch.tensor([[0.0, 0, 16, 8], [8, 0, 17, 8], [15, 15, 17, 17]])
    assigned = ATSS.assign(anchors, [16, 2], boxes)
    assert assigned[:2].tolist() == [0, 1]
    assert (assigned[2:] == BACKGROUND).all()
    assert (ATSS.assign(anchors, [16, 2], boxes[:0]) == BACKGROUND).all()


CASES = ["random", "no_gt", "outside", "low_quality", "ties", "many"]


@pytest.mark.parametrize("case", CASES)
def test_assignment_and_sampling_of_anchors_equal_the_authors(recorded, first_k, case):
    rec = recorded("max_iou_assigner_sampler")
    assigned = assign_by_iou(t(rec["anchors"]), t(rec[f"rpn/{case}/gt"]), 0.7, 0.3, 0.3)
    theirs = t(rec[f"rpn/{case}/assigned"])
    assert torch.equal(assigned + 1, torch.where(theirs < 0, -1, theirs))
    for ours, name in zip(sample(assigned, 64, 0.5), ("pos", "neg")):
        assert torch.equal(ours, t(rec[f"rpn/{case}/sample_identity/{name}"]))


@pytest.mark.parametrize("case", CASES)
def test_assignment_and_sampling_of_regions_equal_the_authors(recorded, first_k, case):
    rec = recorded("max_iou_assigner_sampler")
    gt, boxes = t(rec[f"rcnn/{case}/gt"]), t(rec[f"rcnn/{case}/proposals"])
    assigned = assign_by_iou(boxes, gt, 0.5, 0.5)
    assert torch.equal(assigned + 1, t(rec[f"rcnn/{case}/assigned"]))
    image = Objects(t(rec[f"rcnn/{case}/gt_labels"]), gt, None)
    (rois, labels, targets), = sample_regions([boxes], [image], 24, num_classes=5)
    close(rois, rec[f"rcnn/{case}/sample_identity/boxes"], 0, "rois")
    positive = labels < 5 if len(gt) == 0 else targets.abs().sum(1) > 0
    assert torch.equal(labels[positive], t(rec[f"rcnn/{case}/sample_identity/pos_labels"]))
    close(targets[positive], rec[f"rcnn/{case}/sample_identity/pos_gt_boxes"], 0, "objects")


@pytest.mark.parametrize("case", ["random", "many", "ties", "no_gt"])
def test_random_samples_are_those_of_the_recorded_permutations(recorded, monkeypatch, case):
    rec = recorded("max_iou_assigner_sampler")
    keys = sorted(key for key in rec if key.startswith(f"rpn/{case}/sample_random/perm"))
    permutations = [t(rec[key]) for key in keys]

    def recorded_draw(n, k):
        return permutations.pop(0)[:k].sort().values if k < n else torch.arange(n)

    monkeypatch.setattr(anchors_module, "draw", recorded_draw)
    assigned = assign_by_iou(t(rec["anchors"]), t(rec[f"rpn/{case}/gt"]), 0.7, 0.3, 0.3)
    for ours, name in zip(sample(assigned, 64, 0.5), ("pos", "neg")):
        assert torch.equal(ours, t(rec[f"rpn/{case}/sample_random/{name}"]))


def test_proposals_equal_the_authors(recorded):
    rec = recorded("rpn_coder_nms")
    maps = list(zip(levels(rec, "rpn/cls"), levels(rec, "rpn/reg")))
    pyramid = pyramid_of([logits.shape[-2:] for logits, _ in maps], rec["rpn/strides"].tolist())
    logits = torch.cat([by_anchor(logits, 1)[..., 0] for logits, _ in maps], 1)
    deltas = torch.cat([by_anchor(deltas, 4) for _, deltas in maps], 1)
    anchors = grid_anchors(pyramid, NINE_SIZES)
    proposals = best_proposals(logits, deltas, anchors, t(rec["rpn/img_shapes"]), 60, 50)
    for i, boxes in enumerate(proposals):
        close(boxes, rec[f"rpn/im{i}/proposals"][:, :4], 1e-3, f"image {i}")


BATCHES = ["both", "second_empty", "no_gt"]


@pytest.mark.parametrize("case", BATCHES)
def test_atss_losses_equal_the_authors(recorded, case):
    rec = recorded("atss_losses")
    maps = {name: [x.requires_grad_() for x in levels(rec, f"{case}/{name}")]
            for name in ("cls", "reg", "cen")}
    shapes = [x.shape[-2:] for x in maps["cls"]]
    pyramid = pyramid_of(shapes, rec["strides"].tolist(), rec["image_sizes"])
    targets = ATSS(32, 11, 5).targets(pyramid, objects_of(rec, case, rec["image_sizes"]))
    for i in range(2):
        assert torch.equal(targets["labels"][i], t(rec[f"{case}/target_labels{i}"]))
        close(targets["anchors"][i], rec[f"{case}/target_anchors{i}"], 1e-4, "anchors")
        close(targets["boxes"][i], rec[f"{case}/target_boxes{i}"], 1e-4, "boxes")
    assert torch.equal(targets["weights"].float(), t(rec[f"{case}/label_weights"]))

    outputs = [torch.cat([by_anchor(x, values) for x in maps[name]], 1)
               for name, values in (("cls", 11), ("reg", 4), ("cen", 1))]
    counts = atss.atss_counts(targets["labels"], targets["boxes"], targets["anchors"], 11)
    losses = atss.atss_losses(outputs[0], outputs[1], outputs[2][..., 0], **targets,
                              counts=counts)
    for term, name in (("cls", "cls"), ("giou", "bbox"), ("centerness", "centerness")):
        theirs = float(rec[f"{case}/loss_{name}"].sum())
        assert 4 * losses[term].item() == pytest.approx(theirs, rel=1e-5, abs=1e-5), term
    if case == "both":
        (4 * sum(losses.values())).backward()
        for name, level_maps in maps.items():
            for i, x in enumerate(level_maps):
                close(x.grad, rec[f"{case}/grad_{name}{i}"], 1e-5, f"gradient of {name}{i}")


@pytest.mark.parametrize("case", BATCHES)
def test_rpn_losses_equal_the_authors(recorded, first_k, case):
    rec = recorded("rpn_losses")
    maps = {name: [x.requires_grad_() for x in levels(rec, f"{case}/{name}")]
            for name in ("cls", "reg")}
    pyramid = pyramid_of([x.shape[-2:] for x in maps["cls"]], rec["strides"].tolist())
    objects = objects_of(rec, case, rec["image_sizes"], labels=False)
    targets = rpn_targets(pyramid, grid_anchors(pyramid, NINE_SIZES), objects, 256)
    sampled = t(rec[f"{case}/label_weights"]) > 0
    assert torch.equal(targets["sampled"], sampled)
    assert torch.equal(targets["positive"], (t(rec[f"{case}/target_labels"]) == 0) & sampled)
    close(targets["target_deltas"], rec[f"{case}/target_deltas"], 1e-5, "deltas")

    logits = torch.cat([by_anchor(x, 1) for x in maps["cls"]], 1)[..., 0]
    deltas = torch.cat([by_anchor(x, 4) for x in maps["reg"]], 1)
    losses = rpn_losses(logits, deltas, **targets)
    for term, name in (("cls", "cls"), ("l1", "bbox")):
        theirs = float(rec[f"{case}/loss_rpn_{name}"].sum())
        assert 4 * losses[term].item() == pytest.approx(theirs, rel=1e-5, abs=1e-6), term
    if case == "both":
        (4 * sum(losses.values())).backward()
        for name, level_maps in maps.items():
            for i, x in enumerate(level_maps):
                close(x.grad, rec[f"{case}/grad_{name}{i}"], 1e-6, f"gradient of {name}{i}")


@pytest.mark.parametrize("case", BATCHES)
def test_losses_and_detections_of_the_second_stage_equal_the_authors(recorded, first_k, case):
    rec = recorded("rcnn_losses")
    objects = [Objects(t(rec[f"{case}/labels{i}"]), t(rec[f"{case}/gt{i}"]), None)
               for i in range(2)]
    proposals = [t(rec[f"{case}/proposals{i}"])[:, :4] for i in range(2)]
    samples = sample_regions(proposals, objects, 512, num_classes=11)
    rois, labels, boxes = (torch.cat(parts) for parts in zip(*samples))
    close(rois, rec[f"{case}/rois"][:, 1:], 1e-4, "rois")
    assert torch.equal(labels, t(rec[f"{case}/target_labels"]))
    close(boxes, rec[f"{case}/target_boxes"], 1e-4, "boxes")

    logits = t(rec[f"{case}/cls"]).requires_grad_()
    deltas = t(rec[f"{case}/reg"]).requires_grad_()
    losses = roi_losses(logits, deltas.unflatten(1, (11, 4)), rois, labels, boxes)
    for term, name in (("cls", "cls"), ("giou", "bbox")):
        theirs = float(rec[f"{case}/loss_{name}"])
        assert 4 * losses[term].item() == pytest.approx(theirs, rel=1e-5), term
    (4 * sum(losses.values())).backward()
    close(logits.grad, rec[f"{case}/grad_cls"], 1e-5, "gradient of classes")
    close(deltas.grad, rec[f"{case}/grad_reg"], 1e-5, "gradient of boxes")

    detections = detect_regions(2 * logits.detach(), deltas.detach().unflatten(1, (11, 4)), rois,
                                torch.tensor([160, 192]), 30)
    # the recording has a threshold; NMS does not depend on lower scores
    kept = detections["scores"] > 0.05
    close(detections["boxes"][kept], rec[f"{case}/infer_dets"][:, :4], 1e-3, "boxes")
    close(detections["scores"][kept], rec[f"{case}/infer_dets"][:, 4], 1e-5, "scores")
    assert torch.equal(detections["labels"][kept], t(rec[f"{case}/infer_labels"]))


@pytest.mark.parametrize("name", ["extract4", "extract5"])
def test_features_of_regions_equal_the_authors(recorded, name):
    rec = recorded("roi_align")
    maps = levels(rec, f"{name}/feat")
    coarsest = torch.full((2, maps[0].shape[1], 1, 1), torch.nan)   # not for regions
    pyramid = Pyramid([*maps, coarsest], [*rec[f"{name}/strides"].tolist(), 0], None)
    rois = t(rec[f"{name}/rois"])
    order = rois[:, 0].argsort(stable=True)
    counts = torch.bincount(rois[:, 0].long(), minlength=2).tolist()
    pooled = pool_regions(pyramid, rois[order, 1:], counts)
    close(pooled.permute(0, 3, 1, 2), rec[f"{name}/out"][order.numpy()], 2e-5, "pooled")


# ---- rules by hand

def test_retinanet_assignment_by_hand():
    anchors = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 20], [0, 0, 10, 22], [0, 0, 10, 24.9],
                            [0, 0, 10, 26], [50, 50, 90, 90]])
    boxes = torch.tensor([[0, 0, 10, 10], [50, 50, 60, 60], [200, 200, 210, 210]]).float()
    # the last anchor has an IoU of 0.0625 and is rescued
    expected = [0, 0, IGNORED, IGNORED, BACKGROUND, 1]
    assert RetinaNet.assign(anchors, [6], boxes).tolist() == expected
    assert RetinaNet.assign(anchors, [6], boxes[:0]).tolist() == [BACKGROUND] * 6


def test_ignored_and_invalid_anchors_have_no_loss():
    torch.manual_seed(0)
    head = RetinaNet(32, 5, 2)
    pyramid = pyramid_of([(8, 8), (4, 4)], [8, 16])
    boxes = torch.tensor([[5.0, 7, 40, 44], [20, 20, 60, 50]])
    objects = [Objects(torch.tensor([2, 4]), boxes, torch.tensor([40, 56]))]
    targets = head.targets(pyramid, objects)
    weights = targets["weights"][0]
    anchors = torch.cat(grid_anchors(pyramid, NINE_SIZES))
    valid = torch.zeros(len(anchors), dtype=torch.bool)
    valid[torch.cat(valid_anchors(pyramid, [40, 56], 9))] = True
    ignored = valid & ~weights
    iou = box_iou(anchors, boxes)[0].amax(1)
    assert ignored.any() and ((iou >= 0.4) & (iou < 0.5))[ignored].all()
    assert (~valid).any() and not weights[~valid].any()
    assert (targets["labels"][0, ~weights] == 5).all() and not targets["boxes"][0, ~weights].any()

    logits, deltas = torch.randn(1, len(anchors), 5), torch.randn(1, len(anchors), 4)
    first = retinanet_losses(logits, deltas, **targets)
    logits[0, ~weights] = 9.0
    deltas[0, targets["labels"][0] == 5] = 9.0
    second = retinanet_losses(logits, deltas, **targets)
    assert first == second and first.keys() == {"cls", "giou"}


def test_fcos_assignment_by_hand():
    """Strides 8 and 16, both in an image of 64 x 64: points at 4, 12, ... and at 8, 24, ..."""
    pyramid = pyramid_of([(8, 8), (4, 4)], [8, 16], [(64, 64)])
    anchors = FCOS(32, 5, 2).anchors(pyramid)
    assert anchors[0][0].tolist() == [-28, -28, 36, 36]
    assert anchors[1][0].tolist() == [-56, -56, 72, 72]
    # largest distances of up to 64 px belong to stride 8, more to stride 16
    small, inner, large = [0.0, 0, 24, 16], [8.0, 0, 24, 16], [-60.0, -60, 70, 70]
    boxes = torch.tensor([small, inner, large])
    assigned = FCOS.assign(torch.cat(anchors), [64, 16], boxes)
    first, second = assigned[:64].view(8, 8), assigned[64:].view(4, 4)
    # center of `small`: (12, 8), radius 12: x of 4, 12, 20, y of 4, 12; `inner` is smaller
    assert first[:3, :4].tolist() == [[0, 1, 1, -1], [0, 1, 1, -1], [-1] * 4]
    assert (first[3:] == BACKGROUND).all()
    # center of `large`: (5, 5), radius 24 at stride 16
    assert second.tolist() == [[2, 2, -1, -1], [2, 2, -1, -1], [-1] * 4, [-1] * 4]
    assert FCOS.assign(torch.cat(anchors), [64, 16], boxes[:0]).tolist() == [BACKGROUND] * 80


def test_fcos_ranges_are_those_of_the_paper():
    strides = torch.tensor([8.0, 16, 32, 64, 128])
    lower, upper = fcos.size_ranges(strides, [1] * 5)
    assert lower.tolist() == [0, 64, 128, 256, 512]
    assert upper.tolist() == [64, 128, 256, 512, torch.inf]


def test_fcos_boxes_and_losses_by_hand():
    """A point at (4, 4) of stride 8: distances of 1, 0, 2, 1 strides reach from (-4, 4) to (20,
    12)."""
    anchors = torch.tensor([[[-28.0, -28, 36, 36], [-20, -28, 44, 36]]])
    distances = torch.tensor([[[1.0, 0, 2, 1], [1, 1, 1, 1]]])
    assert FCOS.decode(distances, anchors)[0, 0].tolist() == [-4, 4, 20, 12]
    labels, boxes = torch.tensor([[0, 2]]), torch.tensor([[[0.0, 0, 16, 8], [0, 0, 0, 0]]])
    near = np.sqrt(4 / 12)                      # left 4, right 12; top 4, bottom 4
    counts = fcos.fcos_counts(labels, boxes, anchors, 2)
    assert counts.tolist() == pytest.approx([1, near])
    losses = fcos.fcos_losses(torch.zeros(1, 2, 2), distances, torch.zeros(1, 2), labels, boxes,
                              torch.ones(1, 2), anchors, 2 * counts)
    union = 24 * 8 + 16 * 8 - 16 * 4
    giou = 16 * 4 / union - (24 * 12 - union) / (24 * 12)
    assert float(losses["giou"]) == pytest.approx(2 * (1 - giou) / 2, rel=1e-5)
    assert float(losses["centerness"]) == pytest.approx(np.log(2) / 2, rel=1e-5)
    assert float(losses["cls"]) == pytest.approx((0.25 + 3 * 0.75) / 4 * np.log(2) / 2, rel=1e-5)


def certain(distances):
    """Logits (P, 68) of distributions with all probability in one bin."""
    bins = torch.arange(REG_MAX + 1)
    logits = torch.where(bins == torch.tensor(distances)[..., None], 0.0, -100.0)
    return logits.flatten(-2)


def test_gfl_distances_are_means_of_their_distributions():
    """An anchor of stride 16 with its center at (64, 32), 1, 2, 3 and 4 strides from its sides."""
    anchor = torch.tensor([[0.0, -32.0, 128.0, 96.0]])
    assert mean_distances(torch.zeros(1, 4 * (REG_MAX + 1))).tolist() == [[8.0] * 4]
    boxes = GFL.decode(certain([[1, 2, 3, 4]]), anchor)
    assert boxes.tolist() == [[64 - 16, 32 - 32, 64 + 48, 32 + 64]]


def test_distribution_focal_loss_by_hand():
    """A distance of 2.25 has 3/4 of bin 2 and 1/4 of bin 3; far ones stop below the last bin."""
    logits = torch.zeros(1, 4, REG_MAX + 1)
    logits[0, 0, 2] = 1.0
    uniform = np.log(REG_MAX + 1)
    normalizer = np.log(REG_MAX + np.e)
    distances = torch.tensor([[2.25, 0.0, 7.0, 99.0]])
    expected = (0.75 * (normalizer - 1) + 0.25 * normalizer + 3 * uniform) / 4
    loss = distribution_focal_loss(logits.flatten(1), distances)
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)


def test_gfl_losses_by_hand():
    """One positive with a perfect box: its class target is 1, its box has no GIoU loss."""
    anchors = torch.tensor([[[0.0, -32.0, 128.0, 96.0], [0.0, 0.0, 8.0, 8.0]]])
    boxes = torch.tensor([[[48.0, 0.0, 112.0, 96.0], [0.0, 0.0, 0.0, 0.0]]])
    logits = torch.tensor([[[0.0, -2.0], [1.0, -3.0]]])
    labels = torch.tensor([[0, 2]])
    deltas = certain([[[1, 2, 3, 4], [0, 0, 0, 0]]])
    counts = gfl_counts(logits, labels)
    assert counts.tolist() == [1.0, 0.5]
    losses = gfl_losses(logits, deltas, labels, boxes, torch.ones(1, 2), anchors, counts)

    def negative(x):
        p = 1 / (1 + np.exp(-x))
        return -p ** 2 * np.log(1 - p)

    cls = 0.25 * np.log(2) + negative(-2.0) + negative(1.0) + negative(-3.0)
    assert losses["cls"].item() == pytest.approx(cls, rel=1e-5)
    assert losses["giou"].item() == pytest.approx(0, abs=1e-6)
    assert losses["dfl"].item() == pytest.approx(0, abs=1e-6)


def test_weights_of_gfl_that_sum_to_less_than_one_do_not_magnify_its_box_losses():
    """As in mmdetection. One positive of probability 1/2. Its object ends 2 strides to the right,
    its box 3: the GIoU is 3/4, and the true bin of one side of four has the logit -100."""
    anchors = torch.tensor([[[-64.0, -64.0, 64.0, 64.0]]])
    boxes = torch.tensor([[[-16.0, -16.0, 32.0, 16.0]]])
    logits = torch.tensor([[[0.0]]])
    labels = torch.tensor([[0]])
    deltas = certain([[[1, 1, 3, 1]]])
    counts = gfl_counts(logits, labels)
    losses = gfl_losses(logits, deltas, labels, boxes, torch.ones(1, 1), anchors, counts)
    assert losses["giou"].item() == pytest.approx(2 * (1 - 3 / 4) / 2, rel=1e-5)
    assert losses["dfl"].item() == pytest.approx(0.25 * (100 / 4) / 2, rel=1e-5)


def test_points_in_the_padding_are_background_and_their_boxes_eight_strides_wide():
    pyramid = pyramid_of([(4, 4)], [16], [(32, 32)])
    objects = [Objects(torch.tensor([3]), torch.tensor([[0.0, 0, 30, 30]]), torch.tensor([32, 32]))]
    targets = FCOS(32, 5, 1).targets(pyramid, objects)
    assert targets["weights"].all() and (targets["labels"] < 5).sum() == 4
    sides = targets["anchors"][0, :, 2:] - targets["anchors"][0, :, :2]
    assert (sides == 128).all()


def test_retinanet_divides_both_losses_by_its_positives_at_least_one_an_image():
    """Two positives in the first image, none in the second: 3."""
    labels = torch.tensor([[0, 1, 2], [2, 2, 2]])
    anchors = torch.tensor([0.0, 0.0, 8.0, 8.0]).expand(2, 3, 4)
    boxes = anchors + 1e6                       # 1 - GIoU is 2
    losses = retinanet_losses(torch.zeros(2, 3, 2), torch.zeros(2, 3, 4), labels, boxes,
                              torch.ones(2, 3), anchors)
    assert float(losses["giou"]) == pytest.approx(2 * (2 + 2) / 3, rel=1e-4)
    negative, positive = 0.75 / 4 * np.log(2), 0.25 / 4 * np.log(2)
    assert float(losses["cls"]) == pytest.approx((2 * positive + 10 * negative) / 3, rel=1e-5)


def test_the_second_stage_has_a_giou_weight_of_ten():
    far = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    losses = roi_losses(torch.zeros(1, 3), torch.zeros(1, 2, 4), far, torch.tensor([0]), far + 1e6)
    assert float(losses["giou"]) == pytest.approx(10 * 2, rel=1e-3)   # 1 - GIoU is 2


def test_regions_of_the_finest_level_are_at_most_28_cells_wide():
    """Strides 4, 8 and 16: sides of 112 and of 224 pixels begin a new level."""
    maps = [torch.full((1, 1, 64 >> level, 64 >> level), float(level)) for level in range(4)]
    pyramid = Pyramid(maps, [4, 8, 16, 32], None)
    sides = torch.tensor([4.0, 55, 111, 112, 223, 224, 250])
    rois = torch.stack((torch.zeros(7), torch.zeros(7), sides, sides), 1)
    pooled = pool_regions(pyramid, rois, [7])
    assert pooled.amax((1, 2, 3)).round().tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_a_region_head_with_convolutions_has_one_box_for_all_classes():
    torch.manual_seed(0)
    head = RoIHead(32, 16, 5, convs=4)
    last = [tuple(p.shape) for name, p in head.named_parameters() if name.startswith("convs.3")]
    assert last == [(32, 32, 3, 3), (32,), (32,)]
    logits, deltas = head(torch.randn(3, 7, 7, 32))
    assert logits.shape == (3, 6) and deltas.shape == (3, 5, 4)
    assert torch.equal(deltas[:, 0], deltas[:, 4])

    # its deltas have half the standard deviation: 0.05 and 0.1
    torch.nn.init.zeros_(head.reg.weight)
    torch.nn.init.ones_(head.reg.bias)
    roi = torch.tensor([[0.0, 0.0, 100.0, 50.0]])
    _, deltas = head(torch.randn(1, 7, 7, 32))
    box = decode_deltas(deltas[:, 0], roi, torch.tensor(DELTA_STD))
    center = torch.tensor([50 + 5, 25 + 2.5])
    size = torch.tensor([100.0, 50.0]) * np.exp(0.1)
    assert torch.allclose(box, torch.cat((center - size / 2, center + size / 2))[None])


@pytest.mark.parametrize("soft", [False, True])
def test_few_predictions_at_a_time_give_the_detections_of_all(soft):
    """9000 predictions: those beyond the first 2048 are read only where they matter."""
    torch.manual_seed(0)
    corners = torch.rand(9000, 2) * 60
    boxes = torch.cat((corners, corners + 20 + 20 * torch.rand(9000, 2)), 1)
    scores = torch.rand(9000) ** 4
    labels = torch.randint(4, (9000,))
    threshold = 0.5
    ours = detections_after_nms(boxes, scores, labels, threshold, 40, soft)
    expected = nms_by_hand(boxes, scores, labels, threshold, 40, soft)
    assert ours["query"].tolist() == [row for row, _ in expected]
    np.testing.assert_allclose(ours["scores"], [score for _, score in expected], rtol=1e-5)
    assert torch.equal(ours["boxes"], boxes[ours["query"]])
    assert torch.equal(ours["labels"], labels[ours["query"]])


def nms_by_hand(boxes, scores, labels, threshold, top_k, soft):
    scores, kept = scores.clone(), []
    while len(kept) < top_k and scores.max() >= 1e-3:
        best = int(scores.argmax())
        kept.append((best, float(scores[best])))
        iou = box_iou(boxes[best][None], boxes)[0][0]
        overlaps = (labels == labels[best]) & ((iou >= threshold) if soft else (iou > threshold))
        scores = torch.where(overlaps, scores * (1 - iou) if soft else torch.tensor(-1.0), scores)
        scores[best] = -1.0
    return kept


def test_initial_class_probabilities_are_one_percent():
    for head in (ATSS(32, 3, 2), RetinaNet(32, 3, 2), FCOS(32, 3, 2)):
        torch.testing.assert_close(head.cls.bias.sigmoid(), torch.full_like(head.cls.bias, 0.01))


def test_a_class_map_has_the_values_of_one_anchor_side_by_side():
    """The linear layer of the RPN orders its outputs as a convolution followed by `by_anchor`."""
    torch.manual_seed(0)
    rpn = RPN(8)
    maps = [torch.randn(2, 8, 3, 4), torch.randn(2, 8, 2, 2)]
    logits, deltas = rpn(maps)
    hidden = [rpn.conv(x).relu() for x in maps]
    expected = torch.cat([by_anchor(rpn.cls(x), 1) for x in hidden], 1)[..., 0]
    torch.testing.assert_close(logits, expected)
    expected = torch.cat([by_anchor(rpn.reg(x), 4) for x in hidden], 1)
    torch.testing.assert_close(deltas, expected)
