"""backbones.py: published names and shapes, the authors' numbers, strides, freezing, and loading."""
import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import backbones
from backbones import focalnet
from backbones import parts
from backbones import swin
from backbones import vit
import co_detr
import dino
import h_detr
import train
from backbones.resnet import RESNETS, Bottleneck, FrozenBatchNorm2d, ResNet
from backbones import WEIGHT_FILES, build_backbone, load_backbone_weights
from backbones.parts import ConvEmbed
from backbones.focalnet import FocalModulation, FocalNet
from backbones.swin import PatchMerging, Swin, SwinBlock, WindowAttention, relative_position_index, shift_mask
from engine.recipe import configure
from engine.errors import UserError
from backbones.vit import RotaryAttention, SimpleFeaturePyramid, ViT, ViTBlock, rotary_table

NARROW = {   # the families with square roots that do not come out even: window 3, 5 x 7 cells
    "swin": lambda **options: Swin(8, (2, 2, 2, 2), (1, 2, 2, 4), 3, **options),
    "vit": lambda **options: ViT(16, 3, 2, 3, 3, grid=4, outputs=8, **options),
    "focalnet": lambda **options: FocalNet(8, (1, 1, 2, 1), 2, 3, **options),
}


@pytest.fixture(params=NARROW)
def narrow(request):
    torch.manual_seed(0)
    return NARROW[request.param]


@pytest.mark.parametrize("name", RESNETS)
def test_maps_have_strides_4_to_32_and_the_listed_widths(name):
    backbone = build_backbone(name, "none").eval()
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, c, 64 // s, 96 // s) for c, s in zip(backbone.channels, (4, 8, 16, 32))]


def test_dilation_keeps_the_last_stage_at_stride_16_with_the_same_weights():
    torch.manual_seed(0)
    plain, dilated = build_backbone("resnet50", "none"), build_backbone("resnet50", "none", dilation=True)
    dilated.load_state_dict(plain.state_dict())
    assert dilated.eval()(torch.randn(1, 3, 64, 64))[-1].shape[-2:] == (4, 4)
    assert [dilated.layer4[i].conv2.dilation for i in range(3)] == [(1, 1), (2, 2), (2, 2)]


@pytest.mark.parametrize("name, parameters", [("resnet18", 11_176_512), ("resnet34", 21_284_672),
                                              ("resnet50", 23_508_032), ("resnet101", 42_500_160)])
def test_parameter_counts_are_the_published_ones_without_the_classifier(name, parameters):
    assert sum(p.numel() for p in build_backbone(name, "none").parameters()) == parameters


def test_names_are_torchvisions(shared, recipe):
    keys = dict(recipe.read_keys(shared / "golden" / "keys_deformable_detr_r50.txt"))
    theirs = {k.removeprefix("backbone.0.body."): s for k, s in keys.items() if k.startswith("backbone.")}
    assert {k: tuple(v.shape) for k, v in build_backbone("resnet50", "imagenet").state_dict().items()} == theirs


def test_published_weights_freeze_normalisation_stem_and_first_stage():
    backbone = build_backbone("resnet50", "imagenet")
    frozen = {n.split(".")[0] for n, p in backbone.named_parameters() if not p.requires_grad}
    live = {n.split(".")[0] for n, p in backbone.named_parameters() if p.requires_grad}
    assert frozen == {"conv1", "layer1"} and live == {"layer2", "layer3", "layer4"}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())


@pytest.mark.parametrize("norm, kind", [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)])
def test_from_scratch_every_parameter_trains_with_live_normalisation(norm, kind):
    backbone = build_backbone("tiny", "none", norm)
    assert all(p.requires_grad for p in backbone.parameters())
    assert any(isinstance(m, kind) for m in backbone.modules())


def test_frozen_normalisation_equals_batch_normalisation_in_eval_mode():
    live, frozen = nn.BatchNorm2d(6).eval(), FrozenBatchNorm2d(6)
    for tensor in (live.weight.data, live.bias.data, live.running_mean, live.running_var):
        tensor.uniform_(0.5, 2.0)
    frozen.load_state_dict({k: v for k, v in live.state_dict().items() if k != "num_batches_tracked"})
    x = torch.randn(2, 6, 3, 5)
    assert torch.allclose(live(x), frozen(x), atol=1e-6)


