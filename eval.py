"""COCO AP of a checkpoint, and detections on your own images.

Examples:
    python eval.py --checkpoint runs/dino                          AP on the data of the run
    python eval.py --checkpoint FILE --data DIR                    AP on another COCO-layout folder
    python eval.py --checkpoint FILE --json image_info_test.json   detections for a test server
    python eval.py --checkpoint FILE --images a.jpg photos/        pictures, tables, counts
    python eval.py --checkpoint FILE --images a.jpg --tile 640     small objects in large images
    torchrun --nproc_per_node 8 eval.py --checkpoint FILE          processes share the images

AP, AP50, AP75 and the size bands are pycocotools' figures, for boxes and, where detections carry
masks, for masks. -1 in eval.json means "no such object"; the printed table shows it as "-".

From an image to AP: `detect` gives corner boxes in pixels of the original image and labels in
0..N-1; `coco_results` turns them into what a COCO json holds (x, y, w, h, the category id of the
json, compressed RLE); `score` compares the results with the ground truth of `dataset.coco()`.
"""
import contextlib
import csv
import glob
import json
import re
import sys
import time
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from pycocotools import mask as rle
from torch import nn
from tqdm import tqdm

import visualize
from data import DetectionData
from engine import commands, files, lvis
from engine.commands import open_detector
from engine.coco_json import json_problems, read_json, refuse_fatal
from engine.errors import UserError, user_errors
from engine.images import SUFFIXES, UnreadableImage, read_image
from engine.inference import (above, allow_detections, class_thresholds, detect_image,
                              detect_on_canvas, predict, reaches, require_finite)
from engine.layers import prepare_attention
from engine.machine import lost_peers, prepare_cpu
from engine.processes import gather
from engine.scoring import score
from engine.tiles import detect_tiled, refuse_masks

__all__ = ["detect_image", "evaluate", "open_detector", "score"]
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# the kinds of figures and their names in short; segm_cls: masks ranked without their own score
KINDS = {"bbox": "AP", "segm": "mask AP", "segm_cls": "by class score"}
# data set -> its ground truth for pycocotools, made once: training evaluates after every epoch
_TRUTHS = weakref.WeakKeyDictionary()


# ---- AP ------------------------------------------------------------------------------------------

def evaluate(model: nn.Module, detect, dataset: DetectionData, cfg, device: str | torch.device,
             batch_size: int = 1, max_dets: int = 0, amp: bool = False, workers: int = 0,
             rank: int = 0, world: int = 1) -> dict:
    """AP of a model on a data set.

    detect: the paper file's. max_dets: see `limit_of`. With `world` processes each rank runs and
    matches every world-th image; all ranks return the same figures, those of a single process. The
    model's training mode is restored. UserError, on every rank, where detections are not finite.

    -> {"bbox": figures, "segm": figures (with masks), "segm_cls": the same masks ranked by the
    score of their box (where they have scores of their own), "images", "seconds", "score_seconds"},
    figures as in `engine.scoring.score`."""
    start = time.perf_counter()
    max_dets = limit_of(dataset, max_dets)
    cfg = allow_detections(model, cfg, max_dets)
    results = collect_results(model, detect, dataset, cfg, device, batch_size, amp, workers, rank,
                              world)
    scoring = time.perf_counter()
    metrics = score_results(dataset, results, max_dets, rank, world)
    for kind in metrics.values():
        del kind["curves"]         # too long for the log of a run
    end = time.perf_counter()
    return {**metrics, "images": len(dataset), "seconds": end - start,
            "score_seconds": end - scoring}


def limit_of(dataset, max_dets: int = 0) -> int:
    """How many detections count: `max_dets`, 0 for 100 of each image and class, as COCO's figures
    have it, or on LVIS 300 of each image."""
    return max_dets or (lvis.LIMIT if dataset.federated else 100)


@torch.no_grad()
def collect_results(model, detect, dataset, cfg, device, batch_size=1, amp=False, workers=0,
                    rank=0, world=1):
    """Detect on this rank's images, every world-th -> COCO results, see `coco_results`."""
    results = []
    indices = range(rank, len(dataset), world)
    with errors_of_all_ranks(world):
        for outputs, targets in predict(model, dataset, indices, device, batch_size, amp, workers):
            sizes = torch.stack([target["orig_size"] for target in targets])   # (B, 2), h and w
            canvas = torch.stack([target["canvas_size"] for target in targets])    # (B, 2)
            detections = detect_on_canvas(detect, outputs, canvas.to(device), sizes, cfg)
            image_ids = [target["image_id"] for target in targets]
            results += coco_results(detections, image_ids, dataset.category_ids)
    return results


