"""The generated data set: scenes of eight shapes, with exact boxes and masks of what is visible.

    python scenes.py --write DIR                    writes the scenes as a COCO-layout folder
    python scenes.py --write DIR --layout lvis      the same, annotated as LVIS is
    python scenes.py --write DIR --crowded          8 to 16 small objects of two classes each, close
                                                    together: duplicates are hard to tell

A scene depends on (seed, split, index) alone. It has a textured background and 0 to 8 objects,
which may overlap, reach over the border, and cast shadows.
"""
import colorsys
import copy
import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as coco_mask

from data import LARGE_AREA, DetectionData, Objects, join_annotations
from engine.coco_json import json_path
from engine.errors import UserError, user_errors
from engine.files import complete_file, complete_picture
from engine.flags import one_line_usage
from engine.notices import one_line
from engine.ranges import check_ranges
from transforms import Transform, random_generator

NUM_TRAIN = 4000           # scenes of the default data set
NUM_VAL = 500
SCENE_SEED = 0
SCENE_SIZE = 160           # px; the lengths below are for this size and scale with it
# shares of scenes with 0, 1, .. 8 objects
COUNT_SHARES = (0.05, 0.13, 0.20, 0.21, 0.16, 0.11, 0.07, 0.04, 0.03)
MIN_SIDE = 21              # px, longer side of an object before rotation and occlusion
MAX_SIDE = 78
LARGE_SHARE = 0.36         # share of scenes with one object above LARGE_AREA
LARGE_SIDES = (118, 150)   # px, its longer side
CROWD_COUNTS = (8, 16)     # objects of a crowded scene
CROWD_SIDES = (21, 34)     # px
CROWD_DISTANCE = 1.1       # of an object from an earlier one, in sides
MAX_ROTATION = 0.45        # rad, either way
MIN_CONTRAST = 130         # sum over RGB of |object - whatever lies behind it|, at most 765
MIN_VISIBLE = 0.6          # share of every object that later objects leave visible
MAX_OUTSIDE = 0.15         # share of an object's side that may lie outside the image
ATTEMPTS = 12              # places tried for an object before it is left out
RING_HOLE = 0.56           # inner radius of a ring over its outer radius
# layout lvis: training images in which a class is annotated, the others being frequent
RARE = {"heart": 8, "crescent": 60}
VERIFIED = 0.5             # chance that an absent class is known to be absent
INCOMPLETE = 0.1           # chance that one object of a class with several is not annotated
LIGHT = 14                 # of 255: brightness from center to left edge, and to upper edge


def polar(angles, radii=1.0):
    """Return the points at angles (n,), in rad, and radii (n,) around the origin: (n, 2)."""
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], 1)


def unit_size(points):
    """Center a polygon (points, 2) on the origin and scale its longer side to 2."""
    low = points.min(0)
    high = points.max(0)
    return (points - (low + high) / 2) * 2 / (high - low).max()


def make_outlines() -> dict:
    """Return the outline of each class: polygon (points, 2), x right, y down, longer side 2."""
    circle = np.arange(48) * np.pi / 24
    up = -np.pi / 2
    shapes = {"circle": polar(circle)}
    shapes["square"] = polar(up / 2 + np.arange(4) * np.pi / 2)
    shapes["triangle"] = polar(up + np.arange(3) * np.pi / 1.5)
    shapes["star"] = polar(up + np.arange(10) * np.pi / 5, np.tile([1, 0.5], 5))
    shapes["ring"] = polar(circle)

    # A quarter of the cross, turned four times.
    arm = 0.36
    quarter = np.array([[arm, -1], [arm, -arm], [1, -arm]])
    turn = np.array([[0, 1], [-1, 0]])
    turns = [np.linalg.matrix_power(turn, k) for k in range(4)]
    shapes["cross"] = np.concatenate([quarter @ turn for turn in turns])

    outer = polar(np.linspace(0.9, 2 * np.pi - 0.9, 40))
    inner = 0.81 * polar(np.linspace(2 * np.pi - 1.15, 1.15, 40)) + (0.45, 0)
    shapes["crescent"] = np.concatenate([outer, inner])

    x = 16 * np.sin(circle) ** 3
    y = 13 * np.cos(circle) - 5 * np.cos(2 * circle) - 2 * np.cos(3 * circle) - np.cos(4 * circle)
    shapes["heart"] = np.stack([x, -y], 1)
    return {name: unit_size(points) for name, points in shapes.items()}


