"""Every picture of the project, one command each; see `python visualize.py NAME --help`.

    detections        boxes and masks of a checkpoint on one image
    predictions       ground truth beside predictions, for some images of the validation set
    strip             detections in a row, or the same images by several models side by side
    mistakes          the worst false alarms, wrong classes and missed objects
    sampling_points   the sampling points of one query per decoder layer and head
                      (Deformable DETR, figure 6)
    anchors           initial anchors against final boxes (DINO, sections 3.3 and 3.4)
    noised_boxes      the denoising queries of a batch and their attention mask (DINO, section 3.3)
    analysis          what analysis.py measured, several checkpoints side by side (Co-DETR, 3.4)
    scenes            a contact sheet of the generated data with its ground truth
    curves            AP, losses and learning rate of a run folder
    compare_curves    AP against training time of several runs
    precision_recall  precision over recall of each class, from eval.json
    explore           a page to click through: everything a detector computes for an image

train.py calls `curves` and `predictions` after every evaluation. Boxes are xyxy in pixels of the
picture here.
"""
import functools
import inspect

import matplotlib
matplotlib.use("Agg")   # draws into files; no display is needed
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle
from PIL import Image, ImageDraw

from analysis import (decoder_attention, discriminability, encoder_norms, read_analyses,
                      recorded_attention)
from boxes import box_cxcywh_to_xyxy
from data import eval_transform
from engine.analysis_plots import analysis_panels, plot_conflict, plot_iof_iob, plot_map
from engine.commands import open_detector, require, with_data
from engine.drawing import color, draw_detections, get_font, save_picture, tile
from engine.errors import UserError, user_errors
from engine.flags import one_line_usage
from engine.images import UnreadableImage
from engine.inference import (above, allow_detections, as_rgb, class_thresholds, detect_image,
                              detect_on_canvas, detect_with, infer, require_finite,
                              require_finite_outputs)
from engine.mistakes import KINDS, find_mistakes
from engine.notices import plural
from engine.plots import (compare_curves, curves, ladder, precision_recall, read_log,
                          save_figure)
from engine.ranges import check_values
from explorer import explore
from scenes import Shapes

__all__ = ["compare_curves", "curves", "draw_detections", "ladder", "predictions", "read_log",
           "save_picture", "scenes"]
LEVEL_COLORS = ("#e6194b", "#ffb000", "#22b14c", "#1e90ff", "#a040ff")   # finest level first
POSITIVE = "#22c03c"                                                     # noised boxes
NEGATIVE = "#e6194b"                                                     # noised boxes, mistakes
OUTSIDE = "#dddddd"                                                      # around the image
MISTAKE_SIDE = 160                                                       # px
DARK = "#39424e"                                                         # ground of light legends


# ---- detections beside ground truth --------------------------------------------------------------

def detections(checkpoint: str, image: str, out: str = "detections.jpg",
               score_threshold: float = 0.3, device: str = "cpu"):
    """Boxes and masks of a checkpoint on one image. For many images: eval.py --images.

    Args:
        checkpoint: best.pt of a run, its folder, or released weights.
        image: Image file.
        out: Picture to write, .png or .jpg.
        score_threshold: Minimum score to draw.
        device: cpu, cuda or mps.
    """
    detector = open_detector(checkpoint, device)
    picture = as_rgb(image)
    shown = above(detect_image(detector, picture), score_threshold)
    return save_picture(draw_detections(picture, shown, detector.meta["class_names"]), out)


def evenly(count, n):
    """n indices from the first to the last of `count`."""
    return np.linspace(0, count - 1, min(n, count)).round().astype(int).tolist()


def open_picture(dataset, index):
    """The original image at `index`; None if it cannot be read."""
    try:
        return dataset.image(index)
    except UnreadableImage:
        return None


def placeholder(side):
    """A gray picture in place of an image that cannot be read."""
    picture = Image.new("RGB", (side, side), (124, 116, 104))
    middle = (side / 2, side / 2)
    draw = ImageDraw.Draw(picture)
    draw.text(middle, "unreadable image", fill="white", font=get_font(13), anchor="mm")
    return picture


def ground_truth(dataset, index, image):
    """The objects of an image in the form of detections: labels, boxes xyxy px, masks (where
    loaded)."""
    target = dataset.pixel_target(index, *image.size)
    return {key: torch.from_numpy(np.asarray(value)) for key, value in target.items()}


