"""What README.md, GUIDE.md and RESULTS.md say is true: commands, files, names of tests."""
import ast
import functools
import importlib
import json
import re
import shlex
import sys
import textwrap
import types

import pytest
import torch
import tyro

import analysis
import dino
import eval as evaluation
import scenes
import train
import visualize
from engine.recipe import configure
from source_files import MODULES, PAPERS, ROOT
from test_repo import GRAPH, parts_of
from tools import (ablations, bench, check_data, convert, exercises, export, follow_image,
                   layer_analysis, predict_memory, reduce_log, ship)

PAGES = {path.name: path.read_text() for path in sorted(ROOT.glob("*.md"))}
README = PAGES["README.md"]
README_LINES = 250
LAUNCHERS = r"python -m |python \w+\.py|torchrun "


# ---- commands ------------------------------------------------------------------------------------

def commands():
    """Every line of a shell block and every text in backticks that runs one of our programs."""
    found = []
    for page in PAGES.values():
        blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", page, re.S)
        lines = [line.split("  #")[0] for block in blocks for line in block.splitlines()]
        inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page, flags=re.S))
        for text in [*lines, *inline]:
            found += [part.strip() for part in re.split(r"&&|: ", text)]
    ours = [text for text in found if re.match(LAUNCHERS, text) and "..." not in text]
    return list(dict.fromkeys(ours))


def program_and_arguments(command):
    """train, [--model, dino, ...]"""
    words = shlex.split(command)
    if words[1] == "-m":
        return words[2], words[3:]
    place = next(place for place, word in enumerate(words) if word.endswith(".py"))
    return words[place].removesuffix(".py"), words[place + 1:]


def parse_train(arguments):
    if "--resume" in arguments:
        arguments = [word for word in arguments if word != "--resume"]   # it would read a file
    train.parse(["dino" if word == "mine" else word for word in arguments])


def parse_options(options, arguments):
    tyro.cli(options, args=arguments, use_underscores=True)


def parse_function(function, arguments):
    """Parse without calling the function."""
    @functools.wraps(function)
    def nothing(*args, **options):
        pass
    tyro.cli(nothing, args=arguments, use_underscores=True)


def parse_table(functions, arguments):
    name, *rest = arguments
    parse_function(functions[name], rest)


def parse_bench(arguments):
    if arguments:
        parse_table(bench.COMMANDS, arguments)


def parse_ablations(arguments):
    if arguments[0].startswith("--"):
        arguments = ["compare", *arguments]
    parse_options(ablations.COMMANDS[arguments[0]], arguments[1:])


def parse_convert(arguments):
    """The pages write --from yolo|voc|csv."""
    choices = [word.partition("|")[0] for word in arguments]
    parse_options(convert.Options, choices)


def parse_pytest(arguments):
    for word in arguments:
        path, _, name = word.partition("::")
        assert word.startswith("-") or (ROOT / path).exists(), word
        assert not name or f"def {name}(" in (ROOT / path).read_text(), word


def parse_exercises(arguments):
    assert 1 <= int(arguments[0]) <= len(exercises.read_exercises())


def parse_visualize(arguments):
    if arguments == ["--help"]:
        raise SystemExit(0)
    parse_table(visualize.COMMANDS, arguments)


def parse_nothing(arguments):
    assert not arguments


PROGRAMS = {
    "tools.predict_memory": predict_memory.recipes,
    "train": parse_train,
    "eval": functools.partial(parse_options, evaluation.Options),
    "analysis": functools.partial(parse_options, analysis.Options),
    "scenes": functools.partial(parse_options, scenes.Options),
    "visualize": parse_visualize,
    "deformable_attn": parse_nothing,
    "tools.bench": parse_bench,
    "tools.ablations": parse_ablations,
    "tools.convert": parse_convert,
    "tools.follow_image": functools.partial(parse_options, follow_image.Options),
    "tools.layer_analysis": functools.partial(parse_options, layer_analysis.Options),
    "tools.ship": functools.partial(parse_options, ship.Options),
    "tools.exercises": parse_exercises,
    "tools.check_data": functools.partial(parse_function, check_data.main),
    "tools.export": functools.partial(parse_options, export.Options),
    "tools.reduce_log": functools.partial(parse_function, reduce_log.reduce_log),
    "pytest": parse_pytest}


def test_the_pages_show_commands():
    assert len(commands()) > 10


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command):
    program, arguments = program_and_arguments(command)
    if "--help" in arguments:
        with pytest.raises(SystemExit, match="0"):
            PROGRAMS[program](arguments)
    else:
        PROGRAMS[program](arguments)


