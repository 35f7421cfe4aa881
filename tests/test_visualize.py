"""visualize.py, engine/drawing.py, engine/plots.py and engine/analysis_plots.py: every picture is
made from tiny models, and what is drawn is checked where it can be: pixels of a box, boxes of the
denoising queries."""
import importlib
import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from coco_folders import write_folder
from tiny_checkpoint import two_checkpoints, write_checkpoint

import data
import eval as evaluation
import scenes
import visualize
from engine import analysis_plots, checkpoints, drawing, plots
from engine.commands import open_detector
from engine.errors import UserError
from engine.mistakes import KINDS, Mistake, find_mistakes
from engine.recipe import configure


@pytest.fixture(scope="module", params=["dino", "deformable_detr"])
def checkpoint(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp(request.param) / "best.pt", request.param)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    scenes.Shapes("val", 2).image(1).resize((120, 90)).save(path)
    return path


def found(boxes, labels, **more):
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64), **more}


def draw(size, detection, names, **more):
    """Detections on a black image, as pixels."""
    return np.asarray(visualize.draw_detections(Image.new("RGB", size), detection, names, **more))


# ---- detections ----------------------------------------------------------------------------------

def test_a_box_is_drawn_in_the_color_of_its_class_where_it_is():
    drawn = draw((640, 480), found([[100, 200, 300, 400]], [1]), ["cat", "dog"])
    color = drawing.color(1)
    assert (drawn[300, 100] == color).all() and (drawn[400, 200] == color).all()
    assert (drawn[300, 200] == 0).all() and (drawn[100, 500] == 0).all()


def test_neighboring_classes_have_colors_far_apart():
    colors = [drawing.color(label) for label in range(80)]
    for a, b in zip(colors, colors[1:]):
        assert np.abs(np.subtract(a, b)).sum() > 150
    assert len(set(colors)) == 80


def test_objects_of_a_single_class_have_colors_of_their_own():
    drawn = draw((640, 480), found([[100, 200, 200, 300], [300, 200, 400, 300]], [0, 0]), ["cat"])
    assert (drawn[300, 150] == drawing.color(0)).all()
    assert (drawn[300, 350] == drawing.color(1)).all()


def test_small_images_are_enlarged_with_their_boxes_and_empty_ones_stay_as_they_are():
    drawn = draw((20, 10), found([[5, 2, 10, 8]], [0]), ["cat"])
    assert drawn.shape == (240, 480, 3)
    assert tuple(drawn[100, 5 * 24]) == drawing.color(0)
    for size in ((1, 800), (16, 16), (640, 480)):
        plain = visualize.draw_detections(Image.new("RGB", size, (9, 9, 9)), found([], []), [])
        assert (np.asarray(plain) == 9).all()


def test_the_most_confident_detection_lies_on_top():
    det = found([[100, 100, 300, 300]] * 2, [0, 1], scores=torch.tensor([0.9, 0.4]))
    drawn = draw((640, 480), det, ["cat", "dog"])
    assert (drawn[300, 200] == drawing.color(0)).all()


def test_crowds_lose_their_labels_and_get_a_legend_of_colors_below():
    boxes = [[10 + 12 * i, 300, 20 + 12 * i, 310] for i in range(41)]
    names = ["cat", "dog"]
    few = draw((640, 480), found(boxes[:1], [0]), names)
    many = draw((640, 480), found(boxes, [0] * 40 + [1]), names)
    assert few.shape == (480, 640, 3) and many.shape[0] > 480 and many.shape[1] == 640
    assert few[285:297].any() and not many[285:297].any()
    assert (many[310, 15] == drawing.color(0)).all()
    key = many[480:].reshape(-1, 3)
    for label in (0, 1):
        assert (key == drawing.color(label)).all(1).sum() >= 100