def predictions(model, detect, dataset, cfg, device, path, n=6, score_threshold=0.3):
    """Ground truth beside predictions for n images of a data set, on one sheet -> path.

    The model's training mode is restored."""
    was_training = model.training
    model.eval()
    pictures = []
    titles = []
    for index in evenly(len(dataset), n):
        image = open_picture(dataset, index)
        if image is None:
            pictures += [placeholder(256)] * 2
        else:
            truth = ground_truth(dataset, index, image)
            found = detect_with(model, detect, dataset.transform, image, cfg, device)
            for shown in (truth, above(found, score_threshold)):
                pictures.append(draw_detections(image, shown, dataset.class_names, side=256))
        titles += [f"{int(dataset.image_ids[index])}: ground truth",
                   f"detections, score >= {score_threshold:g}"]
    model.train(was_training)
    return tile(pictures, path, 4, titles)


def predictions_of_checkpoint(checkpoint: str, out: str = "predictions.png", data: str = "",
                              n: int = 6, score_threshold: float = 0.3, device: str = "cpu"):
    """Ground truth beside predictions of a checkpoint on its validation set.

    Args:
        checkpoint: best.pt of a run, its folder, or released weights.
        out: Picture to write, .png or .jpg.
        data: COCO-layout folder; default: the checkpoint's own data.
        n: Number of images.
        score_threshold: Minimum score to draw.
        device: cpu, cuda or mps.
    """
    detector, dataset = with_data(open_detector(checkpoint, device), data)
    return predictions(detector.model, detector.paper.detect, dataset, detector.cfg, device, out,
                       n, score_threshold)


def strip(checkpoint: list[str], out: str = "strip.jpg", data: str = "", n: int = 6,
          side: int = 256, score_threshold: float = 0.3, device: str = "cpu"):
    """Detections on n images of the validation set: of one checkpoint in a row, of several in a
    column each, under the names of their papers.

    Args:
        checkpoint: best.pt of runs, their folders, or released weights.
        out: Picture to write, .png or .jpg.
        data: COCO-layout folder; default: each checkpoint's own data.
        n: Number of images.
        side: Longer side of each picture in px.
        score_threshold: Minimum score to draw.
        device: cpu, cuda or mps.
    """
    require(checkpoint, "--checkpoint FILE, one or several", "none")
    columns = []
    names = []
    for path in checkpoint:
        detector, dataset = with_data(open_detector(path, device), data)
        pictures = []
        for index in evenly(len(dataset), n):
            image = open_picture(dataset, index)
            if image is None:
                pictures.append(placeholder(side))
                continue
            shown = above(detect_image(detector, image), score_threshold)
            pictures.append(draw_detections(image, shown, dataset.class_names, side=side))
        columns.append(pictures)
        names.append(detector.paper.__doc__.partition(":")[0])
    if len(columns) == 1:
        return tile(columns[0], out, n, gap=4)
    rows = [picture for row in zip(*columns) for picture in row]
    titles = names + [""] * (len(rows) - len(names))
    return tile(rows, out, len(columns), titles)


def mistakes(checkpoint: str, out: str = "mistakes.jpg", data: str = "", n: int = 6,
             score_threshold: float | None = None, device: str = "cpu"):
    """The worst mistakes on the validation set, a row each: false alarms and wrong classes with the
    highest scores, the largest missed objects. White: ground truth; red: the mistake.

    Args:
        checkpoint: best.pt of a run, its folder, or released weights.
        out: Picture to write, .png or .jpg.
        data: COCO-layout folder; default: the checkpoint's own data.
        n: Number of mistakes of each kind.
        score_threshold: Minimum score of detections; default: for each class the one that the
            checkpoint has stored, else 0.3.
        device: cpu, cuda or mps.
    """
    detector, dataset = with_data(open_detector(checkpoint, device), data)
    thresholds = class_thresholds(detector.meta, score_threshold)
    found = []
    for index in range(len(dataset)):
        image = open_picture(dataset, index)
        if image is not None:
            shown = above(detect_image(detector, image), thresholds)
            truth = ground_truth(dataset, index, image)
            found += [(mistake, index) for mistake in find_mistakes(shown, truth)]
    if not found:
        raise UserError("expected mistakes to draw, got none on "
                        f"{plural(len(dataset), 'image')} of {dataset.name}: a lower "
                        "--score_threshold shows more false alarms")

    pictures = []
    titles = []
    note = "white: ground truth; red: the mistake"
    for kind in KINDS:
        row = [pair for pair in found if pair[0].kind == kind]
        row.sort(key=lambda pair: -pair[0].rank)
        if not row:
            note += f"; {kind}: none"
            continue
        for mistake, index in row[:n]:
            pictures.append(draw_mistake(dataset, index, mistake))
            titles.append(mistake_title(mistake, dataset.class_names))
        for _ in range(n - len(row)):
            pictures.append(Image.new("RGB", (MISTAKE_SIDE, MISTAKE_SIDE), "white"))
            titles.append("")
    return tile(pictures, out, n, titles, note=note)


