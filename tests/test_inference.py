"""engine/inference.py: what detect_image accepts and refuses, boxes in pixels of the original, and
results that are not finite."""
import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoint import damage, write_checkpoint

import scenes
from engine import inference
from engine.commands import open_detector
from engine.errors import UserError


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return open_detector(write_checkpoint(tmp_path_factory.mktemp("run") / "best.pt"))


@pytest.fixture(scope="module")
def scene():
    return scenes.Shapes("val", 2).image(1)


def same_detections(a, b):
    return all(torch.equal(a[key], b[key]) for key in ("scores", "labels", "boxes"))


def test_a_path_a_picture_and_an_array_give_the_same_detections(detector, scene, tmp_path):
    scene.save(tmp_path / "scene.png")
    expected = inference.detect_image(detector, scene)
    assert expected["scores"].diff().max() <= 0          # best first
    for image in (tmp_path / "scene.png", str(tmp_path / "scene.png"), np.asarray(scene),
                  np.asarray(scene.convert("RGBA"))):
        assert same_detections(inference.detect_image(detector, image), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB",
                                  "I;16"])
def test_pictures_of_every_mode_become_rgb(mode):
    gray = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    elif mode in ("PA", "LAB"):
        picture = Image.new(mode, (16, 16))
    else:
        picture = (gray if mode in "1LALP" else gray.convert("RGB")).convert(mode)
    rgb = inference.as_rgb(picture)
    assert rgb.mode == "RGB" and rgb.size == (16, 16)
    if mode in ("L", "LA", "RGBA", "YCbCr", "I;16"):
        assert np.abs(np.asarray(rgb)[..., 0].astype(int) - np.asarray(gray)).max() <= 1


def test_gray_arrays_of_sixteen_bits_use_the_reader_of_files(tmp_path):
    array = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    Image.fromarray(array).save(tmp_path / "gray.tif")
    from_file = inference.as_rgb(tmp_path / "gray.tif")
    assert (np.asarray(inference.as_rgb(array)) == np.asarray(from_file)).all()


def test_pictures_are_turned_upright_as_their_files_are(tmp_path):
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        rgb = inference.as_rgb(opened)
    assert rgb.size == (3, 4)
    assert (np.asarray(rgb) == np.asarray(inference.as_rgb(tmp_path / "turned.png"))).all()


@pytest.mark.parametrize("image, message", [
    (np.zeros((4, 4, 3), np.float32), "uint8.*got float32"),
    (np.zeros((4, 4, 3), np.uint16), "got uint16 of shape"),
    (np.zeros((3, 40, 40), np.uint8), r"shape \(3, 40, 40\)"),
    (np.zeros((2, 4, 4, 3), np.uint8), r"shape \(2, 4, 4, 3\)"),
    (np.zeros(7, np.uint8), "shape"),
    (np.zeros((0, 4), np.uint8), "with pixels"),
    (Image.new("F", (4, 4)), "floating point"),
    (Image.new("RGB", (0, 4)), "with pixels"),
    (torch.zeros(3, 4, 4), "got Tensor"),
    (None, "got NoneType"),
    ("nowhere.jpg", "nowhere.jpg: expected a readable image")])
def test_what_is_no_image_is_refused_in_one_line(image, message):
    with pytest.raises(UserError, match=message) as refused:
        inference.as_rgb(image)
    assert "\n" not in str(refused.value)


def test_a_broken_file_is_refused_by_name(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="broken.jpg: expected a readable image"):
        inference.as_rgb(tmp_path / "broken.jpg")


def test_boxes_come_back_in_pixels_of_a_picture_that_is_not_square(detector):
    """A model that always answers with one box."""
    paper = importlib.import_module("deformable_detr")
    outputs = {"pred_logits": torch.tensor([[[3.0, -3.0]]]),
               "pred_boxes": torch.tensor([[[0.5, 0.5, 1.0, 0.5]]])}

    class Constant(torch.nn.Linear):
        def forward(self, images, padding):
            assert images.shape == (1, 3, 30, 45)
            return outputs

    cfg = replace(detector.cfg, top_k=1)
    recipe = replace(detector.recipe, eval_size=30, max_size=60)
    constant = detector._replace(model=Constant(1, 1), paper=paper, cfg=cfg, recipe=recipe)
    found = inference.detect_image(constant, Image.new("RGB", (90, 60)))
    assert found["boxes"].tolist() == [[0, 15, 90, 45]] and found["labels"].tolist() == [0]


def test_detections_that_are_not_finite_are_refused_by_the_name_of_the_image(tmp_path, scene):
    path = write_checkpoint(tmp_path / "best.pt", change=damage)
    scene.save(tmp_path / "scene.png")
    with pytest.raises(UserError, match=r"NaN or infinite \w+ in .* of .*scene.png.*diverged"):
        inference.detect_image(open_detector(path), tmp_path / "scene.png")


def test_a_single_infinite_score_is_named():
    detection = {"scores": torch.tensor([0.5, float("inf")]), "boxes": torch.zeros(2, 4)}
    with pytest.raises(UserError, match="scores in 1 of 2 detections of image 7"):
        inference.require_finite(detection, "image 7")


def test_predict_restores_the_mode_of_the_model(detector):
    import data
    dataset = scenes.Shapes("val", 3, transform=data.Transform(sizes=(64,)))
    for mode in (True, False):
        detector.model.train(mode)
        batches = list(inference.predict(detector.model, dataset, range(3), "cpu", batch_size=2))
        assert [len(targets) for _, targets in batches] == [2, 1]
        assert detector.model.training == mode
    detector.model.eval()
