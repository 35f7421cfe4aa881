"""Every picture of the project, one command each; `python visualize.py NAME --help`.

    detections        boxes and masks of a checkpoint on one image
    predictions       ground truth beside predictions, for some images of the validation set
    curves            AP, losses and learning rate of a run folder (train.py calls it after every evaluation)
    compare_curves    AP against training time of several runs
    sampling_points   where one query looks: its sampling points per decoder layer and head (Deformable DETR, figure 6)
    anchors           initial anchors against final boxes (DINO, sections 3.3 and 3.4)
    analysis          what `eval.py --analyze` measured, several checkpoints side by side (Co-DETR, section 3.4)
    noised_boxes      the denoising queries of one batch and their attention mask (DINO, section 3.3)
    scenes            a contact sheet of the generated data with its ground truth
    strip             detections in a row, or the same scenes by several models side by side
    citations         which file builds on which, drawn from the imports

Boxes are xyxy in pixels of the picture here. A class has the same colour in every picture.
"""
import argparse
import colorsys
import inspect
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
matplotlib.use("Agg")   # draws into files; no display is needed
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont

from engine.errors import UserError
from engine import models
import data
from scenes import Shapes
from boxes import box_cxcywh_to_xyxy
from engine.cli import Flags
from analysis import decoder_attention, discriminability, encoder_norms, recorded_looks
from engine.inference import above, detect_image, infer
from engine.datasets import validation_set

LEVEL_COLOURS = ("#e6194b", "#ffb000", "#22b14c", "#1e90ff", "#a040ff")   # finest level first
MIN_SIDE = 480   # px: smaller images are enlarged by a whole factor, so that labels can be read
GREY = "#777777"
CROWD = 40       # objects: with more, boxes are thin and have no labels


# ---- drawing on an image ---------------------------------------------------------------------------------------------

def colour(label):
    """RGB of a class, 0..255: hues a golden section apart, so that neighbouring labels differ most."""
    hue, dark = (0.02 + label * 0.618034) % 1, label // 8 % 2
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.85, 0.7 if dark else 0.95))


def detections(image, det, class_names, side=None):
    """The image with what was found on it, the most confident on top -> a new PIL image, `side` px on its longer side
    (default: as it is, or enlarged by a whole factor to be at least MIN_SIDE).

    det: labels (k,), boxes (k, 4) xyxy px, and optionally scores (k,) and masks (k, h, w) bool. Without scores it is
    ground truth. Labels stay inside the picture; with more than CROWD objects the boxes speak for themselves."""
    factor = side / max(image.size) if side else max(1, math.ceil(MIN_SIDE / max(image.size)))
    size = [max(1, round(length * factor)) for length in image.size]
    canvas = image.convert("RGB").resize(size, Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS)
    labels, boxes = det["labels"].tolist(), (det["boxes"].float() * factor).tolist()
    scores = det["scores"].tolist() if "scores" in det else [None] * len(labels)
    colours = [colour(label if len(class_names) > 1 else i) for i, label in enumerate(labels)]   # one class: objects differ
    if "masks" in det:
        canvas = _blend_masks(canvas, det["masks"].cpu(), colours)
    draw, font = ImageDraw.Draw(canvas), _font(max(11, round(max(size) / 45)))
    line = max(2, round(max(size) / 320)) if len(labels) <= CROWD else 1
    things = list(zip(labels, colours, boxes, scores, strict=True))[::-1]
    for _, rgb, (x1, y1, x2, y2), _ in things:
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=rgb, width=line)
    for label, rgb, box, value in things if len(labels) <= CROWD else []:
        _draw_label(draw, box, class_names[label] + (f" {value:.2f}" if value is not None else ""), rgb, font, size)
    return canvas


