"""Image files: every kind becomes RGB, damaged ones are named, and no run ends by one of them."""
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import scenes
from coco_folders import (annotation, edit_json, epoch_of, image_entry, truncate, write_folder,
                          write_huge_header)
from engine import images, notices
from engine.errors import UserError
from tools import check_data

EVALUATION = SimpleNamespace(max_size=1333, eval_size=800, augment="paper")


@pytest.fixture(autouse=True)
def every_notice_is_due():
    notices.forget_notices()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_every_kind_of_image_becomes_rgb(mode, tmp_path):
    gray = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (30, 1))
    if mode == "I;16":
        image = Image.fromarray(gray.astype(np.uint16) * 256 + 7)
    else:
        image = Image.fromarray(gray).convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    read = data.read_image(path)
    assert read.mode == "RGB" and read.size == (40, 30)
    if mode != "1":
        assert np.abs(np.asarray(read, int) - gray[..., None]).max() <= 12


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("bits", [10, 12, 16])
def test_16_bit_images_are_scaled_by_their_range_with_one_notice(bits, suffix, tmp_path, capfd):
    """A 12-bit picture in a 16-bit file was read as nearly black."""
    values = np.linspace(0, 2 ** bits - 1, 40).astype(np.uint16)
    for name in ("a", "b"):
        Image.fromarray(np.tile(values, (30, 1))).save(tmp_path / f"{name}.{suffix}")
        pixels = np.asarray(data.read_image(tmp_path / f"{name}.{suffix}"))
        expected = np.linspace(0, 255, 40)[None, :, None]
        assert np.abs(pixels - expected).max() <= 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "16-bit images are scaled" in lines[0]


