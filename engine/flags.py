"""Flags that tyro refuses end a program like every other mistake: in one line."""
import contextlib
import io
import re
import sys

from engine.errors import UserError

LONGEST = 400   # characters of the message
WORDS = {"invalid literal for int() with base 10:": "expected an integer, got",   # of Python
         "could not convert string to float:": "expected a number, got"}


@contextlib.contextmanager
def one_line_usage(program: str, argv=()):
    """Turn the framed message of tyro about wrong flags into a UserError of one line. Help stays
    as it is.

    argv: refuse empty values among these words; None: those of the command line"""
    refuse_empty(sys.argv[1:] if argv is None else argv)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        if not end.code:
            raise             # --help
        raise UserError(without_frame(said.getvalue(), program)) from None
    sys.stderr.write(said.getvalue())


def refuse_empty(words) -> None:
    """UserError for a flag without a value, such as that of a shell variable that is not set: it
    would be taken for a flag that was not given."""
    flag = "a value"
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            empty = equals and not value.strip()
        else:
            empty = not word.strip()
        if empty:
            raise UserError(f"{flag}: expected a value, got ''; leave the flag out")


def without_frame(text: str, program: str) -> str:
    """The sentences inside tyro's frame as one line."""
    lines = [line.strip("│┃| ") for line in text.splitlines()[1:]]     # the first is a title
    lines = [line for line in lines if re.search(r"\w", line)]
    sentences = " ".join(lines).partition("For full helptext")[0]
    sentences = re.sub(r"\s+", " ", sentences or text).strip(" .")
    for pythons, plain in WORDS.items():
        sentences = sentences.replace(pythons, plain)
    return f"{sentences[:LONGEST]}. See {program} --help"
