"""The explorer: what a detector computes for an image, in one HTML page to click through.

    python visualize.py explore --checkpoint FILE --images photo.jpg scene

The page needs no server and no network. This file collects the numbers with hooks and with the
functions of the paper files, and writes them into explorer.html, which draws them.

    view of the page          computed by
    boxes, classes            `decode` of the model, and `detect` of its paper file
    sampling points           analysis.recorded_attention
    attention map (DETR)      attention_weights, with the weights of nn.MultiheadAttention
    queries                   attention_weights, with the weights of the self-attention
    proposals                 `propose` of the model; the scores of all tokens by a hook
    matching                  matcher.match_cost, matcher.assign
    denoising                 dino.denoising_queries; `decode` of the model, in evaluation mode
    masks                     the outputs of the mask network, and masks.paste

Numbers are stored in base64: boxes and costs in float32, values of a known range as integers of 16
bits (`pack_range`). What does not fit into MAX_BYTES is left out for the queries with the lowest
scores, and the page says so.

Symbols: Nq queries, A decoder layers, M heads, L levels, K sampling points, S tokens, N classes,
n objects, P denoising queries.
"""
import base64
import contextlib
import inspect
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import deformable_attn
import deformable_detr
import masks
import matcher
from analysis import recorded_attention
from deformable_detr import Queries, proposal_boxes
from engine.commands import in_used_classes, open_detector, require
from engine.datasets import validation_set
from engine.errors import UserError
from engine.files import complete_file
from engine.images import UnreadableImage
from engine.inference import as_rgb, infer, require_finite
from matcher import Weights
from scenes import Shapes

ROOT = Path(__file__).resolve().parent
TEMPLATE = ROOT / "explorer.html"
PLACE = "__DATA__"         # where the numbers stand in the template
MAX_SIDE = 1024            # px, the longer side of the picture in the page
MAX_BYTES = 240_000        # of the sampling points, maps or masks of one image
CLASSES = 8                # stored for a query: those with the highest scores
ATTENDED = 6               # other queries stored for a query: those with the largest weights
CANDIDATES = 8             # queries stored for an object: those with the lowest costs
COSTS = 400                # candidates of all objects together
LOW, HIGH = -1.0, 2.0      # range of stored sampling locations, the image being [0, 1]
DEFAULT_NUMBER = {"scene": 15, "val": 0}   # scene 15 has seven objects
PAPERS = {"DETR": "2005.12872", "Deformable DETR": "2010.04159", "DINO": "2203.03605",
          "DN-DETR": "2203.01305", "H-DETR": "2207.13080", "Co-DETR": "2211.12860",
          "Mask Frozen-DETR": "2308.03747", "Mask R-CNN": "1703.06870"}
# where the papers describe `decode` and `propose`, by the class that has them
DECODERS = {"DETR": ("DETR", "section 3.2"),
            "DeformableDETR": ("Deformable DETR", "sections 4.1 and 4.2"),
            "DINO": ("DINO", "section 3.5, Eq. 2"),
            "HDETR": ("H-DETR", "section 4.2, Table 8")}
PROPOSERS = {"DeformableDETR": ("Deformable DETR", "section 4.2, A.4"),
             "DINO": ("DINO", "section 3.4"),
             "HDETR": ("H-DETR", "section 4.2, Table 8")}
DETECTS = {"detr": ("DETR", "section 3.1"),
           "co_detr": ("Co-DETR", "section 4.3"),
           "mask_frozen_detr": ("Mask Frozen-DETR", "mask scoring")}


class Picture(NamedTuple):
    """An image to explore."""
    name: str
    image: Image.Image           # RGB, upright
    target: dict | None          # labels (n,) and boxes (n, 4) cxcywh in [0, 1]; None: unknown
    notes: list                  # lines that the page shows


class Parts(NamedTuple):
    """A loaded detector in the parts that the views need."""
    loaded: object               # what engine.models.load_model returned
    inner: torch.nn.Module       # the detector with `encoder` and `decoder`
    module: object               # Python module of its class
    rule: tuple | None           # weights, epsilon and class cost of its matching, where known


class Records(NamedTuple):
    """What hooks recorded in one forward pass, for one image."""
    sampling: list               # per layer: see analysis.recorded_attention
    self_attention: list         # per layer (Nq, Nq), mean of the heads
    maps: list                   # per layer (Nq, S), DETR's attention to the tokens
    token_logits: list           # (S, N) of DINO's proposals; nothing for other models


