"""COCO-layout folders, the published augmentation, and batches.

The way of an image: file -> Pillow image and boxes in pixels -> transform -> collate -> batch

    image     float32 (3, h, w), RGB, normalized with ImageNet's mean and standard deviation
    target    labels (n,) int64 in 0..N-1, for N classes
              boxes (n, 4) float32, cxcywh, relative to the image without padding
              masks (n, h, w) bool, if asked for
              image_id int, of the json; index int, position in the data set
              size (2,), height and width of the image; orig_size (2,), of the original
              canvas_size (2,), those of the image, with what padding counts as image, in pixels of
              the original: orig_size, but for large-scale jitter
    padding   (B, H, W) bool, True on pixels added to bring the images of a batch to one size

Classes: the `categories` of the json, sorted by id, become labels 0..N-1; `category_ids[label]`
leads back. engine/class_labels.py gives a validation set the labels of its training set.

Randomness: a training sample depends on (seed, epoch, index), the order of an epoch on (seed,
epoch). The number of worker processes changes nothing.

transforms.py and jitter.py change images and boxes, engine/coco_json.py reads and checks the json,
engine/lvis.py what LVIS has beyond it, engine/images.py reads image files, scenes.py draws the
generated data set. `python -m tools.check_data DIR` reports every problem.
"""
import contextlib
import copy
import io
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from engine import coco_json, lvis
from engine.coco_json import Problem
from engine.errors import UserError
from engine.images import UnreadableImage, read_header, read_image, upright_size
from engine.notices import one_line
from engine.segmentations import decode_mask
from engine.workers import TIMEOUT, affordable_workers, one_line_errors, start_worker
from jitter import FitSquare, LargeScaleJitter
from transforms import Transform, has_area

SMALL_AREA = 32 ** 2                 # pixels; COCO's small objects are below,
LARGE_AREA = 96 ** 2                 # its large objects above, its medium objects between
MAX_UNREADABLE = 0.01                # share of images that may be unreadable; one image always may
GRAY = (124, 116, 104)               # ImageNet's mean; fills the substitute of an unreadable image
MAX_GRAY_SIDE = 4096                 # px; its limit, as a json may list a wrong size
IF_COMPLETE = "if complete"          # load masks if every object has a valid one
UNKNOWN_LONG_SIDE = 2000             # px, assumed for memory where a transform has no max_size


# -------------------------------------------------------------------------------- annotations

class Objects(NamedTuple):
    """The annotated objects of one image, in pixels of the original."""
    boxes: np.ndarray            # (n, 4) float64 xywh
    labels: np.ndarray           # (n,) int64, 0..N-1
    areas: np.ndarray            # (n,) float64, pixels
    crowd: np.ndarray            # (n,) bool: a region to ignore, not an object to learn
    segmentations: list          # n json texts (bytes): polygons or RLE, b"" where there is none


NO_OBJECTS = Objects(
    boxes=np.zeros((0, 4)),
    labels=np.zeros(0, np.int64),
    areas=np.zeros(0),
    crowd=np.zeros(0, bool),
    segmentations=[],
)


class Annotations(NamedTuple):
    """The A objects of all images, end to end: image i owns rows start[i]:start[i + 1].

    The segmentation of row a is text[text_start[a]:text_start[a + 1]]. Flat arrays, not Python
    objects: a forked worker that reads them copies no memory page.
    """
    start: np.ndarray            # (images + 1,) int64
    boxes: np.ndarray            # (A, 4) float64 xywh
    labels: np.ndarray           # (A,) int64
    areas: np.ndarray            # (A,) float64
    crowd: np.ndarray            # (A,) bool
    text: np.ndarray             # (bytes,) uint8: the json texts of all segmentations
    text_start: np.ndarray       # (A + 1,) int64

    def of_image(self, index: int) -> Objects:
        """Return the objects of one image."""
        first, last = self.start[index:index + 2]
        rows = slice(first, last)
        texts = []
        for row in range(first, last):
            begin, end = self.text_start[row:row + 2]
            texts.append(self.text[begin:end].tobytes())
        return Objects(
            self.boxes[rows], self.labels[rows], self.areas[rows], self.crowd[rows], texts)


