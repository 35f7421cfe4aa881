"""eval.py: perfect predictions on real data, processes that share the data, the way from a
detection to the results json, the command, and what users get wrong."""
import csv
import json
import math
import multiprocessing
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from small_runs import forked
from test_scoring import result, truth
from tiny_checkpoint import damage, write_checkpoint

import data
import dino
import eval as evaluation
import scenes
import train
from engine import checkpoints, class_rows, datasets, machine, models, scoring
from engine.commands import open_detector
from engine.errors import UserError


# ---- thresholds --------------------------------------------------------------------------------

def test_the_thresholds_of_a_checkpoint_are_used_unless_one_is_given():
    meta = {"class_names": ["cat", "dog"], "thresholds": {"dog": 0.6}}
    assert evaluation.class_thresholds(meta, None) == [0.3, 0.6]
    assert evaluation.class_thresholds(meta, 0.0) == [0.0, 0.0]
    assert evaluation.class_thresholds({"class_names": ["cat"]}, None) == [0.3]


def test_training_stores_the_thresholds_of_its_best_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(train.visualize, "predictions", lambda *args, **kwargs: None)
    monkeypatch.setattr(train.visualize, "curves", lambda *args, **kwargs: None)
    monkeypatch.setattr(train, "thresholds", lambda record: {"circle": record["bbox"]["AP"]})
    train.main(["--model", "dino", "--num_train", "8", "--num_val", "4", "--epochs", "1",
                "--dim", "32", "--ffn_dim", "32", "--num_heads", "2", "--train_sizes", "64",
                "--eval_size", "64", "--num_queries", "12", "--threads", "1", "--workers", "0",
                "--device", "cpu", "--out", str(tmp_path / "run")])
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    loaded = open_detector(tmp_path / "run")
    assert loaded.meta["thresholds"] == {"circle": line["bbox"]["AP"]}


def test_each_class_is_listed_from_its_own_threshold_on(checkpoint, tmp_path, capsys):
    scenes.Shapes("val", 3).image(1).save(tmp_path / "a.png")
    words = ("--images", tmp_path / "a.png", "--out", tmp_path / "out")
    evaluate_checkpoint(checkpoint, *words)
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    best = {}
    for row in rows:
        best.setdefault(row["category_name"], row["score"])
    state = checkpoints.load(checkpoint)
    name = rows[0]["category_name"]
    others = dict.fromkeys(best, 1.0)
    checkpoints.save(tmp_path / "best.pt", state | {"thresholds": others | {name: best[name]}})
    evaluate_checkpoint(tmp_path, *words)
    lines = read_csv(tmp_path / "out" / "detections.csv")
    assert [line["class"] for line in lines] == [name]
    assert " to 1.00, by class), see " in capsys.readouterr().out


# ---- several processes ---------------------------------------------------------------------------

class Perfect(torch.nn.Module):
    """A detector that answers with the ground truth of its images, moved a little for `noise`.

    Its outputs say which images they are of; `order` is the sequence in which they come."""

    def __init__(self, dataset, noise=0.0, order=None):
        super().__init__()
        self.dataset, self.noise = dataset, noise
        self.order = iter(range(len(dataset)) if order is None else order)

    def forward(self, images, padding, targets=None):
        return {"images": [next(self.order) for _ in images]}

    def detect(self, outputs, sizes, cfg):
        found = []
        annotations = self.dataset.coco().imgToAnns
        for index, (h, w) in zip(outputs["images"], sizes.tolist()):
            rows = annotations[int(self.dataset.image_ids[index])]
            rows = [row for row in rows if not row["iscrowd"]][:cfg.top_k]
            corners = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32)
            corners = corners.reshape(-1, 4)
            corners[:, 2:] += corners[:, :2]
            generator = torch.Generator().manual_seed(index)
            corners += self.noise * torch.randn(corners.shape, generator=generator)
            labels = [self.dataset.category_ids.index(row["category_id"]) for row in rows]
            scores = (10 * torch.rand(len(rows), generator=generator)).ceil() / 10
            more = {}
            if self.dataset.has_masks:
                masks = [data.decode_mask(row["segmentation"], h, w) for row in rows]
                masks = np.stack(masks) if rows else np.zeros((0, h, w))
                more = {"masks": torch.from_numpy(masks).bool()}
            found.append(detection(corners.tolist(), labels, scores.tolist(), **more))
        return found