def explore(checkpoint: str, images: list[str], out: str = "explorer.html", data: str = "",
            seed: int = 0, device: str = "cpu"):
    """One HTML page that shows what happens inside a detector, to click through.

    Args:
        checkpoint: best.pt of a run, its folder, or released weights.
        images: Image files; scene or scene:N: a generated validation scene, with its ground truth;
            val or val:N: image N of the validation set, with its ground truth.
        out: Page to write, .html.
        data: COCO-layout folder of val; default: the checkpoint's own data.
        seed: Seed of the noise of denoising queries.
        device: cpu, cuda or mps.
    """
    require(images, "--images with at least one image", "none")
    if Path(out).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out: expected a page to write, .html, got {out}")
    detector = in_used_classes(open_detector(checkpoint, device))
    if detector.recipe.augment == "lsj":
        raise UserError(f"{checkpoint}: expected a detector whose padding is masked, got one of "
                        "large-scale jitter: its boxes are relative to a square, not to the image")
    parts = take_apart(detector)
    pictures = [open_picture(parts.loaded, name, data) for name in images]
    page = describe(parts, checkpoint, Path(out))
    page["images"] = [inside(parts, picture, seed, device) for picture in pictures]
    write_page(page, out)
    print(f"{os.path.getsize(out) / 1e6:.2f} MB: {', '.join(p.name for p in pictures)}")
    return out


def write_page(page: dict, out) -> None:
    """Write the template with the numbers of a page in it."""
    text = json.dumps(page, separators=(",", ":"))
    # inside a script element "<" could end it, whatever stands in a class name
    text = text.replace("<", "\\u003c")
    with complete_file(out) as temporary:
        temporary.write_text(TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text, 1),
                             encoding="utf-8")


# ---- images --------------------------------------------------------------------------------------

def open_picture(loaded, name: str, folder: str) -> Picture:
    """Open one of --images. UserError for what is no image."""
    kind, _, number = name.partition(":")
    if kind not in DEFAULT_NUMBER or Path(name).exists():
        image = as_rgb(name)
        return Picture(Path(name).name, image, None, size_notes(image))
    if kind == "scene":
        dataset = Shapes("val", transform=data.eval_transform(loaded.recipe))
    else:
        dataset = validation_set(folder, loaded)
    number = number or str(DEFAULT_NUMBER[kind])
    require(number.isdigit() and int(number) < len(dataset),
            f"{kind}:N with N in 0..{len(dataset) - 1}", name)
    index = int(number)
    if not dataset.is_readable(index):
        raise UnreadableImage(f"--images {name}: expected a readable image, got "
                              f"{dataset.file_name(index)}, which cannot be read")
    image = dataset.image(index)
    notes = size_notes(image)
    target = known_target(dataset[index][1], dataset.class_names, loaded.meta["class_names"])
    if target is None:
        notes.append("No ground truth: the model does not know the classes of this image.")
    return Picture(f"{kind} {index}", image, target, notes)


def known_target(target: dict, names: list[str], known: list[str]) -> dict | None:
    """A target of a data set with labels that count the classes of the model; None where an object
    has a class that the model does not know."""
    labels = [names[label] for label in target["labels"].tolist()]
    if not set(labels) <= set(known):
        return None
    labels = torch.tensor([known.index(name) for name in labels], dtype=torch.int64)
    return {"labels": labels, "boxes": target["boxes"]}


