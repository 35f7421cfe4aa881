"""LVIS: reading, sampling, federated loss, federated AP, and the generated scenes in its layout."""
import builtins
import contextlib
import copy
import importlib
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import scenes
import train
from engine import batches, datasets, lvis, sampling
from engine.errors import UserError
from engine.machine import Machine
from heads.federated import FederatedLoss
from matcher import focal_loss
from recordings import batch
from small_runs import FLAGS
from test_co_detr import small
from tools import check_data

CATEGORIES = [{"id": 3, "name": "cat", "frequency": "f"},
              {"id": 7, "name": "owl", "frequency": "r"},
              {"id": 9, "name": "yak", "frequency": "c"}]


def lvis_json(objects, negative=(), incomplete=(), images=1):
    """objects: (image id, category id, box); negative, incomplete: (image id, category id)."""
    entries = []
    for number in range(1, images + 1):
        entries.append({
            "id": number, "width": 100, "height": 100,
            "coco_url": f"http://images.cocodataset.org/train2017/{number:012}.jpg",
            "neg_category_ids": [c for i, c in negative if i == number],
            "not_exhaustive_category_ids": [c for i, c in incomplete if i == number]})
    rows = []
    for number, (image, category, box) in enumerate(objects, 1):
        x, y, w, h = box
        polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        rows.append({"id": number, "image_id": image, "category_id": category, "bbox": list(box),
                     "area": w * h, "segmentation": polygon})
    return {"images": entries, "annotations": rows, "categories": copy.deepcopy(CATEGORIES)}


