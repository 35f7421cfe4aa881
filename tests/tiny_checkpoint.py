"""Checkpoints of tiny random models, as train.py would save them."""
import dataclasses
import importlib

import torch

import scenes
from engine import checkpoints
from engine.recipe import configure

SIZES = {"dim": 64, "num_heads": 2, "ffn_dim": 32, "num_queries": 12, "decoder_layers": 2,
         "train_sizes": (64,), "eval_size": 64}
OWN_SIZES = {"co_detr": {"roi_dim": 32}}


def write_checkpoint(path, name="dino", class_names=scenes.SCENE_CLASSES, change=None, **run):
    """Save a random model of a paper file. change: called with its state dict before. -> path"""
    torch.manual_seed(0)
    paper = importlib.import_module(name)
    cfg, recipe = configure(paper, paper.SMALL, SIZES, OWN_SIZES.get(name, {}))
    model, _ = paper.build(cfg, len(class_names))
    state = model.state_dict()
    if change:
        change(state)
    checkpoints.save(path, {
        "format": 2, "model_name": name, "variant": "", "config": dataclasses.asdict(cfg),
        "recipe": dataclasses.asdict(recipe), "model": state, "class_names": list(class_names),
        "category_ids": list(range(1, len(class_names) + 1)), "epoch": 1, "step": 5,
        "run": {"data": "", "seed": 0, "overfit": 0, "num_val": 6} | run})
    return path


def two_checkpoints(folder):
    """A Co-DETR and a DINO in folders of these names."""
    paths = []
    for name in ("co_detr", "dino"):
        (folder / name).mkdir()
        paths.append(write_checkpoint(folder / name / "best.pt", name))
    return paths


def damage(state):
    """Make every box of the model NaN by weights that are finite, but as large as they can be."""
    for key, value in state.items():
        if "bbox_embed" in key:
            signs = torch.arange(value.numel()).view_as(value) % 2 * 2 - 1
            value.copy_(3e38 * signs)
