"""Paper files by name, checkpoints as models."""

import sys

import dataclasses
import importlib
from types import SimpleNamespace

import pytest
import torch

from engine import checkpoints
from engine import models
import train
from engine.errors import UserError
from small_runs import (
    cheap_runs,
    coco_folder,
    config,
    FLAGS,
    level_embed,
    MODELS,
    run,
)  # noqa: F401


def test_checkpoint_carries_names(tmp_path):
    folder = coco_folder(tmp_path / "data", names=("cat", "dog"), ids=(7, 3))
    train.train(run(tmp_path, data=folder), *config("deformable_detr", epochs=1, batch_size=2))
    model, _, cfg, _, meta, _ = models.load_model(tmp_path / "run" / "best.pt")
    assert meta["class_names"] == ["dog", "cat"] and meta["category_ids"] == [3, 7]
    assert meta["model_name"] == "deformable_detr" and cfg.dim == 32 and not model.training


@pytest.mark.parametrize("model", MODELS)
def test_init_from_other_classes(tmp_path, capsys, model):
    """Eight shapes -> two classes, one of them known: everything but class rows is taken over, the
    known row too."""
    cfg, recipe = config(model, epochs=1, batch_size=2, ema=0.0)
    train.train(run(tmp_path, model, "first"), cfg, dataclasses.replace(recipe, batch_size=4))
    folder = coco_folder(tmp_path / "data", names=("ring", "cat"), ids=(1, 2))
    weights = checkpoints.load(tmp_path / "first" / "best.pt")
    paper = importlib.import_module(model)
    fresh, _ = paper.build(cfg, 2)
    lines = models.start_weights(
        run(tmp_path, model, init=str(tmp_path / "first" / "best.pt")), cfg, fresh, ["ring", "cat"]
    )
    state = fresh.state_dict()
    assert torch.equal(level_embed(state), level_embed(weights["model"]))
    ring = weights["class_names"].index("ring")
    head = next(key for key in state if key.endswith("class_embed.0.weight"))
    assert torch.equal(state[head][0], weights["model"][head][ring]) and len(state[head]) == 2
    assert any("1 of 2 classes" in line for line in lines)
    train.train(
        run(tmp_path, model, "second", data=folder, init=str(tmp_path / "first" / "best.pt")),
        cfg,
        recipe,
    )
    assert "1 of 2 classes" in capsys.readouterr().out


@pytest.mark.parametrize("name", ("detr.py", "os", "train", "../dino"))
def test_an_unknown_model_lists_the_files_that_qualify(name):
    with pytest.raises(ValueError, match="deformable_detr, detr, dino"):
        train.parse(["--model", name])


@pytest.mark.parametrize("name", ("payload", "runs.shared.payload", "this", "DINO", "os", ""))
def test_a_checkpoint_can_name_only_model_files_beside_train(tmp_path, monkeypatch, name):
    """Importing a module runs it, so a file from elsewhere must not choose one."""
    (tmp_path / "payload.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
        "class Config: pass\nRECIPE = None\ndef build(): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    state = {"config": {}, "model": {}, "class_names": [], "category_ids": [], "model_name": name}
    checkpoints.save(tmp_path / "a.pt", state)
    known = set(sys.modules)
    with pytest.raises(UserError, match="expected a model among co_detr, "):
        models.load_model(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists() and not {"this", "payload"} & (set(sys.modules) - known)


def small_checkpoint(path, **changes):
    """A deformable DETR of two classes with random weights, as a run saves it."""
    cfg, recipe = config("deformable_detr")
    model, _ = importlib.import_module("deformable_detr").build(cfg, 2)
    state = {
        "format": 2, "model_name": "deformable_detr", "config": dataclasses.asdict(cfg),
        "recipe": dataclasses.asdict(recipe), "model": model.state_dict(),
        "class_names": ["a", "b"], "category_ids": [1, 2], "step": 1,
        "run": dataclasses.asdict(train.Run()),
    }  # fmt: skip
    checkpoints.save(path, state | changes)
    return state


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    path = tmp_path / "a.pt"
    state = small_checkpoint(path)
    assert models.load_model(path).meta["step"] == 1
    for value in (float("nan"), float("inf")):
        state["model"]["level_embed"][0, 0] = value
        checkpoints.save(path, state)
        with pytest.raises(UserError, match="finite weights, got NaN or infinity in level_embed"):
            models.load_model(path)
        with pytest.raises(SystemExit, match="^train.py: error: .*NaN or infinity in level_embed"):
            train.main(
                [
                    *FLAGS,
                    "--init",
                    str(path),
                    "--model=deformable_detr",
                    "--out=" + str(tmp_path / "run"),
                ]
            )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"config": None}, "with config, a dict, got NoneType"),
        ({"class_names": "cats"}, "with class_names, a list, got str"),
        ({"recipe": {"wings": 2}}, "wings"),
        ({"recipe": {"eval_size": 10**6}}, "--eval_size from 1 to 10000, got 1000000"),
        ({"config": {"encoder_layers": 10**9}}, "--encoder_layers from 0 to 100"),
        ({"config": {"dim": "wide"}}, "--dim to be of type int"),
        ({"model": {}}, "that do not fit"),
        ({"model": {"level_embed": 3}}, "that do not fit"),
    ],
)
def test_checkpoints_with_missing_foreign_or_wrong_fields_are_refused_in_one_line(
    tmp_path, changes, words
):
    small_checkpoint(tmp_path / "a.pt", **changes)
    with pytest.raises(UserError, match=words) as refused:
        models.load_model(tmp_path / "a.pt")
    assert "\n" not in str(refused.value)


