"""What happens to an image and its objects on the way to a model: resizing, cropping, flipping.

    Transform        the papers' augmentation, and resizing alone for evaluation
    normalize        a Pillow image as a tensor

`(RGB image, pixel target) -> (tensor, model target)`; data.py describes the targets. jitter.py has
large-scale jitter, for which padding is part of the image.

Differences from the papers' data pipeline (test_data.py compares both on recorded choices):
 1. A pixel of a resized mask copies the old pixel that contains its center. In the authors' code it
    copies the one that contains its upper left corner, which shifts a mask by up to half a pixel.
    Scene masks resized from 160 to 128 px and back have an IoU of 0.969 with the original, 0.930
    by the authors' rule.
 2. An image whose long side is more than 20 times its short side is never cropped.
 3. `color_jitter` (off in the papers' recipes) also changes colors.
"""
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN = np.array([0.485, 0.456, 0.406], np.float32)   # of ImageNet, RGB
STD = np.array([0.229, 0.224, 0.225], np.float32)
CROP_SHORT_SIDES = (400, 500, 600)   # px, short side of the image before it is cropped
CROP_SIDES = (384, 600)              # px, limits of the sides of a crop
MAX_CROP_RATIO = 20                  # long side / short side; beyond it the resized image is huge
JITTER_GAIN = 0.15                   # color jitter: largest relative change of values in [0, 1]
JITTER_SHIFT = 0.08                  # largest shift of values in [0, 1]
JITTER_INVERT = 0.15                 # probability of an inversion


def random_generator(purpose: str, *key: int) -> np.random.Generator:
    """NumPy generator seeded by (purpose, *key): scene 3 and sample 3 get independent numbers.

    purpose: "scene", "order", "sample" or "federated"
    """
    number = ("scene", "order", "sample", "federated").index(purpose)
    return np.random.default_rng((1 + number, *key))


def has_area(boxes: np.ndarray) -> np.ndarray:
    """Find boxes (n, 4) xyxy with positive width and height: (n,) bool."""
    return (boxes[:, 2:] > boxes[:, :2]).all(1)


def resized_size(width: int, height: int, short_side: int,
                 max_size: int | None = None) -> tuple[int, int]:
    """Return the (width, height) in px to which the papers resize an image of this size.

    The shorter side becomes `short_side`, less where the longer side would exceed max_size.
    """
    short = min(width, height)
    long = max(width, height)
    if max_size is not None and long / short * short_side > max_size:
        short_side = max(1, int(round(max_size * short / long)))
    if short == short_side:
        return width, height
    long_side = int(short_side * long / short)
    return (short_side, long_side) if width < height else (long_side, short_side)


def nearest_pixels(new: int, old: int) -> np.ndarray:
    """For each of `new` pixels, the one of `old` that contains its center: (new,) int64."""
    return ((np.arange(new) + 0.5) * (old / new)).astype(int)


def resize(image: Image.Image, target: dict,
           size: tuple[int, int]) -> tuple[Image.Image, dict]:
    """Resize an image and its target, as of pixel_target, to (width, height) in px."""
    if image.size == size:
        return image, target
    scale_x = size[0] / image.width
    scale_y = size[1] / image.height
    result = dict(target, boxes=target["boxes"] * (scale_x, scale_y, scale_x, scale_y))
    if "masks" in target:
        rows = nearest_pixels(size[1], image.height)
        columns = nearest_pixels(size[0], image.width)
        result["masks"] = target["masks"][:, rows[:, None], columns]                 # (n, h, w)
    return image.resize(size, Image.Resampling.BILINEAR), result


def flip(image: Image.Image, target: dict) -> tuple[Image.Image, dict]:
    """Mirror an image and its target left to right."""
    x0, y0, x1, y1 = target["boxes"].T
    boxes = np.stack([image.width - x1, y0, image.width - x0, y1], 1)                # (n, 4)
    result = dict(target, boxes=boxes)
    if "masks" in target:
        result["masks"] = target["masks"][:, :, ::-1]
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), result


def flip_vertically(image: Image.Image, target: dict) -> tuple[Image.Image, dict]:
    """Mirror an image and its target top to bottom."""
    x0, y0, x1, y1 = target["boxes"].T
    boxes = np.stack([x0, image.height - y1, x1, image.height - y0], 1)              # (n, 4)
    result = dict(target, boxes=boxes)
    if "masks" in target:
        result["masks"] = target["masks"][:, ::-1]
    return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM), result


class Crop(NamedTuple):
    """Resize the short side to `short_side`, then cut out a window of the result; all in px."""
    short_side: int
    left: int
    top: int
    width: int
    height: int


def crop(image: Image.Image, target: dict, window: Crop) -> tuple[Image.Image, dict]:
    """Resize an image and its target and cut out a window; objects outside of it are dropped."""
    size = resized_size(*image.size, window.short_side)
    image, target = resize(image, target, size)
    left, top, width, height = window[1:]
    right = left + width
    bottom = top + height
    boxes = target["boxes"] - (left, top, left, top)
    boxes = np.clip(boxes, 0, (width, height, width, height))
    keep = has_area(boxes)
    result = {"labels": target["labels"][keep], "boxes": boxes[keep]}
    if "masks" in target:
        result["masks"] = target["masks"][keep, top:bottom, left:right]              # (n, h, w)
    return image.crop((left, top, right, bottom)), result