CONFIG = dino.Config(top_k=100)


def make_scenes(n, **options):
    """n generated scenes; some of the first 16 hold nothing."""
    return scenes.Shapes("val", n, transform=data.Transform(sizes=(64,)), **options)


def join(rank, world):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)


@pytest.mark.parametrize("world, images", [(2, 5), (3, 2)])
def test_ranks_that_evaluate_their_own_images_agree_with_one_process(tmp_path, world, images):
    """5 images on 2 ranks: uneven. 2 images on 3 ranks: the last rank has none."""
    dataset = make_scenes(images, load_masks=True)
    model = Perfect(dataset, noise=3.0)
    alone = evaluation.evaluate(model, model.detect, dataset, CONFIG, "cpu", batch_size=2)

    def run(rank):
        join(rank, world)
        model = Perfect(dataset, 3.0, range(rank, images, world))
        metrics = evaluation.evaluate(model, model.detect, dataset, CONFIG, "cpu", batch_size=2,
                                      rank=rank, world=world)
        (tmp_path / f"{rank}.json").write_text(json.dumps(metrics))
        assert len(evaluation.ground_truth(dataset, rank, world).imgs) <= -(-images // world)

    assert forked(world, run) == [0] * world
    for rank in range(world):
        metrics = json.loads((tmp_path / f"{rank}.json").read_text())
        for kind in ("bbox", "segm"):
            assert metrics[kind] == alone[kind]
        assert metrics["images"] == images
    assert 0 < alone["bbox"]["AP"] < 1 and 0 < alone["segm"]["AP"]


def test_detections_that_are_not_finite_end_every_rank_and_none_waits():
    dataset = make_scenes(4)

    def run(rank):
        join(rank, 2)
        model = Perfect(dataset, math.nan if rank == 1 else 0.0, range(rank, 4, 2))
        with pytest.raises(UserError, match="finite detections.*of image"):
            evaluation.evaluate(model, model.detect, dataset, CONFIG, "cpu", rank=rank, world=2)

    assert forked(2, run, timeout=60) == [0, 0]


def test_two_processes_write_the_files_of_one(checkpoint, tmp_path):
    """What torchrun starts: each rank calls main, one writes."""
    def run(rank, out):
        torch.set_num_threads(1)
        evaluate_checkpoint(checkpoint, "--out", tmp_path / out, "--save_detections")

    assert forked(1, run, "alone") == [0] and forked(2, run, "both") == [0, 0]
    alone, both = (tmp_path / "alone", tmp_path / "both")
    assert sorted(path.name for path in both.iterdir()) == ["detections.json", "eval.json"]
    figures = [json.loads((out / "eval.json").read_text())["bbox"] for out in (alone, both)]
    assert figures[0] == figures[1]
    rows = [json.loads((out / "detections.json").read_text()) for out in (alone, both)]
    rows = [sorted(map(json.dumps, found)) for found in rows]
    assert rows[0] == rows[1] and len(rows[0]) == 6 * 96


# ---- from detections to results ------------------------------------------------------------------

def detection(boxes, labels=None, scores=None, **more):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = [0] * len(boxes) if labels is None else labels
    scores = torch.linspace(1, 0.5, len(boxes)).tolist() if scores is None else scores
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.tensor(scores), **more}


def test_results_hold_xywh_boxes_and_the_sparse_ids_of_the_json():
    found = [detection([[10, 20, 40, 60]], [1], [0.75]), detection([])]
    rows = evaluation.coco_results(found, [42, 43], [3, 90])
    expected = {"image_id": 42, "category_id": 90, "bbox": [10, 20, 30, 40], "score": 0.75}
    assert rows == [expected]
    json.dumps(rows)


