"""What a training run promises, on models of a few thousand parameters and images of 64 px."""
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import train

ROOT = Path(train.__file__).parent
MODELS = ("deformable_detr", "dino")
TINY = dict(backbone="tiny", backbone_weights="none", num_feature_levels=3, dim=32, num_heads=2, num_points=2,
            encoder_layers=1, decoder_layers=2, ffn_dim=32, num_queries=12, train_sizes=(64,), eval_size=64, max_size=128,
            crop=False, color_jitter=True, batch_size=4, epochs=2, schedule="cosine", warmup=0.2, ema=0.9, lr=1e-3,
            lr_backbone=1e-3, clip=1.0, dropout=0.1)
RUN = dict(num_train=12, num_val=4, device="cpu", amp=False, workers=0, threads=1)   # three steps an epoch
FLAGS = [f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in {**TINY, **RUN}.items()]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures have their own tests and cost more than these runs."""
    monkeypatch.setattr(train.visualize, "predictions", lambda *args, **kwargs: None)
    monkeypatch.setattr(train.visualize, "curves", lambda *args, **kwargs: None)


def config(model, **changes):
    return importlib.import_module(model).Config(**{**TINY, **changes})


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

    def wrapped(cfg, step, steps):
        if step == number:
            action()
        return original(cfg, step, steps)
    monkeypatch.setattr(train, "lr_factor", wrapped)


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

@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("point", (1, 2, 4))
def test_resume_exact(tmp_path, monkeypatch, model, point):
    """Stopped by SIGTERM in the first epoch, at its end, or in the second, and resumed: the same bytes as uninterrupted."""
    cfg = config(model)
    whole = train.train(run(tmp_path, model, "whole", accum=2), cfg)
    with monkeypatch.context() as patch:
        at_step(patch, point, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as stopped:
            train.train(run(tmp_path, model, "cut", accum=2), cfg)
    assert stopped.value.code == 128 + signal.SIGTERM
    last = tmp_path / "cut" / "last.pt"
    assert checkpoints.load(last)["step"] == point + 1
    torch.manual_seed(99)   # resuming must bring back the random states itself
    resumed = train.train(run(tmp_path, model, "cut", accum=2, resume=str(last)), cfg)
    for name in ("last.pt", "best.pt"):
        same(checkpoints.load(tmp_path / "whole" / name), checkpoints.load(tmp_path / "cut" / name))
    assert whole["AP"] == resumed["AP"] and whole["instability"] == resumed["instability"]


@pytest.mark.parametrize("model", MODELS)
def test_resume_after_a_crash_goes_on_from_the_last_save(tmp_path, monkeypatch, model):
    cfg = config(model)
    train.train(run(tmp_path, model, "whole"), cfg)

    def crash():
        raise RuntimeError("the machine is gone")
    with monkeypatch.context() as patch:
        at_step(patch, 5, crash)
        with pytest.raises(RuntimeError, match="gone"):
            train.train(run(tmp_path, model, "cut", save_every=2), cfg)
    last = tmp_path / "cut" / "last.pt"
    assert checkpoints.load(last)["step"] == 4
    train.train(run(tmp_path, model, "cut", save_every=2, resume=str(last)), cfg)
    a, b = (checkpoints.load(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    a["run"] = b["run"] = None
    same(a, b)
    steps = [json.loads(line)["step"] for line in open(tmp_path / "cut" / "log.jsonl") if '"eval"' not in line]
    assert steps == sorted(set(steps)) and steps[-1] == 6, "a resumed run repeats no line of its log"


def test_workers_change_nothing(tmp_path):
    cfg = config("dino", epochs=1)
    train.train(run(tmp_path, "dino", "alone"), cfg)
    train.train(run(tmp_path, "dino", "two", workers=2), cfg)
    a, b = (checkpoints.load(tmp_path / name / "last.pt") for name in ("alone", "two"))
    same(a["model"], b["model"])


def test_sigterm(tmp_path):
    """A real process: SIGTERM saves, exits with 143, and the same command with --resume finishes."""
    command = [sys.executable, str(ROOT / "train.py"), "--model", "deformable_detr", "--out", str(tmp_path / "run"),
               *FLAGS, "--epochs", "400", "--workers", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "run" / "log.jsonl", time.time() + 120
    while not log.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert checkpoints.load(tmp_path / "run" / "last.pt")["step"] > 0


def test_a_second_signal_quits_at_once(tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    at_step(monkeypatch, 1, twice)
    with pytest.raises(SystemExit) as stopped:
        train.train(run(tmp_path), config("deformable_detr"))
    assert stopped.value.code == 128 + signal.SIGINT and not (tmp_path / "run" / "last.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "handlers are put back"


def test_resuming_demands_the_saved_settings(tmp_path, capsys):
    train.train(run(tmp_path), config("deformable_detr", epochs=1))
    out = str(tmp_path / "run")
    resumed, cfg = train.parse(["--resume", "--out", out])
    assert resumed.model == "deformable_detr" and resumed.resume == os.path.join(out, "last.pt") and cfg.epochs == 1
    assert train.parse(["--resume", os.path.join(out, "last.pt")])[0].out == out
    with pytest.raises(SystemExit):
        train.parse(["--resume", "--out", out, "--lr", "0.5"])
    assert "lr 0.5" in capsys.readouterr().err
    with pytest.raises(ValueError, match="weights only.*--init"):
        train.train(run(tmp_path, resume=os.path.join(out, "best.pt")), cfg)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    train.train(run(tmp_path), config("deformable_detr", epochs=1))
    with pytest.raises(ValueError, match="--resume.*--out"):
        train.train(run(tmp_path), config("deformable_detr", epochs=1))


@pytest.mark.parametrize("model", MODELS)
def test_same_seed_bit_equal(tmp_path, model):
    cfg = config(model, epochs=1)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.train(run(tmp_path, model, name, seed=seed), cfg)
    a, b, c = (checkpoints.load(tmp_path / name / "last.pt") for name in "abc")
    same(a, b)
    assert not torch.equal(a["model"]["level_embed"], c["model"]["level_embed"])


# ---- bad steps

def spoil(monkeypatch, numbers, seen):
    """Fills the images of some steps with NaN and records the state before and after each step."""
    original = train.step

    def wrapped(net, model, criterion, optimizer, average, batches, clip, amp, number, world):
        if number in numbers:
            batches = [(images * float("nan"), *rest) for images, *rest in batches]
        before = snapshot(model, average, optimizer)
        result = original(net, model, criterion, optimizer, average, batches, clip, amp, number, world)
        seen.append((before, snapshot(model, average, optimizer), result[0]))
        return result

    def snapshot(model, average, optimizer):
        state = {"model": model.state_dict(), "ema": average.model.state_dict(), "optimizer": optimizer.state_dict()["state"]}
        return torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, state)
    monkeypatch.setattr(train, "step", wrapped)


@pytest.mark.parametrize("model", MODELS)
def test_nan_batch_changes_nothing(tmp_path, monkeypatch, capsys, model):
    """Parameters, batch statistics, moving average and optimiser are equal before and after; the report names the
    images and the losses; the run goes on."""
    seen = []
    spoil(monkeypatch, (2,), seen)
    record = train.train(run(tmp_path, model), config(model, epochs=2))
    same(seen[2][0], seen[2][1])
    assert not torch.equal(seen[3][0]["model"]["level_embed"], seen[3][1]["model"]["level_embed"])
    report, = map(json.loads, open(tmp_path / "run" / "nan_report.jsonl"))
    assert report["step"] == 3 and report["images"] == seen[2][2] and "cls" in report["losses"]
    assert np.isfinite(record["AP"]) and checkpoints.load(tmp_path / "run" / "last.pt")["progress"]["bad"] == 0


def test_three_bad_steps_in_a_row_stop_the_run(tmp_path, monkeypatch):
    spoil(monkeypatch, (1, 2, 3), [])
    with pytest.raises(FloatingPointError, match="3 steps in a row.*images"):
        train.train(run(tmp_path), config("deformable_detr"))


# ---- the step

def test_accum_equivalence(tmp_path):
    """Gradients of two micro-batches with uneven numbers of objects equal those of one large batch (group norm and no
    denoising: nothing else in a model looks across images)."""
    import data
    gradients = {}
    for accum in (1, 2, 4):
        torch.manual_seed(0)
        cfg = config("dino", backbone="resnet18", backbone_norm="group", denoising="none", ema=0.0, dropout=0.0)
        paper = importlib.import_module("dino")
        scenes, _ = data.build_datasets(None, cfg, 0, num_train=4, num_val=1)
        model, criterion = paper.build(cfg, 8)
        optimizer = torch.optim.AdamW(paper.param_groups(model, cfg), fused=True)
        batches = [data.collate([scenes[i] for i in range(k, k + 4 // accum)]) for k in range(0, 4, 4 // accum)]
        assert len({len(t["labels"]) for _, _, targets in batches for t in targets}) > 1
        *_, finite = train.step(model, model, criterion, optimizer, train.Average(model, 0.0), batches, 0.0, False, 0, 1)
        assert finite
        gradients[accum] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for accum in (2, 4):
        torch.testing.assert_close(gradients[accum], gradients[1], rtol=2e-4, atol=2e-5 * gradients[1].abs().max().item())


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


def test_schedules():
    cfg = config("dino", epochs=10, lr_drop=6, warmup=0.1)
    at = lambda schedule, step: train.lr_factor(dataclasses.replace(cfg, schedule=schedule), step, 100)
    assert [at("step", s) for s in (0, 49, 99, 599, 600, 999)] == pytest.approx([0.01, 0.5, 1, 1, 0.1, 0.1])
    assert at("cosine", 500) == pytest.approx(0.505) and at("cosine", 999) == pytest.approx(0.01, abs=1e-4)
    assert at("flat", 999) == 1
    with pytest.raises(ValueError, match="step, cosine or flat"):
        at("linear", 0)


def test_an_epoch_covers_every_image_once_over_ranks_and_whatever_the_start():
    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 26

        def __getitem__(self, index):
            return torch.tensor([index]), {}

        def set_epoch(self, epoch):
            pass
    settings = train.Run(workers=0, accum=2)
    plans = [train.make_plan(settings, config("dino", batch_size=8), 26, rank, 2) for rank in (0, 1)]
    original, train.data.collate = train.data.collate, lambda samples: [int(i) for i, _ in samples]
    try:
        whole = [list(train.epoch_batches(Numbers(), plan, settings, 5, 0)) for plan in plans]
        rest = [list(train.epoch_batches(Numbers(), plan, settings, 5, 1)) for plan in plans]
    finally:
        train.data.collate = original
    numbers = [i for rank in whole for step in rank for micro in step for i in micro]
    assert len(numbers) == len(set(numbers)) == 24 and rest == [rank[1:] for rank in whole]
    assert all(len(step) == 2 and len(micro) == 2 for rank in whole for step in rank for micro in step)


# ---- data and classes

@pytest.mark.parametrize("model", MODELS)
def test_dataset_of_one(tmp_path, capsys, model):
    folder = coco_folder(tmp_path / "data", images=1)
    record = train.train(run(tmp_path, model, data=folder), config(model))
    assert record["step"] == 2 and "batch 1 instead of 4" in capsys.readouterr().out


def test_zero_annotations_refused(tmp_path):
    folder = coco_folder(tmp_path / "data", empty=True)
    with pytest.raises(ValueError, match="at least one usable box"):
        train.train(run(tmp_path, data=folder), config("deformable_detr"))
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_checkpoint_carries_names(tmp_path):
    folder = coco_folder(tmp_path / "data", names=("cat", "dog"), ids=(7, 3))
    train.train(run(tmp_path, data=folder), config("deformable_detr", epochs=1, batch_size=2))
    model, cfg, meta = checkpoints.load_model(tmp_path / "run" / "best.pt")
    assert meta["class_names"] == ["dog", "cat"] and meta["category_ids"] == [3, 7]
    assert meta["model_name"] == "deformable_detr" and cfg.dim == 32 and not model.training


@pytest.mark.parametrize("model", MODELS)
def test_init_from_other_classes(tmp_path, capsys, model):
    """Eight shapes -> two classes, one of them known: everything but class rows is taken over, the known row too."""
    cfg = config(model, epochs=1, batch_size=2, ema=0.0)
    train.train(run(tmp_path, model, "first"), dataclasses.replace(cfg, batch_size=4))
    folder = coco_folder(tmp_path / "data", names=("ring", "cat"), ids=(1, 2))
    weights = checkpoints.load(tmp_path / "first" / "best.pt")
    paper = importlib.import_module(model)
    fresh, _ = paper.build(cfg, 2)
    lines = train.start_weights(run(tmp_path, model, init=str(tmp_path / "first" / "best.pt")), cfg, fresh, ["ring", "cat"])
    state = fresh.state_dict()
    assert torch.equal(state["level_embed"], weights["model"]["level_embed"])
    ring = weights["class_names"].index("ring")
    assert torch.equal(state["class_embed.0.weight"][0], weights["model"]["class_embed.0.weight"][ring])
    assert len(state["class_embed.0.weight"]) == 2 and any("1 of 2 classes" in line for line in lines)
    train.train(run(tmp_path, model, "second", data=folder, init=str(tmp_path / "first" / "best.pt")), cfg)
    assert "1 of 2 classes" in capsys.readouterr().out


# ---- the command line

def test_flags_reach_run_and_config():
    settings, cfg = train.parse(["--model", "deformable_detr", "--lr-backbone=1e-6", "--train_sizes", "64,96", "--two_stage",
                                 "--with_box_refine", "true", "--no_crop", "--amp", "false", "--num-val", "7"])
    assert (cfg.lr_backbone, cfg.train_sizes, cfg.two_stage, cfg.with_box_refine, cfg.crop) == (1e-6, (64, 96), True, True, False)
    assert settings.amp is False and settings.num_val == 7 and settings.preset == "small"


def test_presets_and_variants():
    paper = importlib.import_module("dino")
    assert train.parse(["--data", "somewhere"])[1] == paper.Config()
    assert train.parse([])[1] == paper.Config(**paper.SMALL)
    assert train.parse(["--data", "x", "--preset", "small", "--lr", "1"])[1] == paper.Config(**{**paper.SMALL, "lr": 1.0})
    assert train.parse(["--data", "x", "--variant", "5scale"])[1].num_feature_levels == 5


@pytest.mark.parametrize("argv, words", [
    (["--learning_rate", "1"], "unknown flag --learning_rate"),
    (["--epoch", "1"], "did you mean --epochs"),
    (["--lr-backbon=1"], "did you mean --lr_backbone"),
    (["--preset", "big"], "paper or small"),
    (["--variant", "6scale"], "5scale"),
    (["--epochs", "many"], "invalid int"),
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
    assert f"[{paper.Config().batch_size} ({paper.SMALL['batch_size']})]" in text and "bfloat16 autocast" in text


def test_the_report_says_what_is_about_to_happen(tmp_path, capsys):
    train.train(run(tmp_path), config("deformable_detr", epochs=1))
    text = capsys.readouterr().out
    for word in ("cpu, 1 threads", "float32", "deformable attention", "8 classes", "batch 4", "1 epochs of 3 steps", "tiny"):
        assert word in text, word
    lines = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    assert {"cls", "l1", "giou", "aux0.cls"} <= lines[0]["losses"].keys() and lines[-1]["kind"] == "eval"
    assert lines[-1]["train_seconds"] > 0 and json.loads((tmp_path / "run" / "config.json").read_text())["config"]["dim"] == 32


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_overfit_eight(tmp_path, model):
    """Eight scenes are learnt within 1000 steps of the small preset; about two minutes each."""
    settings, cfg = train.parse(["--model", model, "--overfit", "8", "--epochs", "10", "--out", str(tmp_path / "run")])
    assert train.train(settings, cfg)["AP"] > 0.9


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """torchrun with two gloo processes: the same weights as one process up to rounding, and a run that resumes."""
    flags = [*FLAGS, "--model", "deformable_detr", "--backbone=resnet18", "--backbone_norm=group", "--dropout", "0", "--epochs", "1", "--ema", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, command in (("one", [sys.executable]), ("two", [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                              "--nproc_per_node", "2"])):
        done = subprocess.run([*command, str(ROOT / "train.py"), *flags, "--out", str(tmp_path / name)], cwd=tmp_path,
                              env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (checkpoints.load(tmp_path / name / "last.pt") for name in ("one", "two"))
    assert one["step"] == two["step"] == 3
    for key, value in one["model"].items():
        torch.testing.assert_close(value, two["model"][key], rtol=1e-2, atol=2e-3, msg=key)
