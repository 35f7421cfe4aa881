"""Export a trained detector to ONNX (.onnx) or to a program of torch.export (.pt2).

    python -m tools.export --checkpoint runs/dino --out dino.onnx            images of any size
    python -m tools.export --checkpoint FILE --out dino.pt2                  for PyTorch
    python -m tools.export --checkpoint FILE --out dino.onnx --size 800 1344 --batch 4   fixed
    python -m tools.export --checkpoint FILE --out dino.onnx --raw           without post-processing

Inputs: images (B, 3, H, W) float32, RGB, as `transforms.normalize` makes them; padding (B, H, W)
bool, True on padding; sizes (B, 2) float32, height and width of the images that boxes are wanted
for.

Outputs: scores (B, k), labels (B, k), boxes (B, k, 4) xyxy in pixels of `sizes`, query (B, k), best
first; of mask networks also mask_logits (B, k, r, r), which cover the boxes (`masks.paste`), and
mask_scores (B, k). With --raw: pred_logits (B, Nq, classes) and pred_boxes (B, Nq, 4), cx, cy, w, h
in [0, 1]; there is no input `sizes`. Class names, normalization and image size stand in the file:
in the metadata of an .onnx file, in the extra file paperdetr.json of a .pt2 file.

The file computes in float32, with the reference implementation of deformable attention: the kernels
have no ONNX function. Rows that Co-DETR's soft-NMS leaves empty have score 0.

What cannot be exported: a dynamic batch (`detect` lists images one by one; give --batch), the
auxiliary heads of Co-DETR at test time (NMS keeps a varying number of boxes), masks at image level
or in true boxes, and mask_scores of networks without mask scoring (they depend on pasted pixels).
Do not use torch.jit.trace or torch.jit.script: a traced detector is silently wrong for images of
another size, as it stores the numbers of tokens; scripting stops at `{**dictionary}`.
"""
import contextlib
import io
import json
import logging
import warnings
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated
from unittest import mock

import numpy as np
import torch
import tyro
from torch import Tensor, nn

import co_detr
import data
import mask_frozen_detr
import transforms
from boxes import paired_iou
from deformable_attn import MSDeformAttn
from engine import commands
from engine.errors import UserError, user_errors
from engine.files import complete_file
from engine.images import read_image
from scenes import Shapes

OPSET = 18
THRESHOLD = 0.3       # least score of detections that are compared
PACKAGES = ("onnx", "onnxscript")   # needed to write an .onnx file; onnxruntime only to check it


# ---- the model as a function of tensors ----------------------------------------------------------

class Raw(nn.Module):
    """Images (B, 3, H, W), padding (B, H, W) -> logits (B, Nq, classes), boxes (B, Nq, 4)."""
    inputs = ("images", "padding")
    outputs = ("pred_logits", "pred_boxes")

    def __init__(self, detector):
        super().__init__()
        self.model = detector.model

    def forward(self, images: Tensor, padding: Tensor) -> tuple:
        outputs = self.model(images, padding)
        return tuple(outputs[name] for name in self.outputs)


class Detections(nn.Module):
    """Images, padding and sizes (B, 2) -> scores, labels, boxes and query of the paper's `detect`.
    """
    inputs = ("images", "padding", "sizes")
    outputs = ("scores", "labels", "boxes", "query")

    def __init__(self, detector):
        super().__init__()
        self.model = detector.model
        self.detect = detector.paper.detect
        self.cfg = detector.cfg

    def forward(self, images: Tensor, padding: Tensor, sizes: Tensor) -> tuple:
        detections = self.detect(self.model(images, padding), sizes, self.cfg)
        return tuple(torch.stack([d[name] for d in detections]) for name in self.outputs)