def filled_share(name: str, points: np.ndarray) -> float:
    """Return the share of the square [-1, 1]^2 that a shape fills, by the shoelace formula."""
    x, y = points.T
    share = abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 8
    return share * (1 - RING_HOLE ** 2) if name == "ring" else share


OUTLINES = make_outlines()
SCENE_CLASSES = tuple(OUTLINES)
FILL = np.array([filled_share(name, points) for name, points in OUTLINES.items()])


class SceneObject(NamedTuple):
    """One object as it was drawn; lengths in px."""
    label: int
    side: float                  # longer side before rotation and occlusion
    angle: float                 # rad
    color: np.ndarray            # (3,) RGB 0..255
    contrast: float              # smallest sum over RGB of |color - color behind it|
    pixels: int                  # number of its pixels in the image, before occlusion


def random_color(rng, saturation, value) -> np.ndarray:
    """Draw a color: (3,) float32, RGB in 0..255.

    saturation, value: (low, high) of the HSV color, in [0, 1]; the hue is any
    """
    hue = rng.random()
    hsv = (hue, rng.uniform(*saturation), rng.uniform(*value))
    return 255 * np.array(colorsys.hsv_to_rgb(*hsv), np.float32)


def rotate(x, y, angle):
    """Return coordinates along and across a direction, given by its angle in rad.

    Python floats for cos and sin keep float32 arrays float32.
    """
    cos = math.cos(angle)
    sin = math.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def draw_background(rng, size):
    """Mix two similar colors by a gradient, smooth noise and a pattern; add strokes and discs.

    Returns the canvas (size, size, 3) float32 and the mean of the two colors (3,).
    """
    first = random_color(rng, (0.05, 0.45), (0.3, 0.95))
    second = np.clip(first + rng.uniform(-38, 38, 3), 0, 255).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    frequency = rng.uniform(12, 40)
    depth = rng.uniform(0.1, 0.4)
    cells = int(rng.integers(4, 14))
    # `size` points from -1 to 1 a side: NumPy reads an imaginary step as a number of points.
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j].astype(np.float32)
    along, across = rotate(x, y, angle)
    noise = Image.fromarray(rng.random((cells, cells), np.float32))
    noise = noise.resize((size, size), Image.Resampling.BICUBIC)
    mix = 0.1 + 0.35 * along + 0.8 * np.asarray(noise)
    pattern = rng.integers(5)   # two of five have none
    if pattern == 0:
        mix += depth * np.sin(frequency * across)
    elif pattern == 1:
        mix += depth * np.sin(frequency * across) * np.sin(frequency * along)
    elif pattern == 2:
        mix += depth * (np.sin(frequency / 2 * across + 2.5 * np.sin(3 * along)) > 0)
    canvas = first + mix[..., None] * (second - first)                     # (size, size, 3)
    canvas = canvas + draw_clutter(rng, size)[..., None]
    return canvas, (first + second) / 2


