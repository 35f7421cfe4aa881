"""..."""
import sys
from pathlib import Path
import numpy as np
from engine.errors import UserError
from data import BROKEN_IMAGE, CocoFolder, FIELDS, LARGE_AREA, Problem, SMALL_AREA, class_counts, images_folder, json_path, json_problems, listed_area, listed_size, read_header, read_image, read_json, upright_size

HEADERS_AT_START = 500                                 # image files whose header the check at every start opens


def file_problems(folder, images, decode):
    """Missing and unreadable files, wrong width and height, EXIF rotation. decode: read every pixel, else only the headers."""
    for image in images:
        path, listed = folder / image["file_name"], listed_size(image)
        where = f"image {image['id']}, {path}"
        if not path.is_file():
            yield Problem("error", "missing file", where)
            continue
        try:
            stored, orientation = read_header(path)
            if decode:
                read_image(path)
        except BROKEN_IMAGE as error:
            yield Problem("error", "unreadable image", f"{where}: {error}")
            continue
        size, rotate = upright_size(stored, orientation, listed)
        if listed != size:
            says, has = "x".join(map(str, listed)), "x".join(map(str, size))
            yield Problem("error", "wrong width or height", f"{where}: json says {says}, the file has {has}")
        if orientation != 1:
            action = "the pixels are turned by it" if rotate else "not applied, the json fits the unturned pixels"
            yield Problem("warning", "EXIF rotation", f"{where}: orientation {orientation}, {action}")


def report(problems, limit):
    """Print problems by kind, worst first, at most `limit` lines a kind."""
    levels = ("fatal", "error", "warning")
    for level, kind in sorted({problem[:2] for problem in problems}, key=lambda k: (levels.index(k[0]), k[1])):
        lines = [problem.where for problem in problems if problem[:2] == (level, kind)]
        print(f"  {level}: {kind} ({len(lines)})")
        print(*(f"      {line}" for line in lines[:limit]), sep="\n")
        if len(lines) > limit:
            print(f"      ... and {len(lines) - limit} more (python -m tools.check_data DIR)")


def print_table(data):
    """Images, boxes and size bands per class, crowds not counted."""
    rows = [row for row in data["annotations"] if not row.get("iscrowd")]
    areas = np.array([listed_area(row) for row in rows])
    band = np.digitize(areas, (SMALL_AREA, LARGE_AREA))
    print(f"  {'class':24}{'id':>8}{'images':>8}{'boxes':>8}{'small':>8}{'medium':>8}{'large':>8}")
    for category in sorted(data["categories"], key=lambda category: category["id"]):
        mine = [k for k, row in enumerate(rows) if row["category_id"] == category["id"]]
        counts = [len({rows[k]["image_id"] for k in mine}), len(mine), *np.bincount(band[mine], minlength=3)]
        print(f"  {str(category['name'])[:24]:24}{category['id']:>8}" + "".join(f"{count:>8}" for count in counts))


def check(directory, full=True):
    """The data doctor: prints a table per class and every problem of both splits -> the number of errors.

    full: decode every image (else only the headers). Warnings are problems that loading takes care of; they do not count.
    """
    errors = 0
    for split in ("train", "val"):
        path = json_path(directory, split)
        print(path)
        problems = []
        try:
            data = read_json(path)
            problems += json_problems(data)
            loadable = not any(problem.level == "fatal" for problem in problems)
            if loadable:
                print(*(f"  {len(data[part])} {part}" for part in FIELDS))
                print_table(data)
                problems += file_problems(images_folder(Path(directory), split, data["images"]), data["images"], full)
                if split == "train" and not CocoFolder(directory, split).first(1).image_ids.size:
                    problems.append(Problem("error", "nothing to learn", "no usable box in the training set"))
        except (FileNotFoundError, ValueError) as error:
            problems.append(Problem("fatal", "cannot be loaded", str(error)))
        report(problems, limit=sys.maxsize)
        bad = sum(problem.level != "warning" for problem in problems)
        print(f"  {bad} errors, {len(problems) - bad} warnings")
        errors += bad
    return errors


def quick_check(dataset, training=True):
    """The check at every start, without decoding: what the json and some image headers show. Prints and returns the problems.

    Raises ValueError for a training set without one usable box.
    """
    problems = list(dataset.problems)
    if isinstance(dataset, CocoFolder):
        some = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), HEADERS_AT_START)).astype(int))
        entries = [{"id": int(dataset.image_ids[k]), "file_name": str(dataset.files[k]), "width": int(dataset.sizes[k, 0]),
                    "height": int(dataset.sizes[k, 1])} for k in some]
        problems += file_problems(dataset.folder, entries, decode=False)
    report(problems, limit=3)
    boxes = class_counts(dataset).sum()
    if training and not boxes:
        raise UserError(f"{dataset.name}: expected at least one usable box to learn from, got {len(dataset)} images with "
                        f"none ({dataset.degenerate} degenerate boxes dropped); python -m tools.check_data DIR shows what is there")
    return problems


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tools.check_data DIR")
    sys.exit(1 if check(sys.argv[1]) else 0)
