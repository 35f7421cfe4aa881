"""The data path, each part against a slow and obvious way to do the same."""
import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

import data
from engine.errors import UserError
from engine import datasets
import scenes
from tools import check_data

SMALL = SimpleNamespace(train_sizes=(128,), max_size=200, crop=False, color_jitter=True, eval_size=128)
PAPER = SimpleNamespace(train_sizes=tuple(range(480, 801, 32)), max_size=1333, crop=True, color_jitter=False, eval_size=800)
FULL = SimpleNamespace(train_sizes=(64,), max_size=1333, crop=False, color_jitter=False, eval_size=64)


def write_folder(root, images=((40, 30),), boxes=((0, 1, (5, 6, 10, 8)),), categories=((1, "cat"),), splits=("train", "val"), **extra):
    """A COCO-layout folder. images: (width, height) each; boxes: (image position, category id, xywh[, more fields])."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split in splits:
        (root / f"{split}2017").mkdir(exist_ok=True)
        for k, (width, height) in enumerate(images):
            pixels = np.random.default_rng(k).integers(0, 255, (height, width, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{split}2017" / f"{k}.jpg")
        content = {
            "images": [{"id": 10 + k, "file_name": f"{k}.jpg", "width": w, "height": h} for k, (w, h) in enumerate(images)],
            "annotations": [{"id": k, "image_id": 10 + row[0], "category_id": row[1], "bbox": list(row[2]), "iscrowd": 0,
                             "area": row[2][2] * row[2][3], **(row[3] if len(row) > 3 else {})} for k, row in enumerate(boxes)],
            "categories": [{"id": i, "name": name} for i, name in categories], **extra}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def edit_json(root, change, split="train"):
    path = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def average_precision(dataset, results, kind="bbox", max_dets=100):
    truth = dataset.coco()
    score = COCOeval(truth, truth.loadRes(results), kind)
    score.params.maxDets = [1, 10, max_dets]
    score.evaluate()
    score.accumulate()
    precision = score.eval["precision"][:, :, :, 0, 2]
    return precision[precision > -1].mean()


def perfect_results(dataset):
    """What a flawless detector would return for the samples of a data set, in original px and json ids."""
    results = []
    for k in range(len(dataset)):
        _, target = dataset[k]
        height, width = target["orig_size"].tolist()
        for label, (cx, cy, w, h) in zip(target["labels"].tolist(), target["boxes"].double().tolist()):
            box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
            results.append({"image_id": target["image_id"], "category_id": dataset.category_ids[label], "bbox": box, "score": 1.0})
    return results


# ------------------------------------------------------------------------------------------------------------- generated scenes

@pytest.fixture(scope="module")
def val_scenes():
    dataset = scenes.Shapes("val")
    dataset.draw = functools.cache(dataset.draw)
    return dataset


def test_a_scene_depends_on_seed_split_and_index_alone():
    few, many = scenes.Shapes("train", 3), scenes.Shapes("train", 50)
    many[49], many[2], few[2]                                              # any order, any number
    np.testing.assert_array_equal(np.asarray(few.image(2)), np.asarray(many.image(2)))
    assert few.objects(2).segmentations == many.objects(2).segmentations
    for other in (scenes.Shapes("val", 3), scenes.Shapes("train", 3, seed=1)):
        assert (np.asarray(other.image(2)) != np.asarray(few.image(2))).mean() > 0.5


def test_scenes_are_at_least_as_hard_as_the_bar_is_meant_for(val_scenes):
    things = [thing for k in range(200) for thing in val_scenes.draw(k)[2]]
    assert len(val_scenes.class_names) >= 8 and len({thing.label for thing in things}) == len(val_scenes.class_names)
    assert max(abs(thing.angle) for thing in things) >= 0.4
    assert scenes.MIN_CONTRAST <= 140 and scenes.MIN_CONTRAST <= min(thing.contrast for thing in things) <= 140
    assert scenes.MIN_SIDE <= 21 and min(thing.side for thing in things) <= 22
    assert len(val_scenes) >= 500
    counts = [len(val_scenes.objects(k).labels) for k in range(200)]
    assert min(counts) == 0 and 7 <= max(counts) <= 8


def test_every_size_band_of_the_default_validation_scenes_has_a_hundred_objects(val_scenes):
    areas = val_scenes.annotations.areas
    bands = (areas < 32 ** 2).sum(), ((areas >= 32 ** 2) & (areas < 96 ** 2)).sum(), (areas >= 96 ** 2).sum()
    assert min(bands) >= 100, bands
    assert data.class_counts(val_scenes).min() >= 100


def test_scene_boxes_areas_and_masks_are_exactly_what_is_visible(val_scenes):
    for k in range(30):
        pixels, owner, things = val_scenes.draw(k)
        objects = val_scenes.objects(k)
        assert len(objects.labels) == len(things)
        for number, (box, area, text) in enumerate(zip(objects.boxes, objects.areas, objects.segmentations), start=1):
            places = [(x, y) for y in range(160) for x in range(160) if owner[y, x] == number]
            xs, ys = zip(*places)
            assert box.tolist() == [min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1]
            thing = things[number - 1]
            assert area == len(places) >= 0.55 * thing.pixels and thing.pixels >= 0.55 * scenes.FILL[thing.label] * thing.side ** 2
            np.testing.assert_array_equal(data.decode_mask(json.loads(text), 160, 160), owner == number)


def test_a_visible_object_has_its_colour_and_what_lies_behind_has_another():
    pixels, owner, things = scenes.Shapes("val").draw(2)
    for number, thing in enumerate(things, start=1):
        assert np.abs(pixels[owner == number].mean(0) - thing.colour).sum() < 60 < thing.contrast


def test_written_scenes_read_back_as_the_generated_ones(tmp_path, capsys):
    scenes.write_scenes(tmp_path, num_train=4, num_val=6, seed=3)
    assert check_data.check(tmp_path) == 0
    assert "circle" in capsys.readouterr().out
    written, generated = data.CocoFolder(tmp_path, "val", load_masks=True), scenes.Shapes("val", 6, seed=3, load_masks=True)
    assert written.class_names == generated.class_names and written.category_ids == generated.category_ids
    for k in range(6):
        (image, target), (image_2, target_2) = written[k], generated[k]
        assert torch.equal(image, image_2) and target.keys() == target_2.keys()
        for name in target:
            assert torch.equal(torch.as_tensor(target[name]), torch.as_tensor(target_2[name])), name


def test_scene_samples_hold_masks_only_when_asked(val_scenes):
    assert "masks" not in val_scenes[0][1]
    asked = scenes.Shapes("val", 3, load_masks=True)
    asked.transform = data.eval_transform(SMALL)
    target = asked[1][1]
    assert target["masks"].shape == (len(target["labels"]), 128, 128) and target["masks"].dtype == torch.bool


# ------------------------------------------------------------------------------------------------------------------- transforms

def official_size(width, height, size, max_size):
    """The published rule, step by step on plain numbers."""
    if max_size is not None:
        if float(max(width, height)) / float(min(width, height)) * size > max_size:
            size = int(round(max_size * float(min(width, height)) / float(max(width, height))))
    if (width <= height and width == size) or (height <= width and height == size):
        return width, height
    if width < height:
        return size, int(size * height / width)
    return int(size * width / height), size


def test_resize_follows_the_published_rule():
    rng = random.Random(0)
    for _ in range(3000):
        width, height = rng.randint(50, 2000), rng.randint(50, 2000)
        size, limit = rng.choice(range(480, 801, 32)), rng.choice([1333, None])
        assert data.resized(width, height, size, limit) == official_size(width, height, size, limit)
    assert data.resized(640, 480, 800, 1333) == (1066, 800)
    assert data.resized(480, 640, 800, 1333) == (800, 1066)
    assert data.resized(1000, 300, 800, 1333) == (1333, 400)


def marked_image(width, height, box):
    """Black, with a white box (x0, y0, x1, y1), and its target."""
    pixels, mask = np.zeros((height, width, 3), np.uint8), np.zeros((1, height, width), np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1], mask[:, y0:y1, x0:x1] = 255, 1
    return Image.fromarray(pixels), {"labels": np.array([7]), "boxes": np.array([box], float), "masks": mask}


@pytest.mark.parametrize("cfg", [SMALL, PAPER, SimpleNamespace(**{**vars(PAPER), "color_jitter": True})], ids=["small", "paper", "jitter"])
def test_boxes_and_masks_follow_the_pixels_through_every_augmentation(cfg):
    transform, flips, cropped, lost = data.train_transform(cfg, seed=1), 0, 0, 0
    for epoch in range(25):
        image, target = marked_image(300, 200, (20, 50, 90, 180))
        tensor, out = transform(image, target, epoch, 5)
        height, width = tensor.shape[1:]
        assert out["size"].tolist() == [height, width]
        if not len(out["labels"]):
            lost += 1
            continue
        assert out["masks"].shape == (1, height, width)
        corner = tensor[:, 0, 0] if not out["masks"][0, 0, 0] else tensor[:, -1, -1]
        seen = (tensor - corner[:, None, None]).abs().sum(0) > (tensor - corner[:, None, None]).abs().sum(0).max() / 2
        ys, xs = torch.where(seen)
        cx, cy, w, h = (out["boxes"][0] * torch.tensor([width, height, width, height])).tolist()
        found = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
        expected = torch.tensor([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
        assert (found - expected).abs().max() <= 1.5, (epoch, found, expected)
        assert (seen != out["masks"][0]).float().mean() < 0.02
        flips += cx > width / 2
        cropped += abs(w / width - 70 / 300) > 0.02
    assert 5 < flips < 20
    assert (5 < cropped + lost < 20) == cfg.crop


def test_the_crop_window_equals_cropping_the_resized_whole():
    image = scenes.Shapes("val", 1, size=300).image(0).resize((500, 310))
    boxes = np.array([[10.0, 20, 200, 300], [400, 5, 480, 60], [0, 0, 500, 310], [490, 300, 499, 309]])
    for seed in range(15):
        window, got = data.random_crop(image, {"labels": np.arange(4), "boxes": boxes}, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)                                  # the same draws, by hand
        size = official_size(500, 310, int(rng.choice((400, 500, 600))), None)
        whole = image.resize(size, Image.Resampling.BILINEAR)
        width, height = (int(rng.integers(384, min(side, 600) + 1)) for side in size)
        left, top = int(rng.integers(0, size[0] - width + 1)), int(rng.integers(0, size[1] - height + 1))
        reference = whole.crop((left, top, left + width, top + height))
        assert window.size == reference.size
        difference = np.abs(np.asarray(window, int) - np.asarray(reference, int))
        assert difference.max() <= 3 and (difference > 0).mean() < 0.01    # PIL keeps the region in float32
        kept = []
        for label, (x0, y0, x1, y1) in enumerate(boxes * np.tile([size[0] / 500, size[1] / 310], 2)):
            x0, x1, y0, y1 = max(x0 - left, 0), min(x1 - left, width), max(y0 - top, 0), min(y1 - top, height)
            if x1 > x0 and y1 > y0:
                kept.append((label, x0, y0, x1, y1))
        np.testing.assert_array_equal(got["labels"], [row[0] for row in kept])
        np.testing.assert_allclose(got["boxes"], np.array([row[1:] for row in kept]).reshape(-1, 4), atol=1e-6)


def test_normalisation_and_colour_jitter_equal_the_plain_formula():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    got = data.normalise(Image.fromarray(pixels), channels=(2, 0, 1), gain=1.1, shift=-0.05, invert=True)
    for y in range(5):
        for x in range(7):
            for c, source in enumerate((2, 0, 1)):
                value = min(max((1 - pixels[y, x, source] / 255) * 1.1 - 0.05, 0), 1)
                expected = (value - (0.485, 0.456, 0.406)[c]) / (0.229, 0.224, 0.225)[c]
                assert abs(got[c, y, x].item() - expected) < 1e-5
    assert data.normalise(Image.fromarray(pixels)).dtype == torch.float32


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    dataset = scenes.Shapes("train", 6)
    dataset.transform = data.train_transform(SMALL, seed=4)
    first = [dataset[k][0] for k in range(6)]
    np.random.seed(9), torch.manual_seed(9), random.seed(9)
    assert all(torch.equal(first[k], dataset[k][0]) for k in reversed(range(6)))
    dataset.set_epoch(1)
    assert not any(torch.equal(first[k], dataset[k][0]) for k in range(6))


def test_evaluation_only_resizes_and_overfitting_does_not_augment():
    train, val = datasets.build_datasets(None, SMALL, 0, overfit=5, num_train=20)
    assert len(train) == len(val) == 5 and all(len(train[k][1]["labels"]) for k in range(5))
    for k in range(5):
        train.set_epoch(k)
        assert torch.equal(train[k][0], val[k][0])
        assert torch.equal(val[k][0], data.normalise(val.image(k).resize((128, 128), Image.Resampling.BILINEAR)))


def test_tiny_and_thin_images_pass_through_every_transform():
    for width, height in ((16, 16), (1, 800), (800, 1), (7350, 150), (1, 1)):
        for cfg in (SMALL, PAPER):
            for transform in (data.train_transform(cfg), data.eval_transform(cfg)):
                for epoch in range(3):
                    box = (0, 0, max(width // 2, 1), height)
                    image, target = marked_image(width, height, box)
                    tensor, out = transform(image, target, epoch, 0)
                    assert min(tensor.shape[1:]) >= 1 and tensor.isfinite().all() and out["masks"].shape[1:] == tensor.shape[1:]


# ---------------------------------------------------------------------------------------------------------------------- batches

def sample(height, width, index):
    return torch.full((3, height, width), float(index + 1)), {"index": index}


def test_collate_pads_right_and_below_with_zeros_and_marks_the_padding():
    images, padding, targets = data.collate([sample(4, 7, 0), sample(6, 5, 1)])
    assert images.shape == (2, 3, 6, 7) and padding.shape == (2, 6, 7) and [t["index"] for t in targets] == [0, 1]
    for k, (height, width) in enumerate(((4, 7), (6, 5))):
        for y in range(6):
            for x in range(7):
                inside = y < height and x < width
                assert padding[k, y, x].item() == (not inside)
                assert (images[k, :, y, x] == (k + 1 if inside else 0)).all()


class Numbers(data.DetectionData):
    """Samples that hold nothing but their number."""
    name = "numbers"

    def __init__(self, count):
        self.image_ids = np.arange(count)

    def __getitem__(self, index):
        return torch.zeros(3, 2, 2), {"index": index, "epoch": self.epoch}


def epoch_of(loader):
    return [[target["index"] for target in targets] for _, _, targets in loader]


def test_samples_do_not_depend_on_the_number_of_workers_and_global_randomness_is_left_alone():
    dataset = scenes.Shapes("train", 16)
    dataset.transform = data.train_transform(SMALL, seed=2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    epochs = []
    for workers in (0, 1, 2):
        for epoch in (1, 2):                                               # the workers of the second epoch know that it is the second
            dataset.set_epoch(epoch)
            loader = data.batches(dataset, [[3, 9, 1, 15], [0, 2, 4, 6], [5, 7]], workers)
            epochs.append([(images, targets) for images, _, targets in loader])
    assert torch.equal(before, torch.get_rng_state())
    for k in (2, 4):
        for epoch in (0, 1):
            for (images, targets), (images_2, targets_2) in zip(epochs[epoch], epochs[k + epoch], strict=True):
                assert torch.equal(images, images_2)
                assert [t["image_id"] for t in targets] == [t["image_id"] for t in targets_2]
                assert all(torch.equal(t["boxes"], u["boxes"]) for t, u in zip(targets, targets_2))


def test_worker_memory_stays_flat_over_epochs(tmp_path):
    rows = [(k % 4, 1, (k % 20, k % 15, 5, 5), {"segmentation": [[0, 0, 5, 0, 5, k % 9 + 1]]}) for k in range(20000)]
    write_folder(tmp_path, [(40, 30)] * 4, rows)
    dataset = data.CocoFolder(tmp_path, "train", load_masks=True)
    kept = [value for name, value in vars(dataset).items() if name != "problems"]
    assert not any(isinstance(value, (list, dict, tuple)) and not isinstance(value, data.Annotations) and len(value) > 10 for value in kept)
    assert all(isinstance(column, np.ndarray) and column.dtype != object for column in dataset.annotations)

    class Private(Numbers):
        """Reads all annotations like a worker does, and reports its private memory in KiB."""
        def __getitem__(self, index):
            for image in range(4):
                for text in dataset.objects(image).segmentations[:200]:
                    json.loads(text)
            with open(f"/proc/{os.getpid()}/smaps_rollup") as lines:
                return torch.zeros(3, 1, 1), {"index": sum(int(line.split()[1]) for line in lines if line.startswith("Private"))}

    if not os.path.exists("/proc/self/smaps_rollup"):
        pytest.skip("no /proc here to read a process's memory from")
    memory = sum(epoch_of(data.batches(Private(60), [[k] for k in range(60)], workers=1)), [])
    assert memory[-1] - memory[10] < 2000, memory


# ---------------------------------------------------------------------------------------------------------- COCO-layout folders

CATEGORIES = {"0-based": (0, 1, 2), "1-based": (1, 2, 3), "sparse": (1, 13, 90), "unsorted": (7, 2, 5), "one": (1,), "one-zero": (0,)}


@pytest.mark.parametrize("ids", CATEGORIES.values(), ids=CATEGORIES)
def test_category_ids(ids, tmp_path):
    names = [f"name {i}" for i in ids]
    boxes = [(0, i, (2 + 3 * k, 5, 10, 8)) for k, i in enumerate(ids)] + [(1, ids[0], (1, 1, 20, 20))]
    dataset = data.CocoFolder(write_folder(tmp_path, [(40, 30), (30, 40)], boxes, list(zip(ids, names))), "val")
    dataset.transform = data.eval_transform(FULL)
    assert dataset.category_ids == sorted(ids) and dataset.class_names == [f"name {i}" for i in sorted(ids)]
    results = perfect_results(dataset)
    assert sorted(row["category_id"] for row in results) == sorted(row[1] for row in boxes)
    assert {t for k in range(2) for t in dataset[k][1]["labels"].tolist()} == set(range(len(ids)))
    assert average_precision(dataset, results) == pytest.approx(1.0)


def test_crowds_are_not_learnt_and_are_regions_to_ignore(tmp_path):
    crowd = {"iscrowd": 1, "segmentation": {"size": [30, 40], "counts": [0, 600, 600]}}
    polygon = {"segmentation": [[5, 6, 15, 6, 15, 14, 5, 14]]}
    root = write_folder(tmp_path, [(40, 30)], [(0, 1, (5, 6, 10, 8), polygon), (0, 1, (0, 0, 20, 30), crowd)])
    dataset = data.CocoFolder(root, "val", load_masks=True)
    target = dataset[0][1]
    assert len(target["labels"]) == 1 and target["masks"].shape == (1, 30, 40)
    truth = dataset.coco()
    assert [row["iscrowd"] for row in truth.dataset["annotations"]] == [0, 1]
    assert truth.annToMask(truth.dataset["annotations"][1]).sum() == 600
    inside_the_crowd = {"image_id": 10, "category_id": 1, "bbox": [1, 16, 10, 12], "score": 1.0}
    assert average_precision(dataset, perfect_results(dataset) + [inside_the_crowd]) == pytest.approx(1.0)


def test_polygons_and_both_kinds_of_rle_give_the_same_mask(tmp_path):
    grid = np.zeros((30, 40), np.uint8)
    grid[6:14, 5:15] = 1
    column_runs, value, run = [], 0, 0
    for pixel in grid.T.ravel().tolist():                                  # RLE counts run down the columns, zeros first
        if pixel != value:
            column_runs, value, run = column_runs + [run], pixel, 0
        run += 1
    compressed = coco_mask.encode(np.asfortranarray(grid))
    forms = [[[5, 6, 15, 6, 15, 14, 5, 14]], {"size": [30, 40], "counts": column_runs + [run]},
             {"size": [30, 40], "counts": compressed["counts"].decode()}]
    root = write_folder(tmp_path, [(40, 30)], [(0, 1, (5, 6, 10, 8), {"segmentation": form}) for form in forms])
    for mask in data.CocoFolder(root, load_masks=True)[0][1]["masks"]:
        np.testing.assert_array_equal(mask.numpy(), grid.astype(bool))


def test_a_data_set_without_masks_says_so_and_one_with_some_is_refused(tmp_path):
    polygon = {"segmentation": [[5, 6, 15, 6, 15, 14, 5, 14]]}
    none = data.CocoFolder(write_folder(tmp_path / "none"), load_masks=True)
    assert not none.has_masks and "masks" not in none[0][1] and "segmentation" not in none.coco().dataset["annotations"][0]
    some = write_folder(tmp_path / "some", boxes=[(0, 1, (5, 6, 10, 8), polygon), (0, 1, (1, 1, 5, 5))])
    assert not data.CocoFolder(some).has_masks
    with pytest.raises(ValueError, match="got 1 for 2 objects"):
        data.CocoFolder(some, load_masks=True)


def test_degenerate_boxes_are_dropped_and_counted_and_the_others_clipped(tmp_path):
    boxes = [(0, 1, (5, 6, 10, 8)), (0, 1, (5, 6, 0, 8)), (0, 1, (5, 6, 4, -1)), (0, 1, (40, 5, 9, 9)), (0, 1, (-9, 2, 9, 9)), (0, 1, (35, 20, 10, 20))]
    dataset = data.CocoFolder(write_folder(tmp_path, boxes=boxes), "val")
    assert dataset.degenerate == 4 and len(dataset.coco().dataset["annotations"]) == 2
    np.testing.assert_allclose(dataset[0][1]["boxes"], [[10 / 40, 10 / 30, 10 / 40, 8 / 30], [37.5 / 40, 25 / 30, 5 / 40, 10 / 30]], atol=1e-6)


def test_images_without_objects_stay(tmp_path):
    dataset = data.CocoFolder(write_folder(tmp_path, [(40, 30), (20, 50)]))
    image, target = dataset[1]
    assert image.shape == (3, 50, 20) and target["boxes"].shape == (0, 4) and target["labels"].dtype == torch.int64


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_every_kind_of_image_becomes_rgb(mode, tmp_path):
    grey = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (30, 1))
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 256 + 7)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    read = data.read_image(path)
    assert read.mode == "RGB" and read.size == (40, 30)
    if mode != "1":
        assert np.abs(np.asarray(read, int) - grey[..., None]).max() <= 12


def save_with_orientation(path, pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, quality=95)


def test_exif(tmp_path, capsys):
    stored = np.zeros((30, 40, 3), np.uint8)
    stored[:10, :12] = 255                                                 # white corner, upper left as stored
    root = write_folder(tmp_path, [(30, 40)], [(0, 1, (20, 0, 10, 12))])   # upright: 30 wide, 40 high, white upper right
    for split in ("train", "val"):
        save_with_orientation(root / f"{split}2017" / "0.jpg", stored, orientation=6)
    dataset = data.CocoFolder(root, "val")
    image, target = dataset[0]
    assert target["orig_size"].tolist() == [40, 30] and image.shape == (3, 40, 30) and dataset.image_size(0) == (40, 30)
    cx, cy, w, h = (target["boxes"][0] * torch.tensor([30, 40, 30, 40])).tolist()
    assert image[:, int(cy), int(cx)].min() > 1.5 and image[:, 35, 5].max() < -1.5

    edit_json(root, lambda content: content["images"][0].update(width=40, height=30), "val")     # the size before the rotation
    edit_json(root, lambda content: content["annotations"][0].update(bbox=[0, 0, 12, 10]), "val")
    dataset = data.CocoFolder(root, "val")
    image, target = dataset[0]
    assert target["orig_size"].tolist() == [30, 40] == list(dataset.image_size(0)) and image[:, 5, 6].min() > 1.5
    assert check_data.check(root) == 0
    text = capsys.readouterr().out
    assert "turned by it" in text and "not applied" in text


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_from_the_header_is_the_size_of_the_pixels(orientation, tmp_path):
    path = tmp_path / "a.jpg"
    save_with_orientation(path, np.zeros((30, 40, 3), np.uint8), orientation)
    for listed in (None, (0, 0), (30, 40), (40, 30), (8, 8)):
        assert data.upright_size(*data.read_header(path), listed)[0] == data.read_image(path, listed).size


def truncate(path):
    path.write_bytes(path.read_bytes()[:-len(path.read_bytes()) // 3])


def test_truncated_jpeg(tmp_path, capfd):
    root = write_folder(tmp_path, [(40, 30)] * 6, [(k, 1, (5, 6, 10 + k, 8)) for k in range(6)])
    truncate(root / "train2017" / "2.jpg")
    truncate(root / "val2017" / "2.jpg")
    train, val = data.CocoFolder(root, "train"), data.CocoFolder(root, "val")
    for workers in (0, 2):
        for epoch in range(2):
            train.set_epoch(epoch)
            assert epoch_of(data.batches(train, [[5, 2], [0, 1], [4, 3]], workers)) == [[5, 3], [0, 1], [4, 3]]
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 1 and "2.jpg" in warnings[0] and "truncated" in warnings[0] and train.bad.sum() == 1
    image, target = val[2]                                                 # evaluation: the image stays itself, its object counts as missed
    assert target["image_id"] == 12 and len(target["boxes"]) == 1 and image.std(dim=(1, 2)).max() == 0
    truncate(root / "train2017" / "4.jpg")
    with pytest.raises(UserError, match="at most 1 unreadable images of 6, got 2"):
        train[4]


def test_a_program_that_breaks_off_reading_ends_with_its_workers():
    """They ignore the signal by which Python ends its children."""
    program = ("import data, scenes; dataset = scenes.Shapes('train', 8); loader = iter(data.batches(dataset, [[0], [1], [2]], 1)); next(loader); "
               "keep = [loader, loader.__next__]; keep.append(keep); import gc; gc.freeze(); raise ValueError('broken off')")
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(data.__file__).parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "ValueError: broken off"


def test_bad_images_in_workers_stop_the_run_too(tmp_path):
    root = write_folder(tmp_path, [(40, 30)] * 6)
    for k in (1, 3):
        truncate(root / "train2017" / f"{k}.jpg")
    with pytest.raises(UserError, match="unreadable"):
        epoch_of(data.batches(data.CocoFolder(root), [[k] for k in range(6)], workers=1))


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "webp", "tiff"])
def test_any_cut_of_any_image_file_is_recognised_as_broken(suffix, tmp_path):
    whole = tmp_path / f"whole.{suffix}"
    scenes.Shapes("val", 1).image(0).save(whole)
    content, path = whole.read_bytes(), tmp_path / f"cut.{suffix}"
    for share in np.linspace(0, 0.97, 15):
        path.write_bytes(content[:int(share * len(content))])
        try:
            assert data.read_image(path).size == (160, 160)                # some formats forgive a lost tail
        except data.BROKEN_IMAGE:
            pass


def test_missing_folder_and_json_are_named_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match="nowhere.*expected a COCO json.*--write"):
        data.CocoFolder(tmp_path / "nowhere")
    root = write_folder(tmp_path)
    (root / "train2017" / "0.jpg").unlink()
    with pytest.raises(UserError, match="train2017.*0.jpg.*put them there"):
        data.CocoFolder(root)
    (root / "annotations" / "instances_train2017.json").write_text("[]")
    with pytest.raises(ValueError, match="JSON object with images.*got a list"):
        data.CocoFolder(root)
    (root / "annotations" / "instances_train2017.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        data.CocoFolder(root)


def test_explicit_paths_replace_the_layout(tmp_path):
    root = write_folder(tmp_path)
    (root / "annotations" / "instances_val2017.json").rename(root / "mine.json")
    (root / "val2017").rename(root / "pictures")
    dataset = data.CocoFolder(root, "val", annotations=root / "mine.json", images=root / "pictures")
    assert dataset[0][0].shape == (3, 30, 40)


# -------------------------------------------------------------------------------------------------------------- the data doctor

def drop(part):
    return lambda content: content.pop(part)


def annotation(**fields):
    return lambda content: content["annotations"][0].update(fields)


def image_entry(**fields):
    return lambda content: content["images"][0].update(fields)


REFUSED = {
    "no annotations": (drop("annotations"), "no annotations"),
    "no categories": (drop("categories"), "no categories"),
    "no images": (lambda content: content.update(images=[]), "no images"),
    "unknown category": (annotation(category_id=5), "unknown category id.*annotation 0.*got category 5"),
    "unknown image": (annotation(image_id=99), "unknown image id.*annotation 0.*99"),
    "box of three": (annotation(bbox=[1, 2, 3]), "malformed box.*annotation 0"),
    "box not a number": (annotation(bbox=[1, 2, float("nan"), 3]), "malformed box"),
    "box missing": (lambda content: content["annotations"][0].pop("bbox"), "lacks bbox"),
    "text ids": (image_entry(id="a"), "expected integer ids"),
    "image twice": (lambda content: content["images"].append(dict(content["images"][0])), "id used twice in images"),
    "category twice": (lambda content: content["categories"].append({"id": 1, "name": "dog"}), "id used twice in categories"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_an_unusable_json_is_refused_and_the_doctor_names_the_entry(change, message, tmp_path, capsys):
    root = write_folder(tmp_path)
    edit_json(root, change)
    with pytest.raises(ValueError, match=message + "(.|\n)*tools.check_data"):
        data.CocoFolder(root)
    assert check_data.check(root) > 0
    assert "fatal" in capsys.readouterr().out


POLYGON = {"segmentation": [[5, 6, 15, 6]]}
FOUND = {
    "width": (image_entry(width=41), "error: wrong width or height", "0.jpg: json says 41x30, the file has 40x30"),
    "polygon": (annotation(**POLYGON), "error: malformed segmentation", "three points"),
    "rle size": (annotation(segmentation={"size": [40, 30], "counts": [1200]}), "error: malformed segmentation", "expected RLE size"),
    "rle sum": (annotation(segmentation={"size": [30, 40], "counts": [7]}), "error: malformed segmentation", "sum to 7"),
    "file": (lambda content: content["images"].append({"id": 11, "file_name": "x.jpg", "width": 4, "height": 4}), "error: missing file", "x.jpg"),
    "degenerate": (annotation(bbox=[1, 2, 0, 3]), "warning: degenerate box", "annotation 0 (image 10, 0.jpg)"),
    "outside": (annotation(bbox=[30, 2, 10, 33]), "warning: box leaves the image", "annotation 0"),
    "twice": (lambda content: content["annotations"].append({**content["annotations"][0], "id": 5}), "warning: duplicate annotation", "annotation 5"),
    "id twice": (lambda content: content["annotations"].append({**content["annotations"][0], "bbox": [1, 1, 9, 9]}),
                 "warning: id used twice in annotations", "id 0 stands 2 times"),
}


@pytest.mark.parametrize("change, kind, detail", FOUND.values(), ids=FOUND)
def test_the_doctor_names_every_problem_and_counts_only_errors(change, kind, detail, tmp_path, capsys):
    root = write_folder(tmp_path, boxes=[(0, 1, (5, 6, 10, 8)), *[(0, 1, (1, 1, 3 + k, 4)) for k in range(12)]])
    assert check_data.check(root) == 0
    edit_json(root, change)
    capsys.readouterr()
    errors = check_data.check(root)
    text = capsys.readouterr().out
    assert kind in text and detail in text
    assert errors == kind.startswith("error")
    assert len(data.CocoFolder(root)) >= 1                                 # none of these keeps the data from loading


def test_xyxy_boxes_detected(tmp_path, capsys):
    rng = np.random.default_rng(0)
    boxes = []
    for _ in range(30):
        x, y, w, h = (int(v) for v in (rng.integers(0, 25), rng.integers(0, 20), rng.integers(4, 15), rng.integers(4, 10)))
        boxes.append((0, 1, (x, y, w, h)))
    root = write_folder(tmp_path, boxes=boxes)
    assert check_data.check(root) == 0

    def to_corners(content):
        for row in content["annotations"]:
            x, y, w, h = row["bbox"]
            row["bbox"] = [x, y, x + w, y + h]

    edit_json(root, to_corners)
    assert check_data.check(root) == 1
    assert "boxes look like xyxy" in capsys.readouterr().out
    check_data.quick_check(data.CocoFolder(root))
    assert "boxes look like xyxy" in capsys.readouterr().out


def test_truncated_images_are_found_by_the_full_check_only(tmp_path, capsys):
    root = write_folder(tmp_path, [(40, 30)] * 2)
    truncate(root / "val2017" / "1.jpg")
    assert check_data.check(root, full=False) == 0 and check_data.check(root) == 1
    assert "unreadable image" in capsys.readouterr().out


def test_zero_annotations_refused(tmp_path, capsys):
    for boxes in ([], [(0, 1, (5, 6, 0, 8))], [(0, 1, (5, 6, 10, 8), {"iscrowd": 1})]):
        root = write_folder(tmp_path, boxes=boxes)
        with pytest.raises(ValueError, match="at least one usable box"):
            check_data.quick_check(data.CocoFolder(root))
        check_data.quick_check(data.CocoFolder(root, "val"), training=False)
        assert check_data.check(root) == 1
        assert "no usable box in the training set" in capsys.readouterr().out


def test_the_command_line_ends_with_the_verdict(tmp_path, monkeypatch, capsys):
    assert check_data.check(tmp_path) > 0
    for argv, code in ((["--write", str(tmp_path), "--num-train", "2", "--num_val", "1"], None),
                       (["--write", str(tmp_path)], 2), (["--wirte", str(tmp_path)], 2)):
        monkeypatch.setattr("sys.argv", ["scenes.py", *argv])
        if code is None:
            scenes.main()
            assert check_data.check(tmp_path) == 0
            continue
        with pytest.raises(SystemExit) as end:
            scenes.main()
        assert end.value.code == code
    capsys.readouterr()


# -------------------------------------------------------------------------------------------------------------------- real data

REAL = {"bccd": (205, 87, 1, 1), "nuclei": (140, 30, 0, 0), "coco_mini": (33, 24, 0, 0)}


@pytest.mark.parametrize("name", REAL)
def test_real_data_loads_as_its_json_says(name, shared, capsys):
    root = shared / "data" / name
    for split, images, degenerate in zip(("train", "val"), REAL[name][:2], REAL[name][2:]):
        content = json.loads((root / "annotations" / f"instances_{split}2017.json").read_text())
        dataset = data.CocoFolder(root, split)
        check_data.quick_check(dataset)
        assert len(dataset) == images and dataset.degenerate == degenerate and dataset.has_masks == (name != "bccd")
        ids = sorted(category["id"] for category in content["categories"])
        assert dataset.category_ids == ids and len(dataset.class_names) == len(content["categories"])
        for index in np.linspace(0, images - 1, 5).astype(int):
            image, target = dataset[int(index)]
            width, height = dataset.image(index).size
            expected = []
            for row in content["annotations"]:
                x, y, w, h = row["bbox"]
                if row["image_id"] == target["image_id"] and not row["iscrowd"] and w > 0 and h > 0:
                    x1, y1 = min(x + w, width), min(y + h, height)
                    expected.append([ids.index(row["category_id"]), (x + x1) / 2 / width, (y + y1) / 2 / height, (x1 - x) / width, (y1 - y) / height])
            got = torch.cat([target["labels"][:, None].double(), target["boxes"].double()], 1)
            np.testing.assert_allclose(got, np.array(expected).reshape(-1, 5), atol=1e-6)
            assert image.shape == (3, height, width)
    capsys.readouterr()


@pytest.mark.parametrize("name", REAL)
def test_perfect_predictions_on_real_data_score_one(name, shared, capsys):
    dataset = data.CocoFolder(shared / "data" / name, "val")
    results = perfect_results(dataset)
    assert average_precision(dataset, results, max_dets=400) == pytest.approx(1.0, abs=1e-9)


def test_the_doctor_passes_the_real_data_sets_with_warnings_only(shared, capsys):
    assert [check_data.check(shared / "data" / name, full=name == "coco_mini") for name in REAL] == [0, 0, 0]
    assert "annotation 2288 (image 343" in capsys.readouterr().out


def test_real_masks_cover_their_boxes_and_areas_after_a_resize(shared):
    for name in ("nuclei", "coco_mini"):
        dataset = data.CocoFolder(shared / "data" / name, "val", load_masks=True)
        dataset.transform = data.eval_transform(SimpleNamespace(eval_size=320, max_size=500))
        for index in range(4):
            image, target = dataset[index]
            height, width = target["size"].tolist()
            assert image.shape[1:] == (height, width) == target["masks"].shape[1:]
            for mask, (cx, cy, w, h) in zip(target["masks"], target["boxes"].tolist()):
                ys, xs = torch.where(mask)
                if len(xs) > 200:
                    box = [xs.min() / width, ys.min() / height, (xs.max() + 1) / width, (ys.max() + 1) / height]
                    np.testing.assert_allclose(box, [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], atol=0.012)
