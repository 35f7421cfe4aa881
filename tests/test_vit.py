"""backbones/vit.py against the authors' recordings, equations and loops."""
import numpy as np
import pytest
import torch
from torch import nn

from backbones import vit
from backbones.vit import (RotaryAttention, SimpleFeaturePyramid, ViT, ViTBlock, resize_positions,
                           rotary_table, rotate)


@pytest.fixture
def recording(golden):
    return {key: torch.as_tensor(np.asarray(value)).float()
            for key, value in golden("co_detr/vit_sfp").items()}


@pytest.mark.parametrize("case", ("glb_rope_off", "lsj"))
def test_the_vision_transformer_equals_the_authors(recording, case, monkeypatch):
    """Recorded tables of angles replace ours because the recording changed them; case lsj has one
    for the global block too."""
    def table(part):
        return torch.stack([recording[f"{case}/rope/{part}.freqs_{f}"] for f in ("cos", "sin")])

    model = ViT(64, 3, 1, 4, 2, grid=4, outputs=16).eval()
    state = {key[3:]: value for key, value in recording.items() if key.startswith("sd/")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(key.startswith("neck.") for key in missing)
    model.window_rotary.copy_(table("rope_win"))
    if case == "lsj":
        monkeypatch.setattr(vit, "rotary_table", lambda *_: table("rope_glb"))
    features = model.features(recording[f"{case}/in"])
    assert torch.allclose(features, recording[f"{case}/out"], rtol=1e-5, atol=1e-5)


def test_the_pyramid_equals_the_authors(recording):
    model = SimpleFeaturePyramid(32, 16)
    model.load_state_dict({key.removeprefix("sfp/sd/"): value for key, value in recording.items()
                           if key.startswith("sfp/sd/")})
    for i, level in enumerate(model(recording["sfp/in"])):
        assert torch.allclose(level, recording[f"sfp/out{i}"], rtol=1e-5, atol=1e-5)


def test_pairs_of_channels_rotate_by_position_times_frequency():
    """dim 8: pairs 0 and 1 encode rows with frequencies 1 and 1/100, pairs 2 and 3 columns."""
    H, W = 3, 4
    x = torch.tensor([1.0, 0.0]).repeat(4).expand(H * W, 8)
    rotated = rotate(x, rotary_table(H, W, 8)).unflatten(-1, (4, 2))
    for y in range(H):
        for z in range(W):
            angles = torch.tensor([16 * y / H, 16 * y / H / 100, 16 * z / W, 16 * z / W / 100])
            expected = torch.stack((angles.cos(), angles.sin()), -1)
            assert torch.allclose(rotated[y * W + z], expected, atol=1e-5)


def test_scores_depend_on_distance_alone():
    """Equal content everywhere: q_i k_j is the same for every pair that lies equally far apart."""
    rotary, q, k = rotary_table(4, 4, 8), torch.randn(8), torch.randn(8)
    scores = rotate(q.expand(16, 8), rotary) @ rotate(k.expand(16, 8), rotary).T
    scores = scores.unflatten(1, (4, 4)).unflatten(0, (4, 4))
    assert torch.allclose(scores[:-1, :-1, :-1, :-1], scores[1:, 1:, 1:, 1:], atol=1e-4)
    assert (scores[0, 0] - scores[0, 0, 0, 0]).abs().max() > 0.1


def test_the_global_table_has_the_rows_and_columns_of_the_map(monkeypatch):
    calls = []

    def recorded_table(*size):
        calls.append(size[:2])
        return rotary_table(*size)

    model = ViT(16, 3, 2, 3, 3, grid=4, outputs=8)
    monkeypatch.setattr(vit, "rotary_table", recorded_table)
    assert model.features(torch.randn(1, 3, 48, 80)).shape[2:] == (3, 5)
    assert calls == [(3, 5)]


def test_windows_are_small_maps_of_their_own():
    torch.manual_seed(0)
    block, rotary = ViTBlock(8, 2, 3, 0.0), rotary_table(3, 3, 4)
    x = torch.randn(2, 5, 7, 8)
    complete = block.attend(x, rotary)
    corner = torch.zeros(2, 3, 3, 8)
    corner[:, :2, :1] = x[:, 3:, 6:]   # of the last window, two rows and one column are cells
    alone = block.attn(corner.flatten(1, 2), rotary).unflatten(1, (3, 3))
    assert torch.allclose(complete[:, 3:, 6:], alone[:, :2, :1], atol=1e-6)


def test_attention_equals_a_loop_over_heads():
    torch.manual_seed(0)
    model, rotary, x = RotaryAttention(8, 2), rotary_table(2, 3, 4), torch.randn(1, 6, 8)
    nn.init.normal_(model.q_bias)
    nn.init.normal_(model.v_bias)
    q = model.q_proj(x) + model.q_bias
    k = model.k_proj(x)
    v = model.v_proj(x) + model.v_bias
    heads = []
    for part in (slice(4), slice(4, 8)):
        scores = rotate(q[..., part], rotary) @ rotate(k[..., part], rotary).transpose(1, 2) / 2
        heads.append(scores.softmax(-1) @ v[..., part])
    assert torch.allclose(model(x, rotary), model.proj(torch.cat(heads, -1)), atol=1e-6)


def test_positions_learned_on_a_square_are_stretched_over_the_map():
    table = torch.arange(4.0).view(1, 4, 1)
    table = torch.cat((torch.full((1, 1, 1), 99.0), table), 1)
    assert torch.equal(resize_positions(table, 2, 2), table[:, 1:])
    wide = resize_positions(table, 2, 6).unflatten(1, (2, 6))[0, ..., 0]
    assert (wide.diff(dim=1) >= -1e-6).all() and (wide.diff(dim=0) > 1).all()