def test_results_of_a_broken_model_are_refused_by_image_id():
    found = detection([[0, 0, 1, 1], [0, 0, math.nan, 1]])
    with pytest.raises(UserError, match="boxes in 1 of 2 detections of image 42"):
        evaluation.coco_results([found], [42], [1])


def test_masks_become_compressed_text_and_come_back_as_they_were():
    masks = torch.rand(3, 13, 7, generator=torch.Generator().manual_seed(0)) > 0.5
    rows = evaluation.coco_results([detection([[0, 0, 1, 1]] * 3, masks=masks)], [1], [1])
    encoded = [row["segmentation"] for row in rows]
    decoded = [rle.decode(mask) for mask in json.loads(json.dumps(encoded))]
    assert (np.stack(decoded) == masks.numpy()).all()
    assert evaluation.encode_masks(encoded) == encoded
    assert evaluation.encode_masks(torch.zeros(0, 13, 7, dtype=torch.bool)) == []


def test_the_area_of_a_mask_result_is_the_masks_not_the_boxs():
    mask = torch.zeros(1, 100, 100, dtype=torch.bool)
    mask[0, :40, :20] = True                 # 800 px: small; its box is given as 100 x 100: large
    rows = evaluation.coco_results([detection([[0, 0, 100, 100]], masks=mask)], [1], [7])
    coco = scoring.results_as_coco(truth([]), rows, "segm")
    assert [row["area"] for row in coco.dataset["annotations"]] == [800]


# ---- perfect predictions -------------------------------------------------------------------------

class Light(data.DetectionData):
    """The annotations of a data set without the work of decoding its images."""

    def __init__(self, dataset):
        self.__dict__.update(dataset.__dict__)
        self.source, self.truth = dataset, dataset.coco()

    def coco(self):
        return self.truth

    def __getitem__(self, index):
        size = torch.tensor(self.source.image_size(index))
        target = {"image_id": int(self.image_ids[index]), "orig_size": size, "canvas_size": size}
        return torch.zeros(3, 8, 8), target


@pytest.mark.parametrize("name", ["bccd", "nuclei", "coco_mini"])
def test_perfect_predictions_score_one_through_our_results_path(shared, name):
    dataset = Light(data.CocoFolder(shared / "data" / name, "val"))
    model = Perfect(dataset)
    metrics = evaluation.evaluate(model, model.detect, dataset, CONFIG, "cpu", batch_size=4,
                                  max_dets=500)
    assert metrics["bbox"]["AP"] == pytest.approx(1, abs=1e-9)
    assert metrics["bbox"]["AR500"] == pytest.approx(1)
    assert ("segm" in metrics) == (name != "bccd")
    if "segm" in metrics:
        assert metrics["segm"]["AP"] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("name, expected", [("bccd", 0.9966), ("nuclei", 0.970),
                                            ("coco_mini", 1.0)])
def test_against_the_json_as_it_is_perfect_predictions_score_what_pycocotools_says(shared, name,
                                                                                   expected):
    gt = COCO(str(shared / "data" / name / "annotations" / "instances_val2017.json"))
    rows = [row for row in gt.dataset["annotations"] if not row["iscrowd"]]
    results = [result(row["image_id"], row["category_id"], row["bbox"], 1.0) for row in rows]
    assert evaluation.score(gt, results)["AP"] == pytest.approx(expected, abs=6e-4)
    if name != "bccd":
        for found, row in zip(results, rows):
            found["segmentation"] = evaluation.encode_masks([gt.annToRLE(row)])[0]
        assert evaluation.score(gt, results, "segm")["AP"] == pytest.approx(expected, abs=6e-4)


def test_images_without_objects_and_a_model_without_detections_are_evaluated():
    dataset = make_scenes(16)
    empty = dataset.subset([i for i in range(16) if not len(dataset.objects(i).labels)])
    assert len(empty) >= 1
    model = Perfect(empty)
    metrics = evaluation.evaluate(model, model.detect, empty, CONFIG, "cpu", batch_size=2)
    assert metrics["bbox"]["AP"] == -1 and metrics["images"] == len(empty)

    def nothing(outputs, sizes, cfg):
        return [detection([]) for _ in sizes]

    metrics = evaluation.evaluate(Perfect(dataset), nothing, dataset, CONFIG, "cpu")
    assert metrics["bbox"]["AP"] == 0


