"""What the papers measure inside a detector.

Examples:
    python analysis.py --checkpoint runs/dino                  one checkpoint on its own data
    python analysis.py --checkpoint A.pt B.pt C.pt             several, side by side
    python analysis.py --checkpoint FILE --data DIR            on a COCO-layout folder

ATD(k)               how far anchors start from their objects           DINO, section 3.3
IoF-IoB              how well features tell objects from background     Co-DETR, Eq. 7-8
conflict of heads    divergence of the heads' Grad-CAM maps             Co-DETR, Eq. 9-10
instability          queries per image whose matched object changed     DN-DETR, section 3, Eq. 2

The figures are printed and written to analysis.json; `python visualize.py analysis` draws them.
Symbols: B images, Nq queries, S tokens, M heads, L levels, K sampling points, C channels.
"""
import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import data
from data import LARGE_AREA, SMALL_AREA
from deformable_attn import MSDeformAttn, ms_deform_attn_torch, sampling_locations
from engine import commands, files
from engine.errors import UserError, user_errors
from engine.forms import mismatch, read_results
from engine.inference import predict, require_finite_outputs
from engine.machine import prepare_cpu

CURVE = {"IoB": [float], "IoF": [float], "area": float}
FORMS = {"encoder": CURVE, "decoder": CURVE,     # optional parts of analysis.json
         "conflict": {"heads": [str], "S": [[float]]}, "instability": float, "k": int,
         "ATD": float, "ATD_small": float, "ATD_medium": float, "ATD_large": float}
SCORE_STEPS = 10_000     # of discriminability: norms of tokens differ little, coarse steps would
                         # hide the curve
MATCHED_IMAGES = 200     # validation images on which matching instability is measured


@torch.no_grad()
def analyze(model, criterion, dataset, device, k=100, batch_size=1, amp=False, workers=0):
    """Measure ATD(k), and where the outputs allow it IoF-IoB and the conflict of heads.

    ATD(k), DINO, section 3.3 and figure 4a, b: for every object the distance to the initial anchor
    of the query whose last-layer prediction is matched to it. Co-DETR, section 3.4, where outputs
    hold `memory`: how well encoder and decoder tell objects from background (`iof_iob`), and where
    the model has several heads (`confidences`), their conflict.

    -> {"ATD", "ATD_small", "ATD_medium", "ATD_large", "k", "objects", "small_objects",
    "coordinates": "xywh" or "xy", "encoder" and "decoder": see `iof_iob`, "conflict": see
    `conflict`}; small: a box of less than 32^2 px in the original image, large: of more than 96^2.
    UserError for a model without `outputs["anchors"]`."""
    distances = []
    areas = []
    heads = []
    divergences = []
    counts = {"encoder": torch.zeros(2, SCORE_STEPS), "decoder": torch.zeros(2, SCORE_STEPS)}
    indices = range(len(dataset))
    with recorded_attention(model) as records:
        for outputs, targets in predict(model, dataset, indices, device, batch_size, amp, workers):
            if "anchors" not in outputs:
                raise UserError("expected outputs['anchors'], where each query starts; "
                                "this model gives none")
            require_finite_outputs(outputs, f"batch {len(distances) + 1}")
            targets = data.to_device(targets, device)
            distance, area = matched_distances(outputs, targets, criterion)
            distances.append(distance)
            areas.append(area)
            if "memory" in outputs:
                memory = outputs["memory"]
                maps = {"encoder": encoder_norms(memory),
                        "decoder": decoder_attention(memory, records)}
                for part, scores in maps.items():
                    counts[part] += batch_counts(scores, memory, targets)
            if hasattr(model, "confidences"):
                heads, divergence = head_divergences(model, memory)
                divergences.append(divergence)
            records.clear()

    points = outputs["anchors"].shape[-1] == 2
    figures = {**atd_by_size(torch.cat(distances), torch.cat(areas), k),
               "coordinates": "xy" if points else "xywh"}
    for part, count in counts.items():
        if count.any():
            figures[part] = iof_iob(count)
    if len(heads) > 1:
        figures["conflict"] = conflict(heads, torch.cat(divergences).mean(0))
    return figures


# ---- DINO, section 3.3: anchors and their objects ------------------------------------------------