def mistake_title(mistake, class_names):
    """What was detected, and what it is."""
    name = class_names[mistake.label]
    if mistake.kind == "missed":
        return f"missed: {name}"
    if mistake.kind == "wrong class":
        return f"{name} {mistake.rank:.2f}, is {class_names[mistake.true_label]}"
    return f"false alarm: {name} {mistake.rank:.2f}"


def draw_mistake(dataset, index, mistake):
    """The image around a mistake, with all objects (white) and the mistake (red)."""
    image = dataset.image(index)
    (left, right), (top, bottom) = view_of(mistake.box.numpy(), np.array(image.size))
    factor = MISTAKE_SIDE / (right - left)
    region = [round(float(side)) for side in (left, top, right, bottom)]
    picture = image.crop(region).resize((MISTAKE_SIDE, MISTAKE_SIDE))
    draw = ImageDraw.Draw(picture)
    corner = torch.tensor([left, top] * 2)                                     # (4,)
    boxes = [*ground_truth(dataset, index, image)["boxes"], mistake.box]
    colors = ["white"] * (len(boxes) - 1) + [NEGATIVE]
    for box, rgb in zip(boxes, colors):
        draw.rectangle(((box - corner) * factor).tolist(), outline=rgb, width=2)
    return picture


def scenes(out: str = "scenes.jpg", n: int = 32):
    """A contact sheet of the first n generated training scenes with their masks and boxes.

    Args:
        out: Picture to write, .png or .jpg.
        n: Number of scenes.
    """
    dataset = Shapes("train", n, load_masks=True)
    sheet = []
    for index in range(n):
        image = dataset.image(index)
        truth = ground_truth(dataset, index, image)
        sheet.append(draw_detections(image, truth, dataset.class_names, side=196))
    return tile(sheet, out, 8, gap=4)


# ---- inside the model ----------------------------------------------------------------------------

def run_on_file(checkpoint, image, device, top_k=0):
    """Run a checkpoint on one image -> the detector, the PIL image, the model's outputs, records
    of the decoder's attention in pixels of the image, and the best `top_k` detections (at least
    `cfg.top_k`)."""
    detector = open_detector(checkpoint, device)
    picture = as_rgb(image)
    transform = eval_transform(detector.recipe)
    cfg = allow_detections(detector.model, detector.cfg, top_k)
    with recorded_attention(detector.model) as records:
        outputs = infer(detector.model, transform, picture, device)
    canvas = torch.tensor([transform.canvas_size(*picture.size)], device=device)   # (1, 2)
    size = torch.tensor([[picture.height, picture.width]])                     # (1, 2)
    detection = detect_on_canvas(detector.paper.detect, outputs, canvas, size, cfg)[0]
    require_finite(detection, str(image))
    for record in records:
        place_in_pixels(record, outputs["memory"].valid_ratios, canvas)
    return detector, picture, outputs, records, detection


def place_in_pixels(record, valid_ratios, canvas):
    """Bring reference (B, Nq, L, 2|4) and locations (B, Nq, M, L, K, 2) of a record of attention
    from [0, 1] of the padded maps to pixels of the image.

    valid_ratios (B, L, 2) of the maps; canvas (B, 2): see `detect_on_canvas`."""
    extent = canvas.flip(-1)[:, None] / valid_ratios                           # (B, L, 2)
    repeats = record["reference"].shape[-1] // 2
    record["reference"] = record["reference"] * extent.repeat(1, 1, repeats)[:, None]
    record["locations"] = record["locations"] * extent[:, None, None, :, None]


