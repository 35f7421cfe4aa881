"""The data path, each part against a slow and obvious way to do the same."""
import gc
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import data
import transforms
import scenes
from coco_folders import (POLYGON, annotation, average_precision, edit_json, epoch_of, json_file,
                          perfect_results, write_folder)
from engine import datasets, notices, workers
from engine.class_labels import match_classes
from engine.errors import UserError
from engine.recipe import Recipe
from tools import check_data

SMALL = Recipe(train_sizes=(128,), max_size=200, crop=False, color_jitter=True, eval_size=128)
PAPER = Recipe(train_sizes=tuple(range(480, 801, 32)), max_size=1333, crop=True,
               color_jitter=False, eval_size=800)
JITTER = replace(PAPER, color_jitter=True)
VERTICAL = replace(SMALL, vertical_flip=True)
FULL = Recipe(train_sizes=(64,), max_size=1333, crop=False, color_jitter=False, eval_size=64)


@pytest.fixture(autouse=True)
def every_notice_is_due():
    notices.forget_notices()


# ---------------------------------------------------------------------------------- transforms

def official_size(width, height, size, max_size):
    """The published rule, step by step on plain numbers."""
    if max_size is not None:
        low, high = float(min(width, height)), float(max(width, height))
        if high / low * size > max_size:
            size = int(round(max_size * low / high))
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
        expected = official_size(width, height, size, limit)
        assert transforms.resized_size(width, height, size, limit) == expected
    assert transforms.resized_size(640, 480, 800, 1333) == (1066, 800)
    assert transforms.resized_size(480, 640, 800, 1333) == (800, 1066)
    assert transforms.resized_size(1000, 300, 800, 1333) == (1333, 400)


def test_resize_equals_the_recorded_sizes_of_the_authors(golden):
    rows = golden("15_transforms_deformable_detr")["resize_rule"]
    for width, height, size, limit, new_height, new_width in rows.tolist():
        expected = (new_width, new_height)
        assert transforms.resized_size(width, height, size, limit or None) == expected


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def recorded_choices(case):
    """A recorded case -> Augmentation"""
    flip, window, sizes = False, None, []
    for choice in case["choices"]:
        if choice["op"] == "flip":
            flip = choice["done"]
        elif choice["op"] == "resize":
            sizes.append(choice["size"])
        elif choice["op"] == "crop":
            window = [choice[name] for name in ("left", "top", "width", "height")]
    if window:
        window = transforms.Crop(sizes[0], *window)
    return transforms.Augmentation(flip, window, sizes[-1])


def authors_nearest_pixels(new, old):
    """floor(index x old / new) in float32: the pixel that holds the upper left corner"""
    return np.floor(np.arange(new, dtype=np.float32) * np.float32(old / new)).astype(int)


@pytest.mark.parametrize("photo", [0, 1])
def test_transforms_equal_the_authors_on_photos_with_the_recorded_choices(photo, golden, shared,
                                                                          monkeypatch):
    recording = golden("15_transforms_deformable_detr")
    meta = json.loads(str(recording["meta_json"]))
    dataset = data.CocoFolder(shared / "data" / "coco_mini", "train", load_masks=True)
    index = dataset.image_ids.tolist().index(meta["photos"][photo]["image_id"])
    image = dataset.image(index)
    assert sha256(np.asarray(image)) == str(recording[f"p{photo}.decoded_sha256"])
    target = dataset.pixel_target(index, *image.size)
    transform = data.Transform(sizes=(800,), max_size=1333)
    for case in meta["cases"]:
        if case["photo"] != photo:
            continue
        name = f"p{photo}.{case['case']}"
        tensor, got = transform.apply(image, target, recorded_choices(case))
        labels = [dataset.category_ids[label] for label in got["labels"]]
        assert sha256(tensor.numpy()) == str(recording[f"{name}.float32_sha256"]), name
        assert labels == recording[f"{name}.labels"].tolist()
        assert got["size"].tolist() == recording[f"{name}.size"].tolist()
        np.testing.assert_allclose(got["boxes"], recording[f"{name}.boxes"], atol=1e-6)

        # Masks: only the rule of the nearest pixel differs.
        with monkeypatch.context() as patch:
            patch.setattr(transforms, "nearest_pixels", authors_nearest_pixels)
            masks = transform.apply(image, target, recorded_choices(case))[1]["masks"].numpy()
        assert masks.shape == tuple(recording[f"{name}.masks_shape"])
        assert sha256(np.packbits(masks.ravel())) == str(recording[f"{name}.masks_sha256"])
        assert (got["masks"].numpy() != masks).mean() < 0.005


