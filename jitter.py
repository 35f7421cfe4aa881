"""Large-scale jitter with copy-paste (Ghiasi et al., CVPR 2021, arXiv 2012.07177) as in Co-DETR.

    LargeScaleJitter     training: resize by a factor of 0.1 to 2, crop, flip, fill a square, paste
    FitSquare            evaluation: fit into the square
    paste_objects        objects of one image onto another

Every image becomes a square of the same side. What the image does not fill is gray, and counts as
image: there is no padding mask, and boxes are relative to the square.

Copy-paste needs masks, and so do exact boxes of cropped and covered objects. Without masks nothing
is pasted, and the boxes of cropped objects are clipped.

Differences from Co-DETR's code
 1. The pixels of masks: see transforms.py, Difference 1.
 2. An object of which nothing remains is dropped, also where its box was smaller than 10 pixels.
 3. At most ATTEMPTS images are tried for one that has objects after the crop.
"""
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from transforms import (flip, model_target, nearest_pixels, normalize, random_generator,
                        resize)

GRAY = 114                # of 255, fills the square before normalization
LEAST_SIDE = 0.01         # px; an object with a smaller side is dropped
MOST_PASTED = 99          # objects of one image
BOX_MOVES = 10            # px: an object that others cover stays if no side of its box moves more,
LEAST_AREA = 300          # px: or if more of it than this stays visible
ATTEMPTS = 100            # images, see Difference 3


def fitted_size(width: int, height: int, side: int) -> tuple[int, int]:
    """Return the (width, height) in px of an image of this size whose longer side becomes `side`.
    """
    scale = side / max(width, height)
    return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))


def fill_square(image: Image.Image, side: int) -> Image.Image:
    """Add gray to the right and below up to side x side px."""
    square = Image.new("RGB", (side, side), (GRAY,) * 3)
    square.paste(image, (0, 0))
    return square


def boxes_of_masks(masks: np.ndarray) -> np.ndarray:
    """Boxes of the pixels of masks (n, h, w): (n, 4) float64 xyxy px; zeros for an empty mask."""
    boxes = np.zeros((len(masks), 4))
    for box, mask in zip(boxes, masks):
        rows = np.flatnonzero(mask.any(1))
        columns = np.flatnonzero(mask.any(0))
        if len(rows):
            box[:] = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return boxes


def select_objects(target: dict, rows: np.ndarray) -> dict:
    """Some of the objects of a pixel target, by indices or a bool mask."""
    return {name: values[rows] for name, values in target.items()}


@dataclass(frozen=True)
class LargeScaleJitter:
    """(RGB image, pixel target) -> (float32 (3, size, size), model target), for training.

    size: side of the square in px
    ratios: lowest and highest factor of `size` that the longer side of an image becomes
    keep_masks: leave masks in the target, for models that learn them
    """
    size: int = 1024
    ratios: tuple = (0.1, 2.0)
    seed: int = 0
    keep_masks: bool = False
    sizes = ()   # it has no fixed short sides

    @property
    def max_size(self) -> int:
        return self.size

    def __call__(self, image, target=None, epoch=0, index=0, dataset=None):
        """dataset: where other images come from; without it, none is pasted."""
        rng = random_generator("sample", self.seed, epoch, index)
        image, target = self.place(image, target, rng, dataset)
        if "masks" in target and dataset is not None:
            _, *other = dataset.pixel_sample(int(rng.integers(len(dataset))))
            other = self.place(*other, rng, dataset)
            image, target = paste_objects(image, target, *other, rng)
        if not self.keep_masks:
            target = {name: target[name] for name in ("labels", "boxes")}
        return normalize(image), model_target(target, self.size, self.size)

    def canvas_size(self, width: int, height: int) -> tuple[int, int]:
        """Not known after random crops: (height, width) of the original."""
        return height, width

    def place(self, image: Image.Image, target: dict, rng, dataset=None) -> tuple:
        """Resize, crop and flip an image at random and fill the square; where no object remains of
        those it had, another image of `dataset` takes its place."""
        for _ in range(ATTEMPTS):
            placed, objects = self.place_once(image, target, rng)
            if len(objects["labels"]) or not len(target["labels"]) or dataset is None:
                break
            _, image, target = dataset.pixel_sample(int(rng.integers(len(dataset))))
        return placed, objects

    def place_once(self, image: Image.Image, target: dict, rng) -> tuple[Image.Image, dict]:
        """`place` for one image."""
        longer = max(1, int(rng.uniform(*self.ratios) * self.size))
        width, height = fitted_size(*image.size, longer)
        crop_width = min(width, self.size)
        crop_height = min(height, self.size)
        left = int(rng.integers(width - crop_width + 1))
        top = int(rng.integers(height - crop_height + 1))
        flipped = rng.random() < 0.5

        # boxes: those of the masks' pixels in the crop, or clipped ones
        scale_x = width / image.width
        scale_y = height / image.height
        boxes = target["boxes"] * (scale_x, scale_y, scale_x, scale_y)             # (n, 4)
        boxes = np.clip(boxes - (left, top, left, top), 0,
                        (crop_width, crop_height, crop_width, crop_height))
        result = {"labels": target["labels"], "boxes": boxes}
        if "masks" in target:
            rows = nearest_pixels(height, image.height)[top:top + crop_height]
            columns = nearest_pixels(width, image.width)[left:left + crop_width]
            result["masks"] = target["masks"][:, rows[:, None], columns]           # (n, h, w)
            result["boxes"] = boxes_of_masks(result["masks"])
        sides = result["boxes"][:, 2:] - result["boxes"][:, :2]                    # (n, 2)
        result = select_objects(result, (sides > LEAST_SIDE).all(1))

        image = image.resize((width, height), Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + crop_width, top + crop_height))
        if flipped:
            image, result = flip(image, result)
        if "masks" in result:
            margin = ((0, 0), (0, self.size - crop_height), (0, self.size - crop_width))
            result["masks"] = np.pad(result["masks"], margin)                      # (n, size, size)
        return fill_square(image, self.size), result


