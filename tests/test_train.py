"""What a training run promises: the loop, the step, the moving average, several processes."""

import dataclasses
import functools
import importlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from engine import checkpoints
from engine import datasets
from engine import machine as machines
from engine import models
from engine.machine import Machine
import data
import eval as evaluation
import scenes
import train
from small_runs import (
    ALONE,
    at_step,
    cheap_runs,
    coco_folder,
    config,
    FLAGS,
    forked,
    level_embed,
    MODELS,
    ROOT,
    RUN,
    run,
    same,
    step_of,
)  # noqa: F401


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder and last record of a run of two epochs with accumulation and moving average, made once
    per model."""

    @functools.cache
    def make(model):
        folder = tmp_path_factory.mktemp(model)
        return folder / "run", train.train(run(folder, model, accum=2), *config(model))

    return make


@pytest.mark.parametrize("model", MODELS)
def test_resume_exact(tmp_path, monkeypatch, uninterrupted, model):
    """Stopped by SIGTERM in the first epoch, at its end and in the second, and resumed each time:
    the same bytes as uninterrupted."""
    cfg = config(model)
    whole_folder, whole = uninterrupted(model)
    last, resume = tmp_path / "cut" / "last.pt", ""
    for point in (1, 2, 4):
        with monkeypatch.context() as patch:
            at_step(patch, point, lambda: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(SystemExit) as stopped:
                train.train(run(tmp_path, model, "cut", accum=2, resume=resume), *cfg)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert checkpoints.load(last)["step"] == point + 1
        torch.manual_seed(99)  # resuming must bring back the random states itself
        resume = str(last)
    resumed = train.train(run(tmp_path, model, "cut", accum=2, resume=resume), *cfg)
    for name in ("last.pt", "best.pt"):
        same(checkpoints.load(whole_folder / name), checkpoints.load(tmp_path / "cut" / name))
    assert whole["AP"] == resumed["AP"]


def test_resume_after_a_crash_goes_on_from_the_last_save(
    tmp_path, monkeypatch, uninterrupted, model="dino"
):
    cfg = config(model)
    whole_folder, _ = uninterrupted(model)

    def crash():
        raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patch:
        at_step(patch, 5, crash)
        with pytest.raises(RuntimeError, match="gone"):
            train.train(run(tmp_path, model, "cut", accum=2, save_every=2), *cfg)
    last = tmp_path / "cut" / "last.pt"
    assert checkpoints.load(last)["step"] == 4
    train.train(run(tmp_path, model, "cut", accum=2, save_every=2, resume=str(last)), *cfg)
    a, b = (checkpoints.load(folder / "last.pt") for folder in (whole_folder, tmp_path / "cut"))
    a["run"] = b["run"] = None
    same(a, b)
    steps = [
        json.loads(line)["step"]
        for line in open(tmp_path / "cut" / "log.jsonl")
        if '"eval"' not in line
    ]
    assert (
        steps == sorted(set(steps)) and steps[-1] == 6
    ), "a resumed run repeats no line of its log"


def test_a_finished_run_that_is_resumed_leaves_its_files_and_shows_no_bar(tmp_path, capsys):
    settings = config("deformable_detr", epochs=1)
    train.train(run(tmp_path), *settings)
    folder = tmp_path / "run"
    before = (folder / "best.pt").read_bytes()
    capsys.readouterr()
    train.train(run(tmp_path, resume=str(folder / "last.pt")), *settings)
    assert (folder / "best.pt").read_bytes() == before
    printed = capsys.readouterr()
    assert "trained to the end: evaluates again" in printed.out
    assert "left" not in printed.err
    # a damaged best.pt is written again
    (folder / "best.pt").write_bytes(before[:1000])
    train.train(run(tmp_path, resume=str(folder / "last.pt")), *settings)
    assert checkpoints.load(folder / "best.pt")["step"] == 3


@pytest.mark.parametrize("model", MODELS)
def test_same_seed_bit_equal(tmp_path, model):
    """Two steps; the test of resuming makes more."""
    cfg = config(model, epochs=1)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.train(run(tmp_path, model, name, seed=seed, num_train=8, num_val=1), *cfg)
    a, b, c = (checkpoints.load(tmp_path / name / "last.pt") for name in "abc")
    same(a, b)
    assert not torch.equal(level_embed(a["model"]), level_embed(c["model"]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("model", MODELS)
def test_same_seed_bit_equal_on_a_gpu(tmp_path, model):
    for name in "ab":
        train.train(
            run(tmp_path, model, name, device="cuda", amp=True, deterministic=True),
            *config(model, epochs=1),
        )
    same(*(checkpoints.load(tmp_path / name / "last.pt")["model"] for name in "ab"))


def test_workers_change_nothing(tmp_path):
    cfg = config("dino", epochs=1)
    train.train(run(tmp_path, "dino", "alone"), *cfg)
    train.train(run(tmp_path, "dino", "two", workers=2), *cfg)
    a, b = (checkpoints.load(tmp_path / name / "last.pt") for name in ("alone", "two"))
    same(a["model"], b["model"])


def test_deterministic_holds_for_its_run_only(tmp_path):
    train.train(run(tmp_path, deterministic=True), *config("deformable_detr", epochs=1))
    assert torch.are_deterministic_algorithms_enabled()
    machines.set_up_machine(run(tmp_path))
    assert not torch.are_deterministic_algorithms_enabled()


def spoil(monkeypatch, numbers, seen):
    """Fills some training images with NaN, and records the state before and after each step and
    what it returned."""
    item, original = scenes.Shapes.__getitem__, train.step

    def read(dataset, index):
        image, target = item(dataset, index)
        return (
            image * float("nan") if dataset.split == "train" and index in numbers else image
        ), target

    def wrapped(net, model, criterion, optimizer, ema, *rest):
        before = snapshot(model, ema, optimizer)
        result = original(net, model, criterion, optimizer, ema, *rest)
        seen.append((before, snapshot(model, ema, optimizer), result))
        return result

    def snapshot(model, ema, optimizer):
        state = {
            "model": model.state_dict(),
            "ema": ema.module.state_dict(),
            "optimizer": optimizer.state_dict()["state"],
        }
        return torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, state)

    monkeypatch.setattr(scenes.Shapes, "__getitem__", read)
    monkeypatch.setattr(train, "step", wrapped)


@pytest.mark.parametrize("model", MODELS)
def test_nan_batch_changes_nothing(tmp_path, monkeypatch, capsys, model):
    """Parameters, batch statistics, moving average and optimizer are equal before and after; the
    report names the images, the losses and where it began; the run goes on."""
    seen = []
    spoil(monkeypatch, (5,), seen)
    record = train.train(run(tmp_path, model), *config(model, epochs=2))
    bad = [k for k, (*_, result) in enumerate(seen) if not result[2]]
    assert len(bad) == 2 and bad[0] < 3 <= bad[1], "image 5 once an epoch"
    for k, (before, after, _) in enumerate(seen):
        if k in bad:
            same(before, after)
        else:
            assert not torch.equal(level_embed(before["model"]), level_embed(after["model"]))
    reports = [json.loads(line) for line in open(tmp_path / "run" / "nan_report.jsonl")]
    assert [report["step"] for report in reports] == [k + 1 for k in bad]
    for report in reports:
        assert (
            5 in report["images"]
            and "cls" in report["losses"]
            and report["module"].endswith("backbone.conv1")
        ), report
        assert report["in_a_row"] == 1, "a good step in between starts the count anew"
    assert f"first in {report['module']}" in capsys.readouterr().out
    assert np.isfinite(record["AP"])


def test_three_bad_steps_in_a_row_stop_the_run(tmp_path, monkeypatch):
    spoil(monkeypatch, range(12), [])
    with pytest.raises(FloatingPointError, match="3 bad steps in a row.*images"):
        train.train(run(tmp_path), *config("deformable_detr"))


@pytest.mark.parametrize("model", MODELS[:3])
def test_accum_equivalence(model):
    """Gradients of micro-batches with uneven numbers of objects equal those of one large batch."""
    gradients = {}
    for accum in (1, 2, 4):
        torch.manual_seed(0)
        cfg, recipe = config(model, backbone_norm="group", dropout=0.0, **ALONE.get(model, {}))
        paper = importlib.import_module(model)
        scenes, _ = datasets.build_datasets(None, recipe, 0, num_train=4, num_val=1)
        net, criterion = paper.build(cfg, 8)
        optimizer = torch.optim.AdamW(paper.param_groups(net, recipe), fused=True)
        batches = [
            data.collate([scenes[i] for i in range(k, k + 4 // accum)])
            for k in range(0, 4, 4 // accum)
        ]
        assert len({len(t["labels"]) for _, _, targets in batches for t in targets}) > 1
        *_, finite = train.step(
            net, net, criterion, optimizer, train.make_ema(net, 0.0), batches, 0.0, Machine()
        )
        assert finite
        gradients[accum] = torch.cat(
            [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        )
    for accum in (2, 4):
        torch.testing.assert_close(
            gradients[accum], gradients[1], rtol=2e-4, atol=2e-5 * gradients[1].abs().max().item()
        )


def test_the_average_follows_parameters_and_batch_statistics_and_copies_counters():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    ema = train.make_ema(model, 0.5)
    for updates, weight in ((0, 1.0), (1000, 0.5), (1, 1 - 2 / 11)):
        ema.n_averaged.fill_(updates)
        before = {name: value.clone() for name, value in ema.module.state_dict().items()}
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(1)
        ema.update_parameters(model)
        for name, value in ema.module.state_dict().items():
            live = model.state_dict()[name]
            expected = (
                live
                if name.endswith("num_batches_tracked")
                else torch.lerp(before[name], live, weight)
            )
            torch.testing.assert_close(value, expected)
    assert not any(p.requires_grad for p in ema.module.parameters()) and not ema.module.training


def test_without_a_decay_the_model_itself_is_evaluated():
    model = torch.nn.Linear(1, 1)
    assert train.make_ema(model, 0.0).module is model


def test_schedules():
    _, recipe = config("dino", epochs=10, lr_drop=6, warmup=0.1)
    at = lambda schedule, step: train.lr_factor(
        dataclasses.replace(recipe, schedule=schedule), step, 100
    )
    assert [at("step", s) for s in (0, 49, 99, 599, 600, 999)] == pytest.approx(
        [0.01, 0.5, 1, 1, 0.1, 0.1]
    )
    assert at("cosine", 500) == pytest.approx(0.505) and at("cosine", 999) == pytest.approx(
        0.01, abs=1e-4
    )
    assert at("flat", 999) == 1
    with pytest.raises(ValueError, match="step, drops, cosine or flat"):
        at("linear", 0)


@pytest.mark.parametrize("model", MODELS)
def test_dataset_of_one(tmp_path, capsys, model):
    folder = coco_folder(tmp_path / "data", images=1)
    record = train.train(run(tmp_path, model, data=folder), *config(model))
    assert record["step"] == 2 and "batch 1 instead of 4" in capsys.readouterr().out


def test_zero_annotations_refused(tmp_path):
    folder = coco_folder(tmp_path / "data", empty=True)
    with pytest.raises(ValueError, match="at least one usable box"):
        train.train(run(tmp_path, data=folder), *config("deformable_detr"))
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_overfit_eight(tmp_path, model):
    """Eight scenes are learnt within 1000 steps of the small preset; about two minutes each."""
    settings, *cfg = train.parse(
        ["--model", model, "--overfit", "8", "--epochs", "10", "--out", str(tmp_path / "run")]
    )
    assert train.train(settings, *cfg)["AP"] > 0.9


def rank_step(rank, cfg, folder, empty):
    machine = machines.set_up_machine(train.Run(**RUN))
    gradients, *_ = step_of(
        type(cfg[0]).__module__,
        *cfg,
        machine,
        places=(0, 1) if rank == 0 else (2, 3),
        empty=empty and rank == 1,
    )
    torch.save(gradients, folder / f"{rank}.pt")


@pytest.mark.parametrize("model", MODELS[:3])
def test_two_ranks_compute_the_gradients_of_one(tmp_path, model):
    """Half the images each, with different numbers of objects. Denoising groups follow the
    micro-batch and batch statistics the rank, so they are left out."""
    cfg = config(model, backbone_norm="group", dropout=0.0, **ALONE.get(model, {}))
    assert forked(2, rank_step, cfg, tmp_path, False) == [0, 0]
    one, *_ = step_of(model, *cfg)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    same(*ranks)
    for name, gradient in one.items():
        scale = max(1, gradient.abs().max().item())
        torch.testing.assert_close(ranks[0][name], gradient, rtol=1e-3, atol=1e-5 * scale, msg=name)


def gradients_of_share(model, cfg, recipe, places, objects_per_rank):
    """Gradients of one rank's images alone, its losses divided by the mean count of the ranks."""
    paper = importlib.import_module(model)
    scenes, _ = datasets.build_datasets(None, recipe, 0, num_train=8, num_val=1)
    torch.manual_seed(0)
    net, criterion = paper.build(cfg, 8)
    images, padding, targets = data.collate([scenes[i] for i in places])
    outputs = net.train()(images, padding, targets)
    sum(criterion(outputs, targets, objects_per_rank).values()).backward()
    return {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("model", ["deformable_detr", "dino", "h_detr"])
def test_two_ranks_with_everything_on_compute_the_mean_of_their_gradients(tmp_path, model):
    """With denoising, one-to-many queries and batch statistics: each rank has its own groups and
    statistics, all divide by the mean number of objects, and DDP averages with equal weights.
    test_co_detr.py has the counts that Co-DETR averages itself."""
    cfg, recipe = config(model, dropout=0.0)
    assert forked(2, rank_step, (cfg, recipe), tmp_path, False) == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    same(*ranks)
    scenes, _ = datasets.build_datasets(None, recipe, 0, num_train=8, num_val=1)
    counts = [sum(len(scenes[i][1]["labels"]) for i in places) for places in ((0, 1), (2, 3))]
    assert counts[0] != counts[1]
    shares = [gradients_of_share(model, cfg, recipe, places, sum(counts) / 2)
              for places in ((0, 1), (2, 3))]
    for name, gradient in ranks[0].items():
        expected = (shares[0][name] + shares[1][name]) / 2
        scale = max(1, expected.abs().max().item())
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize(
    "model, changes",
    [
        *((model, {}) for model in MODELS),
        *(
            ("co_detr", {"base": base, "aux_heads": heads})
            for base in ("dino", "h_detr")
            for heads in ("atss", "rcnn", "retinanet")
        ),
    ],
)
def test_one_rank_empty(tmp_path, model, changes):
    """No object on one rank: no hang, a finite loss, and the same gradient for every parameter on
    both."""
    assert forked(2, rank_step, config(model, **changes), tmp_path, True) == [0, 0]
    same(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)))


