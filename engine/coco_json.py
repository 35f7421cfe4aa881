"""COCO annotation files: find them, read them, and report every entry that is wrong.

The json alone is checked here; tools/check_data.py also opens the image files. The type and range
of every value are checked before NumPy or pycocotools sees it.

"Listed" means: as the json says, such as the listed size of an image.
"""
import json
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.errors import UserError
from engine.images import MAX_PIXELS
from engine.notices import one_line, plural, quoted
from engine.segmentations import segmentation_fault

# Where the json and the images of a split may be, relative to the data folder. COCO's place first.
JSON_PLACES = (
    "annotations/instances_{split}2017.json",
    "annotations/instances_{split}.json",
    "{split}/_annotations.coco.json",      # as Roboflow exports it
    "annotations/{split}.json",
    "{split}/annotations.json",
    "{split}.json",
    "annotations/lvis_v1_{split}.json",
)
IMAGE_PLACES = ("{split}2017", "images/{split}2017", "{split}", "images/{split}", "images", "")
SPLIT_NAMES = {"val": ("val", "valid")}    # where files and folders have several names for a split

# Files that show another layout, relative to the data folder. The first that exists decides.
FOREIGN_LAYOUTS = (
    ("yolo", ("data.yaml", "labels/*.txt", "labels/*/*.txt", "*/labels/*.txt", "obj.names",
              "obj.data", "*/_darknet.labels")),
    ("voc", ("*.xml", "*/*.xml", "*/*/*.xml", "*/*/*/*.xml")),
    ("csv", ("*.csv", "*/*.csv")),
    ("yolo", ("classes.txt",)),
)
# Where a json of all images may be, not divided into train and val.
UNDIVIDED_PLACES = ("annotations/*.json", "*.json")

