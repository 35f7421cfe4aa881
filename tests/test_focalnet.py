"""backbones/focalnet.py against its equations, cell by cell."""
import pytest
import torch
import torch.nn.functional as F

from backbones import build_backbone
from backbones.focalnet import FOCALNETS, FocalBlock, FocalModulation

NORMALIZED = {"focalnet_l_3level": False, "focalnet_l_4level": True, "focalnet_l_4level_sum": False}


@pytest.mark.parametrize("normalize", (False, True))
def test_focal_modulation_equals_its_equations_cell_by_cell(normalize):
    """Z_l = gelu(depthwise convolution of Z_l-1), kernels 3 and 5; the mean of the last is the
    widest context. Normalized, the sum of the three gated contexts is divided by three."""
    torch.manual_seed(0)
    C, H, W = 3, 4, 5
    model = FocalModulation(C, 2, 3, normalize).double()
    x = torch.randn(1, H, W, C, dtype=torch.double)
    mixed = model.f(x)[0]                                            # (H, W, 2 C + 3)
    context, contexts = mixed[..., C:2 * C], []
    for layer, k in zip(model.focal_layers, (3, 5)):
        kernel, after = layer[0].weight, torch.zeros(H, W, C, dtype=torch.double)
        for y in range(H):
            for z in range(W):
                for dy in range(k):
                    for dz in range(k):
                        a, b = y + dy - k // 2, z + dz - k // 2
                        if 0 <= a < H and 0 <= b < W:
                            after[y, z] += kernel[:, 0, dy, dz] * context[a, b]
        context = F.gelu(after)
        contexts.append(context)
    contexts.append(F.gelu(context.mean((0, 1))).expand(H, W, C))
    gates = mixed[..., 2 * C:]
    total = sum(c * gates[..., i:i + 1] for i, c in enumerate(contexts))
    if normalize:
        total = total / 3
    total = total @ model.h.weight[:, :, 0, 0].T + model.h.bias
    assert torch.allclose(model(x)[0], model.proj(mixed[..., :C] * total), atol=1e-10)


def test_the_normalized_modulator_of_four_levels_is_a_fifth_of_the_sum():
    """A literal case: one channel and one cell. f gives query 2, context 1 and five gates of 1,
    every convolution passes its center on, h and proj change nothing."""
    modulated = {}
    for normalize in (False, True):
        model = FocalModulation(1, 4, 3, normalize).double()
        for p in model.parameters():
            torch.nn.init.zeros_(p)
        model.f.bias.data = torch.tensor([2.0, 1, 1, 1, 1, 1, 1]).double()
        for layer in model.focal_layers:
            kernel = layer[0].weight.data
            kernel[0, 0, kernel.shape[2] // 2, kernel.shape[3] // 2] = 1
        model.h.weight.data.fill_(1)
        model.proj.weight.data.fill_(1)
        modulated[normalize] = model(torch.zeros(1, 1, 1, 1).double()).item()
    # gelu(1) = 0.841345, gelu of that 0.673011 and so on; the fifth is that of the mean.
    contexts = 0.8413447461 + 0.6730106642 + 0.5044415127 + 0.3495902886 + 0.2225760612
    assert modulated[False] == pytest.approx(2 * contexts, abs=1e-6)
    assert modulated[True] == pytest.approx(2 * contexts / 5, abs=1e-6)


@pytest.mark.parametrize("name, normalized", NORMALIZED.items())
def test_only_the_authors_model_of_four_levels_normalizes_its_modulator(name, normalized):
    with torch.device("meta"):
        model = build_backbone(name, "none")
    flags = {m.normalize_modulator for m in model.modules() if isinstance(m, FocalModulation)}
    assert flags == {normalized}


def test_the_two_models_of_four_levels_have_equal_names_and_shapes():
    """Which is why only the origin of a file says which of them it belongs to."""
    assert NORMALIZED.keys() == FOCALNETS.keys()
    shapes = []
    for name in ("focalnet_l_4level", "focalnet_l_4level_sum"):
        with torch.device("meta"):
            state = build_backbone(name, "none").state_dict()
        shapes.append({key: value.shape for key, value in state.items()})
    assert shapes[0] == shapes[1]


def test_a_fresh_block_changes_little_and_its_factors_are_learned():
    block = FocalBlock(8, 2, 3, True, 0.0)
    x = torch.randn(1, 4, 5, 8)
    change = block(x) - x
    assert 0 < change.abs().max() < 1e-2
    assert change.mean(-1).abs().max() < 1e-6   # LayerNorm comes last: no mean over the channels
    assert {"gamma_1", "gamma_2"} <= {name for name, _ in block.named_parameters()}