def _font(size):
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def _blend_masks(canvas, masks, colours):
    """Masks (k, h, w) as half-transparent colour with a solid edge, the first one on top."""
    pixels = np.asarray(canvas, np.float32).copy()
    for mask, rgb in reversed(list(zip(masks, colours))):
        inside = np.asarray(Image.fromarray(mask.numpy().astype(np.uint8) * 255).resize(canvas.size)) > 127
        edge = inside & ~_eroded(inside, max(1, max(canvas.size) // 500))
        pixels[inside] = 0.55 * pixels[inside] + 0.45 * np.array(rgb)
        pixels[edge] = rgb
    return Image.fromarray(pixels.astype(np.uint8))


def _eroded(mask, steps):
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = mask & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    return mask


def _draw_label(draw, box, text, rgb, font, size):
    """A tag on the box's upper edge, above it where there is room, always inside the picture."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 4
    x = min(max(0, box[0]), max(0, size[0] - width))
    y = min(box[1] - height if box[1] >= height else max(0, box[1]), max(0, size[1] - height))
    light = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 150
    draw.rectangle((x, y, x + width, y + height), fill=rgb)
    draw.text((x + 3 - left, y + 2 - top), text, fill="black" if light else "white", font=font)


def ground_truth(dataset, index):
    """The original image and its objects as `detections` draws them: labels, boxes xyxy px, masks (where loaded)."""
    image, (_, target) = dataset.image(index), dataset[index]
    scale = torch.tensor([image.width, image.height] * 2)
    det = {"labels": target["labels"], "boxes": box_cxcywh_to_xyxy(target["boxes"]) * scale}
    if "masks" in target:
        det["masks"] = target["masks"]
    return image, det


def tile(pictures, path, columns, titles=None, gap=8):
    """Writes pictures of similar size as one sheet, each centred in its cell, with a line of text above it."""
    width, height = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
    head, font = 20 if titles else 0, _font(13)
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + head + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for cell, picture in enumerate(pictures):
        x, y = gap + cell % columns * (width + gap), gap + cell // columns * (height + head + gap)
        if titles:
            draw.text((x + 2, y + 2), titles[cell], fill="#333333", font=font)
        sheet.paste(picture, (x + (width - picture.width) // 2, y + head + (height - picture.height) // 2))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).suffix == ".png":
        sheet = sheet.quantize(256)   # a third of the size
    sheet.save(path, quality=85, optimize=True)
    return path


def spread(count, n):
    """n indices from the first to the last of `count`."""
    return np.linspace(0, count - 1, min(n, count)).round().astype(int).tolist()


def predictions(model, detect, dataset, cfg, recipe, device, path, n=6, score_threshold=0.3):
    """Ground truth beside predictions, for n images spread over the data set, four columns of pictures."""
    training, pictures, titles = model.training, [], []
    model.eval()
    for index in spread(len(dataset), n):
        image, truth = ground_truth(dataset, index)
        found = above(detect_image(model, detect, image, cfg, recipe, device), score_threshold)
        pictures += [detections(image, det, dataset.class_names, side=256) for det in (truth, found)]
        titles += [f"{int(dataset.image_ids[index])}: ground truth", f"detections, score >= {score_threshold:g}"]
    model.train(training)
    return tile(pictures, path, 4, titles)


def _save(figure, path, dpi=110, rect=(0, 0, 1, 1)):
    figure.tight_layout(pad=0.6, rect=rect)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, bbox_inches="tight", pad_inches=0.08,
                   pil_kwargs={"quality": 88} if path.suffix == ".jpg" else {"optimize": True})
    plt.close(figure)
    return path


# ---- curves ----------------------------------------------------------------------------------------------------------

def read_log(run_dir):
    """log.jsonl of a run folder -> its step lines and its eval lines, in order."""
    lines = [json.loads(line) for line in (Path(run_dir) / "log.jsonl").read_text().splitlines() if line.strip()]
    return [line for line in lines if line["kind"] == "step"], [line for line in lines if line["kind"] == "eval"]


def curves(run_dir):
    """run_dir/curves.png from its log.jsonl: AP against training minutes and steps, losses by group, learning rate."""
    steps, evals = read_log(run_dir)
    figure, ((ap, loss), (parts, lr)) = plt.subplots(2, 2, figsize=(12, 7.5))
    _plot_ap(ap, evals, steps)
    _plot_losses(loss, parts, steps)
    lr.plot([line["step"] for line in steps], [line["lr"] for line in steps], color="#444")
    lr.set(title="learning rate", xlabel="step")
    _plot_instability(lr, evals)
    for axis in (ap, loss, parts, lr):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, Path(run_dir) / "curves.png", dpi=90)


def _plot_ap(axis, evals, steps):
    minutes = [line["train_seconds"] / 60 for line in evals]
    for kind, style in (("bbox", "-"), ("segm", "--")):
        for name, rgb in (("AP", "#d62728"), ("AP50", "#1f77b4")):
            values = [line[kind][name] for line in evals if kind in line]
            if values:
                where = [m for m, line in zip(minutes, evals) if kind in line]
                label = f"{name}{' masks' if kind == 'segm' else ''}, best {max(values):.3f}"
                axis.plot(where, values, style, marker="o", markersize=3, color=rgb, label=label)
    axis.set(title="validation", xlabel="training minutes (evaluation not counted)", ylim=(0, 1))
    if evals:
        axis.legend(loc="lower right", frameon=False)
    pairs = [(0, 0)] + [(line["train_seconds"] / 60, line["step"]) for line in steps + evals]
    pairs = np.array(sorted(pairs))
    if pairs[-1, 0] > 0:                # a second scale: the steps at these minutes
        axis.set_xlim(0, pairs[-1, 0] * 1.02)
        top = axis.secondary_xaxis("top", functions=(lambda m: np.interp(m, *pairs.T),
                                                     lambda s: np.interp(s, pairs[:, 1], pairs[:, 0])))
        top.set_xlabel("steps", fontsize=8)
        top.tick_params(labelsize=8)


def _plot_losses(total, parts, steps):
    """The sum on one axis; on the other the last layer's terms and a line for each other group (aux, enc, dn, ...)."""
    x = np.array([line["step"] for line in steps])
    total.plot(x, [line["loss"] for line in steps], color="#bbb", linewidth=0.8)
    total.plot(x, _smooth([line["loss"] for line in steps]), color="#444")
    total.set(title="total loss", xlabel="step")
    groups = sorted({loss_group(name) for line in steps for name in line["losses"]})
    for number, group in enumerate(groups):
        values = [sum(v for name, v in line["losses"].items() if loss_group(name) == group) for line in steps]
        parts.plot(x, _smooth(values), label=group, color=f"C{number % 10}")
    parts.set(title="losses: last layer by term, other groups summed", xlabel="step", yscale="log")
    if groups:
        parts.legend(ncols=2, frameon=False, fontsize=8)


def loss_group(name):
    """cls, l1 and giou of the last layer stand for themselves; "aux2.cls" -> "aux (sum)", "dn.l1" -> "dn (sum)"."""
    return name if "." not in name else re.match(r"[a-z_]*[a-z]", name)[0] + " (sum)"


def _smooth(values, window=9):
    """Mean over up to `window` points around each."""
    values = np.asarray(values, float)
    kernel = np.ones(min(window, max(len(values), 1)))
    if not len(values):
        return values
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _plot_instability(axis, evals):
    lines = [line for line in evals if line.get("instability") is not None]
    if lines:
        axis.set_title("learning rate, and the matching's instability")
        second = axis.twinx()
        second.plot([line["step"] for line in lines], [line["instability"] for line in lines], "o-", color="#9467bd",
                    markersize=3)
        second.set_ylabel("queries per image that changed object", color="#9467bd", fontsize=8)
        second.spines["top"].set_visible(False)


def compare_curves(run_dirs: list, out="compare_curves.png", kind="bbox", labels: list = None):
    """AP (solid) and AP50 (thin) against training minutes of several runs; the label of a run is its folder's name."""
    figure, axis = plt.subplots(figsize=(8, 4.8))
    for number, (run_dir, label) in enumerate(zip(run_dirs, labels or [Path(d).name for d in run_dirs], strict=True)):
        evals = [line for line in read_log(run_dir)[1] if kind in line]
        minutes = [line["train_seconds"] / 60 for line in evals]
        for name, style in (("AP", dict(linewidth=2.2)), ("AP50", dict(linewidth=0.9, linestyle="--", alpha=0.8))):
            axis.plot(minutes, [line[kind][name] for line in evals], color=f"C{number}", **style,
                      label=f"{label}: AP {evals[-1][kind]['AP']:.3f}" if name == "AP" and evals else None)
    axis.set(xlabel="training minutes (evaluation not counted)", ylabel="AP (solid), AP50 (dashed)",
             ylim=(0, 1), xlim=(0, None))
    axis.legend(loc="lower right", frameon=False)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, out, dpi=100)


def ladder(scores, out="ladder.png"):
    """Rows of `bench.py ladder`, {title: [AP of each seed]}: a bar for the mean, a dot for every seed."""
    titles, means = list(scores), [np.mean(ap) for ap in scores.values()]
    figure, axis = plt.subplots(figsize=(8, 0.3 * len(titles) + 0.8))
    axis.barh(titles, means, color="#9ecae1")
    for title, ap in scores.items():
        axis.plot(ap, [title] * len(ap), "o", color="#08519c", markersize=3)
    axis.bar_label(axis.containers[0], [f"{mean:.3f}" for mean in means], label_type="center", fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("AP on held-out generated scenes; dots: seeds")
    axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, out)


# ---- inside the model ------------------------------------------------------------------------------------------------

def sampling_points(checkpoint, image, out="sampling_points.jpg", rank=0, device="cpu"):
    """Where the query of the `rank`-th best detection looks: a row per decoder layer, a column per head; the area of a
    point is its attention weight, its colour its level. White: the layer's reference; dashed: the detected box.
    checkpoint, image: files."""
    model, paper, cfg, recipe, meta, _ = loaded = models.load_model(checkpoint, device)
    picture = data.read_image(image)
    with recorded_looks(model) as records:
        outputs = infer(model, picture, recipe, device)
    size = torch.tensor([picture.size[::-1]], device=device)
    det = paper.detect(outputs, size, replace(cfg, top_k=max(cfg.top_k, rank + 1)))[0]
    query, box = int(det["query"][rank]), det["boxes"][rank].cpu().numpy()
    layers = [{key: value[0, query].cpu().numpy() for key, value in record.items()} for record in records]
    M, L, K = layers[0]["weights"].shape
    extent = np.array(picture.size)
    x, y = view_of(box, extent)
    figure, axes = plt.subplots(len(layers), M, figsize=(1.9 * M + 0.4, 1.9 * len(layers) + 0.8), squeeze=False)
    for i, (row, layer) in enumerate(zip(axes, layers)):
        for m, axis in enumerate(row):
            _show(axis, picture)
            axis.set(xlim=x, ylim=y[::-1], facecolor="#dddddd")
            _outline(axis, box, "white", linestyle="--", linewidth=1)
            reference = layer["reference"][0] * np.tile(extent, len(layer["reference"][0]) // 2)
            axis.plot(*reference[:2], "+", color="white", markersize=7)
            for level in range(L):
                axis.scatter(*(layer["locations"][m, level] * extent).T, s=8 + 130 * layer["weights"][m, level],
                             color=LEVEL_COLOURS[level % 5], alpha=0.9, edgecolors="black", linewidths=0.4)
            if i == 0:
                axis.set_title(f"head {m + 1}", fontsize=8)
            if m == 0:
                axis.set_ylabel(f"layer {i + 1}", fontsize=8)
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=LEVEL_COLOURS[level % 5], label=f"level {level + 1}")
               for level in range(L)]
    name = f"{meta['class_names'][int(det['labels'][rank])]} {float(det['scores'][rank]):.2f}"
    figure.suptitle(f"sampling points of the query that found: {name}", fontsize=10, y=0.995)
    figure.legend(handles=handles, loc="lower center", ncols=L, frameon=False, fontsize=8, bbox_to_anchor=(0.5, -0.005))
    return _save(figure, out, rect=(0, 0.03, 1, 1))


