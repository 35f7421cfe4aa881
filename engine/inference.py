"""Run a detector: on the images of a data set, or on one image of your own.

A detection is a dictionary: scores (k,), labels (k,) in 0..N-1, boxes (k, 4) xyxy in pixels of the
original image, query (k,), and where the model makes masks, masks (k, h, w) and mask_scores (k,).
"""
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

import data
from engine.errors import UserError
from engine.images import read_image, to_rgb
from engine.processes import own_place

DEFAULT_THRESHOLD = 0.3      # minimum score to draw where the checkpoint has none
ARRAYS = "a NumPy array (h, w) of uint8 or uint16, or (h, w, 3) RGB or (h, w, 4) RGBA of uint8"
ARRAY_KINDS = (((), "uint8"), ((), "uint16"), ((3,), "uint8"), ((4,), "uint8"))


def predict(model, dataset, indices, device, batch_size=1, amp=False, workers=0):
    """Run a model on images of a data set, in evaluation mode and without gradients.

    indices: positions in the data set. Yields (outputs, targets) for each batch. The model's
    training mode is restored afterwards."""
    indices = list(indices)
    chunks = [indices[k:k + batch_size] for k in range(0, len(indices), batch_size)]
    device = torch.device(device)
    was_training = model.training
    model.eval()
    try:
        # one bar for all processes; None: no bar where standard error is not a terminal
        hidden = True if own_place().rank else None
        with tqdm(total=len(indices), unit="image", leave=False, disable=hidden) as bar:
            for images, padding, targets in data.batches(dataset, chunks, workers):
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    # only the mask network with --roi_box gt reads the targets here
                    outputs = model(images.to(device), padding.to(device), targets)
                yield outputs, targets
                bar.update(len(targets))
    finally:
        model.train(was_training)


@torch.no_grad()
def infer(model, transform, image, device, amp=False):
    """Run a model in evaluation mode on one PIL RGB image -> the outputs of a batch of one.

    transform: that of the data, see `data.eval_transform`."""
    images, padding, _ = data.collate([transform(image)])                      # (1, 3, h, w)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
        return model(images.to(device), padding.to(device))


def allow_detections(model, cfg, count):
    """The Config of a model, changed to at least `count` detections of each image.

    Changes the model where it makes masks for its detections: then it makes as many."""
    cfg = replace(cfg, top_k=max(cfg.top_k, count))
    if hasattr(model, "top_k"):
        model.top_k = cfg.top_k
    return cfg


def detect_on_canvas(detect, outputs, canvas_sizes, sizes, cfg):
    """Detections in pixels of the original images.

    canvas_sizes, sizes (B, 2): height and width of the network's input and of the original images,
    both in pixels of the originals; see data.py. Masks end where the original image ends."""
    if "mask_logits" in outputs:
        canvas_sizes = canvas_sizes.round().long()
    detections = detect(outputs, canvas_sizes, cfg)
    for found, (height, width) in zip(detections, sizes.tolist()):
        if "masks" in found:
            found["masks"] = found["masks"][:, :height, :width]
    return detections


def detect_with(model, detect, transform, image, cfg, device, amp=False, name="the image"):
    """The `cfg.top_k` best detections of one PIL RGB image; `name` stands in errors."""
    outputs = infer(model, transform, image, device, amp)
    canvas = torch.tensor([transform.canvas_size(*image.size)], device=device)  # (1, 2)
    size = torch.tensor([[image.height, image.width]])                         # (1, 2)
    detection = detect_on_canvas(detect, outputs, canvas, size, cfg)[0]
    require_finite(detection, name)
    return detection


