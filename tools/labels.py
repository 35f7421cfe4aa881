"""Labeled images that are converted from another format to COCO, and the faults in their labels.

The readers (labels_yolo.py, labels_voc.py, labels_csv.py, labels_coco.py) return Labels; convert.py
writes them.
"""
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError
from engine.images import SUFFIXES, UnreadableImage, read_header, upright_size
from engine.notices import one_line, plural

# Names of folders and files that stand for a split.
SPLITS = {
    "train": "train", "training": "train", "train2017": "train",
    "val": "val", "valid": "val", "validation": "val", "val2017": "val",
    "test": "test", "testing": "test", "test2017": "test",
}
UNDIVIDED = ""        # the split of images in a folder that is not divided
OUTSIDE = 0.01        # how far a relative coordinate may lie outside [0, 1], for rounding
LARGEST_FILE = 2 ** 31
SHOWN = 20            # faults and notes that are printed; the rest is counted


class NoArea(ValueError):
    """A box without width or height: nothing can be learned from it, so it is left out."""


class Object(NamedTuple):
    """One labeled object."""
    name: str                          # class
    box: tuple                         # x, y, width, height in px
    polygon: list | None = None        # x, y, x, y, ... in px
    ignored: bool = False              # neither learned nor counted
    fields: dict | None = None         # area and segmentation, where they come from a COCO json


@dataclass
class LabeledImage:
    """An image file and its objects."""
    path: Path
    size: tuple[int, int]              # width and height in px, as listed in the json
    objects: list[Object] = field(default_factory=list)


@dataclass
class Labels:
    """The result of a reader."""
    # split -> images; UNDIVIDED where the folder has no splits
    splits: dict[str, list[LabeledImage]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)       # of the classes, in their order
    faults: list[str] = field(default_factory=list)      # "file:line: expected ..., got ..."
    notes: list[str] = field(default_factory=list)       # what was left out or assumed

    def fault(self, path: Path, line: int, error: ValueError | str) -> None:
        """Add a fault in a line of a file; line 0: in the file as a whole. A box without area is
        only a note, as training leaves such boxes out, too."""
        place = f"{path}:{line}" if line else str(path)
        text = f"{one_line(place, 300)}: {error}"
        if isinstance(error, NoArea):
            self.notes.append(f"{text}; left out")
        else:
            self.faults.append(text)

    def add(self, split: str, image: LabeledImage) -> None:
        """Add an image to a split."""
        self.splits.setdefault(split, []).append(image)

    def refuse_faults(self, skip: bool = False) -> None:
        """Print the faults, a line each, and raise UserError if there are any.

        skip: go on without what is faulty
        """
        print_some(self.faults)
        count = plural(len(self.faults), "fault")
        if self.faults and skip:
            self.notes.insert(0, f"{count} left out (--skip_faulty)")
        elif self.faults:
            raise UserError(f"expected labels without faults, got {count}, first: "
                            f"{self.faults[0]}; correct them, or leave them out with "
                            "--skip_faulty; nothing was written")

    def refuse_repeated(self, root: Path) -> None:
        """Raise UserError if an image is in two splits, or twice in one: images without a val split
        are divided at random, and one of the two may be for validation."""
        places = {}
        for split, images in self.splits.items():
            for image in images:
                places.setdefault(image.path.resolve(), []).append(split or "undivided")
        several = [path for path, splits in places.items() if len(splits) > 1]
        if several:
            first = several[0]
            raise UserError(f"{root}: expected every image in one split and listed once, got "
                            f"{plural(len(several), 'image')} listed several times, first: {first} "
                            f"({', '.join(places[first])}); leave each in one split, and in one "
                            "list, json or XML file; nothing was written")


def print_some(lines: list[str]) -> None:
    """Print the first lines, and how many more there are."""
    for line in lines[:SHOWN]:
        print(one_line(line, 600))
    if len(lines) > SHOWN:
        print(f"... and {len(lines) - SHOWN} more")


def read_text(path: Path, errors: str = "replace") -> str:
    """Read a text file of labels. UserError for anything else: reading a pipe would block forever.

    errors: what happens to bytes that are not UTF-8, as for `open`
    """
    if not path.is_file():
        raise UserError(f"{path}: expected a text file, got a folder or a device; remove it")
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise UserError(f"{path}: expected a text file of at most 2 GiB, got "
                        f"{size / 2 ** 30:.0f} GiB; remove or divide it")
    return path.read_text(encoding="utf-8-sig", errors=errors)


