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
import argparse
import contextlib
import ctypes
import difflib
import glob
import importlib
import io
import json
import re
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.nn.utils.rnn import pad_sequence

import checkpoints
import data
from deformable_attn import MSDeformAttn, ms_deform_attn_torch, sampling_locations

SMALL_AREA = 32 ** 2     # px^2 of the original image: COCO's border between small and medium objects
SCORE_STEPS = 10_000     # of discriminability: normalised tokens differ little in length, so coarse steps would hide a curve
MATCHED_IMAGES = 200     # validation images whose matching training follows from evaluation to evaluation
_TRUTHS = weakref.WeakKeyDictionary()   # data set -> its COCO, made once: training evaluates after every epoch
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
KINDS = {"bbox": "AP", "segm": "mask AP", "segm_cls": "by class score"}   # segm_cls: masks ranked without their own score
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


# ---- AP --------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, detect, dataset, cfg, device, batch_size=1, max_dets=100, amp=False, workers=0, rank=0, world=1):
    """AP of `model` on `dataset` -> {"bbox": figures, "segm": figures (with masks), "segm_cls": the same masks ranked by the
    score of their box (where they have scores of their own), "images", "seconds", "score_seconds"}, figures as in `score`.

    `detect(outputs, sizes, top_k)` comes from the paper file. With `world` processes each rank runs every world-th
    image and all ranks get all results, hence the same figures. The model's training mode is left as it was found.
    """
    start = time.perf_counter()
    results = []
    for outputs, targets in predict(model, dataset, range(rank, len(dataset), world), device, batch_size, amp, workers):
        sizes = torch.stack([target["orig_size"] for target in targets]).to(device)              # (B, 2), h and w
        detections = detect(outputs, sizes, max(cfg.top_k, max_dets))
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


