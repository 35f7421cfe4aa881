"""COCO AP of a checkpoint, detections on your own pictures, and how far anchors start from their objects.

    python eval.py --checkpoint runs/dino/best.pt                    AP on the data the checkpoint was trained on
    python eval.py --checkpoint FILE --data DIR                      AP on another COCO-layout folder, same classes
    python eval.py --checkpoint FILE --images a.jpg photos/ "*.png"  drawn pictures and a COCO-results json
    python eval.py --checkpoint FILE --analyze [OTHER ...]           ATD(k): DINO, section 3.3; Co-DETR, section 3.4

AP, AP50, AP75 and the size bands are pycocotools' figures, for boxes and, where detections carry masks, for masks. Two
things pycocotools leaves to its caller: `summarize` knows no limit but 100 detections an image, so the table is read
from `eval["precision"]` here; and -1 means "no such object", which the printed table shows as "-".

The way of one detection: `detect` gives corner boxes in pixels of the original image and a label in 0..N-1;
`coco_results` turns them into what a COCO json holds (x, y, w, h, the category id of the json, compressed RLE);
`score` compares the results with the ground truth of `dataset.coco()`.
"""
import contextlib
import glob
import io
import json
import re
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from engine.errors import UserError
from engine import models
import data
from analysis import analysis_table, analyze_files
from engine.class_rows import fit_classes
from engine.cli import Flags
from engine.datasets import validation_set
from engine.inference import above, detect_image, predict
from engine.machine import prepare_cpu

_TRUTHS = weakref.WeakKeyDictionary()   # data set -> its COCO, made once: training evaluates after every epoch
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
KINDS = {"bbox": "AP", "segm": "mask AP", "segm_cls": "by class score"}   # segm_cls: masks ranked without their own score
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


@torch.no_grad()
def evaluate(model, detect, dataset, cfg, device, batch_size=1, max_dets=100, amp=False, workers=0, rank=0, world=1):
    """AP of `model` on `dataset` -> {"bbox": figures, "segm": figures (with masks), "segm_cls": the same masks ranked by the
    score of their box (where they have scores of their own), "images", "seconds", "score_seconds"}, figures as in `score`.

    `detect(outputs, sizes, cfg)` comes from the paper file. With `world` processes each rank runs every world-th
    image and all ranks get all results, hence the same figures. The model's training mode is left as it was found.
    """
    start = time.perf_counter()
    results = []
    for outputs, targets in predict(model, dataset, range(rank, len(dataset), world), device, batch_size, amp, workers):
        sizes = torch.stack([target["orig_size"] for target in targets]).to(device)              # (B, 2), h and w
        detections = detect(outputs, sizes, replace(cfg, top_k=max(cfg.top_k, max_dets)))
        results += coco_results(detections, [target["image_id"] for target in targets], dataset.category_ids)
    if world > 1:
        shares = [None] * world
        torch.distributed.all_gather_object(shares, results)
        results = [result for share in shares for result in share]
    scoring = time.perf_counter()
    if dataset not in _TRUTHS:
        _TRUTHS[dataset] = dataset.coco()
    metrics = {"bbox": score(_TRUTHS[dataset], results, "bbox", max_dets)}
    if dataset.has_masks and any("segmentation" in result for result in results):
        metrics["segm"] = score(_TRUTHS[dataset], [{**row, "score": row.get("mask_score", row["score"])} for row in results],
                                "segm", max_dets)
        if any("mask_score" in result for result in results):
            metrics["segm_cls"] = score(_TRUTHS[dataset], results, "segm", max_dets)
    end = time.perf_counter()
    return {**metrics, "images": len(dataset), "seconds": end - start, "score_seconds": end - scoring}