def collect_tiled(detector, dataset, options, rank=0, world=1):
    """`collect_results` from tiles of this rank's images."""
    results = []
    with errors_of_all_ranks(world):
        for index in tqdm(range(rank, len(dataset), world), leave=False, disable=None):
            _, image = dataset.load_or_substitute(index)
            found = detect_tiled(detector, image, options.tile, options.overlap, options.amp)
            results += coco_results([found], [dataset.image_ids[index]], dataset.category_ids)
    return results


@contextlib.contextmanager
def errors_of_all_ranks(world):
    """One rank's UserError is raised on all: none waits for results that never come."""
    error = None
    try:
        yield
    except UserError as caught:
        error = caught
    errors = [e for e in gather(error, world) if e is not None]
    if errors:
        raise errors[0]


def score_results(dataset, results, max_dets=100, rank=0, world=1):
    """The results of this rank's images -> {"bbox": figures, ...} of all ranks, see `evaluate`,
    with the `curves` of every class."""
    if dataset.federated:
        return federated_results(dataset, results, max_dets, rank, world)
    truth = ground_truth(dataset, rank, world)
    metrics = {"bbox": score(truth, results, "bbox", max_dets, rank, world)}
    keys = set()    # of all ranks: one may have no detections
    for own in gather({key for row in results for key in row}, world):
        keys |= own
    if dataset.has_masks and "segmentation" in keys:
        ranked = [{**row, "score": row.get("mask_score", row["score"])} for row in results]
        metrics["segm"] = score(truth, ranked, "segm", max_dets, rank, world)
        if "mask_score" in keys:
            metrics["segm_cls"] = score(truth, results, "segm", max_dets, rank, world)
    return metrics


def federated_results(dataset, results, max_dets, rank=0, world=1):
    """`score_results` for LVIS: the first process scores the results of all."""
    shares = gather(results, world)
    metrics = None
    with errors_of_all_ranks(world):
        if rank == 0:
            everything = [row for share in shares for row in share]
            truth = ground_truth(dataset).dataset
            metrics = {"bbox": lvis.score(truth, everything, "bbox", max_dets)}
            if dataset.has_masks and any("segmentation" in row for row in everything):
                ranked = [{**row, "score": row.get("mask_score", row["score"])}
                          for row in everything]
                metrics["segm"] = lvis.score(truth, ranked, "segm", max_dets)
    return gather(metrics, world)[0]


def ground_truth(dataset, rank=0, world=1):
    """The ground truth of this rank's images as a pycocotools COCO."""
    shares = _TRUTHS.setdefault(dataset, {})
    if (rank, world) not in shares:
        rows = list(range(rank, len(dataset), world))
        share = dataset if world == 1 else dataset.subset(rows)
        shares[rank, world] = share.coco()
    return shares[rank, world]


def coco_results(detections: list[dict], image_ids: list[int],
                 category_ids: list[int]) -> list[dict]:
    """Detections in COCO's results format, a list of {image_id, category_id, bbox, score}.

    detections: one {scores (k,), labels (k,), boxes (k, 4) xyxy px, masks (k, h, w) or k RLEs
    (optional)} per image; category_ids[label] is the category's id in the json. bbox is
    [x, y, w, h] in px. Masks become `segmentation`, a compressed RLE whose counts are text, so that
    the list can be written as json; `mask_scores` (k,), where masks have their own, become
    `mask_score`. UserError for detections that are not finite."""
    results = []
    for detection, image_id in zip(detections, image_ids, strict=True):
        require_finite(detection, f"image {int(image_id)}")
        corners = detection["boxes"].cpu().double()                            # (k, 4)
        sides = corners[:, 2:] - corners[:, :2]                                # (k, 2)
        columns = {"bbox": torch.cat([corners[:, :2], sides], 1).tolist(),
                   "score": detection["scores"].tolist()}
        if "masks" in detection:
            columns["segmentation"] = encode_masks(detection["masks"])
        if "mask_scores" in detection:
            columns["mask_score"] = detection["mask_scores"].tolist()
        labels = detection["labels"].tolist()
        for label, *values in zip(labels, *columns.values(), strict=True):
            row = {"image_id": int(image_id), "category_id": category_ids[label]}
            results.append(row | dict(zip(columns, values)))
    return results