def matched_distances(outputs, targets, criterion):
    """For all objects of a batch: L1 distance to the anchor of their query (n,), area in px."""
    anchors = outputs["anchors"].float()                                       # (B, Nq, 2 or 4)
    distances = []
    areas = []
    for b, (query, index) in enumerate(criterion.match(outputs, targets)):
        boxes = targets[b]["boxes"][index.to(anchors.device)]                  # (n, 4)
        distances.append(anchor_distances(anchors[b, query.to(anchors.device)], boxes))
        areas.append(boxes[:, 2:].prod(-1) * targets[b]["canvas_size"].prod())
    return torch.cat(distances).cpu(), torch.cat(areas).cpu()


def anchor_distances(anchors, boxes):
    """L1 distance (n,) between initial anchors (n, 2 or 4) and boxes (n, 4), normalized cxcywh.

    Anchors that are points are compared with the boxes' centers."""
    return (anchors - boxes[:, :anchors.shape[-1]]).abs().sum(-1)


def atd_by_size(distances, areas, k):
    """The figures of ATD(k), from the distances (n,) and the areas (n,) in px of all objects."""
    small = areas < SMALL_AREA
    large = areas > LARGE_AREA
    return {"ATD": atd(distances, k),
            "ATD_small": atd(distances[small], k),
            "ATD_medium": atd(distances[~small & ~large], k),
            "ATD_large": atd(distances[large], k),
            "k": k,
            "objects": len(distances),
            "small_objects": int(small.sum())}


def atd(distances, k=100):
    """ATD(k), the mean of the k largest distances (of all if there are fewer); -1 without any."""
    if not len(distances):
        return -1.0
    return float(distances.topk(min(k, len(distances))).values.mean())


# ---- DN-DETR, section 3, Eq. 2: instability of the matching --------------------------------------

def assignments(model, criterion, dataset, device, **common):
    """The object that each query is matched to, -1 for none, in the first MATCHED_IMAGES images
    -> (images, Nq) int16. Images with fewer queries are filled up with -1."""
    rows = []
    indices = range(min(len(dataset), MATCHED_IMAGES))
    for outputs, targets in predict(model, dataset, indices, device, **common):
        require_finite_outputs(outputs, f"the batch after {len(rows)} images")
        num_queries = outputs["pred_logits"].shape[1]
        for query, index in criterion.match(outputs, data.to_device(targets, device)):
            row = torch.full((num_queries,), -1, dtype=torch.int16)
            row[query] = index.to(torch.int16)
            rows.append(row)
    return pad_sequence(rows, batch_first=True, padding_value=-1)


def instability(before, after):
    """Queries per image whose matched object differs between two results of `assignments`; None
    where they differ in shape."""
    if before.shape != after.shape:
        return None
    return (before != after).sum(1).float().mean().item()


# ---- Co-DETR, section 3.4: objects against background --------------------------------------------

@contextlib.contextmanager
def recorded_attention(model):
    """Within the block, every call of the model adds to the list a record for each deformable
    attention of the decoder: {reference (B, Nq, L, 2|4), locations (B, Nq, M, L, K, 2),
    weights (B, Nq, M, L, K)}.

    Locations and weights are computed again from each module's inputs (Deformable DETR, Eq. 3)."""
    records = []

    def record(module, inputs):
        query, reference, _, shapes, *_ = inputs
        M, L, K = module.num_heads, module.num_levels, module.num_points
        offsets = module.sampling_offsets(query).float()                       # (B, Nq, M L K 2)
        offsets = offsets.unflatten(-1, (M, L, K, 2))                          # (B, Nq, M, L, K, 2)
        weights = module.attention_weights(query).float()                      # (B, Nq, M L K)
        weights = weights.unflatten(-1, (M, L * K)).softmax(-1)                # (B, Nq, M, L K)
        records.append({"reference": reference,
                        "weights": weights.unflatten(-1, (L, K)),
                        "locations": sampling_locations(reference, offsets, shapes)})

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, MSDeformAttn) and "decoder" in name:
            hooks.append(module.register_forward_pre_hook(record))
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


def encoder_norms(memory):
    """L2 norms of the encoder's tokens, 0 on padding -> (B, S)."""
    return memory.tokens.float().norm(dim=-1).masked_fill(memory.padding, 0)


def decoder_attention(memory, records):
    """Attention of the decoder to each token -> (B, S).

    OUR CHOICE (the paper says "the cross-attention score"): the weights of all queries, heads,
    points and layers, each distributed over the four tokens around its sampling point by bilinear
    interpolation. That is the derivative of the attention's output with respect to the values."""
    B, S = memory.padding.shape
    M = records[0]["weights"].shape[2]
    with torch.enable_grad():
        values = torch.ones(B, S, M, 1, device=memory.tokens.device, requires_grad=True)
        total = 0
        for record in records:
            output = ms_deform_attn_torch(values, memory.shapes, record["locations"],
                                          record["weights"])
            total = total + output.sum()
    attention, = torch.autograd.grad(total, values)                            # (B, S, M, 1)
    return attention.sum((2, 3)).masked_fill(memory.padding, 0)


