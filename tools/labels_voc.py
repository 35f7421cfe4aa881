"""Read labels in Pascal VOC format: an XML file for each image.

The XML files lie in Annotations/, the images in JPEGImages/ or images/, or both side by side.
Splits: ImageSets/Main/{train,val,test}.txt, or folders called train, val or valid, test. Classes
are sorted by name unless classes.txt gives their order.

Boxes are xmin, ymin, xmax, ymax in px. The files of the VOC challenge itself (`source` names a VOC
database) count pixels from 1 and include the last one: 1 is subtracted from xmin and ymin. Objects
marked `difficult` become crowds: they are neither learned nor counted. An image without an XML file
counts as not labeled and is left out. Segmentation pictures are not read.
"""
import re
from pathlib import Path
from xml.etree import ElementTree

from engine.errors import UserError
from engine.images import SUFFIXES
from engine.notices import one_line, plural
from tools.labels import (SPLITS, UNDIVIDED, LabeledImage, Labels, Object, corner_box, image_files,
                          image_size, name_classes, number, read_text, size_fits, split_of)

IMAGE_FOLDERS = ("JPEGImages", "images", "Images")
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read(root: Path) -> Labels:
    """Read a folder in VOC layout."""
    labels = Labels()
    files = sorted(root.rglob("*.xml"))
    if not files:
        raise UserError(f"{root}: expected XML files of labels, got none")
    sets = image_sets(root, {path.stem for path in files})
    used = set()
    left_out = 0
    for path in files:
        if sets and path.stem not in sets:
            left_out += 1
            continue
        image = find_image(path, labels)
        if image is None:
            continue
        used.add(image)
        labeled = read_file(path, image, labels)
        if labeled is not None:
            for split in sets.get(path.stem, [UNDIVIDED]):
                labels.add(split or split_of(path, root), labeled)
    name_classes(root, labels)
    if left_out:
        labels.notes.append(f"{plural(left_out, 'XML file')} in no list of ImageSets/Main left out")
    unlabeled = [image for image in image_files(root) if image not in used]
    if unlabeled and not left_out:
        labels.notes.append(f"{plural(len(unlabeled), 'image')} without an XML file left out, "
                            f"first: {unlabeled[0]}")
    return labels


def image_sets(root: Path, names: set[str]) -> dict[str, list[str]]:
    """Return {name without suffix: its splits} of ImageSets/Main, {} if there is none.

    Without train.txt, what only trainval.txt lists is undivided.

    names: those of the XML files. They may hold spaces; else a number may follow a name.
    """
    folder = next(iter(sorted(root.rglob("ImageSets/Main"))), None)
    if folder is None:
        return {}
    lists = {path.stem.lower(): path for path in sorted(folder.glob("*.txt"))}
    found = {}
    for name, path in lists.items():
        split = SPLITS.get(name)
        if split is None and name == "trainval" and "train" not in lists:
            split = UNDIVIDED
        if split is None:
            continue        # lists of single classes, such as cat_train.txt
        for line in read_text(path).splitlines():
            name = line.strip()
            if name and name not in names:
                name = name.split()[0]
            if name:
                found.setdefault(name, set()).add(split)
    return {name: sorted(splits - {UNDIVIDED}) or [UNDIVIDED] for name, splits in found.items()}


def find_image(path: Path, labels: Labels) -> Path | None:
    """Return the image of an XML file: the one that it names, or the one of its own name."""
    folders = [path.parent]
    for parent in (path.parent, path.parent.parent, path.parent.parent.parent):
        folders += [parent / name for name in IMAGE_FOLDERS]
    # Annotations/train/a.xml belongs to JPEGImages/train/a.jpg.
    folders += [folder / path.parent.name for folder in folders[1:]]
    named = re.search(r"<filename>\s*([^<]+?)\s*</filename>", read_text(path))
    names = []
    if named:
        names.append(re.split(r"[/\\]", named[1])[-1])
    for suffix in sorted(SUFFIXES):
        names += [path.stem + suffix, path.stem + suffix.upper()]
    for name in names:
        for folder in folders:
            if (folder / name).is_file():
                return folder / name
    labels.fault(path, 0, f"expected its image {one_line(names[0], 100)} beside it or in "
                          f"{IMAGE_FOLDERS[0]}, got none; remove the XML file, or add the image")
    return None


def read_file(path: Path, image: Path, labels: Labels) -> LabeledImage | None:
    """Read one XML file. Faults are added to `labels`."""
    text = read_text(path)
    try:
        annotation = ElementTree.fromstring(path.read_bytes())
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        line = getattr(error, "position", (0, 0))[0]
        labels.fault(path, line, f"expected XML, got a file that cannot be parsed ({error})")
        return None
    line = text.count("\n", 0, max(text.find("<size>"), 0)) + 1
    listed = listed_size(annotation)
    size = image_size(image, labels, listed)
    if size is None:
        return None
    labeled = LabeledImage(image, size)
    if listed is None:
        labels.notes.append(f"{path}:{line}: expected <size> with width and height, got none; "
                            f"that of the image is used, {size[0]} x {size[1]} px")
    elif not size_fits(labeled, listed, labels, path, line):
        return None
    first = 1 if "VOC" in annotation.findtext("source/database", "") else 0
    lines = [text.count("\n", 0, found.start()) + 1 for found in re.finditer("<object>", text)]
    for count, element in enumerate(annotation.findall("object")):
        line = lines[count] if count < len(lines) else 0
        try:
            labeled.objects.append(read_object(element, size, first))
        except ValueError as error:
            labels.fault(path, line, error)
    return labeled


def listed_size(annotation) -> tuple[int, int] | None:
    """Return the width and height of the image that an XML file lists, None if it lists none."""
    try:
        width = int(number(annotation.findtext("size/width", "")))
        height = int(number(annotation.findtext("size/height", "")))
    except ValueError:
        return None
    return (width, height) if min(width, height) > 0 else None


def read_object(element, size: tuple[int, int], first: int) -> Object:
    """Turn an <object> into an object. Raises ValueError for what is wrong.

    first: the number of the first pixel, 0 or 1
    """
    name = element.findtext("name", "").strip()
    if not name:
        raise ValueError("expected the class in <name>, got none")
    box = element.find("bndbox")
    if box is None:
        raise ValueError(f"expected <bndbox> for the {one_line(name, 60)}, got none")
    corners = []
    for corner in CORNERS:
        corners.append(number(box.findtext(corner, "").strip()))
    corners[0] -= first
    corners[1] -= first
    difficult = element.findtext("difficult", "0").strip() == "1"
    return Object(name, corner_box(corners, size), ignored=difficult)
