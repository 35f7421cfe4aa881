"""What the encoder's proposals and every decoder layer contribute to a detector.

    python -m tools.layer_analysis --checkpoint dino_small      one checkpoint on its own data
    python -m tools.layer_analysis --checkpoint A.pt B.pt       several, side by side

AP by layer            AP of the boxes and classes of each decoder layer        DETR, section 4.2
duplicates by layer    detections of an object beyond its first one             DINO, section 3.3
recall of proposals    objects near one of the encoder's best proposals         Deformable DETR, 4.2

The figures are printed and written to layers.json, and drawn in layers.png.
Symbols: Nq queries, n objects, k detections.
"""
from dataclasses import dataclass

import torch

from analysis import run_names
from boxes import box_cxcywh_to_xyxy, box_iou
from engine import commands, files
from engine.analysis_plots import layers as plot_layers
from engine.errors import user_errors
from engine.inference import (allow_detections, detect_on_canvas, predict,
                              require_finite_outputs)
from engine.machine import prepare_cpu
from eval import coco_results, limit_of, score_results

CONFIDENT = 0.3          # score of a detection that counts as a duplicate (our choice)
OVERLAP = 0.5            # IoU from which a box belongs to an object (our choice)
COUNTS = (1, 3, 10, 30, 100, 300, 900)     # best proposals of an image


@torch.no_grad()
def measure(detector, dataset, device, **common) -> dict:
    """The figures of a detector on a data set, a number for each decoder layer or count.

    -> {"AP", "AP50", "duplicates": a number for each layer, "objects": their number}, and for
    two-stage detectors "counts", numbers of best proposals, and "recall", the share of objects with
    an IoU of at least OVERLAP with one of so many."""
    limit = limit_of(dataset)
    cfg = allow_detections(detector.model, detector.cfg, limit)
    results = []
    duplicates = []
    ranks = []
    count = 0
    indices = range(len(dataset))
    for outputs, targets in predict(detector.model, dataset, indices, device, **common):
        require_finite_outputs(outputs, f"images {targets[0]['image_id']} and following")
        sizes = torch.stack([target["orig_size"] for target in targets])       # (B, 2), h and w
        canvas = torch.stack([target["canvas_size"] for target in targets])    # (B, 2)
        image_ids = [target["image_id"] for target in targets]
        for number, layer in enumerate([*outputs["aux_outputs"], {}]):
            if number == len(results):
                results.append([])
                duplicates.append(0)
            # the layer's logits and boxes in place of the last one's
            detections = detect_on_canvas(detector.paper.detect, {**outputs, **layer},
                                          canvas.to(device), sizes, cfg)
            results[number] += coco_results(detections, image_ids, dataset.category_ids)
            for detection, target in zip(detections, targets):
                duplicates[number] += count_duplicates(detection, target)
        for b, target in enumerate(targets):
            count += len(target["labels"])
            if "enc_outputs" in outputs:
                anchors = outputs["anchors"][b].float().cpu()                  # (Nq, 4)
                ranks.append(first_ranks(anchors, target["boxes"]))

    scores = [score_results(dataset, rows, limit)["bbox"] for rows in results]
    figures = {"AP": [score["AP"] for score in scores],
               "AP50": [score["AP50"] for score in scores],
               "duplicates": [number / max(1, count) for number in duplicates],
               "objects": count}
    if ranks and count:
        figures |= recall(torch.cat(ranks), len(anchors))
    return figures


def recall(ranks: torch.Tensor, num_queries: int) -> dict:
    """Recall of the best proposals from the `first_ranks` (n,) of all objects
    -> {"counts": numbers of proposals, "recall": a number for each}"""
    counts = [number for number in COUNTS if number < num_queries] + [num_queries]
    return {"counts": counts,
            "recall": [float((ranks < number).float().mean()) for number in counts]}


def count_duplicates(detection: dict, target: dict) -> int:
    """How many confident detections of an image are not the first one of their object.

    A detection belongs to the object of its class with which it overlaps most, if by OVERLAP."""
    confident = detection["scores"].cpu() >= CONFIDENT
    boxes = detection["boxes"].cpu()[confident]                                # (k, 4) px
    labels = detection["labels"].cpu()[confident]                              # (k,)
    height, width = target["canvas_size"].tolist()
    scale = torch.tensor([width, height, width, height])
    iou, _ = box_iou(boxes, box_cxcywh_to_xyxy(target["boxes"]) * scale)       # (k, n)
    if not iou.numel():
        return 0
    best, index = (iou * (labels[:, None] == target["labels"])).max(1)         # (k,)
    objects = index[best >= OVERLAP]
    return len(objects) - len(objects.unique())


