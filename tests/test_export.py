"""tools/export.py: exported files compute what the model computes, for images of any size.

Tracing a model takes seconds: most tests run the exported function itself, one writes a file, and
the slow tests write the files of all papers and of full-size models."""
import importlib
import json
import logging
import warnings

import pytest
import torch

import co_detr
import dino
import mask_frozen_detr
from engine.commands import open_detector
from engine.errors import UserError
from engine.images import read_image
from engine.models import Loaded
from engine.recipe import configure
from heads import regions
from mask_frozen_detr import FrozenDetector, MaskFrozenDETR
from recordings import batch
from tiny_checkpoint import write_checkpoint
from tools import export
from tools.export import Options, as_module, check, compare, exportable

PAPERS = {"deformable_detr": {}, "dino": {}, "h_detr": {}, "detr": {}, "co_detr": {"dim": 64},
          "mask_frozen_detr": {}}
TINY = {"dim": 32, "num_heads": 2, "ffn_dim": 32, "num_queries": 12, "decoder_layers": 2}
MASKS = {"roi_size": 8, "channel_dim": 32, "image_ffn_dim": 32, "box_ffn_dim": 32, "score_dim": 8,
         "score_ffn_dim": 16, "num_heads": 2, "num_points": 2}


def with_contrast(model):
    """Spread scores and boxes, those of a fresh model are all alike, some scores above 0.3.

    Few boxes get width 0: the layers after such a box would multiply rounding by thousands."""
    generator = torch.Generator().manual_seed(0)
    scales = {"class_embed": 1.7, "bbox_embed": 1.0}
    for name, parameter in model.named_parameters():
        for word, scale in scales.items():
            if word in name and parameter.ndim:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += scale * noise / parameter.shape[-1] ** 0.5
        if "class_embed" in name and name.endswith("bias"):
            parameter.data += 3
    return model.eval()


def detector(name="dino", sizes=TINY, values=None, **changes) -> Loaded:
    """A small detector with random weights, as `load_model` returns it."""
    if name == "mask_frozen_detr":
        return mask_network(detector("dino", sizes, values), **changes)
    torch.manual_seed(0)
    paper = importlib.import_module(name)
    values = paper.SMALL if values is None else values
    cfg, recipe = configure(paper, values, sizes | PAPERS[name] if sizes else {}, changes)
    model, criterion = paper.build(cfg, 8)
    meta = {"class_names": list("abcdefgh"), "model_name": name}
    return Loaded(with_contrast(model), paper, cfg, recipe, meta, criterion)


def mask_network(base: Loaded, **changes) -> Loaded:
    cfg, _ = configure(mask_frozen_detr, mask_frozen_detr.SMALL, MASKS, changes)
    frozen = FrozenDetector(base.model, base.paper.detect, cfg.enc_layer)
    model = MaskFrozenDETR(frozen, cfg).eval()
    return base._replace(model=model, paper=mask_frozen_detr, cfg=cfg)


def two_images(sizes=((64, 96), (50, 64))):
    """Images, padding, and the sizes that boxes are wanted for."""
    images, padding, _ = batch(*sizes)
    return images, padding, 2.0 * torch.tensor(sizes)


@torch.no_grad()
def expected_detections(loaded: Loaded, images, padding, sizes):
    """What the paper's `detect` gives, image by image."""
    outputs = loaded.model(images, padding)
    return loaded.paper.detect(outputs, sizes.long(), loaded.cfg)


# ---- the exported function -----------------------------------------------------------------------