def _outline(axis, xyxy, rgb, **style):
    x1, y1, x2, y2 = xyxy
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=rgb, **style))


def view_of(box, extent):
    """A square around a box (4,) xyxy with room for what lies about it, moved into the image (w, h) and a little margin
    where that is large enough -> x limits, y limits."""
    side = min(max(2.2 * (box[2:] - box[:2]).max(), 0.4 * extent.max()), extent.max() * 1.1)
    low = (box[:2] + box[2:] - side) / 2
    margin = 0.05 * side
    inside = low.clip(-margin, np.maximum(extent + margin - side, -margin))
    low = np.where(extent + 2 * margin > side, inside, (extent - side) / 2)
    return (low[0], low[0] + side), (low[1], low[1] + side)


def _show(axis, image, title=""):
    """The image, paler than it is, so that what is drawn on it stands out."""
    pixels = np.asarray(image, np.float32) * 0.6 + 0.15 * 255
    axis.imshow(pixels.astype(np.uint8), extent=(0, image.width, image.height, 0), interpolation="bicubic")
    axis.set(xlim=(0, image.width), ylim=(image.height, 0), xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)


def anchors(checkpoint, image, out="anchors.jpg", score_threshold=0.3, device="cpu"):
    """Initial anchors against final boxes. Left: the anchors of all queries (white), those that become detections in
    the colour of their class; right: the boxes these end as, with a line from each anchor's centre. Anchors that are
    points are drawn as points."""
    model, paper, cfg, recipe, meta, _ = loaded = models.load_model(checkpoint, device)
    picture = data.read_image(image)
    with torch.no_grad():
        outputs = infer(model, picture, recipe, device)
    size = torch.tensor([picture.size[::-1]], device=device)
    det = above(paper.detect(outputs, size, cfg)[0], score_threshold)
    start = outputs["anchors"][0].float().cpu()                                                  # (Nq, 2 or 4)
    start = start * torch.tensor(picture.size).repeat(start.shape[-1] // 2)
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.4 * picture.height / picture.width + 0.3))
    _show(axes[0], picture, f"initial anchors of {len(start)} queries")
    _show(axes[1], picture, f"final boxes, score >= {score_threshold:g}")
    for anchor in start:
        _draw_anchor(axes[0], anchor, "white", alpha=0.6, linewidth=0.7)
    for label, box, query in zip(det["labels"].tolist(), det["boxes"].cpu(), det["query"].tolist()):
        rgb = [v / 255 for v in colour(label)]
        _draw_anchor(axes[0], start[query], rgb, linewidth=2)
        _outline(axes[1], box, rgb, linewidth=2)
        centre = (box[:2] + box[2:]) / 2
        axes[1].plot(*zip(start[query][:2], centre), color=rgb, linewidth=1.2)
        axes[1].plot(*start[query][:2], "o", color=rgb, markersize=3)
        axes[1].text(max(0, box[0]), max(0, box[1]), meta["class_names"][label], fontsize=7, color="white", va="top",
                     bbox=dict(facecolor=rgb, edgecolor="none", pad=1))
    return _save(figure, out)