def join_annotations(images: list[Objects]) -> Annotations:
    """Put the objects of images end to end."""
    texts = [text for objects in images for text in objects.segmentations]
    parts = [NO_OBJECTS, *images]   # np.concatenate needs at least one
    return Annotations(
        start=offsets([len(objects.labels) for objects in images]),
        boxes=np.concatenate([objects.boxes for objects in parts]),
        labels=np.concatenate([objects.labels for objects in parts]),
        areas=np.concatenate([objects.areas for objects in parts]),
        crowd=np.concatenate([objects.crowd for objects in parts]),
        text=np.frombuffer(b"".join(texts), np.uint8),
        text_start=offsets([len(text) for text in texts]),
    )


def offsets(lengths: list[int]) -> np.ndarray:
    """Return where each of several consecutive parts begins, and where the last ends: (n + 1,)."""
    return np.cumsum([0, *lengths])


# ----------------------------------------------------------------------------------- data sets

class DetectionData(Dataset):
    """Base class of CocoFolder and of scenes.Shapes.

    A subclass has
        name, split, class_names (list of str), category_ids (list of int), image_ids (images,)
        int64, transform, annotations, has_masks, and degenerate (number of boxes dropped)
    and defines
        objects(index) -> Objects
        image(index) -> the original, a Pillow image in RGB
        image_size(index) -> its (height, width) in px
        file_name(index) -> str
        subset(indices) -> data set of these images
    """
    epoch = 0
    degenerate = 0
    problems: list[Problem] = []
    load_masks = False
    federated = None      # of an LVIS json: see engine/lvis.py

    def __len__(self):
        return len(self.image_ids)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation is applied from now on."""
        self.epoch = epoch

    def load_or_substitute(self, index: int) -> tuple[int, Image.Image]:
        """Return (index, image) of a sample, or of its substitute if the image is unreadable.

        Everything that shows or evaluates images reads them through this method.
        """
        return index, self.image(index)

    def is_readable(self, index: int) -> bool:
        """Return False once reading the image has failed."""
        return True

    def prepare(self) -> None:
        """Fill caches in the parent process, so that the workers inherit them."""

    def first(self, count: int) -> "DetectionData":
        """Return a data set of the first `count` images that have objects."""
        # .all() is also True for an image without annotations.
        indices = (i for i in range(len(self)) if not self.objects(i).crowd.all())
        return self.subset(list(itertools.islice(indices, count)))

    def __getitem__(self, index):
        """Return the transformed (image, target), as described at the top of this file."""
        index, image, target = self.pixel_sample(int(index))
        width, height = image.size
        tensor, target = self.transform(image, target, self.epoch, index, self)
        target["image_id"] = int(self.image_ids[index])
        target["orig_size"] = torch.tensor([height, width])
        target["canvas_size"] = torch.tensor(self.transform.canvas_size(width, height))
        target["index"] = index
        return tensor, target

    def pixel_sample(self, index: int) -> tuple[int, Image.Image, dict]:
        """Return (index, image, pixel target) of a sample, or of its substitute."""
        index, image = self.load_or_substitute(index)
        return index, image, self.pixel_target(index, *image.size)

    def pixel_target(self, index: int, width: int, height: int) -> dict:
        """Return the objects of an image, without crowds, before any transform.

        labels (n,), boxes (n, 4) xyxy in px clipped to the image, and masks (n, h, w) uint8 if the
        data set loads them.
        """
        objects = self.objects(index)
        low = objects.boxes[:, :2]
        high = low + objects.boxes[:, 2:]
        boxes = np.concatenate([low, high], 1)                                       # (n, 4)
        boxes = np.clip(boxes, 0, [width, height, width, height])
        keep = np.flatnonzero(~objects.crowd & has_area(boxes))
        target = {"labels": objects.labels[keep], "boxes": boxes[keep]}
        if self.load_masks and self.has_masks:
            masks = np.zeros((len(keep), height, width), np.uint8)
            # The gray substitute of an unreadable image may differ in size: its masks stay empty.
            if self.is_readable(index):
                for mask, row in zip(masks, keep):
                    mask[:] = decode_mask(json.loads(objects.segmentations[row]), height, width)
            target["masks"] = masks
        return target

    def coco(self) -> COCO:
        """Return the ground truth for pycocotools.

        Crowds are regions to ignore, degenerate boxes are left out, annotation ids begin with 1
        (pycocotools takes a match with id 0 for no match).
        """
        images = []
        rows = []
        for index, image_id in enumerate(self.image_ids.tolist()):
            height, width = self.image_size(index)
            file = self.file_name(index)
            images.append({"id": image_id, "width": width, "height": height, "file_name": file})
            objects = self.objects(index)
            for k, text in enumerate(objects.segmentations):
                row = {
                    "id": len(rows) + 1,
                    "image_id": image_id,
                    "category_id": self.category_ids[objects.labels[k]],
                    "bbox": objects.boxes[k].tolist(),
                    "area": objects.areas[k].item(),
                    "iscrowd": int(objects.crowd[k]),
                }
                if text:
                    row["segmentation"] = json.loads(text)
                rows.append(row)
        ids_and_names = zip(self.category_ids, self.class_names)
        categories = [{"id": number, "name": name} for number, name in ids_and_names]
        truth = COCO()
        truth.dataset = {
            "info": {}, "images": images, "annotations": rows, "categories": categories}
        if self.federated:
            lvis.add_to_truth(truth.dataset, self.federated)
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
        return truth


def class_counts(dataset: DetectionData) -> np.ndarray:
    """Count the objects of each class, crowds excluded: (N,) int64."""
    annotations = dataset.annotations
    labels = annotations.labels[~annotations.crowd]
    return np.bincount(labels, minlength=len(dataset.class_names))


def objects_per_image(dataset: DetectionData) -> np.ndarray:
    """Count the objects of each image, crowds excluded: (images,) int64."""
    annotations = dataset.annotations
    before = offsets(~annotations.crowd)   # (A + 1,), number of objects before each row
    return np.diff(before[annotations.start])


class CocoFolder(DetectionData):
    """A folder in COCO layout: annotations/instances_{split}2017.json and {split}2017/ with images.

    root: the folder, also in other usual layouts (engine/coco_json.py lists them)
    split: train, val or test
    load_masks: samples have masks, unless the json has none (then `has_masks` is False); with
        IF_COMPLETE also unless some objects have none, which is else refused
    annotations, images: explicit paths of the json and of the image folder
    content: what the json holds, where it has been read already

    A json of LVIS is read as it is (engine/lvis.py), its images from the folders it names.

    Crowds are never learned and are regions to ignore in coco(). Boxes without width or height
    inside the image are dropped and counted (`degenerate`). Images without objects stay. EXIF
    rotation is applied unless the json has the size of the unrotated pixels.

    An unreadable training image is replaced by the next readable one, an unreadable evaluation
    image by plain gray, so that its objects count as missed. Either prints a warning.

    Raises UserError if json or images are missing or unusable. Reading a sample raises it if more
    than one image, and more than 1 % of them, turned out to be unreadable.
    """

    def __init__(self, root, split="train", transform=None, load_masks=False,
                 annotations=None, images=None, content=None):
        root = Path(root)
        self.name = root.name
        self.split = split
        self.transform = transform or Transform()
        self.load_masks = load_masks
        self.path = Path(annotations or coco_json.json_path(root, split))
        if content is None:
            content = coco_json.read_json(self.path, root, split)
        if split == "test":
            content.setdefault("annotations", [])   # those of a test set are often not public
        self.problems = coco_json.json_problems(content)
        coco_json.refuse_fatal(self.path, self.problems)
        self.federated = None
        if lvis.is_lvis(content):
            self.federated = lvis.read_federated(content, self.path)
        self.folder = Path(images or coco_json.images_folder(root, split, content))

        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.class_names = [one_line(str(category["name"])) for category in categories]
        self.category_ids = [category["id"] for category in categories]
        entries = content["images"]
        self.image_ids = np.array([image["id"] for image in entries], np.int64)
        self.files = np.array([image["file_name"] for image in entries])
        # (images, 2) width and height, 0 = not given
        self.sizes = np.array([coco_json.listed_size(image) for image in entries])
        # True for images that could not be read. In shared memory, so that every worker knows.
        self.unreadable = torch.zeros(len(self), dtype=torch.bool).share_memory_()
        texts = self._segmentation_texts(content)
        self._flatten(content["annotations"], texts)

    def _segmentation_texts(self, content):
        """Return the segmentations as json texts, b"" for missing and malformed ones."""
        rows = content["annotations"]
        given = [bool(row.get("segmentation")) for row in rows]
        # Training without masks never decodes segmentations, so they are not checked either.
        if self.split == "train" and not self.load_masks:
            self.has_masks = bool(rows) and all(given)
            return [b""] * len(rows)
        malformed = coco_json.segmentation_problems(content)
        self.problems += malformed.values()
        usable = [given[k] and k not in malformed for k in range(len(rows))]
        self.has_masks = bool(rows) and all(usable)
        if self.load_masks is True and any(given) and not self.has_masks:
            raise UserError(
                f"{self.path}: masks need a valid segmentation for every object, got {sum(given)} "
                f"for {len(rows)} objects, {len(malformed)} malformed; "
                "python -m tools.check_data DIR names them")
        return [json.dumps(row["segmentation"]).encode() if usable[k] else b""
                for k, row in enumerate(rows)]

    def _flatten(self, rows, texts):
        """Set self.annotations: the rows ordered by image, without degenerate boxes."""
        index_of = {image_id: index for index, image_id in enumerate(self.image_ids.tolist())}
        label_of = {category_id: label for label, category_id in enumerate(self.category_ids)}
        indices = np.array([index_of[row["image_id"]] for row in rows], np.int64)    # (A,)
        boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
        degenerate = coco_json.degenerate_boxes(boxes, self.sizes[indices])
        self.degenerate = int(degenerate.sum())
        order = np.flatnonzero(~degenerate)
        order = order[np.argsort(indices[order], kind="stable")]
        rows = [rows[k] for k in order]
        texts = [texts[k] for k in order]
        self.annotations = Annotations(
            start=np.searchsorted(indices[order], np.arange(len(self) + 1)),
            boxes=boxes[order],
            labels=np.array([label_of[row["category_id"]] for row in rows], np.int64),
            areas=np.array([coco_json.listed_area(row) for row in rows], np.float64),
            crowd=np.array([row.get("iscrowd", 0) for row in rows], bool),
            text=np.frombuffer(b"".join(texts), np.uint8),
            text_start=offsets([len(text) for text in texts]),
        )

    def objects(self, index):
        return self.annotations.of_image(index)

    def file_name(self, index):
        return str(self.files[index])

    def image(self, index):
        return read_image(self.folder / self.files[index], tuple(self.sizes[index].tolist()))

    def image_size(self, index):
        width, height = self.sizes[index].tolist()
        try:
            header = read_header(self.folder / self.files[index])
            (width, height), _ = upright_size(header, (width, height))
        except UnreadableImage:
            pass   # keep the size in the json
        return height, width

    def load_or_substitute(self, index):
        # In training, the images after this one may replace it; in evaluation, none may.
        candidates = [index]
        if self.split == "train":
            candidates = itertools.chain(range(index, len(self)), range(index))
        for candidate in candidates:
            if self.unreadable[candidate]:
                continue
            try:
                return candidate, self.image(candidate)
            except UnreadableImage as error:
                self._count_unreadable(candidate, error)
        if self.split == "train":
            raise UserError(
                f"{self.folder}: expected a readable image, got none of {len(self)}; "
                "python -m tools.check_data DIR says why")
        size = self.sizes[index].clip(1, MAX_GRAY_SIDE)
        return index, Image.new("RGB", tuple(size.tolist()), GRAY)

    def is_readable(self, index):
        return not self.unreadable[index]

    def _count_unreadable(self, index, error):
        """Warn once about an unreadable image; raise UserError if there are too many."""
        self.unreadable[index] = True
        consequence = "its objects count as missed"
        if self.split == "train":
            consequence = "another image takes its place"
        print(f"warning: {one_line(str(error), 300)}; {consequence}", file=sys.stderr)
        allowed = max(1, int(MAX_UNREADABLE * len(self)))
        count = int(self.unreadable.sum())
        if count > allowed:
            names = ", ".join(self.files[self.unreadable.numpy()][:5])
            raise UserError(
                f"{self.folder}: expected at most {allowed} unreadable images of {len(self)}, got "
                f"{count} ({one_line(names)}); repair or remove them, "
                "python -m tools.check_data DIR lists all")

    def subset(self, indices):
        part = copy.copy(self)
        part.image_ids = self.image_ids[indices]
        part.files = self.files[indices]
        part.sizes = self.sizes[indices]
        part.unreadable = self.unreadable[indices].share_memory_()
        part.annotations = join_annotations([self.objects(index) for index in indices])
        return part


# ---------------------------------------------------------------------------------- transforms

def train_transform(recipe, seed: int = 0, keep_masks: bool = False):
    """Transform for training, by `augment` of a recipe: none, flip, paper or lsj.

    paper: the sizes, crop, color_jitter and vertical_flip of the recipe. keep_masks: large-scale
    jitter, which reads masks in any case, leaves them in the targets.
    """
    if recipe.augment == "lsj":
        return LargeScaleJitter(recipe.lsj_size, tuple(recipe.lsj_ratios), seed, keep_masks)
    if recipe.augment == "none":
        return eval_transform(recipe)
    if recipe.augment == "flip":
        return Transform((recipe.eval_size,), recipe.max_size, augment=True, seed=seed)
    return Transform(
        sizes=tuple(recipe.train_sizes),
        max_size=recipe.train_max_size or recipe.max_size,
        augment=True,
        crop=recipe.crop,
        color_jitter=recipe.color_jitter,
        vertical_flip=recipe.vertical_flip,
        seed=seed,
    )


def eval_transform(recipe):
    """Transform for evaluation: only resizes, to eval_size of a recipe, or into lsj_size."""
    if recipe.augment == "lsj":
        return FitSquare(recipe.lsj_size)
    return Transform((recipe.eval_size,), recipe.max_size)


# ------------------------------------------------------------------------------------- batches

def collate(samples: list) -> tuple[Tensor, Tensor, list[dict]]:
    """Batch samples [(image (3, h, w), target)].

    Returns images (B, 3, H, W) with zeros to the right and below, padding (B, H, W) bool, [target].
    """
    height = max(image.shape[1] for image, _ in samples)
    width = max(image.shape[2] for image, _ in samples)
    images = torch.zeros(len(samples), 3, height, width)
    padding = torch.ones(len(samples), height, width, dtype=torch.bool)
    for k, (image, _) in enumerate(samples):
        _, h, w = image.shape
        images[k, :, :h, :w] = image
        padding[k, :h, :w] = False
    return images, padding, [target for _, target in samples]


def to_device(targets: list[dict], device) -> list[dict]:
    """Copy every tensor of a list of targets to a device, without waiting for it."""
    def move(value):
        return value.to(device, non_blocking=True) if torch.is_tensor(value) else value
    return [{key: move(value) for key, value in target.items()} for target in targets]


def batches(dataset: DetectionData, indices: list[list[int]], workers: int = 0,
            pin_memory: bool = False) -> Iterator[tuple[Tensor, Tensor, list[dict]]]:
    """Yield (images, padding, targets), see collate: one batch for each list of indices.

    The global random state is left alone. Raises UserError if workers fail or answer too late.
    """
    if workers:
        dataset.prepare()
        batch_size = max(map(len, indices), default=1)
        workers = affordable_workers(workers, batch_bytes(dataset, batch_size))
    loader = DataLoader(
        dataset,
        batch_sampler=indices,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
        timeout=TIMEOUT if workers else 0,
        generator=torch.Generator(),   # the global one belongs to the model
    )
    yield from one_line_errors(loader)


def batch_bytes(dataset: DetectionData, batch_size: int) -> int:
    """Estimate the memory of one batch, in bytes, from above."""
    transform = getattr(dataset, "transform", Transform())
    side = transform.max_size or UNKNOWN_LONG_SIDE
    bytes_per_pixel = 3 * 4 + 1                                # image and padding
    if dataset.load_masks and getattr(transform, "keep_masks", True):
        bytes_per_pixel += int(objects_per_image(dataset).max(initial=0))
    return batch_size * side * side * bytes_per_pixel