@pytest.mark.parametrize("name", PAPERS)
def test_the_exported_function_gives_the_detections_of_the_paper_file(name):
    loaded = detector(name)
    inputs = two_images()
    module = as_module(loaded, raw=False)
    with exportable():
        got = dict(zip(module.outputs, module(*inputs)))
    for b, expected in enumerate(expected_detections(loaded, *inputs)):
        k = len(expected["scores"])
        assert k > 5 and expected["scores"][5] > 0.3
        for field in ("scores", "labels", "boxes", "query"):
            torch.testing.assert_close(got[field][b, :k], expected[field], rtol=1e-4, atol=1e-3)
        assert (got["scores"][b, k:] == 0).all()
        if name == "mask_frozen_detr":
            torch.testing.assert_close(got["mask_scores"][b], expected["mask_scores"])


def test_soft_nms_in_steps_selects_what_soft_nms_selects():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(60, 2, generator=generator)
    boxes = torch.cat((corner, corner + 0.5), 1)
    scores = torch.rand(60, generator=generator)
    labels = torch.randint(2, (60,), generator=generator)
    for top_k in (10, 60):
        arguments = (boxes, scores, labels, 0.3, 0.05, top_k)
        rows, lowered = regions.soft_nms(*arguments)
        got_rows, got_lowered = export.soft_nms_in_steps(*arguments)
        k = len(rows)
        assert torch.equal(got_rows[:k], rows)
        torch.testing.assert_close(got_lowered[:k], lowered)
        assert (got_lowered[k:] == 0).all()
    assert k < 60, "soft-NMS should end before its boxes do"


