"""..."""
from torch import nn
from engine.errors import UserError

COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]   # columns in use of the 91
COCO_NAMES = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli,
carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote,
keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
toothbrush""".replace("\n", " ").split(", ")


def coco_columns() -> list[str]:
    """Names of the 91 columns of a released head: column = COCO category id, the gaps are called "unused ID"."""
    names = dict(zip(COCO_IDS, COCO_NAMES))
    return [names.get(i, f"unused {i}") for i in range(91)]


def class_rows(key: str) -> bool:
    """Whether rows of this tensor belong to classes."""
    return "class_embed" in key or key.startswith(("label_enc.", "detector.label_enc.", "roi.cls.", "roi.reg.", "atss.cls.",
                                                   "retinanet.cls."))


def rows_of(key: str, length: int, classes: list[int], count: int) -> list[int]:
    """Where a tensor of `length` rows for `count` classes holds these classes: one row each, four in the region head's
    boxes, one for each of RetinaNet's anchors; a row more at the end, for padding or background, goes along."""
    if key.startswith("retinanet.cls."):
        return [anchor * count + i for anchor in range(length // count) for i in classes]
    if key.startswith("roi.reg."):
        return [4 * i + side for i in classes for side in range(4)] if length == 4 * count else list(range(length))
    return classes + [count] * (length == count + 1)


def wrapped(state: dict) -> str:
    """What stands before the names of a detector inside another model: nothing, or "detector."."""
    return "detector." if "detector.level_embed" in state else ""


def objectness_head(state: dict) -> str:
    """Prefix of the one class head that is no classifier: the encoder's in two-stage Deformable DETR, where column 0
    says "object" whatever the classes are (the last of its heads). "-" when there is none."""
    prefix = wrapped(state)
    if prefix + "pos_trans.weight" not in state:
        return "-"
    heads = [key.removeprefix(prefix) for key in state if key.startswith(prefix + "class_embed.")]
    return f"{prefix}class_embed.{max(int(head.split('.')[1]) for head in heads)}."


def select_classes(state: dict, rows: list[int]) -> dict:
    """Keeps these class rows, in this order, in every class head and label table of a state dict in our names
    (released 91 columns -> 80 classes: rows = COCO_IDS). Row 0 of an objectness head stays row 0, and the extra last row
    of a label table stays last."""
    result, count = {}, len(state[wrapped(state) + "class_embed.0.weight"])
    for key, value in state.items():
        if class_rows(key):
            chosen = [0] + rows[1:] if key.startswith(objectness_head(state)) else rows
            value = value[rows_of(key, len(value), chosen, count)]
        result[key] = value
    return result


def used_classes(model: nn.Module, paper, cfg, names: list[str]) -> tuple[nn.Module, list[str]]:
    """A model without the unused ones of the 91 COCO columns, and its class names."""
    rows = [row for row, name in enumerate(names) if not name.startswith("unused ")]
    if len(rows) == len(names):
        return model, names
    print(f"keeping the {len(rows)} class columns in use of {len(names)}")
    device = next(model.parameters()).device
    fitted, _ = paper.build(cfg, len(rows))
    fitted.load_state_dict(select_classes(model.state_dict(), rows))
    return fitted.to(device).eval(), [names[row] for row in rows]


def fit(state: dict, names: list[str], into: dict, into_names: list[str]) -> tuple[dict, list[str]]:
    """Weights for a model with other classes or parts: by name and shape, class rows by class name.

    state, names: weights in our names and their classes; into, into_names: the freshly made model's state dict and
    classes -> (a whole state dict, lines that say what was not taken over).
    """
    result, skipped = dict(into), []
    where = {name: i for i, name in enumerate(names)}
    shared = [(i, where[name]) for i, name in enumerate(into_names) if name in where]
    one_box = "roi.convs.0.0.weight" in into   # of this region head, whatever the class: its rows are sides, not classes
    for key, fresh in into.items():
        if key not in state:
            skipped.append(f"{key}: not in the checkpoint")
        elif class_rows(key) and not (one_box and key.startswith("roi.reg.")) and state[key].shape[1:] == fresh.shape[1:] and names != into_names:
            pairs = [(0, 0)] if key.startswith(objectness_head(into)) else shared
            new, old = (rows_of(key, len(table[key]), [pair[i] for pair in pairs], len(classes))
                        for i, (table, classes) in enumerate(((into, into_names), (state, names))))
            result[key] = fresh.clone()
            result[key][new] = state[key][old]
        elif state[key].shape != fresh.shape:
            skipped.append(f"{key}: {tuple(state[key].shape)} in the checkpoint, {tuple(fresh.shape)} here")
        else:
            result[key] = state[key]
    if all(value is into[key] for key, value in result.items()):
        raise UserError(f"expected a checkpoint of the same paper file, got nothing that fits the model (first: {skipped[0]})")
    unused = [key for key in state if key not in into]
    skipped += [f"{key}: only in the checkpoint" for key in unused]
    if names != into_names:
        skipped.append(f"class rows: {len(shared)} of {len(into_names)} classes found by name, the rest start fresh")
    return result, skipped


def fit_classes(model, paper, cfg, meta, dataset):
    """The model for the classes of `dataset`. Released COCO heads have 91 columns, 11 of them unused: those are taken
    out. Any other difference is a ValueError that lists both."""
    names = [name for name in meta["class_names"] if not name.startswith("unused ")]
    if names != dataset.class_names:
        raise UserError(f"expected a data set with the classes of the checkpoint, in this order,\n  {names}\n"
                        f"got {dataset.name} with\n  {dataset.class_names}\n"
                        "give the data it was trained on with --data, or train on these classes: train.py --init")
    return used_classes(model, paper, cfg, meta["class_names"])[0]
