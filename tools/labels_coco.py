"""Read COCO jsons that are not divided into train and val, as annotation tools export them.

Every json with images, annotations and categories in the folder is read; others are left out. A
split in its name (instances_train.json) or in the names of its folders is that of its images. An
image is at its `file_name`, seen from the folder or from `images` in it; else the only image file
of its name. Categories of several jsons are put together by name. Segmentations, areas and crowds
stay as they are.
"""
import json
from pathlib import Path

from engine import coco_json
from engine.errors import UserError
from tools.labels import (LabeledImage, Labels, Object, files_by_name, files_named, image_size,
                          read_text, size_fits, split_of_file)

FIELDS = ("area", "segmentation")


def read(root: Path) -> Labels:
    """Read the COCO jsons of a folder."""
    labels = Labels()
    files = [path for path in sorted(root.rglob("*.json")) if is_coco(path)]
    if not files:
        raise UserError(f"{root}: expected a COCO json with images, annotations and categories, "
                        "got none")
    places = files_by_name(root)
    for path in files:
        read_file(path, root, places, labels)
    return labels


def is_coco(path: Path) -> bool:
    """Whether a file is a json with the lists of COCO."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() >= coco_json.FIELDS.keys()


def read_file(path: Path, root: Path, places: dict, labels: Labels) -> None:
    """Add the images and objects of one json. Faults are added to `labels`.

    places: {name: image files with this name}
    """
    content = coco_json.read_json(path)
    coco_json.refuse_fatal(path, coco_json.json_problems(content))
    names = {}
    for category in sorted(content["categories"], key=lambda category: category["id"]):
        names[category["id"]] = str(category["name"])
    labels.names += [name for name in names.values() if name not in labels.names]

    images = {}
    for entry in content["images"]:
        found = find_image(entry["file_name"], path, root, places)
        if found is None:
            labels.fault(path, 0, f"expected an image file, got {entry['file_name'][:100]!r}, which"
                                  " is not there; remove it from the json, or add the image")
            continue
        listed = coco_json.listed_size(entry)
        size = image_size(found, labels, listed)
        if size is None:
            continue
        image = LabeledImage(found, size)
        if 0 in listed or size_fits(image, listed, labels, path):
            images[entry["id"]] = image
            labels.add(split_of_file(path, root), image)
    for row in content["annotations"]:
        if row["image_id"] in images:
            fields = {name: row[name] for name in FIELDS if row.get(name)}
            images[row["image_id"]].objects.append(Object(
                names[row["category_id"]], tuple(row["bbox"]),
                ignored=bool(row.get("iscrowd", 0)), fields=fields))


def find_image(name: str, path: Path, root: Path, places: dict) -> Path | None:
    """Return the image file of an entry; None if there is none, or several have its name."""
    name = name.replace("\\", "/")
    for folder in (path.parent, root, root / "images"):
        if (folder / name).is_file():
            return folder / name
    found = files_named(name.rpartition("/")[2], places)
    return found[0] if len(found) == 1 else None