def test_notices_of_workers_are_printed_once(tmp_path, capfd):
    root = write_folder(tmp_path, [(40, 30)] * 6)
    for k in range(6):
        pixels = np.arange(1200, dtype=np.uint16).reshape(30, 40)
        Image.fromarray(pixels).save(root / "train2017" / f"{k}.jpg", format="PNG")
    dataset = data.CocoFolder(root)
    for epoch in range(2):
        epoch_of(data.batches(dataset, [[k] for k in range(6)], workers=2))
    assert len(capfd.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("suffix", ["tiff", "gif"])
def test_of_a_file_with_several_pages_the_first_is_read_and_a_notice_says_so(suffix, tmp_path,
                                                                             capfd):
    pages = [Image.new("L", (40, 30), value) for value in (200, 10, 20)]
    path = tmp_path / f"stack.{suffix}"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    for _ in range(2):
        assert np.asarray(data.read_image(path))[0, 0].tolist() == [200] * 3
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "only the first is read" in lines[0] and path.name in lines[0]


def test_floating_point_images_are_refused_with_the_reason(tmp_path):
    Image.new("F", (8, 8), 0.5).save(tmp_path / "a.tiff")
    with pytest.raises(data.UnreadableImage, match="a.tiff.*got floating point; convert"):
        data.read_image(tmp_path / "a.tiff")


def test_a_file_that_is_no_image_is_named_once(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no image")
    with pytest.raises(data.UnreadableImage) as caught:
        data.read_image(path)
    assert str(caught.value).endswith("got: cannot identify image file")
    assert str(caught.value).count("notes.txt") == 1


def save_with_orientation(path, pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, quality=95)


def test_exif(tmp_path, capsys):
    stored = np.zeros((30, 40, 3), np.uint8)
    stored[:10, :12] = 255                         # white corner, upper left as stored
    # Upright: 30 wide, 40 high, white upper right.
    root = write_folder(tmp_path, [(30, 40)], [(0, 1, (20, 0, 10, 12))])
    for split in ("train", "val"):
        save_with_orientation(root / f"{split}2017" / "0.jpg", stored, orientation=6)
    dataset = data.CocoFolder(root, "val")
    image, target = dataset[0]
    assert target["orig_size"].tolist() == [40, 30] and image.shape == (3, 40, 30)
    assert dataset.image_size(0) == (40, 30)
    cx, cy, w, h = (target["boxes"][0] * torch.tensor([30, 40, 30, 40])).tolist()
    assert image[:, int(cy), int(cx)].min() > 1.5 and image[:, 35, 5].max() < -1.5

    # The json has the size before the rotation.
    edit_json(root, image_entry(width=40, height=30), "val")
    edit_json(root, annotation(bbox=[0, 0, 12, 10]), "val")
    dataset = data.CocoFolder(root, "val")
    image, target = dataset[0]
    assert target["orig_size"].tolist() == [30, 40] == list(dataset.image_size(0))
    assert image[:, 5, 6].min() > 1.5
    assert check_data.check(root) == 0
    text = capsys.readouterr().out
    assert "rotated by it" in text and "not applied" in text


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_from_the_header_is_the_size_of_the_pixels(orientation, tmp_path):
    path = tmp_path / "a.jpg"
    save_with_orientation(path, np.zeros((30, 40, 3), np.uint8), orientation)
    header = images.read_header(path)
    for listed in (None, (0, 0), (30, 40), (40, 30), (8, 8)):
        assert images.upright_size(header, listed)[0] == data.read_image(path, listed).size


def test_truncated_jpeg(tmp_path, capfd):
    boxes = [(k, 1, (5, 6, 10 + k, 8)) for k in range(6)]
    root = write_folder(tmp_path, [(40, 30)] * 6, boxes)
    truncate(root / "train2017" / "2.jpg")
    truncate(root / "val2017" / "2.jpg")
    train, val = data.CocoFolder(root, "train"), data.CocoFolder(root, "val")
    for number in (0, 2):
        for epoch in range(2):
            train.set_epoch(epoch)
            order = epoch_of(data.batches(train, [[5, 2], [0, 1], [4, 3]], number))
            assert order == [[5, 3], [0, 1], [4, 3]]
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 1 and "2.jpg" in warnings[0] and "truncated" in warnings[0]
    assert train.unreadable.sum() == 1

    # Evaluation: the image stays itself, its object counts as missed.
    image, target = val[2]
    assert target["image_id"] == 12 and len(target["boxes"]) == 1
    assert image.std(dim=(1, 2)).max() == 0
    truncate(root / "train2017" / "4.jpg")
    with pytest.raises(UserError, match="at most 1 unreadable images of 6, got 2"):
        train[4]


def test_whoever_draws_an_unreadable_validation_image_gets_a_gray_one(tmp_path, capfd):
    """Pictures of predictions read `image`, and one unreadable file ended every run."""
    root = write_folder(tmp_path, [(40, 30)] * 3)
    truncate(root / "val2017" / "1.jpg")
    val = data.CocoFolder(root, "val")
    with pytest.raises(data.UnreadableImage):
        val.image(1)
    for _ in range(3):
        index, image = val.load_or_substitute(1)
        assert index == 1 and image.size == (40, 30)
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_an_unreadable_image_without_a_usable_size_does_not_stop_an_evaluation_of_masks(tmp_path):
    rle = {"segmentation": {"size": [30, 40], "counts": [0, 1200]}}
    root = write_folder(tmp_path, boxes=[(0, 1, (0, 0, 10, 8), rle)])
    truncate(root / "val2017" / "0.jpg")
    edit_json(root, lambda content: content["images"][0].pop("width"), "val")
    image, target = data.CocoFolder(root, "val", load_masks=True)[0]
    assert target["masks"].shape == (1, *image.shape[1:]) and not target["masks"].any()


def test_the_substitute_of_an_image_of_60000_x_60000_px_costs_no_time(tmp_path, capfd):
    root = write_folder(tmp_path, [(40, 30)] * 2, [(0, 1, (5, 6, 10, 8))])
    write_huge_header(root / "val2017" / "0.jpg")
    edit_json(root, image_entry(width=60000, height=60000), "val")
    begin = time.perf_counter()
    val = data.CocoFolder(root, "val", data.eval_transform(EVALUATION))
    image, target = val[0]
    assert image.shape == (3, 800, 800) and len(target["boxes"]) == 1
    assert val.image_size(0) == (60000, 60000)
    assert time.perf_counter() - begin < 3
    assert check_data.check(root) == 2
    out, err = capfd.readouterr()
    assert "error: image too large" in out and "error: unreadable image" in out


def test_a_pipe_among_the_images_is_named_and_does_not_hang(tmp_path, capfd):
    root = write_folder(tmp_path, [(40, 30)] * 2)
    for split in ("train", "val"):
        (root / f"{split}2017" / "1.jpg").unlink()
        os.mkfifo(root / f"{split}2017" / "1.jpg")
    assert check_data.check(root) == 2
    out = capfd.readouterr().out
    assert "unreadable image" in out and "1.jpg" in out and "expected a regular file" in out
    assert data.CocoFolder(root)[1][1]["index"] == 0
    assert data.CocoFolder(root, "val")[1][1]["index"] == 1


def test_bad_images_in_workers_stop_the_run_in_one_line(tmp_path):
    root = write_folder(tmp_path, [(40, 30)] * 6)
    for k in (1, 3):
        truncate(root / "train2017" / f"{k}.jpg")
    with pytest.raises(UserError, match="expected at most 1 unreadable images of 6") as error:
        epoch_of(data.batches(data.CocoFolder(root), [[k] for k in range(6)], workers=1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "webp", "tiff"])
def test_any_cut_of_any_image_file_is_recognized_as_unreadable(suffix, tmp_path):
    whole = tmp_path / f"whole.{suffix}"
    scenes.Shapes("val", 1).image(0).save(whole)
    content, path = whole.read_bytes(), tmp_path / f"cut.{suffix}"
    for share in np.linspace(0, 0.97, 15):
        path.write_bytes(content[:int(share * len(content))])
        try:
            assert data.read_image(path).size == (160, 160)    # some formats forgive a lost tail
        except data.UnreadableImage:
            pass


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "webp", "tiff"])
def test_damaged_bytes_of_any_image_file_give_an_image_or_one_error(suffix, tmp_path):
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"damaged.{suffix}"
    scenes.Shapes("val", 1).image(0).resize((40, 30)).save(whole)
    rng = np.random.default_rng(0)
    for _ in range(40):
        content = np.frombuffer(whole.read_bytes(), np.uint8).copy()
        places = rng.integers(0, min(len(content), 200), 5)
        content[places] = rng.integers(0, 256, 5)
        path.write_bytes(content.tobytes())
        try:
            assert data.read_image(path).mode == "RGB"
        except data.UnreadableImage as error:
            assert path.name in str(error)
