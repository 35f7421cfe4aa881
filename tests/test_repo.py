"""Promises of the repository as a whole: who imports whom, what parents may not know, what the README says."""
import ast
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {path.stem: path for path in [*ROOT.glob("*.py"), *ROOT.glob("engine/*.py"), *ROOT.glob("tools/*.py")]}
MODULES["backbones"] = ROOT / "backbones" / "__init__.py"
MODULES["heads"] = ROOT / "heads" / "__init__.py"
CITES = {   # a paper file imports the parts it builds on, and nothing else
    "boxes": set(), "deformable_attn": {"deformable_attn_build"}, "deformable_attn_build": set(),
    "backbones": set(),
    "matcher": {"boxes"},
    "detr": {"boxes", "backbones", "matcher"},
    "deformable_detr": {"boxes", "deformable_attn", "backbones", "detr", "matcher"},
    "dino": {"boxes", "backbones", "matcher", "deformable_detr"},
    "h_detr": {"backbones", "matcher", "deformable_detr"},
    "co_detr": {"boxes", "backbones", "matcher", "deformable_detr", "dino", "h_detr", "heads"},
    "masks": set(),
    "mask_frozen_detr": {"boxes", "masks", "backbones", "matcher", "deformable_detr", "heads"},
}
CHILDREN = {"detr": ("deformable", "h_detr", "dino", "co_detr", "mask_frozen"),
            "deformable_detr": ("h_detr", "dino", "co_detr", "mask_frozen"), "dino": ("co_detr", "mask_frozen"),
            "matcher": ("h_detr", "co_detr", "mask_frozen"), "h_detr": ("co_detr", "mask_frozen")}
README = (ROOT / "README.md").read_text()


def imports(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in ("engine", "tools"):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("engine", "tools"):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names & MODULES.keys()


@pytest.mark.parametrize("name", CITES)
def test_the_import_graph_is_the_citation_graph(name):
    assert imports(MODULES[name]) - {name, "errors", "recipe", "schedules"} == CITES[name]


@pytest.mark.parametrize("parent", CHILDREN)
def test_a_parent_never_names_its_children_in_code(parent):
    tree = ast.parse(MODULES[parent].read_text())
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
        n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} | {
        n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    assert not [n for n in names for child in CHILDREN[parent] if child in n.lower()]


def commands():
    """Every line of the README's shell blocks that runs one of our scripts."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S)
    lines = [part.strip() for block in blocks for line in block.splitlines() for part in line.split("#")[0].split("&&")]
    return [line for line in lines if re.match(r"(torchrun .*|python )(-m pytest|\w+\.py)", line)]


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_parses(command, monkeypatch):
    words = shlex.split(command)
    if "pytest" in words:
        assert all((ROOT / w).exists() for w in words[words.index("pytest") + 1:] if not w.startswith("-"))
        return
    script = next(w for w in words if w.endswith(".py"))
    assert (ROOT / script).exists()
    arguments = words[words.index(script) + 1:]
    module = __import__(script[:-3])
    if script == "train.py":
        if "--help" in arguments:
            with pytest.raises(SystemExit, match="0"):
                module.parse(arguments)
        elif "--resume" not in arguments:
            module.parse(arguments)
    else:
        flags = {a.split("=")[0].replace("-", "_") for a in arguments if a.startswith("--")}
        source = MODULES[script[:-3]].read_text().replace("-", "_")
        assert all(flag in source or flag[2:] in source for flag in flags), flags


def test_the_line_counts_of_the_readme_are_current():
    rows = re.findall(r"^\|\s*`(\w+\.(?:py|cu|cpp))`.*\|\s*(\d+)\s*\|", README, re.M)
    assert rows, "the README lists files with their lines"
    for name, lines in rows:
        actual = len((ROOT / name).read_text().splitlines())
        assert abs(actual - int(lines)) <= max(5, actual // 20), f"{name} has {actual} lines, the README says {lines}"


@pytest.mark.parametrize("name", ["detr", "deformable_detr", "dino", "h_detr", "co_detr", "mask_frozen_detr"])
def test_every_function_a_docstring_maps_a_section_to_exists(name):
    """From a paper's contribution to the line: the table at the top of each paper file stays true."""
    text = MODULES[name].read_text()
    docstring = ast.get_docstring(ast.parse(text))
    table = docstring.split("here\n", 1)[1].split("\n\n", 1)[0]
    for line in table.splitlines():
        for target in re.split(r"\s{2,}", line.strip())[-1].split(","):
            leaf = target.strip().split(" ")[0].strip("`").split(".")[-1]
            assert re.search(rf"\b{leaf}\b", text.split('"""', 2)[2]), f"{name}.py: {line.strip()}"


def test_no_file_names_a_machine():
    pattern = re.compile("/" + "work/|/" + "root/|TO" + "DO|FIX" + "ME")
    for path in [*ROOT.glob("*.*"), *(ROOT / "tests").glob("*.*")]:
        if path.suffix in (".py", ".md", ".txt", ".cu", ".cpp", ".h"):
            assert not pattern.search(path.read_text()), path.name