def first_ranks(proposals: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """The rank (n,) of the first proposal that overlaps each object by OVERLAP, Nq if none does.

    proposals (Nq, 4), best first, and boxes (n, 4), all cxcywh."""
    iou, _ = box_iou(box_cxcywh_to_xyxy(proposals), box_cxcywh_to_xyxy(boxes))     # (Nq, n)
    near = iou >= OVERLAP
    none_near = torch.ones_like(near[:1])
    return torch.cat((near, none_near)).int().argmax(0)


# ---- table and command line ----------------------------------------------------------------------

def layer_table(measures: dict) -> str:
    """{name: figures of `measure`} as text: a block for each figure, a column for each name."""
    width = max(10, *map(len, measures)) + 2
    lines = [" " * 24 + "".join(f"{name:>{width}}" for name in measures)]
    for key, title in (("AP", "AP, layer"), ("AP50", "AP50, layer"),
                       ("duplicates", "duplicates, layer"), ("recall", "recall, proposals")):
        columns = [by_place(figures, key) for figures in measures.values()]
        for place in sorted(set().union(*columns)):
            cells = [f"{column[place]:.3f}" if place in column else "-" for column in columns]
            lines.append(f"{title} {place}".ljust(24) + "".join(f"{x:>{width}}" for x in cells))
    lines += ["", f"duplicates: detections an object beyond its first one, of its class, with a "
              f"score of {CONFIDENT} and an IoU of {OVERLAP}"]
    if any("recall" in figures for figures in measures.values()):
        lines.append(f"recall: objects with an IoU of {OVERLAP} with one of so many proposals")
    return "\n".join(lines)


def by_place(figures: dict, key: str) -> dict[int, float]:
    """{number of the layer, or number of proposals: figure}; {} where it was not measured."""
    values = figures.get(key, [])
    places = figures["counts"] if key == "recall" and values else range(1, len(values) + 1)
    return dict(zip(places, values))


@dataclass
class Options:
    """Measure AP and duplicates of every decoder layer, and the recall of the proposals."""
    checkpoint: list[str]   # checkpoints or run folders; several are compared side by side
    data: str = ""          # COCO-layout folder; none: the data of each checkpoint's own run
    out: str = ""           # folder for layers.json and .png; none: that of the first checkpoint
    batch_size: int = 1     # images per batch
    workers: int = 0        # processes that read images
    device: str = ""        # cpu, cuda or mps; none: cuda if there is a GPU
    amp: bool = False       # bfloat16 autocast
    variant: str = ""       # variant of released weights whose file does not show it: dc5


def measure_checkpoints(options: Options) -> dict:
    """{name: figures of `measure`} of every checkpoint."""
    device, _, world = commands.join_processes(options.device)
    commands.require(world == 1, "one process: layer_analysis measures in one",
                     f"{world} processes")
    common = dict(batch_size=options.batch_size, amp=options.amp, workers=options.workers)
    measures = {}
    for name, path in zip(run_names(options.checkpoint), options.checkpoint):
        detector = commands.open_detector(path, device, options.variant)
        commands.require(not getattr(detector.paper, "NEEDS_DETECTOR", False),
                         "a detector of boxes", detector.meta["model_name"])
        detector, dataset = commands.with_data(detector, options.data)
        measures[name] = measure(detector, dataset, device, **common)
    return measures


def main(argv=None) -> None:
    with user_errors("tools.layer_analysis"):
        options = commands.parse(Options, "python -m tools.layer_analysis", __doc__, argv)
        commands.check_measuring(options)
        folder = commands.results_folder(options.checkpoint[0])
        out = files.prepare_folder(options.out or folder)
        measures = measure_checkpoints(options)
        print(layer_table(measures))
        files.write_json(out / "layers.json", measures)
        plot_layers(measures, out / "layers.png")
        print(f"\nwritten to {out / 'layers.json'} and {out / 'layers.png'}")


if __name__ == "__main__":
    prepare_cpu()
    main()
