"""eval.py: hand-made AP cases, perfect predictions on real data, the way from a detection to the results json, ATD."""
import dataclasses
import importlib
import json
import multiprocessing
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from engine.recipe import Recipe, configure
from engine import checkpoints
from engine import class_rows
from engine import models
import data
import scenes
import eval as evaluation
import analysis
from engine import datasets
from engine import inference
from engine import machine


@dataclasses.dataclass
class Config:
    """All that `evaluate` asks of one."""
    top_k: int = 100


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


def test_a_second_detection_of_the_same_object_is_a_false_alarm():
    first, second = [0, 0, 20, 20], [60, 60, 20, 20]
    gt = truth([(1, 7, first), (1, 7, second)])
    rows = [result(1, 7, first, 0.9), result(1, 7, first, 0.8), result(1, 7, second, 0.7)]
    assert evaluation.score(gt, rows)["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)


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

    def forward(self, images, padding, targets=None):
        first, self.next = self.next, self.next + len(images)
        return {"images": range(first, self.next)}

    def detect(self, outputs, sizes, cfg):
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
            found.append({key: value[:cfg.top_k] for key, value in
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


@pytest.mark.parametrize("name", ["bccd", "nuclei", "coco_mini"])
def test_perfect_predictions_score_one_through_our_results_path(shared, name):
    dataset = Light(data.CocoFolder(shared / "data" / name, "val"))
    cfg = Config()
    model = Perfect(dataset)
    metrics = evaluation.evaluate(model, model.detect, dataset, cfg, "cpu", batch_size=4, max_dets=500)
    assert metrics["bbox"]["AP"] == pytest.approx(1, abs=1e-9) and metrics["bbox"]["AR500"] == pytest.approx(1)
    assert ("segm" in metrics) == (name != "bccd")
    if "segm" in metrics:
        assert metrics["segm"]["AP"] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("name, expected", [("bccd", 0.9966), ("nuclei", 0.970), ("coco_mini", 1.0)])
def test_against_the_json_as_it_is_perfect_predictions_score_what_pycocotools_says(shared, name, expected):
    gt = COCO(str(shared / "data" / name / "annotations" / "instances_val2017.json"))
    rows = [row for row in gt.dataset["annotations"] if not row["iscrowd"]]
    results = [result(row["image_id"], row["category_id"], row["bbox"], 1.0) for row in rows]
    assert evaluation.score(gt, results)["AP"] == pytest.approx(expected, abs=6e-4)
    if name != "bccd":
        results = [{**r, "segmentation": evaluation.encode_masks([gt.annToRLE(row)])[0]} for r, row in zip(results, rows)]
        assert evaluation.score(gt, results, "segm")["AP"] == pytest.approx(expected, abs=6e-4)


def make_scenes(n, **options):
    """n generated scenes; some of the first 16 hold nothing."""
    return scenes.Shapes("val", n, transform=data.Transform(sizes=(64,)), **options)


def test_images_without_objects_and_a_model_without_detections_are_evaluated():
    dataset = make_scenes(16)
    empty = dataset.take([i for i in range(16) if not len(dataset.objects(i).labels)])
    assert len(empty) >= 1
    model = Perfect(empty)
    metrics = evaluation.evaluate(model, model.detect, empty, Config(), "cpu", batch_size=2)
    assert metrics["bbox"]["AP"] == -1 and metrics["images"] == len(empty)
    nothing = lambda outputs, sizes, cfg: [detection([]) for _ in sizes]
    metrics = evaluation.evaluate(Perfect(dataset), nothing, dataset, Config(), "cpu")
    assert metrics["bbox"]["AP"] == 0


def test_each_process_runs_its_share_and_all_score_everything(monkeypatch):
    dataset, cfg = make_scenes(9), Config()
    whole = evaluation.evaluate(Perfect(dataset), Perfect(dataset).detect, dataset, cfg, "cpu")
    shares = []

    class Strided(Perfect):
        def forward(self, images, padding, targets=None):
            first, self.next = self.next, self.next + 2 * len(images)
            return {"images": range(first, self.next, 2)}

    def gather(into, results):
        shares.append(results)
        into[:] = shares if len(shares) == 2 else [results, []]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for rank in range(2):
        model = Strided(dataset)
        model.next = rank
        metrics = evaluation.evaluate(model, model.detect, dataset, cfg, "cpu", batch_size=2, rank=rank, world=2)
    assert metrics["bbox"] == whole["bbox"] and metrics["bbox"]["AP"] == pytest.approx(1)
    assert {row["image_id"] for row in shares[0]}.isdisjoint(row["image_id"] for row in shares[1])


def test_evaluation_leaves_the_models_mode_as_it_was():
    dataset = make_scenes(2)
    for mode in (True, False):
        model = Perfect(dataset).train(mode)
        evaluation.evaluate(model, model.detect, dataset, Config(), "cpu")
        assert model.training == mode


# ---- ATD -------------------------------------------------------------------------------------------------------------

def test_atd_is_the_mean_of_the_k_largest_distances():
    distances = torch.tensor([0.1, 0.5, 0.2, 0.4])
    assert analysis.atd(distances, 2) == pytest.approx(0.45)
    assert analysis.atd(distances, 100) == pytest.approx(0.3)
    assert analysis.atd(torch.zeros(0), 100) == -1


def test_atd_by_hand_for_anchors_that_are_boxes_and_points():
    class Fixed(torch.nn.Module):
        """Three queries; objects 0 and 1 are matched to queries 2 and 0."""
        def __init__(self, coordinates):
            super().__init__()
            anchors = [[0.2, 0.2, 0.1, 0.1], [0.9, 0.9, 0.9, 0.9], [0.5, 0.6, 0.3, 0.3]]
            self.anchors = torch.tensor(anchors)[:, :coordinates]

        def forward(self, images, padding, targets=None):
            return {"anchors": self.anchors[None]}

        def match(self, outputs, targets):
            return [(torch.tensor([2, 0]), torch.tensor([0, 1]))]

    class One(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.2, 0.3, 0.1, 0.15]])    # 80 x 40 px and 20 x 15 px: small
            return torch.zeros(3, 8, 8), {"boxes": boxes, "labels": torch.tensor([0, 0]), "orig_size": torch.tensor([100, 200])}

    model = Fixed(4)
    figures = analysis.analyze(model, model, One(), "cpu", k=1)
    assert figures["ATD"] == pytest.approx(0.3)           # |.5-.5| + |.6-.5| + |.3-.4| + |.3-.4|
    assert figures["ATD_small"] == pytest.approx(0.15)    # |.2-.2| + |.2-.3| + |.1-.1| + |.1-.15|
    assert (figures["objects"], figures["small_objects"], figures["coordinates"]) == (2, 1, "xywh")
    points = analysis.analyze(Fixed(2), model, One(), "cpu", k=2)
    assert points["ATD"] == pytest.approx(0.1) and points["coordinates"] == "xy"   # both centres are 0.1 away
    table = analysis.analysis_table({"box": figures, "point": points})
    assert re.search(r"ATD\(1\) +0.3000 +0.1000\n", table) and "point: |x| + |y| of anchors that are points" in table
    assert "points" not in analysis.analysis_table({"box": figures}) and "IoF-IoB enc" not in table


# ---- command line ----------------------------------------------------------------------------------------------------

def write_checkpoint(path, name="dino", class_names=scenes.SCENE_CLASSES, **run):
    """A tiny random model of a paper file, saved as train.py would."""
    torch.manual_seed(0)
    paper = importlib.import_module(name)
    cfg, recipe = configure(paper, paper.SMALL, dict(dim=32, num_heads=2, ffn_dim=32, num_queries=12, decoder_layers=2,
                                                     train_sizes=(64,), eval_size=64))
    model, _ = paper.build(cfg, len(class_names))
    checkpoints.save(path, {
        "format": 2, "model_name": name, "variant": "", "config": dataclasses.asdict(cfg),
        "recipe": dataclasses.asdict(recipe), "model": model.state_dict(),
        "class_names": list(class_names), "category_ids": list(range(1, len(class_names) + 1)), "epoch": 1, "step": 5,
        "run": {"data": "", "seed": 0, "overfit": 0, "num_val": 6} | run})
    return path


def two_checkpoints(folder):
    """A Co-DETR and a DINO in folders of these names."""
    for name in ("co_detr", "dino"):
        (folder / name).mkdir()
        yield write_checkpoint(folder / name / "best.pt", name)


@pytest.fixture(scope="module", params=["dino", "deformable_detr"])
def checkpoint(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp(request.param) / "best.pt", request.param)


def test_a_checkpoint_alone_gives_the_table_the_json_and_atd(checkpoint, capsys):
    evaluation.main(["--checkpoint", str(checkpoint), "--analyze", "--max-dets", "20", "--batch_size", "3"])
    printed = capsys.readouterr().out
    assert "crescent" in printed and "AR20" in printed and "ATD(100) small" in printed
    record = json.loads((checkpoint.parent / "eval.json").read_text())
    assert record["images"] == 6 and record["bbox"]["max_dets"] == 20 and record["step"] == 5
    assert record["analysis"]["coordinates"] == ("xywh" if "dino" in str(checkpoint) else "xy")


def test_images_of_any_size_are_drawn_and_listed_and_broken_ones_named(checkpoint, tmp_path, capsys):
    sizes = {"7.png": (16, 16), "12.png": (1, 800), "40.jpg": (90, 60), "3.png": (800, 1)}
    for name, size in sizes.items():
        Image.new("RGB", size, (200, 40, 40)).save(tmp_path / name)
    (tmp_path / "5.jpg").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("ignored")
    out = tmp_path / "out"
    evaluation.main(["--checkpoint", str(checkpoint), "--images", str(tmp_path), str(tmp_path / "*.jpg"), "--out", str(out),
                     "--score_threshold", "0"])
    captured = capsys.readouterr()
    assert "4 of 5 images" in captured.out and "5.jpg" in captured.err
    assert {path.name for path in out.glob("*.jpg")} == {"7.jpg", "12.jpg", "40.jpg", "3.jpg"}
    rows = json.loads((out / "detections.json").read_text())
    assert {(row["image_id"], row["file_name"]) for row in rows} == {(int(name.split(".")[0]), name) for name in sizes}
    assert all(1 <= row["category_id"] <= 8 for row in rows)


def test_boxes_come_back_in_pixels_of_a_picture_that_is_not_square():
    detector = importlib.import_module("deformable_detr")
    outputs = {"pred_logits": torch.tensor([[[3.0, -3.0]]]), "pred_boxes": torch.tensor([[[0.5, 0.5, 1.0, 0.5]]])}
    cfg, recipe = detector.Config(top_k=1), Recipe(eval_size=30, max_size=60)
    det = inference.detect_image(lambda images, padding: outputs, detector.detect, Image.new("RGB", (90, 60)), cfg, recipe, "cpu")
    assert det["boxes"].tolist() == [[0, 15, 90, 45]] and det["labels"].tolist() == [0]


def test_names_that_are_no_numbers_count_from_one(tmp_path):
    paths = [tmp_path / name for name in ("a.jpg", "7.jpg", "b.jpg")]
    assert evaluation.image_ids(paths) == [1, 2, 3]
    assert evaluation.image_ids([tmp_path / "000000000139.jpg", tmp_path / "7.jpg"]) == [139, 7]
    assert evaluation.image_ids([tmp_path / "1.jpg", tmp_path / "01.jpg"]) == [1, 2]


def test_paths_that_match_nothing_are_an_error_that_names_them(tmp_path, checkpoint):
    with pytest.raises(SystemExit, match="nowhere"):
        evaluation.main(["--checkpoint", str(checkpoint), "--images", str(tmp_path / "nowhere")])


def test_data_of_other_classes_is_an_error_that_lists_both(shared, checkpoint):
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(["--checkpoint", str(checkpoint), "--data", str(shared / "data" / "bccd")])
    assert all(name in str(stopped.value) for name in ("circle", "heart", "RBC", "Platelets"))


def test_released_heads_lose_their_unused_columns_when_the_data_has_coco_classes(tmp_path):
    path = write_checkpoint(tmp_path / "released.pt", class_names=class_rows.coco_columns())
    model, paper, cfg, _, meta, _ = models.load_model(path)
    dataset = type("Coco", (), {"class_names": class_rows.COCO_NAMES, "name": "coco"})
    fitted = class_rows.fit_classes(model, paper, cfg, meta, dataset)
    before, after = (m.class_embed[0].weight for m in (model, fitted))
    assert after.shape[0] == 80 and torch.equal(after, before[class_rows.COCO_IDS])


def test_released_weights_without_data_ask_for_it():
    with pytest.raises(ValueError, match="--data"):
        datasets.validation_set(None, models.Loaded(None, None, None, None, {}, None))


def test_hyphens_and_underscores_are_the_same_and_abbreviations_are_refused(capsys):
    read = evaluation.parser().parse_args
    assert read(["--checkpoint", "a-b.pt", "--score-threshold=0.5"]) == read(["--checkpoint", "a-b.pt", "--score_threshold", "0.5"])
    with pytest.raises(SystemExit):
        read(["--checkpoint", "x", "--score", "0.5"])
    assert re.search("unknown flag --score", capsys.readouterr().err)


# ---- Co-DETR, section 3.4 --------------------------------------------------------------------------------------------

def memory_of(tokens, shapes, padding=None):
    """A Memory of B images from tokens (B, S, C)."""
    from deformable_detr import Memory
    padding = torch.zeros(tokens.shape[:2], dtype=torch.bool) if padding is None else padding
    return Memory(tokens, None, padding, shapes, None, [], torch.tensor([[2, 2]]), (2, 2))


def test_discriminability_is_the_mean_of_normalised_norms():
    fine = torch.tensor([[0.0, 3.0], [4.0, 1.0]]).flatten()[None, :, None] * torch.tensor([0.6, 0.8])   # norms 0 3 4 1
    coarse = torch.tensor([[[3.0, 4.0]]])
    memory = memory_of(torch.cat((fine, coarse), 1), [(2, 2), (1, 1)], torch.tensor([[False] * 3 + [True, False]]))
    expected = (torch.tensor([[0.0, 0.75], [1.0, 0.0]]) + 1) / 2
    assert torch.allclose(analysis.discriminability(analysis.encoder_norms(memory), memory)[0], expected)


def test_iof_iob_by_hand():
    """A row of four pixels; the object covers the last two."""
    scores = torch.tensor([[0.1, 0.6, 0.55, 0.9]])
    counts = analysis.score_counts(scores, torch.tensor([[0.75, 0.5, 0.5, 1.0]]), (1, 4))
    curve = analysis.iof_iob(counts)
    assert (curve["IoB"][0], curve["IoB"][75], curve["IoB"][-1]) == pytest.approx((0, 0.75, 1))
    assert (curve["IoF"][25], curve["IoF"][75]) == pytest.approx((1, 0.5))   # below 0.55; between 0.55 and 0.6 half is gone
    assert curve["area"] == pytest.approx(3 / 4)   # of four pairs, one is the wrong way round
    assert not analysis.score_counts(scores, torch.zeros(0, 4), (1, 3))[1].any()


@pytest.mark.skipif(sys.platform != "linux", reason="pages are counted as Linux does")
def test_the_cpu_settings_keep_float32_sums_and_the_pages_of_large_tensors():
    """In a process of its own: they hold for all of it. Half precision would be off by 1e-3."""
    def program():
        import resource
        torch.set_num_threads(1)   # those of the process it was forked from are not here
        machine.prepare_cpu()
        x, w = torch.randn(500, 256), torch.randn(128, 256)
        exact = x.double() @ w.double().T
        assert ((torch.nn.functional.linear(x, w) - exact).abs().max() / exact.abs().max()) < 5e-6
        faults = []
        for _ in range(4):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.empty(1 << 24).fill_(1)      # 16384 pages
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        assert faults[-1] < 1000, faults

    process = multiprocessing.get_context("fork").Process(target=program)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_attention_is_spread_over_the_four_tokens_around_a_point():
    """Levels of 2 x 4 and 1 x 1 tokens. A look between the first two tokens of the second row, a quarter of the way; one at a
    token that is padding; one at the single token of level 2."""
    memory = memory_of(torch.zeros(1, 9, 8), [(2, 4), (1, 1)], torch.arange(9)[None] == 7)
    places = torch.tensor([[[0.75 / 4, 0.75]], [[0.5, 0.5]]]).view(1, 1, 1, 2, 1, 2)              # (B, Nq, M, L, K, 2)
    looks = [{"locations": places, "weights": torch.tensor([0.6, 0.4]).view(1, 1, 1, 2, 1)},
             {"locations": torch.tensor([3.5 / 4, 0.75, 0.5, 0.5]).view(1, 1, 1, 2, 1, 2),
              "weights": torch.ones(1, 1, 1, 2, 1)}]
    found = analysis.decoder_attention(memory, looks)
    assert torch.allclose(found, torch.tensor([[0, 0, 0, 0, 0.45, 0.15, 0, 0, 1.4]]), atol=1e-6)


def test_grad_cam_by_hand_level_by_level():
    """Two levels of two tokens and of one, two channels; the mean gradient weighs the channels of each level."""
    memory = memory_of(torch.tensor([[[1.0, 2], [3, -5], [4, 1]]]), [(1, 2), (1, 1)])
    gradient = torch.tensor([[[1.0, 1], [3, 1], [0, 2]]])                                        # means (2, 1) and (0, 2)
    assert torch.allclose(analysis.grad_cam(memory, gradient), torch.tensor([[4.0, 1, 2]]) / 7, atol=1e-6)
    assert torch.allclose(analysis.grad_cam(memory, -gradient), torch.ones(1, 3) / 3)          # nothing speaks for it


def test_conflict_is_the_divergence_of_grad_cam_maps():
    class Heads(torch.nn.Module):
        """The first head is sure of channel 0, the second of channel 1."""
        def confidences(self, memory):
            return {"detr": memory.tokens[..., 0].sum(), "atss": memory.tokens[..., 1].sum()}

    memory = memory_of(torch.tensor([[[3.0, 1], [1, 3]], [[2.0, 2], [1, 1]]]), [(1, 2)])
    heads, S = analysis.head_divergences(Heads(), memory)
    expected = 0.75 * np.log(0.75 / 0.25) + 0.25 * np.log(0.25 / 0.75)
    expected = torch.tensor([[[0, expected], [expected, 0]], [[0.0, 0], [0, 0]]]).float()
    assert heads == ["detr", "atss"] and torch.allclose(S, expected, atol=1e-6)
    S = torch.tensor([[0.0, 1, 2], [3, 0, 4], [5, 6, 0]])
    assert analysis.conflict(list("abc"), S)["average"] == pytest.approx([11 / 4, 14 / 4, 17 / 4])


def test_checkpoints_are_analysed_side_by_side(tmp_path, capsys):
    """A Co-DETR with two heads beside a DINO: curves of encoder and decoder, conflicts of the first alone."""
    first, second = two_checkpoints(tmp_path)
    evaluation.main(["--checkpoint", str(first), "--batch_size", "3", "--analyze", str(second), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert re.search(r"co_detr +dino\n", printed) and re.search(r"IoF-IoB decoder +0\.\d+ +0\.\d+", printed)
    assert re.search(r"conflict of heads +\d+\.\d+ +-\n", printed) and re.search(r"detr +rcnn +atss +average", printed)
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert list(found) == ["co_detr", "dino"] and found["dino"]["checkpoint"] == str(second)
    S = np.array(found["co_detr"]["conflict"]["S"])
    assert S.shape == (3, 3) and (np.diag(S) == 0).all() and (S[~np.eye(3, dtype=bool)] > 0).all()
    for part in ("encoder", "decoder"):
        curve = found["dino"][part]
        assert len(curve["IoF"]) == 101 and 0 < curve["area"] < 1 and (np.diff(curve["IoF"]) <= 1e-6).all()


def test_matchings_of_images_with_different_numbers_of_queries_fill_one_table(monkeypatch):
    batches = [({"pred_logits": torch.zeros(1, n, 2)}, [{"labels": torch.zeros(1, dtype=torch.int64)}]) for n in (4, 2)]
    monkeypatch.setattr(analysis, "predict", lambda *args, **kwargs: iter(batches))
    criterion = type("Criterion", (), {"match": lambda self, outputs, targets: [(torch.tensor([1]), torch.tensor([0]))]})()
    assert analysis.assignments(None, criterion, range(2), "cpu").tolist() == [[-1, 0, -1, -1], [-1, 0, -1, -1]]
