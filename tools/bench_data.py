"""Speed of what surrounds a model: reading images, and computing AP."""
import contextlib
import io
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from torch.utils import benchmark

import dino
import scenes
from data import batches
from engine.datasets import build_datasets
from engine.recipe import configure
from engine.scoring import score
from eval import coco_results
from tools.timing import peak_gib, show_progress, write_table

BATCH = 2                # images of a batch of the loading table
OBJECTS = 7              # of an image of the scoring table, on average, as in COCO
SIDE = 640               # of its images, px


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
    """How fast `count` samples arrive in batches; a smaller data set is read several times."""
    places = [k % len(dataset) for k in range(count)]
    indices = [places[k:k + BATCH] for k in range(0, count, BATCH)]
    begin = benchmark.timer()
    for _ in batches(dataset, indices, workers):
        pass
    return count / (benchmark.timer() - begin)


@dataclass
class Case:
    """Results that are scored, and how often."""
    images: int
    detections: int      # of each image
    classes: int
    repeats: int


def scoring(images: int = 1000, detections: int = 300, classes: int = 80,
            processes: tuple[int, ...] = (1, 2), repeats: int = 3):
    """Time COCO AP of results as DINO makes them on COCO, shared among processes.

    Each process has the results of its own images. The time runs from these results to the figures
    of all images. CPU time is that of the busiest process: the same on an idle machine, and more
    reliable on a busy one. `peak` is the memory of the largest process.

    Args:
        images: Number of images; COCO's validation set has 5000.
        detections: Detections of each image.
        classes: Number of classes.
        processes: Numbers of processes, each on a core of its own.
        repeats: How often each is timed; the median is reported.
    """
    case = Case(images, detections, classes, repeats)
    rows = []
    for world in processes:
        seconds, cpu_seconds, gib, ap = time_processes(case, world)
        rows.append([world, images, images * detections, f"{seconds:.2f}", f"{cpu_seconds:.2f}",
                     f"{gib:.2f}", f"{ap:.10f}"])
        show_progress(rows[-1])
    columns = ("processes", "images", "detections", "seconds", "CPU s", "peak GiB", "AP")
    write_table("scoring", "cpu", columns, rows)


def time_processes(case, world) -> tuple[float, float, float, float]:
    """Score in `world` processes at the same time
    -> median seconds, median CPU seconds of the busiest process, peak GiB of a process, AP"""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world, context) as pool:
        store = f"file://{folder}/store"
        parts = [pool.submit(score_share, case, rank, world, store) for rank in range(world)]
        answers = [part.result() for part in parts]
    times, cpu_times, peaks, aps = zip(*answers)
    slowest = [max(turn) for turn in zip(*times)]
    busiest = [max(turn) for turn in zip(*cpu_times)]
    assert len(set(aps)) == 1, aps
    return statistics.median(slowest), statistics.median(busiest), max(peaks), aps[0]


def score_share(case, rank, world, store) -> tuple[list[float], list[float], float, float]:
    """Score as one of several processes -> seconds and CPU seconds of each repetition, peak GiB,
    AP"""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", store, rank=rank, world_size=world)
    truth, results = simulated_results(case, range(rank, case.images, world))
    seconds = []
    cpu_seconds = []
    for _ in range(case.repeats):
        if world > 1:
            dist.barrier()
        begin = benchmark.timer()
        cpu_begin = time.process_time()
        figures = score(truth, results, rank=rank, world=world)
        seconds.append(benchmark.timer() - begin)
        cpu_seconds.append(time.process_time() - cpu_begin)
    if world > 1:
        dist.destroy_process_group()
    return seconds, cpu_seconds, peak_gib(), figures["AP"]


def simulated_results(case, image_ids) -> tuple[COCO, list[dict]]:
    """Ground truth and results of these images, always the same for the same image."""
    categories = [{"id": k + 1, "name": str(k)} for k in range(case.classes)]
    category_ids = [category["id"] for category in categories]
    images = []
    annotations = []
    results = []
    for image_id in image_ids:
        rng = np.random.default_rng(image_id)
        count = rng.poisson(OBJECTS)
        sides = np.exp(rng.uniform(np.log(8), np.log(SIDE / 2), (count, 2)))   # px
        boxes = np.concatenate([rng.uniform(0, SIDE / 2, (count, 2)), sides], 1)
        labels = rng.integers(case.classes, size=count)
        for box, label in zip(boxes, labels):
            annotations.append({"id": len(annotations) + 1, "image_id": image_id,
                                "category_id": category_ids[label], "bbox": box.tolist(),
                                "area": float(box[2] * box[3]), "iscrowd": 0})
        images.append({"id": image_id, "height": SIDE, "width": SIDE})
        detections = simulated_detections(boxes, labels, case, rng)
        results += coco_results([detections], [image_id], category_ids)
    truth = COCO()
    truth.dataset = {"images": images, "annotations": annotations, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth, results


def simulated_detections(boxes, labels, case, rng) -> dict:
    """Detections as `detect` gives them: copies of the boxes (x, y, w, h) shifted by a tenth of
    their size, half of them with the right class; random scores."""
    if not len(boxes):     # an image without objects: all its detections are false alarms
        boxes = np.array([[0.0, 0.0, SIDE, SIDE]])
        labels = np.array([0])
    source = rng.integers(len(boxes), size=case.detections)
    shifts = 0.1 * rng.normal(size=(case.detections, 4)) * np.tile(boxes[source, 2:], 2)
    corners = boxes[source] + shifts                                             # x, y, w, h
    corners[:, 2:] = corners[:, :2] + corners[:, 2:].clip(1)                     # x, y, x, y
    random_labels = rng.integers(case.classes, size=case.detections)
    right = rng.random(case.detections) < 0.5
    return {"boxes": torch.from_numpy(corners),
            "scores": torch.from_numpy(rng.random(case.detections)),
            "labels": torch.from_numpy(np.where(right, labels[source], random_labels))}