def _draw_anchor(axis, anchor, rgb, linewidth, **style):
    if len(anchor) == 2:
        axis.plot(*anchor, "o", color=rgb, markersize=2 + 2 * linewidth, **style)
    else:
        _outline(axis, box_cxcywh_to_xyxy(anchor), rgb, linewidth=linewidth, **style)


def analysis(analysis, out="analysis.png", folder=None, n=3, device="cpu"):
    """What `eval.py --analyze` wrote to its json: the IoF-IoB curves of encoder and decoder and the heads' conflicts, and for
    n validation images, a row each, the discriminability maps of every checkpoint. Brighter: higher within the map."""
    analyses = json.loads(Path(analysis).read_text())
    matrices = [(name, a["conflict"]) for name, a in analyses.items() if "conflict" in a]
    width = 2.2 * max(2 * len(analyses), 4)
    figure = plt.figure(figsize=(width, 3 + 2.2 * n))
    top, bottom = figure.add_gridspec(2, 1, height_ratios=(3, 2.2 * n))
    top, bottom = top.subgridspec(1, 2 + len(matrices)), bottom.subgridspec(n, 2 * len(analyses))
    for column, part in enumerate(("encoder", "decoder")):
        _plot_iof_iob(figure.add_subplot(top[column]), part, analyses)
    for column, (name, found) in enumerate(matrices, start=2):
        _plot_conflict(figure.add_subplot(top[column]), name, found)
    for number, (name, a) in enumerate(analyses.items()):
        for row, (picture, parts) in enumerate(_discriminability_maps(a["checkpoint"], folder, n, device)):
            for column, (part, scores) in enumerate(parts.items(), start=2 * number):
                axis = figure.add_subplot(bottom[row, column])
                axis.imshow(picture)
                axis.imshow(scores, cmap="inferno", alpha=0.75, extent=(0, picture.width, picture.height, 0))
                axis.set(xticks=[], yticks=[])
                axis.set_title(f"{name}\n{part}" if row == 0 else "", fontsize=9)
    return _save(figure, out, dpi=80)


