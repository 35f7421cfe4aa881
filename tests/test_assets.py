"""Weights known by name: small files in half precision, found by name, started from by default."""
import dataclasses
import importlib
import json

import pytest
import torch

import eval as evaluation
import scenes
import train
from engine import assets, checkpoints, models, weight_files
from engine.commands import open_detector, results_folder
from engine.errors import UserError
from engine.machine import Machine
from engine.recipe import configure
from small_runs import coco_folder
from tiny_checkpoint import SIZES, write_checkpoint
from tools import ship


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An assets/weights of the test's own."""
    place = tmp_path / "weights"
    place.mkdir()
    monkeypatch.setattr(assets, "FOLDER", place)
    return place


@pytest.fixture
def tiny(folder):
    """tiny.safetensors in that folder, and the checkpoint it was made from."""
    checkpoint = write_checkpoint(folder.parent / "best.pt")
    state = checkpoints.load(checkpoint)
    state["thresholds"] = {scenes.SCENE_CLASSES[0]: 0.4}
    checkpoints.save(checkpoint, state)
    ship.ship(checkpoint, folder / "tiny.safetensors")
    return checkpoint


# ---- the file ------------------------------------------------------------------------------------

def test_a_shipped_file_is_the_checkpoint_in_half_precision(folder, tiny):
    before = models.load_model(tiny)
    after = open_detector("tiny")
    assert after.cfg == before.cfg and after.recipe == before.recipe
    for key in ("class_names", "category_ids", "thresholds", "step"):
        assert after.meta[key] == before.meta[key]
    rounded = after.model.state_dict()
    for name, value in before.model.state_dict().items():
        assert rounded[name].dtype == value.dtype
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(rounded[name], expected), name
    assert (folder / "tiny.safetensors").stat().st_size < 0.55 * tiny.stat().st_size


def test_the_averaged_weights_are_shipped_where_there_are_any(folder, tiny):
    state = checkpoints.load(tiny)
    state["ema"] = {name: value + 1 if value.is_floating_point() else value
                    for name, value in state["model"].items()}
    checkpoints.save(tiny, state)
    ship.ship(tiny, folder / "averaged.safetensors")
    stored = weight_files.read(folder / "averaged.safetensors")["model"]
    assert torch.equal(stored["level_embed"], state["ema"]["level_embed"].half().float())


def test_a_changed_tensor_or_header_is_noticed(folder, tiny):
    path = folder / "tiny.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)
    with pytest.raises(UserError, match="expected tensors with the hash .* the file is damaged"):
        open_detector("tiny")
    path.write_bytes(content[:1000])
    with pytest.raises(UserError, match="broken or cut short"):
        open_detector("tiny")
    weights = {"a": torch.zeros(2)}
    weight_files.write(path, {"model_name": "dino", "config": {}}, weights)
    with pytest.raises(UserError, match="expected a checkpoint with class_names"):
        open_detector("tiny")


def test_weights_beyond_half_precision_are_refused(tmp_path):
    with pytest.raises(UserError, match="largest number of half precision, got 70000 in a"):
        weight_files.write(tmp_path / "a.safetensors", {}, {"a": torch.tensor([7e4])})
    assert not list(tmp_path.iterdir())


