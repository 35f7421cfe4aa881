"""boxes.py against cases computed by hand and the authors' recordings."""

import numpy as np
import pytest
import torch

from boxes import (box_area, box_cxcywh_to_xyxy, box_iou, box_xyxy_to_cxcywh, generalized_box_iou,
                   inverse_sigmoid, paired_giou)
from heads.regions import nms
from recordings import tensor


def test_formats_are_inverse_and_agree_by_hand():
    box = torch.tensor([[0.5, 0.25, 0.2, 0.1]])
    corners = box_cxcywh_to_xyxy(box)
    assert torch.allclose(corners, torch.tensor([[0.4, 0.2, 0.6, 0.3]]))
    assert torch.allclose(box_xyxy_to_cxcywh(corners), box)
    assert torch.allclose(box_area(corners), torch.tensor([0.02]))


def test_iou_of_half_overlapping_squares_is_a_third():
    a = torch.tensor([[0., 0., 2., 2.]])
    b = torch.tensor([[1., 0., 3., 2.], [5., 5., 6., 6.]])
    iou, union = box_iou(a, b)
    assert torch.allclose(iou, torch.tensor([[1 / 3, 0.]]))
    assert torch.allclose(union, torch.tensor([[6., 5.]]))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_iou_of_half_precision_boxes_in_pixels_is_computed_in_float32(dtype):
    """Areas of 512 x 512 pixels exceed float16's largest number, 65504."""
    a = torch.tensor([[0., 0., 512., 512.]], dtype=dtype)
    b = torch.tensor([[256., 0., 768., 512.]], dtype=dtype)
    iou, union = box_iou(a, b)
    assert iou.dtype == torch.float32
    assert iou.item() == pytest.approx(1 / 3) and union.item() == 512 * 768
    assert generalized_box_iou(a, b).item() == pytest.approx(1 / 3)
    assert box_area(a).item() == 512 * 512
    assert nms(torch.cat((a, b)), 0.3).tolist() == [True, False]


@pytest.mark.parametrize("eps, near, far", [(0.0, 0.033333, -0.834711),
                                            (1e-6, 0.0333328, -0.834708)])
def test_giou_equals_the_recorded_figures(eps, near, far):
    a = box_cxcywh_to_xyxy(torch.tensor([[.5, .5, .2, .2]]))
    b = box_cxcywh_to_xyxy(torch.tensor([[.6, .5, .2, .4], [.1, .1, .1, .1]]))
    assert torch.allclose(generalized_box_iou(a, b, eps), torch.tensor([[near, far]]), atol=1e-6)


def test_all_pairs_equal_the_authors(golden):
    rec = golden("03_embeddings_and_boxes")
    a, b = (box_cxcywh_to_xyxy(tensor(rec[f"giou_boxes_{x}"])) for x in "ab")
    np.testing.assert_allclose(a.numpy(), rec["xyxy_a"], rtol=1e-5, atol=1e-7)
    for model, eps in (("deformable", 0.0), ("dino", 1e-6)):
        iou = box_iou(a, b, eps)[0].numpy()
        giou = generalized_box_iou(a, b, eps).numpy()
        np.testing.assert_allclose(iou, rec[f"iou_{model}"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(giou, rec[f"giou_{model}"], rtol=1e-5, atol=1e-6)


def test_pairs_equal_the_diagonal_of_all_pairs():
    corners = torch.rand(2, 5, 2, 2).sort(2).values.flatten(2)
    a, b = corners
    assert torch.allclose(paired_giou(a, b), generalized_box_iou(a, b).diagonal())


@pytest.mark.parametrize("eps, limit", [(1e-5, 11.512925), (1e-3, 6.907755)])
def test_inverse_sigmoid_is_clamped_by_its_epsilon(eps, limit):
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0])
    expected = torch.tensor([-limit, -limit, 0.0, limit, limit])
    assert torch.allclose(inverse_sigmoid(x, eps), expected, atol=1e-5)


def test_inverse_sigmoid_equals_the_authors(golden):
    rec = golden("03_embeddings_and_boxes")
    x = tensor(rec["inverse_sigmoid_in"])
    for model, eps in (("deformable", 1e-5), ("dino", 1e-3)):
        np.testing.assert_allclose(inverse_sigmoid(x, eps).numpy(), rec[f"inverse_sigmoid_{model}"],
                                   rtol=1e-5, atol=1e-6)


# ---- deltas, NMS and RoIAlign
