"""eval.py: hand-made AP cases, perfect predictions on real data, the way from a detection to the results json, ATD."""
import dataclasses
import importlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

import checkpoints
import data
import eval as evaluation
from boxes import box_cxcywh_to_xyxy


def truth(objects, sizes=((100, 100),), categories=((7, "cat"),)):
    """A COCO of images 1, 2, ... from rows (image_id, category_id, [x, y, w, h])."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i + 1, "height": h, "width": w} for i, (h, w) in enumerate(sizes)],
        "categories": [{"id": i, "name": name} for i, name in categories],
        "annotations": [{"id": i + 1, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3],
                         "iscrowd": 0} for i, (image, category, box) in enumerate(objects)]}
    coco.createIndex()
    return coco


def result(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


# ---- AP by hand ------------------------------------------------------------------------------------------------------

def test_ap_of_one_hit_above_one_false_alarm_and_below_it():
    gt = truth([(1, 7, [10, 10, 50, 50])])
    hit, alarm = [10, 10, 50, 50], [70, 70, 20, 20]
    assert evaluation.score(gt, [result(1, 7, hit, 0.9), result(1, 7, alarm, 0.1)])["AP"] == pytest.approx(1)
    assert evaluation.score(gt, [result(1, 7, hit, 0.1), result(1, 7, alarm, 0.9)])["AP"] == pytest.approx(0.5)


def test_ap_averages_ten_thresholds_so_an_iou_of_0_62_passes_three():
    gt = truth([(1, 7, [0, 0, 100, 50])])
    figures = evaluation.score(gt, [result(1, 7, [0, 0, 62, 50], 0.9)])     # IoU 0.62: passes 0.5, 0.55 and 0.6
    assert figures["AP"] == pytest.approx(0.3)
    assert (figures["AP50"], figures["AP75"]) == (pytest.approx(1), 0)


def test_ap_with_half_the_objects_found_follows_the_101_recall_points():
    gt = truth([(1, 7, [0, 0, 20, 20]), (1, 7, [60, 60, 20, 20])])
    figures = evaluation.score(gt, [result(1, 7, [0, 0, 20, 20], 0.9)])
    assert figures["AP"] == pytest.approx(51 / 101)                          # recalls 0, 0.01, ..., 0.50
    assert figures["AR100"] == pytest.approx(0.5)


def test_size_bands_without_objects_are_minus_one_and_shown_as_a_dash():
    gt = truth([(1, 7, [0, 0, 20, 20])])
    metrics = {"bbox": evaluation.score(gt, [result(1, 7, [0, 0, 20, 20], 1.0)])}
    assert metrics["bbox"]["APs"] == pytest.approx(1) and metrics["bbox"]["APm"] == metrics["bbox"]["APl"] == -1
    assert evaluation.table(metrics).splitlines()[1].split() == ["bbox"] + ["1.000"] * 4 + ["-", "-"] + ["1.000"] * 3


def test_the_figures_are_those_of_pycocotools_summarize():
    from contextlib import redirect_stdout
    from io import StringIO

    from pycocotools.cocoeval import COCOeval
    rng = np.random.default_rng(0)
    boxes = [[*rng.uniform(0, 100, 2), *rng.uniform(5, 140, 2)] for _ in range(60)]
    gt = truth([(1 + i % 3, (7, 9)[i % 2], box) for i, box in enumerate(boxes)], [(240, 240)] * 3, [(7, "a"), (9, "b")])
    rows = [result(1 + i % 3, (7, 9)[i % 2], (np.array(box) + rng.normal(0, 4, 4)).clip(1).tolist(), float(rng.random()))
            for i, box in enumerate(boxes * 2)]
    figures = evaluation.score(gt, rows)
    peer = COCOeval(gt, gt.loadRes([dict(row) for row in rows]), "bbox")
    with redirect_stdout(StringIO()):
        peer.evaluate(), peer.accumulate(), peer.summarize()
    names = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
    assert [figures[name] for name in names] == pytest.approx(peer.stats.tolist(), abs=1e-12)


def test_per_class_figures_carry_the_names_of_the_json_and_count_objects_without_crowds():
    gt = truth([(1, 3, [0, 0, 20, 20]), (1, 9, [50, 50, 20, 20]), (1, 9, [70, 0, 20, 20])], categories=[(3, "dog"), (9, "owl")])
    gt.dataset["annotations"][2]["iscrowd"] = 1
    per_class = evaluation.score(gt, [result(1, 3, [0, 0, 20, 20], 1.0)])["per_class"]
    assert per_class == {"dog": {"AP": pytest.approx(1), "AP50": pytest.approx(1), "objects": 1},
                         "owl": {"AP": 0, "AP50": 0, "objects": 1}}


def test_max_dets_is_a_limit_per_image_and_class_and_renames_the_recall():
    objects = [(1, 7, [10 * i, 0, 8, 8]) for i in range(6)]
    gt = truth(objects)
    rows = [result(1, 7, box, 1 - i / 10) for i, (_, _, box) in enumerate(objects)]
    assert evaluation.score(gt, rows, max_dets=3)["AR3"] == pytest.approx(0.5)
    assert evaluation.score(gt, rows, max_dets=300)["AR300"] == pytest.approx(1)
    assert "AR10" not in evaluation.score(gt, rows, max_dets=3)


def test_no_detection_at_all_scores_zero_and_no_object_at_all_scores_minus_one():
    assert evaluation.score(truth([(1, 7, [0, 0, 20, 20])]), [])["AP"] == 0
    assert evaluation.score(truth([]), [result(1, 7, [0, 0, 20, 20], 0.5)])["AP"] == -1
    assert evaluation.score(truth([], sizes=((5, 5), (5, 5))), [])["AP"] == -1


def test_results_of_another_data_set_are_refused_by_id():
    gt = truth([(1, 7, [0, 0, 20, 20])])
    with pytest.raises(ValueError, match=r"category_id.*\[8\]"):
        evaluation.score(gt, [result(1, 8, [0, 0, 20, 20], 0.5)])
    with pytest.raises(ValueError, match=r"image_id.*\[2\]"):
        evaluation.score(gt, [result(2, 7, [0, 0, 20, 20], 0.5)])


def test_scoring_prints_nothing_and_changes_no_result(capfd):
    rows = [result(1, 7, [0, 0, 20, 20], 0.5)]
    evaluation.score(truth([(1, 7, [0, 0, 20, 20])]), rows)
    capfd.readouterr()
    gt, before = truth([(1, 7, [0, 0, 20, 20])]), json.dumps(rows)
    capfd.readouterr()
    evaluation.score(gt, rows)
    assert capfd.readouterr().out == "" and json.dumps(rows) == before


# ---- from detections to results --------------------------------------------------------------------------------------

def detection(boxes, labels=None, scores=None, **more):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64) if labels is None else torch.tensor(labels),
            "scores": torch.linspace(1, 0.5, len(boxes)) if scores is None else torch.tensor(scores), **more}


def test_results_hold_xywh_boxes_and_the_sparse_ids_of_the_json():
    rows = evaluation.coco_results([detection([[10, 20, 40, 60]], [1], [0.75]), detection([])], [42, 43], [3, 90])
    assert rows == [{"image_id": 42, "category_id": 90, "bbox": [10, 20, 30, 40], "score": 0.75}]
    json.dumps(rows)


def test_masks_become_compressed_text_and_come_back_as_they_were():
    from pycocotools import mask as rle
    masks = torch.rand(3, 13, 7, generator=torch.Generator().manual_seed(0)) > 0.5
    rows = evaluation.coco_results([detection([[0, 0, 1, 1]] * 3, masks=masks)], [1], [1])
    decoded = np.stack([rle.decode(json.loads(json.dumps(row["segmentation"]))) for row in rows])
    assert (decoded == masks.numpy()).all()
    again = evaluation.encode_masks([row["segmentation"] for row in rows])
    assert again == [row["segmentation"] for row in rows]
    assert evaluation.encode_masks(torch.zeros(0, 13, 7, dtype=torch.bool)) == []


def test_the_area_of_a_mask_result_is_the_masks_not_the_boxs():
    mask = torch.zeros(1, 100, 100, dtype=torch.bool)
    mask[0, :40, :20] = True                               # 800 px: small; its box is given as 100 x 100: large
    rows = evaluation.coco_results([detection([[0, 0, 100, 100]], masks=mask)], [1], [7])
    coco = evaluation._results_as_coco(truth([]), rows, "segm")
    assert [row["area"] for row in coco.dataset["annotations"]] == [800]


# ---- perfect predictions ---------------------------------------------------------------------------------------------

class Perfect(torch.nn.Module):
    """A detector that answers with the ground truth. Its outputs tell `detect` which images they are of."""

    def __init__(self, dataset):
        super().__init__()
        self.dataset, self.next = dataset, 0

    def forward(self, images, padding):
        first, self.next = self.next, self.next + len(images)
        return {"images": range(first, self.next)}

    def detect(self, outputs, sizes, top_k):
        found = []
        for index, (h, w) in zip(outputs["images"], sizes.tolist()):
            rows = [row for row in self.dataset.coco().imgToAnns[int(self.dataset.image_ids[index])] if not row["iscrowd"]]
            corners = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).reshape(-1, 4)
            corners[:, 2:] += corners[:, :2]
            labels = [self.dataset.category_ids.index(row["category_id"]) for row in rows]
            masks = {}
            if self.dataset.has_masks:
                decoded = [data.decode_mask(row["segmentation"], h, w) for row in rows]
                masks["masks"] = torch.from_numpy(np.stack(decoded)).bool() if rows else torch.zeros(0, h, w, dtype=torch.bool)
            found.append({key: value[:top_k] for key, value in
                          {**detection(corners.tolist(), labels, [1.0] * len(rows)), **masks}.items()})
        return found


class Light(data.DetectionData):
    """The annotations of a data set without the work of decoding its pictures."""

    def __init__(self, dataset):
        self.__dict__.update(dataset.__dict__)
        self.source, self.truth = dataset, dataset.coco()

    def coco(self):
        return self.truth

    def __getitem__(self, index):
        h, w = self.source.image_size(index)
        return torch.zeros(3, 8, 8), {"image_id": int(self.image_ids[index]), "orig_size": torch.tensor([h, w])}


@pytest.mark.parametrize("name, default", [("bccd", 0.9966), ("nuclei", 0.970), ("coco_mini", 1.0)])
def test_perfect_predictions_score_one_through_our_results_path(shared, name, default):
    dataset = Light(data.CocoFolder(shared / "data" / name, "val"))
    cfg = type("Config", (), {"top_k": 100})
    model = Perfect(dataset)
    metrics = evaluation.evaluate(model, model.detect, dataset, cfg, "cpu", batch_size=4, max_dets=500)
    assert metrics["bbox"]["AP"] == pytest.approx(1, abs=1e-9) and metrics["bbox"]["AR500"] == pytest.approx(1)
    assert ("segm" in metrics) == (name != "bccd")
    if "segm" in metrics:
        assert metrics["segm"]["AP"] == pytest.approx(1, abs=1e-9)
    # pycocotools' own limit of 100 cuts nuclei; bccd's zero-size box is gone from our ground truth, so 0.9966 is not met
    model = Perfect(dataset)
    figures = evaluation.evaluate(model, model.detect, dataset, cfg, "cpu", batch_size=4)
    for kind in metrics.keys() & {"bbox", "segm"}:
        assert figures[kind]["AP"] == pytest.approx(1 if name == "bccd" else default, abs=6e-4)


@pytest.mark.parametrize("name, expected", [("bccd", 0.9966), ("nuclei", 0.970), ("coco_mini", 1.0)])
def test_against_the_json_as_it_is_perfect_predictions_score_what_pycocotools_says(shared, name, expected, capfd):
    gt = COCO(str(shared / "data" / name / "annotations" / "instances_val2017.json"))
    rows = [{**result(row["image_id"], row["category_id"], row["bbox"], 1.0)} for row in gt.dataset["annotations"]
            if not row["iscrowd"]]
    assert evaluation.score(gt, rows)["AP"] == pytest.approx(expected, abs=6e-4)