def encode_masks(masks):
    """Masks (k, h, w), bool, or k RLEs -> k compressed RLEs {size [h, w], counts text}."""
    if isinstance(masks, torch.Tensor):
        pixels = masks.to(torch.uint8).permute(1, 2, 0).cpu().numpy()          # (h, w, k)
        masks = rle.encode(np.asfortranarray(pixels)) if len(masks) else []
    encoded = []
    for mask in masks:
        counts = mask["counts"]
        text = counts.decode("ascii") if isinstance(counts, bytes) else counts
        encoded.append({"size": [int(side) for side in mask["size"]], "counts": text})
    return encoded


def table(metrics: dict, classes: bool = True) -> str:
    """The figures of `evaluate` as text: one line per kind, then (`classes`) one line per class."""
    kinds = [kind for kind in KINDS if kind in metrics]
    recalls = [key for key in metrics["bbox"] if re.fullmatch(r"AR\d+", key)]
    rarity = [name for name in ("APr", "APc", "APf") if name in metrics["bbox"]]
    columns = (*COLUMNS, *rarity, *sorted(recalls, key=lambda name: int(name[2:])))
    lines = [" " * 8 + "".join(f"{name:>8}" for name in columns)]
    for kind in kinds:
        cells = [cell(metrics[kind][name]) for name in columns]
        lines.append(f"{kind:8}" + "".join(cells))
    if classes:
        lines += ["", *class_table(metrics, kinds)]
    return "\n".join(lines)


def class_table(metrics, kinds):
    """AP, AP50 and number of objects of each class, as lines."""
    per_class = metrics["bbox"]["per_class"]
    width = max(map(len, per_class), default=0) + 2
    columns = [(kind, name) for kind in kinds for name in ("AP", "AP50")]
    heads = [f"{kind + ' ' + name:>14}" for kind, name in columns]
    lines = [f"{'class':{width}}{'objects':>8}" + "".join(heads)]
    for name, row in per_class.items():
        cells = [cell(metrics[kind]["per_class"][name][column], 14) for kind, column in columns]
        lines.append(f"{name:{width}}{row['objects']:>8}" + "".join(cells))
    return lines


def threshold_table(metrics):
    """For each class the threshold with the best F1, as text."""
    per_class = metrics["bbox"]["per_class"]
    width = max(map(len, per_class), default=0) + 2
    columns = ("threshold", "precision", "recall", "F1")
    lines = ["threshold of the best F1 for each class, boxes at IoU 0.5:",
             " " * width + "".join(f"{name:>11}" for name in columns)]
    for name, row in per_class.items():
        lines.append(f"{name:{width}}" + "".join(cell(row[column], 11) for column in columns))
    return "\n".join(lines)


def thresholds(metrics: dict) -> dict[str, float]:
    """{class name: threshold with the best F1} for classes that were detected at all.

    train.py stores it in best.pt, where --images finds it."""
    per_class = metrics["bbox"]["per_class"]
    return {name: row["threshold"] for name, row in per_class.items() if row["threshold"] > 0}


def cell(value, width=8):
    return f"{'-':>{width}}" if value == -1 else f"{value:>{width}.3f}"


# ---- your own images -----------------------------------------------------------------------------

def find_images(patterns: list[str]) -> list[Path]:
    """Files, folders and glob patterns -> image files, sorted within each, none twice. UserError
    names what matched nothing."""
    found = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_file():
            matching = [path]
        elif path.is_dir() and pattern.strip():      # Path("") would be the current folder
            matching = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES]
        else:
            names = map(Path, glob.glob(pattern, recursive=True))
            matching = [file for file in names if file.suffix.lower() in SUFFIXES]
        if not matching:
            raise UserError("--images: expected an image file, a folder of images or a pattern, "
                            f"got {pattern!r}, which matches none ({', '.join(sorted(SUFFIXES))})")
        found.update(dict.fromkeys(sorted(matching)))
    return list(found)


