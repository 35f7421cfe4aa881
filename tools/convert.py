"""Convert labels in another format to COCO layout, and check them: exit code 1 for errors.

    python -m tools.convert --from yolo DIR OUT
    python -m tools.convert --from voc DIR OUT
    python -m tools.convert --from csv DIR OUT      DIR: a folder with tables, or one table
    python -m tools.convert --from coco DIR OUT     divides a COCO json that has all images

OUT gets annotations/instances_{train,val,test}2017.json and train2017/, val2017/, test2017/ with
the images, as hard links: they need no disk space and stay when DIR is removed. Where links are
impossible, between two disks for example, images are copied. OUT appears when it is complete.

The docstrings of tools/labels_yolo.py, labels_voc.py, labels_csv.py and labels_coco.py say what is
read, and where splits and classes come from. A folder without val images is divided: --val_share
of its images, chosen at random but always the same, are for validation. Every fault in the labels
is printed with its file and line, and then nothing is written (--skip_faulty leaves the faulty
labels and files out). Boxes without width or height are left out, as training would do.
"""
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from engine import coco_json
from engine.commands import parse, require
from engine.errors import UserError, user_errors
from engine.notices import plural
from tools import check_data, labels_coco, labels_csv, labels_voc, labels_yolo
from tools.labels import UNDIVIDED, LabeledImage, Labels, print_some

READERS = {"yolo": labels_yolo.read, "voc": labels_voc.read, "csv": labels_csv.read,
           "coco": labels_coco.read}


def convert(source: str, directory: str, out: str, val_share: float = 0.2,
            skip_faulty: bool = False) -> None:
    """Write a COCO-layout folder from labels in another format.

    source: yolo, voc, csv or coco
    directory: what to read; out: the folder to write, which may not exist
    val_share: fraction of the images for validation where the folder has no val images
    skip_faulty: leave out what is faulty instead of refusing the folder

    Raises UserError for faults in the labels, after printing them; nothing is written then.
    """
    require(source in READERS, f"--from {' or '.join(READERS)}", source)
    require(0 < val_share < 1, "--val_share between 0 and 1", val_share)
    root = Path(directory)
    target = Path(out)
    if not root.is_dir() and not (source == "csv" and root.is_file()):
        raise UserError(f"{root}: expected a folder of images and labels, got no such folder")
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: expected a new folder to write, got one that exists; remove "
                        "it, or name another one")
    if target.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{target}: expected a folder outside of {root}, got one inside: its "
                        "images would be read twice; name another one")
    labels = read(source, root)
    labels.refuse_faults(skip_faulty)
    labels.refuse_repeated(root)
    refuse_normalized(labels)
    print_some([f"note: {note}" for note in labels.notes])
    divide(labels, val_share)
    write_folder(labels, target)
    for split, images in labels.splits.items():
        objects = sum(len(image.objects) for image in images)
        print(f"{split}: {plural(len(images), 'image')}, {plural(objects, 'object')}")


def read(source: str, root: Path) -> Labels:
    """Read a folder in one of the formats. If it looks like another format, the error names that.
    """
    try:
        return READERS[source](root)
    except UserError as error:
        layout = coco_json.foreign_layout(root)
        if layout in (None, source):
            raise
        raise UserError(f"{error}; the folder looks like {layout.upper()}: --from {layout}"
                        ) from error


def refuse_normalized(labels: Labels) -> None:
    """Raise UserError if most boxes lie within one pixel: they are relative to the image size."""
    images = [image for split in labels.splits.values() for image in split]
    boxes = [item.box for image in images for item in image.objects]
    tiny = [box for box in boxes if max(box[0] + box[2], box[1] + box[3]) <= 1]
    if len(tiny) > coco_json.NORMALIZED_SHARE * len(boxes):
        raise UserError(f"expected boxes in pixels, got {len(tiny)} of {len(boxes)} within [0, 1]; "
                        "multiply them by the width and height of their image; nothing was written")