def result(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def write(root, content, split="train"):
    """A data folder with this json and gray images, all in train2017, as LVIS's val images are."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "train2017").mkdir(exist_ok=True)
    for image in content["images"]:
        name = image["coco_url"].rpartition("/")[2]
        Image.new("RGB", (100, 100), "gray").save(root / "train2017" / name)
    (root / f"annotations/lvis_v1_{split}.json").write_text(json.dumps(content))
    return root


# ---- reading

def test_an_lvis_json_is_read_as_it_is(tmp_path):
    content = lvis_json([(1, 7, (10, 10, 30, 30)), (2, 3, (0, 0, 50, 50))], [(1, 3)], [(2, 3)], 2)
    write(tmp_path, content)
    write(tmp_path, content, "val")
    dataset = data.CocoFolder(tmp_path, "val")
    assert dataset.class_names == ["cat", "owl", "yak"] and dataset.category_ids == [3, 7, 9]
    assert dataset.file_name(0) == "train2017/000000000001.jpg"
    assert dataset.image(1).size == (100, 100) and dataset.has_masks is True
    truth = dataset.subset([1]).coco().dataset
    assert truth["images"][0]["neg_category_ids"] == []
    assert truth["images"][0]["not_exhaustive_category_ids"] == [3]
    assert [row["frequency"] for row in truth["categories"]] == ["f", "r", "c"]
    assert evaluation.limit_of(dataset) == 300 and evaluation.limit_of(dataset, 1000) == 1000


@pytest.mark.parametrize("change, message", [
    (lambda c: c["categories"][1].pop("frequency"), "frequency r, c or f.*None for owl"),
    (lambda c: c["categories"][1].update(frequency="rare"), "got 'rare' for owl"),
    (lambda c: c["images"][0]["neg_category_ids"].append(99), "neg_category_ids of image 1.*99"),
    (lambda c: c["images"][0]["not_exhaustive_category_ids"].append(4), "not_exhaustive.*image 1"),
    (lambda c: c["annotations"][0].update(category_id=99), "unknown category id"),
    (lambda c: c["images"][0].update(neg_category_ids=None), "neg_category_ids of image 1.*None"),
    (lambda c: c["images"][0].update(neg_category_ids=3), "neg_category_ids of image 1.*got 3"),
    (lambda c: c["images"][0]["neg_category_ids"].append([3]), r"neg_category_ids.*got \[\[3"),
    (lambda c: c["images"][0].pop("not_exhaustive_category_ids"), "not_exhaustive.*got None"),
    (lambda c: [c["images"][0].pop(name) for name in lvis.IMAGE_LISTS], "neg_category_ids.*None"),
    (lambda c: c["images"][0].pop("coco_url"), r"lacks file_name \(in LVIS coco_url\)")])
def test_what_is_wrong_with_an_lvis_json_is_named(tmp_path, change, message):
    content = lvis_json([(1, 7, (10, 10, 30, 30))])
    write(tmp_path, content)
    change(content)
    (tmp_path / "annotations/lvis_v1_train.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        data.CocoFolder(tmp_path, "train")


def test_the_data_check_names_what_is_wrong_with_an_lvis_json(tmp_path, capsys):
    content = lvis_json([(1, 7, (10, 10, 30, 30))], [(1, 99)])
    write(tmp_path, content)
    write(tmp_path, lvis_json([(1, 7, (10, 10, 30, 30))]), "val")
    assert check_data.check(tmp_path) == 1
    assert "neg_category_ids of image 1" in capsys.readouterr().out


def test_a_test_set_of_lvis_needs_no_lists(tmp_path):
    content = lvis_json([])
    for name in lvis.IMAGE_LISTS:
        del content["images"][0][name]
    write(tmp_path, content, "test")
    assert data.CocoFolder(tmp_path, "test").federated is None
    content["images"][0]["neg_category_ids"] = [3]
    write(tmp_path, content, "test")
    lists = data.CocoFolder(tmp_path, "test").federated.lists[1]
    assert lists == {"neg_category_ids": [3], "not_exhaustive_category_ids": []}


# ---- repeat-factor sampling

def many(counts):
    """A data set of 100 images; class k is in the first counts[k] of them."""
    rows = [data.Objects(boxes=np.ones((sum(i < n for n in counts), 4)),
                         labels=np.array([k for k, n in enumerate(counts) if i < n], np.int64),
                         areas=np.ones(sum(i < n for n in counts)),
                         crowd=np.zeros(sum(i < n for n in counts), bool),
                         segmentations=[b""] * sum(i < n for n in counts)) for i in range(100)]
    dataset = data.DetectionData()
    dataset.name = "hundred"
    dataset.image_ids = np.arange(100)
    dataset.class_names = [str(k) for k in range(len(counts))]
    dataset.annotations = data.join_annotations(rows)
    return dataset


def test_repeat_factors_are_those_of_the_rarest_class_of_an_image():
    """t = 0.09: a class in one of 100 images has the factor sqrt(0.09 / 0.01) = 3, in four images
    1.5, in 50 images 1; a class without images changes nothing."""
    dataset = many([50, 4, 1, 0])
    assert sampling.image_counts(dataset).tolist() == [50, 4, 1, 0]
    factors = sampling.repeat_factors(dataset, 0.09)
    np.testing.assert_allclose(factors, [3, 1.5, 1.5, 1.5] + [1] * 96)


def test_an_epoch_repeats_an_image_by_its_factor_on_average_and_has_one_length():
    dataset = many([50, 4, 1])
    dataset.repeat_factors = sampling.repeat_factors(dataset, 0.09)
    assert sampling.epoch_length(dataset) == 103          # 3 + 3 x 1.5 + 96 = 103.5
    counts = []
    for seed in range(200):
        order = sampling.epoch_order(dataset, np.random.default_rng(seed))
        assert len(order) == 103
        counts.append(np.bincount(order, minlength=100))
    low, high = np.min(counts, 0), np.max(counts, 0)
    assert low[0] >= 2 and high[0] <= 3 and high[1] == 2 and low[1] == 1
    np.testing.assert_allclose(np.mean(counts, 0)[:4], [3, 1.5, 1.5, 1.5], atol=0.12)
    plain = many([50])
    order = sampling.epoch_order(plain, np.random.default_rng(0))
    assert order.tolist() == np.random.default_rng(0).permutation(100).tolist()


def test_steps_of_an_epoch_count_the_repeated_images():
    run = train.Run()
    assert batches.BatchSizes(10, run, Machine(), 100, 150).steps_per_epoch == 15
    assert batches.BatchSizes(10, run, Machine(), 100).steps_per_epoch == 10


def test_oversampling_needs_a_rare_class():
    with pytest.raises(UserError, match="--oversample 0.001: .* got 0.04 for the rarest"):
        sampling.repeat_factors(many([50, 4]), 0.001)
    scene_recipe = train.parse(["--model", "dino", "--oversample", "0.001"])[2]
    with pytest.raises(UserError, match="expected a class in a smaller fraction"):
        datasets.build_datasets("", scene_recipe, 0, num_train=6, num_val=2)


# ---- federated loss

def test_the_federated_loss_counts_present_classes_and_fills_up_with_others():
    labels = torch.tensor([[[3, 9, 9], [9, 9, 5]], [[9, 9, 9], [9, 9, 9]]])   # two layers, N = 9
    federated = FederatedLoss(focal_loss, 4)
    federated.set_image_counts(torch.tensor([100, 100, 0, 1, 100, 1, 100, 100, 100]))
    for _ in range(20):
        chosen = federated.chosen_classes(labels, 9)
        assert chosen.sum(1).tolist() == [4, 4]
        assert chosen[0, [3, 5]].all() and not chosen[:, 2].any()
    logits = torch.randn(2, 2, 3, 9)
    torch.manual_seed(1)
    loss = federated(logits, labels, None, None)
    torch.manual_seed(1)
    chosen = federated.chosen_classes(labels, 9)
    expected = focal_loss(logits, labels) * chosen[:, None, None]
    assert torch.equal(loss, expected)
    everything = torch.arange(9).view(1, 3, 3)
    assert federated.chosen_classes(everything, 9).all()
    assert FederatedLoss(focal_loss, 50).chosen_classes(labels, 9).all()


def test_classes_are_drawn_by_the_root_of_their_images():
    """One of two classes, in 1 and 16 images: 1 to 4."""
    federated = FederatedLoss(focal_loss, 1)
    federated.set_image_counts(torch.tensor([1, 16]))
    torch.manual_seed(0)
    chosen = federated.chosen_classes(torch.full((4000, 1), 2), 2).double().mean(0)
    assert chosen.tolist() == pytest.approx([0.2, 0.8], abs=0.03)


def test_the_federated_loss_reaches_decoder_queries_denoising_and_atss():
    """With one class a call, only the classes of positives have gradients in the class layers."""
    torch.manual_seed(0)
    cfg, model, criterion = small(fed_loss=1, aux_heads="rcnn,atss", roi_sigmoid=True)
    criterion.set_image_counts(torch.tensor([5, 5, 5, 5, 5]))
    images, padding, targets = batch((64, 96), (48, 64), objects=(3, 2))
    for target in targets:
        target["labels"][:] = 2
    losses = criterion(model(images, padding, targets), targets)
    for prefix, layer in (("cls", model.detector.class_embed[1]),
                          ("dn.cls", model.detector.class_embed[1]),
                          ("atss.queries.cls", model.detector.class_embed[1]),
                          ("atss.cls", model.atss.cls), ("rcnn.cls", model.roi.cls)):
        model.zero_grad()
        losses[prefix].backward(retain_graph=True)
        others = layer.bias.grad[[0, 1, 3, 4]]
        assert layer.bias.grad[2] != 0 and not others.any(), prefix


def test_a_federated_loss_of_objectness_is_refused():
    with pytest.raises(UserError, match="fed_loss with base dino or deformable_detr"):
        small("co_detr", base="h_detr", fed_loss=50)


def test_a_region_head_without_background_trains_and_detects():
    cfg, model, criterion = small(roi_sigmoid=True, eval_head="rcnn")
    assert model.roi.cls.out_features == 5
    images, padding, targets = batch((64, 96), (48, 64), objects=(3, 0))
    losses = criterion(model(images, padding, targets), targets)
    assert losses["rcnn.cls"].isfinite() and losses["rcnn.giou"].isfinite()
    outputs = model.eval()(images, padding)
    assert len(outputs["head_detections"][0]["scores"])


# ---- AP

PERFECT = (10, 10, 40, 40)
SHIFTED = (10, 20, 40, 40)      # IoU 0.6 with it
HALF = 0.3                      # of the ten thresholds, 0.5, 0.55 and 0.6 are reached


def figures(content, results, **options):
    pytest.importorskip("faster_coco_eval")
    return lvis.score(content, results, **options)


def test_perfect_shifted_and_missing_detections_by_hand():
    """cat: perfect; owl: IoU 0.6, so 3 of 10 thresholds; yak: none."""
    content = lvis_json([(1, 3, PERFECT), (1, 7, PERFECT), (2, 9, PERFECT)], images=2)
    results = [result(1, 3, PERFECT, 0.9), result(1, 7, SHIFTED, 0.8)]
    found = figures(content, results)
    expected = {"AP": (1 + HALF) / 3, "APf": 1, "APr": HALF, "APc": 0, "AP50": 2 / 3, "AP75": 1 / 3,
                "APm": (1 + HALF) / 3, "APs": -1, "APl": -1, "max_dets": 300}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    assert found["per_class"]["cat"]["objects"] == 1
    assert found["per_class"]["owl"]["AP"] == pytest.approx(HALF)
    assert found["per_class"]["cat"]["threshold"] == pytest.approx(0.9)
    assert figures(content, [])["AP"] == 0


def test_detections_count_only_where_the_class_was_looked_for():
    """A false positive before the only hit halves the precision where its class is negative. It
    does not count where the class is unknown, or not every object is annotated."""
    objects = [(1, 3, PERFECT)]
    results = [result(1, 3, PERFECT, 0.5), result(2, 3, PERFECT, 0.9)]
    assert figures(lvis_json(objects, images=2), results)["AP"] == pytest.approx(1)
    negative = lvis_json(objects, negative=[(2, 3)], images=2)
    assert figures(negative, results)["AP"] == pytest.approx(0.5)
    results = [result(1, 3, PERFECT, 0.5), result(1, 3, (60, 60, 30, 30), 0.9)]
    assert figures(lvis_json(objects), results)["AP"] == pytest.approx(0.5)
    incomplete = lvis_json(objects, incomplete=[(1, 3)])
    assert figures(incomplete, results)["AP"] == pytest.approx(1)


def test_the_best_300_of_an_image_count_over_all_classes():
    content = lvis_json([(1, 3, PERFECT)], negative=[(1, 7)])
    noise = [result(1, 7, (1, 1, 5, 5), 0.9) for _ in range(300)]
    results = noise + [result(1, 3, PERFECT, 0.5)]
    assert figures(content, results)["APf"] == 0
    found = figures(content, results, limit=1000)
    assert found["APf"] == 1 and found["max_dets"] == 1000 and found["AR1000"] == 1


def random_set(seed):
    """Objects and detections of 30 images; some boxes are hits, some classes incomplete."""
    rng = np.random.default_rng(seed)
    objects, results, negative, incomplete = [], [], [], []
    for image in range(1, 31):
        for category in (3, 7, 9):
            for _ in range(rng.integers(0, 3)):
                x, y = rng.integers(0, 50, 2).tolist()
                w, h = rng.integers(5, 50, 2).tolist()
                objects.append((image, category, (x, y, w, h)))
                for _ in range(rng.integers(0, 3)):
                    dx, dy = rng.integers(-4, 5, 2).tolist()
                    box = (x + dx, y + dy, w, h)
                    results.append(result(image, category, box, round(rng.random(), 6)))
            if rng.random() < 0.3:
                results.append(result(image, category, (5, 5, 20, 20), round(rng.random(), 6)))
            present = any(row[:2] == (image, category) for row in objects)
            if not present and rng.random() < 0.5:
                negative.append((image, category))
            if present and rng.random() < 0.3:
                incomplete.append((image, category))
    return lvis_json(objects, negative, incomplete, 30), results


@pytest.mark.parametrize("limit", [300, 4])
def test_figures_equal_those_of_the_lvis_package(tmp_path, limit):
    """Its release needs a name that NumPy has dropped."""
    pytest.importorskip("lvis")
    np.float = float
    try:
        package = importlib.import_module("lvis")
        content, results = random_set(0)
        path = tmp_path / "lvis.json"
        path.write_text(json.dumps(content))
        with contextlib.redirect_stdout(io.StringIO()):
            truth = package.LVIS(str(path))
            theirs = package.LVISResults(truth, copy.deepcopy(results), max_dets=limit)
            check = package.LVISEval(truth, theirs, "bbox")
            check.run()
    finally:
        del np.float
    ours = figures(content, results, limit=limit)
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"):
        assert ours[name] == pytest.approx(check.results[name], abs=1e-6), name


def test_without_the_package_its_name_is_given(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name == "faster_coco_eval":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install faster-coco-eval"):
        lvis.score(lvis_json([(1, 3, PERFECT)]), [])


# ---- the generated scenes

@pytest.fixture(scope="module")
def scene_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("lvis")
    with contextlib.redirect_stdout(io.StringIO()):
        scenes.main(["--write", str(root), "--layout", "lvis", "--num_train", "48", "--num_val",
                     "8"])
    return root


def test_scenes_in_the_layout_of_lvis_are_federated_and_have_rare_classes(scene_folder):
    folder = data.CocoFolder(scene_folder, "train")
    plain = scenes.Shapes("train", 48)
    counts = sampling.image_counts(folder)
    heart = folder.class_names.index("heart")
    assert counts[heart] == 8 < sampling.image_counts(plain)[heart]
    assert folder.federated.frequency[folder.category_ids[heart]] == "r"
    assert set(folder.federated.frequency.values()) == {"r", "c"}
    lists = folder.federated.lists.values()
    assert any(row["neg_category_ids"] for row in lists)
    assert any(row["not_exhaustive_category_ids"] for row in lists)
    for index in range(48):
        own = {folder.category_ids[label] for label in folder.objects(index).labels}
        entry = folder.federated.lists[int(folder.image_ids[index])]
        assert not own & set(entry["neg_category_ids"])
        assert set(entry["not_exhaustive_category_ids"]) <= own
    plain.prepare()
    assert (np.asarray(folder.image(5)) == plain.pixels[5]).all()
    with pytest.raises(UserError, match="expected a new folder"):
        scenes.write_scenes(scene_folder, 2, 2, layout="lvis")


def test_scenes_in_the_layout_of_lvis_train_end_to_end(scene_folder, tmp_path, capsys):
    """Oversampled, with the federated loss, and with large-scale jitter: APr, APc and APf."""
    pytest.importorskip("faster_coco_eval")
    out = tmp_path / "run"
    train.main(["--model", "co_detr", *FLAGS, "--dim", "64", "--data", str(scene_folder), "--out",
                str(out), "--preset", "small", "--epochs", "1", "--batch_size", "8",
                "--oversample", "0.3", "--fed_loss", "3", "--augment", "lsj", "--lsj_size", "64",
                "--aux_heads", "atss"])
    assert re.search("epoch   1 .* APr .* APc .* APf -", capsys.readouterr().out)
    record = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][-1]
    box = record["bbox"]
    assert record["kind"] == "eval" and box["max_dets"] == 300
    assert {"APr", "APc", "APf", "AR300"} <= box.keys() and box["APf"] == -1
    evaluation.main(["--checkpoint", str(out), "--device", "cpu", "--max_dets", "1000"])
    said = capsys.readouterr().out
    assert "APr" in said and "best 1000 detections of each image," in said
    assert "in a square of 64 px" in said
