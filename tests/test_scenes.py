"""The generated scenes: reproducible, as hard as promised, annotated exactly."""
import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import scenes
from engine.errors import UserError
from tools import check_data

SMALL = SimpleNamespace(eval_size=128, max_size=200, augment="paper")


@pytest.fixture(scope="module")
def val_scenes():
    dataset = scenes.Shapes("val")
    dataset.draw = functools.cache(dataset.draw)
    return dataset


def test_a_scene_depends_on_seed_split_and_index_alone():
    few = scenes.Shapes("train", 3)
    many = scenes.Shapes("train", 50)
    many[49], many[2], few[2]                                  # any order, any number
    np.testing.assert_array_equal(np.asarray(few.image(2)), np.asarray(many.image(2)))
    assert few.objects(2).segmentations == many.objects(2).segmentations
    for other in (scenes.Shapes("val", 3), scenes.Shapes("train", 3, seed=1)):
        assert (np.asarray(other.image(2)) != np.asarray(few.image(2))).mean() > 0.5


def test_scenes_are_at_least_as_hard_as_the_bar_is_meant_for(val_scenes):
    things = [thing for k in range(200) for thing in val_scenes.draw(k)[2]]
    assert len(val_scenes.class_names) >= 8
    assert len({thing.label for thing in things}) == len(val_scenes.class_names)
    assert max(abs(thing.angle) for thing in things) >= 0.4
    assert scenes.MIN_CONTRAST <= min(thing.contrast for thing in things) <= 140
    assert scenes.MIN_SIDE <= 21 and min(thing.side for thing in things) <= 22
    assert len(val_scenes) >= 500
    counts = [len(val_scenes.objects(k).labels) for k in range(200)]
    assert min(counts) == 0 and 7 <= max(counts) <= 8


def test_every_size_band_of_the_default_validation_scenes_has_a_hundred_objects(val_scenes):
    areas = val_scenes.annotations.areas
    bands = np.bincount(np.digitize(areas, (32 ** 2, 96 ** 2)), minlength=3)
    assert min(bands) >= 100, bands
    assert data.class_counts(val_scenes).min() >= 100


def test_scene_boxes_areas_and_masks_are_exactly_what_is_visible(val_scenes):
    for k in range(30):
        pixels, owner, things = val_scenes.draw(k)
        objects = val_scenes.objects(k)
        assert len(objects.labels) == len(things)
        rows = zip(objects.boxes, objects.areas, objects.segmentations)
        for number, (box, area, text) in enumerate(rows, start=1):
            places = [(x, y) for y in range(160) for x in range(160) if owner[y, x] == number]
            xs, ys = zip(*places)
            expected = [min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1]
            assert box.tolist() == expected
            thing = things[number - 1]
            assert area == len(places) >= 0.55 * thing.pixels
            assert thing.pixels >= 0.55 * scenes.FILL[thing.label] * thing.side ** 2
            mask = data.decode_mask(json.loads(text), 160, 160)
            np.testing.assert_array_equal(mask, owner == number)


def test_a_visible_object_has_its_color_and_what_lies_behind_has_another():
    pixels, owner, things = scenes.Shapes("val").draw(2)
    for number, thing in enumerate(things, start=1):
        mean = pixels[owner == number].mean(0)
        assert np.abs(mean - thing.color).sum() < 60 < thing.contrast


def test_written_scenes_read_back_as_the_generated_ones(tmp_path, capsys):
    scenes.write_scenes(tmp_path, num_train=4, num_val=6, seed=3)
    assert check_data.check(tmp_path) == 0
    assert "circle" in capsys.readouterr().out
    written = data.CocoFolder(tmp_path, "val", load_masks=True)
    generated = scenes.Shapes("val", 6, seed=3, load_masks=True)
    assert written.class_names == generated.class_names
    assert written.category_ids == generated.category_ids
    for k in range(6):
        (image, target), (image_2, target_2) = written[k], generated[k]
        assert torch.equal(image, image_2) and target.keys() == target_2.keys()
        for name in target:
            expected = torch.as_tensor(target_2[name])
            assert torch.equal(torch.as_tensor(target[name]), expected), name


def test_scene_samples_hold_masks_only_when_asked(val_scenes):
    assert "masks" not in val_scenes[0][1]
    asked = scenes.Shapes("val", 3, load_masks=True)
    asked.transform = data.eval_transform(SMALL)
    target = asked[1][1]
    assert target["masks"].shape == (len(target["labels"]), 128, 128)
    assert target["masks"].dtype == torch.bool


def test_the_split_of_scenes_is_train_or_val():
    with pytest.raises(UserError, match="expected train or val, got 'test'"):
        scenes.Shapes("test")


def test_scenes_are_not_written_without_images(tmp_path):
    for counts in ((0, 5), (5, -1)):
        with pytest.raises(UserError, match="at least 1 scene each"):
            scenes.write_scenes(tmp_path / "new", *counts)
    assert not (tmp_path / "new").exists()


def test_the_command_writes_into_a_new_folder_only(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="expected a COCO json there, got no such file"):
        check_data.check(tmp_path)
    write = ["--write", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["scenes.py", *write, "--num-train", "2", "--num_val", "1"])
    scenes.main()
    assert check_data.check(tmp_path) == 0
    (tmp_path / "file").touch()
    for argv in (write, ["--wirte", str(tmp_path)], ["--write", str(tmp_path / "file" / "x")]):
        monkeypatch.setattr("sys.argv", ["scenes.py", *argv])
        with pytest.raises(SystemExit) as end:
            scenes.main()
        assert end.value.code.startswith("scenes.py: error: ")
    capsys.readouterr()


def test_crowded_scenes_have_many_small_objects_of_two_classes_close_together():
    crowded = scenes.Shapes("val", 12, crowded=True)
    counts = []
    for index in range(12):
        objects = crowded.objects(index)
        counts.append(len(objects.labels))
        assert len(set(objects.labels.tolist())) <= 2
        assert objects.boxes[:, 2:].max() < 1.5 * scenes.CROWD_SIDES[1]
        centers = objects.boxes[:, :2] + objects.boxes[:, 2:] / 2
        distances = np.linalg.norm(centers[:, None] - centers, axis=-1)
        distances[np.diag_indices(len(centers))] = np.inf
        assert np.median(distances.min(1)) < 1.3 * scenes.CROWD_SIDES[1]
    assert max(counts) <= scenes.CROWD_COUNTS[1] and np.mean(counts) > scenes.CROWD_COUNTS[0]


def test_crowded_scenes_are_written_by_a_flag(tmp_path):
    scenes.main(["--write", str(tmp_path), "--num_train", "2", "--num_val", "1", "--crowded"])
    content = json.loads((tmp_path / "annotations/instances_train2017.json").read_text())
    expected = scenes.Shapes("train", 2, crowded=True).coco().dataset["annotations"]
    assert len(content["annotations"]) == len(expected) > 10
