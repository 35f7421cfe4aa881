"""heads/regions.py against loops, cases computed by hand and the authors' recordings."""
import math

import numpy as np
import pytest
import torch

from boxes import box_iou
from heads.regions import clip_boxes, decode_deltas, encode_deltas, nms, roi_align, soft_nms
from recordings import tensor


def random_boxes(*shape, extent=100.0, generator=torch.Generator().manual_seed(3)):
    corner = torch.rand(*shape, 2, generator=generator) * extent
    size = torch.rand(*shape, 2, generator=generator) * extent / 2 + 1
    return torch.cat((corner, corner + size), -1)


@pytest.mark.parametrize("coder, std", [("coder_1", 1.0),
                                        ("coder_01", torch.tensor([0.1, 0.1, 0.2, 0.2]))])
def test_deltas_equal_the_recorded_ones(golden, coder, std):
    rec = {key.split("/")[1]: value for key, value in golden("co_detr/rpn_coder_nms").items()
           if key.startswith(coder + "/")}
    anchors, boxes = tensor(rec["anchors"]), tensor(rec["gt"])
    encoded = encode_deltas(boxes, anchors, std)
    np.testing.assert_allclose(encoded, rec["encoded"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(decode_deltas(encoded, anchors, std), rec["gt"], atol=1e-3)
    decoded = decode_deltas(tensor(rec["deltas"]), anchors, std)
    np.testing.assert_allclose(decoded, rec["decoded"], rtol=1e-5, atol=1e-3)
    clipped = clip_boxes(decoded, torch.tensor([150, 200]))
    np.testing.assert_allclose(clipped, rec["decoded_clipped_150x200"], rtol=1e-5, atol=1e-3)
    several = tensor(rec["multi_deltas"]).unflatten(1, (-1, 4))
    several = decode_deltas(several, anchors[:, None], std).flatten(1)
    np.testing.assert_allclose(several, rec["multi_decoded"], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("threshold", ["0.5", "0.7"])
def test_nms_leaves_the_recorded_boxes(golden, threshold):
    rec = golden("co_detr/rpn_coder_nms")
    order = torch.as_tensor(rec["nms/scores"]).argsort(descending=True)
    boxes, labels = tensor(rec["nms/boxes"])[order], torch.as_tensor(rec["nms/labels"])[order]
    remains = nms(boxes, float(threshold))
    by_label = nms(boxes, float(threshold), labels)
    assert order[remains].tolist() == rec[f"nms/keep_{threshold}"].tolist()
    assert order[by_label].tolist() == rec[f"nms/batched_keep_{threshold}"].tolist()


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3])
def test_nms_equals_the_loop_over_boxes(threshold):
    """Crowds with long chains of suppression, several images at once, some boxes not usable."""
    boxes, usable = random_boxes(3, 60), torch.rand(3, 60) > 0.2
    remains = nms(boxes, threshold, usable=usable)
    for image in range(3):
        iou = box_iou(boxes[image], boxes[image])[0]
        expected = []
        for i in range(60):
            if usable[image, i] and all(iou[i, j] <= threshold for j in expected):
                expected.append(i)
        assert remains[image].nonzero()[:, 0].tolist() == expected
    assert nms(boxes[:, :0], 0.5).shape == (3, 0)


@pytest.mark.parametrize("threshold", ["0.8", "0.5"])
def test_soft_nms_lowers_the_recorded_scores(golden, threshold):
    rec = golden("co_detr/rpn_coder_nms")
    boxes, scores = tensor(rec["nms/boxes"]), tensor(rec["nms/scores"])
    labels = torch.as_tensor(rec["nms/labels"])
    min_score = float(rec[f"softnms/min_score_{threshold}"])
    index, lowered = soft_nms(boxes, scores, labels, float(threshold), min_score, 1000)
    assert index.tolist() == rec[f"softnms/keep_{threshold}"].tolist()
    np.testing.assert_allclose(lowered, rec[f"softnms/dets_{threshold}"][:, 4], atol=1e-6)
    first, best = soft_nms(boxes, scores, labels, float(threshold), min_score, 7)
    assert first.tolist() == index[:7].tolist() and torch.equal(best, lowered[:7])


def test_soft_nms_by_hand():
    """Two boxes of IoU 0.9: a tenth of the second score remains; of another label, all of it."""
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 9.0, 10.0]])
    scores, labels = torch.tensor([0.8, 0.7]), torch.tensor([1, 1])
    _, lowered = soft_nms(boxes, scores, labels, 0.8, 1e-3, 9)
    assert torch.allclose(lowered, torch.tensor([0.8, 0.07]))
    assert torch.equal(soft_nms(boxes, scores, torch.tensor([1, 2]), 0.8, 1e-3, 9)[1], scores)
    assert len(soft_nms(boxes, scores, labels, 0.8, 0.1, 9)[0]) == 1
    assert len(soft_nms(boxes[:0], scores[:0], labels[:0], 0.8, 0.1, 9)[0]) == 0


