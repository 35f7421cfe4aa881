"""The data sets of a run and of a checkpoint."""
import copy
import sys

from data import IF_COMPLETE, CocoFolder, eval_transform, train_transform
from engine.class_labels import match_classes
from engine.coco_json import Problem
from engine.errors import UserError
from engine.notices import one_line
from engine.processes import from_rank_0, own_place
from engine.sampling import repeat_factors
from scenes import NUM_TRAIN, NUM_VAL, Shapes

RUN_FIELDS = ("data", "seed", "overfit", "num_val")   # of a checkpoint: which data it belongs to


def build_datasets(data, recipe, seed, load_masks=False, overfit=0, num_train=NUM_TRAIN,
                   num_val=NUM_VAL):
    """Return the training set and the validation set.

    data: a COCO-layout folder; empty: num_train and num_val generated scenes
    seed: of the augmentation; the generated scenes are the same for every seed
    overfit: if not 0, both are the first `overfit` training images with objects, not augmented
    """
    jitter = recipe.augment == "lsj" and not overfit
    train_masks = load_masks
    if jitter and not load_masks:
        train_masks = IF_COMPLETE
    train = open_split(data, "train", num_train, train_masks)
    if overfit:
        train = train.first(overfit)
        train.transform = eval_transform(recipe)
        return train, copy.copy(train)
    val = open_split(data, "val", num_val, load_masks)
    match_classes(val, train.class_names, train.category_ids)
    if data:
        val.problems = [*val.problems, *shared_images(train, val)]
    if jitter and not train.has_masks and own_place().rank == 0:
        print(f"{train.name}: no mask for every object, so --augment lsj pastes no objects and "
              "clips the boxes of cropped ones", file=sys.stderr)
    train.transform = train_transform(recipe, seed, keep_masks=load_masks)
    if recipe.oversample:
        train.repeat_factors = repeat_factors(train, recipe.oversample)
    val.transform = eval_transform(recipe)
    return train, val


def open_split(data, split, count, load_masks):
    """Return one split of a folder, or `count` generated scenes if data is empty."""
    if data:
        return read_once(lambda: CocoFolder(data, split, load_masks=load_masks))
    return Shapes(split, count, load_masks=load_masks)


def shared_images(train, other):
    """Return the images of a split that are also in the training set, as problems.

    train, other: two CocoFolders
    """
    learned = set(image_paths(train))
    problems = []
    for path in image_paths(other):
        if path in learned:
            problems.append(Problem("error", "image also in train", one_line(str(path), 300)))
    return problems


def image_paths(dataset):
    folder = dataset.folder.resolve()
    return [folder / name for name in dataset.files]


def read_once(open_folder):
    """Return the CocoFolder that `open_folder()` makes on rank 0, on every rank.

    Only rank 0 reads and examines the json. The others receive the flat arrays, and the outcome: an
    unusable json is a UserError on all of them.
    """
    dataset = from_rank_0(open_folder)
    dataset.unreadable.share_memory_()   # a received one is not shared with workers yet
    return dataset


def validation_set(folder, loaded):
    """Return the data set on which a checkpoint is evaluated.

    folder: its val split is used; empty: the validation set of the checkpoint's own run, for an
    --overfit run the images on which it was trained
    loaded: what engine.models.load_model returned

    Raises UserError without a folder for released weights, which do not name their data.
    """
    run = loaded.meta.get("run")
    if not folder and not run:
        raise UserError("expected --data DIR, got none: released weights do not say which data "
                        "they belong to")
    lacking = [name for name in RUN_FIELDS if not folder and name not in run]
    if lacking:
        raise UserError("expected a checkpoint that knows the data of its run, got none of "
                        f"{', '.join(lacking)}: give --data DIR")
    masks = getattr(loaded.paper, "NEEDS_MASKS", False)
    if not folder and run["overfit"]:
        return build_datasets(run["data"], loaded.recipe, run["seed"], masks, run["overfit"],
                              run.get("num_train", NUM_TRAIN))[1]
    folder = folder or run["data"]
    transform = eval_transform(loaded.recipe)
    if folder:
        dataset = read_once(lambda: CocoFolder(folder, "val", transform, masks))
        names = list(loaded.meta["class_names"])
        # Other classes stay as they are: the caller compares them by name.
        if sorted(names) == sorted(dataset.class_names):
            match_classes(dataset, names)
        return dataset
    return Shapes("val", run["num_val"], transform=transform, load_masks=masks)
