"""COCO AP of a checkpoint, and detections on your own images.

    python eval.py --checkpoint runs/dino                          AP on the data of the run
    python eval.py --checkpoint FILE --data DIR                    AP on another COCO-layout folder
    python eval.py --checkpoint FILE --json image_info_test.json   detections for a test server
    python eval.py --checkpoint FILE --images a.jpg photos/        pictures, tables, counts
    torchrun --nproc_per_node 8 eval.py --checkpoint FILE          processes share the images

AP, AP50, AP75 and the size bands are pycocotools' figures, for boxes and, where detections carry
masks, for masks. -1 in eval.json means "no such object"; the printed table shows it as "-".

From an image to AP: `detect` gives corner boxes in pixels of the original image and labels in
0..N-1; `coco_results` turns them into what a COCO json holds (x, y, w, h, the category id of the
json, compressed RLE); `score` compares the results with the ground truth of `dataset.coco()`.
"""
import csv
import glob
import json
import re
import sys
import time
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from pycocotools import mask as rle

import visualize
from engine import commands, files
from engine.commands import open_detector
from engine.coco_json import read_json
from engine.errors import UserError
from engine.images import UnreadableImage, read_image
from engine.inference import above, detect_image, predict, require_finite
from engine.machine import prepare_cpu
from engine.scoring import gather, score

__all__ = ["detect_image", "evaluate", "open_detector", "score"]
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# the kinds of figures and their names in short; segm_cls: masks ranked without their own score
KINDS = {"bbox": "AP", "segm": "mask AP", "segm_cls": "by class score"}
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
# data set -> its ground truth for pycocotools, made once: training evaluates after every epoch
_TRUTHS = weakref.WeakKeyDictionary()


# ---- AP ------------------------------------------------------------------------------------------

def evaluate(model, detect, dataset, cfg, device, batch_size=1, max_dets=100, amp=False,
             workers=0, rank=0, world=1):
    """AP of a model on a data set.

    detect: the paper file's. With `world` processes each rank runs and matches every world-th
    image; all ranks return the same figures, those of a single process. The model's training mode
    is restored. UserError, on every rank, where detections are not finite.

    -> {"bbox": figures, "segm": figures (with masks), "segm_cls": the same masks ranked by the
    score of their box (where they have scores of their own), "images", "seconds", "score_seconds"},
    figures as in `engine.scoring.score`."""
    start = time.perf_counter()
    cfg = replace(cfg, top_k=max(cfg.top_k, max_dets))
    results = collect_results(model, detect, dataset, cfg, device, batch_size, amp, workers, rank,
                              world)
    scoring = time.perf_counter()
    metrics = score_results(dataset, results, max_dets, rank, world)
    end = time.perf_counter()
    return {**metrics, "images": len(dataset), "seconds": end - start,
            "score_seconds": end - scoring}


@torch.no_grad()
def collect_results(model, detect, dataset, cfg, device, batch_size=1, amp=False, workers=0,
                    rank=0, world=1):
    """Detect on this rank's images, every world-th -> COCO results, see `coco_results`."""
    results = []
    error = None
    indices = range(rank, len(dataset), world)
    try:
        for outputs, targets in predict(model, dataset, indices, device, batch_size, amp, workers):
            sizes = torch.stack([target["orig_size"] for target in targets])   # (B, 2), h and w
            detections = detect(outputs, sizes.to(device), cfg)
            image_ids = [target["image_id"] for target in targets]
            results += coco_results(detections, image_ids, dataset.category_ids)
    except UserError as caught:
        error = caught
    # one rank's error ends all of them: none waits for results that never come
    errors = [e for e in gather(error, world) if e is not None]
    if errors:
        raise errors[0]
    return results


def score_results(dataset, results, max_dets=100, rank=0, world=1):
    """The results of this rank's images -> {"bbox": figures, ...} of all ranks, see `evaluate`."""
    truth = ground_truth(dataset, rank, world)
    metrics = {"bbox": score(truth, results, "bbox", max_dets, rank, world)}
    keys = set().union(*gather({key for row in results for key in row}, world))
    if dataset.has_masks and "segmentation" in keys:
        ranked = [{**row, "score": row.get("mask_score", row["score"])} for row in results]
        metrics["segm"] = score(truth, ranked, "segm", max_dets, rank, world)
        if "mask_score" in keys:
            metrics["segm_cls"] = score(truth, results, "segm", max_dets, rank, world)
    return metrics


def ground_truth(dataset, rank=0, world=1):
    """The ground truth of this rank's images as a pycocotools COCO."""
    shares = _TRUTHS.setdefault(dataset, {})
    if (rank, world) not in shares:
        rows = list(range(rank, len(dataset), world))
        share = dataset if world == 1 else dataset.subset(rows)
        shares[rank, world] = share.coco()
    return shares[rank, world]


