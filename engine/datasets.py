"""The data sets of a run and of a checkpoint."""
import copy

from data import CocoFolder, eval_transform, train_transform
from engine.class_labels import match_classes
from engine.errors import UserError
from scenes import NUM_TRAIN, NUM_VAL, Shapes


def build_datasets(data, recipe, seed, load_masks=False, overfit=0, num_train=NUM_TRAIN,
                   num_val=NUM_VAL):
    """Build the training and the validation set.

    data: a COCO-layout folder, or empty for num_train and num_val generated scenes, which are the
    same for every seed. seed: of the augmentation. overfit N: both are the first N training images
    with objects, without augmentation."""
    train = open_split(data, "train", num_train, load_masks)
    if overfit:
        train = train.first(overfit)
        train.transform = eval_transform(recipe)
        return train, copy.copy(train)
    val = open_split(data, "val", num_val, load_masks)
    match_classes(val, train.class_names, train.category_ids)
    train.transform = train_transform(recipe, seed)
    val.transform = eval_transform(recipe)
    return train, val


def open_split(data, split, count, load_masks):
    if data:
        return CocoFolder(data, split, load_masks=load_masks)
    return Shapes(split, count, load_masks=load_masks)


def validation_set(folder, loaded):
    """What a checkpoint is evaluated on: the val split of `folder`, or else the data of its own run
    (the very images of an --overfit run). UserError for released weights, which name no data.

    loaded: what engine.models.load_model returned."""
    run = loaded.meta.get("run")
    if not folder and not run:
        raise UserError("expected --data DIR: released weights do not say which data they belong "
                        "to")
    masks = getattr(loaded.paper, "NEEDS_MASKS", False)
    if not folder and run["overfit"]:
        return build_datasets(run["data"], loaded.recipe, run["seed"], masks, run["overfit"],
                              run["num_train"])[1]
    folder = folder or run["data"]
    transform = eval_transform(loaded.recipe)
    if folder:
        dataset = CocoFolder(folder, "val", transform, masks)
        names = list(loaded.meta["class_names"])
        if sorted(names) == sorted(dataset.class_names):
            match_classes(dataset, names)
        return dataset
    return Shapes("val", run["num_val"], transform=transform, load_masks=masks)
