"""Labels in YOLO, VOC and CSV format become a COCO-layout folder, or a line for every fault."""
import json
import os
import shutil

import pytest
from PIL import Image

import data
from engine.errors import UserError
from label_folders import (BOX, HEIGHT, WIDTH, XYWH, YOLO_BOX, coco_export, csv_folder,
                           voc_folder, voc_text, write_image, write_text, yolo_folder)
from tools import check_data, convert


def convert_folder(source, root, out, **options):
    convert.convert(source, str(root), str(out), **options)
    return out


def content_of(out, split="train"):
    return json.loads((out / "annotations" / f"instances_{split}2017.json").read_text())


def boxes_of(out, split="train"):
    return [row["bbox"] for row in content_of(out, split)["annotations"]]


def class_of(out, place=0, split="train"):
    content = content_of(out, split)
    names = {category["id"]: category["name"] for category in content["categories"]}
    return names[content["annotations"][place]["category_id"]]


# ---- what is read --------------------------------------------------------------------------------

def test_yolo_boxes_become_pixels_and_classes_keep_their_numbers(tmp_path):
    out = convert_folder("yolo", yolo_folder(tmp_path / "in"), tmp_path / "out")
    assert boxes_of(out) == [XYWH, XYWH] and boxes_of(out, "val") == [XYWH, XYWH]
    names = [category["name"] for category in content_of(out)["categories"]]
    assert names == ["cat", "dog"] and class_of(out) == "dog"
    assert len(data.CocoFolder(out, "train")[0][1]["labels"]) == 1


def test_yolo_polygons_become_segmentations_that_masks_can_be_learned_from(tmp_path):
    line = "0 0.1 0.2 0.35 0.2 0.35 0.5\n"          # (4, 6), (14, 6), (14, 15)
    out = convert_folder("yolo", yolo_folder(tmp_path / "in", line), tmp_path / "out")
    row = content_of(out)["annotations"][0]
    assert row["segmentation"] == [[4, 6, 14, 6, 14, 15]]
    assert row["bbox"] == XYWH and row["area"] == 45
    assert data.CocoFolder(out, "train", load_masks=True)[0][1]["masks"].sum() > 30


@pytest.mark.parametrize("export", ["../train/images", "/content/other/train/images"])
def test_the_paths_in_an_exported_data_yaml_are_found_beside_it(export, tmp_path):
    root = tmp_path / "in"
    for split in ("train", "valid", "test"):
        write_image(root / split / "images" / "a.png")
        write_text(root / split / "labels" / "a.txt", f"0 {YOLO_BOX}\n")
    entries = "".join(f"{key}: {export.replace('train', split)}\n" for key, split in
                      (("train", "train"), ("val", "valid"), ("test", "test")))
    write_text(root / "data.yaml", entries + "names:\n  0: cat\n")
    out = convert_folder("yolo", root, tmp_path / "out")
    assert [len(boxes_of(out, split)) for split in ("train", "val", "test")] == [1, 1, 1]
    assert check_data.check(out) == 0


def test_a_flat_yolo_folder_with_classes_txt_is_divided_always_alike(tmp_path, capsys):
    root = tmp_path / "in"
    for k in range(10):
        write_image(root / f"{k}.jpg")
        write_text(root / f"{k}.txt", f"0 {YOLO_BOX}\n")
    write_text(root / "classes.txt", "cat\n")
    first = convert_folder("yolo", root, tmp_path / "a")
    second = convert_folder("yolo", root, tmp_path / "b")
    assert "no val images: 2 of 10" in capsys.readouterr().out
    for split, count in (("train", 8), ("val", 2)):
        assert len(boxes_of(first, split)) == count
        assert content_of(first, split) == content_of(second, split)


@pytest.mark.parametrize("start", ["", "./", "data/", "/content/data/"])
def test_images_of_a_list_file_are_read(start, tmp_path):
    root = yolo_folder(tmp_path / "in")
    for split in ("train", "val"):
        write_text(root / f"{split}.txt", f"{start}images/{split}/0.png\n")
    write_text(root / "data.yaml", "train: train.txt\nval: val.txt\nnames: [cat, dog]\n")
    out = convert_folder("yolo", root, tmp_path / "out")
    assert [image["file_name"] for image in content_of(out)["images"]] == ["0.png"]