def test_a_weight_file_is_loaded_and_a_wrong_one_is_refused(tmp_path):
    torch.save(build_backbone("resnet18", "none").state_dict() | {"fc.weight": torch.zeros(1), "fc.bias": torch.zeros(1)},
               tmp_path / "r18.pth")
    backbone = build_backbone("resnet18", "file")
    assert "r18.pth" in load_backbone_weights(backbone, "resnet18", str(tmp_path / "r18.pth"))
    assert torch.equal(backbone.conv1.weight, torch.load(tmp_path / "r18.pth")["conv1.weight"])
    with pytest.raises(UserError, match="does not fit backbone resnet34"):
        load_backbone_weights(build_backbone("resnet34", "file"), "resnet34", str(tmp_path / "r18.pth"))
    with pytest.raises(UserError, match="no file"):
        load_backbone_weights(backbone, "resnet18", str(tmp_path / "absent.pth"))


def test_imagenet_weights_that_cannot_be_fetched_name_the_remedy(monkeypatch):
    def refuse(url, **_):
        assert url.endswith(WEIGHT_FILES["resnet50"])
        raise OSError("no route")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match="--backbone_weights none"):
        load_backbone_weights(build_backbone("resnet50", "imagenet"), "resnet50", "imagenet")
    with pytest.raises(UserError, match="no public ImageNet weights"):
        load_backbone_weights(build_backbone("tiny", "imagenet"), "tiny", "imagenet")


def test_unknown_names_list_the_choices():
    with pytest.raises(ValueError, match="resnet18, resnet34"):
        build_backbone("resnet19", "none")
    with pytest.raises(ValueError, match="batch or group"):
        build_backbone("resnet18", "none", "layer")


def test_a_narrow_resnet_keeps_the_proportions():
    assert ResNet(Bottleneck, (3, 4, 6, 3), (4, 8, 16, 32), 4).channels == [16, 32, 64, 128]


# ---- Swin

def recorded_parts(rec, tag, model):
    """Loads the weights recorded under `tag`; -> inputs, outputs, gradients by name."""
    rec = {k.removeprefix(tag + "/"): torch.as_tensor(np.asarray(v)).float() for k, v in rec.items() if k.startswith(tag + "/")}
    state = {k.removeprefix("sd/"): v for k, v in rec.items() if k.startswith("sd/")}
    model.eval().load_state_dict(backbones.learned(state), strict=True)
    outputs = [rec[k] for k in sorted(rec) if k.startswith("out")]
    return rec["in0"].requires_grad_(), outputs, {k.removeprefix("grad/"): v for k, v in rec.items() if k.startswith("grad")}


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
def swin_recording(golden):
    return golden("co_detr/swin")


def test_relative_positions_are_numbered_as_the_authors_number_them(swin_recording):
    for window in (2, 3, 4, 7, 12):
        assert np.array_equal(relative_position_index(window), swin_recording[f"relative_index/window{window}"])


def test_window_attention_equals_the_authors(swin_recording):
    model = WindowAttention(12, 3, 4)
    x, expected, gradients = recorded_parts(swin_recording, "window_attention", model)
    compare(model, x, [model(x)], expected, gradients)


@pytest.mark.parametrize("shift", (0, 2))
def test_swin_blocks_equal_the_authors_on_a_map_no_window_divides(swin_recording, shift):
    model = SwinBlock(12, 3, 4, shift > 0, 2, 0.0)
    mask = shift_mask(7, 10, 4, "cpu")
    assert np.array_equal(mask, swin_recording["shift_mask"])
    x, expected, gradients = recorded_parts(swin_recording, f"block_shift{shift}", model)
    compare(model, x, [model(x.unflatten(1, (7, 10)), mask).flatten(1, 2)], expected, gradients)


@pytest.mark.parametrize("height, width", ((6, 8), (7, 9), (7, 8)))
def test_merging_equals_the_authors_with_odd_sizes(swin_recording, height, width):
    dim = swin_recording[f"merge_{height}x{width}/in0"].shape[-1]
    model = PatchMerging(dim)
    x, expected, gradients = recorded_parts(swin_recording, f"merge_{height}x{width}", model)
    compare(model, x, [model(x.unflatten(1, (height, width))).flatten(1, 2)], expected, gradients)


