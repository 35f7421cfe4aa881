"""From a checkpoint file to a model that detects: paper files, checkpoints, frozen detectors."""
import importlib
from pathlib import Path
from typing import NamedTuple

from torch import nn

from engine import checkpoints, class_rows
from engine.errors import UserError
from engine.recipe import Recipe
from engine.released import convert


class Loaded(NamedTuple):
    """A checkpoint made into a model."""
    model: nn.Module        # in evaluation mode; the averaged weights where there are any
    paper: object           # module of the paper file: `paper.detect`, `paper.build`
    cfg: object             # its Config
    recipe: Recipe
    meta: dict              # class_names, category_ids, model_name, step, run, ...
    criterion: nn.Module


def load_model(path: str | Path, device="cpu", variant: str = "", detector: str = "") -> Loaded:
    """Load a checkpoint of ours or a released one.

    variant: one of the paper file's VARIANTS, for what a released file does not show (`dc5`).
    detector: where the frozen detector of a mask network lies now; default: where it was."""
    state = checkpoints.load(path)
    if "model_name" not in state:
        state = convert(state, path, variant)
    elif variant:
        raise UserError(f"--variant is for released weights, {path} knows its own settings: "
                        "leave it out")
    paper = importlib.import_module(state["model_name"])
    cfg, recipe = checkpoints.settings(paper, state)
    names = state["class_names"]
    if getattr(paper, "NEEDS_DETECTOR", False):
        frozen = load_detector(detector or checkpoints.saved_detector(state))
        model, criterion = paper.build(cfg, len(names), frozen)
    else:
        model, criterion = paper.build(cfg, len(names))
    model.load_state_dict(state.get("ema", state["model"]))
    meta = {key: x for key, x in state.items() if key not in ("model", "ema", "optimizer", "rng")}
    return Loaded(model.to(device).eval(), paper, cfg, recipe, meta, criterion)


def load_detector(path: str) -> Loaded:
    """Load the detector that a mask network builds on, without unused COCO columns."""
    if not path:
        raise UserError("expected --detector FILE, a trained detector to put masks on, got none: "
                        "python train.py --model dino makes runs/dino/best.pt, with --data DIR on "
                        "your own images")
    if not Path(path).is_file():
        raise UserError(f"expected the detector at {path}, found no file: say where it lies with "
                        "--detector FILE")
    loaded = load_model(path)
    if getattr(loaded.paper, "NEEDS_DETECTOR", False):
        raise UserError(f"expected a detector, got {path}, a mask network: give the detector it was "
                        "trained on")
    model, names = class_rows.without_unused(loaded.model, loaded.paper, loaded.cfg,
                                           loaded.meta["class_names"])
    return loaded._replace(model=model, meta={**loaded.meta, "class_names": names})