# ---- command line --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("dino") / "best.pt")


def evaluate_checkpoint(path, *words):
    evaluation.main(["--checkpoint", str(path), "--device", "cpu", "--workers", "0",
                     *map(str, words)])


@pytest.mark.parametrize("name", ["dino", "deformable_detr"])
def test_a_run_folder_alone_gives_the_table_and_the_json(name, tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "best.pt", name)
    evaluate_checkpoint(tmp_path, "--max-dets", "20", "--batch_size", "3")
    printed = capsys.readouterr().out
    assert "crescent" in printed and "AR20" in printed
    record = json.loads((checkpoint.parent / "eval.json").read_text())
    assert record["images"] == 6 and record["bbox"]["max_dets"] == 20 and record["step"] == 5


def test_images_of_any_size_are_drawn_and_listed_and_broken_ones_named(checkpoint, tmp_path,
                                                                       capsys):
    sizes = {"7.png": (16, 16), "12.png": (1, 800), "40.jpg": (90, 60), "3.png": (800, 1)}
    for name, size in sizes.items():
        Image.new("RGB", size, (200, 40, 40)).save(tmp_path / name)
    (tmp_path / "5.jpg").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("ignored")
    out = tmp_path / "out"
    evaluate_checkpoint(checkpoint, "--images", tmp_path, tmp_path / "*.jpg", "--out", out,
                        "--score_threshold", "0")
    captured = capsys.readouterr()
    assert "4 of 5 images" in captured.out and "5.jpg" in captured.err
    pictures = {path.name for path in out.glob("*.jpg")}
    assert pictures == {"7.jpg", "12.jpg", "40.jpg", "3.jpg"}
    rows = json.loads((out / "detections.json").read_text())
    ids = {(row["image_id"], row["file_name"]) for row in rows}
    assert ids == {(int(name.split(".")[0]), name) for name in sizes}
    assert all(1 <= row["category_id"] <= 8 for row in rows)
    assert {row["category_name"] for row in rows} <= set(scenes.SCENE_CLASSES)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_boxes_and_counts_are_tables_that_agree_with_the_json(checkpoint, tmp_path):
    for number in (1, 2):
        scenes.Shapes("val", 3).image(number).save(tmp_path / f"{number}.png")
    out = tmp_path / "out"
    scores = []
    evaluate_checkpoint(checkpoint, "--images", tmp_path, "--out", out, "--score_threshold", "0")
    scores = [row["score"] for row in json.loads((out / "detections.json").read_text())]
    threshold = sorted(scores)[len(scores) // 2]
    evaluate_checkpoint(checkpoint, "--images", tmp_path, "--out", out,
                        "--score_threshold", threshold)
    rows = [row for row in json.loads((out / "detections.json").read_text())
            if row["score"] >= threshold]
    lines = read_csv(out / "detections.csv")
    assert list(lines[0]) == ["file", "class", "score", "x", "y", "w", "h"]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows):
        assert Path(line["file"]).name == row["file_name"]
        assert line["class"] == row["category_name"]
        assert [float(line[key]) for key in "xywh"] == pytest.approx(row["bbox"], abs=0.051)
    for count in read_csv(out / "counts.csv"):
        mine = [line for line in lines if line["file"] == count["file"]]
        assert int(count["all"]) == len(mine)
        for name in scenes.SCENE_CLASSES:
            assert int(count[name]) == sum(line["class"] == name for line in mine)