def _plot_iof_iob(axis, part, analyses):
    for number, (name, a) in enumerate(analyses.items()):
        if part in a:
            axis.plot(a[part]["IoB"], a[part]["IoF"], color=f"C{number}", label=f"{name}: {a[part]['area']:.3f}")
    axis.plot((0, 1), (1, 0), color=GREY, linewidth=0.8, linestyle=":")
    axis.set(title=part, xlabel="IoB", ylabel="IoF", xlim=(0, 1), ylim=(0, 1))
    axis.legend(loc="lower left", frameon=False, fontsize=8)


def _plot_conflict(axis, name, found):
    axis.imshow(found["S"], cmap="Blues")
    for i, row in enumerate(found["S"]):
        for j, value in enumerate(row):
            dark = value > 0.6 * max(map(max, found["S"]))
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
    ticks = range(len(found["heads"]))
    axis.set(xticks=ticks, yticks=ticks)
    axis.set_title(f"{name}\nKL(row || column)", fontsize=9)
    axis.set_xticklabels(found["heads"], fontsize=8)
    axis.set_yticklabels(found["heads"], fontsize=8)


def _discriminability_maps(checkpoint, folder, n, device):
    """Yields n images of the validation set and {"encoder", "decoder"}: (h, w) maps on their pixels."""
    model, paper, cfg, recipe, meta, _ = loaded = models.load_model(checkpoint, device)
    dataset = validation_set(folder, loaded)
    for index in spread(len(dataset), n):
        picture = dataset.image(index)
        with recorded_looks(model) as looks:
            memory = infer(model, picture, recipe, device)["memory"]
        levels = {"encoder": encoder_norms(memory), "decoder": decoder_attention(memory, looks)}
        yield picture, {part: discriminability(scores, memory)[0].cpu().numpy() for part, scores in levels.items()}


