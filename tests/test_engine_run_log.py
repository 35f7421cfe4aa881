"""The opening report, log.jsonl, steps that failed."""

import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine import datasets
from engine import layers
from engine import run_log
from engine.machine import Machine
from engine.recipe import configure
import data
import train
from small_runs import cheap_runs, config, run, same  # noqa: F401


@pytest.mark.parametrize("recompute", (False, True))
def test_the_first_bad_module_is_found_without_a_trace(tmp_path, recompute):
    cfg, recipe = config("dino")
    scenes, _ = datasets.build_datasets(None, recipe, 0, num_train=4, num_val=1)
    model, _ = importlib.import_module("dino").build(cfg, 8)
    layers.compile_or_recompute(model.train(), run(tmp_path, "dino", recompute=recompute))
    micro_batches = [data.collate([scenes[i] for i in places]) for places in ([0, 1], [2, 3])]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    for expected in ("", "decoder.1.linear1"):
        if expected:
            state["decoder.1.linear1.bias"][3] = float("inf")
            model.load_state_dict(state)
        random_state = torch.get_rng_state()
        assert run_log.first_bad_module(model, micro_batches, Machine()) == expected
        assert torch.equal(torch.get_rng_state(), random_state)
        same(model.state_dict(), state)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_report_says_what_is_about_to_happen(tmp_path, capsys):
    """In ten lines, the last as soon as a few steps have shown what they cost."""
    train.train(run(tmp_path), *config("deformable_detr", epochs=1))
    text = capsys.readouterr().out
    words = (
        "config",
        "recipe",
        "device",
        "data",
        "objects",
        "model",
        "training",
        "weights",
        "folder",
        "expected",
    )
    lines = text[: text.index("epoch   1")].splitlines()
    assert [line.split()[0] for line in lines if line.strip()] == list(words)
    for word in (
        "cpu, 1 thread",
        "float32",
        "deformable attention",
        "8 classes",
        "batch 4",
        "1 epoch of 3 steps",
        "tiny",
        " in all without evaluations",
        "GiB",
    ):
        assert word in text, word
    lines = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    assert {"cls", "l1", "giou", "aux0.cls"} <= lines[0]["losses"].keys() and lines[-1][
        "kind"
    ] == "eval"
    assert (
        lines[-1]["train_seconds"] > 0
        and json.loads((tmp_path / "run" / "config.json").read_text())["config"]["dim"] == 32
    )


def test_what_a_run_costs_is_told_when_it_is_warm(tmp_path, monkeypatch, capsys):
    """From steps 11 to 20: 40 images in 4 of the 24 seconds so far."""
    settings, (_, recipe) = run(tmp_path, name="."), config("dino", epochs=12)
    batch = SimpleNamespace(total=4, micro=4, repeats=1, steps_per_epoch=1000)
    progress, optimizer = train.Progress(), torch.optim.SGD([torch.zeros(1)], lr=0.1)
    log = run_log.RunLog(settings, recipe, batch, Machine(), progress)
    clock = iter(
        np.concatenate(
            [np.arange(2.0, 21, 2), np.arange(20.4, 24.1, 0.4), np.arange(24.4, 28.1, 0.4)]
        )
    )
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: next(clock))
    log.clock = 0.0
    for step in range(1, 31):
        progress.step = progress.batch = step
        log.step(progress, {"cls": 1.0}, 1.0, True, optimizer)
        assert ("expected" in capsys.readouterr().out) == (step == 20), step
    folder = tmp_path
    rates = [json.loads(line)["images_per_second"] for line in open(folder / "log.jsonl")]
    assert rates == [2.0, 10.0, 10.0]


def test_the_report_names_only_the_settings_that_differ_from_the_preset():
    paper = importlib.import_module("dino")
    settings = train.Run(model="dino", preset="small")
    cfg, recipe = configure(paper, paper.SMALL, {"num_queries": 100, "train_sizes": (64, 96)})
    usual_cfg, usual_recipe = run_log.usual_settings(settings, paper)
    assert run_log.changes(usual_cfg, usual_cfg) == "the usual settings"
    assert run_log.changes(cfg, usual_cfg) == "as usual, but num_queries 100"
    assert run_log.changes(recipe, usual_recipe) == "as usual, but train_sizes (64, 96)"


@pytest.mark.parametrize("seconds, text", [(3.2, "3 s"), (100, "1.7 min"), (7200, "2.0 h")])
def test_durations_have_a_fitting_unit(seconds, text):
    assert run_log.duration(seconds) == text


def test_a_missing_figure_is_a_dash():
    assert run_log.figure(-1).strip() == "-" and run_log.figure(0.5) == "0.500"
