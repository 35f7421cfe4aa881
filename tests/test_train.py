"""What a training run promises, on models of a few thousand parameters and images of 64 px."""
import dataclasses
import functools
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import backbones
from backbones import resnet
from engine import checkpoints
from engine import models
import data
import scenes
import eval as evaluation
from engine.recipe import configure
from engine import datasets
import train

ROOT = Path(train.__file__).parent
MODELS = ("deformable_detr", "dino", "h_detr", "co_detr")
TINY = dict(backbone="tiny", backbone_weights="none", num_feature_levels=3, dim=32, num_heads=2, num_points=2,
            encoder_layers=1, decoder_layers=2, ffn_dim=32, num_queries=12, train_sizes=(64,), eval_size=64, max_size=128,
            crop=False, color_jitter=True, batch_size=4, epochs=2, schedule="cosine", warmup=0.2, ema=0.9, lr=1e-3,
            lr_backbone=1e-3, clip=1.0, dropout=0.1)
OWN = {"h_detr": dict(num_queries_one2many=24, k_one2many=3),
       "co_detr": dict(dim=64, aux_queries=12, rpn_pre_nms=32, rpn_proposals=16, rpn_samples=32, roi_samples=16, roi_dim=32)}
ALONE = {"dino": dict(denoising="none")}   # with group norm and this, nothing in a model looks across images
RUN = dict(num_train=12, num_val=4, device="cpu", amp=False, workers=0, threads=1)   # three steps an epoch
FLAGS = [f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in {**TINY, **RUN}.items()]


@pytest.fixture(autouse=True, scope="module")
def cheap_runs():
    """A narrow backbone, scenes drawn once, and no pictures: they have their own tests and cost more than these runs."""
    draw, drawn = scenes.Shapes.draw, {}

    def draw_once(scenes, index):
        key = scenes.split, scenes.seed, scenes.size, int(scenes.image_ids[index])
        drawn[key] = drawn.get(key) or draw(scenes, index)
        return drawn[key]
    narrow = functools.partial(resnet.ResNet, resnet.BasicBlock, (1, 1, 1, 1), (8, 16, 24, 32), 8, small_stem=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.RESNETS, "tiny", narrow)
        patch.setattr(scenes.Shapes, "draw", draw_once)
        patch.setattr(train.visualize, "predictions", lambda *args, **kwargs: None)
        patch.setattr(train.visualize, "curves", lambda *args, **kwargs: None)
        yield


def config(model, **changes):
    """-> Config and Recipe"""
    return configure(importlib.import_module(model), TINY, OWN.get(model, {}), changes)


def level_embed(state):
    """A tensor that every model has, alone or wrapped."""
    return next(value for key, value in state.items() if key.endswith("level_embed"))


def run(tmp_path, model="deformable_detr", name="run", **changes):
    return train.Run(**{**RUN, "model": model, "out": str(tmp_path / name), **changes})


