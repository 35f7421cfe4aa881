"""tools/ablations.py and tools/reduce_log.py: tables from finished runs, and what is trained."""
import json

import pytest
import torch

import train
from coco_folders import write_folder
from engine import checkpoints
from engine.errors import UserError
from tools import ablations
from tools.ablations import (DETECTORS, LADDER, MASKS, Compare, Convergence, Ladder, Masks)
from tools.reduce_log import reduce_log


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_run(folder, ap, epoch=2, **settings):
    """A finished run. Steps 1 to 2 and 4 to 5 took 0.1 s each, the others 1.95 s each."""
    folder.mkdir(parents=True)
    lines = []
    for step, seconds in ((1, 5), (2, 5.1), (4, 9), (5, 9.1)):
        lines.append({"kind": "step", "step": step, "train_seconds": seconds, "epoch": 0,
                      "lr": 1e-4, "loss": 1.0, "losses": {"cls": 1.0}})
    sizes = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APl"), ap)
    record = {"kind": "eval", "epoch": epoch, "step": 5, "train_seconds": 9.1, "bbox": sizes}
    if settings.get("model") == "mask_frozen_detr":
        record |= {"bbox": {**sizes, "AP": 0.8}, "segm": sizes, "segm_cls": {"AP": ap - 0.1}}
    lines.append(record)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text)
    settings = {"seed": int(folder.name[-1]), "epochs": epoch, **settings}
    (folder / "config.json").write_text(json.dumps({"run": settings}))


