"""Data: generated scenes, COCO-layout folders, the published augmentation, batches, and the data doctor.

One image travels  file or generator -> PIL image + pixel boxes -> Transform -> collate -> (images, padding, targets).

    image     float32 (3,h,w), RGB, ImageNet mean and deviation removed
    target    labels (n,) int64 in 0..N-1 | boxes (n,4) float32 cxcywh in [0,1] of the unpadded image
              masks (n,h,w) bool, on request | image_id int | index int, position in the data set
              size (2,) = (h,w) fed to the model | orig_size (2,) = (h,w) of the original
    padding   (B,H,W) bool, True where an image was enlarged to the size of its batch

Class ids: the `categories` of the json, sorted by id, become 0..N-1 here and nowhere else; `category_ids[label]` leads back.
Chance: a training sample depends on (seed, epoch, index), the order of an epoch on (seed, epoch), a scene on (seed, split,
index). The number of workers changes nothing. Annotations lie in flat arrays: a forked worker that reads them copies no page.

    python data.py --write DIR      writes the generated scenes as a COCO-layout folder
    python data.py --check DIR      the data doctor: a table per class, every problem by file and id, exit code 1 on errors
"""

import argparse
import atexit
import colorsys
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import multiprocessing
import signal
import struct
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch.utils.data import DataLoader, Dataset

MEAN = np.array([0.485, 0.456, 0.406], np.float32)     # of ImageNet, RGB
STD = np.array([0.229, 0.224, 0.225], np.float32)
CROP_RESIZE, CROP_SIDES = (400, 500, 600), (384, 600)  # crop branch: short sides before the crop, limits of its sides, px
JITTER_GAIN, JITTER_SHIFT = 0.15, 0.08                 # colour jitter: the largest, of values in [0,1]
JITTER_INVERT = 0.15                                   # share of the images
SMALL_AREA, LARGE_AREA = 32 ** 2, 96 ** 2              # px, the borders of COCO's three size bands
BAD_SHARE = 0.01                                       # more unreadable images than this, and than one, stop the run
HEADERS_AT_START = 500                                 # image files whose header the check at every start opens
ORIENTATION = 0x0112                                   # the EXIF tag
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)

NUM_TRAIN, NUM_VAL, SCENE_SEED = 4000, 500, 0          # the default generated data set
SCENE_SIZE = 160                                       # px; the lengths below are for this size and scale with it
COUNT_SHARES = (0.05, 0.13, 0.20, 0.21, 0.16, 0.11, 0.07, 0.04, 0.03)   # of scenes with 0, 1, .. 8 objects
MIN_SIDE, MAX_SIDE = 21, 78                            # px, longer side of an object before rotation and occlusion
LARGE_SHARE, LARGE_SIDES = 0.36, (118, 150)            # scenes with one object above LARGE_AREA, its longer side in px
MAX_ROTATION = 0.45                                    # rad, either way
MIN_CONTRAST = 130                                     # sum over RGB of |object - whatever lies behind it|, of 765
MIN_VISIBLE = 0.6                                      # share of every object that later objects leave visible
MAX_OUTSIDE = 0.15                                     # share of an object's side that may lie outside the image


def stream(purpose, *key):
    """The random generator of one purpose and key; the purpose keeps e.g. scene 3 and sample 3 from sharing their numbers."""
    return np.random.default_rng((1 + ("scene", "order", "sample").index(purpose), *key))


# -------------------------------------------------------------------------------------------- annotations

class Objects(NamedTuple):
    """The annotated objects of one image, in pixels of the original."""
    boxes: np.ndarray            # (n,4) float64 xywh
    labels: np.ndarray           # (n,) int64, 0..N-1
    areas: np.ndarray            # (n,) float64
    crowd: np.ndarray            # (n,) bool: a region to ignore, not an object to learn
    segmentations: list          # n json texts (bytes): polygons, RLE, or empty where there is none


class Annotations(NamedTuple):
    """The objects of all images end to end: image i owns rows first[i]:first[i+1]. Flat: forked workers share them."""
    first: np.ndarray            # (images+1,) int64
    boxes: np.ndarray            # (A,4) float64 xywh
    labels: np.ndarray           # (A,) int64
    areas: np.ndarray            # (A,) float64
    crowd: np.ndarray            # (A,) bool
    text: np.ndarray             # (bytes,) uint8: the json texts of all segmentations
    text_first: np.ndarray       # (A+1,) int64

    def of(self, image):
        rows = slice(self.first[image], self.first[image + 1])
        ends = self.text_first[self.first[image]:self.first[image + 1] + 1]
        texts = [self.text[a:b].tobytes() for a, b in zip(ends[:-1], ends[1:])]
        return Objects(self.boxes[rows], self.labels[rows], self.areas[rows], self.crowd[rows], texts)

    @classmethod
    def join(cls, images):
        """list of Objects -> Annotations"""
        texts = [text for objects in images for text in objects.segmentations]
        columns = [np.concatenate([objects[k] for objects in images]) if images else empty[k] for k in range(4)]
        first = np.cumsum([0] + [len(objects.labels) for objects in images])
        return cls(first, *columns, np.frombuffer(b"".join(texts), np.uint8), np.cumsum([0] + [len(text) for text in texts]))


empty = Objects(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool), [])


def decode_mask(segmentation, height, width):
    """Polygons, compressed or uncompressed RLE -> (height, width) uint8. ValueError if it was made for another image size."""
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, *segmentation["size"])
    mask = coco_mask.decode(segmentation)
    if mask.shape != (height, width):
        raise ValueError(f"segmentation: expected a mask of (h, w) = {height, width} px, got {mask.shape}; "
                         "run python data.py --check DIR")
    return mask


