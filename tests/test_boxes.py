"""boxes.py against hand-computed cases and the authors' recordings."""
import numpy as np
import pytest
import torch

from boxes import (box_area, box_cxcywh_to_xyxy, box_iou, box_xyxy_to_cxcywh, clip_boxes, decode_deltas, encode_deltas,
                   generalized_box_iou, inverse_sigmoid, nms, paired_giou, roi_align, soft_nms)
from recordings import tensor


def test_formats_are_inverse_and_agree_by_hand():
    box = torch.tensor([[0.5, 0.25, 0.2, 0.1]])
    corners = box_cxcywh_to_xyxy(box)
    assert torch.allclose(corners, torch.tensor([[0.4, 0.2, 0.6, 0.3]]))
    assert torch.allclose(box_xyxy_to_cxcywh(corners), box)
    assert torch.allclose(box_area(corners), torch.tensor([0.02]))


def test_iou_of_half_overlapping_squares_is_a_third():
    a, b = torch.tensor([[0., 0., 2., 2.]]), torch.tensor([[1., 0., 3., 2.], [5., 5., 6., 6.]])
    iou, union = box_iou(a, b)
    assert torch.allclose(iou, torch.tensor([[1 / 3, 0.]])) and torch.allclose(union, torch.tensor([[6., 5.]]))


@pytest.mark.parametrize("eps, near, far", [(0.0, 0.033333, -0.834711), (1e-6, 0.0333328, -0.834708)])
def test_giou_equals_the_recorded_figures(eps, near, far):
    a = box_cxcywh_to_xyxy(torch.tensor([[.5, .5, .2, .2]]))
    b = box_cxcywh_to_xyxy(torch.tensor([[.6, .5, .2, .4], [.1, .1, .1, .1]]))
    assert torch.allclose(generalized_box_iou(a, b, eps), torch.tensor([[near, far]]), atol=1e-6)


def test_all_pairs_equal_the_authors(golden):
    rec = golden("03_embeddings_and_boxes")
    a, b = (box_cxcywh_to_xyxy(tensor(rec[f"giou_boxes_{x}"])) for x in "ab")
    np.testing.assert_allclose(a.numpy(), rec["xyxy_a"], rtol=1e-5, atol=1e-7)
    for model, eps in (("deformable", 0.0), ("dino", 1e-6)):
        np.testing.assert_allclose(box_iou(a, b, eps)[0].numpy(), rec[f"iou_{model}"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(generalized_box_iou(a, b, eps).numpy(), rec[f"giou_{model}"], rtol=1e-5, atol=1e-6)


def test_pairs_equal_the_diagonal_of_all_pairs():
    corners = torch.rand(2, 5, 2, 2).sort(2).values.flatten(2)
    a, b = corners
    assert torch.allclose(paired_giou(a, b), generalized_box_iou(a, b).diagonal())


@pytest.mark.parametrize("eps, limit", [(1e-5, 11.512925), (1e-3, 6.907755)])
def test_inverse_sigmoid_is_clamped_by_its_epsilon(eps, limit):
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0])
    assert torch.allclose(inverse_sigmoid(x, eps), torch.tensor([-limit, -limit, 0.0, limit, limit]), atol=1e-5)


