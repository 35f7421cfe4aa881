"""Read labels from CSV tables: a row for each object, the names of the columns in the first row.

    file     file, filename, image or path: relative to the table, or the name alone
    class    class, label, name or category
    box      xmin, ymin, xmax, ymax, or x1, y1, x2, y2, or x, y, w, h, with x, y the upper left
             corner; all in px
    split    split or set, may be missing: train, val or valid, test

Other columns are left out, except `width` and `height` beside corners: the size of the image, which
must be that of the file. A row with an empty box is an image without objects; an image that no row
names counts as not labeled and is left out. Columns are separated by commas, semicolons or tabs.
Without a column `split`, tables and folders called train, val or valid, test divide the images.
"""
import csv
from pathlib import Path

from engine.errors import UserError
from engine.notices import one_line, plural
from tools.labels import (SPLITS, UNDIVIDED, LabeledImage, Labels, Object, corner_box,
                          files_by_name, files_named, image_size, name_classes, number,
                          read_text, size_fits, split_of, split_of_file)

FILE = ("file", "filename", "file_name", "image", "image_path", "path")
CLASS = ("class", "label", "name", "category", "class_name")
SPLIT = ("split", "set")
CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"),
           ("x_min", "y_min", "x_max", "y_max"))
SIDES = (("x", "y", "w", "h"), ("x", "y", "width", "height"), ("left", "top", "width", "height"))
DELIMITERS = (",", ";", "\t")
EXPECTED = "file,class,xmin,ymin,xmax,ymax, or file,class,x,y,w,h (px)"


class Columns:
    """Where a table has file, class, box and split. Raises UserError for a table without them."""

    def __init__(self, path: Path, names: list[str]):
        self.names = [name.strip().lower() for name in names]
        self.file = self.place_of(FILE)
        self.label = self.place_of(CLASS)
        self.split = self.place_of(SPLIT)
        self.box, self.is_corners = self.find_box()
        self.size = self.places_of(("width", "height")) if self.is_corners else None
        if self.file is None or self.label is None or self.box is None:
            raise UserError(f"{path}: expected a first row with the columns {EXPECTED}, got "
                            f"{one_line(', '.join(names), 200)}; rename the columns, or add such a "
                            "row")

    def place_of(self, names: tuple[str, ...]) -> int | None:
        """The column that has one of these names."""
        return next((self.names.index(name) for name in names if name in self.names), None)

    def places_of(self, names: tuple[str, ...]) -> list[int] | None:
        """The columns of all these names."""
        if all(name in self.names for name in names):
            return [self.names.index(name) for name in names]
        return None

    def find_box(self) -> tuple[list[int] | None, bool]:
        """The four columns of the box, and whether they are corners."""
        for group in CORNERS:
            if self.places_of(group):
                return self.places_of(group), True
        for group in SIDES:
            if self.places_of(group):
                return self.places_of(group), False
        return None, False


def read(root: Path) -> Labels:
    """Read the tables in a folder and its subfolders, or one table."""
    tables = [root] if root.is_file() else sorted(root.rglob("*.csv"))
    folder = root.parent if root.is_file() else root
    if not tables:
        raise UserError(f"{root}: expected a CSV table with the columns {EXPECTED}, got none")
    labels = Labels()
    images = {}          # (split, file) -> LabeledImage
    places = files_by_name(folder)
    for table in tables:
        try:
            read_table(table, folder, places, images, labels)
        except csv.Error as error:
            raise UserError(f"{table}: expected a table, got a file that cannot be parsed "
                            f"({error}); write it anew") from error
    for (split, _), image in images.items():
        labels.add(split, image)
    name_classes(folder, labels)
    used = {image.path for image in images.values()}
    unlabeled = [image for group in places.values() for image in group if image not in used]
    if unlabeled:
        labels.notes.append(f"{plural(len(unlabeled), 'image')} without a usable row left out, "
                            f"first: {min(unlabeled)}")
    return labels


def read_table(table: Path, folder: Path, places: dict, images: dict, labels: Labels) -> None:
    """Add the rows of a table to `images`, {(split, file): LabeledImage}; faults to `labels`.

    folder: that of the data set; places: {name: its image files with this name}
    """
    text = read_text(table)
    first = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=first.count)
    rows = csv.reader(text.splitlines(), delimiter=delimiter)
    columns = Columns(table, next(rows, []))
    table_split = split_of_file(table, folder)
    for row in rows:
        if not any(cell.strip() for cell in row):
            continue
        try:
            if len(row) != len(columns.names):
                raise ValueError(f"expected {len(columns.names)} columns, got {len(row)}")
            path = find_image(row[columns.file], table, folder, places)
            split = row_split(row, columns) or table_split or split_of(path, folder)
            listed = listed_size(row, columns)
            image = images.get((split, path))
            if image is None:
                size = image_size(path, labels, listed)
                if size is None:
                    continue
                image = LabeledImage(path, size)
            if listed and not size_fits(image, listed, labels, table, rows.line_num):
                continue
            images[split, path] = image
            found = read_object(row, columns, image.size)
            if found:
                image.objects.append(found)
        except ValueError as error:
            labels.fault(table, rows.line_num, error)


def find_image(text: str, table: Path, folder: Path, places: dict) -> Path:
    """Return the image file of a row. Raises ValueError if none, or several, have its name."""
    name = text.strip().replace("\\", "/")
    for place in (table.parent / name, folder / name):
        if name and place.is_file():
            return place
    found = files_named(name.rpartition("/")[2], places)
    if len(found) != 1:
        raise ValueError(f"expected an image file, got {one_line(text, 100)!r}, which names "
                         f"{plural(len(found), 'file')} in {folder}")
    return found[0]


def listed_size(row: list[str], columns: Columns) -> tuple[int, int] | None:
    """Return the width and height of the image that a row lists, None if it lists none."""
    if not columns.size:
        return None
    cells = [row[place].strip() for place in columns.size]
    if not any(cells):
        return None
    width, height = (int(number(cell)) for cell in cells)
    return width, height


def row_split(row: list[str], columns: Columns) -> str:
    """Return the split that a row names, UNDIVIDED if there is no such column."""
    if columns.split is None:
        return UNDIVIDED
    text = row[columns.split].strip().lower()
    if text not in SPLITS:
        raise ValueError(f"expected the split train, val or test, got {one_line(text, 40)!r}")
    return SPLITS[text]


def read_object(row: list[str], columns: Columns, size: tuple[int, int]) -> Object | None:
    """Return the object of a row, None for an empty box. Raises ValueError for what is wrong.

    size: width and height of the image in px
    """
    cells = [row[place].strip() for place in columns.box]
    name = row[columns.label].strip()
    if not any(cells):
        return None
    if not name:
        raise ValueError("expected a class, got none")
    values = [number(cell) for cell in cells]
    if not columns.is_corners:
        x, y, width, height = values
        if width <= 0 or height <= 0:
            raise ValueError(f"expected a positive width and height, got {width:g} and {height:g}")
        values = [x, y, x + width, y + height]
    return Object(name, corner_box(values, size))