def noised_boxes(pictures, targets, denoising, out, group=0):
    """The denoising queries of a batch: per image the objects and the queries of one group, then the attention mask.

    pictures: PIL images; targets: their {labels (n,), boxes (n, 4) cxcywh in [0, 1]}; denoising: what
    `dino.denoising_queries` gives for them. A group is [N positives | N negatives], N the most objects of an image."""
    N = max(len(slots) for slots, _ in denoising.matches) // denoising.groups
    if not N:
        raise UserError("expected at least one object in the batch, got none: there is nothing to denoise")
    copies = denoising.content.shape[1] // (N * denoising.groups)    # 2: positive and negative; 1: positive only
    figure, axes = plt.subplots(1, len(pictures) + 1, figsize=(3.6 * (len(pictures) + 1), 4))
    for b, (axis, picture, target) in enumerate(zip(axes, pictures, targets)):
        _show(axis, picture, f"image {b + 1}: {len(target['labels'])} objects")
        scale = torch.tensor(picture.size).repeat(2)
        for copy, rgb, style in ((0, "#22c03c", "-"), (1, "#e6194b", "--"))[:copies]:
            first = (group * copies + copy) * N
            for box in denoising.reference[b, first:first + len(target["labels"])].detach().cpu():
                _outline(axis, box_cxcywh_to_xyxy(box) * scale, rgb, linewidth=1.5, linestyle=style)
        for box in target["boxes"]:
            _outline(axis, box_cxcywh_to_xyxy(box) * scale, "white", linewidth=2)
    handles = [plt.Line2D([], [], color=rgb, linestyle=style, label=text) for rgb, style, text in (
        ("white", "-", "object"), ("#22c03c", "-", "positive query"), ("#e6194b", "--", "negative query"))]
    figure.legend(handles=handles[:copies + 1], loc="lower left", ncols=3, fontsize=9, facecolor="#39424e",
                  labelcolor="white")
    _draw_attention_mask(axes[-1], denoising, copies * N)
    return _save(figure, out, rect=(0, 0.06, 1, 1))


