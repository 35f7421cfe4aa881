"""Building backbones by name, loading their weights, and what Swin, ViT and FocalNet have in
common, alone and in the detectors."""
import argparse
import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import backbones
import co_detr
import dino
import h_detr
import train
from backbones import (WEIGHT_FILES, build_backbone, drop_derived_buffers, fetch_imagenet_weights,
                       load_backbone_weights, read_state_dict)
from backbones.focalnet import FOCALNETS, FocalBlock, FocalNet
from backbones.layers import DropPath, drop_rates
from backbones.swin import SWINS, Swin, SwinBlock, relative_position_index
from backbones.vit import VITS, ViT, ViTBlock, resize_positions, rotary_table
from engine.errors import UserError
from engine.layers import compile_or_recompute
from engine.recipe import configure


def narrow_swin(**options):
    return Swin(8, (2, 2, 2, 2), (1, 2, 2, 4), 3, **options)


def narrow_vit(**options):
    return ViT(16, 3, 2, 3, 3, **{"grid": 4, "outputs": 8, **options})


def narrow_focalnet(**options):
    return FocalNet(8, (1, 1, 2, 1), 2, 3, **options)


NARROW = {"swin": narrow_swin, "vit": narrow_vit, "focalnet": narrow_focalnet}


@pytest.fixture(params=NARROW)
def narrow(request):
    torch.manual_seed(0)
    return NARROW[request.param]


# ---- building by name

def test_unknown_names_list_the_choices():
    with pytest.raises(UserError, match="resnet18, resnet34"):
        build_backbone("resnet19", "none")
    with pytest.raises(UserError, match="batch or group"):
        build_backbone("resnet18", "none", "layer")


def test_settings_of_one_family_are_refused_by_another():
    with pytest.raises(UserError, match="expected drop_path 0 with a ResNet, got 0.1"):
        build_backbone("resnet50", "none", drop_path=0.1)
    with pytest.raises(UserError, match="expected dilation with a ResNet only, got swin_t"):
        build_backbone("swin_t", "none", dilation=True)


def test_a_vit_without_its_five_levels_is_refused():
    with pytest.raises(UserError, match="--num_feature_levels 5"):
        build_backbone("vit_l", "none", maps=3)


def test_every_published_file_belongs_to_a_backbone_and_says_its_window():
    assert set(WEIGHT_FILES) <= set(backbones.BACKBONES)
    for name, (*_, window) in SWINS.items():
        assert f"window{window}_" in WEIGHT_FILES[name]


# ---- weight files

def test_a_weight_file_is_loaded_and_a_wrong_one_is_refused(tmp_path):
    path = tmp_path / "r18.pth"
    classifier = {"fc.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}
    torch.save(build_backbone("resnet18", "none").state_dict() | classifier, path)
    backbone = build_backbone("resnet18", "file")
    assert "r18.pth" in load_backbone_weights(backbone, "resnet18", str(path))
    assert torch.equal(backbone.conv1.weight, torch.load(path)["conv1.weight"])
    with pytest.raises(UserError, match="does not fit backbone resnet34"):
        load_backbone_weights(build_backbone("resnet34", "file"), "resnet34", str(path))
    with pytest.raises(UserError, match="no file"):
        load_backbone_weights(backbone, "resnet18", str(tmp_path / "absent.pth"))


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"", b"PK\x03\x04 cut short",
                                     argparse.Namespace(lr=1), {"model": {"epoch": 3}}, [1, 2]])
def test_a_file_without_tensors_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match="weights.pth.*--backbone_weights none") as error:
        load_backbone_weights(build_backbone("tiny", "file"), "tiny", str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x80\x02.", b"\x80\x02}0.", b"PK\x03\x04", b"{}"])
def test_a_damaged_weight_file_is_one_error_whatever_reading_it_raises(tmp_path, content):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(UserError, match="expected PyTorch weights"):
        read_state_dict(tmp_path / "weights.pth")