def predict(model, dataset, indices, device, batch_size=1, amp=False, workers=0):
    """Yields (outputs, targets) for batches of the images at `indices`, in evaluation mode and without gradients."""
    loader = data.batches(dataset, [list(indices[k:k + batch_size]) for k in range(0, len(indices), batch_size)], workers)
    device, training, done = torch.device(device), model.training, 0
    model.eval()
    try:
        for images, padding, targets in loader:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
                outputs = model(images.to(device), padding.to(device), targets)   # read by none but `--roi_box gt`
            yield outputs, targets
            done += len(targets)
            if sys.stderr.isatty():
                print(f"\revaluated {done}/{len(indices)} images\x1b[K", end="", file=sys.stderr, flush=True)
    finally:
        model.train(training)
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


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
            raise ValueError(f"expected every {key} of the results among the {len(known)} of the ground truth, got "
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


# ---- matching and ATD ------------------------------------------------------------------------------------------------

def assignments(model, criterion, dataset, device, **common):
    """The object that each query is matched to, -1 for none, in the first validation images -> (images, Nq) int16.

    DN-DETR's instability (Li et al. 2022, section 4) is the number of queries per image whose object changes between
    evaluations."""
    rows = []
    for outputs, targets in predict(model, dataset, range(min(len(dataset), MATCHED_IMAGES)), device, **common):
        for query, index in criterion.match(outputs, data.to_device(targets, device)):
            row = torch.full((outputs["pred_logits"].shape[1],), -1, dtype=torch.int16)
            row[query] = index.to(torch.int16)
            rows.append(row)
    return pad_sequence(rows, batch_first=True, padding_value=-1)   # small images have fewer queries


def anchor_distances(anchors, boxes):
    """L1 distance (n,) between initial anchors (n, 2 or 4) and the boxes (n, 4) they were matched to, both normalised
    cxcywh. Anchors that are points are compared with the boxes' centres."""
    return (anchors - boxes[:, :anchors.shape[-1]]).abs().sum(-1)


def atd(distances, k=100):
    """Average of the top-k distances, ATD(k): the mean of the k largest (of all, where there are fewer). DINO 3.3."""
    return float(distances.topk(min(k, len(distances))).values.mean()) if len(distances) else -1.0


@torch.no_grad()
def analyze(model, criterion, dataset, device, k=100, batch_size=1, amp=False, workers=0):
    """What the papers measure inside a detector, over `dataset`.

    ATD(k), DINO, section 3.3 and figure 4a, b: for every object the distance to the initial anchor of the query whose
    last-layer prediction is matched to it. Co-DETR, section 3.4, where outputs hold `memory`: how well encoder and decoder
    tell objects from background (`iof_iob`), and where the model has several heads (`confidences`), their conflict.

    -> {"ATD", "ATD_small", "k", "objects", "small_objects", "coordinates": "xywh" or "xy", "encoder" and "decoder": what
    `iof_iob` gives, "conflict": what `conflict` gives}; small: a box of less than 32^2 px in the original image. ValueError
    for a model without `outputs["anchors"]`."""
    distances, areas, divergences, heads = [], [], [], []
    counts = {"encoder": torch.zeros(2, SCORE_STEPS), "decoder": torch.zeros(2, SCORE_STEPS)}
    with recorded_looks(model) as looks:
        for outputs, targets in predict(model, dataset, range(len(dataset)), device, batch_size, amp, workers):
            if "anchors" not in outputs:
                raise ValueError("expected outputs['anchors'], where each query starts; this model gives none")
            targets = data.to_device(targets, device)
            anchors = outputs["anchors"].float()                                                 # (B, Nq, 2 or 4)
            for b, (query, matched) in enumerate(criterion.match(outputs, targets)):
                boxes = targets[b]["boxes"][matched.to(device)]                                  # (n, 4)
                distances.append(anchor_distances(anchors[b, query.to(device)], boxes).cpu())
                areas.append((boxes[:, 2:].prod(-1) * targets[b]["orig_size"].prod()).cpu())
            if "memory" in outputs:
                memory = outputs["memory"]
                for part, levels in (("encoder", encoder_norms(memory)), ("decoder", decoder_attention(memory, looks))):
                    for scores, target, size in zip(discriminability(levels, memory), targets, memory.image_sizes):
                        counts[part] += score_counts(scores, target["boxes"], size.tolist())
            looks.clear()
            if hasattr(model, "confidences"):
                heads, divergence = head_divergences(model, memory)
                divergences.append(divergence)
                looks.clear()
    distances, small = torch.cat(distances), torch.cat(areas) < SMALL_AREA
    figures = {"ATD": atd(distances, k), "ATD_small": atd(distances[small], k), "k": k, "objects": len(distances),
               "small_objects": int(small.sum()), "coordinates": "xywh"[:anchors.shape[-1]]}
    figures |= {part: iof_iob(count) for part, count in counts.items() if count.any()}
    return figures | ({"conflict": conflict(heads, torch.cat(divergences).mean(0))} if len(heads) > 1 else {})


# ---- Co-DETR, section 3.4 --------------------------------------------------------------------------------------------

@contextlib.contextmanager
def recorded_looks(model):
    """Within, every call of the model extends the list given by {reference (B, Nq, L, 2|4), locations (B, Nq, M, L, K, 2),
    weights (B, Nq, M, L, K)}, one for each deformable attention of the decoder: where it looked.

    Locations and weights are computed again from each module's inputs, as equation 3 of Deformable DETR says."""
    records = []

    def record(module, inputs):
        query, reference, _, shapes, *_ = inputs
        M, L, K = module.num_heads, module.num_levels, module.num_points
        offsets = module.sampling_offsets(query).unflatten(-1, (M, L, K, 2)).float()             # (B, Nq, M, L, K, 2)
        weights = module.attention_weights(query).unflatten(-1, (M, L * K)).float().softmax(-1)  # (B, Nq, M, L K)
        records.append({"reference": reference, "weights": weights.unflatten(-1, (L, K)),
                        "locations": sampling_locations(reference, offsets, shapes)})

    hooks = [module.register_forward_pre_hook(record) for name, module in model.named_modules()
             if isinstance(module, MSDeformAttn) and "decoder" in name]
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


def encoder_norms(memory):
    """L2 norms of the encoder's tokens, 0 on padding -> (B, S)."""
    return memory.tokens.float().norm(dim=-1).masked_fill(memory.padding, 0)


def decoder_attention(memory, looks):
    """How much the decoder looks at each token -> (B, S). OUR CHOICE (the paper says "the cross-attention score"): weights
    of all queries, heads, points and layers, each spread over the four tokens around its sampling point as bilinear
    interpolation reads them: the derivative of the attention's output by the values."""
    B, S = memory.padding.shape
    with torch.enable_grad():
        values = torch.ones(B, S, looks[0]["weights"].shape[2], 1, device=memory.tokens.device, requires_grad=True)
        read = sum(ms_deform_attn_torch(values, memory.shapes, look["locations"], look["weights"]).sum() for look in looks)
    attention, = torch.autograd.grad(read, values)                                                # (B, S, M, 1)
    return attention.sum((2, 3)).masked_fill(memory.padding, 0)


def discriminability(scores, memory):
    """How much of each pixel the encoder makes (Co-DETR, Eq. 7): scores of tokens (B, S), level by level resized to the input
    and divided by the map's largest, averaged over levels -> (B, H, W) in [0, 1]. OUR CHOICE: padding counts as 0."""
    maps = []
    for level, shape in zip(memory.by_level(scores), memory.shapes):
        level = F.interpolate(level.unflatten(1, shape)[:, None], memory.padded_size, mode="bilinear")[:, 0]   # (B, H, W)
        maps.append(level / level.amax((1, 2), keepdim=True).clamp(min=1e-12))
    return torch.stack(maps).mean(0)


def score_counts(scores, boxes, size):
    """Pixels of one image by score: scores (H, W) in [0, 1], boxes (n, 4) normalised cxcywh, size (h, w) without padding
    -> (2, SCORE_STEPS), background and foreground. OUR CHOICE: foreground is the union of the boxes, and pixels are counted
    over the whole data set."""
    h, w = size
    foreground = torch.zeros(h, w, dtype=torch.bool, device=scores.device)
    for cx, cy, bw, bh in boxes.tolist():
        foreground[max(0, round((cy - bh / 2) * h)):round((cy + bh / 2) * h),
                   max(0, round((cx - bw / 2) * w)):round((cx + bw / 2) * w)] = True
    step = (scores[:h, :w] * SCORE_STEPS).long().clamp(0, SCORE_STEPS - 1)
    return torch.bincount((step + SCORE_STEPS * foreground).flatten(), minlength=2 * SCORE_STEPS).view(2, -1).float().cpu()


def iof_iob(counts):
    """Co-DETR, Eq. 8, from pixel counts (2, SCORE_STEPS) of a whole data set: above threshold S lies the share IoF(S) of the
    foreground, below it the share IoB(S) of the background. A curve further up and right tells them apart better; the
    area under it is the chance that a foreground pixel scores higher than a background pixel.
    -> {"IoB": 0, 0.01, ..., 1, "IoF": 101 numbers there, "area": number}"""
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)                                     # (2, steps)
    iob, below = torch.cat((torch.zeros(2, 1), share.double().cumsum(1)), 1)                     # (steps + 1,) each
    grid = np.linspace(0, 1, 101)
    return {"IoB": grid.tolist(), "IoF": np.interp(grid, iob, 1 - below).tolist(),
            "area": float(torch.trapezoid(1 - below, iob))}


