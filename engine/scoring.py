"""COCO average precision by pycocotools, in one process or shared among several.

pycocotools works in two steps. `evaluate` matches the detections of each image with its objects;
`accumulate` sorts the detections of all images by score and makes the precision-recall curves.
With several processes each one matches its own images (`match_images`), the first one receives all
matches and makes the curves once (`figures`). The result is the one of a single process, bit for
bit, because `accumulate` sees the same numbers in the same order.

Two things that pycocotools leaves to its caller: its `summarize` has no limit but 100 detections
per image, so the table is read from `eval["precision"]` here; and -1 means "no such object".
"""
import contextlib
import io
import math
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from engine.errors import UserError

AREAS = ("", "s", "m", "l")     # suffixes of AP and AR in the order of pycocotools' area ranges


class Matches(NamedTuple):
    """What `accumulate` reads of some images, in flat arrays that are cheap to send.

    An entry is one (class, area range, image) that has objects or detections; E entries hold D
    detections and G objects, one after the other; T thresholds of IoU."""
    image_ids: np.ndarray      # (I,) all images, those without entries too
    entries: np.ndarray        # (E, 3) position of the class, position of the area range, image id
    detections: np.ndarray     # (E,) number of detections
    objects: np.ndarray        # (E,) number of objects
    scores: np.ndarray         # (D,)
    matched: np.ndarray        # (T, D) bool: the detection hits an object
    ignored: np.ndarray        # (T, D) bool: the detection counts neither for nor against
    gt_ignored: np.ndarray     # (G,) bool: the object is a crowd or of another size


def score(gt: COCO, results: list[dict], iou_type: str = "bbox", max_dets: int = 100,
          rank: int = 0, world: int = 1) -> dict:
    """COCO's figures for a list of results against the ground truth `gt` (a pycocotools COCO).

    iou_type: "bbox" or "segm". Only the `max_dets` best detections per image and class count. With
    `world` processes `gt` and `results` are those of this rank's images, and every rank returns the
    figures of all.

    -> {AP, AP50, AP75, APs, APm, APl, ARs, ARm, ARl, AR1, AR10, AR<max_dets>, max_dets,
    per_class {name: {AP, AP50, objects, and those of `operating_point`}}, curves {name: {precision,
    score}, 101 numbers each at recall 0, 0.01, ..., 1 and IoU 0.5}}; -1 where the ground truth has
    no such object. UserError for results of images or categories that the ground truth does not
    have, and for results that are not finite."""
    matches = match_images(gt, results, iou_type, max_dets)
    categories = [gt.cats[category] for category in sorted(gt.cats)]
    if world == 1:
        return figures([matches], categories, iou_type, max_dets)
    # one message to the first rank, one answer
    parts = [None] * world if rank == 0 else None
    dist.gather_object(matches, parts)
    answer = [figures(parts, categories, iou_type, max_dets) if rank == 0 else None]
    dist.broadcast_object_list(answer)
    return answer[0]


