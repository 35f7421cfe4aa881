"""Small folders of labels in every format that tools/convert.py reads, for its tests."""
import json

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 40, 30
VOC_OBJECT = """
  <object>
    <name>{name}</name>
    <difficult>{difficult}</difficult>
    <bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>
  </object>"""
VOC_SIZE = f"\n  <size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
BOX = (4, 6, 14, 15)                  # corners in px; as YOLO writes it:
YOLO_BOX = "0.225 0.35 0.25 0.3"
XYWH = [4, 6, 10, 9]


def write_image(path, size=(WIDTH, HEIGHT)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(path))).integers(0, 255, (size[1], size[0], 3))
    Image.fromarray(noise.astype(np.uint8)).save(path)


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def yolo_folder(root, lines=f"1 {YOLO_BOX}\n", splits=("train", "val"), images=2):
    """images/SPLIT/k.png, labels/SPLIT/k.txt and data.yaml"""
    for split in splits:
        for k in range(images):
            write_image(root / "images" / split / f"{k}.png")
            write_text(root / "labels" / split / f"{k}.txt", lines)
    entries = "".join(f"{split}: images/{split}\n" for split in splits)
    write_text(root / "data.yaml", entries + "nc: 2\nnames: [cat, dog]\n")
    return root


def voc_text(*objects, size=VOC_SIZE, source="mine", name="0.png"):
    rows = "".join(VOC_OBJECT.format(*box, name=label, difficult=difficult)
                   for label, box, difficult in objects)
    return (f"<annotation>\n  <filename>{name}</filename>\n  <source><database>{source}</database>"
            f"</source>{size}{rows}\n</annotation>\n")


def voc_folder(root, text=None, images=2):
    """Annotations/k.xml and JPEGImages/k.png"""
    for k in range(images):
        write_image(root / "JPEGImages" / f"{k}.png")
        content = text or voc_text(("dog", BOX, 0), name=f"{k}.png")
        write_text(root / "Annotations" / f"{k}.xml", content)
    return root


def csv_folder(root, text, images=2):
    """images/k.png and labels.csv"""
    for k in range(images):
        write_image(root / "images" / f"{k}.png")
    write_text(root / "labels.csv", text)
    return root


def coco_export(root, place="annotations/instances_default.json"):
    """A COCO json of three images that are not divided, the first with a crowd and a mask."""
    files = ["0.png", "images/1.png", r"C:\upload\2.png"]
    entries = []
    rows = []
    for k, file in enumerate(files):
        write_image(root / "images" / f"{k}.png")
        entries.append({"id": k, "file_name": file, "width": WIDTH, "height": HEIGHT})
        rows.append({"id": k, "image_id": k, "category_id": 3, "bbox": XYWH, "area": 7,
                     "iscrowd": int(k == 0), "segmentation": [[4, 6, 14, 6, 14, 15]]})
    content = {"images": entries, "annotations": rows,
               "categories": [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}]}
    write_text(root / place, json.dumps(content))
    return root