def test_a_shipped_file_names_no_folder_of_the_machine_it_was_made_on(folder, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "best.pt", data="/home/me/photos", out="/home/me/runs")
    ship.ship(checkpoint, folder / "mine.safetensors")
    assert b"/home/me" not in (folder / "mine.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="got none of data: give --data DIR"):
        evaluation.main(["--checkpoint", "mine", "--out", str(tmp_path / "out")])


def test_masks_name_their_detector_and_are_refused_on_one_that_is_not_shipped(folder, tiny):
    state = checkpoints.load(tiny)
    state["run"]["detector"] = "runs/dino/best.pt"
    assert "ship the detector first" in str(pytest.raises(UserError, ship.described_run,
                                                          state).value)
    for text in ("tiny", str(folder / "tiny.safetensors")):
        state["run"]["detector"] = text
        assert ship.described_run(state)["detector"] == "tiny"


def test_masks_that_trained_their_detector_are_shipped_with_it(tiny):
    state = checkpoints.load(tiny)
    state["run"]["detector"] = "runs/dino/best.pt"
    state["detector"] = {name: state[name] for name in ("model_name", "config", "recipe",
                                                        "class_names")}
    assert "detector" not in ship.described_run(state) and "detector" in ship.FIELDS


def test_lists_of_the_settings_are_tuples_again(tmp_path):
    path = tmp_path / "a.safetensors"
    fields = {"config": {"a": (1, 2)}, "detector": {"recipe": {"b": (3,)}}, "class_names": ["c"]}
    weight_files.write(path, fields, {"w": torch.zeros(1)})
    found = weight_files.read(path)
    assert found["config"] == {"a": (1, 2)} and found["detector"]["recipe"] == {"b": (3,)}
    assert found["class_names"] == ["c"]


def test_masks_are_loaded_by_name_with_their_detector(folder, tiny, tmp_path):
    paper = importlib.import_module("mask_frozen_detr")
    cfg, recipe = configure(paper, paper.SMALL, {"train_sizes": (64,), "eval_size": 64})
    network, _ = paper.build(cfg, len(scenes.SCENE_CLASSES), models.load_detector("tiny"))
    checkpoint = tmp_path / "masks.pt"
    state = checkpoints.load(tiny)
    state |= {"model_name": "mask_frozen_detr", "config": dataclasses.asdict(cfg),
              "recipe": dataclasses.asdict(recipe), "model": network.state_dict(),
              "run": {"data": "", "detector": "tiny"}}
    checkpoints.save(checkpoint, state)
    ship.ship(checkpoint, folder / "masks.safetensors")
    assert open_detector("masks").meta["run"]["detector"] == "tiny"


def test_released_weights_are_not_shipped(tmp_path):
    checkpoints.save(tmp_path / "theirs.pt", {"model": {"a": torch.zeros(1)}})
    with pytest.raises(UserError, match="got released weights"):
        ship.ship(tmp_path / "theirs.pt", tmp_path / "out.safetensors")


# ---- names ---------------------------------------------------------------------------------------

def test_an_unknown_name_lists_the_names_that_exist(tiny):
    with pytest.raises(UserError, match=r"name of assets/weights \(tiny\), got 'big'"):
        open_detector("big")


def test_a_file_of_the_same_name_comes_first(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    with pytest.raises(UserError, match="a run folder with best.pt"):
        open_detector("tiny")


def test_results_of_a_name_go_to_a_folder_of_runs(tmp_path):
    assert str(results_folder("tiny")) == "runs/tiny"
    assert str(results_folder("https://host/a/dino.pth#sha256=" + "0" * 64)) == "runs/dino"
    assert str(results_folder("runs/dino/best.pt")) == "runs/dino"
    assert results_folder(str(tmp_path)) == tmp_path


def test_evaluating_by_name_scores_the_generated_scenes(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    evaluation.main(["--checkpoint", "tiny", "--workers", "0"])
    assert json.loads((tmp_path / "runs/tiny/eval.json").read_text())["images"] == 6
    assert "tiny" in capsys.readouterr().out


# ---- where training starts -----------------------------------------------------------------------

def notes_of(data, **flags):
    """What a run reports about its initial weights."""
    run = train.Run(**{"model": "dino", "data": data, "preset": "small", "device": "cpu"} | flags)
    paper = importlib.import_module("dino")
    changes = {"num_queries": 20} if flags.pop("more_queries", False) else {}
    cfg, _ = configure(paper, paper.SMALL, SIZES, changes)
    _, _, notes = models.make_model(run, paper, cfg, ["cat", "circle"], Machine())
    return "\n".join(notes)


def test_the_small_preset_starts_from_weights_of_the_same_model_and_says_so(tiny, tmp_path):
    photos = coco_folder(tmp_path / "photos")
    assert notes_of(photos).startswith("started from tiny (weights of the same model come with")
    assert "class rows:" in notes_of(photos)


@pytest.mark.parametrize("flags", [{"preset": "paper"}, {"overfit": 2}, {"init": "none"},
                                   {"data": ""}, {"model": "h_detr"}], ids=str)
def test_other_runs_start_from_scratch(flags, tiny, tmp_path):
    assert "started from" not in notes_of(**{"data": coco_folder(tmp_path / "photos")} | flags)


def test_a_model_of_other_shapes_starts_from_scratch(tiny):
    paper = importlib.import_module("dino")
    run = train.Run(data="photos", preset="small")
    for changes, name in (({}, "tiny"), ({"num_queries": 20}, "tiny"), ({"dim": 96}, ""),
                          ({"decoder_layers": 3}, ""), ({"num_heads": 4, "num_points": 2}, "")):
        cfg, _ = configure(paper, paper.SMALL, SIZES, changes)
        model, _ = paper.build(cfg, 3)
        assert assets.start_for(run, cfg, model) == name, changes


def test_a_detr_whose_last_stage_has_another_stride_starts_from_scratch():
    paper = importlib.import_module("detr")
    run = train.Run(model="detr", data="photos", preset="small")
    for dilation, name in ((True, "detr_small"), (False, "")):
        cfg, _ = configure(paper, paper.SMALL, {"dilation": dilation})
        model, _ = paper.build(cfg, 3)
        assert assets.start_for(run, cfg, model) == name


def test_the_command_line_accepts_none_and_names(tiny):
    run, _, _ = train.parse(["--model", "dino", "--init", "none"])
    assert run.init == "none"
