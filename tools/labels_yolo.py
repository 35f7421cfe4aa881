"""Read labels in YOLO format: a text file for each image, a line for each object.

    class cx cy w h                     a box: center, width, height, as shares of the image
    class x1 y1 x2 y2 x3 y3 ...         a polygon, which becomes a segmentation and its box

The class is a number from 0. Class names come from data.yaml (any .yaml file of the folder with
`names`), or from classes.txt, obj.names, labels.txt, _darknet.labels: a name a line. The images of
a split are where data.yaml says, else in folders called train, val or valid, test. In a Darknet
folder obj.data (any .data file with `names`) stands for data.yaml. Labels lie beside their image,
or in a folder `labels` beside its folder `images`. An image without a label file, or with an empty
one, has no objects, as YOLO trainers read it.
"""
from pathlib import Path

import yaml

from engine.errors import UserError
from engine.images import SUFFIXES
from engine.notices import one_line, plural
from tools.labels import (OUTSIDE, SPLITS, UNDIVIDED, LabeledImage, Labels, NoArea, Object,
                          image_files, image_size, listed_names, number, read_text, split_of)

NAME_FILES = ("classes.txt", "obj.names", "labels.txt", "labels/classes.txt", "_darknet.labels",
              "train/_darknet.labels")


def read(root: Path) -> Labels:
    """Read a folder in YOLO layout."""
    labels = Labels()
    path, settings = read_settings(root)
    labels.names = class_names(root, path, settings)
    files = listed_images(path, settings, labels) or images_by_folder(root, labels)
    with_labels = 0
    without = []
    for split, images in files.items():
        for image in images:
            label_file = label_path(image)
            size = image_size(image, labels)
            if size is None:
                continue
            objects = []
            if label_file.is_file():
                with_labels += 1
                objects = read_objects(label_file, size, labels)
            else:
                without.append(image)
            labels.add(split, LabeledImage(image, size, objects))
    if not with_labels and not labels.faults:      # else the faults say more
        raise UserError(f"{root}: expected label files (.txt) beside the images, or in `labels` "
                        f"beside `images`, got none for {plural(len(without), 'image')}")
    if without:
        labels.notes.append(f"{plural(len(without), 'image')} without a label file count as images "
                            f"without objects, first: {without[0]}")
    report_orphans(root, labels)
    return labels


# ---- classes and splits --------------------------------------------------------------------------

def read_settings(root: Path) -> tuple[Path, dict]:
    """Return data.yaml, or another .yaml file with `names`, and its content.

    Without one: Darknet's obj.data and its content in the same form, {} if that lacks, too.
    """
    for path in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        try:
            content = yaml.safe_load(read_text(path, "strict"))
        except UserError:
            raise
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: expected YAML, got a file that cannot be parsed "
                            f"({one_line(reason, 300)}); correct it") from error
        if isinstance(content, dict) and "names" in content:
            return path, content
    for path in sorted(root.rglob("*.data")):
        content = read_darknet(path)
        if content:
            return path, content
    return root / "data.yaml", {}


def read_darknet(path: Path) -> dict:
    """Return the entries of Darknet's obj.data (a line `key = value` each) as those of data.yaml,
    {} for a file without `names`."""
    entries = {}
    for line in read_text(path).splitlines():
        key, _, value = line.partition("=")
        entries[key.strip().lower()] = value.strip()
    if not entries.get("names"):
        return {}
    place = find_entry(path, {}, entries["names"])
    if place is None:
        raise UserError(f"{path}: expected the names of the classes at "
                        f"{one_line(entries['names'])}, got no such file; correct the path there")
    content = {key: value for key, value in entries.items() if key in SPLITS}
    content["names"] = listed_names(place.parent, (place.name,))
    count = entries.get("classes", "")
    if count:
        content["nc"] = int(count) if count.isdecimal() else count
    return content