class Masks(nn.Module):
    """The mask network: also mask_logits (B, k, r, r) and mask_scores (B, k)."""
    inputs = Detections.inputs
    outputs = (*Detections.outputs, "mask_logits", "mask_scores")

    def __init__(self, detector):
        super().__init__()
        self.model = detector.model
        self.frozen = detector.model.base.model       # so that its weights are exported

    def forward(self, images: Tensor, padding: Tensor, sizes: Tensor) -> tuple:
        with mock.patch.object(self.model, "detected_regions", self.regions_of_detections):
            outputs = self.model(images, padding)
        rows = [torch.stack([d[name] for d in outputs["detections"]])
                for name in Detections.outputs]
        scores, labels, boxes, query = rows
        boxes = boxes * sizes.flip(-1).repeat(1, 2)[:, None]             # (B, k, 4)
        logits = outputs["mask_logits"].unflatten(0, scores.shape)       # (B, k, r, r)
        ious = outputs["mask_ious"].view_as(scores)                      # (B, k)
        return scores, labels, boxes, query, logits, scores * ious

    def regions_of_detections(self, outputs: dict) -> tuple:
        """`MaskFrozenDETR.detected_regions` with a region for every detection, not for every query:
        their number does not depend on values."""
        boxes = mask_frozen_detr.clipped_corners(outputs["pred_boxes"])  # (B, Nq, 4)
        base = self.model.base
        cfg = replace(base.model.cfg, top_k=self.model.cfg.top_k)
        detections = base.detect(outputs, boxes.new_ones(len(boxes), 2), cfg)
        images = []
        for b, detection in enumerate(detections):
            query = detection["query"]                                   # (k,)
            images.append(mask_frozen_detr.image_regions(
                b, query, boxes[b, query], torch.zeros_like(query)))
        return mask_frozen_detr.concatenate(images), detections


# ---- functions whose loops depend on values, rewritten with loops of fixed length ----------------

def soft_nms_in_steps(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float,
                      min_score: float, top_k: int) -> tuple[Tensor, Tensor]:
    """`heads.regions.soft_nms` with as many steps as there are rows. Where that ends early, rows
    of score 0 follow."""
    iou = paired_iou(boxes[:, None], boxes[None])[0]                     # (n, n)
    lowers = (iou >= threshold) & (labels[:, None] == labels)            # (n, n)
    factors = torch.where(lowers, 1 - iou, 1)                            # (n, n)
    factors = factors * (1 - torch.eye(len(boxes)))                      # selects every box once
    selected = []
    lowered = []
    for _ in range(min(top_k, len(boxes))):
        best = scores.argmax(0, keepdim=True)                            # (1,)
        selected.append(best)
        lowered.append(scores[best])
        scores = scores * factors[best][0]                               # (n,)
    lowered = torch.cat(lowered)                                         # (k,)
    return torch.cat(selected), lowered * (lowered >= min_score)


def dense_roi_align(tokens: Tensor, shapes: list, strides: list, rois: Tensor, image: Tensor,
                    level: Tensor, bins: int) -> Tensor:
    """`heads.regions.roi_align` of one level as two matrix products, one for each axis
    -> (R, bins, bins, C)."""
    (H, W), = shapes
    boxes = rois / strides[0] - 0.5                                      # (R, 4) in cells
    maps = tokens.unflatten(1, (H, W))[image]                            # (R, H, W, C)
    rows = bin_weights(boxes[:, 1], boxes[:, 3], H, bins)                # (R, bins, H)
    columns = bin_weights(boxes[:, 0], boxes[:, 2], W, bins)             # (R, bins, W)
    pooled = torch.bmm(rows, maps.flatten(2)).unflatten(2, (W, -1))      # (R, bins, W, C)
    return columns[:, None] @ pooled                                     # (R, bins, bins, C)