def _draw_attention_mask(axis, denoising, stride):
    P, total = denoising.content.shape[1], len(denoising.attn_mask)
    axis.imshow(denoising.attn_mask.cpu().numpy(), cmap=ListedColormap(["#f2d16b", "#39424e"]), interpolation="nearest",
                extent=(0, total, total, 0))
    for edge in range(stride, P + 1, stride):
        axis.plot((0, total), (edge, edge), color="white", linewidth=0.4)
        axis.plot((edge, edge), (0, total), color="white", linewidth=0.4)
    axis.set(xlim=(0, total), ylim=(total, 0), xlabel="may be looked at", ylabel="looks",
             xticks=[P / 2, (P + total) / 2], yticks=[P / 2, (P + total) / 2])
    axis.set_xticklabels([f"{denoising.groups} groups", "queries"], fontsize=8)
    axis.set_yticklabels([f"{denoising.groups} groups", "queries"], fontsize=8, rotation=90, va="center")
    axis.set_title("attention mask (dark: blocked)", fontsize=9)


# ---- commands --------------------------------------------------------------------------------------------------------

def scenes(out="scenes.jpg", n=32):
    """A contact sheet of the first n generated training scenes with their ground truth, masks and boxes."""
    dataset = Shapes("train", n, load_masks=True)
    sheet = [detections(*ground_truth(dataset, index), dataset.class_names, side=196) for index in range(n)]
    return tile(sheet, out, 8, gap=4)


def strip(checkpoint: list, out="strip.jpg", folder=None, n=6, side=256, score_threshold=0.3, device="cpu"):
    """Detections on n images spread over the validation set: of one checkpoint a row; of several a column each, under the
    names of their papers."""
    columns, names = [], []
    for path in checkpoint:
        model, paper, cfg, recipe, meta, _ = loaded = models.load_model(path, device)
        dataset, pictures = validation_set(folder, loaded), []
        for index in spread(len(dataset), n):
            image = dataset.image(index)
            found = above(detect_image(model, paper.detect, image, cfg, recipe, device), score_threshold)
            pictures.append(detections(image, found, dataset.class_names, side=side))
        columns.append(pictures)
        names.append(sys.modules[meta["model_name"]].__doc__.partition(":")[0])
    if len(columns) == 1:
        return tile(columns[0], out, n, gap=4)
    return tile([picture for row in zip(*columns) for picture in row], out, len(columns), names + [""] * len(names) * (n - 1))


def citations(out="citations.png"):
    """The import graph of the paper files and what they build on, without arrows that a longer path implies: who imports
    whom is who cites whom."""
    sources = {path.stem: path.read_text() for path in Path(__file__).parent.glob("*.py")}
    imports = {name: set(re.findall(r"^(?:import|from) (\w+)", text, re.M)) & sources.keys() for name, text in sources.items()}

    def below(name):
        return imports[name].union(*map(below, imports[name]))

    papers = [name for name, text in sources.items() if "\nclass Config:" in text and "\ndef build(" in text]
    shown = sorted(set(papers).union(*map(below, papers)) - {"checkpoints"})   # which reads files and knows every paper
    imports = {name: imports[name] & set(shown) for name in shown}
    height = {}
    for name in sorted(shown, key=lambda name: len(below(name))):
        height[name] = 1 + max((height[other] for other in imports[name]), default=-1)
    place = {}
    for level in range(max(height.values()) + 1):
        row = sorted((name for name in shown if height[name] == level), key=lambda name: (name in papers, name))
        place |= {name: (i - (len(row) - 1) / 2, level) for i, name in enumerate(row)}
    figure, axis = plt.subplots(figsize=(7, 4.2))
    boxes = {}
    for name, (x, y) in place.items():
        title = sources[name].strip('"').partition(":")[0]
        text = f"{title}\n{name}.py" if name in papers else f"{name}.py"
        boxes[name] = axis.text(x, y, text, ha="center", va="center", fontsize=9, zorder=3,
                                bbox=dict(boxstyle="round,pad=0.5", facecolor="#dcebff" if name in papers else "#f0f0f0",
                                          edgecolor=GREY))
    for name in shown:
        for other in imports[name] - set().union(*map(below, imports[name])):
            patches = dict(patchA=boxes[name].get_bbox_patch(), patchB=boxes[other].get_bbox_patch())
            axis.annotate("", place[other], place[name], zorder=1, arrowprops=dict(arrowstyle="-|>", color=GREY, **patches))
    axis.set(xlim=(-1.7, 1.7), ylim=(-0.4, max(height.values()) + 0.4))
    axis.axis("off")
    return _save(figure, out)