def test_inverse_sigmoid_equals_the_authors(golden):
    rec = golden("03_embeddings_and_boxes")
    x = tensor(rec["inverse_sigmoid_in"])
    for model, eps in (("deformable", 1e-5), ("dino", 1e-3)):
        np.testing.assert_allclose(inverse_sigmoid(x, eps).numpy(), rec[f"inverse_sigmoid_{model}"], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------- deltas, NMS and RoIAlign

def random_boxes(*shape, extent=100.0, generator=torch.Generator().manual_seed(3)):
    corner = torch.rand(*shape, 2, generator=generator) * extent
    return torch.cat((corner, corner + torch.rand(*shape, 2, generator=generator) * extent / 2 + 1), -1)


@pytest.mark.parametrize("coder, spread", [("coder_1", 1.0), ("coder_01", torch.tensor([0.1, 0.1, 0.2, 0.2]))])
def test_deltas_equal_the_recorded_ones(golden, coder, spread):
    rec = {k.split("/")[1]: v for k, v in golden("co_detr/rpn_coder_nms").items() if k.startswith(coder + "/")}
    anchors, deltas = tensor(rec["anchors"]), tensor(rec["deltas"])
    np.testing.assert_allclose(encode_deltas(tensor(rec["gt"]), anchors, spread), rec["encoded"], rtol=1e-5, atol=1e-5)
    decoded = decode_deltas(deltas, anchors, spread)
    np.testing.assert_allclose(decoded, rec["decoded"], rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(clip_boxes(decoded, torch.tensor([150, 200])), rec["decoded_clipped_150x200"], rtol=1e-5,
                               atol=1e-3)
    many = decode_deltas(tensor(rec["multi_deltas"]).unflatten(1, (-1, 4)), anchors[:, None], spread)
    np.testing.assert_allclose(many.flatten(1), rec["multi_decoded"], rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(decode_deltas(encode_deltas(tensor(rec["gt"]), anchors, spread), anchors, spread), rec["gt"],
                               atol=1e-3)


@pytest.mark.parametrize("threshold", ["0.5", "0.7"])
def test_nms_keeps_the_recorded_boxes(golden, threshold):
    rec = golden("co_detr/rpn_coder_nms")
    order = torch.as_tensor(rec["nms/scores"]).argsort(descending=True)
    boxes, labels = tensor(rec["nms/boxes"])[order], torch.as_tensor(rec["nms/labels"])[order]
    assert order[nms(boxes, float(threshold))].tolist() == rec[f"nms/keep_{threshold}"].tolist()
    assert order[nms(boxes, float(threshold), labels)].tolist() == rec[f"nms/batched_keep_{threshold}"].tolist()


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3])
def test_nms_equals_the_loop_over_boxes(threshold):
    """Crowds whose chains of suppression are long, several images at once, some boxes not usable."""
    boxes, usable = random_boxes(3, 60), torch.rand(3, 60) > 0.2
    keep = nms(boxes, threshold, usable=usable)
    for image in range(3):
        iou, kept = box_iou(boxes[image], boxes[image])[0], []
        for i in range(60):
            if usable[image, i] and all(iou[i, j] <= threshold for j in kept):
                kept.append(i)
        assert keep[image].nonzero()[:, 0].tolist() == kept
    assert nms(boxes[:, :0], 0.5).shape == (3, 0)


@pytest.mark.parametrize("threshold", ["0.8", "0.5"])
def test_soft_nms_lowers_the_recorded_scores(golden, threshold):
    rec = golden("co_detr/rpn_coder_nms")
    boxes, scores, labels = tensor(rec["nms/boxes"]), tensor(rec["nms/scores"]), torch.as_tensor(rec["nms/labels"])
    lowest = float(rec[f"softnms/min_score_{threshold}"])
    index, lowered = soft_nms(boxes, scores, labels, float(threshold), lowest, 1000)
    assert index.tolist() == rec[f"softnms/keep_{threshold}"].tolist()
    np.testing.assert_allclose(lowered, rec[f"softnms/dets_{threshold}"][:, 4], atol=1e-6)
    first, best = soft_nms(boxes, scores, labels, float(threshold), lowest, 7)
    assert first.tolist() == index[:7].tolist() and torch.equal(best, lowered[:7])


def test_soft_nms_by_hand():
    """Two boxes of IoU 0.9: the second keeps a tenth of its score; of another label, all of it."""
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 9.0, 10.0]])
    scores = torch.tensor([0.8, 0.7])
    _, lowered = soft_nms(boxes, scores, torch.tensor([1, 1]), 0.8, 1e-3, 9)
    assert torch.allclose(lowered, torch.tensor([0.8, 0.07]))
    assert torch.equal(soft_nms(boxes, scores, torch.tensor([1, 2]), 0.8, 1e-3, 9)[1], scores)
    assert len(soft_nms(boxes, scores, torch.tensor([1, 1]), 0.8, 0.1, 9)[0]) == 1
    assert len(soft_nms(boxes[:0], scores[:0], torch.tensor([], dtype=torch.int64), 0.8, 0.1, 9)[0]) == 0


@pytest.mark.parametrize("samples", [0, 2])
def test_roi_align_equals_the_recorded_values_and_gradients(golden, samples):
    rec = golden("co_detr/roi_align")
    features, rois = tensor(rec["align/feat"]).requires_grad_(), tensor(rec["align/rois"])
    pooled = roi_align(features.flatten(2).transpose(1, 2), [features.shape[-2:]], [8], rois[:, 1:], rois[:, 0].long(),
                       torch.zeros(len(rois), dtype=torch.int64), 7, samples).permute(0, 3, 1, 2)
    np.testing.assert_allclose(pooled.detach(), rec[f"align/out_ratio{samples}"], atol=2e-5)
    (pooled * tensor(rec["align/grad_weight"])).sum().backward()
    np.testing.assert_allclose(features.grad, rec[f"align/grad_ratio{samples}"], atol=1e-4)


def test_roi_align_of_a_plane_is_the_plane():
    """Bilinear interpolation is exact on x + 10 y: every bin holds the value at its centre, on every level."""
    shapes, strides = [(20, 24), (10, 12)], [4, 8]
    tokens = torch.cat([(stride * (torch.arange(W) + 0.5) + 10 * stride * (torch.arange(H)[:, None] + 0.5)).reshape(-1, 1)
                        for (H, W), stride in zip(shapes, strides)])[None]
    rois = torch.tensor([[10.0, 12.0, 50.0, 61.0]] * 2)
    pooled = roi_align(tokens, shapes, strides, rois, torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1]), 5)[..., 0]
    x, y = (rois[0, i] + (torch.arange(5) + 0.5) * (rois[0, i + 2] - rois[0, i]) / 5 for i in (0, 1))
    assert torch.allclose(pooled, (x + 10 * y[:, None]).expand(2, 5, 5), atol=1e-3)


def test_roi_align_without_rois_still_has_a_gradient():
    tokens = torch.randn(1, 12, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    pooled = roi_align(tokens, [(3, 4)], [8], torch.zeros(0, 4), none, none)
    assert pooled.shape == (0, 7, 7, 3)
    pooled.sum().backward()
    assert tokens.grad.abs().sum() == 0