def rows_of(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def words_of(flags):
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


# ---- rows ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", LADDER)
def test_every_row_of_the_ladder_is_a_training_run(name):
    """train.py knows the flags, and what a row changes is not what the small preset does anyway."""
    row = LADDER[name]
    run, *settings = train.parse(["--model", row.model, *words_of(row.flags)])
    default = train.parse(["--model", row.model])[1:]
    assert run.preset == "small"
    if row.flags and name != "co_dino_atss_rcnn":
        assert tuple(settings) != default
    assert row.baseline in ("", *LADDER)


@pytest.mark.parametrize("name", MASKS)
def test_every_row_of_the_mask_table_is_a_training_run(name):
    row = MASKS[name]
    settings = train.parse(["--model", row.model, *words_of(row.flags)])[1:]
    default = train.parse(["--model", row.model])[1:]
    same = settings == default and row.detector == "dino" and row.length == 1
    assert same == (name == "default")
    assert row.baseline in ("", *MASKS) and row.detector in DETECTORS


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_of_the_mask_table_is_a_training_run(name):
    row = DETECTORS[name]
    run, cfg, _ = train.parse(["--model", row.model, *words_of(row.flags)])
    assert run.preset == "small" and all(getattr(cfg, k) == x for k, x in row.flags.items())


def test_every_choice_of_dino_has_a_row():
    """Options without a row would have no reason to exist."""
    rows = [row.flags for row in LADDER.values() if row.model == "dino"]
    for name in ("none", "plain"):
        assert {"denoising": name} in rows
    for name in ("static", "pure"):
        assert {"query_selection": name} in rows


# ---- tables --------------------------------------------------------------------------------------

def test_the_ladder_reads_finished_runs_and_compares_means_over_seeds(
        tmp_path, monkeypatch, capsys):
    """DINO 0.6 with a spread of 0.2, static 0.35 (larger difference), once 0.55 (smaller)."""
    static = {"model": "dino", "query_selection": "static"}
    once = {"model": "dino", "look_forward_twice": False}
    for seed, ap in enumerate((0.5, 0.7)):
        write_run(tmp_path / f"dino_{seed}", ap, model="dino")
    for seed, ap in enumerate((0.3, 0.4)):
        write_run(tmp_path / f"dino_with_static_queries_{seed}", ap, **static)
    for seed, ap in enumerate((0.55, 0.55)):
        write_run(tmp_path / f"dino_looking_forward_once_{seed}", ap, **once)
    rows = ("dino", "dino_with_static_queries", "dino_looking_forward_once")
    monkeypatch.setattr(ablations, "run_train", None)     # nothing is trained
    Ladder(out=tmp_path, rows=rows, seeds=2, jobs=2).run()
    head, dino, static, once = rows_of(capsys.readouterr().out)
    assert head[0] == "1000 steps, 2 seeds"
    assert dino == ["DINO", "0.600", "0.200", "", "", "", "", "0.600", "0.600", "0.600", "100"]
    assert static[1:7] == ["0.350", "0.100", "DINO", "-0.250", "yes", "-0.200 -0.300"]
    assert once[1:7] == ["0.550", "0.000", "DINO", "-0.050", "no", "+0.050 -0.150"]
    assert (tmp_path / "ladder.png").stat().st_size > 5000


def test_one_seed_has_no_spread_to_compare_with(tmp_path, capsys):
    write_run(tmp_path / "dino_0", 0.5, model="dino")
    write_run(tmp_path / "h_detr_0", 0.9, model="h_detr")
    Compare(out=tmp_path, models=("dino", "h_detr"), seeds=1).run()
    assert rows_of(capsys.readouterr().out)[2][3:6] == ["dino", "+0.400", "one seed"]


def test_the_time_of_a_step_is_that_between_lines_of_the_log():
    """Without the first steps, which are slow, unless the log has no other steps."""
    first, second, third = [{"step": step, "train_seconds": seconds}
                            for step, seconds in ((5, 10), (15, 12), (20, 14))]
    assert ablations.step_ms([first]) == 2000
    assert ablations.step_ms([first, second]) == 200
    assert ablations.step_ms([first, second, third]) == 300


def test_the_mask_table_reads_finished_runs(tmp_path, capsys):
    flags = {"model": "mask_frozen_detr", "detector": "d"}
    write_run(tmp_path / "default_0", 0.5, epoch=1, **flags)
    write_run(tmp_path / "roi_8_0", 0.4, epoch=1, roi_size=8, **flags)
    weights = {"a": torch.zeros(30_000), "_extra_state": torch.zeros(32)}
    for name in ("default_0", "roi_8_0"):
        checkpoints.save(tmp_path / name / "best.pt", {"model": weights})
    Masks(out=tmp_path, rows=("default", "roi_8"), detector="d").run()
    _, default, roi_8 = rows_of(capsys.readouterr().out)
    assert default[:3] == ["default", "0.500", "0.000"]
    assert default[7:] == ["0.500", "0.500", "0.500", "0.400", "0.800", "0.03", "100"]
    assert roi_8[:5] == ["region of 8 cells", "0.400", "0.000", "default", "-0.100"]


def test_the_curves_of_convergence_are_read_from_finished_runs(tmp_path, capsys):
    """Two seeds; the second run evaluated its first epoch twice, after a kill."""
    for name, flags in (("dino", {}), ("dino_with_pure_queries", {"query_selection": "pure"})):
        for seed, ap in enumerate((0.5, 0.7)):
            write_run(tmp_path / f"{name}_{seed}", ap, model="dino", **flags)
            log = tmp_path / f"{name}_{seed}" / "log.jsonl"
            *steps, last = log.read_text().splitlines()
            record = json.loads(last)
            for first in (0.9, 0.1):
                box = {**record["bbox"], "AP": first, "APs": first / 2}
                steps.append(json.dumps({**record, "epoch": 1, "bbox": box}))
            log.write_text("\n".join([*steps, last, ""]))
    Convergence(out=tmp_path, rows=("dino", "dino_with_pure_queries"), seeds=2, steps=1000).run()
    head, every, small, pure, _ = rows_of(capsys.readouterr().out)
    assert head[:4] == ["1000 steps, 2 seeds", "objects", "epoch 1", "epoch 2"]
    assert every == ["DINO", "all", "0.100", "0.600", "0.200", "", "", "", "", "100"]
    assert small == ["DINO", "small", "0.050", "0.600", "0.200", "", "", "", "", "100"]
    assert pure[4:9] == ["0.200", "DINO", "+0.000", "no", "+0.000 +0.000"]
    assert (tmp_path / "convergence.png").stat().st_size > 5000


# ---- runs ----------------------------------------------------------------------------------------

def test_what_is_missing_is_trained_and_its_output_stays(tmp_path, monkeypatch, capsys):
    """From nothing to a table, with a stand-in for the process that trains."""
    def training(words, stdout, stderr):
        flags = dict(zip(words[2::2], words[3::2]))
        assert flags == {"--out": "runs/co_dino_atss_0", "--threads": "3", "--eval_every": "2",
                         "--model": "co_detr", "--seed": "0", "--epochs": "2",
                         "--aux_heads": "atss"}
        folder = tmp_path / flags["--out"]
        write_run(tmp_path / "made_0", 0.25, model="co_detr", aux_heads="atss")
        for file in (tmp_path / "made_0").iterdir():
            file.rename(folder / file.name)
        stdout.write("trained")
        return ablations.subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(ablations.subprocess, "run", training)
    Ladder(out=ablations.Path("runs"), rows=("co_dino_atss",), seeds=1, threads=3).run()
    assert "| Co-DINO, heads: atss | 0.250 | 0.000 |" in capsys.readouterr().out
    folder = tmp_path / "runs" / "co_dino_atss_0"
    assert (folder / "output.txt").read_text() == "trained"
    assert (tmp_path / "runs" / "logs" / "co_dino_atss_0.jsonl").exists()


def stand_in(words, stdout, stderr):
    """In place of a training: the run folder that it would leave."""
    flags = dict(zip(words[2::2], words[3::2]))
    settings = {name.removeprefix("--"): value for name, value in flags.items()}
    settings |= {"seed": int(settings["seed"]), "epochs": int(settings["epochs"])}
    for name in ("batch_size", "encoder_layers"):
        if name in settings:
            settings[name] = int(settings[name])
    folder = ablations.Path(settings["out"])
    made = folder.with_name(f"made_{settings['seed']}")
    write_run(made, 0.25, epoch=settings["epochs"], **{
        name: x for name, x in settings.items() if name not in ("seed", "epochs")})
    for file in made.iterdir():
        file.rename(folder / file.name)
    made.rmdir()
    checkpoints.save(folder / "best.pt", {"model": {"a": torch.zeros(3)}})
    return ablations.subprocess.CompletedProcess(words, 0)


@pytest.fixture
def calls(monkeypatch):
    """The flags of every training that begins, in place of it."""
    flags = []

    def training(words, stdout, stderr):
        flags.append(dict(zip(words[2::2], words[3::2])))
        return stand_in(words, stdout, stderr)

    monkeypatch.setattr(ablations.subprocess, "run", training)
    return flags


def test_a_folder_of_scenes_is_trained_on_from_random_weights(tmp_path, calls):
    data = write_folder(tmp_path / "crowd", images=[(8, 8)] * 16)
    Ladder(out=tmp_path, rows=("dino",), seeds=1, steps=6, data=str(data)).run()
    call, = calls
    assert (call["--data"], call["--preset"], call["--init"]) == (str(data), "small", "none")
    assert call["--epochs"] == "3"   # of 16 images in batches of 8


def test_curves_are_evaluated_after_every_epoch(tmp_path, calls):
    Convergence(out=tmp_path, rows=("detr",), seeds=1, steps=1000).run()
    assert calls[0]["--eval_every"] == "1" and calls[0]["--epochs"] == "2"


def test_the_mask_table_trains_the_detectors_of_its_rows_once(tmp_path, calls):
    """Two rows on DINO with two encoder layers, in two seeds; a row of twice the epochs."""
    rows = ("layer_2_of_2", "epochs_2")
    Masks(out=tmp_path, rows=rows, detector="d.pt", seeds=2, detector_steps=1000).run()
    detector = tmp_path / "detector_dino_2_layers_0"
    first, *others = calls
    assert first["--out"] == str(detector) and first["--encoder_layers"] == "2"
    assert first["--epochs"] == "2" and "--detector" not in first
    assert [call["--detector"] for call in others] == [str(detector / "best.pt"), "d.pt"] * 2
    assert [call["--epochs"] for call in others] == ["1", "2"] * 2


def test_a_run_that_was_broken_off_is_continued(tmp_path, monkeypatch):
    write_run(tmp_path / "dino_0", 0.1, model="dino", epoch=2)
    log = tmp_path / "dino_0" / "log.jsonl"
    complete = log.read_text()
    log.write_text("".join(line + "\n" for line in complete.splitlines()[:-1]))
    (tmp_path / "dino_0" / "last.pt").touch()

    def training(words, stdout, stderr):
        assert words[-2:] == ["--resume", str(tmp_path / "dino_0")]
        assert "--model" not in words
        log.write_text(complete)
        return ablations.subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(ablations.subprocess, "run", training)
    Ladder(out=tmp_path, rows=("dino",), seeds=1).run()


def test_a_run_that_fails_ends_the_table_with_the_place_of_its_output(tmp_path, monkeypatch):
    def training(words, stdout, stderr):
        return ablations.subprocess.CompletedProcess(words, 1)

    monkeypatch.setattr(ablations.subprocess, "run", training)
    with pytest.raises(UserError, match="exit code 1: see .*dino_0/output.txt"):
        Ladder(out=tmp_path, rows=("dino",), seeds=1).run()


def test_a_run_with_other_settings_is_refused(tmp_path):
    """Its figures would stand in the table under another name."""
    write_run(tmp_path / "dino_0", 0.5, epoch=1, model="dino")
    with pytest.raises(UserError, match="--epochs 2, got one with 1"):
        Ladder(out=tmp_path, rows=("dino",), seeds=1).run()


def test_steps_that_are_no_complete_epochs_are_refused(tmp_path):
    with pytest.raises(UserError, match="divisible by the 500 steps of an epoch"):
        Compare(out=tmp_path, models=("dino",), steps=700).run()


def test_a_folder_with_less_images_than_a_batch_is_refused(tmp_path):
    data = write_folder(tmp_path / "data", images=[(8, 8)] * 7)
    with pytest.raises(UserError, match="at least 8 training images, got 7"):
        Compare(out=tmp_path, models=("dino",), data=str(data)).run()


def test_models_are_compared_without_the_name_of_the_command(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(Compare, "run", lambda self: started.append(self))
    ablations.main(["--models", "dino", "h_detr", "--seeds", "2", "--steps", "500"])
    assert started == [Compare(models=("dino", "h_detr"), seeds=2, steps=500)]


def test_an_unknown_row_is_refused_in_one_line():
    with pytest.raises(SystemExit, match="tools.ablations: error: .*dino_with_pure_queries"):
        ablations.main(["ladder", "--rows", "dyno"])


# ---- logs ----------------------------------------------------------------------------------------

def test_a_reduced_log_has_settings_evaluations_and_every_50th_step(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    records = [{"kind": "step", "step": step, "loss": 1 / 3} for step in range(10, 130, 10)]
    figures = {"AP": 2 / 3, "per_class": {"ring": {"AP": 1.0}}}
    records.append({"kind": "eval", "step": 125, "bbox": figures})
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run / "log.jsonl").write_text(text)
    run_settings = {"seed": 3, "out": "/home/me/run", "data": "photos",
                    "detector": "/home/me/dino/best.pt", "resume": "/home/me/run/last.pt"}
    (run / "config.json").write_text(json.dumps({"run": run_settings}))
    reduce_log(run, tmp_path / "logs" / "run.jsonl")
    lines = (tmp_path / "logs" / "run.jsonl").read_text().splitlines()
    settings, *records = [json.loads(line) for line in lines]
    assert settings == {"kind": "settings", "torch": torch.__version__,
                        "run": {"seed": 3, "out": "runs/run", "data": "photos",
                                "detector": "dino/best.pt", "resume": "run/last.pt"}}
    assert records == [{"kind": "step", "step": 50, "loss": 0.33333},
                       {"kind": "step", "step": 100, "loss": 0.33333},
                       {"kind": "eval", "step": 125, "bbox": {"AP": 0.66667}}]


def test_a_folder_without_a_log_is_refused(tmp_path):
    with pytest.raises(UserError, match="run folder with log.jsonl"):
        reduce_log(tmp_path, tmp_path / "run.jsonl")


def test_a_broken_line_of_a_log_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"run": {}}))
    (tmp_path / "log.jsonl").write_text('{"kind": "step", "step": 50}\n{"kind": "st')
    with pytest.raises(UserError, match="log.jsonl, line 2: expected a complete line"):
        reduce_log(tmp_path, tmp_path / "run.jsonl")
