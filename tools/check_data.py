"""Check a COCO-layout data set: a table of its classes, and every problem by file and id.

    python -m tools.check_data DIR      exit code 1 if there are errors

Three levels of problems: "fatal", training refuses the data set; "error", training runs, but
results may suffer; "warning", the program handles it, and nothing has to be done. Fatal problems
count as errors.
"""
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from data import (LARGE_AREA, SMALL_AREA, CocoFolder, DetectionData, class_counts,
                  objects_per_image)
from engine import coco_json, commands, lvis
from engine.class_labels import match_classes
from engine.coco_json import Problem
from engine.datasets import shared_images
from engine.errors import UserError, printable, user_errors
from engine.images import UnreadableImage, read_header, read_image, upright_size
from engine.notices import one_line, plural
from transforms import resized_size

# The quick check at the start of a run:
HEADERS_AT_START = 500   # image files that it opens at most, to read the header
LINES_AT_START = 3       # lines that it prints at most for each kind of problem
LEVELS = ("fatal", "error", "warning")


def file_problems(folder: Path, images: list[dict], decode: bool) -> list[Problem]:
    """Return missing and unreadable files, wrong sizes, and EXIF rotation.

    images: entries of a json; decode: read every pixel, else only the headers
    """
    problems = []

    def add(level, kind, where):
        problems.append(Problem(level, kind, where))

    for image in images:
        path = folder / image["file_name"]
        listed = coco_json.listed_size(image)
        where = f"image {image['id']}, {one_line(str(path), 300)}"
        if not os.path.exists(path):
            add("error", "missing file", where)
            continue
        try:
            header = read_header(path)
            if decode:
                read_image(path, listed)
        except UnreadableImage as error:
            add("error", "unreadable image", f"image {image['id']}, {one_line(str(error), 400)}")
            continue
        (width, height), rotate = upright_size(header, listed)
        if listed != (width, height):
            text = f"json says {listed[0]}x{listed[1]}, the file has {width}x{height}"
            if 0 in listed:
                text = f"the json lists no usable size, the file has {width}x{height}"
            add("error", "wrong width or height", f"{where}: {text}")
        if header.orientation != 1:
            action = "not applied, the json fits the unrotated pixels"
            if rotate:
                action = "the pixels are rotated by it"
            add("warning", "EXIF rotation", f"{where}: orientation {header.orientation}, {action}")
        if decode and header.several_pages:
            add("warning", "several pages (only the first is read)", where)
        if decode and header.mode.startswith("I"):
            add("warning", "16-bit image (scaled by its own range)", where)
    return problems


def report(problems: list[Problem], limit: int, errors_as_warnings: bool = False) -> None:
    """Print problems by kind, worst first, at most `limit` lines a kind.

    errors_as_warnings: print the level "error" as "warning", where the program goes on
    """
    kinds = {problem[:2] for problem in problems}
    for level, kind in sorted(kinds, key=lambda pair: (LEVELS.index(pair[0]), pair[1])):
        lines = [problem.where for problem in problems if problem[:2] == (level, kind)]
        title = "warning" if level == "error" and errors_as_warnings else level
        print(f"  {title}: {kind} ({len(lines)})")
        for line in lines[:limit]:
            print(f"      {line}")
        if len(lines) > limit:
            print(f"      ... and {len(lines) - limit} more (python -m tools.check_data DIR)")


def print_table(content: dict) -> None:
    """Print a table: images, boxes, and boxes of each of COCO's sizes, by class, without crowds."""
    rows = [row for row in content["annotations"] if not row.get("iscrowd")]
    areas = np.array([coco_json.listed_area(row) for row in rows])
    classes = np.array([row["category_id"] for row in rows])
    images = np.array([row["image_id"] for row in rows])
    bands = np.digitize(areas, (SMALL_AREA, LARGE_AREA))
    columns = ("id", "images", "boxes", "small", "medium", "large")
    print(f"  {'class':24}" + "".join(f"{column:>8}" for column in columns))
    for category in sorted(content["categories"], key=lambda category: category["id"]):
        mine = classes == category["id"]
        counts = np.bincount(bands[mine], minlength=3)
        cells = [category["id"], len(np.unique(images[mine])), mine.sum(), *counts]
        name = one_line(str(category["name"]), 24)
        print(f"  {name:24}" + "".join(f"{cell:>8}" for cell in cells))


def check_split(directory: Path, split: str, decode: bool) -> list[Problem]:
    """Print the table of one split and return its problems."""
    path = coco_json.json_path(directory, split)
    content = coco_json.read_json(path, directory, split)
    if split == "test":
        content.setdefault("annotations", [])   # those of a test set are often not public
    problems = coco_json.json_problems(content)
    if any(problem.level == "fatal" for problem in problems):
        return problems
    if lvis.is_lvis(content):
        lvis.read_federated(content, path)   # for its errors
    sizes = (plural(len(content["images"]), "image"),
             plural(len(content["annotations"]), "annotation"),
             plural(len(content["categories"]), "category", "categories"))
    print("  " + "   ".join(sizes))
    print_table(content)
    problems += coco_json.segmentation_problems(content).values()
    folder = coco_json.images_folder(directory, split, content)
    problems += file_problems(folder, content["images"], decode)
    return problems