def class_names(root: Path, path: Path, settings: dict) -> list[str]:
    """Return the class names, in the order of their numbers."""
    names = settings.get("names") or listed_names(root, NAME_FILES)
    if isinstance(names, dict):
        wanted = list(range(len(names)))
        if sorted(names, key=str) != sorted(wanted, key=str):
            raise UserError(f"{path}: expected names numbered 0 to {len(names) - 1}, got "
                            f"{one_line(list(names), 80)}; correct the numbers there")
        names = [names[k] for k in wanted]
    if not isinstance(names, list) or not names:
        raise UserError(f"{root}: expected the names of the classes in data.yaml (names: [...]) or "
                        "classes.txt, got none; write classes.txt, a name a line in the order of "
                        "the class numbers")
    if len(set(map(str, names))) < len(names):
        raise UserError(f"{root}: expected a different name for each class, got one twice in "
                        f"{one_line(names, 200)}; rename one of the two")
    count = settings.get("nc", len(names))
    if count != len(names):
        raise UserError(f"{path}: expected as many names as nc, got {len(names)} names and nc "
                        f"{one_line(count, 20)}; correct nc, or remove it")
    if "kpt_shape" in settings:
        raise UserError(f"{path}: expected boxes or polygons, got keypoints (kpt_shape), which are "
                        "not read; export the boxes alone, without kpt_shape")
    return [str(name) for name in names]


def listed_images(path: Path, settings: dict, labels: Labels) -> dict[str, list[Path]]:
    """Return the images of each split that data.yaml lists, {} if it lists none."""
    files = {}
    for key, value in settings.items():
        split = SPLITS.get(str(key).lower())
        if split is None or not value:
            continue
        entries = value if isinstance(value, list) else [value]
        for entry in entries:
            place = find_entry(path, settings, str(entry))
            if place is not None:
                files.setdefault(split, []).extend(images_at(place, labels))
            elif split == "test":
                labels.notes.append(f"no test images at {one_line(str(entry))}")
            else:
                raise UserError(f"{path}: expected the images of {key} at {one_line(str(entry))}, "
                                "got no such folder; correct the path there")
    return files


def find_entry(path: Path, settings: dict, entry: str) -> Path | None:
    """Return what an entry of data.yaml means: relative to its `path`, or to its own folder.

    Exported files often name folders of another machine, or begin with "../" though the folder lies
    beside them: then only the last parts of the path are used.
    """
    entry = entry.replace("\\", "/")
    parts = Path(entry).parts
    base = path.parent / str(settings.get("path") or "")
    inner = [part for part in parts if part not in ("..", ".")]
    places = [base / entry, path.parent / entry, path.parent.joinpath(*inner),
              path.parent.joinpath(*parts[-2:]), path.parent.joinpath(*parts[-1:])]
    return next((place for place in places if place.exists()), None)


def images_at(place: Path, labels: Labels) -> list[Path]:
    """Return the images in a folder, or those that a text file lists."""
    if place.is_dir():
        return image_files(place)
    found = []
    lines = read_text(place).splitlines()
    for count, line in enumerate(lines, 1):
        text = line.strip()
        if not text:
            continue
        path = listed_file(text, place.parent)
        if path is None:
            labels.fault(place, count, f"expected an image file, got {one_line(text, 100)!r}")
        else:
            found.append(path)
    return found


def listed_file(text: str, folder: Path) -> Path | None:
    """Return the image that a line of a list file names, None if there is none.

    Lines often begin with folders of the machine that wrote them (data/images/train/1.jpg): then
    only the last parts of the path are used.
    """
    text = text.replace("\\", "/")
    inner = [part for part in Path(text).parts if part not in ("..", ".")]
    endings = [folder.joinpath(*inner[first:]) for first in range(len(inner))]
    places = [Path(text), folder / text, *endings]
    return next((place for place in places if place.is_file()), None)


def images_by_folder(root: Path, labels: Labels) -> dict[str, list[Path]]:
    """Return the images of each split, by the names of their folders."""
    files = {}
    for image in image_files(root):
        files.setdefault(split_of(image, root), []).append(image)
    if not files:
        raise UserError(f"{root}: expected images, got none ({', '.join(sorted(SUFFIXES))})")
    if len(files) > 1 and UNDIVIDED in files:
        outside = files.pop(UNDIVIDED)
        labels.notes.append(f"{plural(len(outside), 'image')} outside the folders of the splits "
                            f"left out, first: {outside[0]}")
    return files