def checkpoint_detections(checkpoint, image, out="detections.jpg", score_threshold=0.3, device="cpu"):
    """Boxes and masks of a checkpoint on one image file. Many images: eval.py --images."""
    model, paper, cfg, recipe, meta, _ = loaded = models.load_model(checkpoint, device)
    picture = data.read_image(image)
    found = above(detect_image(model, paper.detect, picture, cfg, recipe, device), score_threshold)
    return tile([detections(picture, found, meta["class_names"])], out, 1, gap=0)


def checkpoint_predictions(checkpoint, out="predictions.png", folder=None, n=6, score_threshold=0.3, device="cpu"):
    """Ground truth beside predictions on the validation set of a checkpoint."""
    model, paper, cfg, recipe, meta, _ = loaded = models.load_model(checkpoint, device)
    return predictions(model, paper.detect, validation_set(folder, loaded), cfg, recipe, device, out, n, score_threshold)


def checkpoint_noised_boxes(checkpoint, out="noised_boxes.jpg", folder=None, n=3):
    """The denoising queries that a checkpoint's model would make of n validation images. ValueError without any."""
    model, paper, cfg, recipe, meta, _ = loaded = models.load_model(checkpoint)
    if not hasattr(paper, "denoising_queries") or not hasattr(model, "label_enc"):
        raise UserError(f"expected a model trained with denoising queries, got {meta['model_name']} without: give a "
                        "checkpoint of dino.py with --denoising contrastive or plain")
    dataset = validation_set(folder, loaded)
    indices = [index for index in range(len(dataset)) if len(dataset[index][1]["labels"]) > 1][:n]
    targets = [dataset[index][1] for index in indices]
    torch.manual_seed(0)
    denoising = paper.denoising_queries(targets, model.label_enc, model.class_embed[0].out_features, cfg, cfg.num_queries)
    return noised_boxes([dataset.image(index) for index in indices], targets, denoising, out)


COMMANDS = {"detections": checkpoint_detections, "predictions": checkpoint_predictions, "curves": curves,
            "compare_curves": compare_curves, "sampling_points": sampling_points, "anchors": anchors,
            "analysis": analysis, "noised_boxes": checkpoint_noised_boxes, "scenes": scenes, "strip": strip,
            "citations": citations}
HELP = {"checkpoint": "best.pt of a run, or released weights", "image": "picture to look at",
        "out": "picture to write, .png or .jpg", "folder": "COCO-layout folder instead of the checkpoint's own data",
        "score_threshold": "least score shown", "rank": "which detection's query, 0 the best", "device": "cpu or cuda",
        "n": "number of images", "side": "longer side of each picture, px", "run_dir": "run folder",
        "analysis": "analysis.json that eval.py --analyze wrote", "run_dirs": "run folders",
        "labels": "their names in the legend", "kind": "bbox or segm"}


def main(argv=None):
    """One command per function of COMMANDS; its parameters are the flags (`folder` is called --data everywhere)."""
    head, *_ = __doc__.partition("\n\nBoxes are")
    flags = Flags(description=head, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = flags.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, description=function.__doc__)
        for key, parameter in inspect.signature(function).parameters.items():
            required, default = parameter.default is parameter.empty, parameter.default
            shown = "" if required or default is None else f" (default {default})"
            command.add_argument("--data" if key == "folder" else f"--{key}", dest=key, required=required,
                                 default=None if required else default, help=HELP[key] + shown, metavar="X",
                                 type=type(default) if shown else str,
                                 nargs="+" if parameter.annotation is list else None)
    args = vars(flags.parse_args(argv))
    function = COMMANDS[args.pop("name")]
    try:
        print(f"written to {function(**args)}")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"visualize.py: {error}")


if __name__ == "__main__":
    main()
