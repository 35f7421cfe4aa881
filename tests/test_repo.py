"""Who imports whom, and what parents may not know."""
import ast
import re

import pytest

from source_files import MODULES, PAPERS

# What a paper file, or a part of one, builds on. It imports this and nothing else of ours, except
# HELPERS.
CITES = {
    "boxes": set(),
    "masks": set(),
    "deformable_attn_build": set(),
    "deformable_attn_operator": {"deformable_attn_build"},
    "deformable_attn": {"deformable_attn_build", "deformable_attn_operator"},
    "backbones": set(),
    "matcher": {"boxes"},
    "heads": {"boxes", "matcher"},
    "detr": {"boxes", "backbones", "matcher"},
    "deformable_detr": {"boxes", "deformable_attn", "backbones", "detr", "matcher"},
    "dino": {"boxes", "backbones", "matcher", "deformable_detr"},
    "h_detr": {"backbones", "matcher", "deformable_detr"},
    "co_detr_variants": set(),
    "co_detr_queries": {"boxes", "heads", "matcher", "deformable_detr"},
    "co_detr": {"boxes", "backbones", "heads", "matcher", "deformable_detr", "dino", "h_detr",
                "co_detr_queries", "co_detr_variants"},
    "frozen_detector": set(),
    "mask_frozen_detr": {"boxes", "masks", "backbones", "heads", "matcher", "deformable_detr",
                         "frozen_detector"}}
HELPERS = {"engine.errors", "engine.recipe", "engine.schedules"}

# Words that may not occur in the names of a parent's code.
CHILDREN = {
    "detr": ("deformable", "h_detr", "dino", "co_detr", "mask_frozen"),
    "deformable_detr": ("h_detr", "dino", "co_detr", "mask_frozen"),
    "dino": ("co_detr", "mask_frozen"),
    "matcher": ("h_detr", "co_detr", "mask_frozen"),
    "h_detr": ("co_detr", "mask_frozen")}


def imported_modules(name):
    """Names of our modules that a file imports, also within functions."""
    package = name.partition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found |= loaded(alias.name, package)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                module = submodule if submodule in MODULES else node.module
                found |= loaded(module, package)
    return found


def loaded(module, own_package):
    """Importing a.b runs a/__init__.py and a/b.py; in a file of a, the former runs already."""
    package = module.partition(".")[0]
    names = {module}
    if package != own_package:
        names.add(package)
    return names & MODULES.keys()


GRAPH = {name: imported_modules(name) for name in MODULES}


def parts_of(name):
    """A package with all its files, or one file."""
    return [module for module in MODULES if module == name or module.startswith(f"{name}.")]


@pytest.mark.parametrize("name", CITES)
def test_the_import_graph_is_the_citation_graph(name):
    imported = set()
    for part in parts_of(name):
        imported |= GRAPH[part] - HELPERS
    assert {module.split(".")[0] for module in imported} - {name} == CITES[name]


def test_every_paper_file_states_what_it_cites():
    assert set(PAPERS) <= CITES.keys()


def test_no_file_imports_itself_through_others():
    """No two files import each other, and there is no longer circle either."""
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name):], name])
        if name not in done:
            for module in sorted(GRAPH[name]):
                visit(module, [*path, name])
            done.add(name)

    for name in GRAPH:
        visit(name, [])


def test_only_train_imports_a_tool_and_only_the_check_of_data():
    for name, imported in GRAPH.items():
        if name.startswith("tools"):
            continue
        tools = {module for module in imported if module.startswith("tools")}
        expected = {"tools.check_data"} if name == "train" else set()
        assert tools == expected, name


@pytest.mark.parametrize("parent", CHILDREN)
def test_a_parent_never_names_its_children_in_code(parent):
    names = set()
    for node in ast.walk(ast.parse(MODULES[parent].read_text())):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    for child in CHILDREN[parent]:
        assert not [name for name in names if child in name.lower()]


@pytest.mark.parametrize("name", PAPERS)
def test_every_function_a_docstring_maps_a_section_to_exists(name):
    """From a paper's contribution to the line: the table at the top of each paper file."""
    text = MODULES[name].read_text()
    docstring = ast.get_docstring(ast.parse(text))
    code = text.split('"""', 2)[2]
    table = docstring.split("here\n", 1)[1].split("\n\n", 1)[0]
    for line in table.splitlines():
        functions = re.split(r"\s{2,}", line.strip())[-1]
        for function in functions.split(","):
            leaf = function.strip().split(" ")[0].strip("`").split(".")[-1]
            assert re.search(rf"\b{leaf}\b", code), f"{name}.py: {line.strip()}"