def test_a_mask_network_that_names_itself_as_its_detector_is_refused(tmp_path):
    path = tmp_path / "masks.pt"
    checkpoints.save(path, {"model_name": "mask_frozen_detr", "config": {}, "model": {},
                            "class_names": ["cat"], "category_ids": [1],
                            "run": {"detector": str(path)}})
    with pytest.raises(UserError, match="expected a detector, got .*masks.pt, a mask network"):
        models.load_model(path)


def test_checkpoints_of_format_one_still_load(tmp_path):
    """One flat config for architecture and recipe, and Co-DETR's base was called detector."""
    cfg, recipe = config("co_detr", base="h_detr", aux_heads="none")
    model, _ = importlib.import_module("co_detr").build(cfg, 2)
    flat = {**dataclasses.asdict(cfg), **dataclasses.asdict(recipe)}
    flat["detector"] = flat.pop("base")
    state = {
        "format": 1, "model_name": "co_detr", "config": flat, "model": model.state_dict(),
        "class_names": ["a", "b"], "category_ids": [1, 2], "step": 1,
        "run": dataclasses.asdict(train.Run()),
    }  # fmt: skip
    checkpoints.save(tmp_path / "old.pt", state)
    loaded = models.load_model(tmp_path / "old.pt")
    assert (loaded.cfg, loaded.recipe) == (cfg, recipe)
    mask_network = {"format": 1, "config": {"detector": "runs/dino/best.pt"}, "run": {}}
    assert checkpoints.saved_detector(mask_network) == "runs/dino/best.pt"
    paper = importlib.import_module("mask_frozen_detr")
    assert checkpoints.settings(paper, mask_network)[0] == paper.Config()


def test_a_checkpoint_of_a_model_that_no_memory_holds_is_refused_by_its_shapes(tmp_path):
    """The settings ask for 5 TB; nothing of it is made before the tensors are compared."""
    cfg, _ = config("deformable_detr")
    large = {"dim": 8192, "ffn_dim": 65536, "encoder_layers": 100, "decoder_layers": 100}
    small_checkpoint(tmp_path / "a.pt", config={**dataclasses.asdict(cfg), **large})
    with pytest.raises(UserError, match="expected the tensors of this model, got .* do not fit"):
        models.load_model(tmp_path / "a.pt")


@pytest.mark.parametrize("changes, words", [
    ({"class_names": ["a", None]}, "an entry of class_names of type str, got None"),
    ({"class_names": ["a"]}, "as many category_ids as class_names"),
    ({"category_ids": [1, "2"]}, "an entry of category_ids of type int"),
    ({"recipe": 3}, "recipe of type dict"), ({"run": "x"}, "run of type dict"),
    ({"run": {"num_val": 10**9}}, "--num_val from 1 to"), ({"format": "2"}, "format of type int"),
    ({"run": {"seed": torch.zeros(3)}}, "--seed to be of type int"),
    ({"thresholds": {"a": "high"}}, "a number as a, got high"), ({"ema": []}, "ema of type dict")])
def test_values_of_another_type_in_a_checkpoint_are_named(tmp_path, changes, words):
    small_checkpoint(tmp_path / "a.pt", **changes)
    with pytest.raises(UserError, match=words):
        models.load_model(tmp_path / "a.pt")


@pytest.mark.parametrize("tensor", [
    torch.zeros(()).expand(10**6, 10**6), torch.zeros(3, device="meta"),
    torch.sparse_coo_tensor(size=(4, 4), check_invariants=True)], ids=["view", "meta", "sparse"])
def test_tensors_without_numbers_of_their_own_are_refused(tmp_path, tensor):
    """A view of one number with a shape of terabytes is a few bytes in a file."""
    state = small_checkpoint(tmp_path / "a.pt")
    weights = {**state["model"], next(iter(state["model"])): tensor}
    small_checkpoint(tmp_path / "a.pt", model=weights)
    with pytest.raises(UserError, match="expected tensors with all their numbers"):
        models.load_model(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", (torch.complex64, torch.int64, torch.bool))
def test_weights_that_are_no_real_numbers_are_refused(tmp_path, kind):
    """PyTorch would convert them without a word."""
    path = tmp_path / "a.pt"
    small_checkpoint(path)
    state = checkpoints.load(path)
    state["model"]["level_embed"] = state["model"]["level_embed"].to(kind)
    checkpoints.save(path, state)
    with pytest.raises(UserError, match=f"level_embed {kind} instead of torch.float32"):
        models.load_model(path)


def test_a_detector_for_a_model_that_needs_none_is_refused():
    """It would be left unused."""
    with pytest.raises(UserError, match="expected no --detector with --model deformable_detr"):
        models.build_model(importlib.import_module("deformable_detr"), None, 2, "best.pt")


def test_a_start_from_weights_that_are_no_tensors_is_refused(tmp_path):
    state = small_checkpoint(tmp_path / "a.pt")
    small_checkpoint(tmp_path / "a.pt", model={**state["model"], "level_embed": "x"})
    net = importlib.import_module("deformable_detr").build(config("deformable_detr")[0], 2)[0]
    with pytest.raises(UserError, match="expected tensors by name, got str as level_embed"):
        models.start_weights(train.Run(init=str(tmp_path / "a.pt")), None, net, ["a", "b"])


def test_a_backbone_of_ones_own_keeps_its_weights_and_the_report_says_so():
    cfg = SimpleNamespace(backbone="resnet50", backbone_weights="imagenet")
    note = models.backbone_start(torch.nn.Conv2d(3, 4, 1), cfg)
    assert note == "backbone: Conv2d with the weights that `build` gave it"
