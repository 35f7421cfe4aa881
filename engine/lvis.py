"""LVIS (Gupta et al., CVPR 2019, arXiv 1908.03195): a json that is federated, and its AP.

Federated: an image is annotated for some classes only. What it says of the others:
    neg_category_ids                 looked for, and not there
    not_exhaustive_category_ids      there, but not every object is annotated
    any other class                  unknown: detections of it do not count
Classes have a `frequency`: r (rare, in at most 10 training images), c (common, at most 100) or f.

    read_federated     what a json says beyond COCO's fields
    score              AP, APr, APc, APf; needs faster-coco-eval

An image has no `file_name`: it lies where `coco_url` says, as train2017/000000391895.jpg
(`engine.coco_json.name_files`).
"""
import contextlib
import io
from collections import Counter
from typing import NamedTuple

import numpy as np
from pycocotools import mask as rle

from engine.errors import UserError
from engine.notices import one_line
from engine.scoring import AREAS, class_figures, mean, require_finite_row

LIMIT = 300                   # detections of an image that count, over all classes
FREQUENCIES = ("r", "c", "f")
IMAGE_LISTS = ("neg_category_ids", "not_exhaustive_category_ids")


class Federated(NamedTuple):
    """What an LVIS json says beyond COCO's fields, in the json's ids."""
    frequency: dict          # category id -> r, c or f
    lists: dict              # image id -> {name of IMAGE_LISTS: category ids}


def is_lvis(content: dict) -> bool:
    """Whether the content of a json, usable as a COCO json, is LVIS: an image has lists of classes,
    or there are annotations whose classes have frequencies."""
    if any(name in image for image in content["images"] for name in IMAGE_LISTS):
        return True
    if not content["annotations"]:
        return False
    return all(category.get("frequency") in FREQUENCIES for category in content["categories"])


def read_federated(content: dict, path) -> Federated:
    """What an LVIS json, usable as a COCO json, says beyond it.

    Raises UserError where classes have no frequency, where an image lacks a list, or where a list
    names an unknown class.
    """
    frequency = {}
    for category in content["categories"]:
        frequency[category["id"]] = category.get("frequency")
        if frequency[category["id"]] not in FREQUENCIES:
            raise UserError(
                f"{path}: expected an LVIS json with frequency r, c or f of every category, got "
                f"{category.get('frequency')!r} for {one_line(str(category['name']))}; use the "
                "json as it was published")
    missing = None if content["annotations"] else []     # images of a test set need no lists
    lists = {}
    for image in content["images"]:
        lists[image["id"]] = {name: image.get(name, missing) for name in IMAGE_LISTS}
        for name, ids in lists[image["id"]].items():
            wrong = ids
            if isinstance(ids, list):
                wrong = [number for number in ids if not is_category(number, frequency)]
            if wrong != []:
                raise UserError(
                    f"{path}: expected {name} of image {image['id']} to list ids of categories, "
                    f"got {one_line(wrong, 60)}; use the json as it was published")
    return Federated(frequency, lists)


def is_category(number, frequency: dict) -> bool:
    """Whether an entry of a list is the id of a category."""
    return type(number) is int and number in frequency


def add_to_truth(truth: dict, federated: Federated) -> None:
    """Write the lists and frequencies into a ground truth for pycocotools, in place. A class that
    only the training set has is frequent; no object of it is in the truth."""
    for image in truth["images"]:
        image.update(federated.lists[image["id"]])
    for category in truth["categories"]:
        category["frequency"] = federated.frequency.get(category["id"], "f")


# ---- average precision

def import_faster_coco_eval():
    """The optional package. Raises UserError if it is missing."""
    try:
        import faster_coco_eval
    except ImportError as error:
        raise UserError("expected the package faster-coco-eval for the AP of LVIS, got none: "
                        "pip install faster-coco-eval") from error
    return faster_coco_eval


def best_of_images(results: list, limit: int) -> list:
    """The `limit` results with the highest scores of each image, over all classes."""
    by_image = {}
    for row in results:
        by_image.setdefault(row["image_id"], []).append(row)
    best = []
    for rows in by_image.values():
        best += sorted(rows, key=lambda row: -row["score"])[:limit]
    return best


def score(truth: dict, results: list, iou_type: str = "bbox", limit: int = LIMIT) -> dict:
    """LVIS's figures: federated AP of the `limit` best detections of each image.

    truth: the content of a ground truth with lists and frequencies, see `add_to_truth`; results:
    COCO results of all images -> the figures of `engine.scoring.score`, with APr, APc and APf, and
    no recalls but AR<limit>. -1 where the truth has no such object.
    """
    package = import_faster_coco_eval()
    for row in results:
        require_finite_row(row)
    with contextlib.redirect_stdout(io.StringIO()):
        objects = package.COCO(truth)
        detections = package.COCO(as_truth(truth, best_of_images(results, limit), iou_type))
        evaluation = package.COCOeval_faster(objects, detections, iou_type, lvis_style=True)
        evaluation.params.maxDets = [limit]
        evaluation.evaluate()
        evaluation.accumulate()
    # (T, R, K, A): IoU thresholds, recall levels, classes, areas
    precision = evaluation.eval["precision"][..., -1]
    scores = evaluation.eval["scores"][..., -1]
    recall = evaluation.eval["recall"][..., -1]                                # (T, K, A)
    categories = sorted(truth["categories"], key=lambda category: category["id"])
    return figures(precision, scores, recall, categories, truth["annotations"], limit)


def as_truth(truth: dict, results: list, iou_type: str) -> dict:
    """Results as the content of a json."""
    rows = []
    for number, result in enumerate(results, start=1):
        row = {name: result[name] for name in ("image_id", "category_id", "score")}
        row |= {"id": number, "iscrowd": 0}
        if iou_type == "bbox":
            _, _, width, height = result["bbox"]
            row |= {"bbox": result["bbox"], "area": width * height}
        else:
            row["segmentation"] = result["segmentation"]
            row["area"] = float(rle.area(result["segmentation"]))
        rows.append(row)
    return {"images": truth["images"], "categories": truth["categories"], "annotations": rows}


def figures(precision, scores, recall, categories, annotations, limit) -> dict:
    """The table of `score`."""
    result = {"AP": mean(precision[:, :, :, 0]),
              "AP50": mean(precision[0, :, :, 0]),
              "AP75": mean(precision[5, :, :, 0])}
    for area in (1, 2, 3):
        result["AP" + AREAS[area]] = mean(precision[:, :, :, area])
    groups = np.array([category["frequency"] for category in categories])
    for group in FREQUENCIES:
        result["AP" + group] = mean(precision[:, :, groups == group, 0])
    result[f"AR{limit}"] = mean(recall[:, :, 0])
    objects = Counter(row["category_id"] for row in annotations if not row.get("iscrowd", 0))
    counts = [objects[category["id"]] for category in categories]
    return {**result, "max_dets": limit, **class_figures(precision, scores, categories, counts)}
