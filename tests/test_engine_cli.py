"""The command line of train.py."""

import importlib
import json
import os
import re

import pytest

from engine.errors import UserError
from engine.models import paper_files
from engine.recipe import configure
import analysis
import eval as evaluation
import train
from small_runs import cheap_runs, coco_folder, config, run  # noqa: F401


def test_flags_reach_run_and_config():
    settings, cfg, recipe = train.parse(
        [
            "--model",
            "deformable_detr",
            "--lr-backbone=1e-6",
            "--train_sizes",
            "64,96",
            "--two_stage",
            "--with_box_refine",
            "true",
            "--crop",
            "false",
            "--amp",
            "false",
            "--num-val",
            "7",
        ]
    )
    assert (recipe.lr_backbone, recipe.train_sizes, cfg.two_stage, cfg.with_box_refine) == (
        1e-6,
        (64, 96),
        True,
        True,
    )
    assert recipe.crop is False
    assert settings.amp is False and settings.num_val == 7 and settings.preset == "small"


def test_presets_and_variants():
    paper = importlib.import_module("dino")
    assert train.parse(["--data", "somewhere"])[1:] == configure(paper)
    assert train.parse([])[1:] == configure(paper, paper.SMALL)
    assert train.parse(["--data", "x", "--preset", "small", "--lr", "1"])[1:] == configure(
        paper, paper.SMALL, {"lr": 1.0}
    )
    assert train.parse(["--data", "x", "--variant", "5scale"])[1].num_feature_levels == 5


def test_learning_rates_follow_the_batch_unless_given(tmp_path, capsys):
    small = importlib.import_module("deformable_detr").SMALL
    rates = lambda *argv: [
        getattr(train.parse(["--model", "deformable_detr", *argv])[2], name) / small[name]
        for name in ("lr", "lr_backbone", "lr_offsets")
    ]
    assert rates() == [1, 1, 1] and rates("--batch_size", str(2 * small["batch_size"])) == [2, 2, 2]
    assert rates("--batch_size", "4", "--lr", str(small["lr"])) == [1, 1, 1]
    assert rates(
        "--batch_size", str(small["batch_size"] // 2), "--lr_offsets", str(small["lr_offsets"])
    ) == [0.5, 0.5, 1]
    train.train(run(tmp_path), *config("deformable_detr", epochs=1))
    assert (
        "batch 4, lr 0.001 (the recipe: 0.0002 for batch 32; lr follows the batch"
        in capsys.readouterr().out
    )


def test_resuming_demands_the_saved_settings(tmp_path, capsys):
    train.train(run(tmp_path), *config("deformable_detr", epochs=1))
    out = str(tmp_path / "run")
    resumed, *cfg = train.parse(["--resume", "--out", out])
    assert (
        resumed.model == "deformable_detr"
        and resumed.resume == os.path.join(out, "last.pt")
        and cfg[1].epochs == 1
    )
    assert train.parse(["--resume", os.path.join(out, "last.pt")])[0].out == out
    assert train.parse(["--resume", out])[0].resume == resumed.resume
    with pytest.raises(UserError, match="lr 0.5"):
        train.parse(["--resume", "--out", out, "--lr", "0.5"])
    with pytest.raises(ValueError, match="weights only.*--init"):
        train.train(run(tmp_path, resume=os.path.join(out, "best.pt")), *cfg)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--learning_rate", "1"], "Unrecognized options: --learning_rate"),
        (["--epoch", "1"], "Perhaps you meant: --epochs"),
        (["--lr-backbon=1"], "Perhaps you meant: --lr_backbone"),
        (["--preset", "big"], "paper or small"),
        (["--variant", "6scale"], "5scale"),
        (["--epochs", "many"], "'many'"),
        (["--amp", "maybe"], "expected true or false, got 'maybe'"),
        (["extra"], "Unrecognized options: extra"),
    ],
)
def test_wrong_flags_are_refused_by_name(argv, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(argv)
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert words in printed + str(stopped.value) and stopped.value.code != 0


@pytest.mark.parametrize("main, words", [
    *((train.main, [f"--model={name}"]) for name in paper_files()),
    (evaluation.main, []), (analysis.main, [])])
def test_every_flag_has_a_help_text(main, words, capsys):
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert len(re.findall(r"--\w+ .*?\(default: ", text)) > 5
    assert not re.findall(r"--\w+ (?:\S+ )?\(default: ", text)


def test_help_shows_both_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse(["--model", "dino", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    paper = importlib.import_module("dino")
    assert stopped.value.code == 0
    text = " ".join(text.replace("│", " ").split())
    assert f"(default: {paper.SMALL['batch_size']})" in text and "bfloat16 autocast" in text
    assert "To begin with: --model, --data, --preset" in text
    with pytest.raises(SystemExit):
        train.parse(["--model", "dino", "--preset", "paper", "--help"])
    assert f"(default: {paper.RECIPE.batch_size})" in capsys.readouterr().out


@pytest.mark.parametrize("flag, words", [
    ("--imgsz", "--train_sizes and --eval_size"), ("--weights", "--init"), ("--project", "--out"),
    ("--num-classes", "in the json of --data: nothing is to be set")])
def test_flags_of_other_programs_are_translated(flag, words):
    with pytest.raises(UserError, match=f"got {flag.replace('-c', '_c')}: it is here {words}"):
        train.parse([flag, "3"])


def test_a_run_is_resumed_with_its_data_under_another_path(tmp_path, monkeypatch):
    photos = coco_folder(tmp_path / "photos")
    train.train(run(tmp_path, data=photos), *config("deformable_detr", epochs=1))
    monkeypatch.chdir(tmp_path)
    out = str(tmp_path / "run")
    assert train.parse(["--resume", out, "--data", "photos"])[0].resume
    with pytest.raises(UserError, match="another --data others"):
        train.parse(["--resume", out, "--data", "others"])


def test_a_resumed_run_keeps_the_name_of_its_initial_weights(tmp_path):
    """config.json of a run from given weights names them also after the run was resumed."""
    train.train(run(tmp_path, name="first"), *config("deformable_detr", epochs=1))
    first = str(tmp_path / "first" / "last.pt")
    settings = config("deformable_detr", epochs=2)
    train.train(run(tmp_path, name="second", init=first, max_steps=1), *settings)
    out = tmp_path / "second"
    train.main(["--resume", "--out", str(out), "--max_steps", "2"])
    assert json.loads((out / "config.json").read_text())["run"]["init"] == first


def test_a_failed_start_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        train.train(run(tmp_path, data=str(tmp_path / "none")), *config("deformable_detr"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no such folder"):
        train.train(run(tmp_path, data=str(tmp_path / "none")), *config("deformable_detr"))
    assert (tmp_path / "run" / "notes.txt").exists()
