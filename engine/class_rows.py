"""Class rows: which rows of which tensors belong to which class, and how weights change classes.

    coco_columns        names of the 91 columns of a released COCO head
    select_classes      a state dict with some of its classes
    without_unused      a model without the unused columns
    fit                 weights for a model with other classes, by class name (train.py --init)
    fit_classes         a loaded model for the classes of a data set (eval.py)
"""
import re

import torch
from torch import nn

from engine.errors import UserError

# Columns of a released COCO head that are in use: column = COCO category id.
UNUSED_COCO_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_IDS = [i for i in range(1, 91) if i not in UNUSED_COCO_IDS]
COCO_NAMES = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball,
kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup,
fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush""".replace("\n", " ").split(", ")
CLASS_TENSORS = ("label_enc.", "detector.label_enc.", "roi.cls.", "roi.reg.")
# the class layer of a one-stage head of Co-DETR; equal heads are numbered: atss2
ONE_STAGE = re.compile(r"(atss|retinanet|fcos|gfl)\d*\.cls\.")


def coco_columns() -> list[str]:
    """Names of the 91 columns of a released head; the gaps are called "unused ID"."""
    names = dict(zip(COCO_IDS, COCO_NAMES))
    return [names.get(i, f"unused {i}") for i in range(91)]


def has_class_rows(key: str) -> bool:
    """Whether rows of this tensor belong to classes."""
    if "class_embed" in key or key.startswith(CLASS_TENSORS):
        return True
    return ONE_STAGE.match(key) is not None


def rows_of(key: str, length: int, classes: list[int], num_classes: int) -> list[int]:
    """Rows of these classes in a tensor with `length` rows for `num_classes` classes.

    One row a class, except for the region head's boxes (four rows a class) and one-stage heads (one
    row a class for each anchor of a cell). An extra last row, for background or padding, stays
    last.
    """
    if ONE_STAGE.match(key):
        anchors = length // num_classes
        return [anchor * num_classes + i for anchor in range(anchors) for i in classes]
    if key.startswith("roi.reg."):
        if length != 4 * num_classes:
            return list(range(length))
        return [4 * i + side for i in classes for side in range(4)]
    extra = [num_classes] if length == num_classes + 1 else []
    return classes + extra


def detector_prefix(state: dict) -> str:
    """Prefix of a detector's names inside another model: "" or "detector."."""
    return "detector." if "detector.level_embed" in state else ""


def objectness_head(state: dict) -> str | None:
    """Prefix of the one class head that is no classifier, None when there is none.

    It is the encoder's in two-stage Deformable DETR (the last of its heads), whose column 0 says
    "object" whatever the classes are.
    """
    prefix = detector_prefix(state)
    if prefix + "pos_trans.weight" not in state:
        return None
    heads = [key.removeprefix(prefix) for key in state
             if key.startswith(prefix + "class_embed.")]
    last = max(int(head.split(".")[1]) for head in heads)
    return f"{prefix}class_embed.{last}."


def is_objectness(key: str, state: dict) -> bool:
    head = objectness_head(state)
    return head is not None and key.startswith(head)


def count_classes(state: dict) -> int:
    """Number of classes of a detector in our names; DETR has one row more, for "no object"."""
    if "class_embed.weight" in state:
        return len(state["class_embed.weight"]) - 1
    return len(state[detector_prefix(state) + "class_embed.0.weight"])


def select_classes(state: dict, classes: list[int]) -> dict:
    """Keep these classes, in this order, in every class head and label table of a state dict.

    For released heads of 91 columns: `classes` = COCO_IDS. Row 0 of an objectness head stays row 0,
    and the extra last row of a label table, and of DETR's class head, stays last.
    """
    num_classes = count_classes(state)
    result = {}
    for key, value in state.items():
        if has_class_rows(key):
            chosen = [0] + classes[1:] if is_objectness(key, state) else classes
            value = value[rows_of(key, len(value), chosen, num_classes)]
        result[key] = value
    return result


