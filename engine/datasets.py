"""..."""
import copy
import importlib

import data
from engine import datasets
import scenes
from data import CocoFolder, eval_transform, train_transform
from scenes import NUM_TRAIN, NUM_VAL, Shapes

def build_datasets(data, cfg, seed, load_masks=False, overfit=0, num_train=NUM_TRAIN, num_val=NUM_VAL):
    """-> train, val. data: a COCO-layout folder, or None for num_train and num_val generated scenes, the same for every seed.

    seed: of the augmentation. overfit N: both are the first N training images with objects, without augmentation.
    """
    def dataset(split, count):
        return CocoFolder(data, split, load_masks=load_masks) if data else Shapes(split, count, load_masks=load_masks)

    train = dataset("train", num_train)
    if overfit:
        train = train.first(overfit)
        train.transform = eval_transform(cfg)
        return train, copy.copy(train)
    val = dataset("val", num_val)
    train.transform, val.transform = train_transform(cfg, seed), eval_transform(cfg)
    return train, val


def validation_set(folder, cfg, meta):
    """What a checkpoint is evaluated on: the val split of `folder`, else the data of its own run (the very images of an
    --overfit run). ValueError for released weights, which name no data."""
    run = meta.get("run")
    if not folder and not run:
        raise ValueError("expected --data DIR: released weights do not say which data they belong to")
    masks = getattr(importlib.import_module(meta["model_name"]), "NEEDS_MASKS", False)
    if not folder and run["overfit"]:
        return datasets.build_datasets(run["data"] or None, cfg, run["seed"], masks, run["overfit"], run["num_train"])[1]
    folder, transform = folder or run["data"], data.eval_transform(cfg)
    if folder:
        return data.CocoFolder(folder, "val", transform, masks)
    return scenes.Shapes("val", run["num_val"], transform=transform, load_masks=masks)
