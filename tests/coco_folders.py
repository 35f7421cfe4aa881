"""Small COCO-layout folders for the tests of data."""
import json
import zlib

import numpy as np
from PIL import Image
from pycocotools.cocoeval import COCOeval

POLYGON = [[5, 6, 15, 6, 15, 14, 5, 14]]   # of the default box


def write_folder(root, images=((40, 30),), boxes=((0, 1, (5, 6, 10, 8)),),
                 categories=((1, "cat"),), splits=("train", "val")):
    """Write a COCO-layout folder with random pixels.

    images: (width, height) each, with ids 10, 11, ...
    boxes: (place of the image, category id, xywh[, dict of more fields]) each, with ids 0, 1, ...
    categories: (id, name) each
    """
    annotations = []
    for k, (place, category, box, *more) in enumerate(boxes):
        row = {"id": k, "image_id": 10 + place, "category_id": category, "bbox": list(box),
               "iscrowd": 0, "area": box[2] * box[3]}
        annotations.append(row | (more[0] if more else {}))
    entries = [{"id": 10 + k, "file_name": f"{k}.jpg", "width": width, "height": height}
               for k, (width, height) in enumerate(images)]
    content = {"images": entries, "annotations": annotations,
               "categories": [{"id": number, "name": name} for number, name in categories]}
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split in splits:
        folder = root / f"{split}2017"
        folder.mkdir(exist_ok=True)
        for k, (width, height) in enumerate(images):
            pixels = np.random.default_rng(k).integers(0, 255, (height, width, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.jpg")
        json_file(root, split).write_text(json.dumps(content))
    return root


def json_file(root, split="train"):
    return root / "annotations" / f"instances_{split}2017.json"


def edit_json(root, change, split="train"):
    path = json_file(root, split)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def annotation(**fields):
    """A change of the first annotation."""
    return lambda content: content["annotations"][0].update(fields)


def image_entry(**fields):
    """A change of the first image."""
    return lambda content: content["images"][0].update(fields)


def category(**fields):
    """A change of the first category."""
    return lambda content: content["categories"][0].update(fields)


def truncate(path):
    """Cut off the last third of a file."""
    content = path.read_bytes()
    path.write_bytes(content[:-len(content) // 3])


def write_huge_header(path, side=60000):
    """Write a small PNG whose header says side x side px."""
    Image.new("L", (8, 8)).save(path, format="PNG")
    content = bytearray(path.read_bytes())
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    path.write_bytes(content)


def average_precision(dataset, results, kind="bbox", max_dets=100):
    truth = dataset.coco()
    score = COCOeval(truth, truth.loadRes(results), kind)
    score.params.maxDets = [1, 10, max_dets]
    score.evaluate()
    score.accumulate()
    precision = score.eval["precision"][:, :, :, 0, 2]
    return precision[precision > -1].mean()


def perfect_results(dataset):
    """What a flawless detector returns for the samples of a data set, in px and json ids."""
    results = []
    for k in range(len(dataset)):
        _, target = dataset[k]
        height, width = target["orig_size"].tolist()
        rows = zip(target["labels"].tolist(), target["boxes"].double().tolist())
        for label, (cx, cy, w, h) in rows:
            box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
            results.append({"image_id": target["image_id"], "bbox": box, "score": 1.0,
                            "category_id": dataset.category_ids[label]})
    return results


def epoch_of(loader):
    """Places in the data set of the images of each batch."""
    return [[target["index"] for target in targets] for _, _, targets in loader]