# ---- label files ---------------------------------------------------------------------------------

def label_path(image: Path) -> Path:
    """Return where the labels of an image are: in `labels` for `images`, else beside it."""
    beside = image.with_suffix(".txt")
    folder = moved(image.parent, "images", "labels")
    if folder is None or beside.is_file():
        return beside
    return folder / beside.name


def moved(folder: Path, old: str, new: str) -> Path | None:
    """Return a path whose last part called `old` is renamed to `new`, None if no part is."""
    parts = list(folder.parts)
    for place in reversed(range(len(parts))):
        if parts[place] == old:
            parts[place] = new
            return Path(*parts)
    return None


def read_objects(path: Path, size: tuple[int, int], labels: Labels) -> list[Object]:
    """Read a label file. Faults are added to `labels`.

    size: width and height of the image in px
    """
    objects = []
    text = read_text(path)
    for count, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            objects.append(parse_line(line.split(), labels.names, size))
        except ValueError as error:
            labels.fault(path, count, error)
    return objects


def parse_line(words: list[str], names: list[str], size: tuple[int, int]) -> Object:
    """Turn the words of one line into an object. Raises ValueError for what is wrong."""
    is_polygon = len(words) >= 7 and len(words) % 2 == 1
    if len(words) != 5 and not is_polygon:
        hint = "; is the sixth a score?" if len(words) == 6 else ""
        raise ValueError("expected a class and 4 numbers (a box), or 3 or more points (a polygon), "
                         f"got {plural(len(words), 'value')}{hint}")
    label = number(words[0])
    if label not in range(len(names)):
        raise ValueError(f"expected a class from 0 to {len(names) - 1}, got {words[0][:20]}")
    values = [number(word) for word in words[1:]]
    wrong = [value for value in values if not -OUTSIDE <= value <= 1 + OUTSIDE]
    if wrong:
        raise ValueError(f"expected coordinates from 0 to 1, got {wrong[0]:g}; pixels are divided "
                         "by the width and height of the image")
    width, height = size
    if is_polygon:
        xs = [min(max(x, 0), 1) * width for x in values[0::2]]
        ys = [min(max(y, 0), 1) * height for y in values[1::2]]
        box = (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))
        polygon = [value for point in zip(xs, ys) for value in point]
    else:
        cx, cy, w, h = values
        left = max(cx - w / 2, 0) * width
        top = max(cy - h / 2, 0) * height
        right = min(cx + w / 2, 1) * width
        bottom = min(cy + h / 2, 1) * height
        box = (left, top, right - left, bottom - top)
        polygon = None
    if box[2] <= 0 or box[3] <= 0:
        raise NoArea("expected an object with width and height, got none")
    return Object(names[int(label)], box, polygon)


def report_orphans(root: Path, labels: Labels) -> None:
    """Add a fault for every label file whose image is missing."""
    for path in sorted(root.rglob("*.txt")):
        folder = moved(path.parent, "labels", "images") or path.parent
        stems = [path.with_suffix(""), folder / path.stem]
        if is_label_file(path) and not any(has_image(stem) for stem in stems):
            labels.fault(path, 0, f"expected its image in {folder}, got none; remove the label "
                                  "file, or add the image")


def has_image(stem: Path) -> bool:
    """Whether there is an image with this path without suffix."""
    suffixes = [*SUFFIXES, *(suffix.upper() for suffix in SUFFIXES)]
    return any(stem.with_name(stem.name + suffix).is_file() for suffix in suffixes)


def is_label_file(path: Path) -> bool:
    """Whether the first line of a text file looks like labels."""
    words = read_text(path).partition("\n")[0].split()
    try:
        for word in words:
            number(word)
    except ValueError:
        return False
    return len(words) >= 5