def numbered_names(count: int) -> list[str]:
    """Names of classes of a released head that has no names."""
    return [f"class {i}" for i in range(count)]


def without_unused(model: nn.Module, paper, cfg, names: list[str]) -> tuple[nn.Module, list[str]]:
    """A model without the unused ones of the 91 COCO columns, and its class names."""
    rows = [row for row, name in enumerate(names) if not name.startswith("unused ")]
    if len(rows) == len(names):
        return model, names
    print(f"keeping the {len(rows)} class columns in use of {len(names)}")
    device = next(model.parameters()).device
    smaller, _ = paper.build(cfg, len(rows))
    smaller.load_state_dict(select_classes(model.state_dict(), rows))
    return smaller.to(device).eval(), [names[row] for row in rows]


def fit(state: dict, names: list[str], fresh: dict,
        fresh_names: list[str]) -> tuple[dict, list[str]]:
    """Weights for a model with other classes or parts: by name and shape, class rows by class name.

    Args:
        state, names: the weights, in our names, and their class names.
        fresh, fresh_names: state dict and class names of the new model.

    Returns a complete state dict for the new model, and a line for everything that was not copied.
    Raises UserError when nothing fits.
    """
    result = dict(fresh)
    skipped = []
    place = {name: i for i, name in enumerate(names)}
    shared = [(i, place[name]) for i, name in enumerate(fresh_names) if name in place]
    for key, value in fresh.items():
        if key not in state:
            skipped.append(f"{key}: not in the checkpoint")
        elif names != fresh_names and same_but_rows(key, state[key], value, fresh):
            # The objectness head has one meaningful row, whatever the classes.
            pairs = [(0, 0)] if is_objectness(key, fresh) else shared
            new = rows_of(key, len(value), [pair[0] for pair in pairs], len(fresh_names))
            old = rows_of(key, len(state[key]), [pair[1] for pair in pairs], len(names))
            result[key] = value.clone()
            result[key][new] = state[key][old]
        elif state[key].shape != value.shape:
            skipped.append(f"{key}: {tuple(state[key].shape)} in the checkpoint, "
                           f"{tuple(value.shape)} here")
        else:
            result[key] = state[key]
    if all(value is fresh[key] for key, value in result.items()):
        raise UserError("expected a checkpoint of the same paper file, got nothing that fits the "
                        f"model (first: {skipped[0]}): give weights of this model")
    skipped += [f"{key}: only in the checkpoint" for key in state if key not in fresh]
    if names != fresh_names:
        rest = ", the others are reinitialized" if len(shared) < len(fresh_names) else ""
        skipped.append(f"class rows: {len(shared)} of {len(fresh_names)} classes found by name"
                       + rest)
    return result, skipped


def same_but_rows(key: str, old: torch.Tensor, new: torch.Tensor, fresh: dict) -> bool:
    """Whether a tensor has class rows and both sides agree in everything but their number.

    A region head with convolutions has one box for all classes: its rows are sides, not classes.
    """
    one_box = "roi.convs.0.0.weight" in fresh
    if one_box and key.startswith("roi.reg."):
        return False
    return has_class_rows(key) and old.shape[1:] == new.shape[1:]


def fit_classes(model: nn.Module, paper, cfg, meta: dict, dataset) -> nn.Module:
    """The loaded model for the classes of `dataset`, without unused COCO columns.

    Raises UserError when the classes, or their order, differ in any other way.
    """
    names = [name for name in meta["class_names"] if not name.startswith("unused ")]
    if names == numbered_names(len(dataset.class_names)):
        print(f"the checkpoint does not name its {len(names)} classes: they are taken to be those "
              f"of {dataset.name}, in order")
        return model
    if names != dataset.class_names:
        raise UserError(f"expected a data set with the classes of the checkpoint, in this order: "
                        f"{names}; got {dataset.name} with {dataset.class_names}: give the data it "
                        "was trained on with --data, or train on these classes: train.py --init")
    return without_unused(model, paper, cfg, meta["class_names"])[0]
