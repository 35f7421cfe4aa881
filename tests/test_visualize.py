"""visualize.py: every picture is made from tiny models, and what is drawn is checked where it can be: the pixels of a box,
the recorded sampling points against the module's own output, the slots of the denoising queries."""
import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_eval import two_checkpoints, write_checkpoint

from engine.recipe import override
from engine import models
import data
import scenes
import visualize
from deformable_attn import MSDeformAttn, ms_deform_attn_torch


@pytest.fixture(scope="module", params=["dino", "deformable_detr"])
def checkpoint(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp(request.param) / "best.pt", request.param)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    scenes.Shapes("val", 2).image(1).resize((120, 90)).save(path)
    return path


def found(boxes, labels, **more):
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64),
            **more}


# ---- detections ------------------------------------------------------------------------------------------------------

def test_a_box_is_drawn_in_the_colour_of_its_class_where_it_is():
    names = ["cat", "dog"]
    drawn = np.asarray(visualize.detections(Image.new("RGB", (640, 480)), found([[100, 200, 300, 400]], [1]), names))
    assert (drawn[300, 100] == visualize.colour(1)).all() and (drawn[400, 200] == visualize.colour(1)).all()
    assert (drawn[300, 200] == 0).all() and (drawn[100, 500] == 0).all()


def test_neighbouring_classes_have_colours_far_apart():
    for a, b in zip(range(79), range(1, 80)):
        assert np.abs(np.subtract(visualize.colour(a), visualize.colour(b))).sum() > 150
    assert len({visualize.colour(label) for label in range(80)}) == 80


def test_small_images_are_enlarged_with_their_boxes_and_empty_ones_stay_whole():
    drawn = visualize.detections(Image.new("RGB", (20, 10)), found([[5, 2, 10, 8]], [0]), ["cat"])
    assert drawn.size == (480, 240)
    assert tuple(np.asarray(drawn)[100, 5 * 24]) == visualize.colour(0)
    for size in ((1, 800), (16, 16), (640, 480)):
        plain = visualize.detections(Image.new("RGB", size, (9, 9, 9)), found([], []), [])
        assert (np.asarray(plain) == 9).all()


def test_the_most_confident_detection_lies_on_top():
    det = found([[100, 100, 300, 300]] * 2, [0, 1], scores=torch.tensor([0.9, 0.4]))
    drawn = np.asarray(visualize.detections(Image.new("RGB", (640, 480)), det, ["cat", "dog"]))
    assert (drawn[300, 200] == visualize.colour(0)).all()


def test_crowds_lose_their_labels_but_not_their_boxes():
    boxes = [[10 + 12 * i, 300, 20 + 12 * i, 310] for i in range(41)]
    few, many = (np.asarray(visualize.detections(Image.new("RGB", (640, 480)), found(boxes[:n], [0] * n), ["cat"]))
                 for n in (1, 41))
    assert few[285:297].any() and not many[285:297].any() and (many[310, 15] == visualize.colour(0)).all()


def test_masks_tint_their_pixels_only():
    masks = torch.zeros(1, 100, 160, dtype=torch.bool)
    masks[0, 20:60, 30:90] = True
    drawn = np.asarray(visualize.detections(Image.new("RGB", (160, 100)), found([[0, 0, 0, 0]], [3], masks=masks), list("abcd")))
    assert drawn[40 * 3, 60 * 3].any() and not drawn[80 * 3, 60 * 3].any() and drawn.shape == (300, 480, 3)


def test_an_untrained_model_may_give_boxes_outside_the_image_and_inside_out():
    det = found([[-500, -20, 900, 5000], [50, 60, 40, 30]], [0, 1], scores=torch.tensor([0.5, 0.5]))
    assert visualize.detections(Image.new("RGB", (64, 64)), det, ["cat", "dog"]).size == (512, 512)


# ---- curves ----------------------------------------------------------------------------------------------------------