def test_ids_come_from_the_json_of_the_data_when_it_is_given(checkpoint, tmp_path, capsys):
    """Category ids too, by class name."""
    scenes.Shapes("val", 3).image(1).save(tmp_path / "b.png")
    listing = {"images": [{"id": 77, "file_name": "sub/b.png"}, {"id": 5, "file_name": "a.png"}],
               "categories": [{"id": 100 - i, "name": name}
                              for i, name in enumerate(scenes.SCENE_CLASSES)]}
    (tmp_path / "data.json").write_text(json.dumps(listing))
    words = ("--images", tmp_path / "b.png", "--json", tmp_path / "data.json", "--out",
             tmp_path / "out")
    evaluate_checkpoint(checkpoint, *words)
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    names = {category["id"]: category["name"] for category in listing["categories"]}
    assert {row["image_id"] for row in rows} == {77}
    assert all(names[row["category_id"]] == row["category_name"] for row in rows)

    Image.new("RGB", (9, 9)).save(tmp_path / "c.png")
    with pytest.raises(SystemExit, match="--json.*one entry for .*c.png among the 2.*got 0"):
        evaluate_checkpoint(checkpoint, *words, "--images", tmp_path / "c.png")
    listing["categories"].pop()
    (tmp_path / "data.json").write_text(json.dumps(listing))
    with pytest.raises(SystemExit, match=f"called {scenes.SCENE_CLASSES[-1]}"):
        evaluate_checkpoint(checkpoint, *words)


def test_images_of_one_name_get_the_ids_of_their_folders():
    listed = [{"id": 1, "file_name": "a/x.png"}, {"id": 2, "file_name": "b/x.png"}]
    assert evaluation.image_ids([Path("photos/b/x.png"), Path("photos/a/x.png")], listed) == [2, 1]
    with pytest.raises(UserError, match="one entry for photos/x.png among the 2.*got 0"):
        evaluation.image_ids([Path("photos/x.png")], listed)


def test_released_heads_detect_and_count_without_their_unused_classes(tmp_path):
    path = write_checkpoint(tmp_path / "best.pt", class_names=class_rows.coco_columns())
    state = checkpoints.load(path)
    checkpoints.save(path, state | {"category_ids": list(range(91))})
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    evaluate_checkpoint(path, "--images", tmp_path / "a.png", "--out", tmp_path / "out",
                        "--score_threshold", "0")
    head = list(read_csv(tmp_path / "out" / "counts.csv")[0])
    assert head == ["file", *class_rows.COCO_NAMES, "all"]
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    names = dict(zip(class_rows.COCO_IDS, class_rows.COCO_NAMES))
    assert all(names[row["category_id"]] == row["category_name"] for row in rows)


def test_names_that_are_no_numbers_count_from_one(tmp_path):
    paths = [tmp_path / name for name in ("a.jpg", "7.jpg", "b.jpg")]
    assert evaluation.image_ids(paths) == [1, 2, 3]
    assert evaluation.image_ids([tmp_path / "000000000139.jpg", tmp_path / "7.jpg"]) == [139, 7]
    assert evaluation.image_ids([tmp_path / "1.jpg", tmp_path / "01.jpg"]) == [1, 2]


def test_images_of_one_name_in_two_folders_get_a_picture_each(checkpoint, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / folder / "same.png")
    out = tmp_path / "out"
    evaluate_checkpoint(checkpoint, "--images", tmp_path / "a", tmp_path / "b", "--out", out)
    assert {path.name for path in out.glob("*.jpg")} == {"same.jpg", "same_2.jpg"}


def scenes_folder(root, split="val", annotations=True):
    """Two generated scenes in COCO layout -> the path of the json."""
    dataset = scenes.Shapes("val", 2)
    listing = dataset.coco().dataset
    (root / "annotations").mkdir(parents=True)
    (root / f"{split}2017").mkdir()
    for index, image in enumerate(listing["images"]):
        dataset.image(index).save(root / f"{split}2017" / image["file_name"])
    if not annotations:
        del listing["annotations"]
    path = root / "annotations" / f"any_{split}.json"
    path.write_text(json.dumps(listing))
    return path


def test_a_json_without_annotations_gives_detections_only(checkpoint, tmp_path, capsys):
    path = scenes_folder(tmp_path / "data", "test", annotations=False)
    evaluate_checkpoint(checkpoint, "--json", path, "--out", tmp_path / "out")
    assert "192 detections of 2 images" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["detections.json"]
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {row["image_id"] for row in rows} == {0, 1} and "bbox" in rows[0]