def bin_weights(begin: Tensor, end: Tensor, cells: int, bins: int) -> Tensor:
    """Weights of the cells of an axis in the mean of each bin's bilinear samples, one for each cell
    that the bin covers. begin and end (R,) in cells -> (R, bins, cells)."""
    most = (cells + bins - 1) // bins                                    # samples of a bin at most
    size = ((end - begin) / bins)[:, None, None]                         # (R, 1, 1)
    count = size.ceil().clamp(min=1)                                     # (R, 1, 1)
    place = torch.arange(most)                                           # (samples,)
    bin_start = torch.arange(bins)[:, None] * size                       # (R, bins, 1)
    position = begin[:, None, None] + bin_start + (place + 0.5) / count * size   # (R, bins, s)
    position = position.clamp(min=0).clamp(max=cells - 1)
    distance = (position[..., None] - torch.arange(cells)).abs()         # (R, bins, s, cells)
    share = (place < count) / count                                      # (R, 1, s)
    return (share[..., None] * (1 - distance).clamp(min=0)).sum(2)       # (R, bins, cells)


def no_autocast(*args, **settings):
    """In place of torch.autocast, which the models use only to turn it off. A file of torch.export
    cannot be read again where such a block computes two tensors."""
    return contextlib.nullcontext()


@contextlib.contextmanager
def exportable():
    """Inside the block, models contain only operations that can be exported."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "autocast", no_autocast))
        stack.enter_context(mock.patch.object(MSDeformAttn, "impl", "torch"))
        stack.enter_context(mock.patch.object(co_detr, "soft_nms", soft_nms_in_steps))
        stack.enter_context(mock.patch.object(mask_frozen_detr, "roi_align", dense_roi_align))
        stack.enter_context(torch.no_grad())
        yield


def as_module(detector, raw: bool) -> nn.Module:
    """The function to export. UserError for what cannot be exported, with the reason."""
    cfg = detector.cfg
    if getattr(detector.paper, "NEEDS_MASKS", False):
        if raw:
            raise UserError("expected a detector with --raw, got a mask network, whose masks "
                            "belong to detections: leave --raw out")
        if cfg.level == "image" or cfg.roi_box == "gt" or not cfg.mask_scoring:
            raise UserError("expected a mask network with regions of its own boxes and mask "
                            f"scoring, got level {cfg.level}, roi_box {cfg.roi_box}, mask_scoring "
                            f"{cfg.mask_scoring}: the scores of others depend on pasted pixels; "
                            "export the detector that it was trained on")
        return Masks(detector).eval()
    if getattr(cfg, "eval_head", "detr") != "detr":
        raise UserError(f"expected eval_head detr, got {cfg.eval_head}: the NMS of the heads of "
                        "training keeps a varying number of boxes; export the checkpoint of a run "
                        "with --eval_head detr")
    return (Raw if raw else Detections)(detector).eval()


# ---- writing a file ------------------------------------------------------------------------------

def trace(module: nn.Module, inputs: tuple, dynamic: bool):
    """The program of a module, for images of the size of `inputs`, or of any size."""
    shapes = None
    if dynamic:
        any_size = {"images": {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},
                    "padding": {1: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}, "sizes": None}
        shapes = {name: any_size[name] for name in module.inputs}
    with exportable():
        return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)


@contextlib.contextmanager
def without_messages():
    """Inside the block, PyTorch's exporter shows errors only.

    Its warnings are about torchvision, and about optimizations that it leaves out. What the file
    computes is compared with the model afterwards."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.disable(logging.NOTSET)


def description(detector) -> dict:
    """What a program that runs the file has to know: {name: JSON text}."""
    recipe = detector.recipe
    facts = {"class_names": detector.meta["class_names"], "mean": transforms.MEAN.tolist(),
             "std": transforms.STD.tolist(), "short_side": recipe.eval_size,
             "long_side": recipe.max_size, "model": detector.meta["model_name"]}
    return {name: json.dumps(value) for name, value in facts.items()}


def write_onnx(path: Path, program, module: nn.Module, facts: dict, optimize: bool = True) -> None:
    """Write a program as an ONNX file."""
    onnx_program = torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, input_names=list(module.inputs),
        output_names=list(module.outputs), optimize=optimize, verbose=False)
    onnx_program.model.metadata_props.update(facts)
    with complete_file(path) as temporary:
        temporary.write_bytes(onnx_program.model_proto.SerializeToString())


