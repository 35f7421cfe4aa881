"""Large-scale jitter and copy-paste: sizes, boxes and objects by hand, training and evaluation."""
import copy
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

import data
import jitter
import scenes
import train
from coco_folders import POLYGON, write_folder
from engine import datasets
from engine.errors import UserError
from engine.inference import detect_on_canvas
from engine.recipe import Recipe
from jitter import FitSquare, LargeScaleJitter, boxes_of_masks, paste_objects

PADDED = torch.tensor([-0.166, -0.040, 0.182])   # (114 - mean) / std, red, green, blue


def rectangle(x0, y0, x1, y1, side=100):
    """A mask (side, side) of one rectangle."""
    mask = np.zeros((side, side), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


def target_of(*masks):
    masks = np.stack(masks)
    labels = np.arange(len(masks))
    return {"labels": labels, "boxes": boxes_of_masks(masks), "masks": masks}


class Draws:
    """Chosen numbers in place of a random generator."""

    def __init__(self, ratio=1.0, corner=(0, 0), chance=1.0, count=None):
        self.ratio = ratio
        self.corner = itertools.cycle(corner)
        self.chance = chance
        self.count = count

    def uniform(self, low, high):
        return self.ratio

    def random(self):
        return self.chance

    def integers(self, end):
        return next(self.corner) if self.count is None else min(self.count, end - 1)

    def permutation(self, n):
        return np.arange(n)


def plain(width, height, color=(10, 20, 30)):
    return Image.new("RGB", (width, height), color)


# ---- training

@pytest.mark.parametrize("ratio, size", [(0.1, (12, 6)), (0.99, (126, 63)), (1.0, (128, 64)),
                                         (2.0, (128, 128))])
def test_the_longer_side_becomes_a_ratio_of_the_square_which_gray_fills(ratio, size):
    """The rest of the square is 114 before normalization, in every channel."""
    transform = LargeScaleJitter(128)
    empty = {"labels": np.zeros(0, np.int64), "boxes": np.zeros((0, 4))}
    placed, _ = transform.place_once(plain(200, 100), empty, Draws(ratio))
    assert placed.size == (128, 128)
    pixels = np.asarray(placed)
    width, height = size
    assert (pixels[:height, :width] == (10, 20, 30)).all()
    assert (pixels[height:] == 114).all() and (pixels[:, width:] == 114).all()
    image, target = transform(plain(200, 100), empty)
    assert image.shape == (3, 128, 128) and target["size"].tolist() == [128, 128]
    corner = FitSquare(128)(plain(200, 100))[0][:, -1, -1]
    torch.testing.assert_close(corner, PADDED, atol=1e-3, rtol=0)


def test_an_object_cut_in_half_has_the_box_of_its_visible_pixels():
    """The image is enlarged to 200 px and cropped at (100, 40): x from 80 to 120 becomes 60 to 140
    of the image, then 60 to 100 of the crop's left half."""
    image = plain(100, 100)
    masks = rectangle(40, 30, 60, 45), rectangle(0, 0, 20, 20)
    transform = LargeScaleJitter(100)
    _, objects = transform.place_once(image, target_of(*masks), Draws(2.0, (100, 40)))
    assert objects["boxes"].tolist() == [[0, 20, 20, 50]]
    assert objects["labels"].tolist() == [0]
    assert objects["masks"].shape == (1, 100, 100) and objects["masks"].sum() == 20 * 30
    without = {name: target_of(*masks)[name] for name in ("labels", "boxes")}
    _, objects = transform.place_once(image, without, Draws(2.0, (100, 40)))
    assert objects["boxes"].tolist() == [[0, 20, 20, 50]]


def test_images_are_mirrored_before_they_are_padded():
    transform = LargeScaleJitter(100)
    _, objects = transform.place_once(plain(100, 100), target_of(rectangle(10, 0, 20, 20)),
                                      Draws(0.5, chance=0.4))
    assert objects["boxes"].tolist() == [[40, 0, 45, 10]]
    assert boxes_of_masks(objects["masks"]).tolist() == [[40, 0, 45, 10]]


def test_where_no_object_remains_another_image_takes_the_place():
    class Others:
        def __len__(self):
            return 1

        def pixel_sample(self, index):
            return 0, plain(100, 100, (9, 9, 9)), target_of(rectangle(0, 0, 99, 99))

    transform = LargeScaleJitter(100)
    far = target_of(rectangle(90, 90, 99, 99))
    draws = Draws(2.0, (0, 0))
    placed, objects = transform.place(plain(100, 100), far, draws, Others())
    assert len(objects["labels"]) == 1 and placed.getpixel((50, 50)) == (9, 9, 9)
    empty = {name: values[:0] for name, values in far.items()}
    placed, objects = transform.place(plain(100, 100), empty, draws, Others())
    assert placed.getpixel((50, 50)) == (10, 20, 30)   # an image without objects stays


# ---- copy-paste

def test_a_covered_object_stays_if_its_box_or_enough_of_it_does():
    """Of 1000 px, 950 are covered: 50 px are too few, and the box moves by more than 10 px."""
    covered = rectangle(0, 0, 40, 25)
    narrow = rectangle(60, 0, 80, 30)      # 600 px, of which 310 remain
    edge = rectangle(0, 60, 20, 70)        # 200 px; its box moves by 5 px
    hidden = rectangle(90, 90, 95, 95)     # nothing of it remains
    target = target_of(covered, narrow, edge, hidden)
    upper = rectangle(60, 0, 80, 14) | rectangle(60, 14, 70, 15)
    source = target_of(rectangle(0, 0, 38, 25), upper, rectangle(0, 65, 20, 70),
                       rectangle(85, 85, 100, 100))
    source["labels"] = source["labels"] + 10
    image, merged = paste_objects(plain(100, 100), target, plain(100, 100, (1, 2, 3)), source,
                                  Draws(count=4))
    assert merged["labels"].tolist() == [1, 2, 10, 11, 12, 13]
    assert merged["boxes"][0].tolist() == [60, 14, 80, 30]
    assert merged["boxes"][1].tolist() == [0, 60, 20, 65]
    assert image.getpixel((0, 0)) == (1, 2, 3) and image.getpixel((39, 0)) == (10, 20, 30)
    assert (boxes_of_masks(merged["masks"]) == merged["boxes"]).all()


def test_from_none_to_all_objects_are_pasted_never_more_than_99():
    counts = set()
    rng = np.random.default_rng(0)
    source = target_of(*[rectangle(3 * k, 0, 3 * k + 3, 3) for k in range(3)])
    nothing = {name: values[:0] for name, values in source.items()}
    for _ in range(50):
        _, merged = paste_objects(plain(100, 100), nothing, plain(100, 100), source, rng)
        assert len(set(merged["labels"].tolist())) == len(merged["labels"])
        counts.add(len(merged["labels"]))
    assert counts == {0, 1, 2, 3}
    many = target_of(*[rectangle(k % 90, k // 90, k % 90 + 1, k // 90 + 1) for k in range(150)])
    _, merged = paste_objects(plain(100, 100), nothing, plain(100, 100), many, Draws(count=1000))
    assert len(merged["labels"]) == 99


# ---- data sets

def lsj(**changes):
    return Recipe(augment="lsj", lsj_size=96, **changes)


def test_samples_are_full_squares_without_padding_and_depend_on_seed_epoch_and_index():
    train_set, val_set = datasets.build_datasets("", lsj(), 3, num_train=6, num_val=2)
    images, padding, targets = data.collate([train_set[i] for i in range(6)])
    assert images.shape == (6, 3, 96, 96) and not padding.any()
    for target in targets:
        assert (target["boxes"][:, 2:] > 0).all() and "masks" not in target
        corners = target["boxes"][:, :2] - target["boxes"][:, 2:] / 2
        assert (corners > -1e-6).all() and target["size"].tolist() == [96, 96]
    assert torch.equal(train_set[2][0], images[2])
    other = copy.copy(train_set)
    other.set_epoch(1)
    assert not torch.equal(other[2][0], images[2])
    assert val_set[0][0].shape == (3, 96, 96)
    masks, _ = datasets.build_datasets("", lsj(), 3, load_masks=True, num_train=6, num_val=2)
    _, target = masks[1]
    assert target["masks"].shape[1:] == (96, 96) and len(target["masks"]) == len(target["boxes"])


@pytest.mark.parametrize("some", [None, {"segmentation": POLYGON}])
def test_without_masks_nothing_is_pasted_which_is_said_once(tmp_path, capsys, some):
    """Also where only some objects have one."""
    box = (5, 6, 10, 8)
    boxes = [(0, 1, box)]
    if some:
        boxes = [(0, 1, box, some), (1, 1, box)]
    write_folder(tmp_path, images=((40, 30), (50, 50)), boxes=boxes)
    train_set, _ = datasets.build_datasets(str(tmp_path), lsj(), 0)
    for index in range(2):
        for epoch in range(4):
            train_set.set_epoch(epoch)
            assert len(train_set[index][1]["labels"]) <= 1
    said = capsys.readouterr().err
    assert said.count("no mask for every object, so --augment lsj pastes no objects") == 1


def test_augment_none_and_flip_leave_sizes_and_colors_alone():
    recipe = Recipe(train_sizes=(64, 80), eval_size=72, max_size=120, color_jitter=True)
    none = data.train_transform(Recipe(**{**vars(recipe), "augment": "none"}))
    assert none == data.eval_transform(recipe)
    flip = data.train_transform(Recipe(**{**vars(recipe), "augment": "flip"}), seed=5)
    scene = scenes.Shapes("train", 1).image(0)
    expected = none(scene)[0]
    seen = [flip(scene, epoch=epoch)[0] for epoch in range(8)]
    mirrored = [torch.equal(image, expected.flip(2)) for image in seen]
    assert True in mirrored and False in mirrored
    assert all(torch.equal(image, expected) or same for image, same in zip(seen, mirrored))


# ---- evaluation

def test_a_square_leads_back_to_the_pixels_of_the_image():
    """A perfect detector: boxes relative to the square become those of the annotations."""
    transform = FitSquare(128)
    boxes = np.array([[3.0, 5.0, 90.0, 80.0], [0.0, 0.0, 201.0, 99.0]])
    _, target = transform(plain(201, 99), {"labels": np.array([1, 0]), "boxes": boxes})
    canvas = torch.tensor([transform.canvas_size(201, 99)])
    assert canvas[0, 1] == pytest.approx(201) and canvas[0, 0] > 2 * 99

    def detect(outputs, sizes, cfg):
        cx, cy, w, h = outputs["pred_boxes"].unbind(-1)
        corners = torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), -1)
        height, width = sizes[0]
        masks = torch.ones(2, round(height.item()), round(width.item()))
        return [{"boxes": corners * torch.stack((width, height, width, height)), "masks": masks}]

    found, = detect_on_canvas(detect, {"pred_boxes": target["boxes"]}, canvas,
                              torch.tensor([[99, 201]]), None)
    torch.testing.assert_close(found["boxes"], torch.from_numpy(boxes).float(), atol=1e-3, rtol=0)
    assert found["masks"].shape == (2, 99, 201)


@pytest.mark.parametrize("flags, message", [
    (["--lsj_ratios", "2,0.1"], "expected --lsj_ratios LOWEST,HIGHEST"),
    (["--lsj_ratios", "0.5"], "expected --lsj_ratios LOWEST,HIGHEST"),
    (["--lsj_ratios", "0,2"], "expected --lsj_ratios from 0.01 to 10, got 0.0"),
    (["--lsj_ratios", "0.1,200"], "expected --lsj_ratios from 0.01 to 10"),
    (["--augment", "mosaic"], "expected --augment none or flip or paper or lsj, got 'mosaic'")])
def test_settings_outside_reason_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        train.parse(["--model", "co_detr", *flags])


def test_the_module_states_the_published_numbers():
    assert (jitter.GRAY, jitter.BOX_MOVES) == (114, 10)
    assert (jitter.LEAST_AREA, jitter.MOST_PASTED) == (300, 99)
    assert (Recipe().lsj_size, Recipe().lsj_ratios) == (1024, (0.1, 2.0))
