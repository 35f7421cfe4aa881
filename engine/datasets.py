"""..."""
import copy

from engine.errors import UserError
import data
from engine import datasets
import scenes
from data import CocoFolder, eval_transform, train_transform
from scenes import NUM_TRAIN, NUM_VAL, Shapes

def build_datasets(data, recipe, seed, load_masks=False, overfit=0, num_train=NUM_TRAIN, num_val=NUM_VAL):
    """-> train, val. data: a COCO-layout folder, or None for num_train and num_val generated scenes, the same for every seed.

    seed: of the augmentation. overfit N: both are the first N training images with objects, without augmentation.
    """
    def dataset(split, count):
        return CocoFolder(data, split, load_masks=load_masks) if data else Shapes(split, count, load_masks=load_masks)

    train = dataset("train", num_train)
    if overfit:
        train = train.first(overfit)
        train.transform = eval_transform(recipe)
        return train, copy.copy(train)
    val = dataset("val", num_val)
    train.transform, val.transform = train_transform(recipe, seed), eval_transform(recipe)
    return train, val


def validation_set(folder, loaded):
    """What a checkpoint is evaluated on: the val split of `folder`, else the data of its own run (the very images of an
    --overfit run). ValueError for released weights, which name no data."""
    run = loaded.meta.get("run")
    if not folder and not run:
        raise UserError("expected --data DIR: released weights do not say which data they belong to")
    masks = getattr(loaded.paper, "NEEDS_MASKS", False)
    if not folder and run["overfit"]:
        return datasets.build_datasets(run["data"] or None, loaded.recipe, run["seed"], masks, run["overfit"], run["num_train"])[1]
    folder, transform = folder or run["data"], data.eval_transform(loaded.recipe)
    if folder:
        return data.CocoFolder(folder, "val", transform, masks)
    return scenes.Shapes("val", run["num_val"], transform=transform, load_masks=masks)