def test_a_legend_of_many_classes_wraps_and_that_of_one_class_gives_its_count():
    image = Image.new("RGB", (300, 200))
    font = drawing.get_font(12)
    labels = list(range(30))
    names = [f"class number {label}" for label in labels]
    wrapped = drawing.add_legend(image, labels, names, font)
    one_line = drawing.add_legend(image, [0] * 30, ["nucleus"], font)
    assert wrapped.height - 200 > 10 * (one_line.height - 200) > 0


def test_masks_tint_their_pixels_only():
    masks = torch.zeros(1, 100, 160, dtype=torch.bool)
    masks[0, 20:60, 30:90] = True
    drawn = draw((160, 100), found([[0, 0, 0, 0]], [3], masks=masks), list("abcd"))
    assert drawn.shape == (300, 480, 3)
    assert drawn[40 * 3, 60 * 3].any() and not drawn[80 * 3, 60 * 3].any()


def test_an_untrained_model_may_give_boxes_outside_the_image_and_inside_out():
    det = found([[-500, -20, 900, 5000], [50, 60, 40, 30]], [0, 1], scores=torch.tensor([0.5, 0.5]))
    assert draw((64, 64), det, ["cat", "dog"]).shape == (512, 512, 3)


def test_a_picture_is_complete_or_absent(tmp_path, monkeypatch):
    save = Image.Image.save

    def full(self, *args, **options):
        save(self, *args, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError):
        drawing.save_picture(Image.new("RGB", (9, 9)), tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


def test_names_that_are_no_picture_are_refused(checkpoint, picture, tmp_path):
    with pytest.raises(SystemExit, match="visualize.py: .*--out.*\\.png or \\.jpg"):
        visualize.main(["detections", "--checkpoint", str(checkpoint), "--image", str(picture),
                        "--out", str(tmp_path / "picture")])


# ---- curves --------------------------------------------------------------------------------------

def write_log(folder, evaluations):
    folder.mkdir(exist_ok=True)
    losses = {"cls": 1.0, "l1": 0.5, "aux0.cls": 1.0, "dn.aux1.l1": 0.2, "enc.giou": 0.1}
    lines = []
    for step in (10, 20, 30):
        lines.append({"kind": "step", "step": step, "epoch": 0, "lr": 1e-4, "loss": 2.8,
                      "losses": losses, "images_per_second": 9.0, "train_seconds": step / 2})
    for epoch in range(1, evaluations + 1):
        line = {"kind": "eval", "epoch": epoch, "step": 10 * epoch, "train_seconds": 5.0 * epoch,
                "bbox": {"AP": 0.1 * epoch, "AP50": 0.2 * epoch}}
        if epoch > 1:
            line["segm"] = {"AP": 0.1, "AP50": 0.2}
        lines.append(line)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("evaluations", [0, 1, 3])
def test_curves_are_drawn_from_any_log_that_training_leaves(tmp_path, evaluations):
    path = visualize.curves(write_log(tmp_path / "run", evaluations))
    assert path == tmp_path / "run" / "curves.png"
    assert Image.open(path).width > 800 and path.stat().st_size < 300_000


def test_curves_of_an_empty_log_say_nothing_and_do_not_fail(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    visualize.main(["curves", "--run_dir", str(tmp_path)])
    assert (tmp_path / "curves.png").exists()


def test_broken_lines_of_a_log_are_left_out_and_counted(tmp_path, capsys):
    good = {"kind": "step", "step": 1, "train_seconds": 1, "lr": 0.1, "loss": 2, "losses": {"a": 2}}
    evaluated = {"kind": "eval", "step": 1, "train_seconds": 1, "bbox": {"AP": 0.1, "AP50": 0.2}}
    broken = [{**good, "losses": {"a": None}}, {**good, "step": "x"}, {"kind": 3}, [], 10 ** 400,
              {**good, "lr": 1e300}, {**evaluated, "bbox": {"AP": 0.1}}]
    lines = [json.dumps(line) for line in (good, *broken, evaluated)] + ['{"kind": "st', "\x00"]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert plots.read_log(tmp_path) == ([good], [evaluated])
    assert "9 broken lines are left out" in capsys.readouterr().err
    visualize.curves(tmp_path)


CURVE = {"IoB": [0, 1], "IoF": [1, 0], "area": 0.5}


@pytest.mark.parametrize("entries, words", [
    ({}, "at least one checkpoint"), ({"a": 3}, "a of type dict"), ({"a": {}}, "checkpoint in a"),
    ({"a": {"checkpoint": "x", "encoder": {"IoB": [0]}}}, "IoF, area in encoder"),
    ({"a": {"checkpoint": "x", "decoder": {**CURVE, "IoB": []}}}, "as many numbers IoB as IoF"),
    ({"a": {"checkpoint": "x", "conflict": {"heads": ["b"], "S": [[1, 2]]}}}, "a row and a column"),
    ({"a": {"checkpoint": "x", "conflict": {"heads": [], "S": []}}}, "a row and a column")])
def test_an_analysis_of_another_form_is_refused_in_one_line(tmp_path, entries, words):
    path = tmp_path / "analysis.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(SystemExit, match=f"^visualize.py: error: .*{words}"):
        visualize.main(["analysis", "--analysis", str(path), "--out", str(tmp_path / "a.png")])


@pytest.mark.parametrize("entries", [{}, {"bbox": 3}, {"bbox": {"curves": {}, "per_class": []}},
                                     {"bbox": {"curves": {"a": {}}, "per_class": {}}}])
def test_an_evaluation_of_another_form_is_refused_in_one_line(tmp_path, entries):
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(SystemExit, match="^visualize.py: error: expected an evaluation of bbox"):
        visualize.main(["precision_recall", "--evaluation", str(path)])


@pytest.mark.parametrize("command, words", [("anchors", "queries start at anchors, got 'detr'"),
                                            ("sampling_points", "deformable attention, got")])
def test_detr_has_neither_anchors_nor_sampling_points(tmp_path, picture, command, words):
    path = write_checkpoint(tmp_path / "detr.pt", "detr")
    with pytest.raises(SystemExit, match=f"^visualize.py: error: expected a model .*{words}"):
        visualize.main([command, "--checkpoint", str(path), "--image", str(picture)])


def test_losses_are_grouped_by_the_part_they_belong_to():
    groups = {"cls": "cls", "l1": "l1", "aux0.cls": "other layers (sum)",
              "aux11.giou": "other layers (sum)", "dn.cls": "denoising (sum)",
              "dn.aux0.l1": "denoising (sum)", "enc.cls": "encoder (sum)", "atss.cls": "atss (sum)"}
    assert {name: plots.loss_group(name) for name in groups} == groups


def test_smoothing_preserves_length_constants_and_the_mean_of_the_middle():
    assert plots.smooth([3.0] * 20) == pytest.approx([3] * 20)
    assert plots.smooth(list(range(20)))[10] == pytest.approx(10)
    assert list(plots.smooth([])) == [] and plots.smooth([1, 2]).shape == (2,)


def test_runs_are_compared_in_one_picture(tmp_path):
    runs = [str(write_log(tmp_path / name, 3)) for name in ("one", "two")]
    out = tmp_path / "deeper" / "compare.png"
    visualize.main(["compare_curves", "--run_dirs", *runs, "--out", str(out), "--labels", "a", "b"])
    assert out.exists()


@pytest.mark.parametrize("flags, message", [
    (["--labels", "a"], "expected as many --labels as --run_dirs, got 1 and 2"),
    (["--kind", "masks"], "bbox.*segm")])
def test_labels_and_kinds_that_do_not_fit_the_runs_are_refused(flags, message, tmp_path):
    runs = [str(write_log(tmp_path / name, 3)) for name in ("one", "two")]
    out = tmp_path / "compare.png"
    with pytest.raises(SystemExit, match=message):
        visualize.main(["compare_curves", "--run_dirs", *runs, "--out", str(out), *flags])
    assert not out.exists()


def test_precision_and_recall_are_drawn_from_an_evaluation(checkpoint, tmp_path):
    evaluation.main(["--checkpoint", str(checkpoint), "--device", "cpu", "--out", str(tmp_path),
                     "--workers", "0"])
    out = tmp_path / "curves.png"
    visualize.main(["precision_recall", "--evaluation", str(tmp_path / "eval.json"), "--out",
                    str(out)])
    assert Image.open(out).width > 500
    with pytest.raises(SystemExit, match="expected an evaluation of segm"):
        visualize.main(["precision_recall", "--evaluation", str(tmp_path / "eval.json"), "--kind",
                        "segm", "--out", str(out)])


def test_an_ablation_is_a_bar_for_the_mean_and_dots_for_the_seeds(tmp_path):
    path = visualize.ladder({"DINO": [0.5, 0.6], "H-DETR": [0.4]}, tmp_path / "ladder.png")
    assert Image.open(path).width > 500


# ---- inside the model ----------------------------------------------------------------------------

def test_the_view_holds_its_box_and_stays_near_the_image():
    extent = np.array([640, 480])
    for box in ([0, 0, 20, 20], [600, 440, 640, 480], [0, 0, 640, 480], [300, 200, 340, 260]):
        (left, right), (top, bottom) = visualize.view_of(np.array(box, float), extent)
        assert left <= box[0] and right >= box[2] and top <= box[1] and bottom >= box[3]
        assert right - left == pytest.approx(bottom - top) and left > -120 and top > -170


@pytest.mark.parametrize("command", ["sampling_points", "anchors", "detections"])
def test_pictures_of_one_image_are_made_by_one_command(checkpoint, picture, tmp_path, command):
    out = tmp_path / "picture.jpg"
    visualize.main([command, "--checkpoint", str(checkpoint.parent), "--image", str(picture),
                    "--out", str(out)])
    assert Image.open(out).width > 300 and out.stat().st_size < 300_000


def test_reference_points_on_a_padded_image_are_drawn_in_its_pixels(checkpoint, picture):
    _, image, outputs, records, _ = visualize.run_on_file(str(checkpoint), picture, "cpu")
    assert outputs["memory"].valid_ratios.min() < 1
    anchors = outputs["anchors"][0, :, :2] * torch.tensor(image.size)          # (Nq, 2)
    references = records[0]["reference"][0, :, :, :2]                          # (Nq, L, 2)
    for level in range(references.shape[1]):
        torch.testing.assert_close(references[:, level], anchors)


def test_the_legend_of_sampling_points_names_every_mark():
    labels = [handle.get_label() for handle in visualize.sample_legend(2)]
    assert labels == ["level 1", "level 2", "attention weight 0.05", "attention weight 0.5",
                      "reference point of the layer", "detected box", "outside the image"]


@pytest.mark.parametrize("words, message", [
    (("predictions", "--n", "0"), "--n from 1 to 1000, got 0"),
    (("strip", "--n", "-1"), "--n from 1 to 1000, got -1"),
    (("mistakes", "--n", "10000000000"), "--n from 1 to 1000"),
    (("strip", "--side", "0"), "--side from 16 to 10000, got 0"),
    (("predictions", "--score_threshold", "nan"), "--score_threshold from 0 to 1, got nan"),
    (("predictions", "--device", "1"), "expected --device cpu, cuda or mps, got '1'"),
    (("predictions", "--device", ""), "--device: expected a value, got ''"),
    (("predictions", "--device", "cuda:9"),
     "--device cuda:9: (PyTorch finds no GPU here|expected one of . GPUs)")])
def test_values_that_cannot_work_end_in_one_line(checkpoint, tmp_path, words, message):
    with pytest.raises(SystemExit, match=f"^visualize.py: error: .*{message}"):
        visualize.main([*words, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "a.png")])


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A checkpoint whose weights are finite and whose outputs are NaN."""
    path = write_checkpoint(tmp_path_factory.mktemp("broken") / "best.pt")
    state = checkpoints.load(path)
    for name, values in state["model"].items():
        if name.endswith("running_var"):
            values.fill_(-1)
    checkpoints.save(path, state)
    return path


@pytest.mark.parametrize("name", ["detections", "anchors", "sampling_points"])
def test_nothing_is_drawn_of_a_model_that_is_not_finite(broken, picture, tmp_path, name):
    out = tmp_path / "out.png"
    with pytest.raises(SystemExit, match="^visualize.py: error: expected finite detections"):
        visualize.main([name, "--checkpoint", str(broken), "--image", str(picture), "--out",
                        str(out)])
    assert not out.exists()


def test_discriminability_of_a_model_that_is_not_finite_is_not_drawn(broken):
    maps = visualize.discriminability_maps(str(broken), "", 1, "cpu")
    words = "expected finite outputs, got NaN .* pred_logits of 000000.png"
    with pytest.raises(UserError, match=words):
        next(maps)


def test_a_detection_that_does_not_exist_has_no_sampling_points(checkpoint, picture, tmp_path):
    with pytest.raises(SystemExit, match="visualize.py: .*expected --rank in 0.."):
        visualize.main(["sampling_points", "--checkpoint", str(checkpoint), "--image", str(picture),
                        "--rank", "100000", "--out", str(tmp_path / "a.jpg")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command, suffix", [("predictions", "png"), ("strip", "jpg")])
def test_pictures_of_the_validation_set_are_made_by_one_command(checkpoint, tmp_path, command,
                                                                suffix):
    out = tmp_path / f"picture.{suffix}"
    visualize.main([command, "--checkpoint", str(checkpoint), "--out", str(out), "--n", "3",
                    "--score-threshold", "0"])
    assert Image.open(out).width > 600


def test_several_models_are_shown_on_the_same_scenes_side_by_side(checkpoint, tmp_path):
    out = tmp_path / "strip.jpg"
    visualize.main(["strip", "--checkpoint", str(checkpoint), str(checkpoint), "--out", str(out),
                    "--n", "2", "--side", "100"])
    sheet = np.asarray(Image.open(out), int)
    assert sheet.shape[:2] == (2 * 128 + 8, 2 * 108 + 8)
    beside = np.abs(sheet[28:, 8:108] - sheet[28:, 116:216]).mean()
    below = np.abs(sheet[28:128] - sheet[156:256]).mean()
    assert beside < 8 < below


def test_predictions_restore_the_mode_of_the_model(checkpoint, tmp_path):
    detector = open_detector(checkpoint)
    dataset = scenes.Shapes("val", 3, transform=data.eval_transform(detector.recipe))
    visualize.predictions(detector.model.train(), detector.paper.detect, dataset, detector.cfg,
                          "cpu", tmp_path / "p.png", n=1)
    assert detector.model.training


def test_unreadable_images_do_not_end_the_drawing(tmp_path):
    """Two of three validation images are broken: more than evaluation itself accepts."""
    checkpoint = write_checkpoint(tmp_path / "best.pt")
    folder = tmp_path / "data"
    scenes.write_scenes(folder, 1, 3)
    images = sorted((folder / "val2017").iterdir())
    images[0].write_bytes(b"no image")
    images[1].write_bytes(images[1].read_bytes()[:200])
    for command, columns in (("predictions", 4), ("strip", 3)):
        out = tmp_path / f"{command}.png"
        visualize.main([command, "--checkpoint", str(checkpoint), "--data", str(folder),
                        "--out", str(out)])
        assert Image.open(out).width > columns * 256
    gray = np.asarray(Image.open(tmp_path / "predictions.png").convert("RGB"))[100, 20]
    assert np.abs(gray.astype(int) - (124, 116, 104)).max() < 12


def test_mistakes_by_hand():
    """Two cats and a dog. Hit: cat 0. Then a second box on cat 0 (false alarm), a dog on cat 1
    (wrong class), a box on nothing (false alarm); the dog is missed."""
    truth = found([[0, 0, 10, 10], [50, 0, 60, 10], [0, 50, 20, 60]], [0, 0, 1])
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [50, 0, 60, 9], [80, 80, 90, 90]]
    det = found(boxes, [0, 0, 1, 1], scores=torch.tensor([0.9, 0.8, 0.7, 0.6]))
    rows = [(m.kind, round(m.rank, 3), m.label, m.true_label) for m in find_mistakes(det, truth)]
    assert rows == [("false alarm", 0.8, 0, -1), ("wrong class", 0.7, 1, 0),
                    ("false alarm", 0.6, 1, -1), ("missed", 200.0, 1, 1)]
    assert find_mistakes(found([], [], scores=torch.zeros(0)), found([], [])) == []
    names = ["cat", "dog"]
    titles = [visualize.mistake_title(m, names) for m in find_mistakes(det, truth)]
    assert titles == ["false alarm: cat 0.80", "dog 0.70, is cat", "false alarm: dog 0.60",
                      "missed: dog"]


def alarm(kind="false alarm"):
    return Mistake(kind, 0.5, 0, 0, torch.tensor([2.0, 2, 9, 9]))


def test_the_worst_mistakes_are_one_sheet_without_rows_of_kinds_that_do_not_occur(
        checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "mistakes.png"
    command = ["mistakes", "--checkpoint", str(checkpoint), "--out", str(out), "--n", "2"]
    for kinds in (("missed",), ("missed", "false alarm"), KINDS):
        found_here = [alarm(kind) for kind in kinds]
        monkeypatch.setattr(visualize, "find_mistakes", lambda det, truth: found_here)
        visualize.main(command)
        # 20 px below for the line of colors
        assert Image.open(out).size == (2 * 168 + 8, len(kinds) * 188 + 8 + 20)


def test_no_mistakes_are_said_and_no_picture_is_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "find_mistakes", lambda det, truth: [])
    out = tmp_path / "mistakes.png"
    with pytest.raises(SystemExit, match="expected mistakes to draw, got none on .* images? of "):
        visualize.main(["mistakes", "--checkpoint", str(checkpoint), "--out", str(out)])
    assert not out.exists()


def test_mistakes_are_those_at_the_thresholds_of_the_checkpoint(checkpoint, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(visualize, "find_mistakes",
                        lambda det, truth: seen.append(det) or [alarm()])
    state = checkpoints.load(checkpoint)
    for stored, words, expected in ((0.0, [], True), (1.0, [], False),
                                    (1.0, ["--score_threshold", "0"], True)):
        state["thresholds"] = dict.fromkeys(state["class_names"], stored)
        checkpoints.save(tmp_path / "best.pt", state)
        visualize.main(["mistakes", "--checkpoint", str(tmp_path), "--out",
                        str(tmp_path / "mistakes.png"), *words])
        assert (len(seen.pop()["scores"]) > 0) == expected


def test_the_legend_of_precision_and_recall_tells_why_a_class_has_no_curve(tmp_path, monkeypatch):
    none = dict.fromkeys(("threshold", "AP50", "F1", "recall", "precision"), -1.0)
    figures = {"per_class": {"cat": {**none, "objects": 3}, "dog": {**none, "objects": 0}},
               "curves": {name: {"precision": [0.0] * 101} for name in ("cat", "dog")}}
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({"bbox": figures}))
    monkeypatch.setattr(plots, "save_figure", lambda figure, *args, **more: figure)
    legend = plots.precision_recall(str(path)).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["cat: never detected",
                                                                "dog: no objects"]


def test_scenes_are_a_sheet_of_generated_images(tmp_path):
    assert Image.open(visualize.scenes(tmp_path / "scenes.jpg", n=4)).width > 4 * 190


def test_ground_truth_is_in_pixels_of_the_original_image(shared):
    dataset = data.CocoFolder(shared / "data" / "bccd", "val")
    image = dataset.image(3)
    truth = visualize.ground_truth(dataset, 3, image)
    objects = dataset.objects(3)
    corners = np.concatenate([objects.boxes[:, :2], objects.boxes[:, :2] + objects.boxes[:, 2:]], 1)
    limits = [image.width, image.height] * 2
    assert truth["boxes"].numpy() == pytest.approx(corners.clip(0, limits))
    assert truth["labels"].tolist() == objects.labels.tolist()


@pytest.mark.parametrize("denoising", ["contrastive", "plain"])
def test_noised_boxes_show_positives_within_and_negatives_beyond_the_noise(tmp_path, monkeypatch,
                                                                           denoising):
    dino = importlib.import_module("dino")
    changes = {"denoising": denoising, "dn_box_noise": 0.2}
    cfg, _ = configure(dino, dino.SMALL, changes)
    boxes = [torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.6, 0.2, 0.3], [0.6, 0.4, 0.3, 0.3]]),
             torch.tensor([[0.4, 0.4, 0.4, 0.4]])]
    targets = [{"labels": torch.zeros(len(b), dtype=torch.int64), "boxes": b} for b in boxes]
    queries = dino.denoising_queries(targets, torch.nn.Embedding(9, 32), 8, cfg, 12)
    drawn = []
    titles = []
    outline = visualize.outline
    show = visualize.show

    def remember(axis, box, rgb, **style):
        drawn.append((rgb, np.asarray(box.tolist())))
        outline(axis, box, rgb, **style)

    def remember_title(axis, image, title):
        titles.append(title)
        show(axis, image, title)

    monkeypatch.setattr(visualize, "outline", remember)
    monkeypatch.setattr(visualize, "show", remember_title)
    pictures = [Image.new("RGB", (100, 100))] * 2
    path = visualize.noised_boxes(pictures, targets, queries, tmp_path / "noised.jpg", group=1)
    assert Image.open(path).width > 800
    assert titles[0] == f"image 1: 3 objects, group 2 of {queries.groups}"

    corners = np.concatenate([visualize.box_cxcywh_to_xyxy(b).numpy() for b in boxes]) * 100
    half = np.concatenate([b[:, 2:].repeat(1, 2).numpy() for b in boxes]) * 50
    positive = np.array([box for rgb, box in drawn if rgb == visualize.POSITIVE])
    negative = np.array([box for rgb, box in drawn if rgb == visualize.NEGATIVE])
    assert (np.abs(positive - corners) <= 0.2 * half + 0.1).all()
    if denoising == "contrastive":
        assert (np.abs(negative - corners) >= 0.2 * half - 0.1).all()
    assert len(negative) == (4 if denoising == "contrastive" else 0)


def test_noised_boxes_need_a_model_with_denoising(checkpoint, tmp_path):
    out = tmp_path / "noised.jpg"
    arguments = ["noised_boxes", "--checkpoint", str(checkpoint), "--out", str(out)]
    if "dino" in str(checkpoint):
        visualize.main(arguments)
        assert out.exists()
    else:
        with pytest.raises(SystemExit, match="denoising"):
            visualize.main(arguments)


def test_noised_boxes_of_images_without_objects_are_refused(tmp_path):
    dino = importlib.import_module("dino")
    cfg, _ = configure(dino, dino.SMALL)
    targets = [{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}]
    queries = dino.denoising_queries(targets, torch.nn.Embedding(9, 32), 8, cfg, 12)
    if queries is not None:
        with pytest.raises(UserError, match="at least one object"):
            visualize.noised_boxes([Image.new("RGB", (9, 9))], targets, queries, tmp_path / "n.jpg")


def test_no_more_images_are_read_than_are_drawn(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "dino.pt", "dino")
    opened = []
    open_picture = visualize.open_picture

    def remember(dataset, index):
        opened.append(index)
        return open_picture(dataset, index)

    monkeypatch.setattr(visualize, "open_picture", remember)
    visualize.main(["noised_boxes", "--checkpoint", str(path), "--n", "1", "--out",
                    str(tmp_path / "noised.jpg")])
    assert len(opened) < 4


def test_noised_boxes_need_an_image_with_two_objects(tmp_path):
    folder = write_folder(tmp_path / "data", categories=((1, "cat"),))
    path = write_checkpoint(tmp_path / "dino.pt", "dino", ["cat"])
    with pytest.raises(SystemExit, match="expected an image with two objects or more, got"):
        visualize.main(["noised_boxes", "--checkpoint", str(path), "--data", str(folder)])


def test_what_was_analyzed_is_drawn_for_two_checkpoints(tmp_path):
    first, second = two_checkpoints(tmp_path)
    curve = {"IoF": [1.0, 0.5, 0.0], "IoB": [0.0, 0.5, 1.0], "area": 0.5}
    conflict = {"heads": ["detr", "atss"], "S": [[0.0, 1.0], [2.0, 0.0]],
                "average": {"detr": 1.5, "atss": 1.5}}
    figures = {"encoder": curve, "decoder": curve}
    sizes = {"ATD": 0.4, "ATD_small": 0.2, "ATD_medium": 0.5, "ATD_large": -1.0, "k": 100}
    (tmp_path / "analysis.json").write_text(json.dumps({
        "a": {"checkpoint": str(first), **figures, **sizes, "conflict": conflict},
        "b": {"checkpoint": str(second), **figures, "instability": 2.5}}))
    out = tmp_path / "analysis.png"
    visualize.main(["analysis", "--analysis", str(tmp_path / "analysis.json"), "--out", str(out),
                    "--n", "2"])
    assert Image.open(out).width > 500


def test_atd_has_a_bar_for_every_size_and_checkpoint_and_instability_a_point():
    _, (left, right) = plots.plt.subplots(1, 2)
    analyses = {"a": {"ATD": 0.4, "ATD_small": 0.2, "ATD_medium": 0.5, "ATD_large": -1.0, "k": 9},
                "b": {"ATD": 0.3, "ATD_small": 0.1, "k": 9, "instability": 2.5}}
    panels = [analysis_plots.plot_atd, analysis_plots.plot_instability]
    assert analysis_plots.analysis_panels(analyses) == panels
    assert analysis_plots.analysis_panels({"c": {}}) == []
    analysis_plots.plot_atd(left, analyses)
    bars = [[bar.get_height() for bar in group] for group in left.containers]
    assert bars == [[0.4, 0.2, 0.5, 0], [0.3, 0.1, 0, 0]]
    analysis_plots.plot_instability(right, analyses)
    assert list(right.lines[0].get_ydata()) == [2.5]
    plots.plt.close()


# ---- commands ------------------------------------------------------------------------------------

def test_every_command_and_flag_is_explained_and_abbreviations_are_refused():
    for name in visualize.COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            visualize.main([name, "--help"])
        assert stopped.value.code == 0 and name in visualize.__doc__
        function = visualize.COMMANDS[name]
        for flag in inspect.signature(function).parameters:
            assert re.search(rf"\n        {flag}: [A-Za-z]", function.__doc__), (name, flag)
    with pytest.raises(SystemExit) as stopped:
        visualize.main(["scenes", "--ou", "x.jpg"])
    assert stopped.value.code.startswith("visualize.py: error: Unrecognized options: --ou")


def test_the_python_lines_of_the_readme_run(checkpoint, picture, capsys):
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    lines = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    for theirs, ours in (("dino_small", checkpoint.parent), ("photo.jpg", picture), ("0.3", 0)):
        assert theirs in lines
        lines = lines.replace(theirs, str(ours))
    exec(lines, {})
    assert re.match(r"\w+ 0\.\d\d \[", capsys.readouterr().out)
