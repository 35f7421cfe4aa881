"""Paper files by name, checkpoints as models."""

import dataclasses
import importlib

import pytest
import torch

from engine import checkpoints
from engine import models
import train
from small_runs import cheap_runs, coco_folder, config, level_embed, MODELS, run  # noqa: F401


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


@pytest.mark.parametrize("name", ("detr", "os", "train", "../dino"))
def test_an_unknown_model_lists_the_files_that_qualify(name):
    with pytest.raises(ValueError, match="deformable_detr, dino"):
        train.parse(["--model", name])
