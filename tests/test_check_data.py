"""The data set check: every problem is reported by file and id, and nothing ends in a traceback."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

import data
from coco_folders import (POLYGON, annotation, category, edit_json, image_entry, json_file,
                          truncate, write_folder)
from engine.datasets import build_datasets
from engine.errors import UserError
from engine.recipe import Recipe
from engine.segmentations import decode_counts, segmentation_fault
from tools import check_data

NAN, INFINITY = float("nan"), float("inf")
REAL = ("bccd", "nuclei", "coco_mini")


def drop(part):
    return lambda content: content.pop(part)


def add(part, **fields):
    """A change that appends a copy of the first entry, with other fields."""
    return lambda content: content[part].append({**content[part][0], **fields})


# --------------------------------------------------------------------- refused: fatal problems

REFUSED = {
    "no annotations": (drop("annotations"), "no annotations"),
    "no categories": (drop("categories"), "no categories"),
    "no images": (lambda content: content.update(images=[]), "no images"),
    "images no list": (lambda content: content.update(images={"id": 1}), "no images"),
    "entry no object": (lambda content: content["images"].append(3), "incomplete images"),
    "unknown category": (annotation(category_id=5),
                         "unknown category id.*annotation 0.*from categories, got category 5"),
    "unknown image": (annotation(image_id=99),
                      "unknown image id.*annotation 0.*from images, got 99"),
    "box of three": (annotation(bbox=[1, 2, 3]), "malformed box.*annotation 0"),
    "box with NaN": (annotation(bbox=[1, 2, NAN, 3]), "malformed box"),
    "box with infinity": (annotation(bbox=[1, 2, INFINITY, 3]), "malformed box"),
    "box of text": (annotation(bbox=["1", "2", "3", "4"]), "malformed box"),
    "box of booleans": (annotation(bbox=[True, True, True, True]), "malformed box"),
    "box of huge numbers": (annotation(bbox=[0, 0, 10 ** 400, 1]), "malformed box"),
    "box of 1e300": (annotation(bbox=[0, 0, 1e300, 1]), "malformed box"),
    "box nested": (annotation(bbox=[[[[[[[[[[1]]]]]]]]]]), "malformed box"),
    "box missing": (lambda content: content["annotations"][0].pop("bbox"), "lacks bbox"),
    "boxes normalized": (annotation(bbox=[0.1, 0.2, 0.3, 0.4]),
                         "boxes look normalized.*1 of 1 boxes.*annotation 0.*pixels|"
                         "boxes look normalized.*1 of 1 boxes.*pixels.*annotation 0"),
    "iscrowd as text": (annotation(iscrowd="0"), "malformed iscrowd.*expected 0 or 1, got '0'"),
    "iscrowd null": (annotation(iscrowd=None), "malformed iscrowd.*got None"),
    "iscrowd 2": (annotation(iscrowd=2), "malformed iscrowd.*got 2"),
    "text ids": (image_entry(id="a"), "expected integer ids"),
    "id 1.5": (annotation(image_id=1.5), "expected integer ids"),
    "id a list": (annotation(category_id=[1]), "expected integer ids"),
    "id true": (annotation(category_id=True), "expected integer ids"),
    "id beyond 64 bits": (image_entry(id=2 ** 70), "64-bit integers.*images.0"),
    "image twice": (add("images"), "id used twice in images"),
    "category twice": (add("categories", name="dog"), "id used twice in categories"),
    "name null": (category(name=None), "no text.*category 1.*got None"),
    "name empty": (category(name=""), "class names that are no text"),
    "name a list": (category(name=["cat"]), "class names that are no text"),
    "file name a number": (image_entry(file_name=7), "unusable file name.*image 10.*got 7"),
    "file name null": (image_entry(file_name=None), "unusable file name"),
    "file name too long": (image_entry(file_name="a" * 5000), "unusable file name.*255 bytes"),
    "path too long": (image_entry(file_name="a/" * 5000), "unusable file name.*10000"),
    "file name with NUL": (image_entry(file_name="a\0b"), "unusable file name"),
    "file name a surrogate": (image_entry(file_name="\ud800.jpg"), "expected valid Unicode"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_an_unusable_json_is_refused_and_the_check_names_the_entry(change, message, tmp_path,
                                                                   capsys):
    root = write_folder(tmp_path)
    edit_json(root, change)
    with pytest.raises(UserError, match=f"({message}).*tools.check_data") as error:
        data.CocoFolder(root)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert check_data.check(root) > 0
    assert "fatal" in capsys.readouterr().out


def test_a_path_that_is_no_folder_is_reported_as_such(tmp_path):
    root = write_folder(tmp_path / "data")
    for path, got in ((tmp_path / "dta", "no such folder"), (json_file(root), "a file")):
        for read in (data.CocoFolder, check_data.check):
            with pytest.raises(UserError, match=f"expected a data folder.*got {got}; correct"):
                read(path)


def test_a_missing_list_and_an_empty_one_are_told_apart(tmp_path, capsys):
    for change, got in ((drop("images"), "nothing"),
                        (lambda content: content.update(images=[]), "[]")):
        root = write_folder(tmp_path)
        edit_json(root, change)
        check_data.check(root)
        text = capsys.readouterr().out
        assert f"expected 'images' to be a list with at least one entry, got {got}" in text


# ------------------------------------------------------------- reported: errors and warnings

RLE = {"size": [30, 40], "counts": [0, 1200]}
COMPRESSED = coco_mask.encode(np.asfortranarray(np.eye(30, 40, dtype=np.uint8)))["counts"].decode()


def polygon(*points):
    return annotation(segmentation=[list(points)])


def rle(**fields):
    return annotation(segmentation={**RLE, **fields})


MALFORMED = {
    "two points": (polygon(5, 6, 15, 6), "three points"),
    "odd": (polygon(5, 6, 15, 6, 7, 8, 9), "three points"),
    "NaN": (polygon(5, 6, 15, 6, NAN, 9), "finite coordinates"),
    "infinity": (polygon(5, 6, 15, 6, INFINITY, 9), "finite coordinates"),
    "1e300": (polygon(5, 6, 15, 6, 1e300, 9), "finite coordinates"),
    "huge integer": (polygon(5, 6, 15, 6, 10 ** 400, 9), "finite coordinates"),
    "coordinate text": (polygon(5, 6, 15, 6, "7", 9), "finite coordinates"),
    "coordinate null": (polygon(5, 6, 15, 6, None, 9), "finite coordinates"),
    "endless outline": (polygon(*[0, 0, 90000, 90000] * 20), "outline"),
    "flat list": (annotation(segmentation=[5, 6, 15, 6, 15, 14]), "expected polygons"),
    "text": (annotation(segmentation="abc"), "expected polygons or RLE"),
    "number": (annotation(segmentation=7), "expected polygons or RLE"),
    "no counts": (annotation(segmentation={"size": [30, 40]}), "expected polygons or RLE"),
    "size swapped": (rle(size=[40, 30]), "expected RLE size"),
    "size null": (rle(size=None), "expected RLE size"),
    "size negative": (rle(size=[-30, -40]), "positive integers"),
    "size zero": (rle(size=[0, 40]), "positive integers"),
    "size text": (rle(size=["30", "40"]), "positive integers"),
    "size of three": (rle(size=[30, 40, 1]), "expected RLE size"),
    "size huge": (rle(size=[10 ** 30, 40]), "positive integers"),
    "counts short": (rle(counts=[7]), "sum to 7"),
    "counts null": (rle(counts=None), "text or a list"),
    "counts negative": (rle(counts=[-600, 1800]), "at least 0"),
    "counts floats": (rle(counts=[600.5, 599.5]), "integers"),
    "counts NaN": (rle(counts=[NAN, 1200]), "integers"),
    "counts huge": (rle(counts=[10 ** 30, 0]), "integers"),
    "counts cut": (rle(counts=COMPRESSED[:-2]), "sum to|compressed RLE"),
    "counts cut within a number": (rle(counts="T"), "compressed RLE"),
    "counts no code": (rle(counts="\u20ac\u20ac"), "compressed RLE"),
    "counts empty": (rle(counts=""), "sum to 0"),
    "counts a huge number": (rle(counts="o" * 1000), "compressed RLE"),
}


@pytest.mark.parametrize("change, detail", MALFORMED.values(), ids=MALFORMED)
def test_malformed_segmentations_never_reach_pycocotools(change, detail, tmp_path, capsys):
    root = write_folder(tmp_path)
    for split in ("train", "val"):
        edit_json(root, change, split)
        dataset = data.CocoFolder(root, split)                  # boxes train and evaluate
        assert len(dataset[0][1]["labels"]) == 1
        dataset.coco()
        with pytest.raises(UserError, match="1 malformed"):
            data.CocoFolder(root, split, load_masks=True)
    assert check_data.check(root) == 2
    lines = capsys.readouterr().out.splitlines()
    found = lines[lines.index("  error: malformed segmentation (1)") + 1]
    assert "annotation 0" in found
    assert any(part in found for part in detail.split("|")), found


def test_valid_segmentations_of_every_kind_pass(tmp_path):
    for segmentation in (POLYGON, RLE, {"size": [30, 40], "counts": COMPRESSED}, [], None, {}):
        assert segmentation_fault(segmentation, (40, 30)) is None
        assert segmentation_fault(segmentation, (0, 0)) is None


def test_compressed_counts_are_decoded_as_pycocotools_does():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.01, 0.5, 1.0):
        mask = (rng.random((37, 53)) < share).astype(np.uint8)
        runs, value = [0], 0
        for pixel in mask.T.ravel().tolist():
            if pixel != value:
                runs.append(0)
                value = pixel
            runs[-1] += 1
        text = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
        assert decode_counts(text) == runs


def test_no_damage_to_compressed_counts_reaches_pycocotools(tmp_path):
    """Flipped characters either are refused, or decode to a mask of the right size."""
    rng = np.random.default_rng(1)
    mask = np.zeros((30, 40), np.uint8)
    mask[3:20, 5:30] = rng.random((17, 25)) < 0.7
    text = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    refused = 0
    for _ in range(500):
        letters = list(text)
        for place in rng.integers(0, len(letters), 2):
            letters[place] = chr(rng.integers(32, 127))
        segmentation = {"size": [30, 40], "counts": "".join(letters)}
        if segmentation_fault(segmentation, (40, 30)):
            refused += 1
        else:
            assert data.decode_mask(segmentation, 30, 40).max() <= 1
    assert refused > 400


FOUND = {
    "width": (image_entry(width=41), "error: wrong width or height",
              "0.jpg: json says 41x30, the file has 40x30"),
    "file": (add("images", id=11, file_name="x.jpg"), "error: missing file", "x.jpg"),
    "degenerate": (annotation(bbox=[1, 2, 0, 3]), "warning: degenerate box",
                   "annotation 0 (image 10, 0.jpg)"),
    "outside": (annotation(bbox=[30, 2, 10, 33]), "warning: box leaves the image",
                "annotation 0"),
    "one normalized": (annotation(bbox=[0.1, 0.2, 0.3, 0.4]), "warning: box within [0, 1]",
                       "annotation 0"),
    "twice": (add("annotations", id=50), "warning: duplicate annotation", "annotation 50"),
    "id twice": (add("annotations", bbox=[1, 1, 9, 9]),
                 "warning: id used twice in annotations", "id 0 is used 2 times"),
    "annotation id a list": (annotation(id=[[[]]], bbox=[1, 2, 0, 3]),
                             "warning: degenerate box", "annotation [[[]]] (image 10"),
    "class without objects": (add("categories", id=0, name="cells"),
                              "warning: class without objects", "'cells' (id 0)"),
    "one name, one in use": (add("categories", id=0), "warning: class name used twice",
                             "'cat' has ids"),
    "area negative": (annotation(area=-5), "warning: unusable area", "got -5"),
    "area NaN": (annotation(area=NAN), "warning: unusable area", "got nan"),
    "area infinite": (annotation(area=INFINITY), "warning: unusable area", "got inf"),
    "area text": (annotation(area="80"), "warning: unusable area", "got '80'"),
    "area huge": (annotation(area=10 ** 400), "warning: unusable area", "annotation 0"),
}


@pytest.mark.parametrize("change, kind, detail", FOUND.values(), ids=FOUND)
def test_the_check_names_every_problem_and_counts_only_errors(change, kind, detail, tmp_path,
                                                              capsys):
    boxes = [(0, 1, (5, 6, 10, 8)), *[(0, 1, (1, 1, 3 + k, 4)) for k in range(12)]]
    root = write_folder(tmp_path, boxes=boxes)
    assert check_data.check(root) == 0
    capsys.readouterr()
    edit_json(root, change)
    edit_json(root, lambda content: content.update(categories=json.loads(
        json_file(root).read_text())["categories"]), "val")
    errors = check_data.check(root)
    text = capsys.readouterr().out
    assert kind in text and detail in text, text
    assert errors == kind.startswith("error")
    assert len(data.CocoFolder(root)) >= 1             # none of these stops the data from loading


@pytest.mark.parametrize("value", ["640", -3, 0, NAN, INFINITY, 10 ** 400, [1], True])
def test_a_width_that_is_no_positive_number_is_an_error_and_the_file_decides(value, tmp_path,
                                                                             capsys):
    root = write_folder(tmp_path)
    for split in ("train", "val"):
        edit_json(root, image_entry(width=value), split)
    assert check_data.check(root) >= 2
    text = capsys.readouterr().out
    assert "error: wrong width or height" in text and "expected a positive width" in text
    dataset = data.CocoFolder(root, "val")
    assert dataset.image_size(0) == (30, 40) and len(dataset[0][1]["boxes"]) == 1


def test_an_unusable_area_becomes_that_of_the_box(tmp_path):
    root = write_folder(tmp_path)
    for area in (-5, NAN, INFINITY, "80", None, 0, 10 ** 400):
        edit_json(root, annotation(area=area), "val")
        rows = data.CocoFolder(root, "val").coco().dataset["annotations"]
        assert [row["area"] for row in rows] == [80]


@pytest.mark.parametrize("first, second, shown", [
    ("cat", "cat", "cat"), ("cat\x00", "cat\x01", "cat?"),
    ("x" * 300 + "1", "x" * 300 + "2", "x" * 197 + "...")])
def test_two_classes_of_one_name_that_both_have_objects_are_an_error(tmp_path, capsys, first,
                                                                     second, shown):
    """Also names that are the same as they are shown and matched."""
    boxes = [(0, 1, (5, 6, 10, 8)), (0, 2, (20, 6, 10, 8))]
    root = write_folder(tmp_path, boxes=boxes, categories=[(1, first), (2, second)])
    assert check_data.check(root) == 2
    text = capsys.readouterr().out
    assert "error: class name used twice" in text and f"{shown!r} has ids [1, 2]" in text


def test_class_and_file_names_are_printed_without_terminal_escapes(tmp_path, capsys):
    root = write_folder(tmp_path, categories=[(1, "cat\x1b[31m\nred")])
    edit_json(root, add("images", id=11, file_name="\x1b]0;title\x07.jpg"))
    check_data.check(root)
    check_data.quick_check(data.CocoFolder(root))
    text = capsys.readouterr().out
    assert "\x1b" not in text and "\x07" not in text and "cat?[31m?red" in text
    assert data.CocoFolder(root).class_names == ["cat?[31m?red"]


def test_xyxy_boxes_are_detected_and_stop_training(tmp_path, capsys):
    rng = np.random.default_rng(0)
    low = (0, 0, 4, 4)
    high = (25, 20, 15, 10)
    boxes = [(0, 1, rng.integers(low, high).tolist()) for _ in range(30)]
    root = write_folder(tmp_path, boxes=boxes)
    assert check_data.check(root) == 0

    def to_corners(content):
        for row in content["annotations"]:
            x, y, w, h = row["bbox"]
            row["bbox"] = [x, y, x + w, y + h]

    edit_json(root, to_corners)
    assert check_data.check(root) == 1
    text = capsys.readouterr().out
    assert "boxes look like xyxy" in text and "subtract x1, y1" in text
    assert "leaves the image" not in text              # not each of them once more
    with pytest.raises(UserError, match="boxes look like xyxy.*COCO wants"):
        data.CocoFolder(root)


def test_normalized_boxes_stop_training_also_where_sizes_are_not_listed(tmp_path, capsys):
    boxes = [(0, 1, (0.5, 0.25, 0.1 * k, 0.2)) for k in range(1, 6)] + [(0, 1, (0, 0, 1, 1))]
    root = write_folder(tmp_path, boxes=boxes)
    edit_json(root, lambda content: [content["images"][0].pop(s) for s in ("width", "height")])
    assert check_data.check(root) == 2
    assert "6 of 6 boxes lie within [0, 1]" in capsys.readouterr().out
    for split in ("train", "val"):
        with pytest.raises(UserError, match="boxes look normalized"):
            data.CocoFolder(root, split)


def test_truncated_images_are_found_by_the_full_check_only(tmp_path, capsys):
    root = write_folder(tmp_path, [(40, 30)] * 2)
    truncate(root / "val2017" / "1.jpg")
    assert check_data.check(root, full=False) == 0 and check_data.check(root) == 1
    assert "unreadable image" in capsys.readouterr().out


def test_images_of_val_that_are_also_in_train_are_errors(tmp_path, capsys):
    """Both splits name files of one folder; a run begins with a warning of them."""
    root = write_folder(tmp_path, [(40, 30)] * 2, [(1, 1, (5, 6, 10, 8))])
    assert check_data.check(root) == 0                 # other images of the same names
    (root / "train2017").rename(root / "images")
    shutil.rmtree(root / "val2017")
    edit_json(root, lambda content: content["images"].pop(0), "val")
    assert check_data.check(root) == 1
    text = capsys.readouterr().out
    assert f"error: image also in train (1)\n      {root / 'images' / '1.jpg'}\n" in text
    _, val = build_datasets(root, Recipe(), 0)
    check_data.quick_check(val, training=False)
    assert "warning: image also in train (1)" in capsys.readouterr().out


def test_the_check_lists_16_bit_images_and_files_of_several_pages(tmp_path, capsys):
    root = write_folder(tmp_path, [(40, 30)] * 2)
    Image.fromarray(np.full((30, 40), 900, np.uint16)).save(
        root / "train2017" / "0.jpg", format="TIFF")
    pages = [Image.new("RGB", (40, 30)) for _ in range(2)]
    pages[0].save(root / "train2017" / "1.jpg", format="TIFF", save_all=True,
                  append_images=pages[1:])
    assert check_data.check(root) == 0
    text = capsys.readouterr().out
    assert "warning: 16-bit image (scaled by its own range) (1)" in text
    assert "warning: several pages (only the first is read) (1)" in text


# ------------------------------------------------------------------------ at the start of a run

def test_zero_annotations_refused(tmp_path, capsys):
    for boxes in ([], [(0, 1, (5, 6, 0, 8))], [(0, 1, (5, 6, 10, 8), {"iscrowd": 1})]):
        root = write_folder(tmp_path, boxes=boxes)
        with pytest.raises(UserError, match="at least one usable box"):
            check_data.quick_check(data.CocoFolder(root))
        check_data.quick_check(data.CocoFolder(root, "val"), training=False)
        assert check_data.check(root) == 1
        text = capsys.readouterr().out
        assert "fatal: nothing to learn" in text and "no usable box in the training set" in text


def test_an_error_that_does_not_stop_training_is_printed_as_a_warning(tmp_path, capsys):
    root = write_folder(tmp_path, [(40, 30)] * 4, categories=[(0, "cells"), (1, "cat")])
    edit_json(root, image_entry(width=41))
    problems = check_data.quick_check(data.CocoFolder(root))
    text = capsys.readouterr().out
    assert "warning: wrong width or height (1)" in text and "error:" not in text
    assert "warning: class without objects (1)" in text and "'cells' (id 0)" in text
    assert [problem.level for problem in problems] == ["error", "warning"]


def test_images_with_more_objects_than_queries_are_counted(tmp_path):
    boxes = [(k % 3, 1, (k, 5, 5, 5)) for k in range(9)] + [(0, 1, (20, 5, 5, 5))]
    dataset = data.CocoFolder(write_folder(tmp_path, [(40, 30)] * 3, boxes))
    assert check_data.query_warning(dataset, 4) == ""
    assert "1 of 3 images have more objects (up to 4)" in check_data.query_warning(dataset, 3)
    warning = check_data.query_warning(dataset, 2)
    assert "3 of 3 images" in warning and "--num_queries 4" in warning


def test_the_nuclei_have_more_objects_than_forty_queries(shared):
    dataset = data.CocoFolder(shared / "data" / "nuclei")
    assert "of 140 images have more objects" in check_data.query_warning(dataset, 40)


def test_the_shrinking_of_images_is_stated(tmp_path):
    root = write_folder(tmp_path, [(400, 300)], [(0, 1, (5, 6, 40, 40))])
    dataset = data.CocoFolder(root)
    recipe = Recipe(train_sizes=(96, 100), max_size=200, crop=False, color_jitter=False)
    dataset.transform = data.train_transform(recipe)
    note = check_data.size_note(dataset)
    assert note.startswith("images of 400 x 300 px (median) are resized to 133 x 100 px")
    assert note.endswith("an object of 40 px (median) becomes one of 13 px")
    dataset.transform = data.Transform(sizes=(300,), max_size=1000)
    assert check_data.size_note(dataset) == ""


def test_the_start_of_a_run_prints_shrinking_and_crowded_images(tmp_path, capsys):
    boxes = [(0, 1, (5 * k, 6, 40, 40)) for k in range(3)]
    dataset = data.CocoFolder(write_folder(tmp_path, [(400, 300)], boxes))
    dataset.transform = data.Transform(sizes=(100,), max_size=200)
    check_data.quick_check(dataset, num_queries=2)
    text = capsys.readouterr().out
    assert "images of 400 x 300 px (median) are resized" in text
    assert "1 of 1 image have more objects (up to 3) than the model has queries (2)" in text
    check_data.quick_check(dataset, training=False, num_queries=2)
    assert capsys.readouterr().out == ""


# -------------------------------------------------------------------------------- real data

def test_the_check_passes_the_real_data_sets_with_warnings_only(shared, capsys):
    folder = shared / "data"
    errors = [check_data.check(folder / name, full=name == "coco_mini") for name in REAL]
    assert errors == [0, 0, 0]
    assert "annotation 2288 (image 343" in capsys.readouterr().out


# ----------------------------------------------------------------------------- command line

def test_the_exit_code_of_the_command_is_the_verdict(tmp_path, capsys):
    root = write_folder(tmp_path)
    with pytest.raises(SystemExit) as end:
        check_data.main([str(root)])
    assert end.value.code == 0
    assert capsys.readouterr().out.count("0 errors, 0 warnings") == 2
    edit_json(root, annotation(iscrowd="0"))
    bad = subprocess.run([sys.executable, "-m", "tools.check_data", str(root)],
                         cwd=Path(data.__file__).parent, capture_output=True, text=True)
    assert bad.returncode == 1 and "1 error, 0 warnings" in bad.stdout
    assert "Traceback" not in bad.stderr


def test_a_folder_name_with_control_characters_does_not_drive_the_terminal(tmp_path, capsys):
    with pytest.raises(SystemExit, match="expected a data folder") as end:
        check_data.main(["\x1b[31m"])
    assert "\x1b" not in end.value.code
    root = write_folder(tmp_path / "\x1b[31m")
    edit_json(root, drop("images"))
    assert check_data.check(root) > 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_fuzzed_json_never_ends_in_a_traceback(tmp_path, capfd):
    """Any value anywhere: the check reports it, and loading succeeds or raises UserError."""
    root = write_folder(tmp_path, [(40, 30)] * 2, [(k % 2, 1, (5, 6, 10, 8), more) for k, more in
                        enumerate(({"segmentation": POLYGON}, {"segmentation": RLE}, {}))])
    original = json_file(root).read_text()
    values = (None, True, 0, -1, 1.5, 1e300, NAN, INFINITY, 10 ** 300, 2 ** 64, "", "1", "\ud800",
              "\x1b[2J", "x" * 10_000, [], [[]], {}, {"counts": "a", "size": [1, 1]}, [1] * 4)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        content = json.loads(original)
        for _ in range(rng.integers(1, 3)):
            part = ("images", "annotations", "categories")[rng.integers(3)]
            if not isinstance(content.get(part), list) or rng.random() < 0.1:
                content[part] = values[rng.integers(len(values))]
                continue
            entry = content[part][rng.integers(len(content[part]))]
            entry[list(entry)[rng.integers(len(entry))]] = values[rng.integers(len(values))]
        json_file(root).write_text(json.dumps(content))
        errors = check_data.check(root, full=False)
        try:
            dataset = data.CocoFolder(root)
            check_data.quick_check(dataset)
            assert dataset[0][0].shape[0] == 3
        except UserError as error:
            assert errors and "\n" not in str(error)
            refused += 1
        out, _ = capfd.readouterr()
        assert "\x1b" not in out
    assert 100 < refused < 300


# ------------------------------------------------------------------------------------ test split

def test_a_test_split_is_checked_where_there_is_one(tmp_path, capsys):
    root = write_folder(tmp_path, splits=("train", "val", "test"))
    edit_json(root, annotation(bbox=[1, 2, 3]), "test")
    assert check_data.check(root) == 2      # refused, so it cannot be loaded either
    assert "instances_test2017.json" in capsys.readouterr().out


def test_a_test_split_needs_no_annotations(tmp_path):
    root = write_folder(tmp_path, splits=("train", "val", "test"))
    edit_json(root, drop("annotations"), "test")
    assert check_data.check(root) == 0
