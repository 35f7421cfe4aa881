"""COCO annotation files: find them, read them, and report every entry that is wrong.

The checks look at the json alone; tools/check_data.py adds those that open image files. Every value
is checked for its type and range before NumPy or pycocotools sees it.
"""
import json
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.errors import UserError
from engine.images import MAX_PIXELS
from engine.notices import one_line
from engine.segmentations import segmentation_fault

# Where the json of a split may lie, relative to the data folder. The first is COCO's own place.
JSON_PLACES = (
    "annotations/instances_{split}2017.json",
    "annotations/instances_{split}.json",
    "{split}/_annotations.coco.json",      # as Roboflow exports it
)
IMAGE_PLACES = ("{split}2017", "images/{split}2017", "{split}", "images/{split}", "images", "")
OTHER_NAMES = {"val": ("val", "valid")}    # of a split, in file and folder names

# Files that show another layout, relative to the data folder.
FOREIGN_LAYOUTS = {
    "yolo": ("data.yaml", "labels/*.txt", "labels/*/*.txt", "*/labels/*.txt", "classes.txt"),
    "voc": ("Annotations/*.xml", "*/Annotations/*.xml", "*.xml", "*/*.xml"),
}

FIELDS = {
    "images": ("id", "file_name"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
MAX_ID = 2 ** 63            # ids are 64-bit integers
MAX_COORDINATE = 1e6        # px; a box beyond it is a mistake
MAX_NAME_BYTES = 255        # of one part of a path, the limit of common file systems
MAX_PATH_BYTES = 1000
NORMALIZED_SHARE = 0.5      # share of boxes within [0, 1] from which all are taken as normalized
XYXY_SHARES = (0.1, 0.95)   # boxes that leave their image; boxes that fit when read as corners


class Problem(NamedTuple):
    """One thing that is wrong with a data set.

    level: "fatal", the data set cannot be used; "error", training tolerates it, the data set check
    fails; "warning", it is handled.
    """
    level: str
    kind: str
    where: str


# ---------------------------------------------------------------------------- files and folders

def json_path(root: str | Path, split: str) -> Path:
    """Return where the json of a split is: the first existing of JSON_PLACES, else the first."""
    names = OTHER_NAMES.get(split, (split,))
    places = [Path(root) / place.format(split=name) for place in JSON_PLACES for name in names]
    return next((path for path in places if is_file(path)), places[0])


def images_folder(root: str | Path, split: str, content: dict) -> Path:
    """Return the folder that holds the images of a json. Raises UserError if none does."""
    files = [image["file_name"] for image in content["images"][:20]]
    names = OTHER_NAMES.get(split, (split,))
    places = [Path(root) / place.format(split=name) for place in IMAGE_PLACES for name in names]
    for place in places:
        if any(os.path.exists(place / file) for file in files):
            return place
    raise UserError(
        f"{places[0]}: expected the images of the json there (such as {one_line(files[0])}), got "
        f"none of the first {len(files)}; put them there or correct file_name in "
        f"{json_path(root, split)}")


def read_json(path: str | Path, root: str | Path = "", split: str = "") -> dict:
    """Read a COCO json. Raises UserError if the file is missing or holds something else.

    root, split: the data folder and the split, to say what lies there instead.
    """
    path = Path(path)
    if not is_file(path):
        raise UserError(missing_json(path, Path(root), split))
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        reason = one_line(str(error))
        raise UserError(f"{path}: expected JSON, got {reason}; write the file anew") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: expected a JSON object with images, annotations and categories, got a "
            f"{type(content).__name__}; this looks like a results file, give the ground truth")
    return content


def missing_json(path: Path, root: Path, split: str) -> str:
    """Say that there is no json, and what to do with the layout that is there."""
    layout = foreign_layout(root) if split else None
    if layout:
        return (f"{root}: expected a COCO json, got a folder in {layout.upper()} layout; convert "
                f"it: python -m tools.convert --from {layout} {root} OUT")
    other = {"train": "val", "val": "train"}.get(split)
    if other and is_file(json_path(root, other)):
        return (f"{path}: expected a COCO json there, got no such file, though "
                f"{json_path(root, other)} exists; divide the images into train and val")
    return (f"{path}: expected a COCO json there, got no such file; a data folder holds "
            "annotations/instances_{train,val}2017.json, train2017/ and val2017/, or train/ and "
            "valid/ with _annotations.coco.json as Roboflow exports them "
            "(python scenes.py --write DIR makes an example)")


def foreign_layout(root: Path) -> str | None:
    """Return "yolo" or "voc" if a folder looks like one, else None."""
    for layout, patterns in FOREIGN_LAYOUTS.items():
        for pattern in patterns:
            if next(root.glob(pattern), None):
                return layout
    return None


def is_file(path: Path) -> bool:
    """Whether a regular file is there. Paths that cannot exist are no files."""
    try:
        return path.is_file()
    except OSError:
        return False


# ------------------------------------------------------------------------------ values of entries

def is_number(value, limit: float = MAX_COORDINATE) -> bool:
    """Whether a json value is a finite number of at most this absolute value; true is none."""
    return type(value) in (int, float) and abs(value) <= limit   # False for NaN


def listed_size(image: dict) -> tuple[int, int]:
    """Return (width, height) of a json image, 0 where it is not given or no positive number."""
    width, height = image.get("width"), image.get("height")
    return (int(width) if is_number(width) and width > 0 else 0,
            int(height) if is_number(height) and height > 0 else 0)


def listed_area(row: dict) -> float:
    """Return the area of a json annotation in px, that of its box where none is usable."""
    area = row.get("area")
    if is_number(area, MAX_COORDINATE ** 2) and area > 0:
        return float(area)
    return float(row["bbox"][2] * row["bbox"][3])


def degenerate_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Find boxes of which nothing lies in the image: (n,) bool.

    boxes: (n, 4) xywh; sizes: (n, 2) width and height of their images, 0 = unknown
    """
    limits = np.where(sizes > 0, sizes, np.inf).reshape(-1, 2)
    low = np.clip(boxes[:, :2], 0, limits)
    high = np.clip(boxes[:, :2] + boxes[:, 2:], 0, limits)
    return ~(high > low).all(1)


# ------------------------------------------------------------------------------------- problems

def json_problems(content: dict) -> list[Problem]:
    """Report what is wrong with a json, except for its segmentations.

    Entries that lack fields or have unusable ids hide all other problems.
    """
    problems = [problem for part in FIELDS for problem in entry_problems(content, part)]
    if any(problem.level == "fatal" for problem in problems):
        return problems
    problems += category_problems(content)
    problems += image_problems(content)
    problems += annotation_problems(content)
    return problems


def refuse_fatal(path: str | Path, problems: list[Problem]) -> None:
    """Raise UserError if a data set with these problems cannot be used."""
    fatal = [problem for problem in problems if problem.level == "fatal"]
    if fatal:
        named = "; ".join(f"{problem.kind}: {problem.where}" for problem in fatal[:3])
        raise UserError(
            f"{path}: expected a usable COCO json, got {plural(len(fatal), 'fatal problem')}: "
            f"{named}; python -m tools.check_data DIR lists all")


def plural(count: int, noun: str) -> str:
    """Return e.g. "1 error", "2 errors"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def entry_problems(content, part):
    """Yield problems of a list of entries: missing list, missing fields, unusable ids."""
    entries = content.get(part)
    if not isinstance(entries, list) or (not entries and part != "annotations"):
        text = f"expected a list '{part}' in the json, got {one_line(entries, 40)}"
        yield Problem("fatal", f"no {part}", text)
        return
    id_fields = [field for field in FIELDS[part] if field.endswith("id")]
    for place, entry in enumerate(entries):
        where = f"{part}[{place}]"
        if not isinstance(entry, dict):
            yield Problem("fatal", f"incomplete {part}", f"{where}: expected an object")
            continue
        lacking = [field for field in FIELDS[part] if field not in entry]
        if lacking:
            yield Problem("fatal", f"incomplete {part}", f"{where} lacks {', '.join(lacking)}")
            continue
        ids = [entry[field] for field in id_fields]
        if not all(type(number) is int and abs(number) < MAX_ID for number in ids):
            yield Problem("fatal", "ids that are not 64-bit integers",
                          f"{where}: expected integer ids, got {one_line(ids, 60)}")
    # Annotation ids are numbered anew for the evaluation.
    level = "warning" if part == "annotations" else "fatal"
    ids = Counter(entry.get("id") for entry in entries
                  if isinstance(entry, dict) and type(entry.get("id")) is int)
    for number, count in ids.items():
        if count > 1:
            yield Problem(level, f"id used twice in {part}",
                          f"id {one_line(number, 40)} is used {count} times")


def category_problems(content):
    """Yield problems of class names: no text, one name for two classes, classes without objects."""
    categories = content["categories"]
    for category in categories:
        name = category["name"]
        if type(name) not in (str, int) or name == "":
            yield Problem("fatal", "class names that are no text",
                          f"category {category['id']}: expected a name, got {one_line(name, 40)}")
    boxes = Counter(row["category_id"] for row in content["annotations"])
    names = Counter(str(category["name"]) for category in categories)
    for name, count in names.items():
        if count == 1:
            continue
        ids = [category["id"] for category in categories if str(category["name"]) == name]
        ambiguous = sum(boxes[number] > 0 for number in ids) > 1
        yield Problem("error" if ambiguous else "warning", "class name used twice",
                      f"{one_line(name)!r} has ids {one_line(ids, 60)}: rename one or merge them")


def image_problems(content):
    """Yield problems of file names and listed sizes."""
    images = content["images"]
    for image in images:
        where = f"image {image['id']}"
        fault = file_name_fault(image["file_name"])
        if fault:
            yield Problem("fatal", "unusable file name", f"{where}: {fault}")
            continue
        where = f"{where}, {one_line(image['file_name'])}"
        for side in ("width", "height"):
            value = image.get(side)
            if value is not None and not (is_number(value) and value > 0):
                yield Problem("error", "wrong width or height",
                              f"{where}: expected a positive {side}, got {one_line(value, 40)}")
        width, height = listed_size(image)
        if width * height > MAX_PIXELS:
            yield Problem("error", "image too large",
                          f"{where}: {width} x {height} px, at most {MAX_PIXELS} pixels are read")
    files = Counter(image["file_name"] for image in images
                    if isinstance(image["file_name"], str))
    for name, count in files.items():
        if count > 1:
            yield Problem("warning", "file listed twice", f"{one_line(name)}: {count} images")


def file_name_fault(name) -> str | None:
    """Say why a value cannot be the name of a file, or return None."""
    if not isinstance(name, str) or not name or "\0" in name:
        return f"expected text, got {one_line(name, 60)}"
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return f"expected valid Unicode, got {one_line(name, 60)}"
    longest = max(len(part) for part in encoded.split(b"/"))
    if longest > MAX_NAME_BYTES or len(encoded) > MAX_PATH_BYTES:
        return f"expected at most {MAX_NAME_BYTES} bytes, got {len(encoded)}: {one_line(name, 60)}"
    return None


def annotation_problems(content):
    """Yield problems of annotations, the boxes' last."""
    images = {image["id"]: image for image in content["images"]}
    category_ids = {category["id"] for category in content["categories"]}
    usable = []
    seen = set()
    for row in content["annotations"]:
        kind, fault = annotation_fault(row, images, category_ids)
        if fault:
            yield Problem("fatal", kind, f"{describe(row, images)}: {fault}")
            continue
        usable.append(row)
        area = row.get("area")
        if area is not None and not (is_number(area, MAX_COORDINATE ** 2) and area >= 0):
            yield Problem("warning", "unusable area (that of the box is used)",
                          f"{describe(row, images)}: got {one_line(area, 40)}")
        key = (row["image_id"], row["category_id"], *row["bbox"])
        if key in seen:
            yield Problem("warning", "duplicate annotation",
                          f"{describe(row, images)}: same image, class and box as an earlier one")
        seen.add(key)
    if usable:
        yield from box_problems(usable, images)


def describe(row, images) -> str:
    """Name an annotation: its id, its image and the file."""
    image = images.get(row["image_id"])
    file = one_line(image["file_name"]) if image else "not listed"
    return f"annotation {one_line(row.get('id', '?'), 40)} (image {row['image_id']}, {file})"


def annotation_fault(row, images, category_ids) -> tuple[str, str | None]:
    """Return what makes an annotation unusable: (kind, text), text None if nothing does."""
    box = row["bbox"]
    crowd = row.get("iscrowd", 0)
    if row["image_id"] not in images:
        return "unknown image id", "expected an id from images"
    if row["category_id"] not in category_ids:
        text = f"got category {row['category_id']}, expected an id from categories"
        return "unknown category id", text
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(value) for value in box):
        text = f"got {one_line(box, 60)}, expected finite [x, y, width, height]"
        return "malformed box", text
    if crowd not in (0, 1):
        return "malformed iscrowd", f"got {one_line(crowd, 40)}, expected 0 or 1"
    return "", None