def image_files(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, sorted."""
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
    return sorted(path for path in paths if path.is_file())


def files_by_name(folder: Path) -> dict[str, list[Path]]:
    """Return {name: image files with this name} of a folder and its subfolders."""
    files = {}
    for path in image_files(folder):
        files.setdefault(path.name, []).append(path)
    return files


def files_named(name: str, places: dict[str, list[Path]]) -> list[Path]:
    """Return the image files of this name, [] if there is none. Else .JPG counts as .jpg.

    places: what files_by_name returns
    """
    stem, dot, suffix = name.rpartition(".")
    for spelling in (name, stem + dot + suffix.lower(), stem + dot + suffix.upper()):
        if spelling in places:
            return places[spelling]
    return []


def split_of(path: Path, root: Path) -> str:
    """Return the split that the first folder between `root` and `path` names, else UNDIVIDED."""
    for part in path.relative_to(root).parts[:-1]:
        if part.lower() in SPLITS:
            return SPLITS[part.lower()]
    return UNDIVIDED


def split_of_file(path: Path, root: Path) -> str:
    """Return the split in the name of a file of labels, such as train_labels.csv, else that of its
    folders."""
    for word in re.split(r"[^a-z0-9]+", path.stem.lower()):
        if word in SPLITS:
            return SPLITS[word]
    return split_of(path, root)


def image_size(path: Path, labels: Labels,
               listed: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """Return (width, height) of an image as it is displayed; a fault and None if unreadable.

    listed: the size that belongs to its boxes. It is returned if it is that of the unrotated pixels
        of an image that is displayed rotated
    """
    try:
        size, _ = upright_size(read_header(path), listed)
    except UnreadableImage as error:
        labels.faults.append(one_line(str(error), 400))
        return None
    return size


def size_fits(image: LabeledImage, listed: tuple[int, int], labels: Labels, path: Path,
              line: int = 0) -> bool:
    """Return whether the labels list the size of their image; if not, it is a fault.

    listed: width and height in px; path, line: where they are listed
    """
    if listed == image.size:
        return True
    width, height = image.size
    labels.fault(path, line, f"expected the size of {image.path.name}, {width} x {height} px, got "
                             f"{listed[0]} x {listed[1]}; the boxes belong to another image")
    return False


def number(text: str) -> float:
    """Return a number below 1e9 in magnitude. Raises ValueError, with what was expected, for
    anything else."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < 1e9:      # True also for NaN
        raise ValueError(f"expected a number, got {one_line(text, 40)!r}")
    return value


def corner_box(corners: list[float], size: tuple[int, int]) -> tuple:
    """Return x, y, width, height of x1, y1, x2, y2, all in px.

    Raises ValueError for a box without area or outside the image, whose size is (width, height).
    One pixel beyond the border is rounding: such boxes are cut off there.
    """
    x1, y1, x2, y2 = corners
    width, height = size
    if x2 == x1 or y2 == y1:
        raise NoArea(f"expected a box with width and height, got {x1:g}, {y1:g}, {x2:g}, {y2:g}")
    if x2 < x1 or y2 < y1:
        raise ValueError(f"expected x1 < x2 and y1 < y2, got {x1:g}, {y1:g}, {x2:g}, {y2:g}")
    if min(x1, y1) < -1 or x2 > width + 1 or y2 > height + 1:
        raise ValueError(f"expected a box inside the image of {width} x {height} px, got "
                         f"{x1:g}, {y1:g}, {x2:g}, {y2:g}")
    left = max(x1, 0.0)
    top = max(y1, 0.0)
    return left, top, min(x2, width) - left, min(y2, height) - top


def name_classes(root: Path, labels: Labels) -> None:
    """Set the class names: the lines of classes.txt, or those of the objects in alphabetical order.

    An object of a class that classes.txt lacks is a fault, and is removed.
    """
    images = [image for split in labels.splits.values() for image in split]
    used = {item.name for image in images for item in image.objects}
    labels.names = listed_names(root, ("classes.txt", "labels.txt")) or sorted(used)
    for name in sorted(used - set(labels.names)):
        labels.faults.append(f"class {one_line(name, 60)!r}: expected one of classes.txt, got "
                             "another one; add it there, or remove that file")
    for image in images:
        image.objects = [item for item in image.objects if item.name in labels.names]


def listed_names(root: Path, files: tuple[str, ...]) -> list[str]:
    """Return the lines of the first of these text files that exists, [] if none does."""
    for name in files:
        path = root / name
        if path.is_file():
            return [line.strip() for line in read_text(path).splitlines() if line.strip()]
    return []
