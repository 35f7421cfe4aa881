"""engine/scoring.py: COCO's figures by hand and beside pycocotools' own table, the operating point,
and shares of the images that give the figures of all."""
import json
import math
import re
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import eval as evaluation
from engine import scoring
from engine.errors import UserError
from engine.scoring import score


def truth(objects, sizes=((100, 100),), categories=((7, "cat"),)):
    """A COCO of images 1, 2, ... from rows (image_id, category_id, [x, y, w, h])."""
    annotations = []
    for number, (image, category, box) in enumerate(objects, start=1):
        annotations.append({"id": number, "image_id": image, "category_id": category, "bbox": box,
                            "area": box[2] * box[3], "iscrowd": 0})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(sizes, start=1)],
        "categories": [{"id": i, "name": name} for i, name in categories],
        "annotations": annotations}
    with redirect_stdout(StringIO()):
        coco.createIndex()
    return coco


def result(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def random_case(images=9, seed=0):
    """Ground truth of `images` images, some with crowds, image 2 without objects, and noisy
    results, image 3 without any; two classes."""
    rng = np.random.default_rng(seed)
    objects = []
    results = []
    for number in range(8 * images):
        image = 1 + number % images
        category = (7, 9)[number % 2]
        box = [*rng.uniform(0, 100, 2), *rng.uniform(5, 140, 2)]
        if image != 2:
            objects.append((image, category, box))
        for _ in range(3 * (image != 3)):
            moved = (np.array(box) + rng.normal(0, 5, 4)).clip(1).tolist()
            # few different scores: ties must be broken in the same order everywhere
            results.append(result(image, category, moved, float(rng.integers(1, 9)) / 10))
    gt = truth(objects, [(240, 240)] * images, [(7, "a"), (9, "b")])
    for row in gt.dataset["annotations"][::7]:
        row["iscrowd"] = 1
    return gt, results


# ---- AP by hand ----------------------------------------------------------------------------------

def test_ap_of_one_hit_above_one_false_alarm_and_below_it():
    gt = truth([(1, 7, [10, 10, 50, 50])])
    hit, alarm = [10, 10, 50, 50], [70, 70, 20, 20]
    hit_first = [result(1, 7, hit, 0.9), result(1, 7, alarm, 0.1)]
    alarm_first = [result(1, 7, hit, 0.1), result(1, 7, alarm, 0.9)]
    assert score(gt, hit_first)["AP"] == pytest.approx(1)
    assert score(gt, alarm_first)["AP"] == pytest.approx(0.5)


def test_ap_averages_ten_thresholds_so_an_iou_of_0_62_passes_three():
    gt = truth([(1, 7, [0, 0, 100, 50])])
    figures = score(gt, [result(1, 7, [0, 0, 62, 50], 0.9)])   # passes 0.5, 0.55, 0.6
    assert figures["AP"] == pytest.approx(0.3)
    assert (figures["AP50"], figures["AP75"]) == (pytest.approx(1), 0)


def test_ap_with_half_the_objects_found_follows_the_101_recall_points():
    gt = truth([(1, 7, [0, 0, 20, 20]), (1, 7, [60, 60, 20, 20])])
    figures = score(gt, [result(1, 7, [0, 0, 20, 20], 0.9)])
    assert figures["AP"] == pytest.approx(51 / 101)                  # recalls 0, 0.01, ..., 0.50
    assert figures["AR100"] == pytest.approx(0.5)


def test_a_second_detection_of_the_same_object_is_a_false_alarm():
    first, second = [0, 0, 20, 20], [60, 60, 20, 20]
    gt = truth([(1, 7, first), (1, 7, second)])
    rows = [result(1, 7, first, 0.9), result(1, 7, first, 0.8), result(1, 7, second, 0.7)]
    assert score(gt, rows)["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_size_bands_without_objects_are_minus_one_and_shown_as_a_dash():
    gt = truth([(1, 7, [0, 0, 20, 20])])
    metrics = {"bbox": score(gt, [result(1, 7, [0, 0, 20, 20], 1.0)])}
    figures = metrics["bbox"]
    assert figures["APs"] == pytest.approx(1) and figures["APm"] == figures["APl"] == -1
    cells = evaluation.table(metrics).splitlines()[1].split()
    assert cells == ["bbox"] + ["1.000"] * 4 + ["-", "-"] + ["1.000"] * 3


def test_the_figures_are_those_of_pycocotools_summarize():
    gt, rows = random_case(3)
    figures = score(gt, rows)
    with redirect_stdout(StringIO()):
        peer = COCOeval(gt, gt.loadRes([dict(row) for row in rows]), "bbox")
        peer.evaluate()
        peer.accumulate()
        peer.summarize()
    names = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
    assert [figures[name] for name in names] == pytest.approx(peer.stats.tolist(), abs=1e-12)


@pytest.mark.parametrize("max_dets", [2, 40, 300])
def test_precision_scores_and_recall_are_those_of_pycocotools_bit_for_bit(max_dets):
    """Also with a limit below the number of detections, which is 24 per image and class."""
    gt, rows = random_case(4)
    gt.dataset["categories"].append({"id": 8, "name": "absent"})
    with redirect_stdout(StringIO()):
        gt.createIndex()
        peer = COCOeval(gt, gt.loadRes([dict(row) for row in rows]), "bbox")
        peer.params.maxDets = [limit for limit in (1, 10, 100) if limit < max_dets] + [max_dets]
        peer.evaluate()
        peer.accumulate()
    matches = scoring.match_images(gt, rows, "bbox", max_dets)
    precision, scores, recall, by_limit = scoring.accumulate([matches], [7, 8, 9], "bbox", max_dets)
    np.testing.assert_array_equal(precision, peer.eval["precision"][..., -1])
    np.testing.assert_array_equal(scores, peer.eval["scores"][..., -1])
    np.testing.assert_array_equal(recall, peer.eval["recall"][..., -1])
    for number, limit in enumerate(peer.params.maxDets):
        np.testing.assert_array_equal(by_limit[limit], peer.eval["recall"][:, :, 0, number])


def test_per_class_figures_carry_the_names_of_the_json_and_count_objects_without_crowds():
    gt = truth([(1, 3, [0, 0, 20, 20]), (1, 9, [50, 50, 20, 20]), (1, 9, [70, 0, 20, 20])],
               categories=[(3, "dog"), (9, "owl")])
    gt.dataset["annotations"][2]["iscrowd"] = 1
    per_class = score(gt, [result(1, 3, [0, 0, 20, 20], 1.0)])["per_class"]
    rows = {name: (row["AP"], row["AP50"], row["objects"]) for name, row in per_class.items()}
    assert rows == {"dog": (pytest.approx(1), pytest.approx(1), 1), "owl": (0, 0, 1)}


def test_max_dets_is_a_limit_per_image_and_class_and_renames_the_recall():
    objects = [(1, 7, [10 * i, 0, 8, 8]) for i in range(6)]
    gt = truth(objects)
    rows = [result(1, 7, box, 1 - i / 10) for i, (_, _, box) in enumerate(objects)]
    assert score(gt, rows, max_dets=3)["AR3"] == pytest.approx(0.5)
    assert score(gt, rows, max_dets=300)["AR300"] == pytest.approx(1)
    assert "AR10" not in score(gt, rows, max_dets=3)
    alone = score(gt, rows, max_dets=1)
    assert alone["AR1"] == pytest.approx(1 / 6) and alone["AP"] == pytest.approx(17 / 101)


def test_no_detection_at_all_scores_zero_and_no_object_at_all_scores_minus_one():
    assert score(truth([(1, 7, [0, 0, 20, 20])]), [])["AP"] == 0
    assert score(truth([]), [result(1, 7, [0, 0, 20, 20], 0.5)])["AP"] == -1
    assert score(truth([], sizes=((5, 5), (5, 5))), [])["AP"] == -1
    assert score(truth([], sizes=()), [])["AP"] == -1


def test_results_of_another_data_set_are_refused_by_id():
    gt = truth([(1, 7, [0, 0, 20, 20])])
    with pytest.raises(UserError, match=r"category_id.*\[8\]"):
        score(gt, [result(1, 8, [0, 0, 20, 20], 0.5)])
    with pytest.raises(UserError, match=r"image_id.*\[2\]"):
        score(gt, [result(2, 7, [0, 0, 20, 20], 0.5)])


@pytest.mark.parametrize("bad", [result(1, 7, [0, math.nan, 20, 20], 0.5),
                                 result(1, 7, [0, 0, math.inf, 20], 0.5),
                                 result(1, 7, [0, 0, 20, 20], math.nan)])
def test_results_that_are_not_finite_are_refused_and_not_counted_as_hits(bad):
    """pycocotools counts a NaN box as a hit: its IoU with everything fails `iou < threshold`."""
    gt = truth([(1, 7, [0, 0, 20, 20])])
    with pytest.raises(UserError, match="finite.*image 1"):
        score(gt, [bad])


def test_scoring_prints_nothing_and_changes_no_result(capfd):
    gt = truth([(1, 7, [0, 0, 20, 20])])
    rows = [result(1, 7, [0, 0, 20, 20], 0.5)]
    before = json.dumps(rows)
    score(gt, rows)
    assert capfd.readouterr().out == "" and json.dumps(rows) == before


# ---- operating point -----------------------------------------------------------------------------

def test_the_threshold_of_the_best_f1_by_hand():
    """Four objects; hits at 0.9, 0.8, 0.6 and a false alarm at 0.7: F1 is 2/3 at 0.8 (precision 1,
    recall 1/2), 3/4 at 0.6 (precision and recall 3/4)."""
    boxes = [[30 * i, 0, 20, 20] for i in range(4)]
    gt = truth([(1, 7, box) for box in boxes])
    rows = [result(1, 7, box, score) for box, score in zip(boxes, (0.9, 0.8, 0.6))]
    rows.append(result(1, 7, [0, 60, 20, 20], 0.7))
    row = score(gt, rows)["per_class"]["cat"]
    assert row["threshold"] == 0.6
    assert (row["precision"], row["recall"], row["F1"]) == pytest.approx((0.75, 0.75, 0.75))
    # a further false alarm above the third hit: precision 3/5, F1 2/3; the two first are as good,
    rows.append(result(1, 7, [30, 60, 20, 20], 0.65))
    rows.append(result(1, 7, [60, 60, 20, 20], 0.65))     # and with two more they are better
    row = score(gt, rows)["per_class"]["cat"]
    assert row["threshold"] == 0.8 and row["F1"] == pytest.approx(2 / 3)


def test_a_class_that_is_never_detected_has_no_threshold():
    gt = truth([(1, 7, [0, 0, 20, 20])], categories=[(7, "cat"), (8, "dog")])
    figures = score(gt, [])
    assert [row["threshold"] for row in figures["per_class"].values()] == [-1, -1]
    assert evaluation.thresholds({"bbox": figures}) == {}
    text = evaluation.threshold_table({"bbox": figures})
    assert re.search(r"cat +- +- +- +-\n", text)


# ---- shares of the images -----------------------------------------------------------------------

def share_of(gt, results, image_ids):
    """The part of a case that lies in some images."""
    part = COCO()
    part.dataset = {key: gt.dataset[key] for key in ("images", "categories", "annotations")}
    part.dataset["images"] = [row for row in gt.dataset["images"] if row["id"] in image_ids]
    part.dataset["annotations"] = [row for row in gt.dataset["annotations"]
                                   if row["image_id"] in image_ids]
    with redirect_stdout(StringIO()):
        part.createIndex()
    return part, [row for row in results if row["image_id"] in image_ids]


@pytest.mark.parametrize("shares", [
    [[1, 3, 5, 7, 9], [2, 4, 6, 8]],                    # as evaluate deals them
    [[9, 1, 2], [], [8, 7, 6, 5, 4, 3]],                # an empty rank, uneven shares, any order
    [[2], [3], [1, 4, 5, 6, 7, 8, 9]]])                 # no objects here, no detections there
def test_figures_from_shares_equal_those_of_one_process_bit_for_bit(shares):
    gt, results = random_case(9)
    expected = score(gt, results, max_dets=20)
    parts = []
    for image_ids in shares:
        parts.append(scoring.match_images(*share_of(gt, results, image_ids), "bbox", 20))
    categories = gt.dataset["categories"]
    assert scoring.figures(parts, categories, "bbox", 20) == expected
    assert 0 < expected["AP"] < 1