def sampling_points(checkpoint: str, image: str, out: str = "sampling_points.jpg", rank: int = 0,
                    device: str = "cpu"):
    """The sampling points of the query behind the `rank`-th best detection: a row per decoder
    layer, a column per head.

    Args:
        checkpoint: best.pt of a run, its folder, or released weights.
        image: Image file.
        out: Picture to write, .png or .jpg.
        rank: Which detection's query; 0: the best.
        device: cpu, cuda or mps.
    """
    detector, picture, _, records, found = run_on_file(checkpoint, image, device, rank + 1)
    require(records, "a model with deformable attention", detector.meta["model_name"])
    require(0 <= rank < len(found["scores"]), f"--rank in 0..{len(found['scores']) - 1}", rank)
    query = int(found["query"][rank])
    box = found["boxes"][rank].cpu().numpy()
    layers = []
    for record in records:
        layers.append({key: value[0, query].cpu().numpy() for key, value in record.items()})
    M, L, K = layers[0]["weights"].shape
    size = (1.9 * M + 0.4, 1.9 * len(layers) + 1.1)
    figure, axes = plt.subplots(len(layers), M, figsize=size, squeeze=False)
    limits = view_of(box, np.array(picture.size))
    for i, layer in enumerate(layers):
        axes[i, 0].set_ylabel(f"layer {i + 1}", fontsize=8)
        for m in range(M):
            axis = axes[i, m]
            show(axis, picture, f"head {m + 1}" if i == 0 else "")
            axis.set(xlim=limits[0], ylim=limits[1][::-1], facecolor=OUTSIDE)
            plot_samples(axis, layer, m, box)
    name = detector.meta["class_names"][int(found["labels"][rank])]
    figure.suptitle(f"sampling points of the query that detects: {name} "
                    f"{float(found['scores'][rank]):.2f}", fontsize=10, y=0.995)
    figure.legend(handles=sample_legend(L), loc="lower center", ncols=5, fontsize=8,
                  labelcolor="white", facecolor=DARK)
    return save_figure(figure, out, rect=(0, 0.5 / size[1], 1, 1))


def plot_samples(axis, layer, m, box):
    """One layer and head of a query: detected box, reference point, sampling points by level, all
    in pixels."""
    outline(axis, box, "white", linestyle="--", linewidth=1)
    reference = layer["reference"][0]                                          # (2 or 4,)
    axis.plot(*reference[:2], "+", color="white", markersize=7)
    for level, locations in enumerate(layer["locations"][m]):                  # (K, 2)
        sizes = dot_size(layer["weights"][m, level])
        axis.scatter(*locations.T, s=sizes, color=LEVEL_COLORS[level % 5], alpha=0.9,
                     edgecolors="black", linewidths=0.4)


def dot_size(weight):
    """Area of a sampling point, in points squared."""
    return 8 + 130 * weight


def sample_legend(levels):
    """What the marks of `sampling_points` mean."""
    handles = []
    for level in range(levels):
        handles.append(plt.Line2D([], [], marker="o", linestyle="", label=f"level {level + 1}",
                                  color=LEVEL_COLORS[level % 5]))
    for weight in (0.05, 0.5):
        handles.append(plt.Line2D([], [], marker="o", linestyle="", color="#bbbbbb",
                                  markersize=dot_size(weight) ** 0.5,
                                  label=f"attention weight {weight}"))
    handles += [plt.Line2D([], [], marker="+", linestyle="", color="white",
                           label="reference point of the layer"),
                plt.Line2D([], [], linestyle="--", color="white", label="detected box"),
                Patch(facecolor=OUTSIDE, label="outside the image")]
    return handles


def outline(axis, xyxy, rgb, **style):
    x1, y1, x2, y2 = xyxy
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=rgb, **style))


def view_of(box, extent):
    """The part of an image (w, h) to show around a box (4,) xyxy -> x limits, y limits.

    A square with room around the box, moved into the image and a little margin where the image is
    large enough."""
    side = max(2.2 * (box[2:] - box[:2]).max(), 0.4 * extent.max())
    side = min(side, 1.1 * extent.max())
    margin = 0.05 * side
    centered = (box[:2] + box[2:] - side) / 2
    inside = centered.clip(-margin, np.maximum(extent + margin - side, -margin))
    low = np.where(extent + 2 * margin > side, inside, (extent - side) / 2)
    return (low[0], low[0] + side), (low[1], low[1] + side)