def size_notes(image: Image.Image) -> list[str]:
    """A line for an image that the page shows smaller than it is."""
    if max(image.size) <= MAX_SIDE:
        return []
    width, height = shown_size(image)
    return [f"The image has {image.width} x {image.height} px. The page shows it at {width} x "
            f"{height} px; all numbers are in pixels of the original."]


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image in the page."""
    factor = min(1, MAX_SIDE / max(image.size))
    width, height = [max(1, round(side * factor)) for side in image.size]
    return width, height


def data_uri(image: Image.Image) -> str:
    """An image as a JPEG in a link."""
    memory = io.BytesIO()
    image.resize(shown_size(image), Image.Resampling.LANCZOS).save(memory, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(memory.getvalue()).decode()


# ---- numbers in the page -------------------------------------------------------------------------

def pack(values, dtype: str, low: float = 0.0, step: float = 1.0) -> dict:
    """An array in base64; its values are low + step times what is stored. dtype: "f4" float32, "u1"
    and "u2" unsigned integers of 8 and 16 bits."""
    array = np.ascontiguousarray(as_array(values), dtype="<" + dtype)
    return {"type": dtype, "shape": list(array.shape), "low": low, "step": step,
            "data": base64.b64encode(array.tobytes()).decode()}


def pack_range(values, low: float = 0.0, high: float = 1.0, dtype: str = "u2") -> dict:
    """Values of a known range as integers. Those outside, and NaN, become its nearest end, and
    low."""
    levels = 2 ** (8 * int(dtype[1])) - 1
    step = (high - low) / levels
    steps = (np.nan_to_num(as_array(values).astype(np.float64), nan=low) - low) / step
    return pack(np.clip(steps.round(), 0, levels), dtype, low, step)


def as_array(values) -> np.ndarray:
    if torch.is_tensor(values):
        return values.detach().cpu().numpy()
    return np.asarray(values)


def run_lengths(mask: np.ndarray) -> np.ndarray:
    """Lengths of the runs of False, True, False, ... of a mask, row by row. A run of more than
    65535 values is written as 65535, 0 and the rest."""
    flat = np.concatenate([[False], mask.ravel(), [not mask.ravel()[-1]]])
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1])])
    lengths = []
    for length in np.diff(starts).tolist():
        while length > 65535:
            lengths += [65535, 0]
            length -= 65535
        lengths.append(length)
    return np.array(lengths, np.uint16)


def best_queries(scores: torch.Tensor, bytes_each: int) -> torch.Tensor:
    """As many of the queries with the best `scores` (Nq,) as fit into MAX_BYTES, in their order."""
    count = min(len(scores), max(1, MAX_BYTES // max(1, bytes_each)))
    return scores.topk(count).indices.sort().values


# ---- the detector and its hooks ------------------------------------------------------------------

def take_apart(loaded) -> Parts:
    """Find the parts that the views need: mask networks and Co-DETR have the detector inside.
    UserError for a model without decoder layers."""
    inner = loaded.model
    if has_masks(loaded):
        inner = inner.base.model
    inner = getattr(inner, "detector", inner)
    name = loaded.meta["model_name"]
    require(hasattr(inner, "decoder"), "a model with decoder layers in `decoder`", name)
    criterion = getattr(loaded.criterion, "base", loaded.criterion)
    if hasattr(criterion, "matching_costs"):
        rule = (criterion.matching_costs, 0.0, None)
    elif hasattr(criterion, "set_loss"):
        set_loss = criterion.set_loss
        rule = (set_loss.cost, set_loss.eps, set_loss.class_cost)
    else:
        rule = None
    return Parts(loaded, inner, sys.modules[type(inner).__module__], rule)


def has_masks(loaded) -> bool:
    """Whether a model is a mask network on a detector."""
    return getattr(loaded.paper, "NEEDS_DETECTOR", False)


@contextlib.contextmanager
def recorded(inner):
    """Within the block, a forward pass of one image adds to the lists of `Records`."""
    hooks = []
    with recorded_attention(inner) as sampling:
        records = Records(sampling, [], [], [])

        def record_self_attention(module, inputs):
            content, position, blocked = inputs
            query = content + position
            records.self_attention.append(attention_weights(module, query, query, blocked)[0])

        def record_dense_self_attention(module, inputs):
            query, key, *_ = inputs
            records.self_attention.append(attention_weights(module, query, key)[0])

        def record_map(module, inputs):
            query, key, _, padding = inputs
            weights = attention_weights(module, query, key, padding[:, None, None])
            records.maps.append(weights[0])

        def record_logits(module, inputs, logits):
            records.token_logits.append(logits[0])

        for layer in inner.decoder:
            record = record_self_attention
            if isinstance(layer.self_attn, torch.nn.MultiheadAttention):
                record = record_dense_self_attention
                hooks.append(layer.cross_attn.register_forward_pre_hook(record_map))
            hooks.append(layer.self_attn.register_forward_pre_hook(record))
        if hasattr(inner, "enc_out_class_embed"):
            hooks.append(inner.enc_out_class_embed.register_forward_hook(record_logits))
        try:
            yield records
        finally:
            for hook in hooks:
                hook.remove()


@torch.no_grad()
def attention_weights(module, query, key, blocked=None) -> torch.Tensor:
    """Weights of multi-head attention, computed again from its inputs: the mean of the heads.

    query (B, Nq, C), key (B, S, C), blocked: broadcast to (B, M, Nq, S), True = blocked
    -> (B, Nq, S)."""
    C = query.shape[-1]
    weight = module.in_proj_weight
    bias = module.in_proj_bias
    q = F.linear(query, weight[:C], bias[:C]).unflatten(-1, (module.num_heads, -1))
    k = F.linear(key, weight[C:2 * C], bias[C:2 * C]).unflatten(-1, (module.num_heads, -1))
    scores = torch.einsum("bqmd,bkmd->bmqk", q, k) / math.sqrt(q.shape[-1])    # (B, M, Nq, S)
    if blocked is not None:
        scores = scores.masked_fill(blocked, -math.inf)
    return scores.softmax(-1).mean(1)                                          # (B, Nq, S)


# ---- one image -----------------------------------------------------------------------------------

@torch.no_grad()
def inside(parts: Parts, picture: Picture, seed: int, device) -> dict:
    """Everything that the page shows of one image."""
    loaded = parts.loaded
    transform = data.eval_transform(loaded.recipe)
    with recorded(parts.inner) as records:
        outputs = infer(loaded.model, transform, picture.image, device)
    layers = [*outputs["aux_outputs"], outputs]
    logits = torch.stack([layer["pred_logits"][0] for layer in layers]).float()    # (A, Nq, N)
    boxes = torch.stack([layer["pred_boxes"][0] for layer in layers]).float()      # (A, Nq, 4)
    softmax = logits.shape[-1] == len(loaded.meta["class_names"]) + 1
    probabilities = logits.softmax(-1) if softmax else logits.sigmoid()
    best = probabilities[-1, :, :len(loaded.meta["class_names"])].amax(-1)         # (Nq,)

    width, height = shown_size(picture.image)
    size = torch.tensor([[height, width]], device=device)                          # (1, 2)
    found = loaded.paper.detect(outputs, size, loaded.cfg)[0]
    require("query" in found, "detections made of queries", "those of an auxiliary head")
    require_finite(found, picture.name)

    page = {"name": picture.name, "notes": picture.notes, "picture": data_uri(picture.image),
            "size": list(picture.image.size), "layers": len(layers), "queries": len(best),
            "boxes": pack(boxes, "f4"), "scores": pack_scores(probabilities),
            "detections": pack_detections(found)}
    if "anchors" in outputs:
        page["anchors"] = pack(outputs["anchors"][0].float(), "f4")
    page["attention"] = pack_attention(records.self_attention)
    if records.sampling:
        page["sampling"] = pack_sampling(records.sampling, outputs["memory"], best)
    if records.maps:
        page["maps"] = pack_maps(records.maps, outputs["memory"], best)
    proposals = proposals_of(outputs, records)
    if proposals:
        page["proposals"] = proposals
    if "mask_logits" in outputs:
        page["masks"] = pack_masks(outputs, best, width, height)
    if picture.target is not None:
        targets = data.to_device([picture.target], device)
        page["truth"] = {"labels": picture.target["labels"].tolist(),
                         "boxes": pack(picture.target["boxes"], "f4")}
        if len(picture.target["labels"]):
            if parts.rule:
                page["matching"] = matching(layers, targets, parts.rule)
            if has_denoising(parts):
                page["denoising"] = denoising(parts, outputs["memory"], targets, seed)
    return page


def pack_scores(probabilities) -> dict:
    """The CLASSES best classes of every query, by its best layer. probabilities (A, Nq, N)"""
    count = min(CLASSES, probabilities.shape[-1])
    classes = probabilities.amax(0).topk(count).indices                        # (Nq, count)
    kept = probabilities.gather(2, classes.expand(len(probabilities), -1, -1))
    return {"classes": pack(classes, "u2"), "values": pack_range(kept),
            "total": probabilities.shape[-1]}


def pack_detections(found: dict) -> dict:
    """Detections, best first; masks have scores of their own, by which they are ranked."""
    page = {"query": found["query"].tolist(), "label": found["labels"].tolist(),
            "score": rounded(found["scores"])}
    if "mask_scores" in found:
        page["mask_score"] = rounded(found["mask_scores"])
    return page


def rounded(values, digits: int = 4) -> list[float]:
    return [round(value, digits) for value in values.tolist()]


def pack_attention(weights: list) -> dict:
    """The other queries with the largest self-attention weights. weights: per layer (Nq, Nq)"""
    stacked = torch.stack(weights)                                             # (A, Nq, Nq)
    own = stacked.diagonal(dim1=1, dim2=2)                                     # (A, Nq)
    others = stacked - torch.diag_embed(own)
    values, keys = others.topk(min(ATTENDED, stacked.shape[-1]), -1)           # (A, Nq, ATTENDED)
    return {"keys": pack(keys, "u2"), "values": pack_range(values), "own": pack_range(own)}


def pack_sampling(records: list, memory, best) -> dict:
    """Sampling locations in the unpadded image, [0, 1], and weights."""
    locations = torch.stack([record["locations"][0] for record in records])    # (A, Nq, M, L, K, 2)
    weights = torch.stack([record["weights"][0] for record in records])        # (A, Nq, M, L, K)
    A, _, M, L, K = weights.shape
    first = torch.stack([record["reference"][0, :, 0] for record in records])  # (A, Nq, 2 or 4)
    references = first / memory.valid_ratios[0, 0].repeat(first.shape[-1] // 2)
    ratios = memory.valid_ratios[0][:, None]                                   # (L, 1, 2)
    queries = best_queries(best, A * M * L * K * 6)
    return {"queries": pack(queries, "u2"), "shape": [M, L, K],
            "levels": [list(shape) for shape in memory.shapes],
            "references": pack(references[:, queries], "f4"),
            "locations": pack_range(locations[:, queries] / ratios, LOW, HIGH),
            "weights": pack_range(weights[:, queries])}


def pack_maps(maps: list, memory, best) -> dict:
    """DETR's attention of the queries to all cells of its map."""
    stacked = torch.stack(maps)                                                # (A, Nq, S)
    A, _, S = stacked.shape
    queries = best_queries(best, 2 * A * S)
    return {"queries": pack(queries, "u2"), "level": list(memory.shapes[0]),
            "ratio": valid_part(memory), "values": pack_range(stacked[:, queries])}