def same(a, b, path=""):
    """Deep equality, tensors to the bit; times are not compared."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key not in ("seconds", "out", "resume"):
                same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{path}[{i}]")
    elif torch.is_tensor(a):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def at_step(monkeypatch, number, action):
    """Calls `action` just before optimiser step `number` of the next run."""
    original = train.lr_factor

    def wrapped(recipe, step, steps):
        if step == number:
            action()
        return original(recipe, step, steps)
    monkeypatch.setattr(train, "lr_factor", wrapped)


def forked(world, function, *args, timeout=240):
    """Runs function(rank, *args) in `world` gloo processes -> their exit codes. Forked, as importing torch takes seconds;
    killed when they take too long."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def begin(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        function(rank, *args)
    processes = [multiprocessing.get_context("fork").Process(target=begin, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        for process, deadline in zip(processes, [time.time() + timeout] * world):
            process.join(max(0.0, deadline - time.time()))
        assert not any(process.is_alive() for process in processes), f"still running after {timeout} s"
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def coco_folder(root, images=3, names=("cat", "dog"), ids=(7, 3), empty=False):
    """A COCO-layout folder of 64 px squares on grey, training and validation alike."""
    categories = [{"id": i, "name": n} for i, n in zip(ids, names)]
    for split in ("train2017", "val2017"):
        (root / split).mkdir(parents=True)
        content = {"images": [], "annotations": [], "categories": categories}
        for i in range(images):
            picture = np.full((64, 64, 3), 90, np.uint8)
            picture[10:30, 8 + i:40 + i] = (220, 40 * (i % 5), 30)
            Image.fromarray(picture).save(root / split / f"{i}.png")
            content["images"].append({"id": i + 1, "file_name": f"{i}.png", "width": 64, "height": 64})
            if not empty:
                content["annotations"].append({"id": i + 1, "image_id": i + 1, "category_id": ids[i % len(ids)],
                                               "bbox": [8 + i, 10, 32, 20], "area": 640, "iscrowd": 0})
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return str(root)


# ---- resuming

@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder and last record of a run of two epochs with accumulation and moving average, made once per model."""
    @functools.cache
    def make(model):
        folder = tmp_path_factory.mktemp(model)
        return folder / "run", train.train(run(folder, model, accum=2), *config(model))
    return make


@pytest.mark.parametrize("model", MODELS)
def test_resume_exact(tmp_path, monkeypatch, uninterrupted, model):
    """Stopped by SIGTERM in the first epoch, at its end and in the second, and resumed each time: the same bytes as
    uninterrupted."""
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
        torch.manual_seed(99)   # resuming must bring back the random states itself
        resume = str(last)
    resumed = train.train(run(tmp_path, model, "cut", accum=2, resume=resume), *cfg)
    for name in ("last.pt", "best.pt"):
        same(checkpoints.load(whole_folder / name), checkpoints.load(tmp_path / "cut" / name))
    assert whole["AP"] == resumed["AP"]


def test_resume_after_a_crash_goes_on_from_the_last_save(tmp_path, monkeypatch, uninterrupted, model="dino"):
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
    steps = [json.loads(line)["step"] for line in open(tmp_path / "cut" / "log.jsonl") if '"eval"' not in line]
    assert steps == sorted(set(steps)) and steps[-1] == 6, "a resumed run repeats no line of its log"


KILLS = int(os.environ.get("PAPERDETR_KILLS", 200))   # of the slow test


@pytest.mark.parametrize("kills", (3, pytest.param(KILLS, marks=pytest.mark.slow)))
def test_killed_at_random_moments(tmp_path, kills, model="dino"):
    """A process killed by SIGKILL again and again, while it starts, trains, saves or evaluates: every resume succeeds, and
    the end has the bytes, and the log the lines, of a run left alone. About two seconds a kill."""
    flags = [*FLAGS, "--model", model, "--num_train=8", "--accum=2", "--save_every=1"]
    start, rng, out, done, torn, resumes = time.time(), random.Random(0), tmp_path / "run", 0, 0, 0
    assert forked(1, lambda rank: train.main([*flags, "--out", str(tmp_path / "whole")])) == [0]
    seconds = time.time() - start
    lines = lambda folder: [(line["step"], line.get("loss"), line.get("AP"))
                            for line in map(json.loads, open(folder / "log.jsonl"))]
    while done < kills or out.exists():
        resume = ["--resume"] if any((out / name).exists() for name in ("last.pt", "last.pt.prev")) else []
        process = multiprocessing.get_context("fork").Process(target=train.main, args=([*flags, *resume, "--out", str(out)],))
        process.start()
        process.join(rng.uniform(0, seconds) if done < kills else 240)
        if process.is_alive():
            process.kill()
            process.join()
            done, torn, resumes = done + 1, torn + (out / "last.pt.tmp").exists(), resumes + bool(resume)
            continue
        assert process.exitcode == 0
        for name in ("last.pt", "best.pt"):
            same(checkpoints.load(tmp_path / "whole" / name), checkpoints.load(out / name))
        assert lines(out) == lines(tmp_path / "whole")
        shutil.rmtree(out)
    print(f"{done} kills, {resumes} of resumed runs, {torn} within a save")


def test_a_folder_without_a_checkpoint_can_be_started_again(tmp_path, monkeypatch):
    """A run that ended before its first save leaves nothing worth protecting."""
    cfg = config("deformable_detr", epochs=1)
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(run(tmp_path), *cfg)
    assert (tmp_path / "run" / "config.json").exists()
    assert train.train(run(tmp_path), *cfg)["step"] == 3


def test_workers_change_nothing(tmp_path):
    cfg = config("dino", epochs=1)
    train.train(run(tmp_path, "dino", "alone"), *cfg)
    train.train(run(tmp_path, "dino", "two", workers=2), *cfg)
    a, b = (checkpoints.load(tmp_path / name / "last.pt") for name in ("alone", "two"))
    same(a["model"], b["model"])


def test_sigterm(tmp_path):
    """A real process and its workers, all signalled at once and twice as schedulers do: it saves and exits with 143."""
    command = [sys.executable, str(ROOT / "train.py"), "--model", "deformable_detr", "--out", str(tmp_path / "run"),
               *FLAGS, "--num_train=160", "--epochs=400", "--workers=2"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    log, deadline = tmp_path / "run" / "log.jsonl", time.time() + 120
    try:
        while not log.exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.05)
        for _ in range(2):
            os.killpg(process.pid, signal.SIGTERM)
        errors = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert checkpoints.load(tmp_path / "run" / "last.pt")["step"] > 0


def test_a_second_signal_quits_at_once(tmp_path, monkeypatch):
    """Unless it follows so soon that it must be the same request."""
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)   # ignored in what a script starts in the background
    at_step(monkeypatch, 1, twice)
    for seconds, name in ((0.0, "quit"), (60.0, "saved")):
        monkeypatch.setattr(train, "SAME_REQUEST", seconds)
        with pytest.raises(SystemExit) as stopped:
            train.train(run(tmp_path, name=name), *config("deformable_detr"))
        assert stopped.value.code == 128 + signal.SIGINT and (tmp_path / name / "last.pt").exists() == (name == "saved")
    assert signal.getsignal(signal.SIGINT) is before, "handlers are put back"


def test_resuming_demands_the_saved_settings(tmp_path, capsys):
    train.train(run(tmp_path), *config("deformable_detr", epochs=1))
    out = str(tmp_path / "run")
    resumed, *cfg = train.parse(["--resume", "--out", out])
    assert resumed.model == "deformable_detr" and resumed.resume == os.path.join(out, "last.pt") and cfg[1].epochs == 1
    assert train.parse(["--resume", os.path.join(out, "last.pt")])[0].out == out
    assert train.parse(["--resume", out])[0].resume == resumed.resume
    with pytest.raises(SystemExit):
        train.parse(["--resume", "--out", out, "--lr", "0.5"])
    assert "lr 0.5" in capsys.readouterr().err
    with pytest.raises(ValueError, match="weights only.*--init"):
        train.train(run(tmp_path, resume=os.path.join(out, "best.pt")), *cfg)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    train.train(run(tmp_path), *config("deformable_detr", epochs=1))
    with pytest.raises(ValueError, match="--resume.*--out"):
        train.train(run(tmp_path), *config("deformable_detr", epochs=1))


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
        train.train(run(tmp_path, model, name, device="cuda", amp=True, deterministic=True), *config(model, epochs=1))
    same(*(checkpoints.load(tmp_path / name / "last.pt")["model"] for name in "ab"))


def test_deterministic_holds_for_its_run_only(tmp_path):
    train.train(run(tmp_path, deterministic=True), *config("deformable_detr", epochs=1))
    assert torch.are_deterministic_algorithms_enabled()
    train.set_up(run(tmp_path))
    assert not torch.are_deterministic_algorithms_enabled()


# ---- bad steps

def spoil(monkeypatch, numbers, seen):
    """Fills some training images with NaN, and records the state before and after each step and what it returned."""
    item, original = scenes.Shapes.__getitem__, train.step

    def read(dataset, index):
        image, target = item(dataset, index)
        return image * float("nan") if dataset.split == "train" and index in numbers else image, target

    def wrapped(net, model, criterion, optimizer, average, *rest):
        before = snapshot(model, average, optimizer)
        result = original(net, model, criterion, optimizer, average, *rest)
        seen.append((before, snapshot(model, average, optimizer), result))
        return result

    def snapshot(model, average, optimizer):
        state = {"model": model.state_dict(), "ema": average.model.state_dict(), "optimizer": optimizer.state_dict()["state"]}
        return torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, state)
    monkeypatch.setattr(scenes.Shapes, "__getitem__", read)
    monkeypatch.setattr(train, "step", wrapped)


@pytest.mark.parametrize("model", MODELS)
def test_nan_batch_changes_nothing(tmp_path, monkeypatch, capsys, model):
    """Parameters, batch statistics, moving average and optimiser are equal before and after; the report names the
    images, the losses and where it began; the run goes on."""
    seen = []
    spoil(monkeypatch, (5,), seen)
    record = train.train(run(tmp_path, model), *config(model, epochs=2))
    bad = [k for k, (*_, result) in enumerate(seen) if not result[3]]
    assert len(bad) == 2 and bad[0] < 3 <= bad[1], "image 5 once an epoch"
    for k, (before, after, _) in enumerate(seen):
        if k in bad:
            same(before, after)
        else:
            assert not torch.equal(level_embed(before["model"]), level_embed(after["model"]))
    reports = [json.loads(line) for line in open(tmp_path / "run" / "nan_report.jsonl")]
    assert [report["step"] for report in reports] == [k + 1 for k in bad]
    for report in reports:
        assert 5 in report["images"] and "cls" in report["losses"] and report["module"].endswith("backbone.conv1"), report
        assert report["in_a_row"] == 1, "a good step in between starts the count anew"
    assert f"first in {report['module']}" in capsys.readouterr().out
    assert np.isfinite(record["AP"])


def test_three_bad_steps_in_a_row_stop_the_run(tmp_path, monkeypatch):
    spoil(monkeypatch, range(12), [])
    with pytest.raises(FloatingPointError, match="3 bad steps in a row.*images"):
        train.train(run(tmp_path), *config("deformable_detr"))


@pytest.mark.parametrize("recompute", (False, True))
def test_the_first_bad_module_is_found_without_a_trace(tmp_path, recompute):
    cfg, recipe = config("dino")
    scenes, _ = datasets.build_datasets(None, recipe, 0, num_train=4, num_val=1)
    model, _ = importlib.import_module("dino").build(cfg, 8)
    train.prepare_parts(model.train(), run(tmp_path, "dino", recompute=recompute))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    for expected in ("", "decoder.1.linear1"):
        if expected:
            state["decoder.1.linear1.bias"][3] = float("inf")
            model.load_state_dict(state)
        random_state = torch.get_rng_state()
        assert train.first_bad_module(model, scenes, [[0, 1], [2, 3]], False) == expected
        assert torch.equal(torch.get_rng_state(), random_state)
        same(model.state_dict(), state)
    assert not any(module._forward_hooks for module in model.modules())


# ---- the step

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
        batches = [data.collate([scenes[i] for i in range(k, k + 4 // accum)]) for k in range(0, 4, 4 // accum)]
        assert len({len(t["labels"]) for _, _, targets in batches for t in targets}) > 1
        *_, finite = train.step(net, net, criterion, optimizer, train.Average(net, 0.0), batches, 0.0, False, 0, 1)
        assert finite
        gradients[accum] = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    for accum in (2, 4):
        torch.testing.assert_close(gradients[accum], gradients[1], rtol=2e-4, atol=2e-5 * gradients[1].abs().max().item())


def step_of(model, cfg, recipe, world=1, places=(0, 1, 2, 3), settings=train.Run(), empty=False):
    """One training step of a fresh model on these generated scenes -> gradients by name, batch statistics, bytes kept for
    the backward pass."""
    paper = importlib.import_module(model)
    scenes, _ = datasets.build_datasets(None, recipe, 0, num_train=8, num_val=1)
    torch.manual_seed(0)
    net, criterion = paper.build(cfg, 8)
    net.train()
    optimizer = torch.optim.AdamW(paper.param_groups(net, recipe), fused=True)
    train.prepare_parts(net, settings)
    batch = data.collate([scenes[i] for i in places])
    if empty:
        batch = (*batch[:2], [{**t, "labels": t["labels"][:0], "boxes": t["boxes"][:0]} for t in batch[2]])
    kept = []
    wrapped = torch.nn.parallel.DistributedDataParallel(net) if world > 1 else net
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        *_, finite = train.step(wrapped, net, criterion, optimizer, train.Average(net, 0.0), [batch], 0.0, False, 0, world)
    assert finite
    gradients = {name: p.grad for name, p in net.named_parameters()}
    assert all(g is not None for g in gradients.values()), [name for name, g in gradients.items() if g is None]
    return gradients, {name: b.clone() for name, b in net.named_buffers()}, sum(kept)


TRANSFORMERS = {   # table, small sizes under a published name (no flag can make those), what else the model needs
    "swin_t": ("SWINS", (8, (2, 2, 2, 2), (1, 2, 2, 4), 3), {}),
    "vit_l": ("VITS", (32, 4, 2, 3, 2), dict(dim=256, num_feature_levels=5, aux_heads="none")),
    "focalnet_l_3level": ("FOCALNETS", (8, (1, 1, 2, 1), 2, 3), {})}


@pytest.mark.parametrize("model, backbone", [*((model, "tiny") for model in MODELS), ("dino", "swin_t"), ("co_detr", "vit_l"),
                                             ("dino", "focalnet_l_3level")])
def test_recompute_gives_the_same_bytes_for_less_memory(monkeypatch, model, backbone):
    """Gradients, with dropout and stochastic depth, and batch statistics, which would else count every batch twice."""
    changes = dict(dropout=0.3)
    if backbone in TRANSFORMERS:
        table, sizes, needed = TRANSFORMERS[backbone]
        monkeypatch.setitem(getattr(backbones, table), backbone, sizes)
        changes |= dict(backbone=backbone, drop_path=0.3, **needed)
    plain, statistics, much = step_of(model, *config(model, **changes))
    again, again_statistics, little = step_of(model, *config(model, **changes), settings=train.Run(recompute=True))
    same(plain, again)
    same(statistics, again_statistics)
    assert little < 0.6 * much, (little, much)


@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_a_compiled_step_equals_an_eager_one(monkeypatch, backend, model="dino"):
    """Encoder layers, decoder layers and backbone blocks, each traced as a whole, also when recomputed. The quick form stops
    before machine code is made, the slow one compiles with the default backend."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    cfg = config(model, dropout=0.0, decoder_layers=1)
    eager, statistics, _ = step_of(model, *cfg)
    for recompute in (False, True):
        compiled, compiled_statistics, _ = step_of(model, *cfg, settings=train.Run(compile=True, recompute=recompute))
        for name, gradient in eager.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)
        torch.testing.assert_close(compiled_statistics, statistics, rtol=1e-4, atol=1e-5)


def test_recompute_refuses_a_model_without_parts():
    with pytest.raises(ValueError, match="got none in dino"):
        train.prepare_parts(torch.nn.Linear(1, 1), train.Run(recompute=True))


def test_average_follows_parameters_and_batch_statistics():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average = train.Average(model, 0.5)
    start = [t.clone() for t in average.kept]
    with torch.no_grad():
        for tensor in average.live:
            tensor.add_(1.0)
    average.update(torch.tensor(True), 1000)
    for kept, old in zip(average.kept, start):
        torch.testing.assert_close(kept, old + 0.5)
    average.update(torch.tensor(False), 1000)
    for kept, old in zip(average.kept, start):
        torch.testing.assert_close(kept, old + 0.5)
    assert len(average.kept) == 6, "weight, bias; weight, bias, mean, variance"


def test_statistics_of_a_frozen_part_are_not_among_those_that_change():
    """Averaged over ranks, its bytes could change by rounding."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2))
    model[0].eval()
    changed = train.batch_statistics(model)
    model(torch.rand(4, 2))
    assert [b is kept for b, kept in zip(model[1].buffers(), changed, strict=True)] == [True] * 3


def test_schedules():
    _, recipe = config("dino", epochs=10, lr_drop=6, warmup=0.1)
    at = lambda schedule, step: train.lr_factor(dataclasses.replace(recipe, schedule=schedule), step, 100)
    assert [at("step", s) for s in (0, 49, 99, 599, 600, 999)] == pytest.approx([0.01, 0.5, 1, 1, 0.1, 0.1])
    assert at("cosine", 500) == pytest.approx(0.505) and at("cosine", 999) == pytest.approx(0.01, abs=1e-4)
    assert at("flat", 999) == 1
    with pytest.raises(ValueError, match="step, drops, cosine or flat"):
        at("linear", 0)


class Numbers(data.DetectionData):
    """Samples that hold nothing but their number."""
    name = "numbers"

    def __init__(self, count):
        self.image_ids = np.arange(count)

    def __getitem__(self, index):
        return torch.zeros(3, 2, 2), {"index": index}


def epoch_of(count, batch_size, seed=0, epoch=0, start=0, rank=0, world=1, workers=0, accum=1):
    """-> places in the data set of every micro-batch of every step of one rank"""
    settings = train.Run(workers=workers, accum=accum, seed=seed, device="cpu")
    plan = train.make_plan(settings, config("dino", batch_size=batch_size)[1], count, rank, world)
    return [[[t["index"] for t in targets] for _, _, targets in step]
            for step in train.epoch_batches(Numbers(count), plan, settings, epoch, start)]


def test_the_order_depends_on_seed_and_epoch_alone():
    orders = {(seed, epoch): epoch_of(22, 4, seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert len({str(order) for order in orders.values()}) == 4
    for order in orders.values():
        assert [len(micro) for micro, in order] == [4] * 5 and len({i for micro, in order for i in micro}) == 20
    assert orders[0, 1] == epoch_of(22, 4, 0, 1, workers=2)
    assert orders[0, 1][3:] == epoch_of(22, 4, 0, 1, start=3) and epoch_of(22, 4, 0, 1, start=5) == []


@pytest.mark.parametrize("world, accum", ((2, 1), (1, 2), (2, 2), (4, 1)))
def test_ranks_and_micro_batches_share_a_step_without_overlap(world, accum):
    whole = [step[0] for step in epoch_of(26, 8)]
    ranks = [epoch_of(26, 8, rank=rank, world=world, accum=accum) for rank in range(world)]
    for number, images in enumerate(whole):
        micros = [micro for rank in ranks for micro in rank[number]]
        assert sorted(i for micro in micros for i in micro) == sorted(images)
        assert {len(micro) for micro in micros} == {8 // world // accum}
    assert [rank[1:] for rank in ranks] == [epoch_of(26, 8, start=1, rank=r, world=world, accum=accum) for r in range(world)]


@pytest.mark.parametrize("count, world, total", ((1, 1, 1), (3, 1, 3), (7, 2, 6), (9, 2, 8)))
def test_a_training_set_smaller_than_the_batch_gets_a_smaller_batch(count, world, total, capsys):
    assert train.make_plan(train.Run(), config("dino", batch_size=8)[1], count, 0, world).total == total
    assert capsys.readouterr().out.count("instead") == (total < 8)
    with pytest.raises(ValueError, match="at least .* 2 training images, got 1"):
        train.make_plan(train.Run(accum=2), config("dino", batch_size=8)[1], 1, 0, 1)


# ---- data and classes

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


def test_checkpoint_carries_names(tmp_path):
    folder = coco_folder(tmp_path / "data", names=("cat", "dog"), ids=(7, 3))
    train.train(run(tmp_path, data=folder), *config("deformable_detr", epochs=1, batch_size=2))
    model, _, cfg, _, meta, _ = models.load_model(tmp_path / "run" / "best.pt")
    assert meta["class_names"] == ["dog", "cat"] and meta["category_ids"] == [3, 7]
    assert meta["model_name"] == "deformable_detr" and cfg.dim == 32 and not model.training


@pytest.mark.parametrize("model", MODELS)
def test_init_from_other_classes(tmp_path, capsys, model):
    """Eight shapes -> two classes, one of them known: everything but class rows is taken over, the known row too."""
    cfg, recipe = config(model, epochs=1, batch_size=2, ema=0.0)
    train.train(run(tmp_path, model, "first"), cfg, dataclasses.replace(recipe, batch_size=4))
    folder = coco_folder(tmp_path / "data", names=("ring", "cat"), ids=(1, 2))
    weights = checkpoints.load(tmp_path / "first" / "best.pt")
    paper = importlib.import_module(model)
    fresh, _ = paper.build(cfg, 2)
    lines = train.start_weights(run(tmp_path, model, init=str(tmp_path / "first" / "best.pt")), cfg, fresh, ["ring", "cat"])
    state = fresh.state_dict()
    assert torch.equal(level_embed(state), level_embed(weights["model"]))
    ring = weights["class_names"].index("ring")
    head = next(key for key in state if key.endswith("class_embed.0.weight"))
    assert torch.equal(state[head][0], weights["model"][head][ring]) and len(state[head]) == 2
    assert any("1 of 2 classes" in line for line in lines)
    train.train(run(tmp_path, model, "second", data=folder, init=str(tmp_path / "first" / "best.pt")), cfg, recipe)
    assert "1 of 2 classes" in capsys.readouterr().out


# ---- the command line

def test_flags_reach_run_and_config():
    settings, cfg, recipe = train.parse(["--model", "deformable_detr", "--lr-backbone=1e-6", "--train_sizes", "64,96", "--two_stage",
                                 "--with_box_refine", "true", "--no_crop", "--amp", "false", "--num-val", "7"])
    assert (recipe.lr_backbone, recipe.train_sizes, cfg.two_stage, cfg.with_box_refine) == (1e-6, (64, 96), True, True)
    assert recipe.crop is False
    assert settings.amp is False and settings.num_val == 7 and settings.preset == "small"


def test_presets_and_variants():
    paper = importlib.import_module("dino")
    assert train.parse(["--data", "somewhere"])[1:] == configure(paper)
    assert train.parse([])[1:] == configure(paper, paper.SMALL)
    assert train.parse(["--data", "x", "--preset", "small", "--lr", "1"])[1:] == configure(paper, paper.SMALL, {"lr": 1.0})
    assert train.parse(["--data", "x", "--variant", "5scale"])[1].num_feature_levels == 5


def test_learning_rates_follow_the_batch_unless_given(tmp_path, capsys):
    small = importlib.import_module("deformable_detr").SMALL
    rates = lambda *argv: [getattr(train.parse(["--model", "deformable_detr", *argv])[2], name) / small[name]
                           for name in ("lr", "lr_backbone", "lr_offsets")]
    assert rates() == [1, 1, 1] and rates("--batch_size", str(2 * small["batch_size"])) == [2, 2, 2]
    assert rates("--batch_size", "4", "--lr", str(small["lr"])) == [1, 1, 1]
    assert rates("--batch_size", str(small["batch_size"] // 2), "--lr_offsets", str(small["lr_offsets"])) == [0.5, 0.5, 1]
    train.train(run(tmp_path), *config("deformable_detr", epochs=1))
    assert f"batch 4, lr 0.001 (the recipe: 0.0002 for batch 32; lr follows the batch" in capsys.readouterr().out


def test_out_of_memory_names_the_next_flag_and_loses_nothing(tmp_path, monkeypatch):
    """Each attempt proposes what the last one did not use; the saved steps are there, and the run goes on from them."""
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    last = tmp_path / "run" / "last.pt"
    command = [*FLAGS, "--model", "deformable_detr", "--out", str(last.parent), "--save_every=1"]
    for at, flags, proposed in ((0, [], "Try --recompute; nothing was saved yet"),
                                (2, ["--recompute"], "Try --accum 2; .*last.pt is whole: add --resume"),
                                (4, ["--recompute", "--accum=4", "--resume"], "Try smaller images.*--max_size 64 --init")):
        with monkeypatch.context() as patch:
            at_step(patch, at, full)
            with pytest.raises(SystemExit, match=f"train.py: error: out of memory.*2.00 GiB.*{proposed}"):
                train.main([*command, *flags])
        assert last.exists() == bool(at) and (not at or checkpoints.load(last)["step"] == at)
    train.main([*command, "--resume"])
    assert checkpoints.load(last)["step"] == 6


def test_errors_meant_for_the_user_are_one_line_and_others_keep_their_trace(tmp_path, monkeypatch):
    command = [*FLAGS, "--model", "deformable_detr", "--epochs=1"]
    train.main([*command, "--out", str(tmp_path / "run")])
    for flags, words in ((["--out", str(tmp_path / "run")], "already holds a run"),
                         (["--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "a")], "expected a COCO json there"),
                         (["--data", coco_folder(tmp_path / "data", empty=True), "--out", str(tmp_path / "b")], "usable box"),
                         (["--backbone_weights", "missing.pt", "--out", str(tmp_path / "c")], "there is no file missing.pt"),
                         (["--accum=3", "--out", str(tmp_path / "d")], "divisible by accum"),
                         (["--schedule=linear", "--out", str(tmp_path / "e")], "expected --schedule")):
        with pytest.raises(SystemExit, match=f"^train.py: error: .*{words}"):
            train.main([*command, *flags])
    for bug in (lambda: int("many"), lambda: torch.zeros(2).view(3)):
        with monkeypatch.context() as patch:
            at_step(patch, 1, bug)
            with pytest.raises((ValueError, RuntimeError)):
                train.main([*command, "--out", str(tmp_path / "f")])


def test_threads_do_not_spin():
    """Waiting OpenMP threads that spin stop each other where cores are fewer than threads; read once, by importing torch."""
    source = (ROOT / "train.py").read_text()
    assert 0 < source.index('os.environ.setdefault("GOMP_SPINCOUNT"') < source.index("import torch\n")
    assert os.environ["GOMP_SPINCOUNT"]


@pytest.mark.parametrize("argv, words", [
    (["--learning_rate", "1"], "unknown flag --learning_rate"),
    (["--epoch", "1"], "did you mean --epochs"),
    (["--lr-backbon=1"], "did you mean --lr_backbone"),
    (["--preset", "big"], "paper or small"),
    (["--variant", "6scale"], "5scale"),
    (["--epochs", "many"], "invalid int"),
    (["--amp", "maybe"], "invalid boolean value: 'maybe'"),
])
def test_wrong_flags_are_refused_by_name(argv, words, capsys):
    with pytest.raises(SystemExit):
        train.parse(argv)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ("detr", "os", "train", "../dino"))
def test_an_unknown_model_lists_the_files_that_qualify(name):
    with pytest.raises(ValueError, match="deformable_detr, dino"):
        train.parse(["--model", name])


def test_help_shows_both_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse(["--model", "dino", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    paper = importlib.import_module("dino")
    assert stopped.value.code == 0
    assert f"[{paper.RECIPE.batch_size} ({paper.SMALL['batch_size']})]" in text and "bfloat16 autocast" in text


def test_the_report_says_what_is_about_to_happen(tmp_path, capsys):
    """In ten lines, the last as soon as a few steps have shown what they cost."""
    train.train(run(tmp_path), *config("deformable_detr", epochs=1))
    text = capsys.readouterr().out
    words = ("config", "recipe", "device", "data", "objects", "model", "training", "weights", "folder", "expected")
    lines = text[:text.index("epoch   1")].splitlines()
    assert [line.split()[0] for line in lines if line.strip()] == list(words)
    for word in ("cpu, 1 threads", "float32", "deformable attention", "8 classes", "batch 4", "1 epochs of 3 steps", "tiny",
                 "min in all", "GiB"):
        assert word in text, word
    lines = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    assert {"cls", "l1", "giou", "aux0.cls"} <= lines[0]["losses"].keys() and lines[-1]["kind"] == "eval"
    assert lines[-1]["train_seconds"] > 0 and json.loads((tmp_path / "run" / "config.json").read_text())["config"]["dim"] == 32


def test_what_a_run_costs_is_told_when_it_is_warm(tmp_path, capsys):
    """From steps 11 to 20: 40 images in 4 of the 24 seconds so far."""
    folder, (_, recipe), plan = tmp_path, config("dino", epochs=12), train.Plan(4, 4, 1, 1000, 0, 1)
    log, model = train.Log(folder, train.Progress(), plan, recipe, train.Run(device="cpu")), None
    for step, seconds in ((10, 20.0), (20, 24.0), (30, 28.0)):
        log.waiting = [([[0]], {"cls": torch.ones(())}, torch.ones(()), torch.tensor(True))] * 10
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        log.flush(train.Progress(step=step, batch=step, seconds=seconds), optimizer, train.tqdm(disable=True), model, None)
        assert ("expected" in capsys.readouterr().out) == (step == 20), step
    rates = [json.loads(line)["images_per_second"] for line in open(folder / "log.jsonl")]
    assert rates == [2.0, 10.0, 10.0]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_overfit_eight(tmp_path, model):
    """Eight scenes are learnt within 1000 steps of the small preset; about two minutes each."""
    settings, *cfg = train.parse(["--model", model, "--overfit", "8", "--epochs", "10", "--out", str(tmp_path / "run")])
    assert train.train(settings, *cfg)["AP"] > 0.9


# ---- more than one process

def rank_step(rank, cfg, folder, empty):
    train.set_up(train.Run(**RUN))
    gradients, *_ = step_of(type(cfg[0]).__module__, *cfg, 2, places=(0, 1) if rank == 0 else (2, 3), empty=empty and rank == 1)
    torch.save(gradients, folder / f"{rank}.pt")


@pytest.mark.parametrize("model", MODELS[:3])
def test_two_ranks_compute_the_gradients_of_one(tmp_path, model):
    """Half the images each, with different numbers of objects. Denoising groups and the counts of Co-DETR's heads follow the
    micro-batch (Departs), so they are left out."""
    cfg = config(model, backbone_norm="group", dropout=0.0, **ALONE.get(model, {}))
    assert forked(2, rank_step, cfg, tmp_path, False) == [0, 0]
    one, *_ = step_of(model, *cfg)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    same(*ranks)
    for name, gradient in one.items():
        scale = max(1, gradient.abs().max().item())
        torch.testing.assert_close(ranks[0][name], gradient, rtol=1e-3, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("model, changes", [*((model, {}) for model in MODELS), *(
    ("co_detr", {"base": base, "aux_heads": heads}) for base in ("dino", "h_detr")
    for heads in ("atss", "rcnn", "retinanet"))])
def test_one_rank_empty(tmp_path, model, changes):
    """No object on one rank: no hang, a finite loss, and the same gradient for every parameter on both."""
    assert forked(2, rank_step, config(model, **changes), tmp_path, True) == [0, 0]
    same(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)))


def test_sigterm_on_one_rank_stops_all_and_two_ranks_resume_exactly(tmp_path, monkeypatch, model="dino"):
    """Rank 1 alone is told to stop: both exit with 143 after the same step. Resumed by two processes, the run ends as one
    left alone. Both ranks evaluate the same model, batch statistics included, and what they gather equals the evaluation of
    one process."""
    cfg, original = config(model), train.evaluation

    def run_rank(rank, name, stop_at=None, **changes):
        if rank == 1 and stop_at is not None:
            at_step(monkeypatch, stop_at, lambda: signal.raise_signal(signal.SIGTERM))

        def evaluation(evaluated, *rest):
            torch.save(evaluated.state_dict(), tmp_path / f"{name}{rank}.pt")
            return original(evaluated, *rest)
        monkeypatch.setattr(train, "evaluation", evaluation)
        train.train(run(tmp_path, model, name, num_train=8, **changes), *cfg)
    last = tmp_path / "cut" / "last.pt"
    assert forked(2, run_rank, "whole") == [0, 0]
    assert forked(2, run_rank, "cut", 1) == [143, 143]
    assert checkpoints.load(last)["step"] == 2
    assert forked(2, lambda rank: run_rank(rank, "cut", resume=str(last))) == [0, 0]
    for name in ("last.pt", "best.pt"):
        same(checkpoints.load(tmp_path / "whole" / name), checkpoints.load(tmp_path / "cut" / name))
    evaluated = [torch.load(tmp_path / f"{name}{rank}.pt") for name in ("whole", "cut") for rank in (0, 1)]
    for other in evaluated[1:]:
        same(evaluated[0], other)
    loaded = models.load_model(last)
    val_set = datasets.validation_set("", loaded)
    alone = evaluation.evaluate(loaded.model, loaded.paper.detect, val_set, loaded.cfg, "cpu", 2)
    record = json.loads(open(tmp_path / "cut" / "log.jsonl").readlines()[-1])
    assert alone["bbox"]["AP"] == pytest.approx(record["AP"], abs=1e-6) and alone["images"] == RUN["num_val"]


@pytest.mark.slow
def test_torchrun_starts_two_processes(tmp_path):
    """The README's command, two processes on one machine; half a minute."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train.py")]
    done = subprocess.run([*command, *FLAGS, "--model", "dino", "--epochs", "1", "--out", str(tmp_path / "run")], cwd=tmp_path,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert checkpoints.load(tmp_path / "run" / "last.pt")["step"] == 3 and done.stdout.count("config ") == 1
