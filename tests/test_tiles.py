"""engine/tiles.py: tiles cover the image, cut objects are found once, small ones are found."""
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from tiny_checkpoint import write_checkpoint

import eval as evaluation
from engine import tiles
from engine.commands import open_detector
from engine.inference import detect_image
from engine.notices import forget_notices


@pytest.mark.parametrize("size", [(100, 100), (640, 480), (641, 640), (2000, 1500), (5000, 300)])
@pytest.mark.parametrize("overlap", [0, 0.2, 0.5])
def test_tiles_cover_the_image_and_neighbors_overlap(size, overlap):
    width, height = size
    first, *regions = tiles.tile_regions(width, height, 640, overlap)
    assert first == (0, 0, width, height)
    if max(size) <= 640:
        assert not regions
        return
    covered = np.zeros((height, width), bool)
    for x0, y0, x1, y1 in regions:
        assert x1 - x0 == min(640, width) and y1 - y0 == min(640, height)
        covered[y0:y1, x0:x1] = True
    assert covered.all()
    columns = sorted({region[0] for region in regions})
    assert all(b - a <= 640 * (1 - overlap) for a, b in zip(columns, columns[1:]))


class Blobs(torch.nn.Linear):
    """Detects bright squares of at least 5 px in what it is shown."""

    def forward(self, images, padding):
        bright = images[0].mean(0).numpy() > 0
        found = []
        for rows, columns in ndimage.find_objects(ndimage.label(bright)[0]):
            if min(rows.stop - rows.start, columns.stop - columns.start) >= 5:
                found.append((columns.start, rows.start, columns.stop, rows.stop))
        h, w = bright.shape
        return {"boxes": torch.tensor(found).reshape(-1, 4) / torch.tensor([w, h, w, h])}


class Paper:
    @staticmethod
    def detect(outputs, sizes, cfg):
        h, w = sizes[0].tolist()
        boxes = outputs["boxes"] * torch.tensor([w, h, w, h])
        return [{"scores": torch.linspace(0.9, 0.8, len(boxes)), "boxes": boxes,
                 "labels": torch.zeros(len(boxes), dtype=torch.int64)}]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    loaded = open_detector(write_checkpoint(tmp_path_factory.mktemp("run") / "best.pt"))
    recipe = replace(loaded.recipe, eval_size=160, max_size=400)
    return loaded._replace(model=Blobs(1, 1), paper=Paper, recipe=recipe)


def mosaic():
    """Squares of 12 px, some of them on the borders of tiles, and one of 300 px -> image, boxes."""
    corners = [(20 + 90 * i, 15 + 85 * j, 12) for i in range(8) for j in range(3)]
    corners += [(152, 300, 12), (300, 154, 12), (640, 400, 12), (250, 380, 300)]
    pixels = np.zeros((720, 800, 3), np.uint8)
    boxes = []
    for x, y, side in corners:
        pixels[y:y + side, x:x + side] = 255
        boxes.append((x, y, x + side, y + side))
    return Image.fromarray(pixels), np.array(boxes)


def test_small_objects_of_a_mosaic_are_found_once_and_large_ones_too(detector):
    image, boxes = mosaic()
    alone = detect_image(detector, image)
    assert len(alone["boxes"]) == 1                        # 12 px become 2.7 px: only the large one
    found = tiles.detect_tiled(detector, image, tile=160, overlap=0.2)
    assert len(found["boxes"]) == len(boxes)
    assert (found["scores"].diff() <= 0).all()
    distance = np.abs(found["boxes"].numpy()[:, None] - boxes[None]).max(-1)
    assert (distance.min(0) <= 3).all() and (distance.min(1) <= 3).all()


def test_an_object_larger_than_a_tile_is_noticed_once(detector, capfd):
    image = Image.new("RGB", (400, 300))
    image.paste((255, 255, 255), (100, 60, 300, 260))
    forget_notices()
    for tile, count in ((400, 0), (220, 0), (120, 1)):
        for _ in range(2):
            tiles.detect_tiled(detector, image, tile)
        text = capfd.readouterr().err
        assert len(re.findall("an object of 20[01] px is larger than --tile 120", text)) == count


def test_detections_at_an_inner_border_are_cut_and_at_the_images_own_are_not():
    boxes = torch.tensor([[100.0, 0, 120, 20], [150, 50, 170, 70], [101, 141, 120, 159],
                          [130, 130, 150, 150]])
    cut = tiles.is_cut(boxes, (100, 0, 260, 160), (400, 400))
    assert cut.tolist() == [True, False, True, False]
    assert not tiles.is_cut(boxes, (0, 0, 400, 400), (400, 400)).any()


@pytest.mark.parametrize("words", [("--images", "mosaic.png"), ()])
def test_the_command_detects_on_tiles(tmp_path, monkeypatch, words):
    """Of images and of data; a random model, whose detections of the tiles are many."""
    monkeypatch.chdir(tmp_path)
    path = write_checkpoint(tmp_path / "best.pt", num_val=2)
    mosaic()[0].save("mosaic.png")
    shown = []

    def detect(detector, image, tile, overlap, amp):
        shown.append((tile, overlap))
        return detect_image(detector, image, amp)

    monkeypatch.setattr(evaluation, "detect_tiled", detect)
    evaluation.main(["--checkpoint", str(path), "--tile", "160", "--overlap", "0.1", "--device",
                     "cpu", "--out", "out", *words])
    assert shown == [(160, 0.1)] * (1 if words else 2)
    assert (tmp_path / "out" / ("detections.json" if words else "eval.json")).exists()


def test_models_of_masks_have_no_tiles(detector):
    class Masks(Paper):
        @staticmethod
        def detect(outputs, sizes, cfg):
            found, = Paper.detect(outputs, sizes, cfg)
            return [found | {"masks": torch.zeros(len(found["boxes"]), 4, 4)}]

    with pytest.raises(ValueError, match="--tile.*masks"):
        tiles.detect_tiled(detector._replace(paper=Masks), mosaic()[0], 160)


def test_tiles_of_a_mask_network_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(SystemExit, match="--tile: expected a model of boxes, got one of masks"):
        evaluation.main(["--checkpoint", "mask_frozen_detr_small", "--tile", "160", "--device",
                         "cpu", "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())
