"""Speed of what surrounds a model: reading images, and computing AP."""
import contextlib
import io
import tempfile
from pathlib import Path

import torch
from torch.utils import benchmark

import dino
import scenes
from data import batches
from engine.datasets import build_datasets
from engine.recipe import configure
from engine.scoring import score
from eval import coco_results
from tools.timing import median_ms, show_progress, write_table

BATCH = 2                # images of a batch of the loading table
DETECTIONS = 100         # an image of the scoring table, about


def loading(data: str = "", images: int = 256, workers: tuple[int, ...] = (0, 1, 2, 4)):
    """Count the augmented training images that arrive in a second.

    Generated scenes at the small size, and a COCO-layout folder at the published size.

    Args:
        data: COCO-layout folder; default: generated scenes written as files.
        images: Images that are read for each figure.
        workers: Numbers of data-loading processes.
    """
    small = configure(dino, dino.SMALL)[1]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if not data:
            with contextlib.redirect_stdout(io.StringIO()):
                scenes.write_scenes(folder, images, 1)
        name = Path(data).name or "scenes as files"
        sources = (("generated scenes, small preset", "", small),
                   (f"{name}, published preset", data or folder, dino.RECIPE))
        for title, source, recipe in sources:
            dataset, _ = build_datasets(source, recipe, seed=0, num_train=images, num_val=1)
            for count in workers:
                speed = images_per_second(dataset, images, count)
                rows.append([title, count, f"{speed:.0f}"])
                show_progress(rows[-1])
    notes = [f"{images} images once, batches of {BATCH}, starting the workers included."]
    write_table("loading", "cpu", ("images", "workers", "images/s"), rows, notes)


def images_per_second(dataset, count, workers) -> float:
    places = [k % len(dataset) for k in range(count)]
    indices = [places[k:k + BATCH] for k in range(0, count, BATCH)]
    begin = benchmark.timer()
    for _ in batches(dataset, indices, workers):
        pass
    return count / (benchmark.timer() - begin)


def scoring(images: int = 500, seconds: float = 2.0):
    """Time COCO AP on generated scenes: every object detected with a shifted box, about 100
    detections an image.

    Args:
        images: Number of images.
        seconds: How long it is measured; the median is reported.
    """
    dataset = scenes.Shapes("val", images)
    truth = dataset.coco()
    generator = torch.Generator().manual_seed(0)
    results = []
    for image in truth.dataset["images"]:
        boxes = [row["bbox"] for row in truth.imgToAnns[image["id"]]]
        detection = shifted(boxes, len(dataset.class_names), generator)
        results += coco_results([detection], [image["id"]], dataset.category_ids)
    total = median_ms(lambda: score(truth, results), seconds)
    columns = ("images", "detections", "seconds", "ms an image")
    row = [images, len(results), f"{total / 1e3:.2f}", f"{total / images:.2f}"]
    write_table("scoring", "cpu", columns, [row])


def shifted(boxes, num_classes, generator) -> dict:
    """DETECTIONS copies of boxes (x, y, w, h), shifted by a tenth of their size, with random scores
    and labels, as `detect` gives them."""
    boxes = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    boxes = boxes.repeat(-(-DETECTIONS // max(1, len(boxes))), 1)[:DETECTIONS]   # (100, 4)
    count = len(boxes)
    noise = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    corners = boxes + 0.1 * boxes[:, 2:].repeat(1, 2) * noise                    # x, y, w, h
    corners[:, 2:] += corners[:, :2]                                             # x, y, x, y
    return {"boxes": corners, "scores": torch.rand(count, generator=generator),
            "labels": torch.randint(num_classes, (count,), generator=generator)}
