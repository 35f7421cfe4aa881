"""masks.py against loops, analytic values and areas counted by hand."""
import pytest
import torch

from heads.regions import roi_align
from masks import (gather_maps, interpolation_weights, mask_iou, paste, sample_maps,
                   sample_true_masks, select_masks, uncertain_points)

WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


# ---- Sampling

def test_sampling_cell_by_cell_equals_grid_sample_with_its_gradients():
    """Also at points outside the map, where both fall to 0."""
    torch.manual_seed(0)
    points = torch.rand(3, 200, 2) * 1.4 - 0.2
    upstream = torch.randn(3, 200)
    results = []
    for sample in (sample_maps, gather_maps):
        maps = torch.linspace(-2, 3, 3 * 5 * 7).reshape(3, 5, 7).sin().requires_grad_()
        values = sample(maps, points)
        values.backward(upstream)
        results.append((values.detach(), maps.grad))
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=2e-6)


def test_no_operation_without_a_deterministic_gradient_is_used_where_it_is_demanded(monkeypatch):
    maps = torch.rand(1, 4, 4, requires_grad=True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    names = []
    node = sample_maps(maps, torch.rand(1, 9, 2)).grad_fn
    nodes = [node]
    while nodes:
        node = nodes.pop()
        names.append(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert not any("GridSampler" in name for name in names)
    assert any("Gather" in name for name in names)


# ---- Pasting

def test_pasting_equals_bilinear_sampling_pixel_by_pixel():
    torch.manual_seed(0)
    maps = torch.rand(6, 5, 7)
    boxes = torch.rand(6, 4) * 40 - 5
    boxes[:, 2:] = boxes[:, :2] + torch.rand(6, 2) * 40 + 0.3
    height, width = 31, 23
    rows = interpolation_weights(boxes[:, 1::2], 5, height)
    columns = interpolation_weights(boxes[:, 0::2], 7, width)
    values = rows @ maps @ columns.transpose(1, 2)
    for k, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        for y in range(height):
            for x in range(width):
                u = (x + 0.5 - x0) / (x1 - x0)
                v = (y + 0.5 - y0) / (y1 - y0)
                expected = 0.0
                if 0 <= u <= 1 and 0 <= v <= 1:
                    expected = float(sample_maps(maps[k:k + 1], torch.tensor([[[u, v]]])))
                assert float(values[k, y, x]) == pytest.approx(expected, abs=1e-4), (k, y, x)


def test_pasting_is_the_inverse_of_roi_align():
    """A ramp that RoIAlign cuts out is pasted as the same ramp: no half pixel is lost."""
    ramp = (torch.arange(64) + 0.5)[None, :, None].expand(64, 64, 1) / 64     # (H, W, 1)
    box = torch.tensor([[8.0, 12.0, 40.0, 44.0]])
    zero = torch.tensor([0])
    cut = roi_align(ramp.reshape(1, -1, 1), [(64, 64)], [1], box, zero, zero, 32)[..., 0]
    rows = interpolation_weights(box[:, 1::2], 32, 64)
    columns = interpolation_weights(box[:, 0::2], 32, 64)
    pasted = (rows @ cut @ columns.transpose(1, 2))[0]
    assert torch.allclose(pasted[12:44, 8:40], ramp[12:44, 8:40, 0], atol=1e-5)
    assert pasted[:12].abs().max() == 0 and pasted[:, 40:].abs().max() == 0


def test_a_box_half_outside_the_image_does_not_wrap_and_an_empty_one_covers_nothing():
    full = torch.full((3, 8, 8), 0.99)
    boxes = torch.tensor([
        [-4.0, -3.0, 4.0, 5.0], [16.0, 12.0, 24.0, 20.0], [3.0, 3.0, 3.0, 9.0]])
    masks, _ = paste(full, boxes, 16, 20)
    expected = torch.zeros(3, 16, 20, dtype=torch.bool)
    expected[0, :5, :4] = True
    expected[1, 12:, 16:] = True
    assert torch.equal(masks, expected)


def test_an_edge_lies_where_the_interpolated_logit_changes_sign():
    """Cells of logits -1 and 9, centers at x = 5 and 15: the sign changes at 6; probabilities would
    say 8.1."""
    masks, _ = paste(torch.tensor([[[-1.0, 9.0]]]), torch.tensor([[0.0, 0.0, 20.0, 4.0]]), 4, 20)
    assert not masks[0, :, :6].any() and masks[0, :, 6:].all()


def test_the_mean_probability_inside_a_mask_ranks_it_and_an_empty_mask_has_zero():
    """Half of the box at 0.9 and half at 0.2; and a mask that is nowhere above one half."""
    half = torch.full((1, 64, 64), 0.2)
    half[:, :, :32] = 0.9
    logits = torch.cat((half, torch.full((1, 64, 64), 0.4))).logit()
    box = torch.tensor([[0.0, 0.0, 64.0, 64.0]])
    masks, means = paste(logits, box.expand(2, 4), 64, 64)
    assert masks[0, :, :32].all() and not masks[0, :, 32:].any() and not masks[1].any()
    assert means.tolist() == pytest.approx([0.9, 0.0])


def test_many_masks_are_pasted_like_each_alone_and_no_masks_keep_their_shape():
    torch.manual_seed(0)
    logits = torch.randn(60, 4, 4)
    boxes = torch.tensor([[2.0, 1.0, 14.0, 9.0]]).expand(60, 4)
    masks, means = paste(logits, boxes, 10, 16)
    for k in (0, 24, 25, 59):
        mask, mean = paste(logits[k:k + 1], boxes[:1], 10, 16)
        assert torch.equal(mask[0], masks[k]) and torch.allclose(mean[0], means[k])
    masks, means = paste(logits[:0], boxes[:0], 10, 16)
    assert masks.shape == (0, 10, 16) and means.shape == (0,)


# ---- Points and true masks

def test_points_gather_where_the_mask_is_uncertain():
    """Logit 0 on a tenth of the area, +-10 elsewhere: a share k 0.1 + (1 - beta) 0.1 of the points
    lies on that tenth."""
    torch.manual_seed(0)
    logits = torch.full((1, 200, 200), 10.0)
    logits[:, :, 80:100] = 0.0
    points = uncertain_points(logits, 20000, oversample=3.0, importance=0.75)
    assert points.shape == (1, 20000, 2)
    x = points[..., 0]
    share = ((x > 0.4) & (x < 0.5)).float().mean()
    assert float(share) == pytest.approx(0.325, abs=0.01)


def test_points_are_looked_up_at_their_place_in_the_image():
    """In a box from x0 to x1, a mask that begins at x = a begins at (a - x0) / (x1 - x0)."""
    mask = torch.zeros(1, 40, 80, dtype=torch.bool)
    mask[:, :, 30:] = True
    box = torch.tensor([[0.25, 0.1, 0.75, 0.9]])       # 20 to 60 px: the step is at a quarter
    u = torch.linspace(0.01, 0.99, 99)
    points = torch.stack((u, torch.full_like(u, 0.5)), -1)[None]
    truth = sample_true_masks([mask], box, points)[0]
    assert (truth[u < 0.23] == 0).all() and (truth[u > 0.27] == 1).all()
    assert float(truth[(u - 0.25).abs().argmin()]) == pytest.approx(0.5, abs=0.01)


def test_masks_are_selected_image_by_image_and_an_image_without_objects_has_empty_ones():
    first = torch.arange(3)[:, None, None].expand(3, 4, 5) == 1        # only object 1 covers it
    second = torch.zeros(0, 6, 7, dtype=torch.bool)
    targets = [{"masks": first}, {"masks": second}]
    selected = select_masks(targets, [torch.tensor([1, 0]), torch.tensor([3])])
    assert [tuple(masks.shape) for masks in selected] == [(2, 4, 5), (1, 6, 7)]
    assert selected[0][0].all() and not selected[0][1].any() and not selected[1].any()


def test_the_iou_counts_the_part_of_the_object_outside_the_box():
    masks = [torch.ones(1, 32, 64, dtype=torch.bool)]
    full = torch.full((1, 16, 16), 20.0)
    left_half = torch.tensor([[0.0, 0.0, 0.5, 1.0]])
    assert float(mask_iou(full, masks, left_half)) == pytest.approx(0.5, abs=0.04)
    assert float(mask_iou(full, masks, WHOLE)) == pytest.approx(1.0, abs=0.04)
    assert float(mask_iou(-full, masks, WHOLE)) == 0
