"""How the source files look: their length, their density, and what they may not contain."""
import ast
import io
import re
import tokenize

import pytest

from source_files import MODULES, ROOT, files_of_tests, kernel_files

MAX_COLUMNS = 100
MAX_LINES = 700
READING_LIST = ("dino", "deformable_detr", "matcher", "boxes", "deformable_attn",
                "backbones.resnet")
READING_LINES = 1900
TOKENS = 13                                          # a code line at most
TOKENS_OF = {"train": 11, "eval": 11, "data": 11}    # the files that everybody reads
NO_TOKENS = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
             tokenize.ENCODING, tokenize.ENDMARKER}
SOURCES = [*MODULES.values(), *kernel_files()]


def names_of(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def docstring_lines(tree):
    """Numbers of the lines that docstrings fill."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body:
            first = node.body[0]
            if ast.get_docstring(node, clean=False) is not None:
                lines |= set(range(first.lineno, first.end_lineno + 1))
    return lines


def tokens_per_line(text):
    """Mean number of tokens of the lines with code: no docstrings, comments or empty lines."""
    docstrings = docstring_lines(ast.parse(text))
    count = 0
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_TOKENS and token.start[0] not in docstrings:
            count += 1
            lines |= set(range(token.start[0], token.end[0] + 1))
    return count / max(1, len(lines))


def test_tokens_are_counted_without_docstrings_and_comments():
    text = '"""One\ntwo."""\n\n# three\nx = 1   # four\ny = [x,\n     2]\n'
    assert tokens_per_line(text) == pytest.approx((3 + 7) / 3)


@pytest.mark.parametrize("name", MODULES)
def test_no_file_packs_more_into_its_lines_than_a_reader_can_unpack(name):
    limit = TOKENS_OF.get(name, TOKENS)
    assert round(tokens_per_line(MODULES[name].read_text()), 1) <= limit


@pytest.mark.parametrize("path", [*SOURCES, *files_of_tests()],
                         ids=names_of([*SOURCES, *files_of_tests()]))
def test_no_line_is_longer_than_100_columns(path):
    lines = path.read_text().splitlines()
    long = [number for number, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS]
    assert not long, f"lines {long[:20]}"


@pytest.mark.parametrize("path", SOURCES, ids=names_of(SOURCES))
def test_no_source_file_has_more_than_700_lines(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_dino_can_be_read_in_1900_lines():
    """The model and its loss, without leaving out a file on the way."""
    lines = {name: len(MODULES[name].read_text().splitlines()) for name in READING_LIST}
    assert sum(lines.values()) <= READING_LINES, lines


def test_no_file_names_a_machine():
    """Nor does one hold a note of something left to do."""
    pattern = re.compile("/" + "work/|/" + "root/|TO" + "DO|FIX" + "ME")
    texts = [*ROOT.glob("*.md"), *ROOT.glob("*.txt"), *(ROOT / ".ci").glob("*")]
    for path in [*SOURCES, *files_of_tests(), *texts]:
        assert not pattern.search(path.read_text()), path.name