def image_ids(paths: list[Path], listed: list[dict] | None = None) -> list[int]:
    """Image ids of files, for the results json.

    listed: the `images` of a COCO json; ids are then those of its file names, and a file that it
    does not list is a UserError. Without it, file names that are all different numbers are the ids,
    as in COCO; otherwise 1, 2, 3, ..."""
    if listed is not None:
        return [listed_id(path, listed) for path in paths]
    numbers = [int(path.stem) for path in paths if path.stem.isdecimal()]
    return numbers if len(set(numbers)) == len(paths) else list(range(1, len(paths) + 1))


def listed_id(path, listed):
    """The id of a file in the `images` of a COCO json. UserError where not exactly one entry has
    its name; folders in `file_name` must agree where names alone do not tell."""
    entries = [image for image in listed if Path(image["file_name"]).name == path.name]
    if len(entries) > 1:
        location = path.as_posix()
        entries = [image for image in entries if location.endswith("/" + image["file_name"])]
    if len(entries) != 1:
        raise UserError(f"--json: expected one entry for {path} among the {len(listed)} images of "
                        f"the json, got {len(entries)}")
    return entries[0]["id"]


def read_listing(path, meta):
    """A COCO json for the ids of --images -> its images, category id of each class of the model.

    Classes are matched by name. UserError where the json lacks one."""
    listing = read_json(path)
    listing.setdefault("annotations", [])
    refuse_fatal(path, json_problems(listing))
    ids = {category["name"]: category["id"] for category in listing["categories"]}
    lacking = [name for name in meta["class_names"] if name not in ids]
    if lacking:
        raise UserError(f"--json: expected the classes of the model in {path}, got none called "
                        f"{', '.join(lacking[:5])}")
    return listing["images"], [ids[name] for name in meta["class_names"]]


def detect_images(paths, ids, detect, class_names, category_ids, out, thresholds,
                  boxes_only=False):
    """Detect on image files and write what was found into the folder `out`.

    detect: a PIL image -> its detections, such as `detect_image`.

    NAME.jpg            each image with its detections of at least the score thresholds[label]
    detections.json     COCO results, the `cfg.top_k` best of each image with file and class names
    detections.csv      file, class, score, x, y, w, h of the drawn detections, px
    counts.csv          for each image the number of objects of each class, and their sum

    Files that are no complete image are named and skipped. -> the number of images read"""
    results = []
    boxes = []
    counts = {}
    for path, image_id in zip(paths, ids, strict=True):
        try:
            image = read_image(path)
        except UnreadableImage as error:
            print(f"skipped {error}", file=sys.stderr)
            continue
        detection = detect(image)
        labels = detection["labels"].tolist()
        drawn = reaches(detection, thresholds).tolist()                        # k bool
        shown = above(detection, thresholds)
        names = [class_names[label] for label in shown["labels"].tolist()]
        counts[path] = Counter(names)

        rows = coco_results([detection], [image_id], category_ids)
        for row, label, is_drawn in zip(rows, labels, drawn, strict=True):
            results.append({**row, "file_name": path.name, "category_name": class_names[label]})
            if is_drawn:
                x, y, w, h = (round(value, 1) for value in row["bbox"])
                score = round(row["score"], 4)
                boxes.append((str(path), class_names[label], score, x, y, w, h))
        picture = visualize.draw_detections(image, shown, class_names)
        visualize.save_picture(picture, picture_path(out, path, image_id, counts))
        found = ", ".join(f"{count} {name}" for name, count in counts[path].items())
        print(f"{path}: {found or 'nothing'}")

    write_results(out / "detections.json", results, boxes_only)
    write_csv(out / "detections.csv", ("file", "class", "score", "x", "y", "w", "h"), boxes)
    lines = []
    for path, count in counts.items():
        lines.append((path, *(count[name] for name in class_names), sum(count.values())))
    write_csv(out / "counts.csv", ("file", *class_names, "all"), lines)
    return len(counts)


def picture_path(out, path, image_id, earlier):
    """Where the picture of an image goes: its name, with the id where that name is used already."""
    used = [other.stem for other in earlier if other != path]
    return out / (f"{path.stem}_{image_id}.jpg" if path.stem in used else f"{path.stem}.jpg")


