"""EXERCISES.md: every function that it removes fails the test that it names, and the ten lines of
its worked example train."""
import importlib
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import train
from engine.machine import Machine
from engine.recipe import configure
from recordings import batch
from source_files import ROOT
from tools import exercises
from tools.exercises import read_exercises, remove

EXERCISES = read_exercises()
IGNORED = shutil.ignore_patterns("assets", "runs", ".*", "__pycache__")


def run_without(exercise, folder):
    """Run the test of an exercise in a copy of the repository without its function."""
    shutil.copytree(ROOT, folder, ignore=IGNORED)
    path = folder / exercise.file
    path.write_text(remove(path.read_text(), exercise.file, exercise.function))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", exercise.test]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def assert_fails(exercise, folder):
    done = run_without(exercise, folder)
    assert done.returncode == 1, done.stdout + done.stderr      # 0: passed, 2 to 5: it did not run
    assert "1 failed" in done.stdout


def test_there_are_at_least_fifteen_exercises_and_each_names_what_exists():
    assert len(EXERCISES) >= 15
    assert len(EXERCISES) == exercises.PAGE.read_text().count("\n### ")
    for exercise in EXERCISES:
        text = (ROOT / exercise.file).read_text()
        assert remove(text, exercise.file, exercise.function) != text
        file, name = exercise.test.split("::")
        assert f"def {name}(" in (ROOT / file).read_text()


def test_a_removed_function_keeps_its_signature_and_its_docstring():
    begin = 'class A:\n    def f(self, x):\n        """Double."""\n        '
    end = "\n\n\nB = 3\n"
    assert remove(f"{begin}return 2 * x{end}", "a.py", "A.f") == f"{begin}{exercises.REMOVED}{end}"
    text = "void f(int x) {\n  if (x) { g(x); }\n}\nint y;\n"
    assert remove(text, "a.cpp", "f") == "void f(int x) {\n  // write this\n}\nint y;\n"


def test_the_command_removes_a_function_in_place(tmp_path, monkeypatch, capsys):
    shutil.copy(ROOT / "boxes.py", tmp_path)
    monkeypatch.setattr(exercises, "ROOT", tmp_path)
    exercises.main(1)
    assert exercises.REMOVED in (tmp_path / "boxes.py").read_text()
    assert EXERCISES[0].test in capsys.readouterr().out
    with pytest.raises(exercises.UserError, match="expected an exercise from 1 to"):
        exercises.main(0)


def test_the_first_exercise_fails_without_its_function(tmp_path):
    assert_fails(EXERCISES[0], tmp_path / "copy")


@pytest.mark.slow
@pytest.mark.parametrize("exercise", EXERCISES[1:], ids=[e.function for e in EXERCISES[1:]])
def test_every_exercise_fails_without_its_function(exercise, tmp_path):
    assert_fails(exercise, tmp_path / "copy")


# ---- research in one file ------------------------------------------------------------------------

def the_diff():
    """The hunks of the worked example: (lines of dino.py, lines of mine.py), and lines added."""
    block = re.search(r"```diff\n(.*?)```", exercises.PAGE.read_text(), re.S)[1]
    lines = [line for line in block.splitlines(keepends=True) if line.startswith("+")]
    hunks = []
    for hunk in re.split(r"^@@.*\n", block, flags=re.M)[1:]:
        before = [line[1:] for line in hunk.splitlines(keepends=True) if line[0] in " -"]
        after = [line[1:] for line in hunk.splitlines(keepends=True) if line[0] in " +"]
        hunks.append(("".join(before), "".join(after)))
    return hunks, [line for line in lines if line.strip("+\n")]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """mine.py: dino.py with the ten lines of the worked example."""
    text = (ROOT / "dino.py").read_text()
    for before, after in the_diff()[0]:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("mine")
    del sys.modules["mine"]


def test_the_worked_example_changes_ten_lines_and_trains(mine):
    assert len(the_diff()[1]) == 10
    torch.manual_seed(0)
    tiny = dict(dim=32, ffn_dim=48, decoder_layers=2, num_queries=9)
    cfg, recipe = configure(mine, mine.SMALL, tiny)
    model, criterion = mine.build(cfg, num_classes=5)
    optimizer = torch.optim.AdamW(mine.param_groups(model, recipe))
    ema = train.make_ema(model, 0.9)
    for _ in range(2):
        losses, _, finite = train.step(model, model, criterion, optimizer, ema,
                                       [batch((64, 96), (48, 64))], recipe.clip, Machine())
        assert finite
    assert losses["cls"] > 0 and losses["dn.cls"] > 0 and losses["enc.cls"] > 0


def test_the_worked_example_learns_the_iou_of_matched_queries_and_zero_for_others(mine):
    """Two queries on one object, of IoU 1 and 1/3, and a background query; classes 0 and 1."""
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.6, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]])
    targets = torch.stack([boxes[0], boxes[0], torch.zeros(4)])
    logits = torch.zeros(3, 2, requires_grad=True)
    loss = mine.iou_aware_loss(logits, torch.tensor([1, 1, 2]), boxes, targets)
    binary = math.log(2)     # the cross-entropy of p = 1/2 with any target
    expected = [[0.75 / 4, 1.0], [0.75 / 4, 1 / 3], [0.75 / 4, 0.75 / 4]]
    assert torch.allclose(loss, binary * torch.tensor(expected), atol=1e-4)
    loss.sum().backward()
    assert logits.grad[0, 1] < 0 < logits.grad[1, 1] < logits.grad[2, 1]