class DetectionData(Dataset):
    """What generated and recorded data share.

    A subclass has  name, split, class_names [str], category_ids [int], image_ids (n,) int64, annotations, has_masks,
    degenerate (number of boxes dropped)  and defines  objects(index) -> Objects, image(index) -> PIL RGB original,
    image_size(index) -> its (height, width) in px, file_name(index), take(rows) -> a part of the data set.
    """
    epoch = 0
    degenerate = 0
    problems = ()

    def __len__(self):
        return len(self.image_ids)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def readable(self, index):
        """-> (index, image); a data set on disk puts another image in place of an unreadable one."""
        return index, self.image(index)

    def prepare(self):
        """Do now, before workers are started, what they would otherwise each do for themselves."""

    def first(self, count):
        """A data set of the first `count` images that have objects."""
        with_objects = (index for index in range(len(self)) if not self.objects(index).crowd.all())
        return self.take(list(itertools.islice(with_objects, count)))

    def __getitem__(self, index):
        index, image = self.readable(int(index))
        width, height = image.size
        tensor, target = self.transform(image, self.pixel_target(index, width, height), self.epoch, index)
        target.update(image_id=int(self.image_ids[index]), orig_size=torch.tensor([height, width]), index=index)
        return tensor, target

    def pixel_target(self, index, width, height):
        """What there is to learn in an image: labels, boxes (n,4) xyxy px clipped to it, masks (n,h,w) uint8; no crowds"""
        objects = self.objects(index)
        boxes = np.concatenate([objects.boxes[:, :2], objects.boxes[:, :2] + objects.boxes[:, 2:]], 1)
        boxes = np.clip(boxes, 0, [width, height, width, height])
        keep = np.flatnonzero(~objects.crowd & (boxes[:, 2:] > boxes[:, :2]).all(1))
        target = {"labels": objects.labels[keep], "boxes": boxes[keep]}
        if self.load_masks and self.has_masks:
            masks = [decode_mask(json.loads(objects.segmentations[k]), height, width) for k in keep]
            target["masks"] = np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)
        return target

    def coco(self):
        """The ground truth for pycocotools: crowds as regions to ignore, degenerate boxes left out, annotation ids from 1
        (it takes a match with id 0 for no match)."""
        images, rows = [], []
        for index, image_id in enumerate(self.image_ids.tolist()):
            height, width = self.image_size(index)
            images.append({"id": image_id, "width": width, "height": height, "file_name": self.file_name(index)})
            objects = self.objects(index)
            for box, label, area, crowd, text in zip(*(column.tolist() for column in objects[:4]), objects.segmentations):
                row = {"id": len(rows) + 1, "image_id": image_id, "category_id": self.category_ids[label], "bbox": box,
                       "area": area, "iscrowd": int(crowd)}
                rows.append(row | {"segmentation": json.loads(text)} if text else row)
        truth = COCO()
        categories = [{"id": i, "name": name} for i, name in zip(self.category_ids, self.class_names)]
        truth.dataset = {"info": {}, "images": images, "annotations": rows, "categories": categories}
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
        return truth


def class_counts(dataset):
    """Objects per class, crowds not counted: (N,) int64"""
    annotations = dataset.annotations
    return np.bincount(annotations.labels[~annotations.crowd], minlength=len(dataset.class_names))


# -------------------------------------------------------------------------------------------- generated scenes

def _outlines():
    """Class name -> polygon (points, 2), x right, y down, centred, longer side 2."""
    def polar(angles, radii=1.0):
        return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], 1)

    def unit(points):
        low, high = points.min(0), points.max(0)
        return (points - (low + high) / 2) * 2 / (high - low).max()

    turn, up, arm = np.arange(48) * np.pi / 24, -np.pi / 2, 0.36
    quarter = np.array([[arm, -1], [arm, -arm], [1, -arm]])                # of the cross; the rest by turning it
    turns = [np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), k) for k in range(4)]
    back = np.linspace(2 * np.pi - 1.15, 1.15, 40)                         # the inner arc of the crescent
    lobes = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
    shapes = {"circle": polar(turn),
              "square": polar(up / 2 + np.arange(4) * np.pi / 2),
              "triangle": polar(up + np.arange(3) * np.pi / 1.5),
              "star": polar(up + np.arange(10) * np.pi / 5, np.tile([1, 0.5], 5)),
              "ring": polar(turn),
              "cross": np.concatenate([quarter @ t for t in turns]),
              "crescent": np.concatenate([polar(np.linspace(0.9, 2 * np.pi - 0.9, 40)), 0.81 * polar(back) + (0.45, 0)]),
              "heart": np.stack([16 * np.sin(turn) ** 3, -lobes], 1)}
    return {name: unit(points) for name, points in shapes.items()}


OUTLINES = _outlines()
SCENE_CLASSES = tuple(OUTLINES)
RING_HOLE = 0.56                                        # inner radius of a ring over its outer radius
# share of its square that a shape fills, from the shoelace formula
FILL = np.array([abs(np.sum(p[:, 0] * np.roll(p[:, 1], -1) - p[:, 1] * np.roll(p[:, 0], -1))) / 8 for p in OUTLINES.values()])
FILL[SCENE_CLASSES.index("ring")] *= 1 - RING_HOLE ** 2


class SceneObject(NamedTuple):
    """One object as it was drawn; lengths in px."""
    label: int
    side: float                  # longer side before rotation and occlusion
    angle: float                 # rad
    colour: np.ndarray           # (3,) RGB 0..255
    contrast: float              # least sum over RGB of |colour - colour behind it|
    pixels: int                  # in the image, before occlusion


def random_colour(rng, saturation, value):
    """RGB 0..255 of any hue, saturation and value uniform in the given ranges: (3,) float32"""
    return 255 * np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value)), np.float32)


def rotate(x, y, angle):
    """Coordinates along and across a direction; python floats keep float32 arrays float32."""
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def draw_background(rng, size):
    """Two related colours mixed by a gradient, smooth noise and a pattern, with faint strokes and discs.

    -> canvas (size,size,3) float32, its mean colour (3,)
    """
    first = random_colour(rng, (0.05, 0.45), (0.3, 0.95))
    second = np.clip(first + rng.uniform(-38, 38, 3), 0, 255).astype(np.float32)
    angle, frequency = rng.uniform(0, 2 * np.pi), rng.uniform(12, 40)
    depth, cells = rng.uniform(0.1, 0.4), int(rng.integers(4, 14))
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j].astype(np.float32)
    along, across = rotate(x, y, angle)
    noise = Image.fromarray(rng.random((cells, cells), np.float32)).resize((size, size), Image.Resampling.BICUBIC)
    mix = 0.1 + 0.35 * along + 0.8 * np.asarray(noise)
    pattern = rng.integers(5)                                              # two of five have none
    if pattern == 0:
        mix += depth * np.sin(frequency * across)
    elif pattern == 1:
        mix += depth * np.sin(frequency * across) * np.sin(frequency * along)
    elif pattern == 2:
        mix += depth * (np.sin(frequency / 2 * across + 2.5 * np.sin(3 * along)) > 0)
    clutter = Image.new("L", (size, size), 128)
    draw = ImageDraw.Draw(clutter)
    for _ in range(rng.integers(2, 9)):
        tone, width, is_stroke = int(rng.integers(108, 149)), int(rng.integers(1, 4)), rng.random() < 0.6
        (cx, cy), length, turn = rng.uniform(0, size, 2), rng.uniform(0.04, 0.28) * size, rng.uniform(0, np.pi)
        dx, dy = (length * np.cos(turn), length * np.sin(turn)) if is_stroke else (length / 3, length / 3)
        corners = (cx - dx, cy - dy, cx + dx, cy + dy)
        draw.line(corners, fill=tone, width=width) if is_stroke else draw.ellipse(corners, fill=tone)
    clutter = clutter.filter(ImageFilter.BoxBlur(rng.uniform(0.4, 1.6)))
    canvas = first + mix[..., None] * (second - first)                     # (size, size, 3)
    return canvas + (np.asarray(clutter, np.float32) - 128)[..., None], (first + second) / 2