def draw_clutter(rng, size):
    """Draw faint strokes and discs: (size, size) float32, to be added to a canvas."""
    clutter = Image.new("L", (size, size), 128)
    draw = ImageDraw.Draw(clutter)
    for _ in range(rng.integers(2, 9)):
        tone = int(rng.integers(108, 149))
        width = int(rng.integers(1, 4))
        is_stroke = rng.random() < 0.6
        cx, cy = rng.uniform(0, size, 2)
        length = rng.uniform(0.04, 0.28) * size
        turn = rng.uniform(0, np.pi)
        if is_stroke:
            dx = length * np.cos(turn)
            dy = length * np.sin(turn)
            draw.line((cx - dx, cy - dy, cx + dx, cy + dy), fill=tone, width=width)
        else:
            radius = length / 3
            draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=tone)
    clutter = clutter.filter(ImageFilter.BoxBlur(rng.uniform(0.4, 1.6)))
    return np.asarray(clutter, np.float32) - 128


def draw_silhouette(label, side, angle, cx, cy, size):
    """Draw how much of each pixel an object covers, in the window that holds it and its shadow.

    label: class; side: longer side in px; angle: rad; cx, cy: center in px; size: of the image
    Returns alpha (h, w) float32 in [0, 1], and the window as (slice of rows, slice of columns).
    """
    x, y = OUTLINES[SCENE_CLASSES[label]].T
    center = (cx, cy)
    points = np.stack(rotate(x, y, -angle), 1) * (side / 2) + center       # (points, 2)
    low = np.maximum(np.floor(points.min(0)).astype(int) - 3, 0)
    high = np.minimum(np.ceil(points.max(0)).astype(int) + 3, size)
    samples = 2 if side > 60 else 4                                        # per px and axis
    sheet = Image.new("L", tuple(((high - low) * samples).tolist()))
    draw = ImageDraw.Draw(sheet)
    outline = (points - low) * samples - 0.5
    draw.polygon(outline.ravel().tolist(), fill=255)
    if SCENE_CLASSES[label] == "ring":
        inner = (points - center) * RING_HOLE + center
        hole = (inner - low) * samples - 0.5
        draw.polygon(hole.ravel().tolist(), fill=0)
    alpha = np.asarray(sheet.reduce(samples), np.float32) / 255            # (h, w)
    return alpha, (slice(low[1], high[1]), slice(low[0], high[0]))


def draw_surface(rng, thing, cx, cy, window):
    """Draw color, pattern and light of an object in its window: (h, w, 3) float32."""
    y, x = np.mgrid[window].astype(np.float32)
    x = (x - cx) * (2 / thing.side)                                        # -1..1 over the object
    y = (y - cy) * (2 / thing.side)
    u, v = rotate(x, y, thing.angle)
    frequency = rng.uniform(5, 8) * max(1.0, (thing.side / 60) ** 0.7)
    depth = rng.uniform(10, 30)
    kind = rng.integers(5)
    if kind == 0:     # stripes
        pattern = np.sin(frequency * u)
    elif kind == 1:   # slanted stripes
        pattern = np.sin(0.7 * frequency * (u + v))
    elif kind == 2:   # checks
        pattern = np.sin(frequency * u) * np.sin(frequency * v)
    elif kind == 3:   # dots
        pattern = 2 * np.cos(frequency * u) * np.cos(frequency * v) - 1
    else:
        pattern = np.zeros_like(u)
    pattern = np.clip(3 * pattern, -1, 1) * depth                          # (h, w)
    tint = rng.uniform(0.5, 1.2, 3).astype(np.float32)
    light = LIGHT * (x + y)
    return thing.color + pattern[..., None] * tint - light[..., None]


def draw_shadow(canvas, alpha, window):
    """Darken what lies 2 px below and to the right of an object, in place."""
    size = len(canvas)
    rows, columns = window
    top = rows.start + 2
    left = columns.start + 2
    bottom = min(rows.stop + 2, size)
    right = min(columns.stop + 2, size)
    shadow = Image.fromarray((alpha * 80).astype(np.uint8))
    shadow = shadow.filter(ImageFilter.BoxBlur(1.5))
    shadow = np.asarray(shadow, np.float32) / 255                          # (h, w)
    canvas[top:bottom, left:right] *= 1 - shadow[:bottom - top, :right - left, None]