# The lists of a json, and the fields that every entry must have.
FIELDS = {
    "images": ("id", "file_name"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
OR_ELSE = {"file_name": "file_name (in LVIS coco_url)"}    # how messages name a field
MAX_ID = 2 ** 63            # ids are 64-bit integers
MAX_COORDINATE = 1e6        # px; a box beyond it is a mistake
MAX_NAME_BYTES = 255        # of one part of a path, the limit of common file systems
MAX_PATH_BYTES = 1000
# If a larger share of the boxes lies within [0, 1], the json is refused as normalized.
NORMALIZED_SHARE = 0.5
# If this share of the boxes leaves the image, and a larger share than the second would fit as
# [x1, y1, x2, y2], the json is refused.
XYXY_LEAVE_SHARE = 0.1
XYXY_FIT_SHARE = 0.95


class Problem(NamedTuple):
    """One thing that is wrong with a data set."""
    level: str    # fatal: training refuses the data; error: results may suffer; warning: handled
    kind: str     # heading under which the check lists it
    where: str    # the entry or file, and what is wrong there


# ---------------------------------------------------------------------------- files and folders

def json_path(root: str | Path, split: str) -> Path:
    """Return the first of JSON_PLACES that exists for a split; if none does, COCO's own place."""
    names = SPLIT_NAMES.get(split, (split,))
    places = [Path(root) / place.format(split=name) for place in JSON_PLACES for name in names]
    return next((path for path in places if os.path.isfile(path)), places[0])


def images_folder(root: str | Path, split: str, content: dict) -> Path:
    """Return the folder that holds the images of a json. Raises UserError if none does."""
    files = [image["file_name"] for image in content["images"][:20]]
    names = SPLIT_NAMES.get(split, (split,))
    places = [Path(root) / place.format(split=name) for place in IMAGE_PLACES for name in names]
    for place in places:
        if any(os.path.exists(place / file) for file in files):
            return place
    raise UserError(
        f"{places[0]}: expected the images of the json there (such as {one_line(files[0])}), got "
        f"none of the first {len(files)}; put them there or correct file_name in "
        f"{json_path(root, split)}")


def read_json(path: str | Path, root: str | Path = "", split: str = "") -> dict:
    """Read a COCO json. Raises UserError if the file is missing or is not a JSON object.

    root, split: data folder and split, which the error message about a missing file examines
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(missing_json(path, Path(root), split))
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        reason = one_line(str(error))
        raise UserError(
            f"{path}: expected JSON, got a file that cannot be parsed ({reason}); write it anew"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: expected a JSON object with images, annotations and categories, got a "
            f"{type(content).__name__}; a list is often a results file: give the ground truth")
    name_files(content.get("images"))
    return content


def name_files(images) -> None:
    """Name the files of LVIS's images, which have a `coco_url` and no `file_name`, in place."""
    if not isinstance(images, list):
        return
    for image in images:
        if isinstance(image, dict) and "file_name" not in image:
            url = image.get("coco_url")
            if isinstance(url, str):
                place = url.partition("://")[2]                # host/train2017/1.jpg
                image["file_name"] = place.partition("/")[2]


def missing_json(path: Path, root: Path, split: str) -> str:
    """Return the error message for a missing json, with advice for what is in the folder."""
    if split and not os.path.isdir(root):
        got = "a file" if os.path.isfile(root) else "no such folder"
        return (f"{root}: expected a data folder with a COCO json, got {got}; correct the path "
                "(python scenes.py --write DIR makes an example)")
    layout = foreign_layout(root) if split else None
    if layout:
        return (f"{root}: expected a COCO json, got a folder in {layout.upper()} layout; convert "
                f"it: python -m tools.convert --from {layout} {root} OUT")
    undivided = [file for place in UNDIVIDED_PLACES for file in sorted(root.glob(place))]
    if split in ("train", "val") and undivided:
        return (f"{path}: expected a COCO json there, got no such file, though {undivided[0]} "
                "exists; divide the images into train and val: python -m tools.convert --from coco "
                f"{root} OUT")
    return (f"{path}: expected a COCO json there, got no such file; a data folder holds "
            "annotations/instances_{train,val}2017.json, train2017/ and val2017/, or train/ and "
            "valid/ with _annotations.coco.json as Roboflow exports them "
            "(python scenes.py --write DIR makes an example)")


def foreign_layout(root: Path) -> str | None:
    """Return "yolo", "voc" or "csv" if a folder looks like one, else None."""
    for layout, patterns in FOREIGN_LAYOUTS:
        for pattern in patterns:
            if next(root.glob(pattern), None):
                return layout
    return None


# ------------------------------------------------------------------------------ values of entries

def is_number(value, limit: float = MAX_COORDINATE) -> bool:
    """Whether a json value is a number, not true or false, with an absolute value up to `limit`."""
    return type(value) in (int, float) and abs(value) <= limit   # False for NaN


def listed_size(image: dict) -> tuple[int, int]:
    """Return (width, height) in px of a json image; 0 for a side without a positive number."""
    width, height = image.get("width"), image.get("height")
    return (int(width) if is_number(width) and width > 0 else 0,
            int(height) if is_number(height) and height > 0 else 0)


def listed_area(row: dict) -> float:
    """Return the area of a json annotation in pixels, that of its box if no usable one is given."""
    area = row.get("area")
    if is_number(area, MAX_COORDINATE ** 2) and area > 0:
        return float(area)
    return float(row["bbox"][2] * row["bbox"][3])


def degenerate_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Find boxes whose part inside the image has no width or no height: (n,) bool.

    boxes: (n, 4) xywh in px; sizes: (n, 2) width and height of their images, 0 = unknown
    """
    limits = np.where(sizes > 0, sizes, np.inf).reshape(-1, 2)
    low = np.clip(boxes[:, :2], 0, limits)
    high = np.clip(boxes[:, :2] + boxes[:, 2:], 0, limits)
    return ~(high > low).all(1)


# ------------------------------------------------------------------------------------- problems

def json_problems(content: dict) -> list[Problem]:
    """Report what is wrong with a json, except for its segmentations.

    If entries lack fields or have unusable ids, only these are reported.
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


def entry_problems(content, part):
    """Yield problems of one list of the json: missing list, missing fields, unusable ids.

    part: images, annotations or categories
    """
    entries = content.get(part)
    if not isinstance(entries, list) or (not entries and part != "annotations"):
        got = quoted(entries, 40) if part in content else "nothing"
        least = "a list" if part == "annotations" else "a list with at least one entry"
        yield Problem("fatal", f"no {part}", f"expected '{part}' to be {least}, got {got}")
        return
    id_fields = [field for field in FIELDS[part] if field.endswith("id")]
    for place, entry in enumerate(entries):
        where = f"{part}[{place}]"
        if not isinstance(entry, dict):
            yield Problem("fatal", f"incomplete {part}", f"{where}: expected an object")
            continue
        lacking = [field for field in FIELDS[part] if field not in entry]
        if lacking:
            names = [OR_ELSE.get(field, field) for field in lacking]
            yield Problem("fatal", f"incomplete {part}", f"{where} lacks {', '.join(names)}")
            continue
        ids = [entry[field] for field in id_fields]
        if not all(type(number) is int and abs(number) < MAX_ID for number in ids):
            yield Problem("fatal", "ids that are not 64-bit integers",
                          f"{where}: expected integer ids, got {one_line(ids, 60)}")
    # Annotation ids may repeat: the evaluation numbers annotations anew.
    level = "warning" if part == "annotations" else "fatal"
    ids = Counter(entry.get("id") for entry in entries
                  if isinstance(entry, dict) and type(entry.get("id")) is int)
    for number, count in ids.items():
        if count > 1:
            yield Problem(level, f"id used twice in {part}",
                          f"id {one_line(number, 40)} is used {count} times")


def category_problems(content):
    """Yield problems of class names: no text, or one name for several categories."""
    categories = content["categories"]
    for category in categories:
        name = category["name"]
        if type(name) not in (str, int) or name == "":
            yield Problem("fatal", "class names that are no text",
                          f"category {category['id']}: expected a name, got {quoted(name, 40)}")
    objects = Counter(row["category_id"] for row in content["annotations"])
    # as the data set names them: two long names may have the same beginning
    names = [one_line(str(category["name"])) for category in categories]
    for name, count in Counter(names).items():
        if count == 1:
            continue
        ids = [category["id"] for category, own in zip(categories, names) if own == name]
        with_objects = [number for number in ids if objects[number]]
        yield Problem("error" if len(with_objects) > 1 else "warning", "class name used twice",
                      f"{name!r} has ids {one_line(ids, 60)}: rename one or merge them")


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
                              f"{where}: expected a positive {side}, got {quoted(value, 40)}")
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
    """Return why a value cannot be the name of a file, or None if it can."""
    if not isinstance(name, str) or not name or "\0" in name:
        return f"expected text, got {quoted(name)}"
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return f"expected valid Unicode, got {one_line(name, 60)}"
    longest = max(len(part) for part in encoded.split(b"/"))
    if longest > MAX_NAME_BYTES or len(encoded) > MAX_PATH_BYTES:
        return (f"expected at most {MAX_NAME_BYTES} bytes between slashes and {MAX_PATH_BYTES} in "
                f"all, got {len(encoded)} in all: {one_line(name, 60)}")
    return None


def annotation_problems(content):
    """Yield problems of annotations one by one, then those of the usable boxes together."""
    images = {image["id"]: image for image in content["images"]}
    category_ids = {category["id"] for category in content["categories"]}
    usable = []
    seen = set()
    for row in content["annotations"]:
        fault = annotation_fault(row, images, category_ids)
        if fault:
            kind, text = fault
            yield Problem("fatal", kind, f"{describe(row, images)}: {text}")
            continue
        usable.append(row)
        area = row.get("area")
        if area is not None and not (is_number(area, MAX_COORDINATE ** 2) and area >= 0):
            yield Problem("warning", "unusable area (that of the box is used)",
                          f"{describe(row, images)}: got {quoted(area, 40)}")
        key = (row["image_id"], row["category_id"], *row["bbox"])
        if key in seen:
            yield Problem("warning", "duplicate annotation",
                          f"{describe(row, images)}: same image, class and box as an earlier one")
        seen.add(key)
    if usable:
        yield from box_problems(usable, images)


def describe(row, images) -> str:
    """Return the id, the image id and the file name of an annotation, for messages."""
    image = images.get(row["image_id"])
    file = one_line(image["file_name"]) if image else "not listed"
    return f"annotation {one_line(row.get('id', '?'), 40)} (image {row['image_id']}, {file})"


def annotation_fault(row, images, category_ids) -> tuple[str, str] | None:
    """Return what makes an annotation unusable, (kind, text), or None if it is usable."""
    box = row["bbox"]
    crowd = row.get("iscrowd", 0)
    if row["image_id"] not in images:
        return "unknown image id", f"expected an id from images, got {row['image_id']}"
    if row["category_id"] not in category_ids:
        text = f"expected an id from categories, got category {row['category_id']}"
        return "unknown category id", text
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(value) for value in box):
        text = f"expected [x, y, width, height], four numbers in px, got {quoted(box)}"
        return "malformed box", text
    if crowd not in (0, 1):
        return "malformed iscrowd", f"expected 0 or 1, got {quoted(crowd, 40)}"
    return None