def paste_objects(image: Image.Image, target: dict, other: Image.Image, source: dict, rng) -> tuple:
    """Paste a random number of random objects of another image at their places.

    Both images have one size; target, source: pixel targets with masks. Objects that become covered
    stay if enough of them is visible (BOX_MOVES, LEAST_AREA), with the box of what is visible.
    """
    available = len(source["labels"])
    count = int(rng.integers(min(available, MOST_PASTED) + 1))
    chosen = rng.permutation(available)[:count]
    if not count:
        return image, target
    pasted = select_objects(source, chosen)
    cover = pasted["masks"].any(0)                                                 # (h, w)
    pixels = np.where(cover[..., None], np.asarray(other), np.asarray(image))      # (h, w, 3)

    masks = target["masks"] * ~cover                                               # (n, h, w)
    boxes = boxes_of_masks(masks)
    areas = masks.sum((1, 2))                                                      # (n,)
    near = (np.abs(boxes - target["boxes"]) <= BOX_MOVES).all(1)
    keep = (near | (areas > LEAST_AREA)) & (areas > 0)
    visible = {"labels": target["labels"], "boxes": boxes, "masks": masks}
    visible = select_objects(visible, keep)
    merged = {name: np.concatenate((visible[name], pasted[name])) for name in visible}
    return Image.fromarray(pixels), merged


@dataclass(frozen=True)
class FitSquare:
    """(RGB image, pixel target) -> (float32 (3, size, size), model target), for evaluation.

    The longer side becomes `size`, gray fills the rest of the square, and boxes are relative to the
    square: a detector's boxes, too. `canvas_size` leads back to pixels of the original.
    """
    size: int = 1024
    sizes = ()

    @property
    def max_size(self) -> int:
        return self.size

    def __call__(self, image, target=None, epoch=0, index=0, dataset=None) -> tuple[Tensor, dict]:
        if target is None:
            target = {"labels": np.zeros(0, np.int64), "boxes": np.zeros((0, 4))}
        size = fitted_size(*image.size, self.size)
        image, target = resize(image, target, size)
        if "masks" in target:
            margin = ((0, 0), (0, self.size - size[1]), (0, self.size - size[0]))
            target = dict(target, masks=np.pad(target["masks"], margin))
        square = fill_square(image, self.size)
        return normalize(square), model_target(target, self.size, self.size)

    def canvas_size(self, width: int, height: int) -> tuple[float, float]:
        """Return (height, width) of the square, in px of an original of this size."""
        new_width, new_height = fitted_size(width, height, self.size)
        return self.size * height / new_height, self.size * width / new_width