def draw_scene(rng, size=SCENE_SIZE, crowded=False):
    """Draw a scene, large objects first. Crowded: of two classes, most objects beside another one.

    An object may cover earlier ones as long as MIN_VISIBLE of each stays visible. Returns
        pixels (size, size, 3) uint8
        owner (size, size) uint8: 0 background, k where object k - 1 is visible
        list of SceneObject
    """
    canvas, ground_color = draw_background(rng, size)
    owner = np.zeros((size, size), np.uint8)
    classes = np.arange(len(SCENE_CLASSES))
    if crowded:
        classes = rng.choice(classes, 2, replace=False)
        sides = rng.uniform(*CROWD_SIDES, rng.integers(*CROWD_COUNTS, endpoint=True))
    else:
        sides = rng.uniform(MIN_SIDE, MAX_SIDE, rng.choice(len(COUNT_SHARES), p=COUNT_SHARES))
        if len(sides) and rng.random() < LARGE_SHARE / (1 - COUNT_SHARES[0]):
            sides[0] = rng.uniform(*LARGE_SIDES)
    things = []
    centers = []
    visible = np.zeros(0, int)                                             # px of each object
    for side in np.sort(sides)[::-1]:
        is_large = side > MAX_SIDE
        labels = classes
        if is_large:
            # Only shapes that fill enough of their square for COCO's large objects.
            labels = np.flatnonzero(FILL * side ** 2 > 1.08 * LARGE_AREA)
        label = int(rng.choice(labels))
        angle = rng.uniform(-MAX_ROTATION, MAX_ROTATION)
        side = side * size / SCENE_SIZE
        margin = side * (0.5 if is_large else 0.5 - MAX_OUTSIDE)
        must_stay = MIN_VISIBLE * np.array([thing.pixels for thing in things])
        for _ in range(ATTEMPTS):
            cx, cy = rng.uniform(min(margin, size / 2), max(size - margin, size / 2), 2)
            if crowded and centers:
                direction = rng.uniform(0, 2 * np.pi)
                beside = polar(np.array([direction]), CROWD_DISTANCE * side)[0]
                near = centers[rng.integers(len(centers))] + beside
                cx, cy = near.clip(margin, size - margin)
            alpha, window = draw_silhouette(label, side, angle, cx, cy, size)
            mask = alpha > 0.5
            hidden = np.bincount(owner[window][mask], minlength=len(things) + 1)
            hidden = hidden[1:]                                            # px each object loses
            if (visible - hidden >= must_stay).all():
                break
        else:
            continue   # no attempt found a place: leave this object out

        # A color unlike the background's and that of every object behind.
        behind = [ground_color] + [thing.color for thing, px in zip(things, hidden) if px]
        contrast = 0
        while contrast < MIN_CONTRAST:
            color = random_color(rng, (0.45, 0.95), (0.35, 1.0))
            contrast = np.abs(np.stack(behind) - color).sum(1).min()
        thing = SceneObject(label, side, angle, color, contrast, int(mask.sum()))
        visible = np.append(visible - hidden, thing.pixels)
        things.append(thing)
        centers.append(np.array([cx, cy]))
        owner[window][mask] = len(things)
        draw_shadow(canvas, alpha, window)
        surface = draw_surface(rng, thing, cx, cy, window)
        canvas[window] += alpha[..., None] * (surface - canvas[window])
    canvas += rng.uniform(6, 30) * (rng.random(canvas.shape, np.float32) - 0.5)
    return np.clip(canvas, 0, 255).astype(np.uint8), owner, things