def discriminability(scores, memory):
    """Discriminability maps of token scores (B, S) (Co-DETR, Eq. 7) -> (B, H, W) in [0, 1].

    Level by level resized to the input and divided by the map's largest value, then averaged over
    levels. OUR CHOICE: padding counts as 0."""
    maps = []
    for level, shape in zip(memory.by_level(scores), memory.shapes):
        level = level.unflatten(1, shape)[:, None]                             # (B, 1, H_l, W_l)
        level = F.interpolate(level, memory.padded_size, mode="bilinear")[:, 0]    # (B, H, W)
        largest = level.amax((1, 2), keepdim=True).clamp(min=1e-12)
        maps.append(level / largest)
    return torch.stack(maps).mean(0)


def batch_counts(scores, memory, targets):
    """`score_counts` of token scores (B, S), summed over the images of a batch."""
    counts = torch.zeros(2, SCORE_STEPS)
    maps = discriminability(scores, memory)                                    # (B, H, W)
    for image, target, size in zip(maps, targets, memory.image_sizes.tolist()):
        counts += score_counts(image, target["boxes"], size)
    return counts


def score_counts(scores, boxes, size):
    """Count the pixels of one image by score -> (2, SCORE_STEPS), background and foreground.

    scores (H, W) in [0, 1], boxes (n, 4) normalized cxcywh, size (h, w) without padding. OUR
    CHOICE: foreground is the union of the boxes, and pixels are counted over the whole data set."""
    h, w = size
    foreground = torch.zeros(h, w, dtype=torch.bool, device=scores.device)
    for cx, cy, bw, bh in boxes.tolist():
        rows = slice(max(0, round((cy - bh / 2) * h)), round((cy + bh / 2) * h))
        columns = slice(max(0, round((cx - bw / 2) * w)), round((cx + bw / 2) * w))
        foreground[rows, columns] = True
    step = (scores[:h, :w] * SCORE_STEPS).long().clamp(0, SCORE_STEPS - 1)
    counts = torch.bincount((step + SCORE_STEPS * foreground).flatten(), minlength=2 * SCORE_STEPS)
    return counts.view(2, -1).float().cpu()


def iof_iob(counts):
    """The IoF-IoB curve (Co-DETR, Eq. 8) from pixel counts (2, SCORE_STEPS) of a complete data set.

    Above a threshold lies the share IoF of the foreground, below it the share IoB of the
    background. A curve further up and right separates them better; the area under it is the
    probability that a foreground pixel scores higher than a background pixel.
    -> {"IoB": 0, 0.01, ..., 1, "IoF": 101 numbers there, "area": number}"""
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)                  # (2, steps)
    cumulative = torch.cat((torch.zeros(2, 1), share.double().cumsum(1)), 1)   # (2, steps + 1)
    iob, missed = cumulative
    grid = np.linspace(0, 1, 101)
    return {"IoB": grid.tolist(),
            "IoF": np.interp(grid, iob, 1 - missed).tolist(),
            "area": float(torch.trapezoid(1 - missed, iob))}


# ---- Co-DETR, section 4.4: conflict of heads -----------------------------------------------------

@torch.enable_grad()
def head_divergences(model, memory):
    """KL(C_i || C_j) of the heads' Grad-CAM maps C on the encoder's tokens, image by image.

    Co-DETR, section 4.4 and appendix A: the terms of Eq. 9 (= 11) -> names of H heads, the
    detector's first, and (B, H, H). OUR CHOICE: `model.confidences` is what is differentiated, and
    a map is one distribution over all levels. The floor of 1e-8 under the logarithm (see
    `grad_cam`) sets the size of the figures: where map i has all its weight and map j has none, the
    divergence is log(1e8) = 18. Only figures with the same floor can be compared; the paper does
    not state its own."""
    tokens = memory.tokens.detach().float().requires_grad_()
    memory = memory._replace(tokens=tokens)
    confidences = model.confidences(memory)
    maps = []
    for value in confidences.values():
        gradient, = torch.autograd.grad(value, tokens, retain_graph=True)      # (B, S, C)
        maps.append(grad_cam(memory, gradient).detach())                       # (B, S)
    p = torch.stack(maps, 1)                                                   # (B, H, S)
    log_ratio = p.log()[:, :, None] - p.log()[:, None]                         # (B, H, H, S)
    return list(confidences), (p[:, :, None] * log_ratio).sum(-1).cpu()