def draw_silhouette(label, side, angle, cx, cy, size):
    """Coverage of an object in the window that holds it and its shadow -> alpha (h,w) float32 in [0,1], (rows, columns)"""
    points = np.stack(rotate(*OUTLINES[SCENE_CLASSES[label]].T, -angle), 1) * (side / 2) + (cx, cy)
    low = np.maximum(np.floor(points.min(0)).astype(int) - 3, 0)
    high = np.minimum(np.ceil(points.max(0)).astype(int) + 3, size)
    fine = 2 if side > 60 else 4                                           # samples per px and axis
    sheet = Image.new("L", tuple(((high - low) * fine).tolist()))
    draw = ImageDraw.Draw(sheet)
    draw.polygon(((points - low) * fine - 0.5).ravel().tolist(), fill=255)
    if SCENE_CLASSES[label] == "ring":
        draw.polygon((((points - (cx, cy)) * RING_HOLE + (cx, cy) - low) * fine - 0.5).ravel().tolist(), fill=0)
    alpha = np.asarray(sheet.reduce(fine), np.float32) / 255               # (h, w)
    return alpha, (slice(low[1], high[1]), slice(low[0], high[0]))


def draw_surface(rng, thing, cx, cy, window):
    """Colour, pattern and light of an object in its window: (h,w,3) float32"""
    y, x = np.mgrid[window].astype(np.float32)
    x, y = (x - cx) * (2 / thing.side), (y - cy) * (2 / thing.side)        # -1..1 over the object
    u, v = rotate(x, y, thing.angle)
    frequency, depth = rng.uniform(5, 8) * max(1.0, (thing.side / 60) ** 0.7), rng.uniform(10, 30)
    patterns = (lambda: np.sin(frequency * u),                             # stripes
                lambda: np.sin(0.7 * frequency * (u + v)),                 # stripes, slanted
                lambda: np.sin(frequency * u) * np.sin(frequency * v),     # checks
                lambda: 2 * np.cos(frequency * u) * np.cos(frequency * v) - 1,   # dots
                lambda: np.zeros_like(u))
    pattern = np.clip(3 * patterns[rng.integers(len(patterns))](), -1, 1) * depth
    tint = rng.uniform(0.5, 1.2, 3).astype(np.float32)
    return thing.colour + pattern[..., None] * tint - 14 * (x + y)[..., None]   # light from the upper left


def draw_scene(rng, size=SCENE_SIZE):
    """-> pixels (size,size,3) uint8, owner (size,size) uint8 (0 background, k = object k-1 is visible here), [SceneObject]

    Large objects are drawn first. A place is taken only if it leaves MIN_VISIBLE of every earlier object in sight.
    """
    canvas, ground = draw_background(rng, size)
    owner = np.zeros((size, size), np.uint8)
    sides = rng.uniform(MIN_SIDE, MAX_SIDE, rng.choice(len(COUNT_SHARES), p=COUNT_SHARES))
    if len(sides) and rng.random() < LARGE_SHARE / (1 - COUNT_SHARES[0]):
        sides[0] = rng.uniform(*LARGE_SIDES)
    things, visible = [], np.zeros(0, int)
    for side in np.sort(sides)[::-1]:
        is_large = side > MAX_SIDE
        labels = np.flatnonzero(FILL * side ** 2 > 1.08 * LARGE_AREA) if is_large else np.arange(len(SCENE_CLASSES))
        label, angle, side = int(rng.choice(labels)), rng.uniform(-MAX_ROTATION, MAX_ROTATION), side * size / SCENE_SIZE
        margin = side * (0.5 if is_large else 0.5 - MAX_OUTSIDE)
        for _ in range(12):
            cx, cy = rng.uniform(min(margin, size / 2), max(size - margin, size / 2), 2)
            alpha, window = draw_silhouette(label, side, angle, cx, cy, size)
            mask = alpha > 0.5
            hidden = np.bincount(owner[window][mask], minlength=len(things) + 1)[1:]   # px lost by each earlier object
            if (visible - hidden >= MIN_VISIBLE * np.array([thing.pixels for thing in things])).all():
                break
        else:
            continue
        behind = np.stack([ground] + [thing.colour for thing, px in zip(things, hidden) if px])
        contrast = 0
        while contrast < MIN_CONTRAST:
            colour = random_colour(rng, (0.45, 0.95), (0.35, 1.0))
            contrast = np.abs(behind - colour).sum(1).min()
        thing = SceneObject(label, side, angle, colour, contrast, int(mask.sum()))
        visible = np.append(visible - hidden, thing.pixels)
        things.append(thing)
        owner[window][mask] = len(things)
        (top, bottom), (left, right) = ((s.start + 2, min(s.stop + 2, size)) for s in window)    # shadow: 2 px down, right
        shadow = np.asarray(Image.fromarray((alpha * 80).astype(np.uint8)).filter(ImageFilter.BoxBlur(1.5)), np.float32) / 255
        canvas[top:bottom, left:right] *= 1 - shadow[:bottom - top, :right - left, None]
        canvas[window] += alpha[..., None] * (draw_surface(rng, thing, cx, cy, window) - canvas[window])
    canvas += rng.uniform(6, 30) * (rng.random(canvas.shape, np.float32) - 0.5)
    return np.clip(canvas, 0, 255).astype(np.uint8), owner, things