def divide(labels: Labels, val_share: float) -> None:
    """Give the images without a split one, and take val images from train if there are none."""
    splits = labels.splits
    undivided = splits.pop(UNDIVIDED, [])
    images = splits.pop("train", []) + undivided
    if not images:
        raise UserError("expected images with labels to train on, got none: put some into a folder "
                        "or list called train")
    if "val" not in splits:
        if len(images) < 2:
            raise UserError("expected at least two images, one to train on and one to evaluate on, "
                            f"got {len(images)}: add images with labels")
        count = round(val_share * len(images))
        count = min(max(count, 1), len(images) - 1)
        order = np.random.default_rng(0).permutation(len(images))
        chosen = set(order[:count].tolist())
        splits["val"] = [image for k, image in enumerate(images) if k in chosen]
        images = [image for k, image in enumerate(images) if k not in chosen]
        print(f"note: no val images: {count} of {count + len(images)}, chosen at random, are for "
              "validation (--val_share)")
    parts = {"train": images, "val": splits["val"], "test": splits.get("test")}
    labels.splits = {split: part for split, part in parts.items() if part}


# ---- writing -------------------------------------------------------------------------------------

def write_folder(labels: Labels, target: Path) -> None:
    """Write the COCO-layout folder under a temporary name, then rename it to `target`."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        (temporary / "annotations").mkdir(parents=True)
        for split, images in labels.splits.items():
            folder = temporary / f"{split}2017"
            folder.mkdir()
            files = file_names(images)
            for image, name in zip(images, files):
                link_or_copy(image.path, folder / name)
            path = temporary / "annotations" / f"instances_{split}2017.json"
            path.write_text(json.dumps(json_content(images, files, labels.names)))
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def file_names(images: list[LabeledImage]) -> list[str]:
    """Return a different file name for each image: its own name; if another image has that, its own
    with the name of its folder, or a number, in front.
    """
    names = []
    used = set()
    for image in images:
        name = image.path.name
        if name in used:
            name = f"{image.path.parent.name}_{name}"
        count = 2
        while name in used:
            name = f"{count}_{image.path.name}"
            count += 1
        used.add(name)
        names.append(name)
    return names


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link, or a copy where the file system refuses one."""
    source = source.resolve()      # a hard link to a symbolic link breaks when its target moves
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def json_content(images: list[LabeledImage], files: list[str], names: list[str]) -> dict:
    """Return the content of a COCO json. Ids count from 1."""
    category_ids = {name: place for place, name in enumerate(names, 1)}
    entries = []
    rows = []
    for image_id, (image, file) in enumerate(zip(images, files), 1):
        width, height = image.size
        entries.append({"id": image_id, "file_name": file, "width": width, "height": height})
        for item in image.objects:
            row = {"id": len(rows) + 1, "image_id": image_id,
                   "category_id": category_ids[item.name],
                   "bbox": [round(value, 3) for value in item.box],
                   "area": round(item.box[2] * item.box[3], 3),
                   "iscrowd": int(item.ignored)}
            if item.polygon:
                row["area"] = round(polygon_area(item.polygon), 3)
                row["segmentation"] = [[round(value, 3) for value in item.polygon]]
            row |= item.fields or {}
            rows.append(row)
    categories = [{"id": number, "name": name} for name, number in category_ids.items()]
    return {"images": entries, "annotations": rows, "categories": categories}


def polygon_area(polygon: list[float]) -> float:
    """Return the area of a polygon x, y, x, y, ... (the shoelace formula)."""
    points = np.array(polygon).reshape(-1, 2)                                        # (n, 2)
    following = np.roll(points, -1, 0)
    cross = points[:, 0] * following[:, 1] - points[:, 1] * following[:, 0]
    return float(abs(cross.sum()) / 2)


# ---- command line --------------------------------------------------------------------------------

@dataclass
class Options:
    """Convert labels in another format to COCO layout, and check them."""
    # folder of images and labels; for csv also one table
    directory: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    # COCO-layout folder to write, which may not exist
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    source: Annotated[str, tyro.conf.arg(name="from")]   # yolo, voc, csv or coco
    # fraction of the images for validation, where the folder has no val images
    val_share: float = 0.2
    skip_faulty: bool = False    # leave out what is faulty, instead of writing nothing


def main(argv: list[str] | None = None) -> None:
    with user_errors("tools.convert"):
        options = parse(Options, "python -m tools.convert", __doc__, argv)
        convert(options.source, options.directory, options.out, options.val_share,
                options.skip_faulty)
        print()
        sys.exit(1 if check_data.check(options.out) else 0)


if __name__ == "__main__":
    main()