def grad_cam(memory, gradient):
    """Grad-CAM (Selvaraju et al. 2017, Eq. 1-2) of each level by its own mean gradient.

    memory.tokens and `gradient` (B, S, C) -> (B, S), at least 0 and, OUR CHOICE, divided by its sum
    over all levels, after adding 1e-8 of the largest value for the logarithm."""
    maps = []
    for x, g in zip(memory.by_level(memory.tokens), memory.by_level(gradient)):
        weights = g.mean(1, keepdim=True)                                      # (B, 1, C)
        maps.append(F.relu((x * weights).sum(-1)))                             # (B, H_l W_l)
    cam = torch.cat(maps, 1).masked_fill(memory.padding, 0)                    # (B, S)
    cam = cam / cam.amax(1, keepdim=True).clamp(min=1e-30) + 1e-8
    return cam / cam.sum(1, keepdim=True)


def conflict(heads, S):
    """Conflict of heads: Co-DETR, section 4.4 and appendix A, Eq. 10 (= 12).

    heads: H names, the detector's first; S (H, H): divergences averaged over images (Eq. 9). A
    head's figure is the mean of its divergences from and to the others. As in Figure 6, with K > 1
    auxiliary heads these are the other auxiliary heads; with one, the detector's head.
    -> {"heads": names, "S": rows of numbers, "average": {head: number}}"""
    first = 1 if len(heads) > 2 else 0
    among = S[first:, first:]
    average = (among.sum(0) + among.sum(1)) / (2 * (len(among) - 1))
    return {"heads": heads, "S": S.tolist(), "average": dict(zip(heads[first:], average.tolist()))}


# ---- tables and command line ---------------------------------------------------------------------

def analysis_table(analyses):
    """{name: figures of `analyze`, with "instability" or without} as text: a column for each name,
    then the heads' conflicts."""
    k = next(iter(analyses.values()))["k"]
    rows = {f"ATD({k})": [], f"ATD({k}) small": [], f"ATD({k}) medium": [], f"ATD({k}) large": [],
            "IoF-IoB encoder": [], "IoF-IoB decoder": [], "conflict of heads": [],
            "instability": []}
    for a in analyses.values():
        conflicts = list(a["conflict"]["average"].values()) if "conflict" in a else None
        sizes = [a[f"ATD_{size}"] for size in ("small", "medium", "large")]
        sizes = [None if value < 0 else value for value in sizes]      # -1: no such object
        values = (a["ATD"], *sizes, a.get("encoder", {}).get("area"),
                  a.get("decoder", {}).get("area"),
                  None if conflicts is None else float(np.mean(conflicts)), a.get("instability"))
        for row, value in zip(rows.values(), values):
            row.append(value)

    width = max(10, *map(len, analyses)) + 2
    lines = [" " * 18 + "".join(f"{name:>{width}}" for name in analyses)]
    for title, values in rows.items():
        if any(value is not None for value in values):
            cells = [f"{'-' if value is None else f'{value:.4f}':>{width}}" for value in values]
            lines.append(f"{title:18}" + "".join(cells))
    lines += ["", *explanations(analyses, k)]
    for name, a in analyses.items():
        if "conflict" in a:
            lines += ["", *conflict_table(name, a["conflict"])]
    return "\n".join(lines)


def explanations(analyses, k):
    """Lines that say what the rows of the table mean."""
    lines = [f"ATD({k}): mean of the {k} largest distances between initial anchors and objects,",
             "    |x| + |y| + |w| + |h|, normalized; smaller is better"]
    points = [name for name, a in analyses.items() if a["coordinates"] == "xy"]
    if points:
        lines.append(f"    {', '.join(points)}: |x| + |y| of anchors that are points, not "
                     "comparable with those of boxes")
    if any("encoder" in a for a in analyses.values()):
        lines.append("IoF-IoB: probability that a pixel inside a box scores higher than one "
                     "outside")
    if any(a.get("instability") is not None for a in analyses.values()):
        lines.append("instability: queries per image whose matched object differs from the "
                     "checkpoint before")
    return lines