def test_python_examples_import_what_exists():
    for page in PAGES.values():
        for block in re.findall(r"```python\n(.*?)```", page, re.S):
            for node in ast.parse(block).body:
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names)


def python_block(word):
    """The one Python block of GUIDE.md that has this word."""
    blocks = re.findall(r"```python\n(.*?)```", PAGES["GUIDE.md"], re.S)
    block, = [text for text in blocks if word in text]
    return block


def test_the_backbone_of_the_guide_trains_a_detector():
    """Together with its loss, in a copy of dino.py."""
    place = "        return losses\n\n    def groups"
    source = (ROOT / "dino.py").read_text()
    assert source.count(place) == 1
    loss = textwrap.indent(python_block("log_size"), "        ")
    own = types.ModuleType("mine")
    sys.modules["mine"] = own        # where dataclasses finds the annotations
    try:
        exec(source.replace(place, loss + place), vars(own))
    finally:
        del sys.modules["mine"]
    exec(python_block("class Plain"), vars(own))
    cfg, _ = configure(dino, dino.SMALL, {"dim": 32, "num_heads": 2, "ffn_dim": 32})
    model = own.DINO(own.Plain(), cfg, 3)
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}]
    images = torch.randn(1, 3, 64, 64)
    outputs = model(images, torch.zeros(1, 64, 64, dtype=torch.bool), targets)
    losses = own.Criterion(cfg)(outputs, targets, 1)
    sum(losses.values()).backward()
    assert losses["log_size"] > 0 and model.backbone.stages[0].weight.grad.abs().sum() > 0


# ---- pieces to copy ------------------------------------------------------------------------------

def pieces():
    """What the table of GUIDE.md tells to copy, for pieces that are files: their modules."""
    table = PAGES["GUIDE.md"].partition("| piece | files to copy |\n")[2].partition("\n\n")[0]
    found = []
    for line in table.splitlines()[1:]:
        files = line.split(" | ")[1].strip("| ").split(", ")
        names = [name.strip("`").removesuffix("/") for name in files]
        if all((ROOT / name).exists() for name in names):
            found.append([name.removesuffix(".py").replace("/", ".") for name in names])
    return found


@pytest.mark.parametrize("piece", pieces(), ids=" ".join)
def test_the_files_of_a_piece_import_no_other_file_of_ours(piece):
    copied = {part for name in piece for part in parts_of(name)}
    copied |= {name.partition(".")[0] for name in piece}
    for part in copied & GRAPH.keys():
        assert GRAPH[part] <= copied, part


def test_the_table_has_pieces_that_are_files():
    assert len(pieces()) >= 7


def passage(file, first, last=""):
    """The source of the definitions of a file from `first` to `last`."""
    source = (ROOT / file).read_text()
    nodes = {}
    for node in ast.parse(source).body:
        name = node.targets[0].id if isinstance(node, ast.Assign) else getattr(node, "name", "")
        nodes[name] = node
    lines = source.splitlines()
    return "\n".join(lines[nodes[first].lineno - 1:nodes[last or first].end_lineno])


COPIED_IMPORTS = """
import math
from typing import NamedTuple
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, inverse_sigmoid
from matcher import Matches, copy_to_device
"""


def test_the_passage_about_denoising_queries_works_copied():
    own = {}
    for part in (("EPS",), ("MAX_DENOISING_QUERIES",), ("Denoising", "denoising_mask")):
        assert all(f"`{name}`" in PAGES["GUIDE.md"] for name in part)
        exec(COPIED_IMPORTS + passage("dino.py", *part), own)
    cfg = types.SimpleNamespace(denoising="contrastive", dn_number=100, dn_label_noise=0.5,
                                dn_box_noise=1.0)
    targets = [{"labels": torch.tensor([1, 0]), "boxes": torch.full((2, 4), 0.5)}]
    queries = own["denoising_queries"](targets, torch.nn.Embedding(3, 8), 3, cfg, 10)
    assert queries.content.shape == (1, 200, 8) and queries.attn_mask.shape == (210, 210)


def test_the_passage_about_tokens_and_references_works_copied():
    own = {}
    for file, *part in (("detr.py", "sine_embedding"), ("deformable_detr.py", "Memory"),
                        ("deformable_detr.py", "flatten_pyramid", "encoder_references")):
        assert all(f"`{name}`" in PAGES["GUIDE.md"] for name in part)
        exec(COPIED_IMPORTS + passage(file, *part), own)
    maps = [torch.randn(1, 64, 8, 8), torch.randn(1, 64, 4, 4)]
    padding = torch.zeros(1, 64, 64, dtype=torch.bool)
    memory = own["flatten_pyramid"](maps, padding, torch.zeros(2, 64), [], {})
    assert own["encoder_references"](memory).shape == (1, 80, 2, 2)