def test_dense_roi_align_gives_the_values_of_roi_align():
    """Boxes that are large, small, empty, and at the border of the map."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 11 * 17, 6, generator=generator)
    rois = torch.tensor([[0.0, 0.0, 68.0, 44.0], [3.0, 5.0, 9.0, 30.0], [60.0, 40.0, 68.0, 44.0],
                         [20.0, 20.0, 20.5, 20.5], [7.0, 8.0, 7.0, 8.0]])
    image = torch.tensor([0, 1, 1, 0, 0])
    arguments = (tokens, [(11, 17)], [4], rois, image, torch.zeros_like(image), 4)
    expected = regions.roi_align(*arguments)
    torch.testing.assert_close(export.dense_roi_align(*arguments)[:4], expected[:4])


def test_after_the_block_models_are_as_before():
    before = (co_detr.soft_nms, mask_frozen_detr.roi_align, export.MSDeformAttn.impl)
    with exportable():
        assert co_detr.soft_nms is not before[0]
    assert before == (co_detr.soft_nms, mask_frozen_detr.roi_align, export.MSDeformAttn.impl)


# ---- files ---------------------------------------------------------------------------------------

def write(path, module, inputs, dynamic, optimize=False):
    program = export.trace(module, inputs[:len(module.inputs)], dynamic)
    if path.suffix == ".pt2":
        export.write_program(path, program, {"a": "b"})
    else:
        export.write_onnx(path, program, module, {"a": "b"}, optimize)


def check_file(path, module, inputs, scores=1e-5, boxes=1e-3):
    """A file against its model, for detections above 0.3."""
    inputs = inputs[:len(module.inputs)]
    with torch.no_grad():
        expected = dict(zip(module.outputs, module(*inputs)))
    got = dict(zip(module.outputs, export.file_runner(path)(*inputs)))
    if "scores" not in expected:
        for name in module.outputs:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)
        return None
    result = compare(expected, got)
    assert result.detections > 0 and result.lost == 0
    assert result.scores < scores and result.boxes < boxes and result.masks < 1e-3
    return result


def test_an_onnx_file_of_deformable_detr_detects_what_the_model_detects(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    loaded = detector("deformable_detr", {**TINY, "decoder_layers": 1, "num_feature_levels": 2})
    module = as_module(loaded, raw=False)
    path = tmp_path / "model.onnx"
    write(path, module, two_images(), dynamic=False)
    check_file(path, module, two_images())
    check_file(path, module, two_images(((64, 96), (64, 60))))
    assert "detections" in check(path, module, two_images())
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_program_of_detr_can_be_read_again_and_detects_what_the_model_detects(tmp_path):
    module = as_module(detector("detr"), raw=False)
    path = tmp_path / "model.pt2"
    write(path, module, two_images(), dynamic=False)
    check_file(path, module, two_images())


@pytest.mark.slow
@pytest.mark.parametrize("raw", [False, True], ids=["detections", "raw"])
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("name", PAPERS)
def test_files_of_every_paper_serve_images_of_any_size(tmp_path, name, suffix, raw):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    if raw and name == "mask_frozen_detr":
        pytest.skip("masks belong to detections")
    module = as_module(detector(name), raw)
    path = tmp_path / f"model{suffix}"
    write(path, module, two_images(), dynamic=True)
    for sizes in (((64, 96), (50, 64)), ((96, 128), (90, 100)), ((71, 107), (64, 96))):
        check_file(path, module, two_images(sizes))


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPERS)
def test_files_of_every_paper_agree_on_photographs(tmp_path, shared, name):
    """Two photographs at the size of the small preset, in one batch; post-processing inside. Boxes
    are in pixels of the photographs, four times those of the input."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    photos = photographs(shared)
    loaded = detector(name, sizes=None)
    module = as_module(loaded, raw=False)
    inputs = export.example_inputs(photos, loaded.recipe, 2, (160, 192))
    path = tmp_path / "model.onnx"
    write(path, module, inputs, dynamic=False, optimize=True)
    check_file(path, module, inputs, boxes=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deformable_detr", "dino"])
def test_files_of_the_published_sizes_agree_on_a_photograph(tmp_path, shared, name):
    """800 x 1333 pixels, ResNet-50, random weights.

    Some of the 22,000 proposals have scores so near that rounding swaps their ranks. The content of
    a DINO query belongs to its rank: with the same content for all, a swap changes no detection."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    loaded = detector(name, sizes=None, values={})
    if name == "dino":
        content = loaded.model.tgt_embed.weight.data                    # (Nq, C)
        content.copy_(content[:1].expand_as(content).clone())
    module = as_module(loaded, raw=False)
    inputs = export.example_inputs(photographs(shared), loaded.recipe, 1, (800, 1333))
    path = tmp_path / "model.onnx"
    write(path, module, inputs, dynamic=False, optimize=True)
    check_file(path, module, inputs, scores=1e-3, boxes=0.05)


def photographs(shared):
    folder = shared / "data" / "coco_mini" / "val2017"
    paths = sorted(folder.glob("*.jpg"))[:2]
    if not paths:
        pytest.skip(f"no photographs in {folder}")
    return [read_image(path) for path in paths]


# ---- comparing -----------------------------------------------------------------------------------

def rows(scores, labels, boxes):
    return {"scores": torch.tensor([scores]), "labels": torch.tensor([labels]),
            "boxes": torch.tensor([boxes])}


def test_detections_with_equal_scores_may_change_places_and_others_are_compared():
    ours = rows([0.9, 0.9, 0.1], [1, 1, 2], [[0., 0, 1, 1], [5., 5, 6, 6], [0., 0, 9, 9]])
    theirs = rows([0.9, 0.9, 0.1], [1, 1, 2], [[5., 5, 6, 6], [0., 0, 1, 1.5], [0., 0, 1, 1]])
    result = compare(ours, theirs)
    assert (result.detections, result.lost, result.boxes) == (2, 0, 0.5)


def test_a_detection_with_another_label_or_score_is_lost():
    ours = rows([0.9, 0.8], [1, 1], [[0., 0, 1, 1], [5., 5, 6, 6]])
    theirs = rows([0.9, 0.7], [2, 1], [[0., 0, 1, 1], [5., 5, 6, 6]])
    assert compare(ours, theirs).lost == 2


def test_masks_are_compared_where_a_box_covers_pixels():
    ours = rows([0.9, 0.8], [1, 2], [[0., 0, 9, 9], [5., 5, 5, 9]])
    theirs = rows([0.9, 0.8], [1, 2], [[0., 0, 9, 9], [5., 5, 5, 9]])
    ours["mask_logits"] = torch.zeros(1, 2, 4, 4)
    theirs["mask_logits"] = torch.zeros(1, 2, 4, 4)
    theirs["mask_logits"][0, 0] = 0.5
    theirs["mask_logits"][0, 1] = 9
    assert compare(ours, theirs).masks == 0.5


# ---- command line --------------------------------------------------------------------------------

def test_the_command_writes_a_file_and_says_how_far_it_differs(tmp_path, monkeypatch, capsys):
    """Its program is the module itself: tracing is tested above."""
    path = write_checkpoint(tmp_path / "best.pt")
    out = tmp_path / "model.pt2"
    monkeypatch.setattr(export, "trace", lambda module, inputs, dynamic: module)
    monkeypatch.setattr(export, "write_program",
                        lambda path, module, facts: path.write_text(json.dumps(facts)))
    module = as_module(open_detector(path), False)
    monkeypatch.setattr(export, "file_runner", lambda path: module)
    export.main(["--checkpoint", str(path), "--out", str(out), "--size", "64", "96"])
    assert json.loads(json.loads(out.read_text())["class_names"])[0]
    assert "boxes 0.0e+00 px" in capsys.readouterr().out


def test_warnings_of_the_exporter_are_not_shown_and_later_ones_are(caplog, recwarn):
    log = logging.getLogger("torch.onnx")
    with export.without_messages():
        log.warning("torchvision is not installed")
        warnings.warn("deprecated", FutureWarning)
        log.error("the file cannot be written")
    log.warning("later")
    assert [record.message for record in caplog.records] == ["the file cannot be written", "later"]
    assert not recwarn.list


@pytest.mark.parametrize("words, message", [
    (["--out", "model.pth"], "expected --out with the suffix .onnx or .pt2, got 'model.pth'"),
    (["--out", "nowhere/model.onnx"], "expected --out in a folder that exists"),
    (["--out", "model.pt2", "--batch", "0"], "expected --batch of at least 1"),
    (["--out", "model.pt2", "--size", "8", "800"], "expected --size of 32 to 10000"),
    (["--out", "model.pt2"], "expected a file|no such file|found no file|got none")])
def test_wrong_options_are_refused_in_one_line(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as stop:
        export.main(["--checkpoint", "best.pt", *words])
    assert "\n" not in str(stop.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match="got no onnxscript: pip install onnx onnxscript"):
        export.export(Options("nowhere.pt", "model.onnx"))


@pytest.mark.parametrize("name, changes, raw, message", [
    ("co_detr", {"eval_head": "rcnn"}, False, "expected eval_head detr, got rcnn"),
    ("mask_frozen_detr", {"mask_scoring": False}, False, "depend on pasted pixels"),
    ("mask_frozen_detr", {"roi_box": "gt"}, False, "roi_box gt"),
    ("mask_frozen_detr", {}, True, "expected a detector with --raw")])
def test_what_cannot_be_exported_says_why(name, changes, raw, message):
    with pytest.raises(UserError, match=message):
        as_module(detector(name, **changes), raw)


def test_an_export_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no")

    monkeypatch.setattr(export.torch.export, "save", fail)
    with pytest.raises(RuntimeError, match="no"):
        export.write_program(tmp_path / "model.pt2", None, {})
    assert not list(tmp_path.iterdir())


def test_images_of_a_fixed_size_are_padded_to_it():
    image = export.Shapes("val", 1).image(0)
    recipe = configure(dino, dino.SMALL)[1]
    images, padding, sizes = export.example_inputs([image], recipe, 2, (96, 160))
    assert images.shape == (2, 3, 96, 160)
    assert (~padding[0]).sum() == 96 * 96
    assert sizes.tolist() == [[image.height, image.width]] * 2
