"""Remove a function of this repository, so that you can write it yourself: see EXERCISES.md.

    python -m tools.exercises 3    remove the body of the function of exercise 3
    git diff                       compare yours with ours
    git checkout FILE              bring ours back
"""
import ast
import re
import textwrap
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from engine.errors import UserError, user_errors
from engine.files import complete_file
from engine.flags import one_line_usage

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "EXERCISES.md"
PATTERN = re.compile(
    r"^### \d+\. (?P<title>.*?)$.*?"
    r"\*\*Write\*\* `(?P<function>\S+)` in `(?P<file>\S+)`.*?"
    r"\*\*Test\*\* `python -m pytest (?P<test>\S+)`", re.M | re.S)
REMOVED = "raise NotImplementedError"


class Exercise(NamedTuple):
    title: str
    function: str    # NAME or CLASS.NAME
    file: str
    test: str        # FILE::NAME, which fails until the function is written


def read_exercises() -> list[Exercise]:
    """The exercises of EXERCISES.md, in order."""
    return [Exercise(**match.groupdict()) for match in PATTERN.finditer(PAGE.read_text())]


def remove(text: str, file: str, function: str) -> str:
    """The text of a file without the body of a function."""
    cut = remove_from_cpp if file.endswith(".cpp") else remove_from_python
    return cut(text, function)


def remove_from_python(text: str, function: str) -> str:
    """Keep the signature and the docstring, and raise NotImplementedError."""
    # the function: a child of the file, or of its class
    node = ast.parse(text)
    for name in function.split("."):
        children = [child for child in node.body if getattr(child, "name", "") == name]
        if len(children) != 1:
            raise UserError(f"expected one {function}, got {len(children)}")
        node = children[0]
    # the body, without the docstring
    body = node.body
    first = body[1] if ast.get_docstring(node) is not None and len(body) > 1 else body[0]
    lines = text.splitlines(keepends=True)
    line = " " * body[0].col_offset + REMOVED + "\n"
    return "".join([*lines[:first.lineno - 1], line, *lines[node.end_lineno:]])


def remove_from_cpp(text: str, function: str) -> str:
    """Leave the body of a C++ function empty."""
    start = re.search(rf"void {function}\([^)]*\) {{\n", text)
    if start is None:
        raise UserError(f"expected one {function}, got none")
    depth = 1
    end = start.end()
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[:start.end()] + "  // write this\n}" + text[end:]


def main(number: Annotated[int, tyro.conf.arg(metavar="NUMBER")]) -> None:
    """Remove the function of an exercise from this copy of the repository.

    Args:
        number: Number of the exercise in EXERCISES.md.
    """
    exercises = read_exercises()
    if not 1 <= number <= len(exercises):
        raise UserError(f"expected an exercise from 1 to {len(exercises)}, got {number}")
    exercise = exercises[number - 1]
    path = ROOT / exercise.file
    text = remove(path.read_text(), exercise.file, exercise.function)
    with complete_file(path) as temporary:
        temporary.write_text(text)
    print(textwrap.dedent(f"""\
        {exercise.title}: {exercise.function} in {exercise.file} is empty now.
        Write it until this passes:  python -m pytest {exercise.test}
        Compare:                     git diff {exercise.file}
        Bring ours back:             git checkout {exercise.file}"""))


if __name__ == "__main__":
    with user_errors("tools.exercises"), one_line_usage("python -m tools.exercises", None):
        tyro.cli(tyro.conf.configure(tyro.conf.Positional)(main), prog="python -m tools.exercises")