def write_log(folder, evaluations):
    folder.mkdir(exist_ok=True)
    losses = {"cls": 1.0, "l1": 0.5, "aux0.cls": 1.0, "dn.aux1.l1": 0.2, "enc.giou": 0.1}
    lines = [{"kind": "step", "step": s, "epoch": 0, "lr": 1e-4, "loss": 2.8, "losses": losses, "images_per_second": 9.0,
              "train_seconds": s / 2} for s in (10, 20, 30)]
    lines += [{"kind": "eval", "epoch": e, "step": 10 * e, "train_seconds": 5.0 * e, "bbox": {"AP": 0.1 * e, "AP50": 0.2 * e}}
              | ({"segm": {"AP": 0.1, "AP50": 0.2}, "instability": 3.0} if e > 1 else {}) for e in range(1, evaluations + 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("evaluations", [0, 1, 3])
def test_curves_are_drawn_from_any_log_that_training_leaves(tmp_path, evaluations):
    path = visualize.curves(write_log(tmp_path / "run", evaluations))
    assert path == tmp_path / "run" / "curves.png" and Image.open(path).width > 800 and path.stat().st_size < 300_000


def test_curves_of_an_empty_log_say_nothing_and_do_not_fail(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    assert visualize.curves(tmp_path).exists()


def test_losses_are_grouped_by_the_part_they_belong_to():
    names = ["cls", "l1", "aux0.cls", "aux11.giou", "dn.cls", "dn.aux0.l1", "enc.cls"]
    assert [visualize.loss_group(name) for name in names] == ["cls", "l1"] + ["aux (sum)"] * 2 + ["dn (sum)"] * 2 + ["enc (sum)"]


def test_smoothing_keeps_length_constants_and_the_mean_of_the_middle():
    assert visualize._smooth([3.0] * 20) == pytest.approx([3] * 20)
    assert visualize._smooth(list(range(20)))[10] == pytest.approx(10)
    assert list(visualize._smooth([])) == [] and visualize._smooth([1, 2]).shape == (2,)


def test_runs_are_compared_in_one_picture(tmp_path):
    runs = [write_log(tmp_path / name, 3) for name in ("one", "two")]
    assert visualize.compare_curves(runs, tmp_path / "deeper" / "compare.png").exists()


# ---- inside the model ------------------------------------------------------------------------------------------------

def test_recorded_sampling_points_reproduce_the_output_of_every_decoder_layer(checkpoint):
    model, _, cfg, *_ = models.load_model(checkpoint)
    for module in model.modules():                # offsets and weights that differ from query to query
        if isinstance(module, MSDeformAttn):
            torch.nn.init.normal_(module.sampling_offsets.weight, std=0.3)
            torch.nn.init.normal_(module.attention_weights.weight, std=0.3)
    modules = [layer.cross_attn for layer in model.decoder]
    calls, hooks = [], []
    for module in modules:
        hooks.append(module.register_forward_hook(lambda module, inputs, output: calls.append((module, inputs, output))))
    images, padding = torch.randn(2, 3, 48, 80), torch.zeros(2, 48, 80, dtype=torch.bool)
    padding[1, 32:] = True
    with visualize.recorded_looks(model) as records:
        model(images, padding)
    assert len(records) == len(calls) == cfg.decoder_layers
    for record, (module, (query, _, tokens, shapes, mask), output) in zip(records, calls):
        value = module.value_proj(tokens).masked_fill(mask[..., None], 0).unflatten(-1, (cfg.num_heads, -1))
        looked = module.output_proj(ms_deform_attn_torch(value, shapes, record["locations"], record["weights"]))
        assert torch.allclose(looked, output, atol=1e-5)
        assert torch.allclose(record["weights"].sum((-1, -2)), torch.ones(()))
    assert not any(module._forward_pre_hooks for module in modules)      # nothing stays behind


def test_the_view_holds_its_box_and_stays_near_the_image():
    extent = np.array([640, 480])
    for box in ([0, 0, 20, 20], [600, 440, 640, 480], [0, 0, 640, 480], [300, 200, 340, 260]):
        (left, right), (top, bottom) = visualize.view_of(np.array(box, float), extent)
        assert left <= box[0] and right >= box[2] and top <= box[1] and bottom >= box[3]
        assert right - left == pytest.approx(bottom - top) and left > -120 and top > -170


@pytest.mark.parametrize("command", ["sampling_points", "anchors", "detections"])
def test_pictures_of_one_image_are_made_by_one_command(checkpoint, picture, tmp_path, command):
    out = tmp_path / "picture.jpg"
    visualize.main([command, "--checkpoint", str(checkpoint), "--image", str(picture), "--out", str(out)])
    assert Image.open(out).width > 300 and out.stat().st_size < 300_000


@pytest.mark.parametrize("command, suffix", [("predictions", "png"), ("strip", "jpg")])
def test_pictures_of_the_validation_set_are_made_by_one_command(checkpoint, tmp_path, command, suffix):
    out = tmp_path / f"picture.{suffix}"
    visualize.main([command, "--checkpoint", str(checkpoint), "--out", str(out), "--n", "3", "--score-threshold", "0"])
    assert Image.open(out).width > 600


def test_several_models_are_shown_on_the_same_scenes_side_by_side(checkpoint, tmp_path):
    out = tmp_path / "strip.jpg"
    visualize.main(["strip", "--checkpoint", str(checkpoint), str(checkpoint), "--out", str(out), "--n", "2", "--side", "100"])
    sheet = np.asarray(Image.open(out), int)
    assert sheet.shape[:2] == (2 * 128 + 8, 2 * 108 + 8)
    assert np.abs(sheet[28:, 8:108] - sheet[28:, 116:216]).mean() < 8 < np.abs(sheet[28:128] - sheet[156:256]).mean()


def test_the_citations_show_every_paper_file_above_what_it_builds_on(tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "_save", lambda figure, path: figure)
    drawn = [text for text in visualize.citations().axes[0].texts if text.get_text()]
    height = {text.get_text().split("\n")[-1]: text.get_position()[1] for text in drawn}
    assert height["co_detr.py"] > height["dino.py"] > height["deformable_detr.py"] > height["matcher.py"] > height["boxes.py"]
    assert "train.py" not in height and "DINO\ndino.py" in [text.get_text() for text in drawn]


def test_predictions_leave_the_model_in_the_mode_they_found(checkpoint, tmp_path):
    model, paper, cfg, recipe, *_ = models.load_model(checkpoint)
    dataset = scenes.Shapes("val", 3, transform=data.eval_transform(recipe))
    visualize.predictions(model.train(), paper.detect, dataset, cfg, recipe, "cpu", tmp_path / "p.png", n=1)
    assert model.training


def test_scenes_are_a_sheet_of_generated_images(tmp_path):
    assert Image.open(visualize.scenes(tmp_path / "scenes.jpg", n=4)).width > 4 * 190


def test_ground_truth_is_in_pixels_of_the_original_image():
    class One:
        def image(self, index):
            return Image.new("RGB", (200, 100))

        def __getitem__(self, index):
            return torch.zeros(3, 50, 100), {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}

    image, det = visualize.ground_truth(One(), 0)
    assert det["boxes"].tolist() == [pytest.approx([80, 30, 120, 70])] and det["labels"].tolist() == [1]


@pytest.mark.parametrize("denoising", ["contrastive", "plain"])
def test_noised_boxes_show_positives_within_and_negatives_beyond_the_noise(tmp_path, monkeypatch, denoising):
    dino = importlib.import_module("dino")
    cfg = override(dino.Config(), {**dino.SMALL, "denoising": denoising, "dn_box_noise": 0.2})
    boxes = [torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.6, 0.2, 0.3], [0.6, 0.4, 0.3, 0.3]]), torch.tensor([[0.4, 0.4, 0.4, 0.4]])]
    targets = [{"labels": torch.zeros(len(b), dtype=torch.int64), "boxes": b} for b in boxes]
    queries = dino.denoising_queries(targets, torch.nn.Embedding(9, 32), 8, cfg, 12)
    drawn, outline = [], visualize._outline
    monkeypatch.setattr(visualize, "_outline", lambda axis, box, rgb, **style: (drawn.append((rgb, np.asarray(box.tolist()))),
                                                                               outline(axis, box, rgb, **style)))
    pictures = [Image.new("RGB", (100, 100))] * 2
    path = visualize.noised_boxes(pictures, targets, queries, tmp_path / "noised.jpg", group=1)
    assert Image.open(path).width > 800
    corners = np.concatenate([visualize.box_cxcywh_to_xyxy(b).numpy() for b in boxes]) * 100
    half = np.concatenate([b[:, 2:].repeat(1, 2).numpy() for b in boxes]) * 50
    positive, negative = (np.array([box for rgb, box in drawn if rgb == colour]) for colour in ("#22c03c", "#e6194b"))
    assert (np.abs(positive - corners) <= 0.2 * half + 0.1).all()
    if denoising == "contrastive":
        assert (np.abs(negative - corners) >= 0.2 * half - 0.1).all()
    assert len(negative) == (4 if denoising == "contrastive" else 0)