class Colors(NamedTuple):
    """A change of colors, in this order; values are in [0, 1]."""
    channels: tuple = (0, 1, 2)    # new channel c is old channel channels[c]
    invert: bool = False           # value -> 1 - value
    gain: float = 1.0              # value -> value * gain + shift, limited to [0, 1]
    shift: float = 0.0


def normalize(image: Image.Image, colors: Colors = Colors()) -> Tensor:
    """Turn an RGB image into a normalized float32 tensor (3, h, w).

    A table with one result for each channel and each of its 256 values replaces the arithmetic.
    """
    levels = np.arange(256, dtype=np.float32) / 255
    if colors.invert:
        levels = 1 - levels
    levels = np.clip(levels * colors.gain + colors.shift, 0, 1)
    table = (levels - MEAN[:, None]) / STD[:, None]                                  # (3, 256)
    pixels = np.asarray(image)                                                       # (h, w, 3)
    planes = []
    for c in range(3):
        source = pixels[:, :, colors.channels[c]]
        planes.append(table[c].take(source))
    return torch.from_numpy(np.stack(planes))


class Augmentation(NamedTuple):
    """The random choices for one training sample."""
    flip: bool = False
    crop: Crop | None = None
    short_side: int | None = None      # px after resizing, None keeps the size
    colors: Colors = Colors()
    flip_vertically: bool = False


@dataclass(frozen=True)
class Transform:
    """(RGB image, pixel target) -> (float32 (3, h, w), model target). Default: normalization only.

    sizes: short sides in px; without augment the first is used, () keeps the size
    max_size: limit of the long side in px
    augment: choose one of `sizes` at random, and flip horizontally with probability 1/2
    crop: if augment, crop before resizing with probability 1/2
    color_jitter: if augment, change colors
    vertical_flip: if augment, also flip vertically with probability 1/2
    """
    sizes: tuple = ()
    max_size: int | None = None
    augment: bool = False
    crop: bool = False
    color_jitter: bool = False
    vertical_flip: bool = False
    seed: int = 0

    def __call__(self, image, target=None, epoch=0, index=0, dataset=None):
        if target is None:
            target = {"labels": np.zeros(0, np.int64), "boxes": np.zeros((0, 4))}
        choices = Augmentation(short_side=self.sizes[0] if self.sizes else None)
        if self.augment:
            rng = random_generator("sample", self.seed, epoch, index)
            choices = self.draw(image.size, rng)
        return self.apply(image, target, choices)

    def canvas_size(self, width: int, height: int) -> tuple[int, int]:
        """Return (height, width) of the network's input, in px of an original of this size."""
        return height, width

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> Augmentation:
        """Draw the random choices for an image of this (width, height)."""
        short_side = int(rng.choice(self.sizes))
        flipped = bool(rng.random() < 0.5)
        window = None
        if self.crop and rng.random() < 0.5 and max(size) <= MAX_CROP_RATIO * min(size):
            window = draw_crop(size, rng)
        colors = draw_colors(rng) if self.color_jitter else Colors()
        upside_down = self.vertical_flip and bool(rng.random() < 0.5)
        return Augmentation(flipped, window, short_side, colors, upside_down)

    def apply(self, image: Image.Image, target: dict, choices: Augmentation) -> tuple[Tensor, dict]:
        """Apply given choices to an image and its pixel target."""
        if choices.flip:
            image, target = flip(image, target)
        if choices.flip_vertically:
            image, target = flip_vertically(image, target)
        if choices.crop:
            image, target = crop(image, target, choices.crop)
        if choices.short_side:
            size = resized_size(*image.size, choices.short_side, self.max_size)
            image, target = resize(image, target, size)
        return normalize(image, choices.colors), model_target(target, *image.size)


def draw_crop(size: tuple[int, int], rng: np.random.Generator) -> Crop:
    """Draw a crop for an image of this (width, height) in px."""
    short_side = int(rng.choice(CROP_SHORT_SIDES))
    size = resized_size(*size, short_side)
    low, high = CROP_SIDES
    width, height = (int(rng.integers(low, min(side, high) + 1)) for side in size)
    left = int(rng.integers(0, size[0] - width + 1))
    top = int(rng.integers(0, size[1] - height + 1))
    return Crop(short_side, left, top, width, height)


def draw_colors(rng: np.random.Generator) -> Colors:
    """Draw a change of colors. The order of the four draws is part of what a seed means."""
    return Colors(
        channels=tuple(rng.permutation(3)),
        gain=1 + rng.uniform(-JITTER_GAIN, JITTER_GAIN),
        shift=rng.uniform(-JITTER_SHIFT, JITTER_SHIFT),
        invert=bool(rng.random() < JITTER_INVERT),
    )


def model_target(target: dict, width: int, height: int) -> dict:
    """Turn a pixel target into what models learn from: tensors, boxes cxcywh in [0, 1]."""
    boxes = target["boxes"] / (width, height, width, height)                         # (n, 4)
    low = boxes[:, :2]
    high = boxes[:, 2:]
    boxes = np.concatenate([(low + high) / 2, high - low], 1)
    result = {
        "labels": torch.from_numpy(target["labels"]),
        "boxes": torch.from_numpy(boxes.astype(np.float32)),
        "size": torch.tensor([height, width]),
    }
    if "masks" in target:
        result["masks"] = torch.from_numpy(target["masks"].astype(bool))
    return result