def box_problems(rows, images):
    """Yield problems of boxes: normalized ones, corners in place of sizes, degenerate, outside."""
    boxes = np.array([row["bbox"] for row in rows], np.float64)                        # (n, 4)
    sizes = np.array([listed_size(images[row["image_id"]]) for row in rows])           # (n, 2)
    limits = np.where(sizes > 0, sizes, np.inf)

    # Boxes within [0, 1], in images that are larger.
    normalized = (np.abs(boxes) <= 1).all(1) & (boxes[:, 2:] > 0).all(1) & (limits > 2).all(1)
    if normalized.sum() > NORMALIZED_SHARE * len(boxes):
        first = rows[np.argmax(normalized)]
        yield Problem(
            "fatal", "boxes look normalized",
            f"{normalized.sum()} of {len(boxes)} boxes lie within [0, 1]; COCO wants [x, y, width, "
            f"height] in pixels. First: {describe(first, images)}: {first['bbox']}")
        return
    for place in np.flatnonzero(normalized):
        yield Problem("warning", "box within [0, 1] (normalized?)",
                      f"{describe(rows[place], images)}: {rows[place]['bbox']}")

    # Corners read as width and height overshoot wherever x1 + x2 > width; true widths are rarely
    # all greater than their x.
    degenerate = degenerate_boxes(boxes, sizes)
    beyond = (boxes[:, :2] + boxes[:, 2:] > limits + 1).any(1)
    outside = ~degenerate & (beyond | (boxes[:, :2] < -1).any(1))
    fits_as_corners = (boxes[:, 2:] > boxes[:, :2]).all(1) & (boxes[:, 2:] <= limits + 1).all(1)
    overshooting = beyond.sum() >= max(1, XYXY_SHARES[0] * len(boxes))
    if overshooting and fits_as_corners.mean() > XYXY_SHARES[1]:
        first = rows[np.argmax(beyond)]
        yield Problem(
            "fatal", "boxes look like xyxy",
            f"{beyond.sum()} of {len(boxes)} boxes leave their image as [x, y, width, height], "
            f"{fits_as_corners.sum()} fit as [x1, y1, x2, y2]; COCO wants the former. "
            f"First: {describe(first, images)}")

    for place in np.flatnonzero(degenerate | outside):
        kind = "box leaves the image (clipped)"
        if degenerate[place]:
            kind = "degenerate box (dropped)"
        width, height = sizes[place]
        text = f"{describe(rows[place], images)}: {boxes[place].tolist()} in {width} x {height} px"
        yield Problem("warning", kind, text)


def segmentation_problems(content: dict) -> dict[int, Problem]:
    """Report malformed segmentations of a json without fatal problems, by place in annotations."""
    images = {image["id"]: image for image in content["images"]}
    problems = {}
    for place, row in enumerate(content["annotations"]):
        size = listed_size(images[row["image_id"]])
        fault = segmentation_fault(row.get("segmentation"), size)
        if fault:
            where = f"{describe(row, images)}: {fault}"
            problems[place] = Problem("error", "malformed segmentation", where)
    return problems
