"""Paper files by name, and checkpoint files as models."""
import importlib
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from backbones import PUBLISHED, load_backbone_weights
from engine import checkpoints, class_rows
from engine.assets import find_weights, start_for
from engine.errors import UserError
from engine.layers import freeze_backbone, order_channels_last, prepare_attention
from engine.recipe import Recipe
from engine.released import convert

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = ("Config", "RECIPE", "build", "param_groups", "detect")   # see train.py


def paper_files() -> list[str]:
    """Names of the model files beside train.py: those that define Config, RECIPE and build."""
    names = []
    for path in sorted(ROOT.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if re.search(r"^class Config\b", text, re.M) and re.search(r"^RECIPE\b", text, re.M) \
                and re.search(r"^def build\(", text, re.M):
            names.append(path.stem)
    return names


def load_paper(name: str):
    """Import a paper file. Only files of `paper_files` are imported, by their exact name: a
    checkpoint could name any module, and importing runs it."""
    known = paper_files()
    if name not in known:
        raise UserError(f"expected a model among {', '.join(known)}, got {name!r}: a model is a "
                        "file beside train.py with the contract that train.py states")
    paper = importlib.import_module(name)
    missing = [part for part in CONTRACT if not hasattr(paper, part)]
    if missing:
        raise UserError(f"expected {name}.py to have {', '.join(CONTRACT)}, got none of the name "
                        f"{missing[0]}: see the contract in train.py")
    return paper


class Loaded(NamedTuple):
    """A model from a checkpoint, with its settings."""
    model: nn.Module        # in evaluation mode; the EMA weights where there are any
    paper: object           # module of the paper file: `paper.detect`, `paper.build`
    cfg: object             # its Config
    recipe: Recipe
    meta: dict              # class_names, category_ids, model_name, step, run, ...
    criterion: nn.Module


def load_model(path: str | Path, device="cpu", variant: str = "", detector: str = "",
               masks: bool = True) -> Loaded:
    """Load a checkpoint of ours or a released one.

    path: a file, or whatever `find_weights` reads.
    variant: one of the paper file's VARIANTS, for what a released file does not show (`dc5`).
    detector: path of a mask network's frozen detector; default: its path when it was trained. A
    network that trained its detector has it in its own checkpoint.
    masks: False refuses a mask network."""
    path = find_weights(path)
    state = checkpoints.load(path)
    if "model_name" not in state:
        state = convert(state, path, variant)
    elif variant:
        raise UserError(f"--variant is for released weights, {path} knows its own settings: "
                        "leave it out")
    paper = load_paper(state["model_name"])
    cfg, recipe = checkpoints.settings(paper, state)
    names = state["class_names"]
    weights = state.get("ema", state["model"])
    parts = [cfg, len(names)]
    if getattr(paper, "NEEDS_DETECTOR", False):
        if not masks:
            raise UserError(f"expected a detector, got {path}, a mask network: give the detector "
                            "it was trained on")
        carried = state.get("detector")
        if carried and detector:
            raise UserError(f"--detector is for masks on a frozen detector, {path} has trained its "
                            "own: leave it out")
        if carried:
            parts.append(carried_detector(carried, weights, path))
        else:
            parts.append(load_detector(detector or checkpoints.saved_detector(state)))
    # a damaged file may ask for a model that no memory holds: compare the shapes first
    with torch.device("meta"):
        checkpoints.check_fit(paper.build(*parts)[0], weights, path)
    checkpoints.require_finite(weights, path)
    model, criterion = paper.build(*parts)
    checkpoints.load_weights(model, weights, path)
    meta = {key: x for key, x in state.items() if key not in ("model", "ema", "optimizer", "rng")}
    return Loaded(model.to(device).eval(), paper, cfg, recipe, meta, criterion)


def build_model(paper, cfg, num_classes: int, detector: str, resume: str = "") -> tuple:
    """Build a model with random weights, and its criterion.

    detector: checkpoint of the trained detector, for a paper file that needs one. resume: the
    checkpoint to continue from, if any; a detector that it carries is used instead."""
    if getattr(paper, "NEEDS_DETECTOR", False):
        return paper.build(cfg, num_classes, starting_detector(detector, resume))
    if detector:
        raise UserError(f"expected no --detector with --model {paper.__name__}, which adds no "
                        f"masks to one, got {detector}: --init starts from its weights")
    return paper.build(cfg, num_classes)


def starting_detector(path: str, resume: str) -> Loaded:
    """The detector of a mask network: the one that the run to resume has trained, if it has, else
    that of a file."""
    if resume:
        state = checkpoints.load(resume)
        if state.get("detector"):
            return carried_detector(state["detector"], state["model"], resume)
    return load_detector(path)


def require_detector(path: str) -> None:
    """UserError where a mask network got no detector."""
    if not path:
        raise UserError("expected --detector FILE, a trained detector to put masks on, got none: "
                        "python train.py --model dino makes runs/dino/best.pt, with --data DIR on "
                        "your own images")


def load_detector(path: str) -> Loaded:
    """Load the detector that a mask network builds on, without the unused classes of COCO heads."""
    require_detector(path)
    path = find_weights(path)
    if not path.is_file():
        raise UserError(f"expected the detector at {path}, found no file: say where it lies with "
                        "--detector FILE")
    loaded = load_model(path, masks=False)   # a damaged file may name itself
    model, names = class_rows.without_unused(loaded.model, loaded.paper, loaded.cfg,
                                             loaded.meta["class_names"])
    return loaded._replace(model=model, meta={**loaded.meta, "class_names": names})


def carried_detector(description: dict, weights: dict, path: str | Path) -> Loaded:
    """The detector that a mask network trained and has among its weights, as "detector.NAME"."""
    paper = load_paper(description["model_name"])
    cfg, recipe = checkpoints.settings(paper, description)
    names = description["class_names"]
    own = {}
    for name, value in weights.items():
        if name.startswith("detector."):
            own[name.removeprefix("detector.")] = value
    with torch.device("meta"):
        checkpoints.check_fit(paper.build(cfg, len(names))[0], own, path)
    model, criterion = paper.build(cfg, len(names))
    return Loaded(model, paper, cfg, recipe, {"class_names": names}, criterion)


def start_weights(run, cfg, model, class_names: list[str]) -> list[str]:
    """Fill a fresh model from --init, or its backbones from --backbone_weights. -> report lines"""
    # a mask network has the classes of its frozen detector
    detector_classes = getattr(model, "class_names", class_names)
    if detector_classes != class_names:
        raise UserError(f"expected a detector of the classes of the data, in this order: "
                        f"{class_names}, got {detector_classes}: train it on this data, or give "
                        "--data what it was trained on")
    if run.resume:
        return [f"resumed from {run.resume}"]
    init = run.init
    chosen_by = ""
    if not init:
        init = start_for(run, cfg, model)
        chosen_by = " (weights of the same model come with the program; --init none: from scratch)"
    if init in ("", "none"):
        if run.freeze and getattr(cfg, "backbone_weights", "") == "none":
            raise UserError("expected trained weights with --freeze backbone, got random ones: "
                            "give --init FILE, or --backbone_weights imagenet")
        if not hasattr(cfg, "backbone"):     # a trained detector has its backbone already
            return []
        backbones = [m for name, m in model.named_modules() if name.split(".")[-1] == "backbone"]
        return [backbone_start(m, cfg) for m in backbones]
    path = find_weights(init)
    state = checkpoints.load(path)
    if "model_name" not in state:
        state = convert(state, path)
    weights = checkpoints.saved_weights(path, state)
    fitted, skipped = class_rows.fit(weights, state["class_names"], model.state_dict(), class_names)
    model.load_state_dict(fitted)
    lines = [line if line.startswith("class rows") else f"skipped {line}" for line in skipped]
    return [f"started from {init}{chosen_by}"] + [f"  {line}" for line in lines]


def backbone_start(module, cfg) -> str:
    """Load --backbone_weights into a backbone -> a line that says so. A module of the user's own,
    which is none of backbones/, keeps the weights that `build` gave it."""
    if not isinstance(module, PUBLISHED):
        return f"backbone: {type(module).__name__} with the weights that `build` gave it"
    return load_backbone_weights(module, cfg.backbone, cfg.backbone_weights)


def make_model(run, paper, cfg, class_names: list[str], machine) -> tuple:
    """Build the model of a run with its initial weights, on its device.

    -> model, criterion, lines for the report"""
    model, criterion = build_model(paper, cfg, len(class_names), run.detector, run.resume)
    with machine.first_on_node():     # one process downloads and compiles for all others
        notes = start_weights(run, cfg, model, class_names)
        if run.freeze:
            notes += freeze_backbone(model)
        prepare_attention(run.impl, machine.device)
    model.to(machine.device)
    if run.channels_last:
        order_channels_last(model, machine.device)
    return model, criterion, notes