def test_masks_are_resized_more_exactly_than_the_authors(monkeypatch):
    """The sizes stated in transforms.py: IoU of masks after a resize to 128 px and back."""
    dataset = scenes.Shapes("val", 60, load_masks=True)
    mean = {}
    for name, rule in (("ours", transforms.nearest_pixels), ("theirs", authors_nearest_pixels)):
        monkeypatch.setattr(transforms, "nearest_pixels", rule)
        ious = []
        for k in range(60):
            target = dataset.pixel_target(k, 160, 160)
            small = transforms.resize(dataset.image(k), target, (128, 128))[1]["masks"]
            if len(small):
                back = torch.nn.functional.interpolate(
                    torch.from_numpy(small)[None].float(), (160, 160), mode="bilinear")[0] > 0.5
                true = torch.from_numpy(target["masks"]) > 0
                ious.extend((back & true).sum((1, 2)) / (back | true).sum((1, 2)))
        mean[name] = np.mean(ious)
    assert mean["ours"] == pytest.approx(0.969, abs=5e-4)
    assert mean["theirs"] == pytest.approx(0.930, abs=5e-4)


def marked_image(width, height, box):
    """Black, with a white box (x0, y0, x1, y1), and its target."""
    pixels = np.zeros((height, width, 3), np.uint8)
    mask = np.zeros((1, height, width), np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = 255
    mask[:, y0:y1, x0:x1] = 1
    target = {"labels": np.array([7]), "boxes": np.array([box], float), "masks": mask}
    return Image.fromarray(pixels), target


@pytest.mark.parametrize("recipe", [SMALL, PAPER, JITTER, VERTICAL],
                         ids=["small", "paper", "jitter", "vertical"])
def test_boxes_and_masks_follow_the_pixels_through_every_augmentation(recipe):
    transform = data.train_transform(recipe, seed=1)
    flips, upside_down, cropped, lost = 0, 0, 0, 0
    for epoch in range(25):
        image, target = marked_image(300, 200, (20, 50, 90, 180))
        tensor, out = transform(image, target, epoch, 5)
        height, width = tensor.shape[1:]
        assert out["size"].tolist() == [height, width]
        if not len(out["labels"]):
            lost += 1
            continue
        assert out["masks"].shape == (1, height, width)
        corner = tensor[:, -1, -1] if out["masks"][0, 0, 0] else tensor[:, 0, 0]
        distance = (tensor - corner[:, None, None]).abs().sum(0)
        seen = distance > distance.max() / 2
        ys, xs = torch.where(seen)
        cx, cy, w, h = (out["boxes"][0] * torch.tensor([width, height, width, height])).tolist()
        found = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
        expected = torch.tensor([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
        assert (found - expected).abs().max() <= 1.5, (epoch, found, expected)
        assert (seen != out["masks"][0]).float().mean() < 0.02
        flips += cx > width / 2
        upside_down += cy < height / 2
        cropped += abs(w / width - 70 / 300) > 0.02
    assert 5 < flips < 20
    if not recipe.crop:      # a crop moves the center
        assert (5 < upside_down < 20) == recipe.vertical_flip
    assert (5 < cropped + lost < 20) == recipe.crop


def test_the_drawn_crop_window_follows_the_published_rule():
    image = scenes.Shapes("val", 1, size=300).image(0).resize((500, 310))
    boxes = np.array([[10.0, 20, 200, 300], [400, 5, 480, 60], [0, 0, 500, 310],
                      [490, 300, 499, 309]])
    for seed in range(15):
        choices = transforms.draw_crop(image.size, np.random.default_rng(seed))
        window, got = transforms.crop(image, {"labels": np.arange(4), "boxes": boxes}, choices)
        rng = np.random.default_rng(seed)                      # the same draws, by hand
        size = official_size(500, 310, int(rng.choice((400, 500, 600))), None)
        whole = image.resize(size, Image.Resampling.BILINEAR)
        width, height = (int(rng.integers(384, min(side, 600) + 1)) for side in size)
        left = int(rng.integers(0, size[0] - width + 1))
        top = int(rng.integers(0, size[1] - height + 1))
        reference = whole.crop((left, top, left + width, top + height))
        np.testing.assert_array_equal(np.asarray(window), np.asarray(reference))
        kept = []
        scale = np.tile([size[0] / 500, size[1] / 310], 2)
        for label, (x0, y0, x1, y1) in enumerate(boxes * scale):
            x0, x1 = max(x0 - left, 0), min(x1 - left, width)
            y0, y1 = max(y0 - top, 0), min(y1 - top, height)
            if x1 > x0 and y1 > y0:
                kept.append((label, x0, y0, x1, y1))
        np.testing.assert_array_equal(got["labels"], [row[0] for row in kept])
        expected = np.array([row[1:] for row in kept]).reshape(-1, 4)
        np.testing.assert_allclose(got["boxes"], expected, atol=1e-6)


def test_normalization_and_color_jitter_equal_the_plain_formula():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    colors = transforms.Colors(channels=(2, 0, 1), gain=1.1, shift=-0.05, invert=True)
    got = transforms.normalize(Image.fromarray(pixels), colors)
    for y in range(5):
        for x in range(7):
            for c, source in enumerate((2, 0, 1)):
                value = min(max((1 - pixels[y, x, source] / 255) * 1.1 - 0.05, 0), 1)
                expected = (value - (0.485, 0.456, 0.406)[c]) / (0.229, 0.224, 0.225)[c]
                assert abs(got[c, y, x].item() - expected) < 1e-5
    assert transforms.normalize(Image.fromarray(pixels)).dtype == torch.float32


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    dataset = scenes.Shapes("train", 6)
    dataset.transform = data.train_transform(SMALL, seed=4)
    first = [dataset[k][0] for k in range(6)]
    np.random.seed(9)
    torch.manual_seed(9)
    random.seed(9)
    assert all(torch.equal(first[k], dataset[k][0]) for k in reversed(range(6)))
    dataset.set_epoch(1)
    assert not any(torch.equal(first[k], dataset[k][0]) for k in range(6))


def test_evaluation_only_resizes_and_overfitting_does_not_augment():
    train, val = datasets.build_datasets(None, SMALL, 0, overfit=5, num_train=20)
    assert len(train) == len(val) == 5
    assert all(len(train[k][1]["labels"]) for k in range(5))
    for k in range(5):
        train.set_epoch(k)
        resized = val.image(k).resize((128, 128), Image.Resampling.BILINEAR)
        assert torch.equal(train[k][0], val[k][0])
        assert torch.equal(val[k][0], transforms.normalize(resized))


@pytest.mark.parametrize("size", [(16, 16), (1, 800), (800, 1), (7350, 150), (1, 1)])
def test_tiny_and_thin_images_pass_through_every_transform(size):
    width, height = size
    for recipe in (SMALL, PAPER):
        for transform in (data.train_transform(recipe), data.eval_transform(recipe)):
            for epoch in range(3):
                image, target = marked_image(width, height, (0, 0, max(width // 2, 1), height))
                tensor, out = transform(image, target, epoch, 0)
                assert min(tensor.shape[1:]) >= 1 and tensor.isfinite().all()
                assert out["masks"].shape[1:] == tensor.shape[1:]


# ------------------------------------------------------------------------------------- batches

def sample(height, width, index):
    return torch.full((3, height, width), float(index + 1)), {"index": index}


def test_collate_pads_right_and_below_with_zeros_and_marks_the_padding():
    images, padding, targets = data.collate([sample(4, 7, 0), sample(6, 5, 1)])
    assert images.shape == (2, 3, 6, 7) and padding.shape == (2, 6, 7)
    assert [t["index"] for t in targets] == [0, 1]
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


def test_samples_do_not_depend_on_the_number_of_workers_and_global_randomness_is_left_alone():
    dataset = scenes.Shapes("train", 16)
    dataset.transform = data.train_transform(SMALL, seed=2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    epochs = []
    for number in (0, 1, 2):
        for epoch in (1, 2):               # the workers of the second epoch know that it is
            dataset.set_epoch(epoch)
            loader = data.batches(dataset, [[3, 9, 1, 15], [0, 2, 4, 6], [5, 7]], number)
            epochs.append([(images, targets) for images, _, targets in loader])
    assert torch.equal(before, torch.get_rng_state())
    for k in (2, 4):
        for epoch in (0, 1):
            pairs = zip(epochs[epoch], epochs[k + epoch], strict=True)
            for (images, targets), (images_2, targets_2) in pairs:
                assert torch.equal(images, images_2)
                ids = [t["image_id"] for t in targets]
                assert ids == [t["image_id"] for t in targets_2]
                for t, u in zip(targets, targets_2):
                    assert torch.equal(t["boxes"], u["boxes"])


def run_alone(request):
    """Run a test in an interpreter of its own. -> whether that was done; False there

    After thousands of tests a worker inherits gigabytes, and what it copies of them when it touches
    them would hide its own memory."""
    if os.environ.get("TEST_ALONE"):
        return False
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", request.node.nodeid]
    done = subprocess.run(words, cwd=request.config.rootpath, capture_output=True, text=True,
                          env={**os.environ, "TEST_ALONE": "1"}, timeout=200)
    assert done.returncode == 0, done.stdout
    return True


def test_worker_memory_stays_flat_over_epochs(tmp_path, request):
    if run_alone(request):
        return
    polygons = [{"segmentation": [[0, 0, 5, 0, 5, k + 1]]} for k in range(9)]
    rows = [(k % 4, 1, (k % 20, k % 15, 5, 5), polygons[k % 9]) for k in range(20000)]
    write_folder(tmp_path, [(40, 30)] * 4, rows)
    dataset = data.CocoFolder(tmp_path, "train", load_masks=True)
    for name, value in vars(dataset).items():
        if name != "problems" and not isinstance(value, data.Annotations):
            assert not isinstance(value, (list, dict, tuple)) or len(value) <= 10, name
    for column in dataset.annotations:
        assert isinstance(column, np.ndarray) and column.dtype != object

    class Private(Numbers):
        """Reads all annotations like a worker does, and reports its private memory in KiB."""
        def __getitem__(self, index):
            for image in range(4):
                for text in dataset.objects(image).segmentations[:200]:
                    json.loads(text)
            gc.collect()                   # else it happens at an arbitrary sample
            with open(f"/proc/{os.getpid()}/smaps_rollup") as lines:
                private = [int(line.split()[1]) for line in lines if line.startswith("Private")]
            return torch.zeros(3, 1, 1), {"index": sum(private)}

    if not os.path.exists("/proc/self/smaps_rollup"):
        pytest.skip("no /proc here to read a process's memory from")
    memory = sum(epoch_of(data.batches(Private(60), [[k] for k in range(60)], workers=1)), [])
    assert memory[-1] - memory[10] < 2000, memory


def test_garbage_collection_in_a_worker_does_not_copy_the_memory_it_inherited(request):
    """A collection visits every object, and to visit an object is to write to its memory page."""
    if run_alone(request):
        return
    if not os.path.exists("/proc/self/smaps_rollup"):
        pytest.skip("no /proc here to read a process's memory from")
    inherited = [[k] for k in range(300_000)]

    class Private(Numbers):
        def __getitem__(self, index):
            gc.collect()
            with open(f"/proc/{os.getpid()}/smaps_rollup") as lines:
                private = [int(line.split()[1]) for line in lines if line.startswith("Private")]
            return torch.zeros(3, 1, 1), {"index": sum(private)}

    memory = epoch_of(data.batches(Private(1), [[0]], workers=1))[0][0]
    assert memory < 15_000 and len(inherited) == 300_000, memory


def test_a_program_that_breaks_off_reading_ends_with_its_workers():
    """They ignore the signal by which Python ends its children."""
    program = """
import gc
import data, scenes
dataset = scenes.Shapes("train", 8)
loader = iter(data.batches(dataset, [[0], [1], [2]], 1))
next(loader)
keep = [loader, loader.__next__]
keep.append(keep)
gc.freeze()
raise ValueError("broken off")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(data.__file__).parent,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: broken off"


class Stuck(Numbers):
    def __getitem__(self, index):
        time.sleep(3)


def test_workers_that_do_not_answer_end_in_one_line(monkeypatch):
    monkeypatch.setattr(data, "TIMEOUT", 1)
    with pytest.raises(UserError, match="expected a batch from 1 workers.*timed out") as error:
        epoch_of(data.batches(Stuck(1), [[0]], workers=1))
    assert "\n" not in str(error.value) and "--workers" in str(error.value)


class Dying(Numbers):
    def __getitem__(self, index):
        os._exit(9)


def test_a_worker_that_dies_ends_in_one_line():
    with pytest.raises(UserError, match="expected a batch from 1 workers.*exited") as error:
        epoch_of(data.batches(Dying(1), [[0]], workers=1))
    assert "\n" not in str(error.value)


def test_fewer_workers_read_where_the_shared_memory_is_small(monkeypatch, capfd):
    dataset = scenes.Shapes("train", 4)
    dataset.transform = data.train_transform(PAPER)
    needed = data.batch_bytes(dataset, 2)
    assert needed >= 2 * 3 * 4 * 800 * 1333
    for batches_free, expected in ((9, 4), (8.9, 3), (3, 1), (2.9, 0), (0, 0)):
        usage = SimpleNamespace(free=batches_free * needed)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        assert workers.affordable_workers(4, needed) == expected
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "4 workers need" in lines[0] and "--shm-size" in lines[0]
    assert epoch_of(data.batches(dataset, [[0, 1], [2]], workers=2)) == [[0, 1], [2]]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * needed))
    assert workers.affordable_workers(4, needed) == 2


def test_no_workers_read_where_their_sockets_have_too_long_names(monkeypatch, capfd):
    """They would hang: the error is raised in a thread of the worker."""
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", "/" + "x" * 60)
        assert workers.affordable_workers(2, 1) == 2
        patch.setattr(tempfile, "tempdir", "/" + "x" * 80)
        assert workers.affordable_workers(0, 1) == 0
        assert capfd.readouterr().err == ""
        assert workers.affordable_workers(2, 1) == 0
    assert "too long a name for the sockets of workers" in capfd.readouterr().err


def test_the_memory_of_a_batch_counts_masks():
    dataset = scenes.Shapes("train", 8, load_masks=True)
    dataset.transform = data.eval_transform(PAPER)
    with_masks = data.batch_bytes(dataset, 1)
    dataset.load_masks = False
    most = max(len(dataset.objects(k).labels) for k in range(8))
    assert with_masks - data.batch_bytes(dataset, 1) == most * 1333 ** 2


# ------------------------------------------------------------------------- COCO-layout folders

CATEGORIES = {"0-based": (0, 1, 2), "1-based": (1, 2, 3), "sparse": (1, 13, 90),
              "unsorted": (7, 2, 5), "one": (1,), "one-zero": (0,)}


@pytest.mark.parametrize("ids", CATEGORIES.values(), ids=CATEGORIES)
def test_category_ids(ids, tmp_path):
    names = [f"name {i}" for i in ids]
    boxes = [(0, i, (2 + 3 * k, 5, 10, 8)) for k, i in enumerate(ids)]
    boxes.append((1, ids[0], (1, 1, 20, 20)))
    root = write_folder(tmp_path, [(40, 30), (30, 40)], boxes, list(zip(ids, names)))
    dataset = data.CocoFolder(root, "val")
    dataset.transform = data.eval_transform(FULL)
    assert dataset.category_ids == sorted(ids)
    assert dataset.class_names == [f"name {i}" for i in sorted(ids)]
    results = perfect_results(dataset)
    assert sorted(row["category_id"] for row in results) == sorted(row[1] for row in boxes)
    labels = {label for k in range(2) for label in dataset[k][1]["labels"].tolist()}
    assert labels == set(range(len(ids)))
    assert average_precision(dataset, results) == pytest.approx(1.0)


def test_crowds_are_not_learned_and_are_regions_to_ignore(tmp_path):
    crowd = {"iscrowd": 1, "segmentation": {"size": [30, 40], "counts": [0, 600, 600]}}
    boxes = [(0, 1, (5, 6, 10, 8), {"segmentation": POLYGON}), (0, 1, (0, 0, 20, 30), crowd)]
    dataset = data.CocoFolder(write_folder(tmp_path, [(40, 30)], boxes), "val", load_masks=True)
    target = dataset[0][1]
    assert len(target["labels"]) == 1 and target["masks"].shape == (1, 30, 40)
    truth = dataset.coco()
    rows = truth.dataset["annotations"]
    assert [row["iscrowd"] for row in rows] == [0, 1]
    assert truth.annToMask(rows[1]).sum() == 600
    inside_the_crowd = {"image_id": 10, "category_id": 1, "bbox": [1, 16, 10, 12], "score": 1.0}
    results = [*perfect_results(dataset), inside_the_crowd]
    assert average_precision(dataset, results) == pytest.approx(1.0)


def test_polygons_and_both_kinds_of_rle_give_the_same_mask(tmp_path):
    grid = np.zeros((30, 40), np.uint8)
    grid[6:14, 5:15] = 1
    column_runs, value, run = [], 0, 0
    for pixel in grid.T.ravel().tolist():      # RLE counts run down the columns, zeros first
        if pixel != value:
            column_runs.append(run)
            value, run = pixel, 0
        run += 1
    compressed = coco_mask.encode(np.asfortranarray(grid))
    forms = [POLYGON, {"size": [30, 40], "counts": column_runs + [run]},
             {"size": [30, 40], "counts": compressed["counts"].decode()}]
    boxes = [(0, 1, (5, 6, 10, 8), {"segmentation": form}) for form in forms]
    root = write_folder(tmp_path, [(40, 30)], boxes)
    for mask in data.CocoFolder(root, load_masks=True)[0][1]["masks"]:
        np.testing.assert_array_equal(mask.numpy(), grid.astype(bool))


def test_a_data_set_without_masks_says_so_and_one_with_some_is_refused(tmp_path):
    none = data.CocoFolder(write_folder(tmp_path / "none"), load_masks=True)
    assert not none.has_masks and "masks" not in none[0][1]
    assert "segmentation" not in none.coco().dataset["annotations"][0]
    boxes = [(0, 1, (5, 6, 10, 8), {"segmentation": POLYGON}), (0, 1, (1, 1, 5, 5))]
    some = write_folder(tmp_path / "some", boxes=boxes)
    assert not data.CocoFolder(some).has_masks
    with pytest.raises(UserError, match="got 1 for 2 objects"):
        data.CocoFolder(some, load_masks=True)


def test_a_malformed_segmentation_stops_learning_masks_and_nothing_else(tmp_path):
    broken = {"segmentation": [[5, 6, 15, 6, float("nan"), 14]]}
    boxes = [(0, 1, (5, 6, 10, 8), {"segmentation": POLYGON}), (0, 1, (1, 1, 5, 5), broken)]
    root = write_folder(tmp_path, boxes=boxes)
    for split in ("train", "val"):
        with pytest.raises(UserError, match="got 2 for 2 objects, 1 malformed"):
            data.CocoFolder(root, split, load_masks=True)
        assert len(data.CocoFolder(root, split)[0][1]["labels"]) == 2
    val = data.CocoFolder(root, "val")
    assert not val.has_masks
    assert ["segmentation" in row for row in val.coco().dataset["annotations"]] == [True, False]


def test_degenerate_boxes_are_dropped_and_counted_and_the_others_clipped(tmp_path):
    boxes = [(5, 6, 10, 8), (5, 6, 0, 8), (5, 6, 4, -1), (40, 5, 9, 9), (-9, 2, 9, 9),
             (35, 20, 10, 20)]
    root = write_folder(tmp_path, boxes=[(0, 1, box) for box in boxes])
    dataset = data.CocoFolder(root, "val")
    assert dataset.degenerate == 4 and len(dataset.coco().dataset["annotations"]) == 2
    expected = [[10 / 40, 10 / 30, 10 / 40, 8 / 30], [37.5 / 40, 25 / 30, 5 / 40, 10 / 30]]
    np.testing.assert_allclose(dataset[0][1]["boxes"], expected, atol=1e-6)


def test_images_without_objects_stay(tmp_path):
    dataset = data.CocoFolder(write_folder(tmp_path, [(40, 30), (20, 50)]))
    image, target = dataset[1]
    assert image.shape == (3, 50, 20)
    assert target["boxes"].shape == (0, 4) and target["labels"].dtype == torch.int64


def test_objects_are_counted_by_image_and_class_without_crowds(tmp_path):
    boxes = [(0, 1, (1, 1, 5, 5)), (2, 2, (1, 1, 5, 5)), (2, 1, (2, 1, 5, 5)),
             (2, 1, (3, 1, 5, 5), {"iscrowd": 1})]
    root = write_folder(tmp_path, [(40, 30)] * 4, boxes, [(1, "cat"), (2, "dog"), (3, "cow")])
    dataset = data.CocoFolder(root)
    assert data.objects_per_image(dataset).tolist() == [1, 0, 2, 0]
    assert data.class_counts(dataset).tolist() == [2, 1, 0]


def test_missing_folder_and_json_are_named_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match="nowhere: expected a data folder.*no such.*--write"):
        data.CocoFolder(tmp_path / "nowhere")
    root = write_folder(tmp_path)
    (root / "train2017" / "0.jpg").unlink()
    with pytest.raises(UserError, match="train2017.*0.jpg.*put them there"):
        data.CocoFolder(root)
    json_file(root).write_text("[]")
    with pytest.raises(UserError, match="JSON object with images.*got a list"):
        data.CocoFolder(root)
    json_file(root).write_text("{")
    with pytest.raises(UserError, match="expected JSON"):
        data.CocoFolder(root)
    json_file(root, "val").unlink()
    with pytest.raises(UserError, match="though .*instances_train2017.json exists"):
        data.CocoFolder(root, "val")


UNUSABLE_JSON = {
    "deep nesting": '{"images": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "huge integer": '{"images": [{"id": ' + "9" * 5000 + "}]}",
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", UNUSABLE_JSON.values(), ids=UNUSABLE_JSON)
def test_a_json_that_cannot_be_parsed_ends_in_one_line(content, tmp_path):
    root = write_folder(tmp_path)
    json_file(root).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="expected JSON") as error:
        data.CocoFolder(root)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_explicit_paths_replace_the_layout(tmp_path):
    root = write_folder(tmp_path)
    json_file(root, "val").rename(root / "mine.json")
    (root / "val2017").rename(root / "pictures")
    dataset = data.CocoFolder(root, "val", annotations=root / "mine.json",
                              images=root / "pictures")
    assert dataset[0][0].shape == (3, 30, 40)


def test_the_layout_of_roboflow_is_read_as_it_is(tmp_path):
    root = write_folder(tmp_path / "coco")
    export = tmp_path / "export"
    for split, name in (("train", "train"), ("val", "valid")):
        shutil.copytree(root / f"{split}2017", export / name)
        shutil.copy(json_file(root, split), export / name / "_annotations.coco.json")
    shutil.copytree(export / "valid", export / "test")
    for split in ("train", "val", "test"):
        assert len(data.CocoFolder(export, split)[0][1]["labels"]) == 1
    assert check_data.check(export) == 0


def test_folders_named_train_and_val_are_read_as_they_are(tmp_path):
    root = write_folder(tmp_path)
    for split in ("train", "val"):
        (root / f"{split}2017").rename(root / split)
        json_file(root, split).rename(root / "annotations" / f"instances_{split}.json")
        assert len(data.CocoFolder(root, split)[0][1]["labels"]) == 1


@pytest.mark.parametrize("place", ["annotations/{}.json", "{}/annotations.json", "{}.json"])
def test_a_json_in_another_usual_place_is_read(place, tmp_path):
    root = write_folder(tmp_path)
    for split in ("train", "val"):
        (root / f"{split}2017").rename(root / split)
        json_file(root, split).rename(root / place.format(split))
        assert len(data.CocoFolder(root, split)[0][1]["labels"]) == 1


@pytest.mark.parametrize("layout, file", [("yolo", "data.yaml"), ("yolo", "labels/train/a.txt"),
                                          ("yolo", "train/labels/a.txt"),
                                          ("yolo", "obj.names"), ("yolo", "classes.txt"),
                                          ("yolo", "train/_darknet.labels"),
                                          ("voc", "Annotations/a.xml"), ("voc", "train/a.xml"),
                                          ("voc", "VOCdevkit/VOC2012/Annotations/a.xml"),
                                          ("csv", "labels.csv")])
def test_folders_in_other_layouts_are_recognized_and_the_converter_named(layout, file, tmp_path):
    path = tmp_path / "mine" / file
    path.parent.mkdir(parents=True)
    path.write_text("")
    command = f"python -m tools.convert --from {layout} .*mine OUT"
    with pytest.raises(UserError, match=f"{layout.upper()} layout.*{command}"):
        check_data.check(tmp_path / "mine")     # once, not for every split
    with pytest.raises(UserError, match=f"{layout.upper()} layout.*{command}"):
        data.CocoFolder(tmp_path / "mine")


@pytest.mark.parametrize("place", ["annotations/instances_default.json", "result.json"])
def test_a_json_that_is_not_divided_is_named_with_the_command_that_divides_it(place, tmp_path):
    path = tmp_path / "mine" / place
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(UserError, match=f"though .*{place} exists; .*--from coco .*mine OUT"):
        data.CocoFolder(tmp_path / "mine")


# --------------------------------------------------------------------- classes of train and val

PAIR = ((1, "cat"), (2, "dog"))
TWO_BOXES = [(0, 1, (5, 6, 10, 8)), (0, 2, (20, 6, 10, 8))]


def rename(*categories):
    """A change of all categories, (id, name) each."""
    rows = [{"id": number, "name": name} for number, name in categories]
    return lambda content: content.update(categories=rows)


def labels_by_place(dataset):
    """Left edge of each box -> its class name"""
    target = dataset.pixel_target(0, 40, 30)
    pairs = zip(target["boxes"][:, 0].tolist(), target["labels"])
    return {x: dataset.class_names[label] for x, label in pairs}


def test_classes_of_train_and_val_with_other_ids_are_matched_by_name(tmp_path):
    root = write_folder(tmp_path, boxes=TWO_BOXES, categories=PAIR)
    edit_json(root, rename((1, "dog"), (2, "cat")), "val")      # the first box of val is a dog
    train, val = datasets.build_datasets(root, FULL, 0)
    assert train.class_names == val.class_names == ["cat", "dog"]
    assert labels_by_place(val) == {5: "dog", 20: "cat"}
    assert val.category_ids == [2, 1] and train.category_ids == [1, 2]
    truth = val.coco().dataset
    assert [row["category_id"] for row in truth["annotations"]] == [1, 2]
    assert {row["id"]: row["name"] for row in truth["categories"]} == {1: "dog", 2: "cat"}
    assert average_precision(val, perfect_results(val)) == pytest.approx(1.0)
    assert any("matched by name" in problem.where for problem in val.problems)


def test_classes_that_val_does_not_list_get_ids_of_their_own(tmp_path):
    categories = ((1, "cow"), (2, "cat"), (3, "dog"))
    boxes = [(0, 2, (5, 6, 10, 8))]
    root = write_folder(tmp_path, boxes=boxes, categories=categories)
    edit_json(root, rename((1, "cat")), "val")
    edit_json(root, annotation(category_id=1), "val")
    val = datasets.build_datasets(root, FULL, 0)[1]
    assert val.class_names == ["cow", "cat", "dog"]
    assert val.category_ids[1] == 1 and len(set(val.category_ids)) == 3
    assert labels_by_place(val) == {5: "cat"}
    assert "missing in this split: ['cow', 'dog']" in val.problems[-1].where


def test_a_class_of_val_that_training_does_not_know_is_refused(tmp_path, capsys):
    root = write_folder(tmp_path, boxes=TWO_BOXES, categories=PAIR)
    edit_json(root, rename((1, "cat"), (2, "Dog")), "val")
    with pytest.raises(UserError, match="expected the training set's classes, got .'Dog'.*names"):
        datasets.build_datasets(root, FULL, 0)
    assert check_data.check(root) == 1
    assert "got ['Dog']" in capsys.readouterr().out


def test_two_classes_of_one_name_cannot_be_matched_by_name(tmp_path):
    root = write_folder(tmp_path, boxes=TWO_BOXES, categories=((1, "cat"), (2, "cat")))
    train, val = datasets.build_datasets(root, FULL, 0)         # the same ids: nothing to match
    assert val.category_ids == train.category_ids
    edit_json(root, rename((2, "cat"), (3, "cat")), "val")
    edit_json(root, annotation(category_id=3), "val")
    with pytest.raises(UserError, match="two classes share a name"):
        datasets.build_datasets(root, FULL, 0)


def test_generated_scenes_have_the_classes_of_their_training_set():
    train, val = datasets.build_datasets(None, SMALL, 0, num_train=2, num_val=2)
    assert not val.problems
    match_classes(val, train.class_names)
    assert not val.problems
    match_classes(val, train.class_names[::-1])
    assert "matched by name" in val.problems[-1].where
    assert val.class_names == train.class_names[::-1]
    assert val.category_ids == train.category_ids[::-1]


# ----------------------------------------------------------------------------------- real data

# images of train and val, degenerate boxes of train and val
REAL = {"bccd": (205, 87, 1, 1), "nuclei": (140, 30, 0, 0), "coco_mini": (33, 24, 0, 0)}


@pytest.mark.parametrize("name", REAL)
def test_real_data_loads_as_its_json_says(name, shared, capsys):
    root = shared / "data" / name
    for split, count, degenerate in zip(("train", "val"), REAL[name][:2], REAL[name][2:]):
        content = json.loads(json_file(root, split).read_text())
        dataset = data.CocoFolder(root, split)
        check_data.quick_check(dataset)
        assert len(dataset) == count and dataset.degenerate == degenerate
        assert dataset.has_masks == (name != "bccd")
        ids = sorted(category["id"] for category in content["categories"])
        assert dataset.category_ids == ids
        assert len(dataset.class_names) == len(content["categories"])
        for index in np.linspace(0, count - 1, 5).astype(int):
            image, target = dataset[int(index)]
            width, height = dataset.image(index).size
            expected = []
            for row in content["annotations"]:
                x, y, w, h = row["bbox"]
                if row["image_id"] != target["image_id"] or row["iscrowd"] or w <= 0 or h <= 0:
                    continue
                x1, y1 = min(x + w, width), min(y + h, height)
                expected.append([ids.index(row["category_id"]), (x + x1) / 2 / width,
                                 (y + y1) / 2 / height, (x1 - x) / width, (y1 - y) / height])
            got = torch.cat([target["labels"][:, None].double(), target["boxes"].double()], 1)
            np.testing.assert_allclose(got, np.array(expected).reshape(-1, 5), atol=1e-6)
            assert image.shape == (3, height, width)
    capsys.readouterr()


@pytest.mark.parametrize("name", REAL)
def test_perfect_predictions_on_real_data_score_one(name, shared, capsys):
    dataset = data.CocoFolder(shared / "data" / name, "val")
    results = perfect_results(dataset)
    assert average_precision(dataset, results, max_dets=400) == pytest.approx(1.0, abs=1e-9)


def test_real_masks_cover_their_boxes_and_areas_after_a_resize(shared):
    recipe = SimpleNamespace(eval_size=320, max_size=500, augment="paper")
    for name in ("nuclei", "coco_mini"):
        dataset = data.CocoFolder(shared / "data" / name, "val", load_masks=True)
        dataset.transform = data.eval_transform(recipe)
        for index in range(4):
            image, target = dataset[index]
            height, width = target["size"].tolist()
            assert image.shape[1:] == (height, width) == target["masks"].shape[1:]
            for mask, (cx, cy, w, h) in zip(target["masks"], target["boxes"].tolist()):
                ys, xs = torch.where(mask)
                if len(xs) > 200:
                    box = [xs.min() / width, ys.min() / height,
                           (xs.max() + 1) / width, (ys.max() + 1) / height]
                    expected = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
                    np.testing.assert_allclose(box, expected, atol=0.012)