def detect_image(detector, image, amp: bool = False) -> dict[str, Tensor]:
    """The `cfg.top_k` best detections of one image, best first, in its pixels.

    detector: a `Loaded`, see `load_model`. image: whatever `as_rgb` reads; images that carry an
    EXIF rotation are turned upright first. UserError for what is no image, and for a model whose
    detections are not finite."""
    name = str(image) if isinstance(image, (str, Path)) else "the image"
    transform = data.eval_transform(detector.recipe)
    return detect_with(detector.model, detector.paper.detect, transform, as_rgb(image),
                       detector.cfg, device_of(detector.model), amp, name)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def as_rgb(image) -> Image.Image:
    """A path, a PIL image of any mode, or a NumPy array -> PIL RGB image, upright.

    Arrays: (h, w) gray of uint8 or uint16, (h, w, 3) RGB or (h, w, 4) RGBA of uint8 (OpenCV's
    images are BGR: give `array[..., ::-1]`). UserError for anything else."""
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, np.ndarray):
        image = from_array(image)
    if not isinstance(image, Image.Image):
        raise UserError(f"expected a path, a PIL image or {ARRAYS}, got {type(image).__name__}")
    if 0 in image.size:
        raise UserError(f"expected an image with pixels, got one of {image.width} x {image.height}")
    try:
        return to_rgb(ImageOps.exif_transpose(image))
    except (ValueError, OSError, SyntaxError) as error:
        raise UserError(f"expected an image that Pillow can decode, got {error}") from error


def from_array(array: np.ndarray) -> Image.Image:
    """A NumPy array as a PIL image of the same bit depth."""
    kind = array.shape[2:], array.dtype.name
    if array.ndim < 2 or kind not in ARRAY_KINDS:
        raise UserError(f"expected {ARRAYS}, got {array.dtype} of shape {array.shape}")
    if 0 in array.shape:
        raise UserError(f"expected an image with pixels, got an array of shape {array.shape}")
    return Image.fromarray(np.ascontiguousarray(array))


def require_finite(detection: dict[str, Tensor], name: str) -> None:
    """UserError for NaN or infinite scores, boxes or mask scores. pycocotools would count a NaN box
    as a hit."""
    for key in ("scores", "boxes", "mask_scores"):
        values = detection.get(key, torch.zeros(0))
        if not values.isfinite().all():
            rows = values.reshape(len(values), -1)                             # (k, 1 or 4)
            bad = int((~rows.isfinite()).any(1).sum())
            raise UserError(f"expected finite detections, got NaN or infinite {key} in {bad} of "
                            f"{len(rows)} detections of {name}: the model's weights are damaged or "
                            "its training diverged; use an earlier checkpoint")


def require_finite_outputs(outputs: dict[str, Tensor], name: str) -> None:
    """UserError for NaN or infinite logits or boxes: what is measured on them would be wrong."""
    for key in ("pred_logits", "pred_boxes"):
        if key in outputs and not outputs[key].isfinite().all():
            raise UserError(f"expected finite outputs, got NaN or infinity in {key} of {name}: the "
                            "model's weights are damaged or its training diverged; use an earlier "
                            "checkpoint")


def class_thresholds(meta: dict, given: float | None = None) -> list[float]:
    """The minimum score of each class: the given one, else that of the checkpoint, else 0.3.

    meta: of a `Loaded`; a run stores the threshold with the best F1 of each class"""
    if given is not None:
        return [given] * len(meta["class_names"])
    stored = meta.get("thresholds", {})
    return [stored.get(name, DEFAULT_THRESHOLD) for name in meta["class_names"]]


def reaches(detection: dict[str, Tensor], thresholds: list[float]) -> Tensor:
    """Which detections have at least the score thresholds[label] -> (k,) bool."""
    least = torch.tensor([thresholds[label] for label in detection["labels"].tolist()])
    return detection["scores"] >= least.to(detection["scores"].device)


def above(detection: dict[str, Tensor], threshold: float | list[float]) -> dict[str, Tensor]:
    """The detections with at least this score; threshold: one, or a list with one of each class."""
    if isinstance(threshold, list):
        keep = reaches(detection, threshold)
    else:
        keep = detection["scores"] >= threshold
    return {key: value[keep] for key, value in detection.items()}