def test_noised_boxes_need_a_model_with_denoising(checkpoint, tmp_path, capsys):
    arguments = ["noised_boxes", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "noised.jpg")]
    if "dino" in str(checkpoint):
        visualize.main(arguments)
        assert (tmp_path / "noised.jpg").exists()
    else:
        with pytest.raises(SystemExit, match="denoising"):
            visualize.main(arguments)


def test_every_command_explains_itself_and_refuses_abbreviations(capsys):
    for name in visualize.COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            visualize.main([name, "--help"])
        assert stopped.value.code == 0 and name in visualize.__doc__
    with pytest.raises(SystemExit) as stopped:
        visualize.main(["scenes", "--ou", "x.jpg"])
    assert stopped.value.code == 2


def test_the_python_lines_of_the_readme_run(checkpoint, picture, capsys):
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    lines = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    for theirs, ours in (("runs/dino/best.pt", checkpoint), ("photo.jpg", picture), ("0.3", 0)):
        assert theirs in lines
        lines = lines.replace(theirs, str(ours))
    exec(lines, {})
    assert re.match(r"\w+ 0\.\d\d \[", capsys.readouterr().out)


def test_what_was_analysed_is_drawn_for_two_checkpoints(tmp_path):
    first, second = two_checkpoints(tmp_path)
    curve = {"IoF": [1.0, 0.5, 0.0], "IoB": [0.0, 0.5, 1.0], "area": 0.5}
    (tmp_path / "analysis.json").write_text(json.dumps({
        "a": {"checkpoint": str(first), "encoder": curve, "decoder": curve,
              "conflict": {"heads": ["detr", "atss"], "S": [[0.0, 1.0], [2.0, 0.0]], "average": [1.5, 1.5]}},
        "b": {"checkpoint": str(second), "encoder": curve, "decoder": curve}}))
    out = tmp_path / "analysis.png"
    visualize.main(["analysis", "--analysis", str(tmp_path / "analysis.json"), "--out", str(out), "--n", "2"])
    assert Image.open(out).width > 500