def coco_results(detections, image_ids, category_ids):
    """Detections in COCO's results format, a list of {image_id, category_id, bbox [x, y, w, h] px, score}.

    detections: one {scores (k,), labels (k,), boxes (k, 4) xyxy px, masks (k, h, w) or k RLEs (optional)} per image;
    category_ids[label] is the category's id in the json. Masks become `segmentation`, a compressed RLE whose counts
    are text, so the list can be written as json; `mask_scores` (k,), where masks have their own, become `mask_score`.
    """
    results = []
    for detection, image_id in zip(detections, image_ids, strict=True):
        corners = detection["boxes"].cpu().double()                                              # (k, 4)
        xywh = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
        labels, scores = detection["labels"].tolist(), detection["scores"].tolist()
        rows = [{"image_id": int(image_id), "category_id": category_ids[label], "bbox": box, "score": value}
                for label, box, value in zip(labels, xywh, scores, strict=True)]
        if "masks" in detection:
            for row, mask in zip(rows, encode_masks(detection["masks"]), strict=True):
                row["segmentation"] = mask
        if "mask_scores" in detection:
            for row, value in zip(rows, detection["mask_scores"].tolist(), strict=True):
                row["mask_score"] = value
        results += rows
    return results


def encode_masks(masks):
    """Masks (k, h, w), bool, or k RLEs -> k compressed RLEs {size [h, w], counts text}."""
    if isinstance(masks, torch.Tensor):
        fortran = np.asfortranarray(masks.to(torch.uint8).permute(1, 2, 0).cpu().numpy())        # (h, w, k)
        masks = rle.encode(fortran) if len(masks) else []
    return [{"size": [int(n) for n in mask["size"]], "counts": _text(mask["counts"])} for mask in masks]


def _text(counts):
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def score(gt, results, iou_type="bbox", max_dets=100):
    """COCO's figures for a list of results against the ground truth `gt` (a pycocotools COCO).

    iou_type: "bbox" or "segm". Only the `max_dets` best detections of an image count.
    -> {AP, AP50, AP75, APs, APm, APl, ARs, ARm, ARl, AR1, AR10, AR<max_dets>, max_dets,
    per_class {name: {AP, AP50, objects}}}; -1 where the ground truth has no such object. ValueError for results of
    images or categories that the ground truth does not have.
    """
    evaluation = COCOeval(gt, _results_as_coco(gt, results, iou_type), iou_type)
    evaluation.params.maxDets = [limit for limit in (1, 10, 100) if limit < max_dets] + [max_dets]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    # precision (T thresholds, R recalls, K classes, A areas, M limits), recall (T, K, A, M); areas: all, s, m, l
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    figures = {"AP": _mean(precision[:, :, :, 0, -1]), "AP50": _mean(precision[0, :, :, 0, -1]),
               "AP75": _mean(precision[5, :, :, 0, -1])}
    for area, letter in enumerate("sml", start=1):
        figures["AP" + letter] = _mean(precision[:, :, :, area, -1])
        figures["AR" + letter] = _mean(recall[:, :, area, -1])
    for m, limit in enumerate(evaluation.params.maxDets):
        figures[f"AR{limit}"] = _mean(recall[:, :, 0, m])
    per_class = {}
    for k, category in enumerate(evaluation.params.catIds):
        objects = sum(not gt.anns[i].get("iscrowd") for i in gt.getAnnIds(catIds=[category]))
        per_class[gt.cats[category]["name"]] = {"AP": _mean(precision[:, :, k, 0, -1]),
                                                "AP50": _mean(precision[0, :, k, 0, -1]), "objects": objects}
    return {**figures, "max_dets": max_dets, "per_class": per_class}


def _mean(values):
    """Mean of the entries that exist; pycocotools marks the others, and we their mean, with -1."""
    existing = values[values > -1]
    return float(existing.mean()) if existing.size else -1.0