def valid_part(memory) -> list[float]:
    """Share of the width and height of DETR's map that is not padding."""
    H, W = memory.shapes[0]
    valid = ~memory.padding[0].view(H, W)
    return [float(valid[0].float().mean()), float(valid[:, 0].float().mean())]


def proposals_of(outputs: dict, records: Records) -> dict:
    """Scores of all tokens, and the token behind every query. Nothing for models without."""
    if records.token_logits:
        logits = records.token_logits[0]                                       # (S, N), DINO
        ranking = logits.amax(-1)                                              # (S,)
        labels = logits.argmax(-1)
    elif "enc_outputs" in outputs:
        ranking = outputs["enc_outputs"]["pred_logits"][0, :, 0]               # column 0: object
        labels = None
    else:
        return {}
    memory = outputs["memory"]
    _, usable = proposal_boxes(memory)
    scores = ranking.float().sigmoid()                                         # (S,)
    tokens = ranking.topk(outputs["anchors"].shape[1]).indices                 # (Nq,), as `propose`
    page = {"levels": [list(shape) for shape in memory.shapes],
            "ratios": memory.valid_ratios[0].tolist(),
            "scores": pack_range(torch.where(usable[0], scores, -1.0), -1.0, 1.0),
            "tokens": tokens.tolist()}
    if labels is not None:
        page["labels"] = labels[tokens].tolist()
    return page