@torch.enable_grad()
def head_divergences(model, memory):
    """Co-DETR, Eq. 9-10: KL(C_i || C_j) of the Grad-CAM maps of all heads i, j on the encoder's tokens -> names of H heads,
    (B, H, H). OUR CHOICE: what is differentiated is `model.confidences`, and a map is one distribution over all levels."""
    memory = memory._replace(tokens=memory.tokens.detach().float().requires_grad_())
    confidences = model.confidences(memory)
    gradients = [torch.autograd.grad(value, memory.tokens, retain_graph=True)[0] for value in confidences.values()]
    p = torch.stack([grad_cam(memory, gradient) for gradient in gradients], 1)                    # (B, H, S)
    return list(confidences), (p[:, :, None] * (p[:, :, None].log() - p[:, None].log())).sum(-1).detach().cpu()


def grad_cam(memory, gradient):
    """Grad-CAM (Selvaraju et al. 2017, Eq. 1-2) of each level by its own mean gradient: tokens and `gradient` (B, S, C) ->
    (B, S), no less than 0 and, OUR CHOICE, divided by its sum over all levels, 1e-8 of the largest added for the logarithm."""
    maps = [F.relu((x * g.mean(1, keepdim=True)).sum(-1))                                        # [(B, H_l W_l)]
            for x, g in zip(memory.by_level(memory.tokens), memory.by_level(gradient))]
    cam = torch.cat(maps, 1).masked_fill(memory.padding, 0)                                      # (B, S)
    cam = cam / cam.amax(1, keepdim=True).clamp(min=1e-30) + 1e-8
    return cam / cam.sum(1, keepdim=True)


def conflict(heads, S):
    """Co-DETR, Eq. 11-12: S (H, H), averaged over images, and for each head the mean of its distances to and from the others.
    -> {"heads": names, "S": rows of numbers, "average": H numbers}"""
    average = (S.sum(0) + S.sum(1)) / (2 * (len(heads) - 1))
    return {"heads": heads, "S": S.tolist(), "average": average.tolist()}


