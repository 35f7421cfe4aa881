"""Released weights from the file to the figure.

Photos as the authors' evaluation sees them, classes by name, settings.
"""
import argparse
import importlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from engine.recipe import configure
from engine import checkpoints
from engine import class_rows
from engine import models, released
from engine import authors_names
import data
import deformable_detr
import eval as evaluation
from engine import inference
from engine.errors import UserError
import hashed
import train
from deformable_detr import sine_positions


def float32_positions(padding, dim, temperature=10000.0, shift=0.5, dtype=None):
    return sine_positions(padding, dim, temperature, shift).to(dtype)


SLOW_PHOTOS = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
PHOTOS = [(0, 2), *(pytest.param(job, photo, marks=pytest.mark.slow) for job, photo in SLOW_PHOTOS)]


@pytest.mark.parametrize("job, photo", PHOTOS)
def test_a_photo_on_disk_becomes_the_authors_detections(
        golden, recipe, shared, tmp_path, monkeypatch, job, photo):
    """Their file and weights, our reader, resize, normalization, model and selection.

    In double precision: neighboring proposals differ by less than single precision resolves. Only
    the sine positions are those of single precision, as in the recording.
    """
    monkeypatch.setattr(deformable_detr, "sine_positions", float32_positions)
    rec = golden("12_photos")
    made = json.loads(str(rec["meta_json"]))[job]
    shapes = [json.loads(str(shape)) for shape in rec[f"j{job}.key_shapes"]]
    keys = zip(rec[f"j{job}.key_names"].tolist(), shapes)
    weights = recipe.state_dict(keys, made["seed"], made["tied_heads"])
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    torch.save({"model": tensors}, tmp_path / "released.pth")
    model, _, cfg, recipe, meta, _ = models.load_model(tmp_path / "released.pth")
    assert meta["model_name"] == made["variant"]
    folder, name = made["files"][photo].split("/")
    dataset = data.CocoFolder(shared / "data" / "coco_mini", folder.removesuffix("2017"),
                              data.eval_transform(recipe))
    index = dataset.files.tolist().index(name)
    expected = {key.split(".", 1)[1]: value for key, value in rec.items()
                if key.startswith(f"j{job}i{photo}.")}

    image, target = dataset[index]                                                 # (3, h, w)
    assert image.shape == tuple(expected["input_shape"])
    assert target["orig_size"].tolist() == expected["orig_hw"].tolist()
    np.testing.assert_allclose(image.mean((1, 2)), expected["input_mean"], atol=1e-6)
    grid = image[:, ::image.shape[1] // 7, ::image.shape[2] // 9]
    np.testing.assert_allclose(grid, expected["input_grid"], atol=1e-6)

    model.double().register_forward_pre_hook(lambda _, inputs: (inputs[0].double(), *inputs[1:]))
    (outputs, (target,)), = inference.predict(model, dataset, [index], "cpu")
    found, = deformable_detr.detect(outputs, target["orig_size"][None], cfg)
    assert len(found["scores"]) == len(expected["scores"])
    np.testing.assert_allclose(found["scores"], expected["scores"], rtol=0, atol=1e-5)
    assert found["labels"].tolist() == expected["labels"].tolist()
    np.testing.assert_allclose(found["boxes"], expected["boxes"], rtol=0, atol=0.01)


# ---- small models in the authors' layout

SMALL = dict(dim=32, ffn_dim=16, encoder_layers=1, decoder_layers=2, num_queries=5)


def released_file(path, family, **options):
    """A narrow transformer on ResNet-50, saved as the authors save theirs.

    Its weights for 91 classes are hashed.
    """
    layout = authors_names.FAMILIES[family]
    paper = importlib.import_module(layout.model_name)
    cfg = replace(paper.Config(), num_heads=options.get("nheads", 8), **SMALL, **layout.overrides)
    with torch.device("meta"):
        model, _ = paper.build(cfg, 91)
    names = authors_names.to_authors(model.state_dict(), family)
    weights = {name: hashed.weight(name, x.shape, 5, layout.tied) for name, x in names.items()}
    torch.save({"model": weights, "args": argparse.Namespace(**options), "epoch": 11}, path)
    return authors_names.from_authors(weights, family)


def test_eval_takes_a_released_file_with_the_settings_of_its_authors(tmp_path, capsys):
    """No flag but the file and the data.

    The 91 columns become the 80 in use, and the settings are printed.
    """
    released_file(tmp_path / "released.pth", "dino", num_select=250, dilation=False)
    (tmp_path / "coco/annotations").mkdir(parents=True)
    (tmp_path / "coco/val2017").mkdir()
    Image.new("RGB", (600, 12), "grey").save(tmp_path / "coco/val2017/1.png")
    categories = [{"id": i, "name": name}
                  for i, name in zip(class_rows.COCO_IDS, class_rows.COCO_NAMES)]
    annotation = {"id": 1, "image_id": 1, "category_id": 18, "bbox": [5, 2, 90, 8], "area": 720,
                  "iscrowd": 0}
    (tmp_path / "coco/annotations/instances_val2017.json").write_text(json.dumps({
        "images": [{"id": 1, "file_name": "1.png", "width": 600, "height": 12}],
        "categories": categories, "annotations": [annotation]}))
    evaluation.main(["--checkpoint", str(tmp_path / "released.pth"),
                     "--data", str(tmp_path / "coco"), "--device", "cpu"])
    said = capsys.readouterr().out
    for part in ("recognized as released dino", "keeping the 80 class columns",
                 "short side 800 px but long side at most 1333 px",
                 "at most 250 detections of an image"):
        assert part in said
    assert json.loads((tmp_path / "eval.json").read_text())["images"] == 1


def test_settings_are_those_of_the_family():
    co = importlib.import_module("co_detr")
    said = evaluation.settings(*configure(co))
    assert "short side 800" in said
    assert "at most 300 detections" in said
    assert "soft-NMS from IoU 0.8" in said
    assert "NMS" not in evaluation.settings(*configure(co, co.VARIANTS["co_deformable"]))
    said = evaluation.settings(*configure(co, co.VARIANTS["vit_l"]))
    assert "short side 1280 px but long side at most 2048 px" in said
    assert "multiple of 32" in said
    assert "at most 1000 detections" in said
    assert "at most 100 detections" in evaluation.settings(*configure(deformable_detr))


def test_options_beside_the_weights_tell_what_no_shape_shows(tmp_path):
    released_file(tmp_path / "a.pth", "deformable_detr_two_stage", num_queries=7, nheads=4,
                  dilation=True, lr=2e-4)
    _, _, cfg, recipe, *_ = models.load_model(tmp_path / "a.pth")
    assert (cfg.num_queries, cfg.num_heads, cfg.dilation) == (7, 4, True)
    assert recipe == deformable_detr.RECIPE
    released_file(tmp_path / "b.pth", "deformable_detr", num_queries=5)
    _, _, cfg, *_ = models.load_model(tmp_path / "b.pth", variant="dc5")
    assert cfg.dilation
    assert cfg.num_feature_levels == 4   # what shapes show stays
    message = "expected --variant to be one of single_scale, dc5, refine, two_stage, got 'dc6'"
    with pytest.raises(ValueError, match=message):
        models.load_model(tmp_path / "b.pth", variant="dc6")


def arguments(tmp_path, model, *more):
    small = []
    for name, value in SMALL.items():
        small += [f"--{name}", str(value)]
    return ["--model", model, "--init", str(tmp_path / "released.pth"), "--preset", "small",
            "--backbone", "resnet50", "--backbone_weights", "imagenet",
            "--num_feature_levels", "4", "--num_heads", "8", "--ema", "0", *small, *more]


def started(tmp_path, model, class_names, *more):
    """What `train.py --init` starts from, and its report."""
    run, cfg, _ = train.parse(arguments(tmp_path, model, *more))
    fresh, _ = importlib.import_module(model).build(cfg, len(class_names))
    report = models.start_weights(run, cfg, fresh, class_names)
    return fresh.state_dict(), "\n".join(report)


def check_rows(ours, theirs):
    """The 80 classes of COCO in the rows of their names, everything else as it was."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        expected = theirs[name]
        if name.startswith(("class_embed", "enc_out_class_embed", "label_enc")):
            expected = expected[class_rows.COCO_IDS + [91] * name.startswith("label_enc")]
        assert torch.equal(value, expected), name


def test_training_starts_from_the_rows_of_the_80_classes(tmp_path):
    theirs = released_file(tmp_path / "released.pth", "dino")
    ours, report = started(tmp_path, "dino", class_rows.COCO_NAMES)
    check_rows(ours, theirs)
    assert "80 of 80 classes found by name" in report


def test_training_on_other_classes_keeps_all_but_their_rows(tmp_path):
    theirs = released_file(tmp_path / "released.pth", "deformable_detr_two_stage")
    ours, report = started(tmp_path, "deformable_detr", ["platelet", "dog"],
                           "--with_box_refine", "true", "--two_stage", "true")
    assert "1 of 2 classes found by name" in report
    for name, value in ours.items():
        if not name.startswith("class_embed"):
            assert torch.equal(value, theirs[name]), name
    dog, objectness = 18, "class_embed.2.weight"
    assert torch.equal(ours["class_embed.0.weight"][1], theirs["class_embed.0.weight"][dog])
    assert torch.equal(ours[objectness][0], theirs[objectness][0])
    assert not torch.equal(ours[objectness][1], theirs[objectness][dog])


@pytest.mark.slow
def test_a_training_step_on_photos_from_a_released_file(shared, tmp_path):
    """The whole way, at learning rate 0, so that what it saves is what it started from."""
    theirs = released_file(tmp_path / "released.pth", "dino")
    train.main(arguments(
        tmp_path, "dino", "--data", str(shared / "data" / "coco_mini"),
        "--out", str(tmp_path / "run"), "--overfit", "2", "--batch_size", "2", "--epochs", "1",
        "--lr", "0", "--lr_backbone", "0", "--device", "cpu"))
    check_rows(checkpoints.load(tmp_path / "run" / "last.pt")["model"], theirs)


# ---- files of models that are not built here

# ---- Co-DETR's detectors of large-scale jitter and of LVIS

def co_detr_file(variant, classes):
    """A file of the layout that the authors' code gives a variant, without values."""
    paper = importlib.import_module("co_detr")
    cfg, _ = configure(paper, paper.VARIANTS[variant])
    with torch.device("meta"):
        model, _ = paper.build(cfg, classes)
    state = authors_names.to_authors(model.state_dict(), "co_dino")
    if cfg.backbone == "vit_l_window16":
        for block, window in released.windows_of(cfg.backbone).items():
            for kind in ("cos", "sin"):
                table = torch.empty(window ** 2, 64, device="meta")
                state[f"backbone.blocks.{block}.attn.rope.freqs_{kind}"] = table
    return state


def read_back(state, path, **meta):
    """-> Config, Recipe and class names of a file."""
    made = released.convert({"state_dict": state, "meta": meta}, path)
    return *checkpoints.settings(importlib.import_module("co_detr"), made), made["class_names"]


JITTER = "image_size = (1280, 1280)\nmodel = dict(query_head=dict(with_attn_mask=False))"


@pytest.mark.parametrize("variant, configuration, classes, side, top_k", [
    ("lsj_36_epochs", "co_dino_5scale_lsj_r50_3x_coco", 80, 1024, 300),
    ("lsj_9_encoder_layers_36_epochs", "co_dino_5scale_9encoder_lsj_r50_3x_coco", 80, 1024, 300),
    ("lsj_swin_l_24_epochs", "co_dino_5scale_lsj_swin_large_2x_coco", 80, 1280, 300),
    ("lsj_lvis", "co_dino_5scale_lsj_r50_1x_lvis", 1203, 1024, 300),
    ("lsj_swin_l_lvis", "co_dino_5scale_lsj_swin_large_3x_lvis", 1203, 1280, 300),
    ("lsj_swin_l_o365_lvis", "co_dino_5scale_lsj_swin_large_16e_o365tolvis", 1203, 1536, 1000),
    ("lsj_vit_l_lvis", "co_dino_5scale_lsj_vit_large_lvis", 1203, 1536, 1000)])
def test_a_name_with_large_scale_jitter_gives_the_published_square(tmp_path, variant, configuration,
                                                                  classes, side, top_k):
    state = co_detr_file(variant, classes)
    cfg, recipe, _ = read_back(state, tmp_path / f"{configuration}.pth")
    assert (recipe.augment, recipe.lsj_size, cfg.top_k) == ("lsj", side, top_k)


@pytest.mark.parametrize("variant, layers", [("lsj", 6), ("lsj_9_encoder_layers", 9)])
def test_large_scale_jitter_is_read_from_the_saved_config(tmp_path, variant, layers):
    """The tensors are those of plain Co-DINO; the text, the name or --variant tells."""
    state = co_detr_file(variant, 80)
    path = tmp_path / "a.pth"
    cfg, recipe, _ = read_back(state, path, config=JITTER)
    assert (recipe.augment, recipe.lsj_size, cfg.encoder_layers) == ("lsj", 1280, layers)
    assert (cfg.num_queries, cfg.top_k, cfg.soft_nms) == (900, 300, 0.8)
    cfg, recipe, _ = read_back(state, tmp_path / "co_dino_5scale_lsj_r50_1x_coco.pth")
    assert (recipe.augment, recipe.lsj_size) == ("lsj", 1024)
    _, recipe, _ = read_back(state, path)
    assert recipe.augment == "paper"
    made = released.convert({"state_dict": state}, path, variant)
    _, recipe = checkpoints.settings(importlib.import_module("co_detr"), made)
    assert (recipe.augment, recipe.lsj_size) == ("lsj", 1024)


def test_an_lvis_detector_without_background_loads_with_its_names(tmp_path):
    """Swin-L from Objects365: 1203 sigmoids in the second stage, frequencies of the loss beside."""
    state = co_detr_file("lsj_swin_l_o365_lvis", 1203)
    for head in ("query_head.loss_cls", "bbox_head.0.loss_cls", "roi_head.0.bbox_head.loss_cls"):
        state[f"{head}.fed_loss_weight"] = torch.empty(1203, device="meta")
    names = tuple(f"thing {i}" for i in range(1203))
    text = JITTER.replace("1280", "1536")
    cfg, recipe, found = read_back(state, tmp_path / "a.pth", config=text, CLASSES=names)
    assert (cfg.backbone, cfg.roi_sigmoid, cfg.top_k, cfg.fed_loss) == ("swin_l", True, 1000, 50)
    assert (recipe.augment, recipe.lsj_size) == ("lsj", 1536) and tuple(found) == names
    _, _, found = read_back(state, tmp_path / "a.pth", config=text)
    assert found[1202] == "class 1202"


def test_an_lvis_detector_with_a_cascade_loads_without_its_heads(tmp_path, capsys):
    """ViT-L: windows of 16, and a second stage of several, which the detector does not need."""
    state = co_detr_file("lsj_vit_l_lvis", 1203)
    for key in list(state):
        if key.startswith("roi_head.0.bbox_head."):
            state[key.replace("bbox_head.", "bbox_head.0.")] = state.pop(key)
    state["roi_head.0.mask_head.0.weight"] = torch.empty(3, device="meta")
    cfg, recipe, _ = read_back(state, tmp_path / "a.pth", config=JITTER)
    assert (cfg.backbone, cfg.aux_heads, cfg.num_queries) == ("vit_l_window16", "none", 900)
    assert cfg.top_k == 1000 and recipe.augment == "lsj"
    for key in [key for key in state if ".rope." in key]:
        del state[key]   # then the classes tell
    assert released.recognize(state)[1]["backbone"] == "vit_l_window16"
    assert "its auxiliary heads" in capsys.readouterr().out


def test_a_mask_branch_is_left_out_and_said(tmp_path, capsys):
    state = co_detr_file("lsj", 80)
    state["roi_head.0.mask_head.convs.0.conv.weight"] = torch.empty(3, device="meta")
    cfg, _, _ = read_back(state, tmp_path / "a.pth")
    assert cfg.aux_heads == "atss,rcnn"
    assert "its mask branch (1 tensors) are left out" in capsys.readouterr().out


def vit_l_keys(shared):
    lines = (shared / "golden/co_detr/keys_co_dino_5scale_vit_l.txt").read_text().splitlines()
    rows = [line.split(" ", 1) for line in lines if line and not line.startswith("#")]
    return {name: torch.empty([int(n) for n in re.findall(r"\d+", shape)], device="meta")
            for name, shape in rows}


def test_the_windows_of_a_released_vit_are_compared_with_ours(shared):
    """Co-DETR's LVIS detectors have windows of 16 and every third block global."""
    state = vit_l_keys(shared)
    assert released.recognize(state)[1]["backbone"] == "vit_l"
    for key in list(state):
        if key.endswith(("freqs_cos", "freqs_sin")):
            state[key] = torch.empty(16 * 16, 64, device="meta")
    with pytest.raises(UserError, match="windows of 24 .* got windows of 16 .* not built here"):
        released.recognize(state)
    # The same window size, but other blocks are global.
    state = vit_l_keys(shared)
    for kind in ("cos", "sin"):
        table = state.pop(f"backbone.blocks.2.attn.rope.freqs_{kind}")
        state[f"backbone.blocks.3.attn.rope.freqs_{kind}"] = table
    with pytest.raises(UserError, match="in blocks 0,1,2,4.* got windows of 24 in blocks 0,1,3,4"):
        released.recognize(state)


def transformers_file(folder, config_json=None, **changes):
    """A small Deformable DETR saved by `transformers`, with its config.json (or another one)."""
    transformers = pytest.importorskip("transformers")
    stages = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[256, 512, 1024, 2048], depths=[3, 4, 6, 3],
        out_features=["stage2", "stage3", "stage4"])
    options = dict(use_timm_backbone=False, backbone_config=stages, num_labels=91, d_model=32,
                   encoder_layers=1, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
                   num_queries=5, disable_custom_kernels=True)
    model = transformers.DeformableDetrForObjectDetection(
        transformers.DeformableDetrConfig(**{**options, **changes}))
    path = folder / "model.pt"
    torch.save(model.state_dict(), path)
    if config_json is None:
        config_json = model.config.to_json_string()
    (folder / "config.json").write_text(config_json)
    return path, model


