"""..."""
import argparse
import colorsys
import copy
import functools
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple
import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as coco_mask
from data import Annotations, DetectionData, LARGE_AREA, Objects, Transform, json_path, stream
from tools.check_data import check

NUM_TRAIN, NUM_VAL, SCENE_SEED = 4000, 500, 0          # the default generated data set
SCENE_SIZE = 160                                       # px; the lengths below are for this size and scale with it
COUNT_SHARES = (0.05, 0.13, 0.20, 0.21, 0.16, 0.11, 0.07, 0.04, 0.03)   # of scenes with 0, 1, .. 8 objects
MIN_SIDE, MAX_SIDE = 21, 78                            # px, longer side of an object before rotation and occlusion
LARGE_SHARE, LARGE_SIDES = 0.36, (118, 150)            # scenes with one object above LARGE_AREA, its longer side in px
MAX_ROTATION = 0.45                                    # rad, either way
MIN_CONTRAST = 130                                     # sum over RGB of |object - whatever lies behind it|, of 765
MIN_VISIBLE = 0.6                                      # share of every object that later objects leave visible
MAX_OUTSIDE = 0.15                                     # share of an object's side that may lie outside the image


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
    parser = argparse.ArgumentParser(allow_abbrev=False, description="write the generated scenes")
    parser.add_argument("--write", metavar="DIR", required=True, help="write the generated scenes there")
    parser.add_argument("--num_train", "--num-train", type=int, default=NUM_TRAIN, help="scenes to write (%(default)s)")
    parser.add_argument("--num_val", "--num-val", type=int, default=NUM_VAL, help="scenes to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=SCENE_SEED, help="of the scenes (%(default)s)")
    flags = parser.parse_args()
    if any(json_path(flags.write, split).exists() for split in ("train", "val")):
        parser.error(f"--write {flags.write}: expected a new folder, got one with annotations; name another or remove it")
    write_scenes(flags.write, flags.num_train, flags.num_val, flags.seed)


if __name__ == "__main__":
    main()
