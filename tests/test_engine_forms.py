"""The form of json files and of checkpoints: what differs is named in a few words."""
import os

import pytest

from engine.errors import UserError
from engine.forms import mismatch, read_results

FORM = {"name": str, "count": int, "scores": {str: float}, "rows": [[float]]}
VALUE = {"name": "a", "count": 3, "scores": {"AP": 0.5}, "rows": [[1, 2.5], []], "more": None}


def test_a_value_of_the_form_has_no_mismatch():
    assert mismatch(VALUE, FORM) == ""


@pytest.mark.parametrize("changes, words", [
    ({"name": 3}, "name of type str, got 3"), ({"count": True}, "count of type int, got True"),
    ({"count": 2.0}, "count of type int"), ({"scores": []}, "scores of type dict"),
    ({"scores": {"AP": "1"}}, "a number as AP, got 1"),
    ({"scores": {"AP": float("nan")}}, "a number as AP, got nan"),
    ({"scores": {"AP": 1e300}}, "a number as AP"), ({"scores": {"AP": 10 ** 400}}, "a number"),
    ({"rows": [[None]]}, "an entry of an entry of rows"), ({"rows": [3]}, "an entry of rows")])
def test_what_differs_from_the_form_is_named(changes, words):
    assert words in mismatch({**VALUE, **changes}, FORM)


def test_missing_names_are_listed():
    assert mismatch({"name": "a"}, FORM).startswith("count, scores, rows in the file")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[1]", '{"a": "x"}', "\xff\x00",
                                  '{"a": ' + "1" * 5000 + "}"])
def test_a_file_of_another_form_is_one_line(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text, encoding="latin1")
    with pytest.raises(UserError, match="results.json: expected ") as refused:
        read_results(path, {"a": float})
    assert "\n" not in str(refused.value)


def test_a_pipe_or_a_folder_is_no_file_to_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="expected a file at"):
            read_results(path, {})
