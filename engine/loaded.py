"""Stands in for engine/models.py and engine/datasets.py until they give `Loaded`."""
import importlib
from typing import NamedTuple

from torch import nn

from engine import datasets, models


class Loaded(NamedTuple):
    """A model in evaluation mode, its paper file, its settings, and where it comes from."""
    model: nn.Module
    paper: object      # module: detect, build, ...
    cfg: object        # architecture, loss, top_k
    recipe: object     # image sizes
    meta: dict         # class_names, category_ids, model_name, step, run, ...
    criterion: nn.Module


def load_model(path, device="cpu", variant="", detector=""):
    model, cfg, meta = models.load_model(path, device, variant, detector)
    paper = importlib.import_module(meta["model_name"])
    _, criterion = paper.build(cfg, len(meta["class_names"]))
    return Loaded(model, paper, cfg, cfg, meta, criterion)


def validation_set(folder, loaded):
    return datasets.validation_set(folder, loaded.cfg, loaded.meta)