# ---- training: matching and denoising ------------------------------------------------------------

def matching(layers: list[dict], targets: list[dict], rule: tuple) -> dict:
    """The terms of the matching cost in every layer, and what is matched.

    For each object: first the matched query, then the CANDIDATES with the lowest costs. Objects
    without a query have the cheapest one in its place, and `matched` is false."""
    weights, eps, class_cost = rule
    n = len(targets[0]["labels"])
    single = (Weights(weights.cls, 0, 0), Weights(0, weights.l1, 0), Weights(0, 0, weights.giou))
    queries = []
    terms = []
    matched = []
    for layer in layers:
        predictions = (layer["pred_logits"].float(), layer["pred_boxes"].float(), targets)
        cost = matcher.match_cost(*predictions, weights, eps, class_cost)      # (1, Nq, n)
        (query, index), = matcher.assign(cost.cpu(), targets)
        parts = [matcher.match_cost(*predictions, one, eps, class_cost)[0] for one in single]
        parts = torch.stack(parts, -1).cpu()                                   # (Nq, n, 3)
        count = min(CANDIDATES, max(3, COSTS // n), len(parts))
        cheapest = cost[0].cpu().topk(count, 0, largest=False).indices.T       # (n, count)
        first = cheapest[:, 0].clone()                                         # (n,)
        first[index] = query
        rows = torch.cat((first[:, None], cheapest), 1)                        # (n, 1 + count)
        queries.append(rows)
        terms.append(parts[rows, torch.arange(n)[:, None]])                    # (n, 1 + count, 3)
        matched.append(torch.zeros(n, dtype=torch.uint8).index_fill_(0, index, 1))
    return {"queries": pack(torch.stack(queries), "u2"), "terms": pack(torch.stack(terms), "f4"),
            "matched": pack(torch.stack(matched), "u1"), "weights": list(weights)}


def has_denoising(parts: Parts) -> bool:
    """Whether the model was trained with noised queries."""
    return hasattr(parts.module, "denoising_queries") and hasattr(parts.inner, "label_enc")


def denoising(parts: Parts, memory, targets: list[dict], seed: int) -> dict:
    """Noised queries as training would make them, what the decoder makes of them, and the mask."""
    inner = parts.inner
    queries, _ = inner.propose(memory)
    num_classes = inner.class_embed[0].out_features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = parts.module.denoising_queries(targets, inner.label_enc, num_classes, inner.cfg,
                                              queries.content.shape[1])
    content = torch.cat((made.content, queries.content), 1)                    # (1, P + Nq, C)
    reference = torch.cat((made.reference, queries.reference), 1)              # (1, P + Nq, 4)
    layers, _ = inner.decode(memory, Queries(content, None, reference), made.attn_mask)

    # the label that each query carries: its content is a row of the table of labels
    P = made.content.shape[1]
    rows = (made.content[0][:, None] == inner.label_enc.weight).all(-1)        # (P, N + 1)
    positive, objects = made.matches[0]
    scores = torch.stack([layer["pred_logits"][0, :P].float().sigmoid() for layer in layers])
    best = scores.max(-1)                                                      # (A, P)
    steps = [made.reference[0], *(layer["pred_boxes"][0, :P] for layer in layers)]
    mask = as_array(made.attn_mask)
    return {"groups": made.groups, "objects": objects[:len(objects) // made.groups].tolist(),
            "positive": positive.tolist(), "given": rows.int().argmax(1).tolist(),
            "boxes": pack(torch.stack(steps).float(), "f4"), "scores": pack_range(best.values),
            "labels": pack(best.indices, "u2"), "blocked": pack(run_lengths(mask), "u2"),
            "total": len(mask), "blocked_share": float(mask.mean())}


# ---- masks ---------------------------------------------------------------------------------------

def pack_masks(outputs: dict, best, width: int, height: int) -> dict:
    """Mask logits as probabilities before pasting, and the masks pasted into the shown picture."""
    regions = outputs["regions"]
    logits = outputs["mask_logits"]                                            # (n, r, r)
    rows = best_queries(best[regions.query], logits[0].numel())
    xyxy = regions.xyxy[rows]                                                  # (n, 4)
    scale = torch.tensor([width, height, width, height], device=xyxy.device)
    pasted, _ = masks.paste(logits[rows], xyxy * scale, height, width)         # (n, height, width)
    runs = [run_lengths(as_array(mask)) for mask in pasted]
    page = {"queries": regions.query[rows].tolist(), "regions": pack(xyxy, "f4"),
            "values": pack_range(logits[rows].sigmoid(), dtype="u1"),
            "runs": pack(np.concatenate(runs) if runs else [], "u2"),
            "counts": [len(run) for run in runs], "width": width, "height": height}
    if "mask_ious" in outputs:
        page["ious"] = rounded(outputs["mask_ious"][rows])
    return page


# ---- where everything comes from -----------------------------------------------------------------

def describe(parts: Parts, checkpoint: str, out: Path) -> dict:
    """The page without its images: names, the sources of every view, and the absent views."""
    loaded = parts.loaded
    views = {}
    for view, entries in sources(parts).items():
        views[view] = [cite(paper, section, code, out) for paper, section, code in entries]
    return {"model": loaded.paper.__doc__.partition(":")[0], "views": views,
            "checkpoint": checkpoint_name(Path(checkpoint)),
            "classes": list(loaded.meta["class_names"]), "absent": absent(parts, views)}


def checkpoint_name(path: Path) -> str:
    """A run's folder, or a file in its folder."""
    return path.name if path.is_dir() else "/".join(path.parts[-2:]).lstrip("/")


def sources(parts: Parts) -> dict:
    """For every view of this model, in their order: [(paper, section, function)]."""
    inner = parts.inner
    kind = type(inner)
    decoder = (*DECODERS.get(kind.__name__, ("", "its own file")), kind.decode)
    paper = parts.loaded.paper
    detect = (*DETECTS.get(paper.__name__, ("Deformable DETR", "section 5")), paper.detect)
    views = {"boxes": [decoder], "classes": [detect]}
    layer = inner.decoder[0]
    attention = type(layer.cross_attn)
    if attention is deformable_attn.MSDeformAttn:
        views["boxes"].append(("Deformable DETR", "A.3 and A.4", deformable_detr.offset_boxes))
        views["sampling"] = [("Deformable DETR", "section 4.1, Eq. 2-3", attention),
                             ("Deformable DETR", "Eq. 3", deformable_attn.sampling_locations)]
    else:
        views["maps"] = [("DETR", "section 3.2", type(layer)), ("DETR", "A.1", attention_weights)]
    # DETR's is PyTorch's own: its decoder layer shows how it is called
    ours = isinstance(layer.self_attn, deformable_detr.SelfAttention)
    views["queries"] = [("DETR", "section 3.2", type(layer.self_attn if ours else layer)),
                        ("DETR", "A.1", attention_weights)]
    if has_proposals(inner):
        section = PROPOSERS.get(kind.__name__, ("", "its own file"))
        views["proposals"] = [(*section, kind.propose),
                              ("Deformable DETR", "A.4", deformable_detr.encoder_proposals)]
    if parts.rule:
        views["matching"] = [("DETR", "section 3.1, Eq. 1", matcher.match_cost),
                             ("DETR", "section 3.1", matcher.assign)]
    if has_denoising(parts):
        views["denoising"] = [("DINO", "section 3.3", parts.module.denoising_queries),
                              ("DN-DETR", "Eq. 7", parts.module.denoising_mask)]
    if has_masks(parts.loaded):
        model = type(parts.loaded.model)
        views["masks"] = [("Mask Frozen-DETR", "M_i = sigma(q_i R_i^T)", model.region_masks),
                          ("Mask R-CNN", "section 3.1", masks.paste)]
    return views


def has_proposals(inner) -> bool:
    """Whether the encoder's tokens propose the queries."""
    return hasattr(inner, "enc_output")


def absent(parts: Parts, views: dict) -> list[str]:
    """A line for everything that other models have and this one has not."""
    reasons = {
        "sampling": "Sampling points and initial anchors: this model attends to every cell (see "
                    "the attention map), and its queries are embeddings without a place.",
        "proposals": "Proposals: the queries are learned, not chosen among the encoder's tokens.",
        "denoising": "Denoising: this model was trained without noised queries.",
        "masks": "Masks: this model detects boxes; mask_frozen_detr.py adds masks to a detector."}
    lines = [line for view, line in reasons.items() if view not in views]
    cfg = parts.loaded.cfg
    if getattr(cfg, "num_queries_one2many", 0):
        lines.append("One-to-many queries exist in training only.")
    if getattr(cfg, "aux_heads", ""):
        lines.append("Auxiliary heads and their customized queries exist in training only.")
    return lines


def cite(paper: str, section: str, code, out: Path) -> dict:
    """One source of a view: the paper with its link, and the code with a link that is relative to
    the page. The link ends in the text to find there, as line numbers would change."""
    code = inspect.unwrap(code)        # the function inside torch.no_grad
    path = Path(inspect.getsourcefile(code)).resolve()
    keyword = "class" if inspect.isclass(code) else "def"
    link = os.path.relpath(path, out.resolve().parent).replace(os.sep, "/")
    link += f"#:~:text={keyword}%20{code.__name__}"
    name = f"{path.stem}.{code.__qualname__}"
    url = f"https://arxiv.org/abs/{PAPERS[paper]}" if paper in PAPERS else ""
    return {"paper": paper, "section": section, "url": url, "code": name, "link": link}