def test_images_of_a_list_that_are_not_there_are_named(tmp_path):
    root = yolo_folder(tmp_path / "in")
    write_text(root / "data.yaml", "train: train.txt\nnames: [cat, dog]\n")
    write_text(root / "train.txt", "images/nowhere/8.png\n")
    with pytest.raises(UserError, match="train.txt:1: expected an image file, got .*8.png"):
        convert_folder("yolo", root, tmp_path / "out")


def test_class_names_of_a_darknet_export_are_read(tmp_path):
    root = tmp_path / "in"
    for split in ("train", "valid"):
        write_image(root / split / "a.png")
        write_text(root / split / "a.txt", f"1 {YOLO_BOX}\n")
        write_text(root / split / "_darknet.labels", "cat\ndog\n")
    assert class_of(convert_folder("yolo", root, tmp_path / "out")) == "dog"


@pytest.mark.parametrize("place", ["", "data/"])
def test_a_darknet_folder_is_read_as_its_obj_data_says(place, tmp_path):
    root = tmp_path / "in"
    for k in range(3):
        write_image(root / place / f"obj/{k}.JPG")
        write_text(root / place / f"obj/{k}.txt", f"1 {YOLO_BOX}\n")
    write_text(root / place / "train.txt", "data/obj/0.JPG\r\ndata/obj/2.JPG\r\n")
    write_text(root / place / "test.txt", "data/obj/1.JPG\n")
    write_text(root / place / "my.names", "cat\ndog\n")
    write_text(root / place / "obj.data",
               "classes = 2\ntrain = data/train.txt\nvalid = data/test.txt\n"
               "names = data/my.names\nbackup = backup/\n")
    out = convert_folder("yolo", root, tmp_path / "out")
    assert len(boxes_of(out)) == 2 and boxes_of(out, "val") == [XYWH]
    assert class_of(out) == "dog"


@pytest.mark.parametrize("entry", [r"..\images\{}", r"C:\data\images\{}", r".\images\{}"])
def test_windows_paths_in_data_yaml_and_in_lists_are_read(entry, tmp_path):
    root = yolo_folder(tmp_path / "in")
    train, val = entry.format("train"), entry.format("val.txt")
    write_text(root / "images/val.txt", entry.format("val") + "\\0.png\n")
    write_text(root / "data.yaml", f"train: {train}\nval: {val}\nnames: [cat, dog]\n")
    out = convert_folder("yolo", root, tmp_path / "out")
    assert len(boxes_of(out)) == 2 and len(boxes_of(out, "val")) == 1


def test_yolo_images_without_labels_stay_as_images_without_objects(tmp_path, capsys):
    root = yolo_folder(tmp_path / "in")
    (root / "labels/train/1.txt").unlink()
    out = convert_folder("yolo", root, tmp_path / "out")
    assert len(content_of(out)["images"]) == 2 and len(boxes_of(out)) == 1
    assert "1 image without a label file" in capsys.readouterr().out


def test_voc_boxes_and_classes_are_read_and_difficult_objects_are_ignored(tmp_path):
    text = voc_text(("dog", BOX, 0), ("ant", BOX, 1))
    root = voc_folder(tmp_path / "in", images=1)
    write_text(root / "Annotations/0.xml", text)
    write_image(root / "JPEGImages/1.png")
    write_text(root / "Annotations/1.xml", voc_text(("dog", BOX, 0), name="1.png"))
    for split, name in (("train", "0"), ("val", "1")):
        write_text(root / "ImageSets/Main" / f"{split}.txt", name + "\n")
    out = convert_folder("voc", root, tmp_path / "out")
    rows = content_of(out)["annotations"]
    assert [row["bbox"] for row in rows] == [XYWH, XYWH]
    assert [row["iscrowd"] for row in rows] == [0, 1]
    assert [class_of(out, place) for place in (0, 1)] == ["dog", "ant"]
    assert len(boxes_of(out, "val")) == 1