def visible_objects(owner: np.ndarray, things: list[SceneObject]) -> Objects:
    """Return exact boxes, areas and masks of what is visible in a scene.

    owner, things: as draw_scene returns them
    """
    boxes = np.zeros((len(things), 4))
    areas = np.zeros(len(things))
    texts = []
    for k in range(len(things)):
        mask = owner == k + 1                                              # (size, size)
        rows = np.flatnonzero(mask.any(1))
        columns = np.flatnonzero(mask.any(0))
        width = columns[-1] - columns[0] + 1
        height = rows[-1] - rows[0] + 1
        boxes[k] = (columns[0], rows[0], width, height)
        areas[k] = mask.sum()
        code = coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))
        rle = {"size": list(mask.shape), "counts": code["counts"].decode()}
        texts.append(json.dumps(rle).encode())
    labels = np.array([thing.label for thing in things], np.int64)
    return Objects(boxes, labels, areas, np.zeros(len(things), bool), texts)


class Shapes(DetectionData):
    """Generated scenes of eight shapes with exact masks of what is visible; needs no files.

    split: train or val
    num_images: NUM_TRAIN or NUM_VAL if None; scene i depends on (seed, split, i) alone
    size: side of the square images in px
    crowded: see draw_scene

    A scene is drawn when it is first needed, then stored as uint8.
    """
    name = "generated scenes"
    has_masks = True
    class_names = list(SCENE_CLASSES)
    category_ids = list(range(1, len(SCENE_CLASSES) + 1))

    def __init__(self, split="train", num_images=None, seed=SCENE_SEED, size=SCENE_SIZE,
                 transform=None, load_masks=False, crowded=False):
        if split not in ("train", "val"):
            raise UserError(f"split: expected train or val, got {split!r}")
        if num_images is None:
            num_images = NUM_TRAIN if split == "train" else NUM_VAL
        self.split = split
        self.seed = seed
        self.size = size
        self.load_masks = load_masks
        self.crowded = crowded
        self.image_ids = np.arange(num_images)
        self.transform = transform or Transform()
        self.pixels = np.zeros((len(self), size, size, 3), np.uint8)
        self.drawn = [None] * len(self)                # Objects of a scene, None before it is drawn

    def draw(self, index):
        """Draw scene `index` anew and return what draw_scene returns."""
        split = ("train", "val").index(self.split)
        rng = random_generator("scene", self.seed, split, int(self.image_ids[index]))
        return draw_scene(rng, self.size, self.crowded)

    def objects(self, index):
        if self.drawn[index] is None:
            self.pixels[index], owner, things = self.draw(index)
            self.drawn[index] = visible_objects(owner, things)
        return self.drawn[index]

    def image(self, index):
        self.objects(index)   # draws the scene
        return Image.fromarray(self.pixels[index])

    def image_size(self, index):
        return self.size, self.size

    def file_name(self, index):
        return f"{self.image_ids[index]:06d}.png"

    @functools.cached_property
    def annotations(self):
        """The objects of all scenes, as Annotations. Draws the scenes that are not drawn yet."""
        if self.drawn.count(None) > 1000:
            print(f"drawing {len(self)} scenes, once ...", file=sys.stderr)
        return join_annotations([self.objects(index) for index in range(len(self))])

    def prepare(self):
        return self.annotations

    def subset(self, indices):
        part = copy.copy(self)
        part.__dict__.pop("annotations", None)   # cached, of all scenes
        part.image_ids = self.image_ids[indices]
        part.pixels = self.pixels[indices]
        part.drawn = [self.drawn[index] for index in indices]
        return part


# ---------------------------------------------------------------------------------------- LVIS