def visible_objects(owner, things):
    """Exact annotations of a scene: tight boxes and areas of what is visible, masks as RLE."""
    boxes, areas, texts = [], [], []
    for number in range(1, len(things) + 1):
        mask = owner == number                                             # (size, size)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append([columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1])
        areas.append(mask.sum())
        code = coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))
        texts.append(json.dumps({"size": list(mask.shape), "counts": code["counts"].decode()}).encode())
    boxes, labels = np.array(boxes, np.float64).reshape(-1, 4), np.array([thing.label for thing in things], np.int64)
    return Objects(boxes, labels, np.array(areas, np.float64), np.zeros(len(things), bool), texts)


class Shapes(DetectionData):
    """Generated scenes of eight shapes with exact masks of what is visible; needs no files.

    split (train|val), num_images, seed: scene i depends on (seed, split, i) alone. size: side of the square images in px.
    Scenes are drawn when first asked for and kept as uint8, so later epochs cost only the augmentation.
    """
    name, has_masks = "generated scenes", True
    class_names, category_ids = list(SCENE_CLASSES), list(range(1, len(SCENE_CLASSES) + 1))

    def __init__(self, split="train", num_images=None, seed=SCENE_SEED, size=SCENE_SIZE, transform=None, load_masks=False):
        if split not in ("train", "val"):
            raise ValueError(f"split: expected train or val, got {split!r}")
        self.split, self.seed, self.size, self.load_masks = split, seed, size, load_masks
        self.image_ids = np.arange({"train": NUM_TRAIN, "val": NUM_VAL}[split] if num_images is None else num_images)
        self.transform = transform or Transform(sizes=())
        self.pixels = np.zeros((len(self), size, size, 3), np.uint8)       # takes memory as scenes are drawn
        self.scenes = [None] * len(self)                                   # Objects of each scene drawn so far

    def draw(self, index):
        """-> pixels, owner, [SceneObject] of scene `index`, see draw_scene"""
        split = ("train", "val").index(self.split)
        return draw_scene(stream("scene", self.seed, split, int(self.image_ids[index])), self.size)

    def objects(self, index):
        if self.scenes[index] is None:
            self.pixels[index], owner, things = self.draw(index)
            self.scenes[index] = visible_objects(owner, things)
        return self.scenes[index]

    def image(self, index):
        self.objects(index)
        return Image.fromarray(self.pixels[index])

    def image_size(self, index):
        return self.size, self.size

    def file_name(self, index):
        return f"{self.image_ids[index]:06d}.png"

    @functools.cached_property
    def annotations(self):
        """All objects; draws every scene that has not been drawn yet."""
        if sum(scene is None for scene in self.scenes) > 1000:
            print(f"drawing {len(self)} scenes, once ...", file=sys.stderr)
        return Annotations.join([self.objects(index) for index in range(len(self))])

    def prepare(self):
        return self.annotations

    def take(self, rows):
        part = copy.copy(self)
        part.__dict__.pop("annotations", None)
        part.image_ids, part.pixels, part.scenes = self.image_ids[rows], self.pixels[rows], [self.scenes[row] for row in rows]
        return part


# -------------------------------------------------------------------------------------------- COCO-layout folders

class CocoFolder(DetectionData):
    """A folder in COCO layout: annotations/instances_{split}2017.json and {split}2017/ with the images.

    root: the folder; split: train or val; annotations, images: explicit paths where the layout differs.
    Crowds are never learnt and are regions to ignore in coco(). Boxes without width or height inside the image are dropped
    and counted (`degenerate`). Images without objects stay. EXIF rotation is applied to the pixels, except where the width
    and height of the json fit only the unrotated pixels: then the boxes were drawn on those.
    An unreadable training image is replaced by the next readable one; an unreadable evaluation image is shown as plain
    grey, so that its objects count as missed. Either way one warning, and RuntimeError beyond max(1, 1 %) of the images.
    Raises FileNotFoundError (no json, no images) and ValueError (a json that cannot be used, see json_problems).
    """

    def __init__(self, root, split="train", transform=None, load_masks=False, annotations=None, images=None):
        root = Path(root)
        self.name, self.split, self.load_masks = root.name, split, load_masks
        self.transform = transform or Transform(sizes=())
        path = Path(annotations) if annotations else json_path(root, split)
        data = read_json(path)
        self.problems = list(json_problems(data))
        fatal = [problem for problem in self.problems if problem.level == "fatal"]
        if fatal:
            named = "; ".join(f"{problem.kind}: {problem.where}" for problem in fatal[:3])
            raise ValueError(f"{path}: expected a COCO json, got {len(fatal)} entries that cannot be used: {named}; "
                             "python data.py --check DIR lists them all")
        self.folder = Path(images) if images else images_folder(root, split, data["images"])
        categories = sorted(data["categories"], key=lambda category: category["id"])
        self.class_names, self.category_ids = [str(c["name"]) for c in categories], [c["id"] for c in categories]
        self.image_ids = np.array([image["id"] for image in data["images"]])
        self.files = np.array([image["file_name"] for image in data["images"]])
        self.sizes = np.array([listed_size(image) for image in data["images"]])   # (images, 2) w, h, 0 = not given
        self.bad = torch.zeros(len(self), dtype=torch.bool).share_memory_()       # unreadable images, known to every worker
        self._flatten(data["annotations"])
        given = sum(bool(row.get("segmentation")) for row in data["annotations"])
        self.has_masks = 0 < given == len(data["annotations"])
        broken = [problem for problem in self.problems if problem.kind == "malformed segmentation"]
        if load_masks and (broken or 0 < given < len(data["annotations"])):
            raise ValueError(f"{path}: masks need a valid segmentation for every object, got {given} for "
                             f"{len(data['annotations'])} objects, {len(broken)} malformed; python data.py --check DIR names them")

    def _flatten(self, rows):
        """json annotations -> self.annotations, ordered by image, degenerate boxes dropped and counted"""
        place = {image_id: index for index, image_id in enumerate(self.image_ids.tolist())}
        label = {category_id: index for index, category_id in enumerate(self.category_ids)}
        image = np.array([place[row["image_id"]] for row in rows], np.int64)
        boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
        keep = ~degenerate_boxes(boxes, self.sizes[image])
        self.degenerate = int((~keep).sum())
        order = np.flatnonzero(keep)[np.argsort(image[keep], kind="stable")]
        kept = [rows[k] for k in order]
        wants_text = self.load_masks or self.split != "train"              # training without masks need not carry polygons
        texts = [json.dumps(row["segmentation"]).encode() if wants_text and row.get("segmentation") else b"" for row in kept]
        self.annotations = Annotations(
            np.searchsorted(image[order], np.arange(len(self) + 1)), boxes[order],
            np.array([label[row["category_id"]] for row in kept], np.int64),
            np.array([listed_area(row) for row in kept], np.float64),
            np.array([bool(row.get("iscrowd", 0)) for row in kept], bool),
            np.frombuffer(b"".join(texts), np.uint8), np.cumsum([0] + [len(text) for text in texts]))

    def objects(self, index):
        return self.annotations.of(index)

    def file_name(self, index):
        return str(self.files[index])

    def image(self, index):
        return read_image(self.folder / self.files[index], tuple(self.sizes[index].tolist()))

    def image_size(self, index):
        listed = tuple(self.sizes[index].tolist())
        try:
            width, height = upright_size(*read_header(self.folder / self.files[index]), listed)[0]
        except BROKEN_IMAGE:
            width, height = listed
        return height, width

    def readable(self, index):
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if not self.bad[candidate]:
                try:
                    return candidate, self.image(candidate)
                except BROKEN_IMAGE as error:
                    self._count_bad(candidate, error)
            if self.split != "train":
                width, height = self.sizes[index].tolist()
                return index, Image.new("RGB", (max(width, 1), max(height, 1)), (124, 116, 104))
        raise RuntimeError(f"{self.folder}: expected a readable image, got none of {len(self)}; python data.py --check DIR")

    def _count_bad(self, index, error):
        self.bad[index] = True
        instead = "another image takes its place" if self.split == "train" else "its objects count as missed"
        print(f"warning: {self.folder / self.files[index]} cannot be read ({error}); {instead}", file=sys.stderr)
        allowed = max(1, BAD_SHARE * len(self))
        if self.bad.sum() > allowed:
            names = ", ".join(self.files[self.bad.numpy()][:5])
            raise RuntimeError(f"{self.folder}: expected at most {int(allowed)} unreadable images of {len(self)}, got "
                               f"{int(self.bad.sum())} ({names}); repair or remove them, python data.py --check DIR lists all"
                               ) from error

    def take(self, rows):
        part = copy.copy(self)
        part.image_ids, part.files, part.sizes = self.image_ids[rows], self.files[rows], self.sizes[rows]
        part.bad = self.bad[rows].share_memory_()
        part.annotations = Annotations.join([self.objects(row) for row in rows])
        return part