def test_imagenet_weights_that_cannot_be_downloaded_name_the_remedy(monkeypatch, tmp_path):
    def refuse(url, path):
        assert url == WEIGHT_FILES["resnet50"]
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UserError, match="no route.*--backbone_weights none"):
        load_backbone_weights(build_backbone("resnet50", "imagenet"), "resnet50", "imagenet")
    with pytest.raises(UserError, match="no public ImageNet weights"):
        load_backbone_weights(build_backbone("tiny", "imagenet"), "tiny", "imagenet")


def test_imagenet_weights_are_downloaded_once_and_loaded(monkeypatch, tmp_path):
    source = build_backbone("resnet18", "none")
    downloads = []

    def download(url, path):
        downloads.append(url)
        torch.save(source.state_dict(), path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    fetched = fetch_imagenet_weights("resnet18")
    backbone = build_backbone("resnet18", "imagenet")
    assert fetched.name in load_backbone_weights(backbone, "resnet18", "imagenet")
    assert downloads == [WEIGHT_FILES["resnet18"]]
    assert torch.equal(backbone.conv1.weight, source.conv1.weight)


def classifier(name, model):
    """A published file of an image classifier around this backbone: the backbone's tensors, and
    what else such files hold."""
    state = {key: value for key, value in model.state_dict().items()
             if not key.startswith(("norm", "neck.", "out_norm."))}
    extra = {"head.weight": torch.zeros(1), "norm.bias": torch.zeros(1)}
    if name == "swin":
        extra |= {"layers.0.blocks.1.attn_mask": torch.zeros(1),
                  "layers.0.blocks.0.attn.relative_position_index": relative_position_index(3)}
    if name == "vit":
        extra |= eva_extras(model)
    return state, extra


def eva_extras(model):
    """What EVA-02's files hold beside the blocks, pretrained or fine-tuned. They have no out_norm,
    and rotary tables of the grid of their own images."""
    cosine, sine = rotary_table(16, 16, model.head_dim)
    extra = {"cls_token": torch.zeros(1, 1, 16), "mask_token": torch.zeros(1, 1, 16)}
    for name in ("norm", "fc_norm", "head", "lm_head"):
        extra |= {f"{name}.weight": torch.zeros(16), f"{name}.bias": torch.zeros(16)}
    for prefix in ("rope", "blocks.0.attn.rope", "blocks.2.attn.rope"):
        extra |= {f"{prefix}.freqs_cos": cosine, f"{prefix}.freqs_sin": sine}
    return extra


@pytest.mark.parametrize("name", NARROW)
def test_weights_of_classifiers_load_into_the_transformers(name, tmp_path):
    source, model = NARROW[name](), NARROW[name]()
    state, extra = classifier(name, source)
    torch.save({"model": state | extra}, tmp_path / "published.pth")
    line = load_backbone_weights(model, name, str(tmp_path / "published.pth"))
    assert f"{len(state)} tensors" in line
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize("wrappers", [("model_ema", "model"), ("state_dict",), ("model",),
                                      ("module",), ()])
def test_files_of_eva02_load_without_an_output_norm_under_every_wrapper(wrappers, tmp_path):
    """As Co-DETR's loader: averaged weights first. With no wrapper, names may start with "module.";
    the output norm keeps its initial values."""
    source, model = narrow_vit(), narrow_vit()
    state, extra = classifier("vit", source)
    assert not any("out_norm" in key for key in state)
    contents = state | extra
    if wrappers:
        other = {key: torch.zeros_like(value) for key, value in contents.items()}
        file = {wrappers[0]: contents} | {name: other for name in wrappers[1:]} | {"epoch": 7}
    else:
        file = {f"module.{key}": value for key, value in contents.items()}
    torch.save(file, tmp_path / "eva02.pt")
    load_backbone_weights(model, "vit", str(tmp_path / "eva02.pt"))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert (model.out_norm.weight == 1).all() and (model.out_norm.bias == 0).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_positions_and_patches_of_another_pretraining_are_resized(tmp_path, dtype):
    source = narrow_vit(grid=5).to(dtype).float()
    patches = F.interpolate(source.patch_embed.proj.weight, (14, 14)).to(dtype)
    state = source.state_dict() | {"patch_embed.proj.weight": patches}
    torch.save({key: value.to(dtype) for key, value in state.items()}, tmp_path / "p14.pth")
    model = narrow_vit()
    load_backbone_weights(model, "vit", str(tmp_path / "p14.pth"))
    expected = resize_positions(source.pos_embed, 4, 4)
    assert torch.allclose(model.pos_embed[:, 1:], expected, atol=1e-6)
    assert model.patch_embed.proj.weight.shape[-1] == 16
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_weights_of_another_window_or_a_changed_table_are_refused(tmp_path):
    torch.save(Swin(8, (2, 2, 2, 2), (1, 2, 2, 4), 4).state_dict(), tmp_path / "window4.pth")
    with pytest.raises(UserError, match="another shape.*relative_position_bias_table.*8 in all"):
        load_backbone_weights(narrow_swin(), "swin", str(tmp_path / "window4.pth"))
    for key, table in (("attn.relative_position_index", relative_position_index(3).flip(0)),
                       ("rope_win.freqs_sin", rotary_table(3, 3, 8)[0])):
        with pytest.raises(UserError, match=f"{key}.*changed model"):
            drop_derived_buffers({key: table})


@pytest.mark.parametrize("name, listed", [("swin_t", "co_deformable_detr_swin_t"),
                                          ("swin_l", "co_deformable_detr_swin_l_900q"),
                                          ("swin_l", "co_dino_5scale_swin_l"),
                                          ("vit_l", "co_dino_5scale_vit_l")])
def test_names_of_transformers_are_the_published_ones(name, listed, shared):
    lines = (shared / "golden" / "co_detr" / f"keys_{listed}.txt").read_text().splitlines()
    theirs = {}
    for line in lines:
        key, shape = line.split()
        if shape != "scalar" and key.startswith(("backbone.", "neck.p")):
            shape = tuple(map(int, shape.split("x")))
            theirs[key.removeprefix("backbone.")] = torch.empty(shape, device="meta")
    with torch.device("meta"):
        model = build_backbone(name, "imagenet", maps=4 if "dino" in listed else 3)
    expected = {key: value.shape for key, value in drop_derived_buffers(theirs).items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == expected
    assert all(p.requires_grad for p in model.parameters())


# ---- what the transformers have in common

@pytest.mark.parametrize("size", ((64, 96), (75, 101), (33, 130)))
def test_every_size_gives_maps_of_all_strides_rounded_up(narrow, size):
    maps = narrow().eval()(torch.randn(1, 3, *size))
    for level, (x, channels) in enumerate(zip(maps, narrow().channels, strict=True)):
        assert x.shape[:2] == (1, channels)
        for n, pixels in zip(x.shape[2:], size):
            exact = pixels / 4 / 2 ** level
            assert math.ceil(exact) <= n <= math.ceil(exact) + 4 / 2 ** level


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


def test_drop_path_leaves_complete_branches_out_in_training_only(narrow):
    model, images = narrow(drop_path=0.9), torch.randn(1, 3, 64, 64)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)

    def draws():
        return [model(images)[-1].sum().item() for _ in range(4)]

    assert len(set(draws())) > 1
    model.eval()
    assert len(set(draws())) == 1


def test_drop_rates_rise_evenly_over_the_blocks_of_all_stages():
    rates = drop_rates(0.3, (1, 2, 1))
    assert [len(stage) for stage in rates] == [1, 2, 1]
    assert sum(rates, []) == pytest.approx([0, 0.1, 0.2, 0.3])


def test_drop_path_keeps_the_mean():
    layer, x = DropPath(0.25), torch.ones(10_000, 2, 3)
    y = layer(x)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (y == y[:, :1, :1]).all() and abs(y.mean() - 1) < 0.03


def test_recomputed_blocks_give_the_same_bytes(narrow):
    """--recompute wraps every block of the transformers, and drops the same paths both times."""
    stored = nn.ModuleDict({"backbone": narrow(drop_path=0.5)})
    again = copy.deepcopy(stored)
    compile_or_recompute(again, SimpleNamespace(compile=False, recompute=True, model="test"))
    blocks = [m for m in again.modules() if isinstance(m, (SwinBlock, ViTBlock, FocalBlock))]
    assert blocks and all("checkpoint" in repr(m.forward) for m in blocks)
    gradients = []
    for model in (stored, again):
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


# ---- in the detectors

SMALL_SWIN = (8, (1, 2, 1, 1), (1, 1, 2, 2), 3)
TINY = {"swin_t": SMALL_SWIN, "swin_s": SMALL_SWIN,
        "swin_b": (8, (1, 1, 1, 1), (1, 1, 2, 2), 4),
        "swin_l": (16, (1, 2, 1, 1), (1, 2, 2, 4), 4),
        "swin_l_window7": (16, (1, 2, 1, 1), (1, 2, 2, 4), 3),
        "vit_l": (32, 4, 2, 3, 2),
        "focalnet_l_3level": (8, (1, 1, 1, 1), 3, 5, False),
        "focalnet_l_4level": (8, (1, 1, 1, 1), 4, 3, True),
        "focalnet_l_4level_sum": (8, (1, 1, 1, 1), 4, 3, False)}
WITH_TRANSFORMERS = [(paper.__name__, variant) for paper in (dino, h_detr, co_detr)
                     for variant, values in paper.VARIANTS.items() if "backbone" in values]


@pytest.fixture
def tiny(monkeypatch):
    """The published backbones by their names, a few channels wide."""
    for table in (SWINS, VITS, FOCALNETS):
        for name in table.keys() & TINY.keys():
            monkeypatch.setitem(table, name, TINY[name])


def tiny_detector(model_name, variant, **changes):
    """The variant with small everything -> Config, model, criterion."""
    torch.manual_seed(0)
    paper = {"dino": dino, "h_detr": h_detr, "co_detr": co_detr}[model_name]
    sizes = dict(dim=256 if "vit" in variant else 32, ffn_dim=16, encoder_layers=1,
                 decoder_layers=2, num_queries=7)
    small = {name: value for name, value in paper.SMALL.items()
             if name.startswith(("roi_samples", "roi_dim", "rpn_", "num_queries_one2many"))}
    fixed = {"num_heads": 2, "backbone_weights": "none"}
    cfg, _ = configure(paper, small, paper.VARIANTS[variant], sizes, fixed, changes)
    return (cfg, *paper.build(cfg, 5))


def two_images():
    """A batch of two sizes, four objects in the first image and one in the second."""
    images, padding = torch.randn(2, 3, 80, 104), torch.zeros(2, 80, 104, dtype=torch.bool)
    padding[1, 60:], padding[1, :, 72:] = True, True
    images = images.masked_fill(padding[:, None], 0)
    boxes = torch.rand(5, 4) * 0.3 + 0.3
    return images, padding, [{"labels": torch.tensor([0, 1, 2, 4]), "boxes": boxes[:4]},
                             {"labels": torch.tensor([3]), "boxes": boxes[4:]}]


# 14 seconds, and like vit_l but for more classes
LONG = ("co_detr", "lsj_vit_l_lvis")


@pytest.mark.parametrize("model_name, variant", [
    pytest.param(*pair, marks=pytest.mark.slow if pair == LONG else ())
    for pair in WITH_TRANSFORMERS])
def test_gradients_reach_every_parameter_of_every_published_pair(tiny, model_name, variant):
    """A map has a norm if and only if the variant reads it: every weight of the backbone learns."""
    _, model, criterion = tiny_detector(model_name, variant, drop_path=0.0)
    detector = model.detector if model_name == "co_detr" else model
    for p in detector.backbone.parameters():
        nn.init.normal_(p, std=0.3)
    images, padding, targets = two_images()
    sum(criterion(model.train()(images, padding, targets), targets).values()).backward()
    without = [name for name, p in model.named_parameters()
               if "backbone" in name and (p.grad is None or not p.grad.any())]
    assert not without, without


@pytest.mark.parametrize("model_name, variant", [("dino", "swin_l_5scale"), ("h_detr", "swin_t"),
                                                 ("co_detr", "vit_l")])
def test_detections_of_an_image_do_not_depend_on_the_other_one(tiny, model_name, variant):
    _, model, _ = tiny_detector(model_name, variant)
    images, padding, _ = two_images()
    changed = torch.cat((torch.randn(1, 3, 80, 104), images[1:]))
    with torch.no_grad():
        both = model.eval()(images, padding)["pred_boxes"]
        other = model(changed, padding)["pred_boxes"]
    assert (both[0] - other[0]).abs().max() > 1e-4
    assert torch.allclose(both[1], other[1], atol=1e-5)


def test_vit_images_are_padded_to_a_multiple_of_32_and_boxes_stay(tiny):
    """The last cells would be cut off otherwise; what is added is padding, so that a caller who
    pads gets the same boxes."""
    cfg, model, _ = tiny_detector("co_detr", "vit_l")
    images, padding, _ = two_images()
    with torch.no_grad():
        ours = model.eval()(images, padding)
        wider = model(F.pad(images, (0, 24, 0, 16)), F.pad(padding, (0, 24, 0, 16), value=True))
    assert cfg.size_divisor == 32 and ours["memory"].padded_size == (96, 128)
    assert model.strides == [4, 8, 16, 32, 64, 128]
    assert torch.equal(ours["pred_boxes"], wider["pred_boxes"])


def test_layers_of_the_vision_transformer_learn_slower_towards_the_image(tiny):
    """lr x 0.8^(25 - id): id 0 for patches and positions, b + 1 for block b of 24, 25 for all the
    rest; here 4 blocks."""
    _, model, _ = tiny_detector("co_detr", "vit_l")
    _, recipe = configure(co_detr, co_detr.VARIANTS["vit_l"])
    groups = co_detr.param_groups(model, recipe)
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(rate) == sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        part = name.removeprefix("detector.backbone.").split(".")
        level = 5
        if part[0] in ("pos_embed", "patch_embed"):
            level = 0
        elif part[0] == "blocks":
            level = int(part[1]) + 1
        decay = 0.01 if p.dim() > 1 else 0.0
        assert rate[id(p)] == (pytest.approx(5e-5 * 0.8 ** (5 - level)), decay), name
    with pytest.raises(ValueError, match="layer_decay with a ViT"):
        co_detr.param_groups(tiny_detector("co_detr", "swin_l")[1], recipe)


def test_a_vit_without_its_width_is_refused(tiny):
    with pytest.raises(ValueError, match="expected dim 256 and 5 feature levels.*got dim 32"):
        tiny_detector("co_detr", "vit_l", dim=32)


def test_a_detector_on_swin_trains_and_is_evaluated(tiny, tmp_path, capsys):
    flags = ("--model dino --preset small --backbone swin_t --drop_path 0.1 --num_train 8 "
             "--num_val 4 --batch_size 4 --epochs 1 --ema 0 --device cpu --workers 0 --threads 1 "
             "--recompute --dim 32 --ffn_dim 32 --num_queries 9 --train_sizes 64 --eval_size 64")
    run, cfg, recipe = train.parse([*flags.split(), "--out", str(tmp_path)])
    record = train.train(run, cfg, recipe)
    assert record["step"] == 2 and 0 <= record["AP"] <= 1
    assert "backbone swin_t: random weights" in capsys.readouterr().out


def test_an_unknown_backbone_is_refused_with_the_choices(tmp_path):
    choices = "unknown backbone 'swin_xl': choose one of resnet18.*swin_l.*vit_l.*focalnet"
    with pytest.raises(SystemExit, match=choices):
        train.main(["--backbone", "swin_xl", "--num_train", "8", "--num_val", "4",
                    "--out", str(tmp_path)])
