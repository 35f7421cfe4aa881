"""EXERCISES.md: every function that it removes fails the test that it names."""
import os
import shutil
import subprocess
import sys

import pytest

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