def json_path(root, split):
    return Path(root) / "annotations" / f"instances_{split}2017.json"


def read_json(path):
    """FileNotFoundError or ValueError where there is no file or no JSON object in it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a COCO json there, got no such file; a data folder holds annotations/"
                                "instances_{train,val}2017.json, train2017/ and val2017/ (python data.py --write DIR makes one)")
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}; write the file anew") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object with images, annotations and categories, got a "
                         f"{type(data).__name__}; this looks like a results file, give the ground truth")
    return data


def images_folder(root, split, images):
    """The folder that holds the images of the json: {split}2017, or one of its usual other places."""
    names = [image["file_name"] for image in images[:20]]
    places = [root / f"{split}2017", root / "images" / f"{split}2017", root / split, root / "images", root]
    found = next((place for place in places if any((place / name).is_file() for name in names)), None)
    if found is None:
        raise FileNotFoundError(f"{places[0]}: expected the images of the json there (such as {names[0]}), got none of the "
                                f"first {len(names)}; put them there or correct file_name in {json_path(root, split)}")
    return found


def listed_size(image):
    """(width, height) of a json image, 0 where it is not given"""
    return tuple(int(image[side]) if isinstance(image.get(side), (int, float)) else 0 for side in ("width", "height"))


def listed_area(row):
    """px of a json annotation, from its box where no area is given"""
    return float(row.get("area") or row["bbox"][2] * row["bbox"][3])


def degenerate_boxes(boxes, sizes):
    """boxes (n,4) xywh, sizes (n,2) w, h of their images, 0 = unknown -> (n,) bool: nothing of the box lies in the image"""
    limits = np.where(sizes > 0, sizes, np.inf).reshape(-1, 2)
    low, high = np.clip(boxes[:, :2], 0, limits), np.clip(boxes[:, :2] + boxes[:, 2:], 0, limits)
    return ~(high > low).all(1)


# -------------------------------------------------------------------------------------------- image files

def read_header(path):
    """-> stored (width, height), EXIF orientation 1..8"""
    with Image.open(path) as image:
        return image.size, image.getexif().get(ORIENTATION, 1)


def upright_size(stored, orientation, listed=None):
    """-> (width, height) in the frame of the boxes, whether EXIF rotation leads there. listed: (width, height) of the json."""
    turned = stored[::-1] if orientation in (5, 6, 7, 8) else stored
    rotate = not listed == stored != turned
    return (turned if rotate else stored), rotate


def read_image(path, listed=None):
    """Any file PIL reads -> RGB image, turned as its EXIF tag says unless listed (width, height) fits only the unturned pixels.

    Grey, palette and CMYK become RGB, transparency is dropped, 16-bit values keep their upper 8 bits.
    Raises one of BROKEN_IMAGE.
    """
    with Image.open(path) as image:
        image.load()
        orientation = image.getexif().get(ORIENTATION, 1)
        if orientation != 1 and upright_size(image.size, orientation, listed)[1]:
            image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("expected 8 or 16 bits a channel, got floating point")
        if image.mode.startswith("I"):
            image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")


# -------------------------------------------------------------------------------------------- transforms

def resized(width, height, short, max_size=None):
    """(width, height) after the papers' rule: the shorter side becomes `short`, less where the longer would pass max_size."""
    low, high = min(width, height), max(width, height)
    if max_size is not None and high / low * short > max_size:
        short = max(1, int(round(max_size * low / high)))
    if low == short:
        return width, height
    long = int(short * high / low)
    return (short, long) if width < height else (long, short)


