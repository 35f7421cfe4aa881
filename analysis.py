"""..."""
import contextlib
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from engine.errors import UserError
from engine import models
import data
from deformable_attn import MSDeformAttn, ms_deform_attn_torch, sampling_locations
from engine.class_rows import fit_classes
from engine.datasets import validation_set
from engine.inference import predict
from data import SMALL_AREA

SCORE_STEPS = 10_000     # of discriminability: normalised tokens differ little in length, so coarse steps would hide a curve
MATCHED_IMAGES = 200     # validation images whose matching training follows from evaluation to evaluation


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
                raise UserError("expected outputs['anchors'], where each query starts; this model gives none")
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


def run_names(paths):
    """Short names of checkpoints, in order: the run's folder, or the whole path where folders do not tell them apart."""
    names = [Path(path).resolve().parent.name for path in paths]
    return names if len(set(names)) == len(paths) else [str(path) for path in paths]


def analyze_files(model, loaded, dataset, args, **common):
    """`analyze` for --checkpoint, which is open already, and for those of --analyze, each on its own data or on --data
    -> {name: figures and "checkpoint"}."""
    analyses, paths = {}, [args.checkpoint, *args.analyze]
    for name, path in zip(run_names(paths), paths):
        if analyses:
            loaded = models.load_model(path, args.device, args.variant)
            dataset = validation_set(args.data, loaded)
            model = fit_classes(loaded.model, loaded.paper, loaded.cfg, loaded.meta, dataset)
        analyses[name] = {"checkpoint": str(path), **analyze(model, loaded.criterion, dataset, args.device, args.k, **common)}
    return analyses