def check(directory: str | Path, full: bool = True) -> int:
    """Print a table and every problem of train and val, and of test if it is there.

    full: decode every image, else only the headers

    Returns the number of errors. Fatal problems count, warnings do not. Raises UserError for a
    folder without any json of a split.
    """
    directory = Path(directory)
    errors = 0
    splits = ["train", "val"]
    if coco_json.json_path(directory, "test").is_file():
        splits.append("test")
    if not any(coco_json.json_path(directory, split).is_file() for split in splits):
        raise UserError(coco_json.missing_json(coco_json.json_path(directory, "train"), directory,
                                               "train"))
    for split in splits:
        print(one_line(str(coco_json.json_path(directory, split)), 300))
        problems = []
        try:
            problems += check_split(directory, split, full)
            problems += check_as_loaded(directory, split)
        except UserError as error:
            problems.append(Problem("fatal", "cannot be loaded", printable(str(error))))
        report(problems, limit=sys.maxsize)
        bad = sum(problem.level != "warning" for problem in problems)
        warnings = len(problems) - bad
        print(f"  {plural(bad, 'error')}, {plural(warnings, 'warning')}")
        errors += bad
    return errors


def check_as_loaded(directory: Path, split: str) -> list[Problem]:
    """Return the problems that only a loaded data set shows: no objects, classes unlike those of
    train, images that are also in train."""
    try:
        train = CocoFolder(directory, "train")
    except UserError:
        return []   # check_split has reported why
    if split == "train":
        if not class_counts(train).any():
            return [Problem("fatal", "nothing to learn", "no usable box in the training set")]
        return unused_classes(train)
    other = CocoFolder(directory, split)
    before = len(other.problems)
    match_classes(other, train.class_names, train.category_ids)
    return [*other.problems[before:], *shared_images(train, other)]


def quick_check(dataset: DetectionData, training: bool = True,
                num_queries: int = 0) -> list[Problem]:
    """Check a data set at the start of a run, by its json and some of its image headers.

    num_queries: those of the model; 0: it has none. Prints and returns the problems, and prints how
    much images shrink. Raises UserError for a training set without one usable box.
    """
    problems = list(dataset.problems)
    if isinstance(dataset, CocoFolder):
        count = min(len(dataset), HEADERS_AT_START)
        sampled = np.unique(np.linspace(0, len(dataset) - 1, count).astype(int))
        entries = []
        for k in sampled:
            width, height = dataset.sizes[k].tolist()
            entries.append({"id": int(dataset.image_ids[k]), "file_name": dataset.file_name(k),
                            "width": width, "height": height})
        problems += file_problems(dataset.folder, entries, decode=False)
        if training:
            problems += unused_classes(dataset)
    report(problems, LINES_AT_START, errors_as_warnings=True)
    if training:
        print_notes(dataset, num_queries)
    if training and not class_counts(dataset).any():
        raise UserError(
            f"{dataset.name}: expected at least one usable box to learn from, got none in "
            f"{plural(len(dataset), 'image')} ({dataset.degenerate} degenerate boxes dropped); "
            "python -m tools.check_data DIR shows what is there")
    return problems


def print_notes(dataset: DetectionData, num_queries: int) -> None:
    """Print what limits the result without being a fault: small objects, crowded images."""
    notes = []
    if isinstance(dataset, CocoFolder):
        notes.append(size_note(dataset))
    if num_queries:
        notes.append(query_warning(dataset, num_queries))
    for note in notes:
        if note:
            print(note)


def unused_classes(dataset: DetectionData) -> list[Problem]:
    """Return the classes without an object in the training set."""
    problems = []
    for label in np.flatnonzero(class_counts(dataset) == 0):
        name = dataset.class_names[label]
        where = f"{name!r} (id {dataset.category_ids[label]}): remove it if it is a placeholder"
        problems.append(Problem("warning", "class without objects", where))
    return problems


def query_warning(dataset: DetectionData, num_queries: int) -> str:
    """Return a warning if images have more objects than a model has queries, else ""."""
    counts = objects_per_image(dataset)
    crowded = int((counts > num_queries).sum())
    if not crowded:
        return ""
    return (f"warning: {crowded} of {plural(len(dataset), 'image')} have more objects (up to "
            f"{counts.max()}) than the model has queries ({num_queries}): the others cannot be "
            f"detected; use --num_queries {counts.max()} or more")


def size_note(dataset: CocoFolder) -> str:
    """Return how much a transform shrinks images and objects of a folder, "" if it does not."""
    transform = dataset.transform
    sizes = dataset.sizes[(dataset.sizes > 0).all(1)]                                # (n, 2)
    if not (len(sizes) and transform.sizes):
        return ""
    width, height = np.median(sizes, 0).astype(int).tolist()
    new_width, new_height = resized_size(width, height, max(transform.sizes), transform.max_size)
    scale = new_width / width
    if scale >= 1:
        return ""
    note = f"images of {width} x {height} px (median) are resized to {new_width} x {new_height} px"
    boxes = dataset.annotations.boxes[~dataset.annotations.crowd]                    # (n, 4)
    if len(boxes):
        side = np.median(np.sqrt(boxes[:, 2] * boxes[:, 3]))
        note += f": an object of {side:.0f} px (median) becomes one of {side * scale:.0f} px"
    return note


@dataclass
class Options:
    """Check a COCO-layout data set: a table of its classes, and every problem by file and id."""
    # data folder, with annotations/ and images
    directory: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]


def main(argv: list[str] | None = None) -> None:
    with user_errors("tools.check_data"):
        options = commands.parse(Options, "python -m tools.check_data", __doc__, argv)
        sys.exit(1 if check(options.directory) else 0)


if __name__ == "__main__":
    main()