def write_program(path: Path, program, facts: dict) -> None:
    """Write a program of torch.export; `torch.export.load(path).module()` runs it."""
    memory = io.BytesIO()
    torch.export.save(program, memory, extra_files={"paperdetr.json": json.dumps(facts)})
    with complete_file(path) as temporary:
        temporary.write_bytes(memory.getvalue())


# ---- comparing the file with the model -----------------------------------------------------------

def file_runner(path: Path):
    """A written file as a function of tensors -> list of tensors; None where it cannot be run."""
    if path.suffix == ".pt2":
        program = torch.export.load(path).module()
        return lambda *inputs: list(program(*inputs))
    if not find_spec("onnxruntime"):
        return None
    import onnxruntime
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(*inputs):
        arrays = {name: x.numpy() for name, x in zip(names, inputs)}
        return [torch.from_numpy(np.asarray(x)) for x in session.run(None, arrays)]
    return run


def example_inputs(images: list, recipe, batch: int, size: tuple | None) -> tuple:
    """A batch of PIL images, repeated where there are too few -> images (B, 3, H, W),
    padding (B, H, W), sizes (B, 2) of the PIL images, height and width.

    size: height and width of the input, within which every image is resized; None: that of the
    recipe."""
    height, width = size or (None, None)
    samples = []
    sizes = []
    for k in range(batch):
        image = images[k % len(images)]
        sizes.append([image.height, image.width])
        if size:
            scale = min(height / image.height, width / image.width)
            new_size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
            samples.append((transforms.normalize(image.resize(new_size)), {}))
        else:
            samples.append(data.eval_transform(recipe)(image))
    pixels, padding, _ = data.collate(samples)
    if size:
        fill = (0, width - pixels.shape[3], 0, height - pixels.shape[2])
        pixels = torch.nn.functional.pad(pixels, fill)
        padding = torch.nn.functional.pad(padding, fill, value=True)
    return pixels, padding, torch.tensor(sizes, dtype=torch.float32)


@dataclass
class Difference:
    """How far the detections of a file differ from those of its model."""
    detections: int = 0      # that were compared
    lost: int = 0            # without a detection of the same label and nearly the same score
    scores: float = 0.0      # largest difference
    boxes: float = 0.0       # the same, in pixels
    masks: float = 0.0       # the same, of the logits of masks


def compare(expected: dict, got: dict, threshold: float = THRESHOLD) -> Difference:
    """Compare the detections {name: (B, k, ...)} whose score is at least the threshold, each with
    the nearest box of its label: detections with equal scores may change places. Masks of boxes
    narrower than a pixel are left out: they cover no pixel, and their logits depend on rounding."""
    result = Difference()
    for b, scores in enumerate(expected["scores"]):
        for i in (scores >= threshold).nonzero()[:, 0].tolist():
            result.detections += 1
            same = (got["labels"][b] == expected["labels"][b, i]).nonzero()[:, 0]
            same = same[(got["scores"][b, same] - scores[i]).abs() < 0.01]
            if not len(same):
                result.lost += 1
                continue
            distance = (got["boxes"][b, same] - expected["boxes"][b, i]).abs().amax(-1)
            j = same[distance.argmin()]
            result.boxes = max(result.boxes, float(distance.min()))
            result.scores = max(result.scores, float((got["scores"][b, j] - scores[i]).abs()))
            width, height = (expected["boxes"][b, i, 2:] - expected["boxes"][b, i, :2]).tolist()
            if "mask_logits" in expected and min(width, height) >= 1:
                masks = (got["mask_logits"][b, j] - expected["mask_logits"][b, i]).abs().max()
                result.masks = max(result.masks, float(masks))
    return result


