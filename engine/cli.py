"""The command line of train.py: flags -> Run, Config and Recipe.

Every field of the three is a flag; the comment beside a field is its help. A flag overrides the
variant, which overrides SMALL (with --preset small), which overrides the paper file's defaults.
`registry`, how tyro reads and shows values, also serves eval.py and analysis.py."""
import dataclasses
import os
import typing
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

from engine import checkpoints
from engine.errors import UserError
from engine.flags import one_line_usage
from engine.models import load_paper, paper_files
from engine.ranges import check_ranges
from engine.recipe import configure, override, preset_values
from engine.schedules import other_length

CHANGEABLE_ON_RESUME = {
    "model", "out", "resume", "detector", "device", "workers", "threads", "eval_every",
    "save_every", "keep_every", "max_steps", "accum", "amp", "recompute", "compile",
    "channels_last", "impl", "deterministic"}
OVERFIT_EPOCHS = 30
# Flags of other programs, and what they are called here.
OTHER_NAMES = {
    **dict.fromkeys(("imgsz", "img", "img_size", "image_size"), "--train_sizes and --eval_size"),
    **dict.fromkeys(("weights", "pretrained", "load_from"), "--init"),
    **dict.fromkeys(("project", "output_dir", "work_dir"), "--out"),
    **dict.fromkeys(("coco_path", "data_path", "dataset"), "--data"),
    **dict.fromkeys(("num_classes", "nc", "names"), "in the json of --data: nothing is to be set"),
}

registry = ConstructorRegistry()


@dataclasses.dataclass
class Settings:
    """Field names are the headings of the help."""
    run: Any
    architecture: Any
    training: Any


def parse(argv: list[str], run_class, description: str) -> tuple:
    """Command line -> run, Config, Recipe."""
    argv = split_flags(argv)
    given = given_flags(argv)
    if "resume" in given:
        return parse_resume(argv, given, run_class, description)

    # these four decide what the defaults of all other flags are
    first = {name: given[name] for name in ("model", "variant", "preset", "data") if name in given}
    run = run_class(**first)
    run.preset = run.preset or ("paper" if run.data else "small")
    paper = load_paper(run.model)
    values = preset_values(paper, run.preset, run.variant)
    cfg, recipe = configure(paper, values)
    if given.get("epochs", "").isdigit():
        changes, text = other_length(paper, run.variant, recipe, int(given["epochs"]))
        if text and "lr_drop" in given:
            text += f", but --lr_drop {given['lr_drop']}"
        if text and run.preset == "paper" and os.environ.get("RANK", "0") == "0":
            print(text)
        cfg, recipe = configure(paper, values, changes)
    if given.get("overfit", "0") != "0":
        recipe = dataclasses.replace(recipe, epochs=OVERFIT_EPOCHS)

    usual_batch = recipe.batch_size
    run, cfg, recipe = read_flags(argv, run, cfg, recipe, paper, description)
    check_ranges(run, cfg, recipe)
    if run.overfit:
        cfg = override(cfg, {"dropout": 0.0})
        recipe = dataclasses.replace(recipe, schedule="flat")
    if "batch_size" in given and "lr" not in given:
        # learning rates follow the batch size in proportion
        for name in ("lr", "lr_backbone", "lr_offsets"):
            if name not in given:
                setattr(recipe, name, getattr(recipe, name) * recipe.batch_size / usual_batch)
    run.out = run.out or f"runs/{run.model}"
    return run, cfg, recipe


def parse_resume(argv, given, run_class, description) -> tuple:
    """A resumed run has the settings of its checkpoint; flags that contradict them are refused."""
    path = Path(given["resume"] or given.get("out") or f"runs/{given.get('model') or 'dino'}")
    if path.is_dir() or not given["resume"]:
        path, state = checkpoints.newest(path)
    else:
        state = checkpoints.load(path)
    checkpoints.check_fields(path, state, checkpoints.RESUME_FIELDS)
    paper = load_paper(state["model_name"])
    saved = saved_run(run_class, state, path)
    cfg, recipe = checkpoints.settings(paper, state)
    before = {**vars(saved), **vars(cfg), **vars(recipe)}
    run, cfg, recipe = read_flags(argv, saved, cfg, recipe, paper, description)
    after = {**vars(run), **vars(cfg), **vars(recipe)}
    for name in sorted(set(given) - CHANGEABLE_ON_RESUME):
        if name in before and after[name] != before[name]:
            if name == "data" and Path(after[name]).resolve() == Path(before[name]).resolve():
                continue     # the same folder by another path
            raise UserError(
                f"--resume continues with the saved settings ({path}), got another --{name} "
                f"{given[name]}: the run has {before[name]}; leave it out, or start a new run with "
                "--init and --out")
    if "detector" in given and state.get("detector"):
        raise UserError(f"--detector is for masks on a frozen detector, {path} has trained its "
                        "own: leave it out")
    run.model = saved.model
    run.resume = str(path)
    run.out = str(path.parent)
    check_ranges(run, cfg, recipe)
    return run, cfg, recipe