def test_lists_of_voc_may_hold_names_with_spaces_and_numbers_behind_them(tmp_path):
    root = tmp_path / "in"
    for name in ("große Zelle 1", "2"):
        write_image(root / "JPEGImages" / f"{name}.png")
        write_text(root / "Annotations" / f"{name}.xml",
                   voc_text(("dog", BOX, 0), name=f"{name}.png"))
    write_text(root / "ImageSets/Main/train.txt", "große Zelle 1\n")
    write_text(root / "ImageSets/Main/val.txt", "2  1\n")
    out = convert_folder("voc", root, tmp_path / "out")
    assert boxes_of(out) == boxes_of(out, "val") == [XYWH]


def folder_of_sizes(source, root, size, orientation):
    """A folder with two images of 40 x 30 px for which the labels list another size."""
    row = f"{{}}.png,{size[0]},{size[1]},dog,4,6,14,15\n"
    if source == "csv":
        csv_folder(root, "file,width,height,class,xmin,ymin,xmax,ymax\n" + row.format(0)
                   + row.format(1))
        folder = root / "images"
    elif source == "voc":
        listed = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
        text = voc_text(("dog", BOX, 0), size=listed, name="")
        voc_folder(root, text)
        folder = root / "JPEGImages"
    else:
        coco_export(root)
        path = root / "annotations/instances_default.json"
        content = json.loads(path.read_text())
        for image in content["images"]:
            image["width"], image["height"] = size
        write_text(path, json.dumps(content))
        folder = root / "images"
    for path in folder.iterdir():
        exif = Image.Exif()
        exif[274] = orientation
        Image.open(path).save(path, exif=exif)
    return root


@pytest.mark.parametrize("source", ["voc", "csv", "coco"])
def test_width_and_height_that_are_swapped_are_refused_unless_the_image_is_rotated(
        source, tmp_path):
    upright = folder_of_sizes(source, tmp_path / "upright", (HEIGHT, WIDTH), 1)
    with pytest.raises(UserError, match=r"expected the size of .*, 40 x 30 px, got 30 x 40"):
        convert_folder(source, upright, tmp_path / "out")
    for name, size in (("rotated", (HEIGHT, WIDTH)), ("unrotated", (WIDTH, HEIGHT))):
        root = folder_of_sizes(source, tmp_path / name, size, 6)
        out = convert_folder(source, root, tmp_path / f"out_{name}")
        image = content_of(out)["images"][0]
        assert (image["width"], image["height"]) == size
        assert check_data.check(out) == 0


def test_boxes_of_the_voc_challenge_count_pixels_from_one(tmp_path):
    root = voc_folder(tmp_path / "in", voc_text(("dog", (5, 7, 14, 15), 0),
                                                source="The VOC2007 Database", name=""))
    assert boxes_of(convert_folder("voc", root, tmp_path / "out")) == [XYWH]


def test_xml_files_beside_their_images_in_folders_of_splits_are_read(tmp_path):
    for split in ("train", "valid"):
        write_image(tmp_path / "in" / split / "0.png")
        write_text(tmp_path / "in" / split / "0.xml", voc_text(("dog", BOX, 0)))
    out = convert_folder("voc", tmp_path / "in", tmp_path / "out")
    assert boxes_of(out) == boxes_of(out, "val") == [XYWH]


TABLES = {
    "corners": "filename,width,height,class,xmin,ymin,xmax,ymax\n{0},40,30,dog,4,6,14,15\n",
    "sides": "file,class,score,x,y,w,h\nimages/{0},dog,0.9,4,6,10,9\n",
    "semicolons": "path;label;x1;y1;x2;y2\n{0};dog;4;6;14;15\n",
    "spaces": "Image, Class, xmin, ymin, xmax, ymax\n{0}, dog, 4, 6, 14, 15\n"}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_tables_of_every_accepted_form_are_read(table, tmp_path):
    head, row = table.splitlines()
    text = "\n".join([head, row.format("0.png"), row.format("1.png")])
    out = convert_folder("csv", csv_folder(tmp_path / "in", text), tmp_path / "out")
    assert boxes_of(out) == boxes_of(out, "val") == [XYWH] and class_of(out) == "dog"


@pytest.mark.parametrize("source", ["csv", "coco"])
def test_images_whose_suffix_is_in_capitals_are_found_by_their_listed_names(source, tmp_path):
    row = "{}.png,dog,4,6,14,15\n"
    text = "file,class,xmin,ymin,xmax,ymax\n" + row.format(0) + row.format(1)
    if source == "csv":
        root = csv_folder(tmp_path / "in", text)
    else:
        root = coco_export(tmp_path / "in")
    for path in list((root / "images").iterdir()):
        path.rename(path.with_suffix(".PNG"))
    out = convert_folder(source, root, tmp_path / "out")
    assert XYWH in boxes_of(out) and XYWH in boxes_of(out, "val")