def check(path: Path, module: nn.Module, inputs: tuple) -> str:
    """Run a written file beside its model, and say in a line how far they differ."""
    run = file_runner(path)
    if run is None:
        return "not checked: pip install onnxruntime to compare the file with the model"
    with torch.no_grad():
        expected = dict(zip(module.outputs, module(*inputs)))
        got = dict(zip(module.outputs, run(*inputs)))
    count, _, height, width = inputs[0].shape
    where = f"{count} x {height} x {width} px"
    if "scores" not in expected:
        largest = {name: float((got[name] - x).abs().max()) for name, x in expected.items()}
        return f"{where}: " + ", ".join(f"{name} {x:.1e}" for name, x in largest.items())
    threshold = min(THRESHOLD, float(expected["scores"].max()))
    result = compare(expected, got, threshold)
    lost = f", {result.lost} LOST" if result.lost else ""
    masks = f", mask logits {result.masks:.1e}" if "mask_logits" in expected else ""
    return (f"{where}, {result.detections} detections of score {threshold:.2f} or more{lost}: "
            f"largest differences: scores {result.scores:.1e}, boxes {result.boxes:.1e} px{masks}")


# ---- command line --------------------------------------------------------------------------------

@dataclass
class Options:
    """Export a trained detector to ONNX or to a program of torch.export."""
    checkpoint: str              # best.pt of a run, its folder, or released weights
    out: str                     # file to write: .onnx or .pt2
    # height and width of all images, px; none: images of any size
    size: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="HEIGHT WIDTH")] = None
    batch: int = 1               # images at a time
    raw: bool = False            # logits and boxes of all queries, without post-processing
    # images on which the file is compared with the model; none: a generated scene
    images: Annotated[list[str] | None, tyro.conf.arg(metavar="PATH [PATH ...]")] = None
    variant: str = ""            # variant of released weights whose file does not show it: dc5
    detector: str = ""           # a mask network's frozen detector, if the file has moved

    def check(self):
        """UserError for values that cannot work."""
        commands.require(Path(self.out).suffix in (".onnx", ".pt2"),
                         "--out with the suffix .onnx or .pt2", self.out)
        commands.require(Path(self.out).absolute().parent.is_dir(),
                         "--out in a folder that exists", self.out)
        commands.require(self.batch >= 1, "--batch of at least 1", self.batch)
        if self.size:
            commands.require(32 <= min(self.size) and max(self.size) <= 10_000,
                             "--size of 32 to 10000 px", self.size)
        lacking = [name for name in PACKAGES if not find_spec(name)]
        if lacking and Path(self.out).suffix == ".onnx":
            raise UserError(f"expected the packages {' and '.join(PACKAGES)}, got no "
                            f"{lacking[0]}: pip install {' '.join(PACKAGES)} onnxruntime")


def export(options: Options) -> str:
    """Write the file, compare it with the model, and return the result in a line."""
    options.check()
    images = [read_image(path) for path in options.images or []] or [Shapes("val", 1).image(0)]
    detector = commands.open_detector(options.checkpoint, "cpu", options.variant, options.detector)
    if detector.recipe.augment == "lsj":
        raise UserError(f"{options.checkpoint}: expected a detector whose padding is masked, got "
                        "one of large-scale jitter, whose images fill a square: it is not exported")
    module = as_module(detector, options.raw)
    path = Path(options.out)
    inputs = example_inputs(images, detector.recipe, options.batch, options.size)
    inputs = inputs[:len(module.inputs)]
    with without_messages():
        program = trace(module, inputs, dynamic=options.size is None)
        if path.suffix == ".onnx":
            write_onnx(path, program, module, description(detector))
        else:
            write_program(path, program, description(detector))
    return f"{path}, {path.stat().st_size / 2 ** 20:.1f} MiB. " + check(path, module, inputs)


def main(argv: list[str] | None = None) -> None:
    with user_errors("tools.export"):
        print(export(commands.parse(Options, "python -m tools.export", __doc__, argv)))


if __name__ == "__main__":
    main()