def test_the_replay_of_a_log_writes_every_scalar(tmp_path, monkeypatch):
    block = python_block("tensorboard")
    written = []
    writer = types.SimpleNamespace(add_scalar=lambda *scalar: written.append(scalar),
                                   close=lambda: None)
    stub = types.ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = lambda folder: writer
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    monkeypatch.setattr(torch.utils, "tensorboard", stub, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/dino").mkdir(parents=True)
    lines = [{"kind": "step", "step": 10, "loss": 3.0, "lr": 0.1, "losses": {"l1": 2.0}},
             {"kind": "eval", "step": 12, "AP": 0.5, "bbox": {}}]
    (tmp_path / "runs/dino/log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    exec(block, {})
    assert written == [("loss", 3.0, 10), ("lr", 0.1, 10), ("losses/l1", 2.0, 10), ("AP", 0.5, 12)]


# ---- the README ----------------------------------------------------------------------------------

def test_the_readme_has_at_most_250_lines():
    assert len(README.splitlines()) <= README_LINES


def test_the_line_counts_of_the_readme_are_current():
    rows = re.findall(r"^\|\s*`([\w/]+\.(?:py|cu|cpp))`.*\|\s*(\d+)\s*\|", README, re.M)
    assert rows, "the README lists files with their lines"
    for name, lines in rows:
        actual = len((ROOT / name).read_text().splitlines())
        near = abs(actual - int(lines)) <= max(5, actual // 20)
        assert near, f"{name} has {actual} lines, the README says {lines}"


def test_the_readme_lists_every_file_at_the_top_level():
    rows = set(re.findall(r"^\|\s*`([\w/]+(?:\.py|/))`", README, re.M))
    there = {f"{name}.py" for name in MODULES if "." not in name} - {"backbones.py", "heads.py"}
    assert there <= rows, there - rows


def graph_edges(text):
    """`child --> parent` of a mermaid block, by module name."""
    edges = set()
    for line in text.splitlines():
        nodes = [node.strip() for node in line.split("-->")]
        names = [re.sub(r"[\[(].*", "", node) for node in nodes]
        edges |= set(zip(names, names[1:]))
    return edges


def test_the_import_graph_of_the_readme_is_what_the_files_import():
    """Every paper file is in it. Files that all papers use may be left out altogether."""
    block = re.search(r"```mermaid\nflowchart BT\n(.*?)```", README, re.S)
    assert block, "the README has a mermaid block that begins with: flowchart BT"
    edges = graph_edges(block[1])
    nodes = {name for edge in edges for name in edge}
    assert set(PAPERS) <= nodes
    expected = set()
    for name in nodes:
        imported = set().union(*(GRAPH[part] for part in parts_of(name)))
        parents = {module.partition(".")[0] for module in imported} & nodes - {name}
        expected |= {(name, parent) for parent in parents}
    lines = "\n".join(f"    {child} --> {parent}" for child, parent in sorted(expected))
    assert edges == expected, f"expected\n{lines}"


# ---- names ---------------------------------------------------------------------------------------

def test_every_test_that_a_page_names_exists():
    texts = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    tests = set(re.findall(r"def (test_\w+)\(", texts))
    for name, page in PAGES.items():
        named = set(re.findall(r"`(test_\w+)`", page))
        assert named <= tests, f"{name}: {sorted(named - tests)}"


def test_every_file_that_a_page_names_exists():
    for name, page in PAGES.items():
        files = re.findall(r"`((?:tests|engine|tools|heads|backbones|assets)/[\w./]*)`", page)
        files += re.findall(r"\]\((assets/[^)]*)\)", page)
        missing = [file for file in files if not (ROOT / file).exists()]
        assert not missing, f"{name}: {missing}"


def test_no_log_names_a_folder_of_the_machine_it_was_made_on():
    logs = sorted((ROOT / "assets" / "logs").rglob("*.jsonl"))
    assert logs
    for log in logs:
        settings = json.loads(log.read_text().splitlines()[0])
        absolute = [value for value in settings["run"].values() if str(value).startswith("/")]
        assert not absolute, f"{log.relative_to(ROOT)}: {absolute}"