def resample(image, target, size, region=None):
    """Scale the region (x0,y0,x1,y1 px, default all) of image and target to size (w,h); what lies outside is dropped."""
    if region is None and image.size == tuple(size):
        return image, target
    x0, y0, x1, y1 = region or (0, 0, *image.size)
    scale = size[0] / (x1 - x0), size[1] / (y1 - y0)
    boxes = np.clip((target["boxes"] - (x0, y0, x0, y0)) * (*scale, *scale), 0, (*size, *size))
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    result = {"labels": target["labels"][keep], "boxes": boxes[keep]}
    if "masks" in target:                                                  # the nearest pixel centre
        columns, rows = ((low + (np.arange(n) + 0.5) / s).astype(int) for low, n, s in zip((x0, y0), size, scale))
        result["masks"] = target["masks"][keep][:, rows[:, None], columns]                    # (n, h, w)
    return image.resize(size, Image.Resampling.BILINEAR, box=(x0, y0, x1, y1)), result


def flip(image, target):
    """Left-right mirror of image, boxes and masks."""
    x0, y0, x1, y1 = target["boxes"].T
    mirrored = target | {"boxes": np.stack([image.width - x1, y0, image.width - x0, y1], 1)}
    if "masks" in target:
        mirrored["masks"] = target["masks"][:, :, ::-1]
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), mirrored


def random_crop(image, target, rng):
    """The crop branch: short side to 400, 500 or 600, then a window with sides of 384 to 600 px, each drawn by itself.

    Only the window is computed: to rounding, PIL resamples a region to the pixels that cropping the resized whole gives.
    """
    whole = resized(*image.size, int(rng.choice(CROP_RESIZE)))
    size = tuple(int(rng.integers(CROP_SIDES[0], min(side, CROP_SIDES[1]) + 1)) for side in whole)      # w, h
    x, y = (int(rng.integers(0, side - part + 1)) for side, part in zip(whole, size))
    across, down = image.width / whole[0], image.height / whole[1]
    right, bottom = min((x + size[0]) * across, image.width), min((y + size[1]) * down, image.height)        # min: rounding
    return resample(image, target, size, (x * across, y * down, right, bottom))


def normalise(image, channels=(0, 1, 2), gain=1.0, shift=0.0, invert=False):
    """PIL RGB -> float32 (3,h,w): one table of 256 values a channel.

    Colour c comes from channels[c]; then inversion, gain and shift in [0,1]; then mean and deviation.
    """
    levels = np.arange(256, dtype=np.float32) / 255
    levels = np.clip((1 - levels if invert else levels) * gain + shift, 0, 1)
    table = (levels - MEAN[:, None]) / STD[:, None]                        # (3, 256)
    pixels = np.asarray(image)                                             # (h, w, 3)
    return torch.from_numpy(np.stack([table[c].take(pixels[:, :, channel]) for c, channel in enumerate(channels)]))


@dataclass(frozen=True)
class Transform:
    """(PIL image, pixel target) -> (float32 (3,h,w), model target). Defaults: nothing but the normalisation.

    sizes: short sides to choose from in px, () keeps the size; max_size: limit of the long side. augment: a random size, and
    horizontal flip for half of the images. crop: half of them take the crop branch first. jitter: colours too.
    """
    sizes: tuple = ()
    max_size: int | None = None
    augment: bool = False
    crop: bool = False
    jitter: bool = False
    seed: int = 0

    def __call__(self, image, target=None, epoch=0, index=0):
        target = target or {"labels": empty.labels, "boxes": empty.boxes}
        short, colours = self.sizes[0] if self.sizes else min(image.size), {}
        if self.augment:
            rng = stream("sample", self.seed, epoch, index)
            short = int(rng.choice(self.sizes))
            if rng.random() < 0.5:
                image, target = flip(image, target)
            if self.crop and rng.random() < 0.5:
                image, target = random_crop(image, target, rng)
            if self.jitter:
                colours = {"channels": rng.permutation(3), "gain": 1 + rng.uniform(-JITTER_GAIN, JITTER_GAIN),
                           "shift": rng.uniform(-JITTER_SHIFT, JITTER_SHIFT), "invert": rng.random() < JITTER_INVERT}
        if self.sizes:
            image, target = resample(image, target, resized(*image.size, short, self.max_size))
        return normalise(image, **colours), self.model_target(target, *image.size)

    def model_target(self, target, width, height):
        xyxy = target["boxes"] / (width, height, width, height)            # (n, 4)
        boxes = np.concatenate([(xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]], 1)
        result = {"labels": torch.from_numpy(target["labels"]), "boxes": torch.from_numpy(boxes.astype(np.float32)),
                  "size": torch.tensor([height, width])}
        if "masks" in target:
            result["masks"] = torch.from_numpy(np.ascontiguousarray(target["masks"]).astype(bool))
        return result


def train_transform(cfg, seed=0):
    return Transform(tuple(cfg.train_sizes), cfg.max_size, augment=True, crop=cfg.crop, jitter=cfg.color_jitter, seed=seed)


def eval_transform(cfg):
    return Transform((cfg.eval_size,), cfg.max_size)


# -------------------------------------------------------------------------------------------- batches

def collate(samples):
    """[(image (3,h,w), target)] -> images (B,3,H,W) with zeros to the right and below, padding (B,H,W) bool, [target]"""
    height, width = (max(image.shape[axis] for image, _ in samples) for axis in (1, 2))
    images = torch.zeros(len(samples), 3, height, width)
    padding = torch.ones(len(samples), height, width, dtype=torch.bool)
    for k, (image, _) in enumerate(samples):
        images[k, :, :image.shape[1], :image.shape[2]] = image
        padding[k, :image.shape[1], :image.shape[2]] = False
    return images, padding, [target for _, target in samples]


def build_datasets(data, cfg, seed, load_masks=False, overfit=0, num_train=NUM_TRAIN, num_val=NUM_VAL):
    """-> train, val. data: a COCO-layout folder, or None for num_train and num_val generated scenes, the same for every seed.

    seed: of the augmentation. overfit N: both are the first N training images with objects, without augmentation.
    """
    def dataset(split, count):
        return CocoFolder(data, split, load_masks=load_masks) if data else Shapes(split, count, load_masks=load_masks)

    train = dataset("train", num_train)
    if overfit:
        train = train.first(overfit)
        train.transform = eval_transform(cfg)
        return train, copy.copy(train)
    val = dataset("val", num_val)
    train.transform, val.transform = train_transform(cfg, seed), eval_transform(cfg)
    return train, val


