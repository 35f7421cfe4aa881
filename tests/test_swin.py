"""backbones/swin.py against the authors' recordings and against loops over queries and keys."""
import math

import numpy as np
import pytest
import torch
from torch import nn

from backbones import drop_derived_buffers
from backbones.layers import ConvEmbed
from backbones.swin import (PatchMerging, Swin, SwinBlock, WindowAttention,
                            relative_position_index, shift_mask)


def recorded_parts(rec, tag, model):
    """Loads the weights recorded under `tag`; -> inputs, outputs, gradients by name."""
    rec = {key.removeprefix(tag + "/"): torch.as_tensor(np.asarray(value)).float()
           for key, value in rec.items() if key.startswith(tag + "/")}
    state = {key.removeprefix("sd/"): v for key, v in rec.items() if key.startswith("sd/")}
    model.eval().load_state_dict(drop_derived_buffers(state), strict=True)
    outputs = [rec[key] for key in sorted(rec) if key.startswith("out")]
    gradients = {key.removeprefix("grad/"): v for key, v in rec.items() if key.startswith("grad")}
    return rec["in0"].requires_grad_(), outputs, gradients


def compare(model, x, outputs, expected, gradients):
    """Outputs to 1e-5; gradients of sum(out_i cos(i)) to 1e-5 of their largest entry."""
    for ours, theirs in zip(outputs, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    sum((o.flatten() * torch.arange(o.numel()).cos()).sum() for o in outputs).backward()
    ours = {name: p.grad for name, p in model.named_parameters()} | {"grad_in0": x.grad}
    assert gradients
    for name, theirs in gradients.items():
        assert (ours[name] - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1e-6, name


@pytest.fixture
def recording(golden):
    return golden("co_detr/swin")


def test_relative_positions_are_numbered_as_the_authors_number_them(recording):
    for window in (2, 3, 4, 7, 12):
        expected = recording[f"relative_index/window{window}"]
        assert np.array_equal(relative_position_index(window), expected)


def test_window_attention_equals_the_authors(recording):
    model = WindowAttention(12, 3, 4)
    x, expected, gradients = recorded_parts(recording, "window_attention", model)
    compare(model, x, [model(x)], expected, gradients)


@pytest.mark.parametrize("shift", (0, 2))
def test_blocks_equal_the_authors_on_a_map_no_window_divides(recording, shift):
    model = SwinBlock(12, 3, 4, shift > 0, 2, 0.0)
    mask = shift_mask(7, 10, 4, "cpu")
    assert np.array_equal(mask, recording["shift_mask"])
    x, expected, gradients = recorded_parts(recording, f"block_shift{shift}", model)
    y = model(x.unflatten(1, (7, 10)), mask).flatten(1, 2)
    compare(model, x, [y], expected, gradients)


@pytest.mark.parametrize("height, width", ((6, 8), (7, 9), (7, 8)))
def test_merging_equals_the_authors_with_odd_sizes(recording, height, width):
    tag = f"merge_{height}x{width}"
    model = PatchMerging(recording[f"{tag}/in0"].shape[-1])
    x, expected, gradients = recorded_parts(recording, tag, model)
    y = model(x.unflatten(1, (height, width))).flatten(1, 2)
    compare(model, x, [y], expected, gradients)


def test_patches_equal_the_authors_where_four_does_not_divide_the_image(recording):
    model = ConvEmbed(3, 8, 4, 4)
    x, expected, gradients = recorded_parts(recording, "embed_18x23", model)
    compare(model, x, [model(x).permute(0, 3, 1, 2)], expected, gradients)


def test_the_complete_swin_equals_the_authors(recording):
    model = Swin(12, (2, 2, 4, 2), (1, 2, 3, 6), 4, mlp_ratio=2)
    x, expected, gradients = recorded_parts(recording, "swin", model)
    compare(model, x, model(x), expected, gradients)


@pytest.mark.parametrize("shift", (False, True))
def test_window_attention_equals_loops_over_queries_and_keys(shift):
    """Keys of a query: the cells of its window, padding included, that were its neighbors before
    the shift."""
    torch.manual_seed(0)
    H, W, C, M, w = 5, 8, 6, 2, 4
    block = SwinBlock(C, M, w, shift, 2, 0.0).double()
    s = w // 2 if shift else 0
    for p in block.parameters():
        nn.init.normal_(p)
    x = torch.randn(1, H, W, C, dtype=torch.double)
    Hp, Wp = H + -H % w, W + -W % w
    padded = torch.zeros(Hp, Wp, C, dtype=torch.double)
    padded[:H, :W] = x[0]
    qkv = block.attn.qkv(padded).unflatten(-1, (3, M, C // M))
    table = block.attn.relative_position_bias_table

    def window_of(y, z):
        return (y - s) % Hp // w, (z - s) % Wp // w

    expected = torch.empty(H, W, C, dtype=torch.double)
    for y in range(H):
        for z in range(W):
            keys = [(a, b) for a in range(Hp) for b in range(Wp)
                    if window_of(a, b) == window_of(y, z)   # the same window after the shift,
                    and abs(a - y) < w and abs(b - z) < w]   # and not from the opposite border
            heads = []
            for m in range(M):
                bias = torch.stack([table[(y - a + w - 1) * (2 * w - 1) + z - b + w - 1, m]
                                    for a, b in keys])
                scores = torch.stack([qkv[y, z, 0, m] @ qkv[a, b, 1, m] / math.sqrt(C // M)
                                      for a, b in keys])
                weights = (scores + bias).softmax(0)
                heads.append(sum(p * qkv[a, b, 2, m] for p, (a, b) in zip(weights, keys)))
            expected[y, z] = block.attn.proj(torch.cat(heads))
    ours = block.attend(x, shift_mask(H, W, w, "cpu"))
    assert torch.allclose(ours[0], expected, atol=1e-10)


def test_a_map_no_detector_reads_has_no_norm_to_learn_but_is_normalized():
    model = Swin(8, (2, 2, 2, 2), (1, 2, 2, 4), 3, maps=3)
    children = {name for name, _ in model.named_children()}
    assert "norm0" not in children and {"norm1", "norm2", "norm3"} <= children
    coarse = model(torch.randn(1, 3, 40, 52))[0]
    assert coarse.mean(1).abs().max() < 1e-5
    assert (coarse.var(1, unbiased=False) - 1).abs().max() < 1e-2