def coco_results(detections, image_ids, category_ids):
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


def table(metrics, classes=True):
    """The figures of `evaluate` as text: one line per kind, then (`classes`) one line per class."""
    kinds = [kind for kind in KINDS if kind in metrics]
    recalls = [key for key in metrics["bbox"] if re.fullmatch(r"AR\d+", key)]
    columns = (*COLUMNS, *sorted(recalls, key=lambda name: int(name[2:])))
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


def cell(value, width=8):
    return f"{'-':>{width}}" if value == -1 else f"{value:>{width}.3f}"


# ---- your own images -----------------------------------------------------------------------------

def find_images(patterns):
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


def image_ids(paths, listed=None):
    """Image ids of files, for the results json.

    listed: the `images` of a COCO json; ids are then those of its file names, and a file that it
    does not list is a UserError. Without it, file names that are all different numbers are the ids,
    as in COCO; otherwise 1, 2, 3, ..."""
    if listed is not None:
        ids = {Path(image["file_name"]).name: image["id"] for image in listed}
        unknown = [path.name for path in paths if path.name not in ids]
        if unknown:
            raise UserError(f"--json: expected every image among the {len(ids)} of the json, got "
                            f"{len(unknown)} others: {', '.join(unknown[:3])}")
        return [ids[path.name] for path in paths]
    numbers = [int(path.stem) for path in paths if path.stem.isdecimal()]
    return numbers if len(set(numbers)) == len(paths) else list(range(1, len(paths) + 1))


def read_listing(path, meta):
    """A COCO json for the ids of --images -> its images, category id of each class of the model.

    Classes are matched by name. UserError where the json lacks one."""
    listing = read_json(path)
    ids = {category["name"]: category["id"] for category in listing.get("categories", ())}
    lacking = [name for name in meta["class_names"] if name not in ids]
    if lacking or "images" not in listing:
        raise UserError(f"--json: expected images and the classes of the model in {path}, got none "
                        f"called {', '.join(lacking[:5]) or 'images'}")
    return listing["images"], [ids[name] for name in meta["class_names"]]


def detect_images(paths, ids, detector, category_ids, out, threshold=0.3, amp=False):
    """Detect on image files and write what was found into the folder `out`.

    NAME.jpg            each image with its detections of at least `threshold`
    detections.json     COCO results, the `cfg.top_k` best of each image with file and class names
    detections.csv      file, class, score, x, y, w, h of detections of at least `threshold`, px
    counts.csv          for each image the number of objects of each class, and their sum

    Files that are no complete image are named and skipped. -> the number of images read"""
    class_names = detector.meta["class_names"]
    results = []
    boxes = []
    counts = {}
    for path, image_id in zip(paths, ids, strict=True):
        try:
            image = read_image(path)
        except UnreadableImage as error:
            print(f"skipped {error}", file=sys.stderr)
            continue
        detection = detect_image(detector, image, amp)
        shown = above(detection, threshold)
        names = [class_names[label] for label in shown["labels"].tolist()]
        counts[path] = Counter(names)

        rows = coco_results([detection], [image_id], category_ids)
        for row, label in zip(rows, detection["labels"].tolist(), strict=True):
            results.append({**row, "file_name": path.name, "category_name": class_names[label]})
        for name, row in zip(names, rows):           # best first: those above the threshold
            x, y, w, h = (round(value, 1) for value in row["bbox"])
            boxes.append((str(path), name, round(row["score"], 4), x, y, w, h))
        picture = visualize.draw_detections(image, shown, class_names)
        visualize.save_picture(picture, picture_path(out, path, image_id, counts))
        found = ", ".join(f"{count} {name}" for name, count in counts[path].items())
        print(f"{path}: {found or 'nothing'}")

    files.write_json(out / "detections.json", results)
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
    checkpoint: str              # best.pt of a run, its folder, or released weights
    data: str = ""               # COCO-layout folder; default: the data of the checkpoint's own run
    json: str = ""               # COCO json in place of annotations/instances_val2017.json; one
                                 # without annotations gives detections.json only. With --images:
                                 # the json whose image ids and category ids are used
    images: Annotated[list[str] | None, tyro.conf.arg(metavar="PATH [PATH ...]")] = None
    # detect on these files, folders or glob patterns
    score_threshold: float = 0.3  # minimum score to draw and to count, with --images
    max_dets: int = 100          # maximum detections per image and class in AP
    save_detections: bool = False  # also write detections.json, the COCO results of the data
    boxes_only: bool = False     # leave the masks out of detections.json
    eval_size: int = 0           # short side of the images, px; default: that of the checkpoint
    out: str = ""                # folder for results; default: that of the checkpoint
    batch_size: int = 1          # images at a time; with 1 nothing is padded
    workers: int = -1            # processes that read images; -1: chosen from the number of cores
    device: str = ""             # cpu or cuda; default: cuda where there is a GPU
    amp: bool = False            # bfloat16 autocast
    variant: str = ""            # variant of the paper file that released weights do not show: dc5
    detector: str = ""           # where the frozen detector of a mask network lies now

    def check(self):
        """UserError for values that cannot work."""
        require = commands.require
        require(self.max_dets >= 1, "--max_dets of at least 1", self.max_dets)
        require(self.batch_size >= 1, "--batch_size of at least 1", self.batch_size)
        require(self.workers >= -1, "--workers of at least -1", self.workers)
        require(self.eval_size >= 0, "--eval_size of at least 1", self.eval_size)
        require(0 <= self.score_threshold <= 1, "--score_threshold in 0..1", self.score_threshold)
        require(self.images != [], "--images PATH ...", "no path")