def test_patches_equal_the_authors_where_four_does_not_divide_the_image(swin_recording):
    model = ConvEmbed(3, 8, 4, 4)
    x, expected, gradients = recorded_parts(swin_recording, "embed_18x23", model)
    compare(model, x, [model(x).permute(0, 3, 1, 2)], expected, gradients)


def test_the_whole_swin_equals_the_authors(swin_recording):
    model = Swin(12, (2, 2, 4, 2), (1, 2, 3, 6), 4, mlp_ratio=2)
    x, expected, gradients = recorded_parts(swin_recording, "swin", model)
    compare(model, x, model(x), expected, gradients)


@pytest.mark.parametrize("shift", (False, True))
def test_window_attention_equals_loops_over_queries_and_keys(shift):
    """Every query looks at the keys of its window, padding included, that were its neighbours before the shift."""
    torch.manual_seed(0)
    H, W, C, M, w = 5, 8, 6, 2, 4
    block, s = SwinBlock(C, M, w, shift, 2, 0.0).double(), w // 2 if shift else 0
    for p in block.parameters():
        nn.init.normal_(p)
    x = torch.randn(1, H, W, C, dtype=torch.double)
    Hp, Wp = H + -H % w, W + -W % w
    padded = torch.zeros(Hp, Wp, C, dtype=torch.double)
    padded[:H, :W] = x[0]
    qkv = block.attn.qkv(padded).unflatten(-1, (3, M, C // M))
    expected = torch.empty(H, W, C, dtype=torch.double)
    for y in range(H):
        for z in range(W):
            window = [(a, b) for a in range(Hp) for b in range(Wp)   # same window once shifted, no jump around the border
                      if ((a - s) % Hp // w, (b - s) % Wp // w) == ((y - s) % Hp // w, (z - s) % Wp // w)
                      and abs(a - y) < w and abs(b - z) < w]
            heads = []
            for m in range(M):
                bias = [block.attn.relative_position_bias_table[(y - a + w - 1) * (2 * w - 1) + z - b + w - 1, m]
                        for a, b in window]
                scores = torch.stack([qkv[y, z, 0, m] @ qkv[a, b, 1, m] / math.sqrt(C // M) for a, b in window])
                heads.append(sum(p * qkv[a, b, 2, m] for p, (a, b) in zip((scores + torch.stack(bias)).softmax(0), window)))
            expected[y, z] = block.attn.proj(torch.cat(heads))
    ours = block.attend(x, shift_mask(H, W, w, "cpu"))
    assert torch.allclose(ours[0], expected, atol=1e-10)


def test_a_map_no_detector_reads_has_no_norm_to_learn_but_is_normalised():
    model = NARROW["swin"](maps=3)
    assert not hasattr(model, "norm0") and {"norm1", "norm2", "norm3"} <= {n for n, _ in model.named_children()}
    coarse = model(torch.randn(1, 3, 40, 52))[0]
    assert coarse.mean(1).abs().max() < 1e-5 and (coarse.var(1, unbiased=False) - 1).abs().max() < 1e-2


# ---- ViT

@pytest.fixture
def vit_recording(golden):
    return {k: torch.as_tensor(np.asarray(v)).float() for k, v in golden("co_detr/vit_sfp").items()}


@pytest.mark.parametrize("case", ("glb_rope_off", "lsj"))
def test_the_vision_transformer_equals_the_authors(vit_recording, case, monkeypatch):
    """Recorded tables of angles replace ours, for they were disturbed; case lsj has one for the global block too."""
    rec, model = vit_recording, ViT(64, 3, 1, 4, 2, grid=4, outputs=16).eval()
    table = lambda part: torch.stack([rec[f"{case}/rope/{part}.freqs_{f}"] for f in ("cos", "sin")])
    missing, unexpected = model.load_state_dict({k[3:]: v for k, v in rec.items() if k.startswith("sd/")}, strict=False)
    assert not unexpected and all(key.startswith("neck.") for key in missing)
    model.window_rotary.copy_(table("rope_win"))
    if case == "lsj":
        monkeypatch.setattr(vit, "rotary_table", lambda *_: table("rope_glb"))
    assert torch.allclose(model.features(rec[f"{case}/in"]), rec[f"{case}/out"], rtol=1e-5, atol=1e-5)


def test_the_pyramid_equals_the_authors(vit_recording):
    model = SimpleFeaturePyramid(32, 16)
    model.load_state_dict({k.removeprefix("sfp/sd/"): v for k, v in vit_recording.items() if k.startswith("sfp/sd/")})
    for i, level in enumerate(model(vit_recording["sfp/in"])):
        assert torch.allclose(level, vit_recording[f"sfp/out{i}"], rtol=1e-5, atol=1e-5)


def test_pairs_of_channels_turn_by_position_times_frequency():
    """dim 8: pairs 0 and 1 tell rows apart with frequencies 1 and 1/100, pairs 2 and 3 columns."""
    H, W = 3, 4
    x = torch.tensor([1.0, 0.0]).repeat(4).expand(H * W, 8)
    turned = vit.rotate(x, rotary_table(H, W, 8)).unflatten(-1, (4, 2))
    for y in range(H):
        for z in range(W):
            angles = torch.tensor([16 * y / H, 16 * y / H / 100, 16 * z / W, 16 * z / W / 100])
            assert torch.allclose(turned[y * W + z], torch.stack((angles.cos(), angles.sin()), -1), atol=1e-5)


def test_scores_of_the_vision_transformer_depend_on_distance_alone():
    """Equal content everywhere: q_i k_j is the same for every pair that lies equally far apart."""
    rotary, q, k = rotary_table(4, 4, 8), torch.randn(8), torch.randn(8)
    scores = vit.rotate(q.expand(16, 8), rotary) @ vit.rotate(k.expand(16, 8), rotary).T
    scores = scores.unflatten(1, (4, 4)).unflatten(0, (4, 4))
    assert torch.allclose(scores[:-1, :-1, :-1, :-1], scores[1:, 1:, 1:, 1:], atol=1e-4)
    assert (scores[0, 0] - scores[0, 0, 0, 0]).abs().max() > 0.1


def test_the_global_table_has_the_rows_and_columns_of_the_map(monkeypatch):
    calls, model = [], NARROW["vit"]()
    monkeypatch.setattr(vit, "rotary_table", lambda *size: calls.append(size[:2]) or rotary_table(*size))
    assert model.features(torch.randn(1, 3, 48, 80)).shape[2:] == (3, 5) and calls == [(3, 5)]


def test_windows_of_the_vision_transformer_are_small_maps_of_their_own():
    torch.manual_seed(0)
    block, rotary = ViTBlock(8, 2, 3, 0.0), rotary_table(3, 3, 4)
    x = torch.randn(2, 5, 7, 8)
    whole = block.attend(x, rotary)
    corner = torch.zeros(2, 3, 3, 8)
    corner[:, :2, :1] = x[:, 3:, 6:]   # the last window: two rows and one column of it are cells
    alone = block.attn(corner.flatten(1, 2), rotary).unflatten(1, (3, 3))
    assert torch.allclose(whole[:, 3:, 6:], alone[:, :2, :1], atol=1e-6)


def test_attention_of_the_vision_transformer_equals_a_loop_over_heads():
    torch.manual_seed(0)
    model, rotary, x = RotaryAttention(8, 2), rotary_table(2, 3, 4), torch.randn(1, 6, 8)
    nn.init.normal_(model.q_bias)
    nn.init.normal_(model.v_bias)
    q, k, v = model.q_proj(x) + model.q_bias, model.k_proj(x), model.v_proj(x) + model.v_bias
    heads = []
    for part in (slice(4), slice(4, 8)):
        scores = vit.rotate(q[..., part], rotary) @ vit.rotate(k[..., part], rotary).transpose(1, 2) / 2
        heads.append(scores.softmax(-1) @ v[..., part])
    assert torch.allclose(model(x, rotary), model.proj(torch.cat(heads, -1)), atol=1e-6)


def test_positions_learned_on_a_square_are_stretched_over_the_map():
    table = torch.arange(4.0).view(2, 2).flatten().view(1, 4, 1)
    table = torch.cat((torch.full((1, 1, 1), 99.0), table), 1)
    assert torch.equal(vit.resize_positions(table, 2, 2), table[:, 1:])
    wide = vit.resize_positions(table, 2, 6).unflatten(1, (2, 6))[0, ..., 0]
    assert (wide.diff(dim=1) >= -1e-6).all() and (wide.diff(dim=0) > 1).all()


# ---- FocalNet

def test_focal_modulation_equals_its_equations_cell_by_cell():
    """ctx_l = gelu(depthwise conv of ctx_l-1), kernels 3 and 5; the mean of the last is the widest context."""
    torch.manual_seed(0)
    C, H, W = 3, 4, 5
    model = FocalModulation(C, 2, 3).double()
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
    total = sum(c * mixed[..., 2 * C + i:2 * C + i + 1] for i, c in enumerate(contexts))
    total = total @ model.h.weight[:, :, 0, 0].T + model.h.bias
    assert torch.allclose(model(x)[0], model.proj(mixed[..., :C] * total), atol=1e-10)


def test_a_fresh_focal_block_changes_little_and_its_scales_are_learned():
    block = focalnet.FocalBlock(8, 2, 3, 0.0)
    x = torch.randn(1, 4, 5, 8)
    change = block(x) - x
    assert 0 < change.abs().max() < 1e-2
    assert change.mean(-1).abs().max() < 1e-6   # both branches are normalised last, which leaves no mean over the channels
    assert {"gamma_1", "gamma_2"} <= {name for name, _ in block.named_parameters()}


# ---- all transformers

@pytest.mark.parametrize("size", ((64, 96), (75, 101), (33, 130)))
def test_every_size_gives_maps_of_all_strides_rounded_up(narrow, size):
    maps = narrow().eval()(torch.randn(1, 3, *size))
    for level, (x, channels) in enumerate(zip(maps, narrow().channels, strict=True)):
        assert x.shape[:2] == (1, channels)
        exact = [n / 4 / 2 ** level for n in size]
        assert all(math.ceil(e) <= n <= math.ceil(e) + 4 / 2 ** level for n, e in zip(x.shape[2:], exact))


def test_images_of_a_batch_do_not_see_each_other(narrow):
    model, images = narrow().eval(), torch.zeros(2, 3, 64, 80)
    images[0], images[1, :, :40, :56] = torch.randn(3, 64, 80), torch.randn(3, 40, 56)
    both = model(images)
    for i in range(2):
        for x, alone in zip(both, model(images[i:i + 1])):
            assert torch.allclose(x[i:i + 1], alone, atol=1e-5)


def test_gradients_reach_every_parameter_of_a_transformer(narrow):
    model = narrow()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    sum((m * torch.randn_like(m)).sum() for m in model(torch.randn(1, 3, 84, 100))).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without, without


def test_drop_path_leaves_whole_branches_out_in_training_only(narrow):
    model, images = narrow(drop_path=0.9), torch.randn(1, 3, 64, 64)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    def draws():
        return [model(images)[-1].sum().item() for _ in range(4)]
    assert len(set(draws())) > 1
    model.eval()
    assert len(set(draws())) == 1


def test_drop_rates_rise_evenly_over_the_blocks_of_all_stages():
    assert [len(stage) for stage in parts.drop_rates(0.3, (1, 2, 1))] == [1, 2, 1]
    assert sum(parts.drop_rates(0.3, (1, 2, 1)), []) == pytest.approx([0, 0.1, 0.2, 0.3])


def test_drop_path_keeps_the_mean():
    layer, x = parts.DropPath(0.25), torch.ones(10_000, 2, 3)
    y = layer(x)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (y == y[:, :1, :1]).all() and abs(y.mean() - 1) < 0.03


def test_recomputed_blocks_give_the_same_bytes(narrow):
    """--recompute finds every block of the transformers, and dropped paths are the same ones the second time."""
    kept = nn.ModuleDict({"backbone": narrow(drop_path=0.5)})
    again = copy.deepcopy(kept)
    train.prepare_parts(again, SimpleNamespace(compile=False, recompute=True, model="test"))
    blocks = [m for n, m in again.named_modules() if isinstance(m, (SwinBlock, ViTBlock, focalnet.FocalBlock))]
    assert blocks and all("checkpoint" in repr(m.forward) for m in blocks)
    gradients = []
    for model in (kept, again):
        torch.manual_seed(1)
        images = torch.randn(2, 3, 48, 80)
        sum(m.square().sum() for m in model["backbone"](images)).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_bfloat16_autocast_stays_close(narrow):
    model, images = narrow().eval(), torch.randn(1, 3, 64, 80)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images)
    for a, b in zip(exact, rough):
        assert b.isfinite().all() and (a - b).abs().max() < 0.05 * a.abs().max()


# ---- published weights

@pytest.mark.parametrize("name, listed, prefix", [
    ("swin_t", "co_deformable_detr_swin_t", "backbone."), ("swin_l", "co_deformable_detr_swin_l_900q", "backbone."),
    ("swin_l", "co_dino_5scale_swin_l", "backbone."), ("vit_l", "co_dino_5scale_vit_l", "backbone.")])
def test_names_of_transformers_are_the_published_ones(name, listed, prefix, shared):
    lines = (shared / "golden" / "co_detr" / f"keys_{listed}.txt").read_text().splitlines()
    theirs = {key: tuple(map(int, shape.split("x"))) for key, shape in (line.split() for line in lines if "scalar" not in line)
              if key.startswith((prefix, "neck.p"))}
    theirs = {key.removeprefix(prefix): torch.empty(shape, device="meta") for key, shape in theirs.items()}
    with torch.device("meta"):
        model = build_backbone(name, "imagenet", maps=4 if "dino" in listed else 3)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in backbones.learned(theirs).items()}
    assert all(p.requires_grad for p in model.parameters())


def classifier(name, model):
    """A published file of an image classifier around this backbone."""
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(("norm", "neck."))}
    extra = {"head.weight": torch.zeros(1), "norm.bias": torch.zeros(1)}
    if name == "swin":
        extra |= {"layers.0.blocks.1.attn_mask": torch.zeros(1),
                  "layers.0.blocks.0.attn.relative_position_index": relative_position_index(3)}
    if name == "vit":
        cos, sin = rotary_table(5, 5, 8)
        extra |= {"rope.freqs_cos": cos, "rope.freqs_sin": sin, "cls_token": torch.zeros(1), "mask_token": torch.zeros(1)}
    return {"model": state | extra}


@pytest.mark.parametrize("name", NARROW)
def test_weights_of_classifiers_load_into_the_transformers(name, tmp_path):
    source, model = NARROW[name](), NARROW[name]()
    torch.save(classifier(name, source), tmp_path / "published.pth")
    line = load_backbone_weights(model, name, str(tmp_path / "published.pth"))
    assert f"{len(classifier(name, source)['model']) - {'swin': 4, 'vit': 6, 'focalnet': 2}[name]} tensors" in line
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in source.state_dict().items()
               if not k.startswith(("norm", "neck.")))


def test_positions_and_patches_of_another_pretraining_are_resized(tmp_path):
    source = ViT(16, 3, 2, 3, 3, grid=5, outputs=8)
    state = source.state_dict() | {"patch_embed.proj.weight": F.interpolate(source.patch_embed.proj.weight, (14, 14))}
    torch.save(state, tmp_path / "p14.pth")
    model = NARROW["vit"]()
    load_backbone_weights(model, "vit", str(tmp_path / "p14.pth"))
    assert torch.allclose(model.pos_embed[:, 1:], vit.resize_positions(source.pos_embed, 4, 4))
    assert model.patch_embed.proj.weight.shape[-1] == 16


def test_weights_of_another_window_or_a_changed_table_are_refused(tmp_path):
    torch.save(Swin(8, (2, 2, 2, 2), (1, 2, 2, 4), 4).state_dict(), tmp_path / "window4.pth")
    with pytest.raises(UserError, match="of another shape.*relative_position_bias_table.*8 in all"):
        load_backbone_weights(NARROW["swin"](), "swin", str(tmp_path / "window4.pth"))
    for key, table in (("attn.relative_position_index", relative_position_index(3).flip(0)),
                       ("rope.freqs_sin", rotary_table(3, 3, 8)[0])):
        with pytest.raises(ValueError, match=f"{key}.*changed model"):
            backbones.learned({key: table})


def test_settings_of_one_family_are_refused_by_another():
    with pytest.raises(ValueError, match="drop_path with another backbone, got resnet50"):
        build_backbone("resnet50", "none", drop_path=0.1)
    with pytest.raises(ValueError, match="dilation with a ResNet"):
        build_backbone("swin_t", "none", dilation=True)


def test_every_published_file_belongs_to_a_backbone_and_says_its_window():
    assert set(WEIGHT_FILES) <= set(backbones.BACKBONES)
    for name, (*_, window) in swin.SWINS.items():
        assert f"window{window}_" in WEIGHT_FILES[name]


# ---- in the detectors

TINY = {"swin_t": (8, (1, 2, 1, 1), (1, 1, 2, 2), 3), "swin_l": (16, (1, 2, 1, 1), (1, 2, 2, 4), 4),
        "swin_l_window7": (16, (1, 2, 1, 1), (1, 2, 2, 4), 3), "swin_s": (8, (1, 2, 1, 1), (1, 1, 2, 2), 3),
        "swin_b": (8, (1, 1, 1, 1), (1, 1, 2, 2), 4), "vit_l": (32, 4, 2, 3, 2),
        "focalnet_l_3level": (8, (1, 1, 1, 1), 3, 5), "focalnet_l_4level": (8, (1, 1, 1, 1), 4, 3)}
WITH_TRANSFORMERS = [(paper.__name__, variant) for paper in (dino, h_detr, co_detr)
                     for variant, values in paper.VARIANTS.items() if "backbone" in values]


@pytest.fixture
def tiny(monkeypatch):
    """The published backbones by their names, a few channels wide."""
    for table in (swin.SWINS, vit.VITS, focalnet.FOCALNETS):
        for name in table.keys() & TINY.keys():
            monkeypatch.setitem(table, name, TINY[name])


def tiny_detector(model_name, variant, **changes):
    """The variant with small everything -> Config, model, criterion."""
    torch.manual_seed(0)
    paper = {"dino": dino, "h_detr": h_detr, "co_detr": co_detr}[model_name]
    sizes = dict(dim=256 if "vit" in variant else 32, ffn_dim=16, encoder_layers=1, decoder_layers=2, num_queries=7)
    small = {k: v for k, v in paper.SMALL.items() if k.startswith(("roi_samples", "roi_dim", "rpn_", "num_queries_one2many"))}
    cfg, _ = configure(paper, small, paper.VARIANTS[variant], sizes, {"num_heads": 2, "backbone_weights": "none", **changes})
    return (cfg, *paper.build(cfg, 5))


def two_images():
    """A batch of two sizes, four objects in the first image and one in the second."""
    images, padding = torch.randn(2, 3, 80, 104), torch.zeros(2, 80, 104, dtype=torch.bool)
    padding[1, 60:], padding[1, :, 72:] = True, True
    images = images.masked_fill(padding[:, None], 0)
    boxes = torch.rand(5, 4) * 0.3 + 0.3
    return images, padding, [{"labels": torch.tensor([0, 1, 2, 4]), "boxes": boxes[:4]},
                             {"labels": torch.tensor([3]), "boxes": boxes[4:]}]


@pytest.mark.parametrize("model_name, variant", WITH_TRANSFORMERS)
def test_gradients_reach_every_parameter_of_every_published_pair(tiny, model_name, variant):
    """No map that a variant reads lacks a norm, none that it does not read has one: every weight of the backbone learns."""
    cfg, model, criterion = tiny_detector(model_name, variant, drop_path=0.0)
    for p in model.detector.backbone.parameters() if model_name == "co_detr" else model.backbone.parameters():
        nn.init.normal_(p, std=0.3)
    images, padding, targets = two_images()
    sum(criterion(model.train()(images, padding, targets), targets).values()).backward()
    without = [name for name, p in model.named_parameters() if "backbone" in name and (p.grad is None or not p.grad.any())]
    assert not without, without


@pytest.mark.parametrize("model_name, variant", [("dino", "swin_l_5scale"), ("h_detr", "swin_t"), ("co_detr", "vit_l")])
def test_detections_of_an_image_do_not_depend_on_the_other_one(tiny, model_name, variant):
    cfg, model, _ = tiny_detector(model_name, variant)
    images, padding, _ = two_images()
    with torch.no_grad():
        both, other = (model.eval()(x, padding) for x in (images, torch.cat((torch.randn(1, 3, 80, 104), images[1:]))))
    assert (both["pred_boxes"][0] - other["pred_boxes"][0]).abs().max() > 1e-4
    assert torch.allclose(both["pred_boxes"][1], other["pred_boxes"][1], atol=1e-5)


def test_vit_images_are_filled_up_to_a_multiple_of_32_and_boxes_stay(tiny):
    """The last cells would else be cut off; what is filled up is padding, so a caller who does it gets the same boxes."""
    cfg, model, _ = tiny_detector("co_detr", "vit_l")
    images, padding, _ = two_images()
    with torch.no_grad():
        ours = model.eval()(images, padding)
        wider = model(F.pad(images, (0, 24, 0, 16)), F.pad(padding, (0, 24, 0, 16), value=True))
    assert cfg.size_divisor == 32 and ours["memory"].padded_size == (96, 128)
    assert model.strides == [4, 8, 16, 32, 64, 128]
    assert torch.equal(ours["pred_boxes"], wider["pred_boxes"])


def test_layers_of_the_vision_transformer_learn_slower_towards_the_image(tiny):
    """lr x 0.8^(25 - id): id 0 for patches and positions, b + 1 for block b of 24, 25 for all the rest; here 4 blocks."""
    cfg, model, _ = tiny_detector("co_detr", "vit_l")
    _, recipe = configure(co_detr, co_detr.VARIANTS["vit_l"])
    groups = co_detr.param_groups(model, recipe)
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(rate) == sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        part = name.removeprefix("detector.backbone.").split(".")
        level = 0 if part[0] in ("pos_embed", "patch_embed") else int(part[1]) + 1 if part[0] == "blocks" else 5
        assert rate[id(p)] == (pytest.approx(5e-5 * 0.8 ** (5 - level)), 0.01 if p.dim() > 1 else 0.0), name
    with pytest.raises(ValueError, match="layer_decay beside a ViT"):
        co_detr.param_groups(tiny_detector("co_detr", "swin_l")[1], recipe)


def test_the_region_head_of_vit_has_one_box_for_all_classes_at_half_the_spread():
    torch.manual_seed(0)
    head = co_detr.RoIHead(32, 16, 5, convs=4)
    assert [tuple(p.shape) for n, p in head.named_parameters() if n.startswith("convs.3")] == [(32, 32, 3, 3), (32,), (32,)]
    logits, deltas = head(torch.randn(3, 7, 7, 32))
    assert logits.shape == (3, 6) and deltas.shape == (3, 5, 4) and torch.equal(deltas[:, 0], deltas[:, 4])
    nn.init.zeros_(head.reg.weight)
    nn.init.ones_(head.reg.bias)
    roi, (_, deltas) = torch.tensor([[0.0, 0.0, 100.0, 50.0]]), head(torch.randn(1, 7, 7, 32))
    box = co_detr.decode_deltas(deltas[:, 0], roi, torch.tensor(co_detr.SPREAD))
    center, size = torch.tensor([50 + 5, 25 + 2.5]), torch.tensor([100.0, 50.0]) * math.exp(0.1)   # spreads 0.05 and 0.1
    assert torch.allclose(box, torch.cat((center - size / 2, center + size / 2))[None])


def test_a_detector_on_swin_trains_and_is_evaluated(tiny, tmp_path, capsys):
    flags = ("--model dino --preset small --backbone swin_t --drop_path 0.1 --num_train 8 --num_val 4 --batch_size 4 "
             "--epochs 1 --ema 0 --device cpu --workers 0 --threads 1 --recompute --dim 32 --ffn_dim 32 --num_queries 9 "
             "--train_sizes 64 --eval_size 64")
    run, cfg, recipe = train.parse([*flags.split(), "--out", str(tmp_path)])
    record = train.train(run, cfg, recipe)
    assert record["step"] == 2 and 0 <= record["AP"] <= 1
    assert "backbone swin_t: random weights" in capsys.readouterr().out


def test_an_unknown_backbone_is_refused_with_the_choices(tmp_path):
    with pytest.raises(SystemExit, match="unknown backbone 'swin_xl': choose one of resnet18.*swin_l.*vit_l.*focalnet"):
        train.main(["--backbone", "swin_xl", "--num_train", "8", "--num_val", "4", "--out", str(tmp_path)])


def test_a_vit_without_its_five_levels_is_refused(tiny):
    with pytest.raises(ValueError, match="--num_feature_levels 5"):
        build_backbone("vit_l", "none", maps=3)
    with pytest.raises(ValueError, match="expected dim 256 and 5 feature levels.*got dim 32"):
        tiny_detector("co_detr", "vit_l", dim=32)