def _results_as_coco(gt, results, iou_type):
    """Results as the second COCO object of COCOeval. `COCO.loadRes` cannot be used: it fails on an empty list, changes
    the caller's rows, and takes the area of the box for that of the mask where a row has both."""
    for key, known in (("image_id", gt.imgs), ("category_id", gt.cats)):
        foreign = sorted({result[key] for result in results} - known.keys())
        if foreign:
            raise UserError(f"expected every {key} of the results among the {len(known)} of the ground truth, got "
                            f"{foreign[:5]}: are the detections from another data set?")
    annotations = []
    for number, result in enumerate(results, start=1):     # COCOeval takes id 0 for "no match"
        row = {"id": number, "iscrowd": 0, **{key: result[key] for key in ("image_id", "category_id", "score")}}
        if iou_type == "bbox":
            row |= {"bbox": result["bbox"], "area": result["bbox"][2] * result["bbox"][3]}
        else:                                              # one by one: rle.area fails for a list of more than 255
            row |= {"segmentation": result["segmentation"], "area": float(rle.area(result["segmentation"]))}
        annotations.append(row)
    coco = COCO()
    coco.dataset = {"images": gt.dataset["images"], "categories": gt.dataset["categories"], "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def table(metrics, classes=True):
    """The figures of `evaluate` as text: one line per kind of overlap, then (`classes`) one line per class."""
    kinds = [kind for kind in KINDS if kind in metrics]
    recalls = sorted((key for key in metrics["bbox"] if re.fullmatch(r"AR\d+", key)), key=lambda key: int(key[2:]))
    lines = [" " * 8 + "".join(f"{name:>8}" for name in (*COLUMNS, *recalls))]
    for kind in kinds:
        lines.append(f"{kind:8}" + "".join(_cell(metrics[kind][name]) for name in (*COLUMNS, *recalls)))
    if classes:
        per_class = metrics["bbox"]["per_class"]
        width = max(map(len, per_class), default=0) + 2
        head = "".join(f"{kind + ' ' + name:>14}" for kind in kinds for name in ("AP", "AP50"))
        lines += ["", f"{'class':{width}}{'objects':>8}{head}"]
        for name, row in per_class.items():
            cells = "".join(_cell(metrics[kind]["per_class"][name][column], 14)
                            for kind in kinds for column in ("AP", "AP50"))
            lines.append(f"{name:{width}}{row['objects']:>8}{cells}")
    return "\n".join(lines)


def _cell(value, width=8):
    return f"{'-':>{width}}" if value == -1 else f"{value:>{width}.3f}"


def find_images(patterns):
    """Files, folders and glob patterns -> image files, sorted within each, none twice. FileNotFoundError names what
    matched nothing."""
    found = {}
    for pattern in patterns:
        path = Path(pattern)
        files = [path] if path.is_file() else path.iterdir() if path.is_dir() else \
            [Path(name) for name in glob.glob(pattern, recursive=True)]
        images = sorted(file for file in files if file == path or file.suffix.lower() in SUFFIXES)
        if not images:
            raise UserError(f"expected an image file, a folder of images or a glob pattern, got {pattern!r}, "
                            f"which matches none ({', '.join(sorted(SUFFIXES))})")
        found.update(dict.fromkeys(images))
    return list(found)


def image_ids(paths):
    """File names that are all different numbers are the ids, as in COCO; otherwise 1, 2, 3, ..."""
    numbers = [int(path.stem) for path in paths if path.stem.isdecimal()]
    return numbers if len(set(numbers)) == len(paths) else list(range(1, len(paths) + 1))


def detect_images(paths, model, detect, cfg, recipe, meta, out, device, threshold=0.3, amp=False):
    """Writes out/NAME.jpg for every image, with the detections of at least `threshold`, and out/detections.json, COCO
    results of the top-k with a `file_name` in each row. Files that are no whole image are named and skipped.
    -> the number of images read."""
    import visualize   # here, because AP needs no matplotlib and visualize imports this file

    out.mkdir(parents=True, exist_ok=True)
    results, names = [], set()
    for path, image_id in zip(paths, image_ids(paths), strict=True):
        try:
            image = data.read_image(path)
        except data.BROKEN_IMAGE as error:
            print(f"skipped {path}: {error}", file=sys.stderr)
            continue
        detection = detect_image(model, detect, image, cfg, recipe, device, amp)
        rows = coco_results([detection], [image_id], meta["category_ids"])
        results += [{**row, "file_name": path.name} for row in rows]
        shown = above(detection, threshold)
        name = path.stem if path.stem not in names else f"{path.stem}_{image_id}"
        names.add(name)
        visualize.detections(image, shown, meta["class_names"]).save(out / f"{name}.jpg", quality=90)
        print(f"{path}: {_summary(shown['labels'].tolist(), meta['class_names'])}")
    (out / "detections.json").write_text(json.dumps(results))
    return len(names)


def _summary(labels, class_names):
    counts = [f"{labels.count(label)} {class_names[label]}" for label in sorted(set(labels))]
    return ", ".join(counts) or "nothing"


def settings(cfg, recipe):
    """How images go in and detections come out, in words; for released weights as in the authors' evaluation."""
    multiple = f" up to a multiple of {cfg.size_divisor}" if getattr(cfg, "size_divisor", 1) > 1 else ""
    nms = f", soft-NMS from IoU {cfg.soft_nms}" if getattr(cfg, "soft_nms", 0) else ""
    return (f"in: RGB, short side {recipe.eval_size} px but long side at most {recipe.max_size} px (bilinear), ImageNet mean and deviation, "
            f"zeros to the right and below{multiple}\nout: the {cfg.top_k} best (query, class) pairs{nms}")


def parser():
    flags = Flags(description=__doc__.split("\n")[0])
    flags.add_argument("--checkpoint", required=True, metavar="FILE", help="best.pt of a run, or released weights")
    flags.add_argument("--variant", default="", metavar="NAME", help="of the paper file, for what released weights do not "
                       "show: dc5, for instance")
    flags.add_argument("--detector", default="", metavar="FILE", help="where the frozen detector of a mask network lies now")
    flags.add_argument("--data", metavar="DIR", help="COCO-layout folder; without it, the data of the checkpoint")
    flags.add_argument("--images", nargs="+", metavar="PATH", help="detect on these files, folders or glob patterns")
    flags.add_argument("--score_threshold", type=float, default=0.3, help="least score that is drawn (default 0.3)")
    flags.add_argument("--max_dets", type=int, default=100, help="detections an image that count (default 100)")
    flags.add_argument("--analyze", nargs="*", metavar="FILE", help="also ATD(k), IoF-IoB curves and the conflict of heads, "
                       "beside those of other checkpoints; visualize.py analysis draws them")
    flags.add_argument("--k", type=int, default=100, help="the k of ATD(k) (default 100)")
    flags.add_argument("--out", metavar="DIR", help="folder of the results (default: that of the checkpoint)")
    flags.add_argument("--batch_size", type=int, default=1, help="images at a time (default 1: nothing is padded)")
    flags.add_argument("--workers", type=int, default=0, help="processes that read images (default 0: this one)")
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    flags.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    return flags


def main(argv=None):
    args = parser().parse_args(argv)
    try:
        loaded = models.load_model(args.checkpoint, args.device, args.variant, args.detector)
        model, paper, cfg, recipe, meta, _ = loaded
        cfg.top_k = max(cfg.top_k, args.max_dets)
        if args.images:
            paths = find_images(args.images)
        else:
            dataset = validation_set(args.data, loaded)
            model = fit_classes(model, paper, cfg, meta, dataset)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"eval.py: {error}")
    print(settings(cfg, recipe))
    out = Path(args.out or Path(args.checkpoint).parent)
    if args.images:
        out = Path(args.out or out / "detections")
        read = detect_images(paths, model, paper.detect, cfg, recipe, meta, out, args.device, args.score_threshold, args.amp)
        print(f"{read} of {len(paths)} images drawn (scores of at least {args.score_threshold}), see {out}")
        return
    common = dict(batch_size=args.batch_size, amp=args.amp, workers=args.workers)
    metrics = evaluate(model, paper.detect, dataset, cfg, args.device, max_dets=args.max_dets, **common)
    print(table(metrics))
    print(f"\n{dataset.name}: {metrics['images']} images, best {args.max_dets} detections of each, "
          f"{metrics['seconds']:.1f} s ({metrics['score_seconds']:.1f} s of them scoring)")
    out.mkdir(parents=True, exist_ok=True)
    if args.analyze is not None:
        try:
            analyses = analyze_files(model, loaded, dataset, args, **common)
        except (ValueError, FileNotFoundError) as error:
            sys.exit(f"eval.py: {error}")
        print("\n" + analysis_table(analyses))
        (out / "analysis.json").write_text(json.dumps(analyses, indent=1))
        print(f"\ncurves and maps: python visualize.py analysis --analysis {out / 'analysis.json'}")
        metrics["analysis"] = next(iter(analyses.values()))
    record = {"checkpoint": str(args.checkpoint), "step": meta["step"], "data": dataset.name, **metrics}
    (out / "eval.json").write_text(json.dumps(record, indent=1))
    print(f"written to {out / 'eval.json'}")


if __name__ == "__main__":
    prepare_cpu()
    main()