def analysis_table(analyses):
    """{name: what `analyze` gives} as text: a column for each name, then the heads' conflicts."""
    k = next(iter(analyses.values()))["k"]
    rows = {f"ATD({k})": lambda a: a["ATD"], f"ATD({k}) small": lambda a: a["ATD_small"],
            "IoF-IoB encoder": lambda a: a.get("encoder", {}).get("area"),
            "IoF-IoB decoder": lambda a: a.get("decoder", {}).get("area"),
            "conflict of heads": lambda a: np.mean(a["conflict"]["average"]) if "conflict" in a else None}
    width = max(10, *map(len, analyses)) + 2
    lines = [" " * 18 + "".join(f"{name:>{width}}" for name in analyses)]
    for row, value in rows.items():
        values = [value(a) for a in analyses.values()]
        if any(v is not None for v in values):
            lines.append(f"{row:18}" + "".join(f"{'-':>{width}}" if v is None else f"{v:>{width}.4f}" for v in values))
    lines += ["", f"ATD: mean of the {k} largest distances between initial anchors and their objects, |x| + |y| + |w| + |h|"]
    points = [name for name, a in analyses.items() if a["coordinates"] == "xy"]
    if points:
        lines.append(f"     {', '.join(points)}: |x| + |y| of anchors that are points, not comparable with those of boxes")
    lines.append("IoF-IoB: area under the curve, the chance that an object's pixel scores higher than a pixel outside")
    for name, found in ((name, a["conflict"]) for name, a in analyses.items() if "conflict" in a):
        lines += ["", f"{name}: KL of the row's Grad-CAM map from the column's"]
        lines += [f"{'':12}" + "".join(f"{head:>11}" for head in (*found["heads"], "average"))]
        lines += [f"{head:12}" + "".join(f"{v:>11.4f}" for v in (*row, mean))
                  for head, row, mean in zip(found["heads"], found["S"], found["average"])]
    return "\n".join(lines)


# ---- pictures --------------------------------------------------------------------------------------------------------

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
            raise FileNotFoundError(f"expected an image file, a folder of images or a glob pattern, got {pattern!r}, "
                                    f"which matches none ({', '.join(sorted(SUFFIXES))})")
        found.update(dict.fromkeys(images))
    return list(found)


def image_ids(paths):
    """File names that are all different numbers are the ids, as in COCO; otherwise 1, 2, 3, ..."""
    numbers = [int(path.stem) for path in paths if path.stem.isdecimal()]
    return numbers if len(set(numbers)) == len(paths) else list(range(1, len(paths) + 1))


@torch.no_grad()
def infer(model, image, cfg, device, amp=False):
    """One PIL image through a model in evaluation mode -> outputs of a batch of one."""
    images, padding, _ = data.collate([data.eval_transform(cfg)(image)])                         # (1, 3, h, w)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
        return model(images.to(device), padding.to(device))


def detect_image(model, detect, image, cfg, device, amp=False):
    """The top-k detections of one PIL image, in its pixels."""
    size = torch.tensor([image.size[::-1]], device=device)                                       # (1, 2), h and w
    return detect(infer(model, image, cfg, device, amp), size, cfg.top_k)[0]


def above(detection, threshold):
    """The detections with at least this score."""
    kept = detection["scores"] >= threshold
    return {key: value[kept] for key, value in detection.items()}


def detect_images(paths, model, detect, cfg, meta, out, device, threshold=0.3, amp=False):
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
        detection = detect_image(model, detect, image, cfg, device, amp)
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


# ---- command line ----------------------------------------------------------------------------------------------------