def box_problems(rows, images):
    """Yield problems of boxes: normalized to [0, 1], xyxy instead of xywh, degenerate, outside."""
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
            "height] in pixels: multiply them by the width and height of their image. "
            f"First: {describe(first, images)}: {first['bbox']}")
        return
    for place in np.flatnonzero(normalized):
        yield Problem("warning", "box within [0, 1] (normalized?)",
                      f"{describe(rows[place], images)}: {rows[place]['bbox']}")

    # Boxes beyond the right or lower border. If [x1, y1, x2, y2] is read as [x, y, width, height],
    # every box with x1 + x2 > image width is one of them, and x2 > x1 makes every width greater
    # than its x, which real boxes rarely have all at once. 1 px is tolerated.
    beyond = (boxes[:, :2] + boxes[:, 2:] > limits + 1).any(1)
    fits_as_xyxy = (boxes[:, 2:] > boxes[:, :2]).all(1) & (boxes[:, 2:] <= limits + 1).all(1)
    many_leave = beyond.sum() >= max(1, XYXY_LEAVE_SHARE * len(boxes))
    if many_leave and fits_as_xyxy.mean() > XYXY_FIT_SHARE:
        first = rows[np.argmax(beyond)]
        yield Problem(
            "fatal", "boxes look like xyxy",
            f"{beyond.sum()} of {len(boxes)} boxes leave their image as [x, y, width, height], "
            f"{fits_as_xyxy.sum()} fit as [x1, y1, x2, y2]; COCO wants the former: subtract x1, y1 "
            f"from x2, y2. First: {describe(first, images)}: {first['bbox']}")
        return

    degenerate = degenerate_boxes(boxes, sizes)
    outside = beyond | (boxes[:, :2] < -1).any(1)
    for place in np.flatnonzero(degenerate | outside):
        kind = "box leaves the image (clipped)"
        if degenerate[place]:
            kind = "degenerate box (dropped)"
        width, height = sizes[place]
        text = f"{describe(rows[place], images)}: {boxes[place].tolist()} in {width} x {height} px"
        yield Problem("warning", kind, text)


def segmentation_problems(content: dict) -> dict[int, Problem]:
    """Return {position in annotations: problem} of malformed segmentations.

    content: a json without fatal problems
    """
    images = {image["id"]: image for image in content["images"]}
    problems = {}
    for place, row in enumerate(content["annotations"]):
        size = listed_size(images[row["image_id"]])
        fault = segmentation_fault(row.get("segmentation"), size)
        if fault:
            where = f"{describe(row, images)}: {fault}"
            problems[place] = Problem("error", "malformed segmentation", where)
    return problems