def to_device(targets, device):
    """Every tensor of a list of targets, without waiting for it."""
    return [{key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for key, value in target.items()}
            for target in targets]


def batches(dataset, indices, workers=0, pin_memory=False):
    """-> DataLoader: (images, padding, targets), see collate, for each list of places in the data set. Touches no global
    random state. The order of an epoch is train.py's, stream("order", seed, epoch)."""
    if workers:
        dataset.prepare()
    return DataLoader(dataset, batch_sampler=indices, collate_fn=collate, num_workers=workers, pin_memory=pin_memory,
                      worker_init_fn=ignore_signals, generator=torch.Generator())   # the global one belongs to the model


def ignore_signals(worker):
    """Ctrl-C, schedulers and torchrun signal the whole process group; the training process still needs its workers to
    finish a step and save, and ends them itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers():
    """Of a loop that was broken off: at exit Python asks them to end by the signal they ignore, and would wait for ever."""
    left = [process for process in multiprocessing.active_children() if process.daemon]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # PyTorch's would report their deaths as an error
    for process in left:
        process.kill()


# -------------------------------------------------------------------------------------------- the data doctor

class Problem(NamedTuple):
    level: str                   # fatal: cannot be loaded | error: can, and would mislead | warning: is taken care of
    kind: str
    where: str


FIELDS = {"images": ("id", "file_name"), "annotations": ("image_id", "category_id", "bbox"), "categories": ("id", "name")}


def json_problems(data):
    """Every Problem that the json shows by itself; stops after the entries when those are unusable."""
    found = list(entry_problems(data))
    yield from found
    if any(problem.level == "fatal" for problem in found):
        return
    images = {image["id"]: image for image in data["images"]}
    names, rows = {category["id"] for category in data["categories"]}, data["annotations"]
    usable, seen = [], set()
    for row in rows:
        image, box = images.get(row["image_id"]), row["bbox"]
        where = f"annotation {row.get('id', '?')} (image {row['image_id']}, {image['file_name'] if image else 'not listed'})"
        if image is None:
            yield Problem("fatal", "unknown image id", f"{where}: expected an id from images")
        elif row["category_id"] not in names:
            yield Problem("fatal", "unknown category id", f"{where}: got category {row['category_id']}, expected an id from categories")
        elif not (isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) and np.isfinite(v) for v in box)):
            yield Problem("fatal", "malformed box", f"{where}: got {str(box)[:60]}, expected finite [x, y, width, height]")
        else:
            usable.append((row, where, listed_size(image)))
            fault = segmentation_fault(row.get("segmentation"), listed_size(image))
            if fault:
                yield Problem("error", "malformed segmentation", f"{where}: {fault}")
            key = (row["image_id"], row["category_id"], *box)
            if key in seen:
                yield Problem("warning", "duplicate annotation", f"{where}: same image, class and box as an earlier one")
            seen.add(key)
    if usable:
        yield from box_problems(*zip(*usable))


def entry_problems(data):
    """Missing lists and fields, ids that are not integers, ids used twice."""
    for part, fields in FIELDS.items():
        entries = data.get(part)
        if not isinstance(entries, list) or (not entries and part != "annotations"):
            yield Problem("fatal", f"no {part}", f"expected a list '{part}' in the json, got {str(entries)[:40]}")
            continue
        for k, entry in enumerate(entries):
            lacking = [field for field in fields if not isinstance(entry, dict) or field not in entry]
            if lacking:
                yield Problem("fatal", f"incomplete {part}", f"{part}[{k}] lacks {', '.join(lacking)}")
                continue
            ids = [entry[field] for field in fields if field.endswith("id")]
            if any(type(number) is not int for number in ids):
                yield Problem("fatal", "ids", f"{part}[{k}]: expected integer ids, got {ids}")
        level = "warning" if part == "annotations" else "fatal"            # annotation ids are numbered anew for the evaluation
        ids = Counter(entry.get("id") for entry in entries if isinstance(entry, dict) and type(entry.get("id")) is int)
        yield from (Problem(level, f"id used twice in {part}", f"id {i} stands {n} times") for i, n in ids.items() if n > 1)
    files = Counter(image.get("file_name") for image in data.get("images") or () if isinstance(image, dict))
    yield from (Problem("warning", "file listed twice", f"{name}: {n} images") for name, n in files.items() if n > 1)


def box_problems(rows, wheres, sizes):
    """Degenerate boxes, boxes that leave their image by more than a px, and xyxy written where xywh belongs."""
    boxes, sizes = np.array([row["bbox"] for row in rows], np.float64), np.array(sizes)
    limits = np.where(sizes > 0, sizes, np.inf)
    degenerate = degenerate_boxes(boxes, sizes)
    beyond = (boxes[:, :2] + boxes[:, 2:] > limits + 1).any(1)
    outside = ~degenerate & (beyond | (boxes[:, :2] < -1).any(1))
    as_corners = (boxes[:, 2:] > boxes[:, :2]).all(1) & (boxes[:, 2:] <= limits + 1).all(1)
    # corners read as width and height overshoot wherever x1 + x2 > width; true widths are rarely all greater than their x
    if beyond.sum() >= max(1, 0.1 * len(boxes)) and as_corners.mean() > 0.95:
        yield Problem("error", "boxes look like xyxy", f"{beyond.sum()} of {len(boxes)} boxes leave their image as [x, y, width, "
                      f"height], {as_corners.sum()} fit as [x1, y1, x2, y2]; COCO wants the former. First: {wheres[np.argmax(beyond)]}")
    for k in np.flatnonzero(degenerate | outside):
        kind = "degenerate box (dropped)" if degenerate[k] else "box leaves the image (clipped)"
        yield Problem("warning", kind, f"{wheres[k]}: {boxes[k].tolist()} in {'x'.join(map(str, sizes[k]))} px")


def segmentation_fault(segmentation, size):
    """What is wrong with a segmentation of an image of size (width, height), or None. Nothing at all is not a fault."""
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        if not all(isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 for part in segmentation):
            return "expected polygons [x, y, x, y, x, y, ...] of at least three points"
        return None
    if not isinstance(segmentation, dict) or not {"counts", "size"} <= segmentation.keys():
        return "expected polygons or RLE {size, counts}"
    if 0 not in size and list(segmentation["size"]) != [size[1], size[0]]:
        return f"expected RLE size [height, width] = {[size[1], size[0]]}, got {segmentation['size']}"
    if isinstance(segmentation["counts"], list) and sum(segmentation["counts"]) != np.prod(segmentation["size"]):
        return f"RLE counts sum to {sum(segmentation['counts'])}, expected {np.prod(segmentation['size'])}"
    return None


def file_problems(folder, images, decode):
    """Missing and unreadable files, wrong width and height, EXIF rotation. decode: read every pixel, else only the headers."""
    for image in images:
        path, listed = folder / image["file_name"], listed_size(image)
        where = f"image {image['id']}, {path}"
        if not path.is_file():
            yield Problem("error", "missing file", where)
            continue
        try:
            stored, orientation = read_header(path)
            if decode:
                read_image(path)
        except BROKEN_IMAGE as error:
            yield Problem("error", "unreadable image", f"{where}: {error}")
            continue
        size, rotate = upright_size(stored, orientation, listed)
        if listed != size:
            says, has = "x".join(map(str, listed)), "x".join(map(str, size))
            yield Problem("error", "wrong width or height", f"{where}: json says {says}, the file has {has}")
        if orientation != 1:
            action = "the pixels are turned by it" if rotate else "not applied, the json fits the unturned pixels"
            yield Problem("warning", "EXIF rotation", f"{where}: orientation {orientation}, {action}")


def report(problems, limit):
    """Print problems by kind, worst first, at most `limit` lines a kind."""
    levels = ("fatal", "error", "warning")
    for level, kind in sorted({problem[:2] for problem in problems}, key=lambda k: (levels.index(k[0]), k[1])):
        lines = [problem.where for problem in problems if problem[:2] == (level, kind)]
        print(f"  {level}: {kind} ({len(lines)})")
        print(*(f"      {line}" for line in lines[:limit]), sep="\n")
        if len(lines) > limit:
            print(f"      ... and {len(lines) - limit} more (python data.py --check DIR)")


def print_table(data):
    """Images, boxes and size bands per class, crowds not counted."""
    rows = [row for row in data["annotations"] if not row.get("iscrowd")]
    areas = np.array([listed_area(row) for row in rows])
    band = np.digitize(areas, (SMALL_AREA, LARGE_AREA))
    print(f"  {'class':24}{'id':>8}{'images':>8}{'boxes':>8}{'small':>8}{'medium':>8}{'large':>8}")
    for category in sorted(data["categories"], key=lambda category: category["id"]):
        mine = [k for k, row in enumerate(rows) if row["category_id"] == category["id"]]
        counts = [len({rows[k]["image_id"] for k in mine}), len(mine), *np.bincount(band[mine], minlength=3)]
        print(f"  {str(category['name'])[:24]:24}{category['id']:>8}" + "".join(f"{count:>8}" for count in counts))


def check(directory, full=True):
    """The data doctor: prints a table per class and every problem of both splits -> the number of errors.

    full: decode every image (else only the headers). Warnings are problems that loading takes care of; they do not count.
    """
    errors = 0
    for split in ("train", "val"):
        path = json_path(directory, split)
        print(path)
        problems = []
        try:
            data = read_json(path)
            problems += json_problems(data)
            loadable = not any(problem.level == "fatal" for problem in problems)
            if loadable:
                print(*(f"  {len(data[part])} {part}" for part in FIELDS))
                print_table(data)
                problems += file_problems(images_folder(Path(directory), split, data["images"]), data["images"], full)
                if split == "train" and not CocoFolder(directory, split).first(1).image_ids.size:
                    problems.append(Problem("error", "nothing to learn", "no usable box in the training set"))
        except (FileNotFoundError, ValueError) as error:
            problems.append(Problem("fatal", "cannot be loaded", str(error)))
        report(problems, limit=sys.maxsize)
        bad = sum(problem.level != "warning" for problem in problems)
        print(f"  {bad} errors, {len(problems) - bad} warnings")
        errors += bad
    return errors


def quick_check(dataset, training=True):
    """The check at every start, without decoding: what the json and some image headers show. Prints and returns the problems.

    Raises ValueError for a training set without one usable box.
    """
    problems = list(dataset.problems)
    if isinstance(dataset, CocoFolder):
        some = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), HEADERS_AT_START)).astype(int))
        entries = [{"id": int(dataset.image_ids[k]), "file_name": str(dataset.files[k]), "width": int(dataset.sizes[k, 0]),
                    "height": int(dataset.sizes[k, 1])} for k in some]
        problems += file_problems(dataset.folder, entries, decode=False)
    report(problems, limit=3)
    boxes = class_counts(dataset).sum()
    if training and not boxes:
        raise ValueError(f"{dataset.name}: expected at least one usable box to learn from, got {len(dataset)} images with "
                         f"none ({dataset.degenerate} degenerate boxes dropped); python data.py --check DIR shows what is there")
    return problems


def write_scenes(directory, num_train=NUM_TRAIN, num_val=NUM_VAL, seed=SCENE_SEED):
    """Write the generated scenes as a COCO-layout folder with PNG images."""
    for split, count in (("train", num_train), ("val", num_val)):
        scenes = Shapes(split, count, seed)
        folder, path = Path(directory) / f"{split}2017", json_path(directory, split)
        folder.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(exist_ok=True)
        for index in range(count):
            scenes.image(index).save(folder / scenes.file_name(index), compress_level=1)
        path.write_text(json.dumps(scenes.coco().dataset))
        print(f"{path}: {count} images, {len(scenes.annotations.labels)} objects")


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description="write the generated scenes, or check a folder")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--write", metavar="DIR", help="write the generated scenes there")
    task.add_argument("--check", metavar="DIR", help="look for problems there; exit code 1 on errors")
    parser.add_argument("--num_train", "--num-train", type=int, default=NUM_TRAIN, help="scenes to write (%(default)s)")
    parser.add_argument("--num_val", "--num-val", type=int, default=NUM_VAL, help="scenes to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=SCENE_SEED, help="of the scenes (%(default)s)")
    flags = parser.parse_args()
    if flags.check:
        sys.exit(1 if check(flags.check) else 0)
    if any(json_path(flags.write, split).exists() for split in ("train", "val")):
        parser.error(f"--write {flags.write}: expected a new folder, got one with annotations; name another or remove it")
    write_scenes(flags.write, flags.num_train, flags.num_val, flags.seed)


if __name__ == "__main__":
    main()