def show(axis, image, title=""):
    """The image, paler than it is, so that what is drawn on it stands out."""
    pixels = np.asarray(image, np.float32) * 0.6 + 0.15 * 255
    axis.imshow(pixels.astype(np.uint8), extent=(0, image.width, image.height, 0),
                interpolation="bicubic")
    axis.set(xlim=(0, image.width), ylim=(image.height, 0), xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)


def anchors(checkpoint: str, image: str, out: str = "anchors.jpg", score_threshold: float = 0.3,
            device: str = "cpu"):
    """Initial anchors (left) against final boxes (right, with a line from each anchor's center).
    Anchors that are points are drawn as points.

    Args:
        checkpoint: best.pt of a run, its folder, or released weights.
        image: Image file.
        out: Picture to write, .png or .jpg.
        score_threshold: Minimum score to draw.
        device: cpu, cuda or mps.
    """
    detector, picture, outputs, _, found = run_on_file(checkpoint, image, device)
    require("anchors" in outputs, "a model whose queries start at anchors",
            detector.meta["model_name"])
    found = above(found, score_threshold)
    class_names = detector.meta["class_names"]
    start = outputs["anchors"][0].float().cpu()                                # (Nq, 2 or 4)
    height, width = eval_transform(detector.recipe).canvas_size(*picture.size)
    start = start * torch.tensor([width, height]).repeat(start.shape[-1] // 2)
    size = (11, 5.4 * picture.height / picture.width + 0.7)
    figure, (left, right) = plt.subplots(1, 2, figsize=size)
    show(left, picture, f"initial anchors of {len(start)} queries")
    show(right, picture, f"final boxes, score >= {score_threshold:g}")
    for anchor in start:
        draw_anchor(left, anchor, "white", alpha=0.6, linewidth=0.7)
    names = draw_paths(left, right, start, found, class_names)
    lines = [plt.Line2D([], [], color=rgb, label=text) for text, rgb in names.items()]
    lines.append(plt.Line2D([], [], color=OUTSIDE, marker="o", markevery=[0], markersize=3,
                            label="from the anchor's center (dot) to the box's"))
    figure.legend(handles=lines, loc="lower center", ncols=5, fontsize=8, facecolor=DARK,
                  labelcolor="white")
    return save_figure(figure, out, rect=(0, 0.09, 1, 1))


def draw_paths(left, right, start, found, class_names):
    """Draw the detections' anchors on the left axis; on the right one their boxes, and a line to
    each from its anchor -> {text of the legend: color}

    start: the anchors of all queries in pixels"""
    colors = {"anchor of a query without detection": "white"}
    rows = list(zip(found["labels"].tolist(), found["boxes"].cpu(), found["query"].tolist()))
    for label, box, query in reversed(rows):                                   # the best on top
        rgb = [value / 255 for value in color(label)]
        colors[class_names[label]] = rgb
        draw_anchor(left, start[query], rgb, linewidth=2)
        outline(right, box, rgb, linewidth=2)
        center = (box[:2] + box[2:]) / 2
        right.plot(*zip(start[query][:2], center), color=rgb, linewidth=1.2)
        right.plot(*start[query][:2], "o", color=rgb, markersize=3)
    return colors


def draw_anchor(axis, anchor, rgb, linewidth, **style):
    """An anchor in pixels: a point (2,) or a box (4,) cxcywh."""
    if len(anchor) == 2:
        axis.plot(*anchor, "o", color=rgb, markersize=2 + 2 * linewidth, **style)
    else:
        outline(axis, box_cxcywh_to_xyxy(anchor), rgb, linewidth=linewidth, **style)


# ---- analysis ------------------------------------------------------------------------------------

def analysis(analysis: str, out: str = "analysis.png", data: str = "", n: int = 3,
             device: str = "cpu"):
    """What analysis.py measured: ATD by object size, instability, the IoF-IoB curves of encoder and
    decoder, the conflict of heads, and the discriminability maps of n validation images.

    Args:
        analysis: analysis.json that analysis.py wrote.
        out: Picture to write, .png or .jpg.
        data: COCO-layout folder; default: each checkpoint's own data.
        n: Number of images.
        device: cpu, cuda or mps.
    """
    analyses = read_analyses(analysis)
    conflicts = {name: a["conflict"] for name, a in analyses.items() if "conflict" in a}
    panels = analysis_panels(analyses)
    width = max(2 * len(analyses), 5, 1.6 * (2 + len(panels) + len(conflicts)))
    figure = plt.figure(figsize=(2.2 * width, 3.4 + 2.2 * n))
    upper, lower = figure.add_gridspec(2, 1, height_ratios=(3.4, 2.2 * n))
    upper = upper.subgridspec(1, 2 + len(panels) + len(conflicts))
    lower = lower.subgridspec(n, 2 * len(analyses))
    for column, part in enumerate(("encoder", "decoder")):
        plot_iof_iob(figure.add_subplot(upper[column]), part, analyses)
    for column, panel in enumerate(panels, start=2):
        panel(figure.add_subplot(upper[column]), analyses)
    for column, (name, conflict) in enumerate(conflicts.items(), start=2 + len(panels)):
        plot_conflict(figure.add_subplot(upper[column]), name, conflict)
    for number, (name, a) in enumerate(analyses.items()):
        maps = discriminability_maps(a["checkpoint"], data, n, device)
        for row, (picture, parts) in enumerate(maps):
            for column, (part, scores) in enumerate(parts.items(), start=2 * number):
                axis = figure.add_subplot(lower[row, column])
                plot_map(axis, picture, scores, f"{name}\n{part} map" if row == 0 else "")
    figure.text(0.5, -0.015, "maps: discriminability (Co-DETR, Eq. 7); brighter: larger within its "
                "map", ha="center", fontsize=8)
    return save_figure(figure, out, dpi=80)


def discriminability_maps(checkpoint, folder, n, device):
    """Yield n images of the validation set and {"encoder", "decoder"}: (h, w) maps on their pixels.
    Images that cannot be read are left out."""
    detector, dataset = with_data(open_detector(checkpoint, device), folder)
    for index in evenly(len(dataset), n):
        picture = open_picture(dataset, index)
        if picture is None:
            continue
        with recorded_attention(detector.model) as records:
            outputs = infer(detector.model, dataset.transform, picture, device)
        require_finite_outputs(outputs, dataset.file_name(index))
        memory = outputs["memory"]
        scores = {"encoder": encoder_norms(memory), "decoder": decoder_attention(memory, records)}
        maps = {}
        for part, tokens in scores.items():
            maps[part] = discriminability(tokens, memory)[0].cpu().numpy()
        yield picture, maps


# ---- denoising -----------------------------------------------------------------------------------

def noised_boxes_of_checkpoint(checkpoint: str, out: str = "noised_boxes.jpg", data: str = "",
                               n: int = 3):
    """The denoising queries that a checkpoint's model would make of n validation images.

    Args:
        checkpoint: best.pt of a run of dino.py, or its folder.
        out: Picture to write, .png or .jpg.
        data: COCO-layout folder; default: the checkpoint's own data.
        n: Number of images.
    """
    detector, dataset = with_data(open_detector(checkpoint), data)
    model, paper, cfg, *_ = detector
    if not hasattr(paper, "denoising_queries") or not hasattr(model, "label_enc"):
        raise UserError("expected a model trained with denoising queries, got "
                        f"{detector.meta['model_name']} without: give a checkpoint of dino.py with "
                        "--denoising contrastive or plain")
    pictures = []
    targets = []
    for index in range(len(dataset)):
        if len(targets) == n:
            break
        if len(dataset.objects(index).labels) < 2:
            continue
        picture = open_picture(dataset, index)
        if picture is not None:
            pictures.append(picture)
            targets.append(dataset[index][1])
    require(targets, "an image with two objects or more", f"none in {dataset.name}")
    torch.manual_seed(0)
    num_classes = model.class_embed[0].out_features
    denoising = paper.denoising_queries(targets, model.label_enc, num_classes, cfg, cfg.num_queries)
    return noised_boxes(pictures, targets, denoising, out)


def noised_boxes(pictures, targets, denoising, out, group=0):
    """The denoising queries of a batch: per image the objects and the queries of one group, then
    the attention mask.

    pictures: PIL images; targets: their {labels (n,), boxes (n, 4) cxcywh in [0, 1]}; denoising:
    what `dino.denoising_queries` gives for them. A group is [N positives | N negatives], N the
    largest number of objects in an image. UserError where no image has objects."""
    N = max((len(queries) for queries, _ in denoising.matches), default=0) // denoising.groups
    if not N:
        raise UserError("expected at least one object in the batch, got none: there is nothing to "
                        "denoise")
    copies = denoising.content.shape[1] // (N * denoising.groups)    # 2: positive and negative
    kinds = (("positive query, learns its object (dotted: where it is)", POSITIVE, "-"),
             ("negative query, farther away, learns \"no object\"", NEGATIVE, "--"))[:copies]
    count = len(pictures)
    figure, axes = plt.subplots(1, count + 1, figsize=(3.6 * (count + 1), 4.3))
    for b, (axis, picture, target) in enumerate(zip(axes, pictures, targets)):
        show(axis, picture, f"image {b + 1}: {len(target['labels'])} objects, "
             f"group {group + 1} of {denoising.groups}")
        scale = torch.tensor(picture.size).repeat(2)
        objects = target["boxes"] * scale
        for copy, (_, rgb, style) in enumerate(kinds):
            first = (group * copies + copy) * N
            reference = denoising.reference[b, first:first + len(objects)].detach().cpu()
            draw_noise(axis, reference * scale, objects, rgb, style)
        for box in objects:
            outline(axis, box_cxcywh_to_xyxy(box), "white", linewidth=2)
    handles = [plt.Line2D([], [], color="white", label="object (ground truth)")]
    for text, rgb, style in kinds:
        handles.append(plt.Line2D([], [], color=rgb, linestyle=style, label=text))
    figure.legend(handles=handles, loc="lower left", ncols=3, fontsize=9, facecolor=DARK,
                  labelcolor="white")
    draw_attention_mask(axes[-1], denoising, copies * N)
    return save_figure(figure, out, rect=(0, 0.07, 1, 1))


def draw_noise(axis, noised, objects, rgb, style):
    """Noised boxes (n, 4), and a dotted line from each to its object (n, 4); all cxcywh px."""
    for box, original in zip(noised, objects):
        outline(axis, box_cxcywh_to_xyxy(box), rgb, linewidth=1.5, linestyle=style)
        axis.plot(*zip(box[:2], original[:2]), ":", color=rgb, linewidth=1)


def draw_attention_mask(axis, denoising, stride):
    """The self-attention mask of denoising groups (`stride` queries each) and matching queries."""
    P = denoising.content.shape[1]
    total = len(denoising.attn_mask)
    axis.imshow(denoising.attn_mask.cpu().numpy(), cmap=ListedColormap(["#f2d16b", DARK]),
                interpolation="nearest", extent=(0, total, total, 0))
    for edge in range(stride, P + 1, stride):
        axis.plot((0, total), (edge, edge), color="white", linewidth=0.4)
        axis.plot((edge, edge), (0, total), color="white", linewidth=0.4)
    names = [f"{denoising.groups} denoising groups", "matching queries"]
    middles = [P / 2, (P + total) / 2]
    axis.set(xlim=(0, total), ylim=(total, 0), xlabel="attended to (key)", ylabel="query",
             xticks=middles, yticks=middles)
    axis.set_xticklabels(names, fontsize=8)
    axis.set_yticklabels(names, fontsize=8, rotation=90, va="center")
    axis.set_title("self-attention mask\nyellow: attends, dark: blocked", fontsize=9)


# ---- commands ------------------------------------------------------------------------------------

COMMANDS = {"detections": detections,
            "predictions": predictions_of_checkpoint,
            "strip": strip,
            "mistakes": mistakes,
            "sampling_points": sampling_points,
            "anchors": anchors,
            "noised_boxes": noised_boxes_of_checkpoint,
            "analysis": analysis,
            "scenes": scenes,
            "curves": curves,
            "compare_curves": compare_curves,
            "precision_recall": precision_recall,
            "explore": explore}


def main(argv=None):
    """Run one of COMMANDS; the parameters of its function are the flags."""
    with user_errors("visualize.py"):
        commands = {name: delayed(function) for name, function in COMMANDS.items()}
        with one_line_usage("visualize.py", argv):
            command = tyro.extras.subcommand_cli_from_dict(
                commands, args=argv, prog="visualize.py", use_underscores=True,
                description=__doc__.partition("\n")[0])
        print(f"written to {command()}")


def delayed(function):
    """A function with the same parameters that only prepares the call: tyro calls it while
    `one_line_usage` holds back stderr; `main` makes the call afterwards."""
    @functools.wraps(function)
    def prepare(*args, **kwargs):
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        numbers = {name: value for name, value in given.items() if value is not None}
        check_values(numbers, {"n": 1, "side": 16, "rank": 0, "score_threshold": 0.3})
        return functools.partial(function, **given)
    return prepare


if __name__ == "__main__":
    main()