def federate(content: dict, split: str, seed: int) -> dict:
    """Turn the json of a split into one of LVIS: federated, with images named by address.

    In training a class of RARE is annotated in so many images, and unknown in the others.
    """
    rng = random_generator("federated", seed, ("train", "val").index(split))
    ids = {category["name"]: category["id"] for category in content["categories"]}
    remaining = {ids[name]: count for name, count in RARE.items()} if split == "train" else {}
    rows_of = {image["id"]: [] for image in content["images"]}
    for row in content["annotations"]:
        rows_of[row["image_id"]].append(row)

    annotations = []
    images = []
    for image in content["images"]:
        rows = rows_of[image["id"]]
        present = {row["category_id"] for row in rows}
        unknown = {number for number in present if remaining.get(number, 1) == 0}
        for number in present & remaining.keys() - unknown:
            remaining[number] -= 1
        rows = [row for row in rows if row["category_id"] not in unknown]
        absent = [number for number in ids.values()
                  if number not in present and rng.random() < VERIFIED]
        incomplete = []
        for number in sorted(present - unknown):
            same = [row for row in rows if row["category_id"] == number]
            if len(same) > 1 and rng.random() < INCOMPLETE:
                incomplete.append(number)
                rows.remove(same[-1])
        annotations += [{name: row[name] for name in row if name != "iscrowd"} for row in rows]
        images.append({
            "id": image["id"], "width": image["width"], "height": image["height"],
            "coco_url": f"http://images.cocodataset.org/{split}2017/{image['file_name']}",
            "neg_category_ids": absent, "not_exhaustive_category_ids": incomplete})
    return {"images": images, "annotations": annotations, "categories": content["categories"]}


def name_frequencies(train: dict) -> list[dict]:
    """The categories of LVIS: with their frequency in the json of the training images."""
    categories = []
    for category in train["categories"]:
        images = [row["image_id"] for row in train["annotations"]
                  if row["category_id"] == category["id"]]
        count = len(set(images))
        frequency = "f"
        if count <= 100:
            frequency = "c"
        if count <= 10:
            frequency = "r"
        categories.append({**category, "synset": f"{category['name']}.n.01",
                           "frequency": frequency, "image_count": count,
                           "instance_count": len(images)})
    return categories


@dataclass
class Options:
    """Write the generated scenes as a COCO-layout folder with PNG images."""
    write: str                   # folder to create
    layout: Literal["coco", "lvis"] = "coco"   # format of the annotations
    num_train: int = NUM_TRAIN   # training scenes
    num_val: int = NUM_VAL       # validation scenes
    seed: int = SCENE_SEED       # seed of the scenes
    crowded: bool = False        # many small objects of two classes a scene, close together


def write_scenes(directory, num_train=NUM_TRAIN, num_val=NUM_VAL, seed=SCENE_SEED,
                 layout="coco", crowded=False) -> None:
    """Write the generated scenes as a COCO-layout folder, annotated as COCO or LVIS is (layout).

    Raises UserError if the folder already has annotations, or if a split would be empty.
    """
    if min(num_train, num_val) < 1:
        raise UserError(
            f"--num_train, --num_val: expected at least 1 scene each, got {num_train}, {num_val}")
    for split in ("train", "val"):
        if json_path(directory, split).exists():
            raise UserError(
                f"--write {directory}: expected a new folder, got one with annotations; "
                "name another or remove it")
    for split, count in (("train", num_train), ("val", num_val)):
        scenes = Shapes(split, count, seed, crowded=crowded)
        folder = Path(directory) / f"{split}2017"
        path = json_path(directory, split)
        if layout == "lvis":
            path = Path(directory) / f"annotations/lvis_v1_{split}.json"
        folder.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(exist_ok=True)
        for index in range(count):
            with complete_picture(folder / scenes.file_name(index)) as file:
                scenes.image(index).save(file, "PNG", compress_level=1)
        content = scenes.coco().dataset
        if layout == "lvis":
            content = federate(content, split, seed)
            if split == "train":
                categories = name_frequencies(content)
            content["categories"] = categories
        with complete_file(path) as temporary:
            temporary.write_text(json.dumps(content))
        objects = len(content["annotations"])
        print(f"{one_line(str(path))}: {count} images, {objects} objects")


def main(argv: list[str] | None = None) -> None:
    with user_errors("scenes.py"):
        with one_line_usage("scenes.py", argv):
            options = tyro.cli(Options, args=argv, prog="scenes.py", use_underscores=True)
        check_ranges(options)
        write_scenes(options.write, options.num_train, options.num_val, options.seed,
                     options.layout, options.crowded)


if __name__ == "__main__":
    main()