@pytest.mark.parametrize("changes, message", [
    (dict(activation_function="gelu"), "expected activation_function 'relu', got 'gelu'"),
    (dict(position_embedding_type="learned"), "expected position_embedding_type 'sine'"),
    (dict(encoder_n_points=2), "expected encoder_n_points equal to decoder_n_points, got 2 and 4"),
    (dict(decoder_attention_heads=4), "expected encoder_attention_heads equal to decoder"),
    (dict(decoder_ffn_dim=8), "expected encoder_ffn_dim equal to decoder_ffn_dim, got 16 and 8"),
])
def test_transformers_models_that_our_config_cannot_express_are_refused(tmp_path, changes, message):
    path, _ = transformers_file(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        models.load_model(path)


def test_heads_that_no_file_tells_are_refused_by_shape(tmp_path):
    """With four heads and no config.json, the shapes do not fit eight heads."""
    path, _ = transformers_file(tmp_path, encoder_attention_heads=4, decoder_attention_heads=4)
    models.load_model(path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="sampling_offsets.*heads and points.*config.json"):
        models.load_model(path)


def test_dilation_is_read_as_transformers_reads_it(tmp_path):
    """transformers dilates a timm backbone only; ours then does the same, with equal boxes."""
    path, theirs = transformers_file(tmp_path, dilation=True)
    options = json.loads((tmp_path / "config.json").read_text())
    assert options["dilation"] is True and not options["use_timm_backbone"]
    loaded = models.load_model(path)
    assert not loaded.cfg.dilation
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = theirs.eval()(images, torch.ones(1, 64, 96, dtype=torch.int64)).logits
        ours = loaded.model(images, torch.zeros(1, 64, 96, dtype=torch.bool))["pred_logits"]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    options["use_timm_backbone"] = True
    (tmp_path / "config.json").write_text(json.dumps(options))
    assert models.load_model(path).cfg.dilation


@pytest.mark.parametrize("text, message", [("{", "to be a json file"), ("[1]", "got list")])
def test_a_broken_config_json_is_one_line(tmp_path, text, message):
    path, _ = transformers_file(tmp_path, config_json=text)
    with pytest.raises(UserError, match=message):
        models.load_model(path)


@pytest.mark.parametrize("change, words", [
    (lambda state: state["model"].update({"transformer.level_embed": 3}), "got int as"),
    (lambda state: state["model"].update({7: torch.zeros(3)}), "expected tensors by name"),
    (lambda state: state.update(args="x"), "expected args to be a dictionary, got str"),
    (lambda state: state.update(meta=[]), "expected meta to be a dictionary, got list"),
    (lambda state: state["model"].pop("transformer.decoder.layers.0.linear1.weight"), "linear1"),
    (lambda state: setattr(state["args"], "nheads", 10 ** 9), "--num_heads from 1 to 64")])
def test_a_damaged_released_file_is_one_line(tmp_path, change, words):
    path = tmp_path / "a.pth"
    released_file(path, "dino", nheads=8)
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(path)
    change(state)
    torch.save(state, path)
    with pytest.raises(UserError, match=words):
        models.load_model(path)


def test_another_model_of_transformers_is_refused(tmp_path):
    path, _ = transformers_file(tmp_path)
    state = {key.replace("decoder.layers.0.self_attn.q_proj", "decoder.layers.0.self_attn.query"):
             value for key, value in torch.load(path).items()}
    with pytest.raises(UserError, match="other models of transformers are not read"):
        released.convert(state, path)


def test_a_released_file_with_tensors_missing_is_refused(tmp_path):
    released_file(tmp_path / "released.pth", "dino")
    state = torch.load(tmp_path / "released.pth", weights_only=False)
    del state["model"]["transformer.encoder.layers.0.norm1.bias"]
    with pytest.raises(UserError, match="expected encoder.0.norm1.bias .32,., got nothing"):
        released.convert(state, tmp_path / "released.pth")


def test_focalnet_with_four_levels_is_that_of_focalnet_dino_unless_a_variant_says_otherwise(
        tmp_path):
    """The two conventions differ in no name and no shape."""
    paper = importlib.import_module("dino")
    cfg, _ = configure(paper, paper.VARIANTS["focalnet_l_o365"])
    with torch.device("meta"):
        model, _ = paper.build(cfg, 91)
    state = {"model": authors_names.to_authors(model.state_dict(), "dino")}
    found = released.convert(state, tmp_path / "a.pth")["config"]
    assert found["backbone"] == "focalnet_l_4level"
    found = released.convert(state, tmp_path / "a.pth", "focalnet_l_5scale")["config"]
    assert found["backbone"] == "focalnet_l_4level_sum"