def conflict_table(name, values):
    """The divergences between the heads of one model, as lines."""
    lines = [f"{name}: KL divergence of the row's Grad-CAM map from the column's"]
    lines.append(" " * 12 + "".join(f"{head:>11}" for head in (*values["heads"], "average")))
    for head, row in zip(values["heads"], values["S"]):
        cells = [f"{value:>11.4f}" for value in row]
        average = values["average"].get(head)
        cells.append(f"{'-':>11}" if average is None else f"{average:>11.4f}")
        lines.append(f"{head:12}" + "".join(cells))
    return lines


def read_analyses(path):
    """analysis.json -> {name: what `analyze` measured}. UserError for a file of another form."""
    analyses = read_results(path, {str: {"checkpoint": str}})
    faults = [] if analyses else ["at least one checkpoint, got none"]
    for name, a in analyses.items():
        fault = mismatch(a, {part: FORMS[part] for part in FORMS if part in a}, name)
        faults += [fault or fault_in_lengths(name, a)]
    fault = next(filter(None, faults), "")
    if fault:
        raise UserError(f"{path}: expected {fault}; make it again with analysis.py")
    return analyses


def fault_in_lengths(name, a):
    """What is wrong with the lengths of lists in one entry of analysis.json, or nothing."""
    for part in ("encoder", "decoder"):
        if part in a and len(a[part]["IoB"]) != len(a[part]["IoF"]):
            return f"as many numbers IoB as IoF in the {part} of {name}"
    if "conflict" in a:
        heads = len(a["conflict"]["heads"])
        if not heads or [len(row) for row in a["conflict"]["S"]] != [heads] * heads:
            return f"a row and a column of S for each of the heads of {name}"
    return ""


def run_names(paths):
    """Short names of checkpoints: the run's folder or the name in assets/weights, the file where
    all lie in one folder, or else the complete path."""
    folders = [commands.results_folder(str(path)).absolute().name for path in paths]
    for names in (folders, [Path(path).stem for path in paths]):
        if len(set(names)) == len(paths):
            return names
    return [str(path) for path in paths]


@dataclass
class Options:
    """Measure what the papers measure inside a detector: ATD(k), IoF-IoB, conflict of heads and
    matching instability."""
    checkpoint: list[str]   # checkpoints or run folders; several are compared side by side
    data: str = ""          # COCO-layout folder; none: the data of each checkpoint's own run
    k: int = 100            # k in ATD(k)
    out: str = ""           # folder for analysis.json; none: that of the first checkpoint
    batch_size: int = 1     # images per batch
    workers: int = 0        # processes that read images
    device: str = ""        # cpu, cuda or mps; none: cuda if there is a GPU
    amp: bool = False       # bfloat16 autocast
    variant: str = ""       # variant of released weights whose file does not show it: dc5


def analyze_files(options):
    """`analyze` for each checkpoint -> {name: figures and "checkpoint"}. A checkpoint that follows
    one of the same run folder also gets its "instability"."""
    device, _, world = commands.join_processes(options.device)
    commands.require(world == 1, "one process: analysis.py measures in one", f"{world} processes")
    common = dict(batch_size=options.batch_size, amp=options.amp, workers=options.workers)
    analyses = {}
    previous = None
    for name, path in zip(run_names(options.checkpoint), options.checkpoint):
        detector = commands.open_detector(path, device, options.variant)
        detector, dataset = commands.with_data(detector, options.data)
        run = (detector.model, detector.criterion, dataset, device)
        figures = analyze(*run, options.k, **common)
        if len(options.checkpoint) > 1:
            matches = assignments(*run, **common)
            folder = commands.results_folder(path).resolve()
            source = (folder, detector.meta["model_name"], dataset.name, len(dataset))
            if previous and previous[0] == source:
                figures["instability"] = instability(previous[1], matches)
            previous = source, matches
        analyses[name] = {"checkpoint": str(path), **figures}
    return analyses


def main(argv=None):
    with user_errors("analysis.py"):
        options = commands.parse(Options, "analysis.py", __doc__, argv)
        commands.check_measuring(options)
        commands.require(options.k >= 1, "--k of at least 1", options.k)
        folder = commands.results_folder(options.checkpoint[0])
        out = files.prepare_folder(options.out or folder)
        analyses = analyze_files(options)
        print(analysis_table(analyses))
        files.write_json(out / "analysis.json", analyses)
        print(f"\nwritten to {out / 'analysis.json'}; curves and maps: "
              f"python visualize.py analysis --analysis {out / 'analysis.json'}")


if __name__ == "__main__":
    prepare_cpu()
    main()