def test_a_json_of_another_name_is_evaluated_and_its_detections_are_saved_on_request(checkpoint,
                                                                                     tmp_path):
    path = scenes_folder(tmp_path / "data")
    evaluate_checkpoint(checkpoint, "--json", path, "--out", tmp_path / "out", "--save-detections")
    record = json.loads((tmp_path / "out" / "eval.json").read_text())
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    gt = COCO(str(path))
    assert record["images"] == 2 and len(rows) == 192
    with redirect_stdout(StringIO()):
        gt.loadRes(rows)
    assert evaluation.score(gt, rows)["AP"] == record["bbox"]["AP"]


def test_masks_are_saved_unless_only_boxes_are_wanted(tmp_path):
    masks = torch.ones(1, 4, 6, dtype=torch.bool)
    found = detection([[0, 0, 6, 4]], masks=masks, mask_scores=torch.tensor([0.5]))
    rows = evaluation.coco_results([found], [1], [1])
    evaluation.write_results(tmp_path / "all.json", rows, False, 0, 1)
    evaluation.write_results(tmp_path / "boxes.json", rows, True, 0, 1)
    assert json.loads((tmp_path / "all.json").read_text()) == rows
    boxes, = json.loads((tmp_path / "boxes.json").read_text())
    assert boxes.keys() == {"image_id", "category_id", "bbox", "score"}


def test_another_size_of_images_is_used_and_said(checkpoint, tmp_path, capsys):
    evaluate_checkpoint(checkpoint, "--eval_size", "96", "--out", tmp_path)
    assert "short side 96 px" in capsys.readouterr().out


def test_data_of_other_classes_is_an_error_that_lists_both(shared, checkpoint):
    with pytest.raises(SystemExit) as stopped:
        evaluate_checkpoint(checkpoint, "--data", shared / "data" / "bccd")
    assert all(name in str(stopped.value) for name in ("circle", "heart", "RBC", "Platelets"))


def test_released_heads_lose_their_unused_columns_when_the_data_has_coco_classes(tmp_path):
    path = write_checkpoint(tmp_path / "released.pt", class_names=class_rows.coco_columns())
    model, paper, cfg, _, meta, _ = models.load_model(path)
    dataset = type("Coco", (), {"class_names": class_rows.COCO_NAMES, "name": "coco"})
    fitted = class_rows.fit_classes(model, paper, cfg, meta, dataset)
    before, after = (m.class_embed[0].weight for m in (model, fitted))
    assert after.shape[0] == 80 and torch.equal(after, before[class_rows.COCO_IDS])


def test_released_weights_without_data_ask_for_it():
    released = models.Loaded(None, None, None, None, {}, None)
    with pytest.raises(UserError, match="--data"):
        datasets.validation_set("", released)


def test_a_checkpoint_that_lost_the_data_of_its_run_asks_for_it():
    damaged = models.Loaded(None, None, None, None, {"run": {"data": "", "seed": 0}}, None)
    with pytest.raises(UserError, match="got none of overfit, num_val: give --data DIR"):
        datasets.validation_set("", damaged)


# ---- what users get wrong ------------------------------------------------------------------------

@pytest.mark.parametrize("words, message", [
    (("--batch_size", "-1"), "--batch_size of at least 1.*got -1"),
    (("--batch_size", "0"), "--batch_size of at least 1.*got 0"),
    (("--max_dets", "-1"), "--max_dets of at least 0.*got -1"),
    (("--workers", "-2"), "--workers.*got -2"),
    (("--eval_size", "-3"), "--eval_size in 1..10000, got -3"),
    (("--eval_size", "1000000"), "--eval_size in 1..10000, got 1000000"),
    (("--checkpoint", ""), "--checkpoint: expected a value, got ''"),
    (("--data=",), "--data: expected a value, got ''"),
    (("--json", " "), "--json: expected a value, got ''"),
    (("--workers", "10000000000"), "--workers in -1..256"),
    (("--tile", "-5"), "--tile of at least 16.*got -5"),
    (("--overlap", "1"), "--overlap in 0..0.9.*got 1.0"),
    (("--score_threshold", "nan"), "--score_threshold.*got nan"),
    (("--score_threshold", "30"), "--score_threshold.*got 30"),
    (("--device", "tpu"), "expected --device cpu, cuda or mps, got 'tpu'"),
    (("--images", ""), "--images.*got ''"),
    (("--images",), "--images.*no path"),
    (("--images", "nowhere"), "nowhere"),
    (("--json", "nowhere.json"), "nowhere.json"),
    (("--data", "nowhere"), "nowhere")])