def settings(cfg, recipe):
    """In words: the image sizes that go in and the detections that come out. For released weights
    they are those of the authors' evaluation."""
    divisor = getattr(cfg, "size_divisor", 1)
    multiple = f" up to a multiple of {divisor}" if divisor > 1 else ""
    soft_nms = getattr(cfg, "soft_nms", 0)
    nms = f", soft-NMS from IoU {soft_nms}" if soft_nms else ""
    return (f"in: RGB, short side {recipe.eval_size} px but long side at most {recipe.max_size} px "
            f"(bilinear), ImageNet mean and deviation, zeros to the right and below{multiple}\n"
            f"out: the {cfg.top_k} best (query, class) pairs{nms}")


def run_on_images(options, detector, out):
    """--images: draw and list the detections on image files."""
    paths = find_images(options.images)
    category_ids = detector.meta["category_ids"]
    listed = None
    if options.json:
        listed, category_ids = read_listing(options.json, detector.meta)
    ids = image_ids(paths, listed)
    folder = files.prepare_folder(options.out or out / "detections")
    read = detect_images(paths, ids, detector, category_ids, folder, options.score_threshold,
                         options.amp)
    print(f"{read} of {len(paths)} images drawn (scores of at least {options.score_threshold}), "
          f"see {folder}")
    if not read:
        sys.exit(1)


def run_on_data(options, detector, out, device, rank, world):
    """Evaluate on a data set; write eval.json and, on request or without ground truth,
    detections.json."""
    detector, dataset = commands.with_data(detector, options.data, options.json)
    labeled = dataset.split != "test"
    say = print if rank == 0 else lambda *words: None
    folder = files.prepare_folder(options.out or out)
    workers = options.workers if options.workers >= 0 else commands.default_workers(world)
    say(settings(detector.cfg, detector.recipe))

    start = time.perf_counter()
    results = collect_results(detector.model, detector.paper.detect, dataset, detector.cfg, device,
                              options.batch_size, options.amp, workers, rank, world)
    if options.save_detections or not labeled:
        path = folder / "detections.json"
        count = write_results(path, results, options.boxes_only, rank, world)
        say(f"{count} detections of {len(dataset)} images written to {path}")
    if not labeled:
        return

    scoring = time.perf_counter()
    metrics = score_results(dataset, results, options.max_dets, rank, world)
    end = time.perf_counter()
    metrics |= {"images": len(dataset), "seconds": end - start, "score_seconds": end - scoring}
    say(table(metrics))
    say(f"\n{dataset.name}: {len(dataset)} images, best {options.max_dets} detections of each, "
        f"{end - start:.1f} s ({end - scoring:.1f} s of them scoring)")
    if rank == 0:
        record = {"checkpoint": options.checkpoint, "step": detector.meta["step"],
                  "data": dataset.name, **metrics}
        files.write_json(folder / "eval.json", record)
        print(f"written to {folder / 'eval.json'}")


def write_results(path, results, boxes_only, rank, world):
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
    options = tyro.cli(Options, args=argv, prog="eval.py", use_underscores=True,
                       config=(tyro.conf.FlagCreatePairsOff,))
    with commands.user_errors("eval.py"):
        options.check()
        device, rank, world = commands.join_processes(options.device)
        detector = open_detector(options.checkpoint, device, options.variant, options.detector)
        top_k = max(detector.cfg.top_k, options.max_dets)
        detector = detector._replace(cfg=replace(detector.cfg, top_k=top_k))
        if options.eval_size:
            recipe = replace(detector.recipe, eval_size=options.eval_size)
            detector = detector._replace(recipe=recipe)
        checkpoint = Path(options.checkpoint)
        out = checkpoint if checkpoint.is_dir() else checkpoint.parent
        if options.images:
            commands.require(world == 1, "one process with --images", f"{world} processes")
            print(settings(detector.cfg, detector.recipe))
            run_on_images(options, detector, out)
        else:
            run_on_data(options, detector, out, device, rank, world)


if __name__ == "__main__":
    prepare_cpu()
    main()