def saved_run(run_class, state: dict, path: Path):
    """The Run of a checkpoint, set to continue in the folder of the file at `path`."""
    known = {field.name for field in dataclasses.fields(run_class)}
    values = {name: x for name, x in state["run"].items() if name in known}
    missing = {"data", "out"} - values.keys()
    if missing:
        raise UserError(f"{path}: expected the settings of a run, got none for "
                        f"{', '.join(sorted(missing))}: the file is damaged")
    values["model"] = state["model_name"]
    values["detector"] = checkpoints.saved_detector(state)
    run = run_class(**{**values, "resume": str(path), "out": str(path.parent)})
    check_ranges(run)
    return run


def read_flags(argv, run, cfg, recipe, paper, description) -> tuple:
    """Let tyro read the flags into copies of the three. It prints the help, and names a similar
    flag for one that it does not know."""
    defaults = {**vars(run), **vars(cfg), **vars(recipe)}
    for name, text in given_flags(argv).items():
        if name in OTHER_NAMES and name not in defaults:
            raise UserError(f"expected a flag of train.py, got --{name}: it is here "
                            f"{OTHER_NAMES[name]}")
        if not text and isinstance(defaults.get(name), str) and name != "resume":
            raise UserError(f"--{name}: expected a value, got nothing")
    variants = ", ".join(getattr(paper, "VARIANTS", {})) or "none"
    description = description.strip() + (
        f"\n\nModels: {', '.join(paper_files())}. Variants of {run.model}: {variants}. The "
        f"defaults below are those of --model {run.model} --preset {run.preset}.")
    with one_line_usage("train.py"):
        settings = tyro.cli(
            make_settings(run, cfg, recipe), args=argv, default=Settings(run, cfg, recipe),
            prog="train.py", description=description, use_underscores=True, registry=registry,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff))
    return settings.run, settings.architecture, settings.training


def make_settings(run, cfg, recipe):
    """`Settings` with the dataclasses of this run; tyro reads the help in their source code."""
    parts = {"run": type(run), "architecture": type(cfg), "training": type(recipe)}
    return dataclasses.make_dataclass("Settings", list(parts.items()), bases=(Settings,))


# ---- flags as text -------------------------------------------------------------------------------

def split_flags(argv: list[str]) -> list[str]:
    """--lr-backbone=1 -> --lr_backbone 1"""
    words = []
    for word in argv:
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, value = word.partition("=")
        name = "--" + name[2:].replace("-", "_")
        words += [name, value] if equals else [name]
    return words


def given_flags(argv: list[str]) -> dict[str, str]:
    """Flag -> its words as text, whatever the type of the flag is."""
    given = {}
    name = ""
    for word in argv:
        if word.startswith("--"):
            name = word[2:]
            given[name] = ""
        elif name and word != "-h":
            given[name] = " ".join([given[name], word]).strip()
    return given


# ---- how tyro reads values -----------------------------------------------------------------------

@registry.primitive_rule
def booleans(info):
    """--amp, --amp true, --amp false"""
    if info.type not in (bool, bool | None):
        return None

    def read(words):
        text = " ".join(words).lower()
        if text not in ("", "true", "false", "1", "0"):
            raise ValueError(f"expected true or false, got '{text}'")
        return text in ("", "true", "1")

    return PrimitiveConstructorSpec(
        nargs="*", metavar="[true|false]", instance_from_str=read,
        is_instance=lambda x: x is None or isinstance(x, bool),
        str_from_instance=lambda x: ["auto" if x is None else str(x).lower()])


@registry.primitive_rule
def lists(info):
    """--train_sizes 480,512 or 480 512"""
    if typing.get_origin(info.type) is not tuple:
        return None
    kind = typing.get_args(info.type)[0]

    def read(words):
        return tuple(kind(part) for word in words for part in word.split(",") if part)

    return PrimitiveConstructorSpec(
        nargs="*", metavar=f"{kind.__name__.upper()},...", instance_from_str=read,
        is_instance=lambda x: isinstance(x, tuple),
        str_from_instance=lambda x: [",".join(map(str, x))])


@registry.primitive_rule
def texts(info):
    """A text of one word; an empty one is shown as "none"."""
    if info.type is not str:
        return None
    return text_spec(1)


def text_spec(nargs):
    return PrimitiveConstructorSpec(
        nargs=nargs, metavar="TEXT", instance_from_str=" ".join,
        is_instance=lambda x: isinstance(x, str), str_from_instance=lambda x: [x or "none"])


OptionalText = Annotated[str, text_spec("*")]   # --resume, or --resume FOLDER