def test_flags_that_cannot_work_end_in_one_line_and_write_nothing(checkpoint, tmp_path, monkeypatch,
                                                                  words, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 9)).save("here.png")     # what --images "" took before
    with pytest.raises(SystemExit, match=message) as stopped:
        evaluate_checkpoint(checkpoint, *words, "--out", "out")
    assert str(stopped.value).startswith("eval.py: ") and not Path("out").exists()


def test_unknown_and_abbreviated_flags_are_refused_with_a_near_name(checkpoint):
    with pytest.raises(SystemExit) as stopped:
        evaluate_checkpoint(checkpoint, "--score_thresh", "0.5")
    assert stopped.value.code.startswith("eval.py: error: Unrecognized options: --score_thresh")
    assert "--score_threshold FLOAT" in stopped.value.code


@pytest.mark.parametrize("mode", ["data", "images"])
def test_results_that_cannot_be_written_end_in_one_line(checkpoint, tmp_path, mode):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    words = ("--images", tmp_path / "a.png") if mode == "images" else ()
    (tmp_path / "file").write_text("something")
    for out, message in (("file", "got the file"), ("file/deeper", "expected a folder"),
                         ("/proc/nowhere", "expected a folder")):
        with pytest.raises(SystemExit, match="eval.py: .*--out.*" + message):
            evaluate_checkpoint(checkpoint, *words, "--out", tmp_path / out)
    assert (tmp_path / "file").read_text() == "something"


def test_a_full_disk_ends_in_one_line_and_leaves_no_half_file(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "eval.json").write_text("complete")
    write_text = Path.write_text

    def full(path, text):
        write_text(path, text[:len(text) // 2])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SystemExit, match="eval.py: .*No space left on device"):
        evaluate_checkpoint(checkpoint, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]
    assert (tmp_path / "eval.json").read_text() == "complete"


def test_no_image_that_can_be_read_is_a_failure(checkpoint, tmp_path, capsys):
    (tmp_path / "5.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit) as stopped:
        evaluate_checkpoint(checkpoint, "--images", tmp_path, "--out", tmp_path / "out")
    assert stopped.value.code.startswith("eval.py: error: --images: expected an image that can be")
    assert "0 of 1 images drawn" in capsys.readouterr().out


def test_a_model_that_is_not_finite_has_no_ap_and_writes_no_detections(tmp_path):
    path = write_checkpoint(tmp_path / "best.pt", change=damage)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for words in ((), ("--images", tmp_path / "a.png")):
        with pytest.raises(SystemExit, match="eval.py: .*expected finite detections"):
            evaluate_checkpoint(path, *words, "--out", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_without_best_pt_is_no_checkpoint(tmp_path):
    with pytest.raises(SystemExit, match="eval.py: .*--checkpoint.*best.pt"):
        evaluate_checkpoint(tmp_path)


# ---- the machine ---------------------------------------------------------------------------------

@pytest.mark.skipif(sys.platform != "linux", reason="pages are counted as Linux does")
def test_the_cpu_settings_keep_float32_sums_and_the_pages_of_large_tensors():
    """In a process of its own: they hold for all of it. Half precision would be off by 1e-3."""
    def program():
        import resource
        torch.set_num_threads(1)   # those of the process it was forked from are not here
        machine.prepare_cpu()
        x, w = torch.randn(500, 256), torch.randn(128, 256)
        exact = x.double() @ w.double().T
        error = (torch.nn.functional.linear(x, w) - exact).abs().max()
        assert error / exact.abs().max() < 5e-6
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
