"""Flags that no program knows end in one line."""
import pytest

from engine.errors import UserError
from engine.flags import one_line_usage, without_frame
from small_runs import FLAGS
import analysis
import eval as evaluation
import scenes
import train
import visualize
from tools import check_data

PROGRAMS = {"train.py": train.main, "eval.py": evaluation.main, "analysis.py": analysis.main,
            "visualize.py": visualize.main, "scenes.py": scenes.main,
            "tools.check_data": check_data.main}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("words", [["--nothing", "3"], ["--nothing"], ["--nothing=\ud800"]])
def test_wrong_flags_end_in_one_line_that_begins_with_the_name_of_the_program(program, words):
    with pytest.raises(SystemExit) as end:
        PROGRAMS[program](words)
    assert end.value.code.startswith(f"{program}: error: ") and "\n" not in end.value.code
    assert "--help" in end.value.code
    assert "──" not in end.value.code and "--- " not in end.value.code


@pytest.mark.parametrize("program, words, flag", [
    ("train.py", ["--data="], "--data"), ("eval.py", ["--checkpoint=x", "--json", ""], "--json"),
    ("eval.py", ["--images", "a.jpg", " "], "--images"), ("analysis.py", ["--data="], "--data"),
    ("visualize.py", ["strip", "--data", ""], "--data"), ("scenes.py", ["--write="], "--write"),
    ("tools.check_data", [""], "a value")])
def test_an_empty_value_is_not_taken_for_a_flag_that_was_not_given(program, words, flag):
    with pytest.raises(SystemExit, match=f"^{program}: error: {flag}: expected a value, got "):
        PROGRAMS[program](words)


def test_the_near_name_stays_in_the_line():
    with pytest.raises(SystemExit, match=r"Unrecognized options: --lrr, 3 .*--lr FLOAT"):
        train.main([*FLAGS, "--lrr", "3"])


@pytest.mark.parametrize("words, expected", [
    (["--epochs", "1x"], "an integer, got '1x'"), (["--lr", "abc"], "a number, got 'abc'"),
    (["--train_sizes", "128", "160x"], "an integer, got '160x'")])
def test_a_word_in_place_of_a_number_is_named_with_its_flag(words, expected):
    with pytest.raises(SystemExit, match=f"Error parsing {words[0]}: expected {expected}"):
        train.main([*FLAGS, *words])


@pytest.mark.parametrize("frame", ["│ {} │", "| {} |", "  {}  "])
def test_every_kind_of_frame_is_removed(frame):
    lines = ["Unrecognized options: --x", "─" * 20, "For full helptext, run a.py --help"]
    text = "\n".join(["╭─ Title ─╮", *map(frame.format, lines), "╰──────╯"])
    assert without_frame(text, "a.py") == "Unrecognized options: --x. See a.py --help"


def test_help_is_left_as_it_is(capsys):
    with pytest.raises(SystemExit) as end, one_line_usage("a.py"):
        raise SystemExit(0)
    assert end.value.code == 0


def test_other_errors_pass_through():
    with pytest.raises(UserError, match="another"), one_line_usage("a.py"):
        raise UserError("another")