def test_sigterm_on_one_rank_stops_all_and_two_ranks_resume_exactly(
    tmp_path, monkeypatch, model="dino"
):
    """Rank 1 alone is told to stop: both exit with 143 after the same step. Resumed by two
    processes, the run ends as one left alone. Both ranks evaluate the same model, batch statistics
    included, and what they gather equals the evaluation of one process."""
    cfg, original = config(model), train.validate

    def run_rank(rank, name, stop_at=None, **changes):
        if rank == 1 and stop_at is not None:
            at_step(monkeypatch, stop_at, lambda: signal.raise_signal(signal.SIGTERM))

        def evaluation(evaluated, *rest):
            torch.save(evaluated.module.state_dict(), tmp_path / f"{name}{rank}.pt")
            return original(evaluated, *rest)

        monkeypatch.setattr(train, "validate", evaluation)
        train.train(run(tmp_path, model, name, num_train=8, **changes), *cfg)

    last = tmp_path / "cut" / "last.pt"
    assert forked(2, run_rank, "whole") == [0, 0]
    assert forked(2, run_rank, "cut", 1) == [143, 143]
    assert checkpoints.load(last)["step"] == 2
    assert forked(2, lambda rank: run_rank(rank, "cut", resume=str(last))) == [0, 0]
    for name in ("last.pt", "best.pt"):
        same(checkpoints.load(tmp_path / "whole" / name), checkpoints.load(tmp_path / "cut" / name))
    evaluated = [
        torch.load(tmp_path / f"{name}{rank}.pt") for name in ("whole", "cut") for rank in (0, 1)
    ]
    for other in evaluated[1:]:
        same(evaluated[0], other)
    loaded = models.load_model(last)
    val_set = datasets.validation_set("", loaded)
    alone = evaluation.evaluate(loaded.model, loaded.paper.detect, val_set, loaded.cfg, "cpu", 2)
    record = json.loads(open(tmp_path / "cut" / "log.jsonl").readlines()[-1])
    assert (
        alone["bbox"]["AP"] == pytest.approx(record["AP"], abs=1e-6)
        and alone["images"] == RUN["num_val"]
    )


@pytest.mark.slow
def test_torchrun_starts_two_processes(tmp_path):
    """The README's command, two processes on one machine; half a minute."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(ROOT / "train.py"),
    ]
    done = subprocess.run(
        [*command, *FLAGS, "--model", "dino", "--epochs", "1", "--out", str(tmp_path / "run")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        checkpoints.load(tmp_path / "run" / "last.pt")["step"] == 3
        and done.stdout.count("config ") == 1
    )


def test_a_clip_or_a_loss_that_is_not_finite_changes_nothing():
    scenes, _ = datasets.build_datasets("", config("dino")[1], 0, num_train=4, num_val=1)
    micro_batches = [data.collate([scenes[i] for i in range(4)])]
    cfg, recipe = config("dino")
    paper = importlib.import_module("dino")
    model, criterion = paper.build(cfg, 8)
    optimizer = torch.optim.AdamW(paper.param_groups(model.train(), recipe), fused=True)
    ema = train.make_ema(model, 0.9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for clip in (float("nan"), float("inf")):
        *_, finite = train.step(
            model, model, criterion, optimizer, ema, micro_batches, clip, Machine()
        )
        assert not finite and not optimizer.state and ema.n_averaged == 0
        same(before, model.state_dict())