@pytest.mark.parametrize("samples", [0, 2])
def test_roi_align_equals_the_recorded_values_and_gradients(golden, samples):
    rec = golden("co_detr/roi_align")
    features, rois = tensor(rec["align/feat"]).requires_grad_(), tensor(rec["align/rois"])
    tokens, level = features.flatten(2).transpose(1, 2), torch.zeros(len(rois), dtype=torch.int64)
    pooled = roi_align(tokens, [features.shape[-2:]], [8], rois[:, 1:], rois[:, 0].long(), level, 7,
                       samples).permute(0, 3, 1, 2)
    np.testing.assert_allclose(pooled.detach(), rec[f"align/out_ratio{samples}"], atol=2e-5)
    (pooled * tensor(rec["align/grad_weight"])).sum().backward()
    np.testing.assert_allclose(features.grad, rec[f"align/grad_ratio{samples}"], atol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float64, 1e-10)])
def test_roi_align_of_a_plane_is_the_plane(dtype, tolerance):
    """Bilinear interpolation is exact on x + 10 y: every bin holds the value at its center, on
    every level, in float64 as well."""
    shapes, strides = [(20, 24), (10, 12)], [4, 8]
    planes = []
    for (H, W), stride in zip(shapes, strides):
        x = stride * (torch.arange(W, dtype=dtype) + 0.5)
        y = stride * (torch.arange(H, dtype=dtype) + 0.5)
        planes.append((x + 10 * y[:, None]).reshape(-1, 1))
    rois = torch.tensor([[10.1, 12.0, 50.0, 61.3]] * 2, dtype=dtype)
    image, level = torch.tensor([0, 0]), torch.tensor([0, 1])
    pooled = roi_align(torch.cat(planes)[None], shapes, strides, rois, image, level, 5)[..., 0]
    centers = (torch.arange(5, dtype=dtype) + 0.5) / 5
    x = rois[0, 0] + centers * (rois[0, 2] - rois[0, 0])
    y = rois[0, 1] + centers * (rois[0, 3] - rois[0, 1])
    expected = (x + 10 * y[:, None]).expand(2, 5, 5)
    assert pooled.dtype == dtype and torch.allclose(pooled, expected, rtol=0, atol=tolerance)


def test_roi_align_equals_loops_over_samples():
    """Two images, two levels, RoIs that reach beyond the map; positions in cells are relative to
    the centers of the cells, and samples more than a cell outside count as zero."""
    torch.manual_seed(0)
    shapes, strides, bins = [(6, 7), (3, 4)], [8, 16], 2
    maps = [torch.randn(2, H, W, 3, dtype=torch.double) for H, W in shapes]
    tokens = torch.cat([x.flatten(1, 2) for x in maps], 1)
    rois = torch.tensor([[5.0, 3.0, 40.0, 47.0], [-30.0, -9.0, 20.0, 12.0],
                         [30.0, 20.0, 90.0, 60.0]], dtype=torch.double)
    image, level = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])

    def value(feature, y, x):
        H, W = feature.shape[:2]
        if not (-1 <= y <= H and -1 <= x <= W):
            return torch.zeros(3, dtype=torch.double)
        y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)
        top, left = math.floor(y), math.floor(x)
        bottom, right = min(top + 1, H - 1), min(left + 1, W - 1)
        upper = (1 - x + left) * feature[top, left] + (x - left) * feature[top, right]
        lower = (1 - x + left) * feature[bottom, left] + (x - left) * feature[bottom, right]
        return (1 - y + top) * upper + (y - top) * lower

    pooled = roi_align(tokens, shapes, strides, rois, image, level, bins)
    for r in range(3):
        x1, y1, x2, y2 = (rois[r] / strides[level[r]] - 0.5).tolist()
        width, height = (x2 - x1) / bins, (y2 - y1) / bins
        across, down = math.ceil(width), math.ceil(height)
        feature = maps[level[r]][image[r]]
        for i in range(bins):
            for j in range(bins):
                samples = [value(feature, y1 + (i + (a + 0.5) / down) * height,
                                 x1 + (j + (b + 0.5) / across) * width)
                           for a in range(down) for b in range(across)]
                expected = sum(samples) / len(samples)
                assert torch.allclose(pooled[r, i, j], expected, rtol=0, atol=1e-12)


def test_roi_align_without_rois_still_has_a_gradient():
    tokens = torch.randn(1, 12, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    pooled = roi_align(tokens, [(3, 4)], [8], torch.zeros(0, 4), none, none)
    assert pooled.shape == (0, 7, 7, 3)
    pooled.sum().backward()
    assert tokens.grad.abs().sum() == 0