class Flags(argparse.ArgumentParser):
    """A parser for which --max_dets and --max-dets are the same flag and abbreviations are unknown flags."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
            near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
            kind = "flag" if unknown[0].startswith("-") else "argument"
            self.error(f"unknown {kind} {unknown[0]}" + (f": did you mean {near[0]}?" if near else ": see --help"))
        return given

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        args = [re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), arg) for arg in args]
        return super().parse_known_args(args, namespace)


def prepare_cpu():
    """Two settings that halve the time of an image on a CPU and change no result beyond rounding. For the whole process.

    Large tensors keep their pages between uses: glibc would hand them to the system after each and have them zeroed again.
    float32 products go through oneDNN, twice MKL's speed on AMD: PyTorch takes that way when bfloat16 sums are allowed,
    which only AMX units make use of, so machines with AMX are left alone."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)         # M_MMAP_MAX: nothing is mapped on its own
        libc.mallopt(-1, -1)        # M_TRIM_THRESHOLD: nothing is given back
    if hasattr(torch.backends.mkldnn, "matmul") and not torch.cpu._is_amx_tile_supported():     # since PyTorch 2.9
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def validation_set(folder, cfg, meta):
    """What a checkpoint is evaluated on: the val split of `folder`, else the data of its own run (the very images of an
    --overfit run). ValueError for released weights, which name no data."""
    run = meta.get("run")
    if not folder and not run:
        raise ValueError("expected --data DIR: released weights do not say which data they belong to")
    masks = getattr(importlib.import_module(meta["model_name"]), "NEEDS_MASKS", False)
    if not folder and run["overfit"]:
        return data.build_datasets(run["data"] or None, cfg, run["seed"], masks, run["overfit"], run["num_train"])[1]
    folder, transform = folder or run["data"], data.eval_transform(cfg)
    if folder:
        return data.CocoFolder(folder, "val", transform, masks)
    return data.Shapes("val", run["num_val"], transform=transform, load_masks=masks)


def settings(cfg):
    """How images go in and detections come out, in words; for released weights as in the authors' evaluation."""
    multiple = f" up to a multiple of {cfg.size_divisor}" if getattr(cfg, "size_divisor", 1) > 1 else ""
    nms = f", soft-NMS from IoU {cfg.soft_nms}" if getattr(cfg, "soft_nms", 0) else ""
    return (f"in: RGB, short side {cfg.eval_size} px but long side at most {cfg.max_size} px (bilinear), ImageNet mean and deviation, "
            f"zeros to the right and below{multiple}\nout: the {cfg.top_k} best (query, class) pairs{nms}")


def fit_classes(model, paper, cfg, meta, dataset):
    """The model for the classes of `dataset`. Released COCO heads have 91 columns, 11 of them unused: those are taken
    out. Any other difference is a ValueError that lists both."""
    names = [name for name in meta["class_names"] if not name.startswith("unused ")]
    if names != dataset.class_names:
        raise ValueError(f"expected a data set with the classes of the checkpoint, in this order,\n  {names}\n"
                         f"got {dataset.name} with\n  {dataset.class_names}\n"
                         "give the data it was trained on with --data, or train on these classes: train.py --init")
    return checkpoints.used_classes(model, paper, cfg, meta["class_names"])[0]


def run_names(paths):
    """Short names of checkpoints, in order: the run's folder, or the whole path where folders do not tell them apart."""
    names = [Path(path).resolve().parent.name for path in paths]
    return names if len(set(names)) == len(paths) else [str(path) for path in paths]


def analyze_files(model, cfg, meta, dataset, args, **common):
    """`analyze` for --checkpoint, which is open already, and for those of --analyze, each on its own data or on --data
    -> {name: figures and "checkpoint"}."""
    analyses, paths = {}, [args.checkpoint, *args.analyze]
    for name, path in zip(run_names(paths), paths):
        if analyses:
            model, cfg, meta = checkpoints.load_model(path, args.device, args.variant)
            dataset = validation_set(args.data, cfg, meta)
            model = fit_classes(model, importlib.import_module(meta["model_name"]), cfg, meta, dataset)
        _, criterion = importlib.import_module(meta["model_name"]).build(cfg, len(dataset.class_names))
        analyses[name] = {"checkpoint": str(path), **analyze(model, criterion, dataset, args.device, args.k, **common)}
    return analyses


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
        model, cfg, meta = checkpoints.load_model(args.checkpoint, args.device, args.variant, args.detector)
        cfg.top_k = max(cfg.top_k, args.max_dets)
        paper = importlib.import_module(meta["model_name"])
        if args.images:
            paths = find_images(args.images)
        else:
            dataset = validation_set(args.data, cfg, meta)
            model = fit_classes(model, paper, cfg, meta, dataset)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"eval.py: {error}")
    print(settings(cfg))
    out = Path(args.out or Path(args.checkpoint).parent)
    if args.images:
        out = Path(args.out or out / "detections")
        read = detect_images(paths, model, paper.detect, cfg, meta, out, args.device, args.score_threshold, args.amp)
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
            analyses = analyze_files(model, cfg, meta, dataset, args, **common)
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