def test_a_table_may_name_splits_and_images_without_objects(tmp_path):
    text = ("file,class,x,y,w,h,split\n0.png,dog,4,6,10,9,train\n1.png,,,,,,train\n"
            "2.png,dog,4,6,10,9,valid\n")
    out = convert_folder("csv", csv_folder(tmp_path / "in", text, 3), tmp_path / "out")
    assert len(content_of(out)["images"]) == 2 and boxes_of(out) == [XYWH]
    assert boxes_of(out, "val") == [XYWH]


def test_the_file_name_of_an_image_names_no_split(tmp_path):
    """Only tables and folders do: the photograph of a valley or a test is not for validation."""
    root = csv_folder(tmp_path / "in", "file,class,x,y,w,h\n" + "".join(
        f"{name},dog,4,6,10,9\n" for name in ("0.png", "1.png", "test-1.png", "val_1.png")))
    for name in ("test-1.png", "val_1.png"):
        write_image(root / "images" / name)
    out = convert_folder("csv", root, tmp_path / "out", val_share=0.5)
    assert len(content_of(out)["images"]) == len(content_of(out, "val")["images"]) == 2
    assert not (out / "annotations" / "instances_test2017.json").exists()


@pytest.mark.parametrize("place", ["annotations/instances_default.json", "result.json"])
def test_a_coco_json_of_all_images_is_divided_and_keeps_masks_and_crowds(place, tmp_path):
    root = coco_export(tmp_path / "in", place)
    write_text(root / "notes.json", '{"categories": []}')        # of Label Studio
    out = convert_folder("coco", root, tmp_path / "out")
    assert len(boxes_of(out)) == 2 and boxes_of(out, "val") == [XYWH]
    rows = content_of(out)["annotations"] + content_of(out, "val")["annotations"]
    assert {row["area"] for row in rows} == {7} and sum(row["iscrowd"] for row in rows) == 1
    assert all(row["segmentation"] == [[4, 6, 14, 6, 14, 15]] for row in rows)
    names = [category["name"] for category in content_of(out)["categories"]]
    assert names == ["cat", "dog"] and class_of(out) == "dog"
    assert check_data.check(out) == 0


def test_a_json_whose_name_is_a_split_gives_its_images_to_it(tmp_path):
    root = coco_export(tmp_path / "in", "annotations/instances_Train.json")
    out = convert_folder("coco", root, tmp_path / "out", val_share=0.4)
    assert len(boxes_of(out)) == 2 and len(boxes_of(out, "val")) == 1


COCO_FAULTS = {
    "image missing": (lambda root: (root / "images/1.png").unlink(),
                      "expected an image file, got 'images/1.png', which is not there"),
    "other size": (lambda root: write_image(root / "images/1.png", (20, 20)),
                   "expected the size of 1.png, 20 x 20 px, got 40 x 30"),
    "listed twice": (lambda root: shutil.copy(root / "annotations/instances_default.json",
                                              root / "again.json"),
                     "expected every image in one split and listed once, got 3 images listed "
                     "several times"),
    "no json": (lambda root: shutil.rmtree(root / "annotations"), "expected a COCO json with"),
    "unknown class": (lambda root: write_text(root / "a.json", json.dumps(
        {"images": [{"id": 1, "file_name": "0.png"}], "categories": [{"id": 1, "name": "a"}],
         "annotations": [{"image_id": 1, "category_id": 2, "bbox": XYWH}]})), "unknown category")}