def write_csv(path, head, rows):
    with files.complete_file(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([head, *rows])


# ---- command line --------------------------------------------------------------------------------

@dataclass
class Options:
    """COCO AP of a checkpoint, or detections on your own images."""
    # best.pt of a run, its folder, released weights, their address, or a name of assets/weights
    checkpoint: str
    data: str = ""               # COCO-layout folder; none: the data of the checkpoint's own run
    # COCO json to use instead of the folder's annotations/instances_val2017.json. Without
    # annotations in it, only detections.json is written. With --images: where the image ids are
    json: str = ""
    # detect on these image files, folders or glob patterns instead of evaluating
    images: Annotated[list[str] | None, tyro.conf.arg(metavar="PATH [PATH ...]")] = None
    # with --images: minimum score to draw and to list; None: for each class the one with the best
    # F1 at the last evaluation in training, else 0.3
    score_threshold: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    # maximum detections in AP: of each image and class (0: 100), on LVIS of each image (0: 300; the
    # published figures of Co-DETR are for 1000)
    max_dets: int = 0
    save_detections: bool = False  # also write the COCO results, detections.json
    boxes_only: bool = False     # leave the masks out of detections.json
    tile: int = 0                # also detect on tiles of this side, px, for small objects; 0: off
    overlap: float = 0.2         # fraction of a tile that its neighbor overlaps
    # shorter side of the images, or the side of the squares of large-scale jitter, px; 0: the
    # checkpoint's
    eval_size: int = 0
    out: str = ""                # folder for results; none: that of the checkpoint
    batch_size: int = 1          # images per batch; with 1 no image is padded
    workers: int = -1            # processes that read images; -1: depends on the CPU cores
    device: str = ""             # cpu, cuda or mps; none: cuda if there is a GPU
    amp: bool = False            # bfloat16 autocast
    # deformable attention: kernel or torch; default: the kernel where it can be built
    impl: str = ""
    variant: str = ""            # variant of released weights whose file does not show it: dc5
    detector: str = ""           # a mask network's frozen detector, if the file has moved

    def check(self):
        """UserError for values that cannot work."""
        require = commands.require
        require(self.impl in ("", "kernel", "torch"), "--impl kernel or torch", self.impl)
        require(self.max_dets >= 0, "--max_dets of at least 0", self.max_dets)
        require(self.batch_size >= 1, "--batch_size of at least 1", self.batch_size)
        require(-1 <= self.workers <= 256, "--workers in -1..256", self.workers)
        require(0 <= self.eval_size <= 10_000, "--eval_size in 1..10000", self.eval_size)
        require(self.tile == 0 or self.tile >= 16, "--tile of at least 16", self.tile)
        require(0 <= self.overlap <= 0.9, "--overlap in 0..0.9", self.overlap)
        threshold = self.score_threshold
        require(threshold is None or 0 <= threshold <= 1, "--score_threshold in 0..1", threshold)
        require(self.images != [], "--images PATH ...", "no path")


def settings(cfg, recipe):
    """In words: the image sizes that go in and the detections that come out. For released weights
    they are those of the authors' evaluation."""
    divisor = getattr(cfg, "size_divisor", 1)
    multiple = f" up to a multiple of {divisor}" if divisor > 1 else ""
    soft_nms = getattr(cfg, "soft_nms", 0)
    nms = f", soft-NMS from IoU {soft_nms}" if soft_nms else ""
    if recipe.augment == "lsj":
        return (f"in: RGB, in a square of {recipe.lsj_size} px (bilinear), filled with gray that "
                "counts as image, ImageNet mean and deviation\n"
                f"out: at most {cfg.top_k} detections of an image, the best ones{nms}")
    return (f"in: RGB, short side {recipe.eval_size} px but long side at most {recipe.max_size} px "
            f"(bilinear), ImageNet mean and deviation, zeros to the right and below{multiple}\n"
            f"out: at most {cfg.top_k} detections of an image, the best ones{nms}")


def run_on_images(options, detector, out):
    """--images: draw and list the detections on image files."""
    paths = find_images(options.images)
    detector = commands.in_used_classes(detector)
    category_ids = detector.meta["category_ids"]
    listed = None
    if options.json:
        listed, category_ids = read_listing(options.json, detector.meta)
    ids = image_ids(paths, listed)
    folder = files.prepare_folder(options.out or out / "detections")
    least_scores = class_thresholds(detector.meta, options.score_threshold)
    if options.tile:
        detect = partial(detect_tiled, detector, tile=options.tile, overlap=options.overlap,
                         amp=options.amp)
    else:
        detect = partial(detect_image, detector, amp=options.amp)
    count = detect_images(paths, ids, detect, detector.meta["class_names"], category_ids, folder,
                          least_scores, options.boxes_only)
    scores = f"{min(least_scores):.2f}"
    if max(least_scores) > min(least_scores):
        scores += f" to {max(least_scores):.2f}, by class"
    print(f"{count} of {len(paths)} images drawn (scores of at least {scores}), see {folder}")
    if not count:
        raise UserError("--images: expected an image that can be read, got none among "
                        f"{len(paths)}")


def run_on_data(options, detector, out, device, rank, world):
    """Evaluate on a data set; write eval.json and, on request or without ground truth,
    detections.json."""
    detector, dataset = commands.with_data(detector, options.data, options.json)
    max_dets = limit_of(dataset, options.max_dets)
    cfg = allow_detections(detector.model, detector.cfg, max_dets)
    detector = detector._replace(cfg=cfg)
    labeled = dataset.split != "test"
    folder = files.prepare_folder(options.out or out)
    workers = options.workers if options.workers >= 0 else commands.default_workers()
    if rank == 0:
        print(settings(detector.cfg, detector.recipe))

    start = time.perf_counter()
    if options.tile:
        results = collect_tiled(detector, dataset, options, rank, world)
    else:
        results = collect_results(detector.model, detector.paper.detect, dataset, detector.cfg,
                                  device, options.batch_size, options.amp, workers, rank, world)
    if options.save_detections or not labeled:
        path = folder / "detections.json"
        count = write_results(path, results, options.boxes_only, rank, world)
        if rank == 0:
            print(f"{count} detections of {len(dataset)} images written to {path}")
    if not labeled:
        return

    scoring = time.perf_counter()
    metrics = score_results(dataset, results, max_dets, rank, world)
    end = time.perf_counter()
    metrics |= {"images": len(dataset), "seconds": end - start, "score_seconds": end - scoring}
    if rank == 0:
        print(table(metrics))
        print(f"\n{threshold_table(metrics)}")
        whose = "image" if dataset.federated else "image and class"
        print(f"\n{dataset.name}: {len(dataset)} images, best {max_dets} detections of each "
              f"{whose}, {end - start:.1f} s ({end - scoring:.1f} s of them scoring)")
        record = {"checkpoint": options.checkpoint, "step": detector.meta["step"],
                  "data": dataset.name, **metrics}
        files.write_json(folder / "eval.json", record)
        print(f"written to {folder / 'eval.json'}")


def write_results(path, results, boxes_only=False, rank=0, world=1):
    """Write the results of all ranks as one COCO results json -> their number."""
    left_out = {"segmentation", "mask_score"} if boxes_only else set()
    lines = []
    for row in results:
        lines.append(json.dumps({key: row[key] for key in row if key not in left_out}))
    shares = gather("\n".join(lines), world)
    lines = [line for share in shares for line in share.splitlines()]
    if rank == 0:
        with files.complete_file(path) as temporary:
            temporary.write_text("[" + ",\n".join(lines) + "]\n")
    return len(lines)


def main(argv=None):
    with user_errors("eval.py"), lost_peers("Start the evaluation again"):
        options = commands.parse(Options, "eval.py", __doc__, argv)
        options.check()
        device, rank, world = commands.join_processes(options.device)
        prepare_attention(options.impl, device)
        detector = open_detector(options.checkpoint, device, options.variant, options.detector)
        if options.eval_size:
            recipe = replace(detector.recipe, eval_size=options.eval_size,
                             lsj_size=options.eval_size)
            detector = detector._replace(recipe=recipe)
        if options.tile:
            refuse_masks(getattr(detector.paper, "NEEDS_MASKS", False))
        out = commands.results_folder(options.checkpoint)
        if options.images:
            commands.require(world == 1, "one process with --images", f"{world} processes")
            cfg = allow_detections(detector.model, detector.cfg, options.max_dets)
            detector = detector._replace(cfg=cfg)
            print(settings(detector.cfg, detector.recipe))
            run_on_images(options, detector, out)
        else:
            run_on_data(options, detector, out, device, rank, world)


if __name__ == "__main__":
    prepare_cpu()
    main()
