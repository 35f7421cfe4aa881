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

    python scenes.py --write DIR      writes the generated scenes as a COCO-layout folder
    python -m tools.check_data DIR      the data doctor: a table per class, every problem by file and id, exit code 1 on errors
"""
import atexit
import contextlib
import copy
import io
import itertools
import json
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
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch.utils.data import DataLoader, Dataset
from engine.errors import UserError

MEAN = np.array([0.485, 0.456, 0.406], np.float32)     # of ImageNet, RGB
STD = np.array([0.229, 0.224, 0.225], np.float32)
CROP_RESIZE, CROP_SIDES = (400, 500, 600), (384, 600)  # crop branch: short sides before the crop, limits of its sides, px
JITTER_GAIN, JITTER_SHIFT = 0.15, 0.08                 # colour jitter: the largest, of values in [0,1]
JITTER_INVERT = 0.15                                   # share of the images
SMALL_AREA, LARGE_AREA = 32 ** 2, 96 ** 2              # px, the borders of COCO's three size bands
BAD_SHARE = 0.01                                       # more unreadable images than this, and than one, stop the run
ORIENTATION = 0x0112                                   # the EXIF tag
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def stream(purpose, *key):
    """The random generator of one purpose and key; the purpose keeps e.g. scene 3 and sample 3 from sharing their numbers."""
    return np.random.default_rng((1 + ("scene", "order", "sample").index(purpose), *key))


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
                         "run python -m tools.check_data DIR")
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
            raise UserError(f"{path}: expected a COCO json, got {len(fatal)} entries that cannot be used: {named}; "
                            "python -m tools.check_data DIR lists them all")
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
            raise UserError(f"{path}: masks need a valid segmentation for every object, got {given} for "
                            f"{len(data['annotations'])} objects, {len(broken)} malformed; python -m tools.check_data DIR names them")

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
        raise UserError(f"{self.folder}: expected a readable image, got none of {len(self)}; python -m tools.check_data DIR")

    def _count_bad(self, index, error):
        self.bad[index] = True
        instead = "another image takes its place" if self.split == "train" else "its objects count as missed"
        print(f"warning: {self.folder / self.files[index]} cannot be read ({error}); {instead}", file=sys.stderr)
        allowed = max(1, BAD_SHARE * len(self))
        if self.bad.sum() > allowed:
            names = ", ".join(self.files[self.bad.numpy()][:5])
            raise UserError(f"{self.folder}: expected at most {int(allowed)} unreadable images of {len(self)}, got "
                            f"{int(self.bad.sum())} ({names}); repair or remove them, python -m tools.check_data DIR lists all"
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
        raise UserError(f"{path}: expected a COCO json there, got no such file; a data folder holds annotations/"
                        "instances_{train,val}2017.json, train2017/ and val2017/ (python scenes.py --write DIR makes one)")
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got {error}; write the file anew") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object with images, annotations and categories, got a "
                        f"{type(data).__name__}; this looks like a results file, give the ground truth")
    return data


def images_folder(root, split, images):
    """The folder that holds the images of the json: {split}2017, or one of its usual other places."""
    names = [image["file_name"] for image in images[:20]]
    places = [root / f"{split}2017", root / "images" / f"{split}2017", root / split, root / "images", root]
    found = next((place for place in places if any((place / name).is_file() for name in names)), None)
    if found is None:
        raise UserError(f"{places[0]}: expected the images of the json there (such as {names[0]}), got none of the "
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


def collate(samples):
    """[(image (3,h,w), target)] -> images (B,3,H,W) with zeros to the right and below, padding (B,H,W) bool, [target]"""
    height, width = (max(image.shape[axis] for image, _ in samples) for axis in (1, 2))
    images = torch.zeros(len(samples), 3, height, width)
    padding = torch.ones(len(samples), height, width, dtype=torch.bool)
    for k, (image, _) in enumerate(samples):
        images[k, :, :image.shape[1], :image.shape[2]] = image
        padding[k, :image.shape[1], :image.shape[2]] = False
    return images, padding, [target for _, target in samples]


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