@pytest.mark.parametrize("change, message", COCO_FAULTS.values(), ids=COCO_FAULTS)
def test_a_coco_json_that_does_not_fit_its_images_is_refused(change, message, tmp_path):
    root = coco_export(tmp_path / "in")
    change(root)
    with pytest.raises(UserError, match=message):
        convert_folder("coco", root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_are_links_to_the_same_bytes_and_copies_on_another_disk(tmp_path, monkeypatch):
    root = yolo_folder(tmp_path / "in")
    linked = convert_folder("yolo", root, tmp_path / "linked")
    assert os.path.samefile(linked / "train2017/0.png", root / "images/train/0.png")

    def refuse(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    copied = convert_folder("yolo", root, tmp_path / "copied")
    picture = copied / "train2017/0.png"
    assert not os.path.samefile(picture, root / "images/train/0.png")
    assert picture.read_bytes() == (root / "images/train/0.png").read_bytes()


def test_images_of_one_name_from_two_folders_get_different_names(tmp_path):
    root = tmp_path / "in"
    for camera in ("left", "right"):
        for split in ("train", "val"):
            write_image(root / split / camera / "0.png")
            write_text(root / split / camera / "0.txt", f"0 {YOLO_BOX}\n")
    write_text(root / "classes.txt", "cat\n")
    out = convert_folder("yolo", root, tmp_path / "out")
    files = [image["file_name"] for image in content_of(out)["images"]]
    assert files == ["0.png", "right_0.png"] and check_data.check(out) == 0


def test_the_command_ends_with_the_check_of_the_data(tmp_path, capsys):
    root = yolo_folder(tmp_path / "in")
    with pytest.raises(SystemExit) as end:
        convert.main(["--from", "yolo", str(root), str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert "train: 2 images, 2 objects" in printed and "0 errors" in printed


# ---- what is wrong -------------------------------------------------------------------------------

YOLO_LINES = {
    "score": (f"0 {YOLO_BOX} 0.9", r"got 6 values; is the sixth a score\?"),
    "too few": ("0 0.5 0.5 0.1", "expected a class and 4 numbers.*got 4 values"),
    "even number of values": ("0 0.1 0.2 0.3 0.4 0.5 0.6 0.7", "3 or more points.*got 8 values"),
    "unknown class": (f"2 {YOLO_BOX}", "expected a class from 0 to 1, got 2"),
    "negative class": (f"-1 {YOLO_BOX}", "expected a class from 0 to 1, got -1"),
    "class by name": (f"dog {YOLO_BOX}", "expected a number, got 'dog'"),
    "half a class": (f"0.5 {YOLO_BOX}", "expected a class from 0 to 1, got 0.5"),
    "not a number": ("0 0.5 nan 0.1 0.1", "expected a number, got 'nan'"),
    "infinity": ("0 0.5 inf 0.1 0.1", "expected a number, got 'inf'"),
    "pixels": ("0 20 15 10 9", "expected coordinates from 0 to 1, got 20; pixels are divided"),
    "negative width": ("0 0.5 0.5 -0.1 0.1", "coordinates from 0 to 1, got -0.1")}


@pytest.mark.parametrize("line, message", YOLO_LINES.values(), ids=YOLO_LINES)
def test_a_wrong_yolo_line_is_named_by_file_and_line(line, message, tmp_path, capsys):
    root = yolo_folder(tmp_path / "in")
    write_text(root / "labels/train/1.txt", f"1 {YOLO_BOX}\n\n{line}\n")
    with pytest.raises(UserError, match=rf"1\.txt:3: .*{message}"):
        convert_folder("yolo", root, tmp_path / "out")
    assert "1.txt:3: " in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def change_voc(old, new):
    return voc_text(("dog", BOX, 0), name="0.png").replace(old, new)


VOC_FILES = {
    "not xml": ("<annotation><object>", r"0\.xml:\d+: expected XML"),
    "no box": (change_voc("bndbox", "box"), r"0\.xml:5: expected <bndbox> for the dog"),
    "no class": (change_voc("<name>dog</name>", ""), r"0\.xml:5: expected the class"),
    "corner missing": (change_voc("<xmin>4</xmin>", ""), r"0\.xml:5: expected a number, got ''"),
    "not a number": (change_voc("<xmin>4<", "<xmin>nan<"), r"0\.xml:5: expected a number"),
    "swapped": (change_voc("<xmin>4<", "<xmin>20<"), r"0\.xml:5: expected x1 < x2"),
    "outside": (change_voc("<xmax>14<", "<xmax>50<"),
                r"0\.xml:5: expected a box inside the image of 40 x 30 px"),
    "another size": (change_voc("<width>40<", "<width>80<"),
                     r"0\.xml:4: expected the size of 0\.png, 40 x 30 px, got 80 x 30; the boxes"),
    "no image": (change_voc("0.png", "9.png").replace("0.png", ""), None)}


@pytest.mark.parametrize("text, message", VOC_FILES.values(), ids=VOC_FILES)
def test_a_wrong_voc_file_is_named_by_file_and_line(text, message, tmp_path):
    root = voc_folder(tmp_path / "in")
    write_text(root / "Annotations/0.xml", text)
    if message is None:     # neither the image of its file name nor one of its own name
        (root / "JPEGImages/0.png").unlink()
        message = r"0\.xml: expected its image 9\.png"
    with pytest.raises(UserError, match=message):
        convert_folder("voc", root, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_voc_without_size_uses_the_size_of_the_image_and_says_so(tmp_path, capsys):
    root = voc_folder(tmp_path / "in")
    write_text(root / "Annotations/0.xml", voc_text(("dog", BOX, 0), size=""))
    out = convert_folder("voc", root, tmp_path / "out")
    sizes = {(image["width"], image["height"]) for split in ("train", "val")
             for image in content_of(out, split)["images"]}
    assert sizes == {(WIDTH, HEIGHT)}
    assert "0.xml:1: expected <size> with width and height, got none" in capsys.readouterr().out


CSV_ROWS = {
    "no image": ("9.png,dog,4,6,14,15", r"csv:2: expected an image file, got '9\.png'"),
    "no class": ("0.png,,4,6,14,15", "csv:2: expected a class, got none"),
    "not a number": ("0.png,dog,4,6,14,x", "csv:2: expected a number, got 'x'"),
    "swapped": ("0.png,dog,14,6,4,15", "csv:2: expected x1 < x2"),
    "outside": ("0.png,dog,4,6,14,95", "csv:2: expected a box inside the image"),
    "column missing": ("0.png,dog,4,6,14", "csv:2: expected 6 columns, got 5")}


@pytest.mark.parametrize("row, message", CSV_ROWS.values(), ids=CSV_ROWS)
def test_a_wrong_row_is_named_by_table_and_line(row, message, tmp_path):
    text = f"file,class,xmin,ymin,xmax,ymax\n{row}\n1.png,dog,4,6,14,15\n"
    with pytest.raises(UserError, match=message):
        convert_folder("csv", csv_folder(tmp_path / "in", text), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_boxes_that_are_shares_of_the_image_are_refused_where_pixels_are_read(tmp_path):
    row = "{}.png,0.1,0.2,0.35,0.5,dog\n"
    text = "file,xmin,ymin,xmax,ymax,class\n" + row.format(0) + row.format(1)
    with pytest.raises(UserError, match=r"expected boxes in pixels, got 2 of 2 within \[0, 1\]"):
        convert_folder("csv", csv_folder(tmp_path / "in", text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given, made, layout", [("voc", yolo_folder, "yolo"),
                                                 ("yolo", voc_folder, "voc")])
def test_a_folder_in_another_format_than_the_given_one_is_recognized(given, made, layout, tmp_path):
    with pytest.raises(UserError, match=f"the folder looks like {layout.upper()}: --from {layout}"):
        convert_folder(given, made(tmp_path / "in"), tmp_path / "out")


def test_a_table_without_the_columns_says_which_are_accepted(tmp_path):
    root = csv_folder(tmp_path / "in", "0.png,4,6,14,15,dog\n")
    with pytest.raises(UserError, match="labels.csv: expected a first row with the columns file"):
        convert_folder("csv", root, tmp_path / "out")


def use_obj_data(root):
    (root / "data.yaml").unlink()
    write_text(root / "obj.data", "names = my.names\n")


FOLDERS = {
    "label without image": (lambda root: (root / "images/train/1.png").unlink(),
                            r"labels.train.1\.txt: expected its image in .*images.train, got none"),
    "no labels": (lambda root: shutil.rmtree(root / "labels"),
                  "expected label files .* got none for 4 images"),
    "no names": (lambda root: write_text(root / "data.yaml", "train: images/train\n"),
                 "expected the names of the classes in data.yaml"),
    "wrong nc": (lambda root: write_text(root / "data.yaml", "nc: 3\nnames: [cat, dog]\n"),
                 "as many names as nc, got 2 names and nc 3"),
    "keypoints": (lambda root: write_text(root / "data.yaml", "kpt_shape: [17, 3]\nnames: [a]\n"),
                  "got keypoints"),
    "not yaml": (lambda root: write_text(root / "data.yaml", "names: [cat\n"), "expected YAML"),
    "deep yaml": (lambda root: write_text(root / "data.yaml", "names: " + "[" * 9999),
                  "expected YAML"),
    "a path to nowhere": (lambda root: write_text(root / "data.yaml",
                                                  "train: photos\nnames: [cat, dog]\n"),
                          "expected the images of train at photos, got no such folder"),
    "no file of names": (use_obj_data,
                         "expected the names of the classes at my.names, got no such file"),
    "broken image": (lambda root: write_text(root / "images/train/0.png", "none"),
                     r"0\.png: expected a readable image")}


@pytest.mark.parametrize("change, message", FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_cannot_be_converted_says_why_and_leaves_nothing(change, message, tmp_path):
    root = yolo_folder(tmp_path / "in")
    change(root)
    with pytest.raises(UserError, match=message):
        convert_folder("yolo", root, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def make_huge(path):
    with open(path, "r+b") as file:
        file.truncate(20 * 2 ** 30)   # sparse


@pytest.mark.parametrize("damage, message", [
    (replace_by_pipe, "expected a text file, got a folder or a device; remove it"),
    (make_huge, "expected a text file of at most 2 GiB, got 20 GiB")])
@pytest.mark.parametrize("source, file", [
    ("yolo", "data.yaml"), ("voc", "Annotations/1.xml"), ("csv", "labels.csv")])
def test_a_pipe_or_an_endless_file_is_refused_at_once(source, file, damage, message, tmp_path):
    if source == "csv":
        root = csv_folder(tmp_path / "in", "file\n")
    else:
        root = {"yolo": yolo_folder, "voc": voc_folder}[source](tmp_path / "in")
    damage(root / file)
    with pytest.raises(UserError, match=f"{file}: {message}"):
        convert_folder(source, root, tmp_path / "out")


def test_a_table_that_cannot_be_parsed_is_named(tmp_path):
    text = "file,class,xmin,ymin,xmax,ymax\n" + "x" * 200_000 + ",dog,4,6,14,15\n"
    with pytest.raises(UserError, match="labels.csv: expected a table, got a file that cannot be"):
        convert_folder("csv", csv_folder(tmp_path / "in", text), tmp_path / "out")


def test_every_fault_is_printed_with_its_own_line(tmp_path, capsys):
    root = yolo_folder(tmp_path / "in", lines="7 0.5 0.5 0.1 0.1\n0 1 2\n")
    with pytest.raises(UserError, match="got 8 faults"):
        convert_folder("yolo", root, tmp_path / "out")
    assert len(capsys.readouterr().out.splitlines()) == 8


def repeat_in_csv(root):
    """0.png in train, val and test; 1.png in train alone."""
    rows = "".join(f"{name}.png,dog,4,6,10,9,{split}\n" for name, split in (
        (0, "train"), (1, "train"), (0, "valid"), (0, "test")))
    return csv_folder(root, "file,class,x,y,w,h,split\n" + rows)


def repeat_in_tables(root):
    """0.png in train.csv and val.csv."""
    for split in ("train", "val"):
        csv_folder(root, "file,class,x,y,w,h\n0.png,dog,4,6,10,9\n")
        (root / "labels.csv").rename(root / f"{split}.csv")
    return root


def repeat_in_yolo(root):
    """train/0.png in both lists."""
    yolo_folder(root)
    write_text(root / "train.txt", "images/train/0.png\nimages/train/1.png\n")
    write_text(root / "val.txt", "images/val/0.png\nimages/val/../train/0.png\n")
    write_text(root / "data.yaml", "train: train.txt\nval: val.txt\nnames: [cat, dog]\n")
    return root


def repeat_in_voc(root):
    """0 in both lists."""
    voc_folder(root)
    write_text(root / "ImageSets/Main/train.txt", "0\n1\n")
    write_text(root / "ImageSets/Main/val.txt", "0\n")
    return root


def repeat_in_xml(root):
    """Both XML files name 0.png."""
    return voc_folder(root, voc_text(("dog", BOX, 0), name="0.png"))


@pytest.mark.parametrize("source, made, splits", [
    ("csv", repeat_in_csv, "train, val, test"), ("csv", repeat_in_tables, "train, val"),
    ("yolo", repeat_in_yolo, "train, val"), ("voc", repeat_in_voc, "train, val"),
    ("voc", repeat_in_xml, "undivided, undivided")])
def test_an_image_in_two_splits_or_listed_twice_is_refused(source, made, splits, tmp_path):
    """Figures on an image that was trained on say nothing."""
    root = made(tmp_path / "in")
    with pytest.raises(UserError, match=rf"got 1 image listed several times, first: .*0\.png "
                                        rf"\({splits}\); leave"):
        convert_folder(source, root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_of_trainval_that_val_lists_are_for_validation(tmp_path):
    """Without train.txt, those of trainval.txt that no other list has are for training."""
    root = voc_folder(tmp_path / "in")
    write_text(root / "ImageSets/Main/trainval.txt", "0\n1\n")
    write_text(root / "ImageSets/Main/val.txt", "1\n")
    out = convert_folder("voc", root, tmp_path / "out")
    assert [image["file_name"] for image in content_of(out)["images"]] == ["0.png"]
    assert [image["file_name"] for image in content_of(out, "val")["images"]] == ["1.png"]


def test_boxes_without_area_are_left_out_and_named(tmp_path, capsys):
    root = yolo_folder(tmp_path / "in", f"1 {YOLO_BOX}\n0 0.5 0.5 0 0.1\n")
    out = convert_folder("yolo", root, tmp_path / "out")
    assert boxes_of(out) == [XYWH, XYWH]
    assert "1.txt:2: expected an object with width and height, got none; left out" \
        in capsys.readouterr().out


def test_faulty_labels_and_files_are_left_out_on_request(tmp_path, capsys):
    root = yolo_folder(tmp_path / "yolo", f"1 {YOLO_BOX}\n9 {YOLO_BOX}\n")
    write_text(root / "images/train/1.png", "none")
    (root / "images/val/1.png").unlink()
    out = convert_folder("yolo", root, tmp_path / "a", skip_faulty=True)
    assert boxes_of(out) == boxes_of(out, "val") == [XYWH]
    assert "4 faults left out (--skip_faulty)" in capsys.readouterr().out
    text = voc_text(("dog", BOX, 0), ("ant", BOX, 0))
    root = voc_folder(tmp_path / "voc", text.replace("<filename>0.png</filename>", ""), 3)
    write_text(root / "classes.txt", "dog\n")
    write_text(root / "Annotations/1.xml", change_voc("<width>40<", "<width>80<"))
    out = convert_folder("voc", root, tmp_path / "b", skip_faulty=True)
    assert boxes_of(out) == boxes_of(out, "val") == [XYWH]
    assert check_data.check(out) == 0


def test_an_image_whose_rows_list_another_size_is_left_out_on_request(tmp_path):
    """It would else be learned as an image without objects."""
    rows = "".join(f"{k}.png,{width},30,dog,4,6,14,15\n" for k, width in enumerate((40, 80, 40)))
    root = csv_folder(tmp_path / "in", f"file,width,height,class,x1,y1,x2,y2\n{rows}", 3)
    out = convert_folder("csv", root, tmp_path / "out", skip_faulty=True)
    assert len(content_of(out)["images"]) == len(content_of(out, "val")["images"]) == 1


def test_an_existing_folder_is_never_written_to(tmp_path):
    root = yolo_folder(tmp_path / "in")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="expected a new folder to write, got one that exists"):
        convert_folder("yolo", root, tmp_path / "out")
    with pytest.raises(UserError, match="got one inside"):
        convert_folder("yolo", root, root / "out")


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    root = yolo_folder(tmp_path / "in")
    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        convert_folder("yolo", root, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_an_unknown_format_or_share_is_refused(tmp_path):
    root = yolo_folder(tmp_path / "in")
    with pytest.raises(UserError, match="expected --from yolo or voc or csv or coco, got 'kitti'"):
        convert_folder("kitti", root, tmp_path / "out")
    with pytest.raises(UserError, match="--val_share"):
        convert_folder("yolo", root, tmp_path / "out", val_share=1.0)
    with pytest.raises(UserError, match="expected a folder of images and labels"):
        convert_folder("yolo", tmp_path / "nothing", tmp_path / "out")