def match_images(gt: COCO, results: list[dict], iou_type: str, max_dets: int) -> Matches:
    """Match the results of the images of `gt` with its objects -> Matches."""
    detections = results_as_coco(gt, results, iou_type)
    evaluation = make_evaluation(gt, detections, iou_type, sorted(gt.cats), max_dets)
    evaluation.params.imgIds = sorted(gt.imgs)
    thresholds = len(evaluation.params.iouThrs)
    if gt.imgs:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()

    # pycocotools lists classes, then area ranges, then images
    images = len(gt.imgs)
    areas = len(evaluation.params.areaRng)
    entries = []
    rows = []
    for position, row in enumerate(evaluation.evalImgs if gt.imgs else []):
        if row is not None:
            category, rest = divmod(position, areas * images)
            entries.append((category, rest // images, row["image_id"]))
            rows.append(row)
    no_matches = np.zeros((thresholds, 0), bool)
    matched = [no_matches] + [row["dtMatches"] != 0 for row in rows]
    ignored = [no_matches] + [row["dtIgnore"] for row in rows]
    scores = [np.zeros(0)] + [row["dtScores"] for row in rows]
    gt_ignored = [np.zeros(0, bool)] + [row["gtIgnore"] for row in rows]
    return Matches(
        image_ids=np.array(sorted(gt.imgs), np.int64),
        entries=np.array(entries, np.int64).reshape(-1, 3),
        detections=np.array([len(row["dtScores"]) for row in rows], np.int64),
        objects=np.array([len(row["gtIgnore"]) for row in rows], np.int64),
        scores=np.concatenate(scores),
        matched=np.concatenate(matched, 1),
        ignored=np.concatenate(ignored, 1).astype(bool),
        gt_ignored=np.concatenate(gt_ignored).astype(bool))


def make_evaluation(gt, detections, iou_type, category_ids, max_dets):
    """A COCOeval for these categories and this limit of detections per image and class."""
    evaluation = COCOeval(gt, detections, iou_type)
    evaluation.params.catIds = category_ids
    evaluation.params.maxDets = [limit for limit in (1, 10, 100) if limit < max_dets] + [max_dets]
    return evaluation


def accumulate(parts: list[Matches], category_ids: list[int], iou_type: str, max_dets: int):
    """Matches of all ranks -> pycocotools' precision (T, R, K, A) and scores of the same shape,
    recall (T, K, A), and {limit: recall (T, K)} for every limit of detections.

    T IoU thresholds, R recall levels, K classes, A area ranges (all, small, medium, large); -1
    where there are no objects."""
    matches = merge(parts)
    precision, scores, recall = curves(matches, category_ids, iou_type)
    params = make_evaluation(None, None, iou_type, category_ids, max_dets).params
    by_limit = {}
    for limit in params.maxDets[:-1]:
        _, _, lower = curves(first_detections(matches, limit), category_ids, iou_type)
        by_limit[limit] = lower[:, :, 0]
    by_limit[max_dets] = recall[:, :, 0]
    return precision, scores, recall, by_limit


def merge(parts: list[Matches]) -> Matches:
    """Matches of all ranks as one, with entries in the order of a single process: by class, area
    range and image."""
    columns = {}
    for name in ("image_ids", "entries", "detections", "objects", "scores", "gt_ignored"):
        columns[name] = np.concatenate([getattr(part, name) for part in parts])
    for name in ("matched", "ignored"):
        columns[name] = np.concatenate([getattr(part, name) for part in parts], 1)
    matches = Matches(**columns)
    category, area, image_id = matches.entries.T
    order = np.lexsort((image_id, area, category))
    d = positions(matches.detections, order)
    g = positions(matches.objects, order)
    return Matches(
        image_ids=matches.image_ids,
        entries=matches.entries[order],
        detections=matches.detections[order],
        objects=matches.objects[order],
        scores=matches.scores[d],
        matched=matches.matched[:, d],
        ignored=matches.ignored[:, d],
        gt_ignored=matches.gt_ignored[g])


def positions(counts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Positions that bring the members of the entries into this order of the entries.

    counts (E,): members of each entry; order (E,): as of np.lexsort -> (sum of counts,)"""
    starts = counts.cumsum() - counts                                          # (E,)
    counts = counts[order]
    ends = counts.cumsum()
    shifts = starts[order] - (ends - counts)                                   # (E,)
    return np.repeat(shifts, counts) + np.arange(counts.sum())


def first_detections(matches: Matches, limit: int) -> Matches:
    """Matches with the `limit` best detections of each entry, whose detections are sorted."""
    counts = matches.detections
    starts = counts.cumsum() - counts                                          # (E,)
    first = np.arange(counts.sum()) - np.repeat(starts, counts) < limit        # (D,)
    return matches._replace(
        detections=counts.clip(max=limit),
        scores=matches.scores[first],
        matched=matches.matched[:, first],
        ignored=matches.ignored[:, first])


def curves(matches, category_ids, iou_type):
    """pycocotools' precision, scores and recall of merged Matches, without a limit of detections.

    `COCOeval.accumulate` joins the images of a class and area range. Here they are joined already:
    it sees them as one image, which is faster and gives the same numbers."""
    limit = max(1, len(matches.scores))
    evaluation = make_evaluation(None, None, iou_type, category_ids, limit)
    evaluation.params.imgIds = [0]
    evaluation.params.maxDets = [limit]
    evaluation._paramsEval = evaluation.params

    areas = len(evaluation.params.areaRng)
    place = matches.entries[:, 0] * areas + matches.entries[:, 1]              # (E,)
    places = np.arange(len(category_ids) * areas + 1)
    # where the entries, detections and objects of each class and area range begin
    entry_starts = np.searchsorted(place, places)
    detection_starts = np.append(0, matches.detections.cumsum())[entry_starts]
    object_starts = np.append(0, matches.objects.cumsum())[entry_starts]
    evaluation.evalImgs = []
    for k in places[:-1]:
        d = slice(detection_starts[k], detection_starts[k + 1])
        g = slice(object_starts[k], object_starts[k + 1])
        evaluation.evalImgs.append({
            "dtScores": matches.scores[d],
            "dtMatches": matches.matched[:, d],
            "dtIgnore": matches.ignored[:, d],
            "gtIgnore": matches.gt_ignored[g]})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    return [evaluation.eval[name][..., 0] for name in ("precision", "scores", "recall")]


def figures(parts: list[Matches], categories: list[dict], iou_type: str, max_dets: int) -> dict:
    """The table of `score` from the Matches of all ranks."""
    category_ids = [category["id"] for category in categories]
    precision, scores, recall, by_limit = accumulate(parts, category_ids, iou_type, max_dets)
    result = {"AP": mean(precision[:, :, :, 0]),
              "AP50": mean(precision[0, :, :, 0]),
              "AP75": mean(precision[5, :, :, 0])}
    for area in (1, 2, 3):
        result["AP" + AREAS[area]] = mean(precision[:, :, :, area])
        result["AR" + AREAS[area]] = mean(recall[:, :, area])
    for limit, values in by_limit.items():
        result[f"AR{limit}"] = mean(values)
    counts = count_objects(parts, len(categories))
    return {**result, "max_dets": max_dets,
            **class_figures(precision, scores, categories, counts)}


def class_figures(precision, scores, categories, counts):
    """The parts `per_class` and `curves` of the table of `score`.

    precision, scores: (T, R, K, A), as `accumulate` returns them; counts: objects of each class"""
    per_class = {}
    class_curves = {}
    for k, category in enumerate(categories):
        curve = {"precision": precision[0, :, k, 0].tolist(),                  # (R,) at IoU 0.5
                 "score": scores[0, :, k, 0].tolist()}
        class_curves[category["name"]] = curve
        per_class[category["name"]] = {"AP": mean(precision[:, :, k, 0]),
                                       "AP50": mean(precision[0, :, k, 0]),
                                       "objects": counts[k],
                                       **operating_point(**curve)}
    return {"per_class": per_class, "curves": class_curves}


def operating_point(precision: list[float], score: list[float]) -> dict[str, float]:
    """The score threshold with the best F1 of one class at IoU 0.5.

    precision, score: 101 numbers each, at recall 0, 0.01, ..., 1, as pycocotools makes them: the
    best precision at this recall or beyond, and the score at which the recall is reached.
    -> {"threshold", "precision", "recall", "F1"}; all -1 where the class is never detected."""
    precision = np.array(precision).clip(0)
    recall = np.linspace(0, 1, len(precision))
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = f1.argmax()
    if f1[best] == 0:
        return {"threshold": -1.0, "precision": -1.0, "recall": -1.0, "F1": -1.0}
    return {"threshold": float(score[best]), "precision": float(precision[best]),
            "recall": float(recall[best]), "F1": float(f1[best])}


def count_objects(parts: list[Matches], num_classes: int) -> list[int]:
    """Objects of each class, crowds not counted."""
    counts = np.zeros(num_classes, int)
    for part in parts:
        category = np.repeat(part.entries[:, 0], part.objects)                 # (G,)
        area = np.repeat(part.entries[:, 1], part.objects)
        counted = category[(area == 0) & ~part.gt_ignored]
        counts += np.bincount(counted, minlength=num_classes)
    return counts.tolist()


def mean(values: np.ndarray) -> float:
    """Mean of the entries that exist; pycocotools marks the others, and we their mean, with -1."""
    existing = values[values > -1]
    return float(existing.mean()) if existing.size else -1.0


def results_as_coco(gt: COCO, results: list[dict], iou_type: str) -> COCO:
    """Results as the second COCO object of COCOeval.

    `COCO.loadRes` cannot be used: it fails on an empty list, changes the caller's rows, and uses
    the area of the box in place of the mask's where a row has both."""
    for key, known in (("image_id", gt.imgs), ("category_id", gt.cats)):
        foreign = sorted({result[key] for result in results} - known.keys())
        if foreign:
            raise UserError(f"expected every {key} of the results among the {len(known)} of the "
                            f"ground truth, got {foreign[:5]}: are the detections from another "
                            "data set?")
    annotations = []
    for number, result in enumerate(results, start=1):     # COCOeval takes id 0 for "no match"
        require_finite_row(result)
        row = {"id": number, "iscrowd": 0}
        row |= {key: result[key] for key in ("image_id", "category_id", "score")}
        if iou_type == "bbox":
            _, _, width, height = result["bbox"]
            row |= {"bbox": result["bbox"], "area": width * height}
        else:
            # one by one: rle.area fails for a list of more than 255 masks
            area = float(rle.area(result["segmentation"]))
            row |= {"segmentation": result["segmentation"], "area": area}
        annotations.append(row)
    coco = COCO()
    coco.dataset = {"images": gt.dataset["images"],
                    "categories": gt.dataset["categories"],
                    "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def require_finite_row(result: dict) -> None:
    """UserError for a result with a NaN or infinite score or box: pycocotools would take a NaN box
    for a hit."""
    numbers = (result["score"], *result.get("bbox", ()))
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"expected finite detections, got score {result['score']} and box "
                        f"{result.get('bbox')} in image {result['image_id']}: the model's weights "
                        "are damaged or its training diverged")
