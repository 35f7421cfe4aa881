"""explorer.py and its page: what the page holds is what the models compute, and in a real browser
it loads without an error, reacts to mouse and keyboard, and shows these numbers.

The browser is Chromium without a window. Tests that need it skip where there is none; with
PAPERDETR_STRICT they fail instead."""
import base64
import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from coco_folders import write_folder
from tiny_checkpoint import damage, write_checkpoint

import data
import explorer
import mask_frozen_detr
import masks
import scenes
from analysis import recorded_attention
from boxes import box_cxcywh_to_xyxy
from deformable_detr import SelfAttention
from engine import checkpoints
from engine.commands import open_detector
from engine.errors import UserError
from engine.inference import infer
from engine.models import load_detector
from engine.recipe import configure

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NAMES = ["</script><script>bad()</script>", "it's \"quoted\" & <b>bold</b>", "<!-- <script>"]
MODELS = ("deformable_detr", "dino", "h_detr", "co_detr", "detr", "mask_frozen_detr")
PARTS = {"sampling", "maps", "proposals", "denoising", "masks"}
HAS = {"deformable_detr": {"sampling"}, "dino": {"sampling", "proposals", "denoising"},
       "h_detr": {"sampling", "proposals"}, "co_detr": {"sampling", "proposals", "denoising"},
       "detr": {"maps"}, "mask_frozen_detr": {"sampling", "proposals", "denoising", "masks"}}


# ---- pages and browsers --------------------------------------------------------------------------

def mask_checkpoint(folder):
    """A random mask network on a random DINO. -> path"""
    detector = load_detector(write_checkpoint(folder / "detector.pt"))
    sizes = {"roi_size": 8, "channel_dim": 32, "num_heads": 2, "image_layers": 1, "box_layers": 1,
             "train_sizes": (64,), "eval_size": 64}
    torch.manual_seed(0)
    cfg, recipe = configure(mask_frozen_detr, mask_frozen_detr.SMALL, sizes)
    model, _ = mask_frozen_detr.build(cfg, len(scenes.SCENE_CLASSES), detector)
    checkpoints.save(folder / "best.pt", {
        "format": 2, "model_name": "mask_frozen_detr", "variant": "",
        "config": dataclasses.asdict(cfg), "recipe": dataclasses.asdict(recipe),
        "model": model.state_dict(), "class_names": list(scenes.SCENE_CLASSES),
        "category_ids": list(range(1, 9)), "epoch": 1, "step": 5,
        "run": {"data": "", "seed": 0, "overfit": 0, "num_val": 6,
                "detector": str(folder / "detector.pt")}})
    return folder / "best.pt"


def page_of(path):
    """The numbers in a page."""
    text = path.read_text()
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.S)[1])


def unpacked(packed):
    """An array that `pack` wrote."""
    stored = np.frombuffer(base64.b64decode(packed["data"]), "<" + packed["type"])
    return packed["low"] + packed["step"] * stored.reshape(packed["shape"]).astype(np.float64)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(model): a checkpoint, the page of a scene and its path, each made once."""
    stored = {}

    def make(model):
        if model not in stored:
            folder = tmp_path_factory.mktemp(model)
            if model == "mask_frozen_detr":
                checkpoint = mask_checkpoint(folder)
            else:
                checkpoint = write_checkpoint(folder / "best.pt", model)
            out = folder / "page.html"
            explorer.explore(str(checkpoint), ["scene"], str(out))
            stored[model] = checkpoint, page_of(out), out
        return stored[model]
    return make


def browse(path, folder):
    """Open a page in a browser and run its self-test -> what it wrote down."""
    found = [shutil.which(name) for name in BROWSERS if shutil.which(name)]
    if not found:
        message = f"no browser to open the explorer in: install {BROWSERS[0]}"
        pytest.fail(message) if os.environ.get("PAPERDETR_STRICT") else pytest.skip(message)
    command = [found[0], "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               f"--user-data-dir={folder}", "--dump-dom", f"{path.as_uri()}#selftest"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    result = re.search(r'<pre id="selftest">(.*?)</pre>', run.stdout, re.S)
    assert result, run.stdout[-500:] + run.stderr[-500:]
    return json.loads(html.unescape(result[1]))


class Opened:
    """A DINO with names that look like HTML, the page of a photo and of an image with ground truth,
    what a browser shows of it, and the model itself on the second image."""

    def __init__(self, folder):
        self.folder = folder
        checkpoint = write_checkpoint(folder / "best.pt", class_names=NAMES)
        boxes = ((0, 1, (20, 10, 50, 40)), (0, 3, (60, 30, 40, 50)), (0, 2, (5, 50, 30, 30)))
        write_folder(folder / "data", ((120, 90),), boxes, tuple(enumerate(NAMES, 1)))
        photo = folder / "it's <i>.png"
        scenes.Shapes("val", 2).image(1).resize((120, 90)).save(photo)
        self.path = folder / "page.html"
        explorer.explore(str(checkpoint), [str(photo), "val:0"], str(self.path),
                         str(folder / "data"))
        self.page = page_of(self.path)
        self.loaded = open_detector(checkpoint)
        picture = explorer.open_picture(self.loaded, "val:0", str(folder / "data"))
        self.image = picture.image
        self.targets = [picture.target]
        transform = data.eval_transform(self.loaded.recipe)
        with torch.no_grad(), recorded_attention(self.loaded.model) as self.records:
            self.outputs = infer(self.loaded.model, transform, self.image, "cpu")

    def boxes(self, cxcywh):
        """Normalized boxes -> corners in pixels, a list."""
        width, height = self.image.size
        return (box_cxcywh_to_xyxy(cxcywh) * torch.tensor([width, height] * 2)).tolist()


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return Opened(tmp_path_factory.mktemp("opened"))


@pytest.fixture(scope="module")
def shown(opened):
    return browse(opened.path, opened.folder / "profile")


def view_of(shown, view, image="val 0"):
    return next(each for each in shown["shown"] if (each["image"], each["view"]) == (image, view))


def numbers(texts):
    return [float(text) for text in texts]


# ---- in the browser ------------------------------------------------------------------------------

def test_a_page_loads_without_an_error_and_every_view_draws_something_else(shown):
    assert shown["errors"] == []
    assert len({each["picture"] for each in shown["shown"]}) > len(shown["shown"]) / 2
    for each in shown["shown"]:
        assert each["links"] >= 2, each["view"]
        assert each["rows"] or not each["available"], each["view"]


def test_click_key_slider_and_switches_change_the_picture(shown):
    assert shown["changes"] == dict.fromkeys(
        ("click", "key", "arrow", "threshold", "object", "fixed", "head", "level"), True)


def test_a_query_brings_its_object_and_a_view_of_one_stage_stays_there(shown):
    assert shown["changes"]["object"] and shown["changes"]["fixed"]


def test_marks_and_numbers_of_the_page_stand_out():
    """Function names have underscores, which an underline close to the text would hide; white
    figures on pale shades would have too little contrast."""
    template = explorer.TEMPLATE.read_text()
    assert "text-underline-offset: 4px" in template
    assert '"#fff" : "inherit"' not in template


def test_boxes_shown_are_those_of_the_anchors_and_of_every_layer(shown, opened):
    view = view_of(shown, "boxes")
    layers = [*opened.outputs["aux_outputs"], opened.outputs]
    steps = [opened.outputs["anchors"]] + [layer["pred_boxes"] for layer in layers]
    assert len(view["rows"]) == 1 + len(steps)
    for row, step in zip(view["rows"][1:], steps):
        expected = opened.boxes(step[0, view["query"]])
        assert numbers(row[1:5]) == pytest.approx(expected, abs=0.051)


def test_class_scores_shown_are_those_of_every_layer(shown, opened):
    view = view_of(shown, "classes")
    layers = [*opened.outputs["aux_outputs"], opened.outputs]
    scores = torch.stack([layer["pred_logits"][0, view["query"]].sigmoid() for layer in layers])
    assert [row[0] for row in view["rows"][1:]] == [
        NAMES[label] for label in scores[-1].argsort(descending=True)]
    for name, *values in view["rows"][1:]:
        expected = scores[:, NAMES.index(name)].tolist()
        assert numbers(values) == pytest.approx(expected, abs=6e-4)


def test_sampling_points_shown_are_those_of_the_last_layer(shown, opened):
    view = view_of(shown, "sampling")
    record = {name: values[0, view["query"]] for name, values in opened.records[-1].items()}
    ratios = opened.outputs["memory"].valid_ratios[0][:, None]                 # (L, 1, 2)
    places = record["locations"] / ratios * torch.tensor(opened.image.size)
    for head, level, point, *values in view["rows"][-8:]:
        index = tuple(int(text) - 1 for text in (head, level, point))
        expected = [*places[index].tolist(), float(record["weights"][index])]
        assert numbers(values[:2]) == pytest.approx(expected[:2], abs=0.06)
        assert float(values[2]) == pytest.approx(expected[2], abs=6e-4)
    assert view["rows"][-8][5] == f"{float(record['weights'].max()):.3f}"
    point = shown["point"]
    assert shown["tip"].startswith(f"head {point['head'] + 1}, level {point['level'] + 1}, ")
    assert f"weight {point['weight']:.3f}" in shown["tip"]


def test_costs_shown_are_those_of_the_matching(shown, opened):
    view = view_of(shown, "matching")
    logits, boxes = opened.outputs["pred_logits"], opened.outputs["pred_boxes"]
    (query, index), = opened.loaded.criterion.match(opened.outputs, opened.targets)
    set_loss = opened.loaded.criterion.set_loss
    cost = explorer.matcher.match_cost(logits, boxes, opened.targets, set_loss.cost, set_loss.eps)
    for row in view["rows"][1:1 + len(index)]:
        column = int(row[0].split()[0])
        matched = int(query[index == column])
        assert int(row[1].split(",")[0]) == matched
        assert float(row[2]) == pytest.approx(float(cost[0, matched, column]), abs=6e-4)
        assert float(row[2]) == pytest.approx(sum(numbers(row[3:])), abs=2e-3)


def test_without_ground_truth_a_view_says_so(shown):
    for view in ("matching", "denoising"):
        photo = view_of(shown, view, "it's <i>.png")
        assert not photo["available"] and "no ground truth" in photo["text"]


def test_names_that_look_like_html_are_shown_as_they_are(shown, opened):
    names = {row[0] for row in view_of(shown, "classes")["rows"][1:]}
    assert names == set(NAMES)
    assert opened.path.read_text().count("</script>") == 2


@pytest.mark.parametrize("model", ("detr", "mask_frozen_detr"))
def test_maps_and_masks_are_shown_in_a_browser(model, made, tmp_path):
    _, page, path = made(model)
    result = browse(path, tmp_path)
    assert result["errors"] == []
    assert [each["view"] for each in result["shown"]] == list(page["views"])
    assert result["changes"]["click"] and result["changes"]["key"]
    last = "maps" if model == "detr" else "masks"
    assert next(each for each in result["shown"] if each["view"] == last)["rows"]


# ---- what the page holds -------------------------------------------------------------------------

@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_its_views_and_a_line_for_each_that_it_lacks(model, made):
    _, page, _ = made(model)
    image, = page["images"]
    assert set(page["views"]) & PARTS == HAS[model] == set(image) & PARTS
    lacking = {"sampling", "proposals", "denoising", "masks"} - HAS[model]
    named = " ".join(page["absent"]).lower()
    for view in lacking:
        assert view in named.replace("sampling points", "sampling")
    assert ("anchors" in image) == (model != "detr")
    assert len(image["truth"]["labels"]) == 7 and "matching" in image


def test_a_detector_without_denoising_has_no_such_view(tmp_path):
    def forget(state):
        del state["label_enc.weight"]
    path = write_checkpoint(tmp_path / "best.pt", change=forget)
    saved = torch.load(path)
    saved["config"]["denoising"] = "none"
    checkpoints.save(path, saved)
    explorer.explore(str(path), ["scene"], str(tmp_path / "page.html"))
    page = page_of(tmp_path / "page.html")
    assert "denoising" not in page["views"] and "denoising" not in page["images"][0]
    assert any(line.startswith("Denoising:") for line in page["absent"])


@pytest.mark.parametrize("model", MODELS)
def test_the_source_of_every_view_exists_where_its_link_says(model, made):
    _, page, path = made(model)
    for view, entries in page["views"].items():
        assert entries, view
        for entry in entries:
            assert entry["section"] and (entry["url"] or not entry["paper"]), view
            file, _, fragment = entry["link"].partition("#:~:text=")
            text = (path.parent / file).resolve().read_text()
            words = re.escape(urllib.parse.unquote(fragment))
            assert len(re.findall(rf"^ *{words}\b", text, re.M)) == 1, entry["link"]


def test_detections_are_those_of_the_paper_file(opened):
    size = torch.tensor([[opened.image.height, opened.image.width]])
    found = opened.loaded.paper.detect(opened.outputs, size, opened.loaded.cfg)[0]
    stored = opened.page["images"][1]["detections"]
    assert stored["query"] == found["query"].tolist()
    assert stored["label"] == found["labels"].tolist()
    assert stored["score"] == pytest.approx(found["scores"].tolist(), abs=1e-4)


def test_proposals_are_the_anchors_in_the_order_of_the_scores_of_their_tokens(opened):
    part = opened.page["images"][1]["proposals"]
    scores = unpacked(part["scores"])
    assert scores.shape == (sum(h * w for h, w in part["levels"]),)
    expected = opened.outputs["enc_outputs"]["pred_logits"][0].amax(-1).sigmoid()
    assert scores[part["tokens"]] == pytest.approx(expected.numpy(), abs=4e-5)
    assert (np.diff(scores[part["tokens"]]) <= 1e-4).all()
    assert (scores == -1).any()    # tokens too near to the border are not usable


def test_references_of_the_first_layer_are_the_anchors_although_the_input_is_padded(opened):
    assert (opened.outputs["memory"].valid_ratios < 1).any()
    image = opened.page["images"][1]
    queries = unpacked(image["sampling"]["queries"]).astype(int)
    references = unpacked(image["sampling"]["references"])
    assert references[0] == pytest.approx(unpacked(image["anchors"])[queries], abs=1e-6)


def test_noised_queries_are_those_of_training_with_their_mask(opened):
    part = opened.page["images"][1]["denoising"]
    model, paper = opened.loaded.model, opened.loaded.paper
    torch.manual_seed(0)
    made = paper.denoising_queries(opened.targets, model.label_enc, len(NAMES), model.cfg,
                                   model.cfg.num_queries)
    boxes = unpacked(part["boxes"])
    assert boxes[0] == pytest.approx(made.reference[0].detach().numpy(), abs=1e-6)
    assert part["groups"] == made.groups
    assert model.label_enc.weight[part["given"]].equal(made.content[0])
    flat = [k % 2 for k, n in enumerate(unpacked(part["blocked"]).astype(int)) for _ in range(n)]
    assert np.array_equal(np.reshape(flat, made.attn_mask.shape), made.attn_mask.numpy())

    # decoded alone, the matching queries are where they are in a pass without noised ones
    count = made.content.shape[1]
    queries, _ = model.propose(opened.outputs["memory"])
    content = torch.cat((made.content, queries.content), 1)
    reference = torch.cat((made.reference, queries.reference), 1)
    joined = explorer.Queries(content, None, reference)
    layers, _ = model.decode(opened.outputs["memory"], joined, made.attn_mask)
    noised = layers[-1]["pred_boxes"][0, :count]
    assert boxes[-1] == pytest.approx(noised.detach().numpy(), abs=1e-5)
    assert torch.allclose(layers[-1]["pred_boxes"][:, count:], opened.outputs["pred_boxes"],
                          atol=1e-4)


def test_masks_before_and_after_pasting_are_those_of_the_mask_network(made):
    checkpoint, page, _ = made("mask_frozen_detr")
    part = page["images"][0]["masks"]
    loaded = open_detector(checkpoint)
    picture = explorer.open_picture(loaded, "scene", "")
    with torch.no_grad():
        outputs = infer(loaded.model, data.eval_transform(loaded.recipe), picture.image, "cpu")
    assert part["queries"] == outputs["regions"].query.tolist()
    assert unpacked(part["values"]) == pytest.approx(outputs["mask_logits"].sigmoid().numpy(),
                                                     abs=0.003)
    width, height = picture.image.size
    scale = torch.tensor([width, height] * 2)
    pasted, _ = masks.paste(outputs["mask_logits"], outputs["regions"].xyxy * scale, height, width)
    runs = np.split(unpacked(part["runs"]).astype(int), np.cumsum(part["counts"])[:-1])
    for mask, lengths in zip(pasted, runs, strict=True):
        values = np.repeat(np.arange(len(lengths)) % 2, lengths)
        assert np.array_equal(values.reshape(height, width), mask.numpy())


def test_attention_weights_are_those_of_the_modules():
    torch.manual_seed(0)
    dense = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    query, key = torch.randn(1, 5, 16), torch.randn(1, 7, 16)
    padding = torch.tensor([[False] * 6 + [True]])
    _, expected = dense(query, key, key, padding)
    weights = explorer.attention_weights(dense, query, key, padding[:, None, None])
    assert torch.allclose(weights, expected, atol=1e-6)

    single = SelfAttention(16, 1, 0.0)
    position = torch.randn(1, 5, 16)
    blocked = torch.eye(5, dtype=torch.bool)
    weights = explorer.attention_weights(single, query + position, query + position, blocked)
    values = query @ single.in_proj_weight[32:].T + single.in_proj_bias[32:]
    assert torch.allclose(single.out_proj(weights @ values), single(query, position, blocked),
                          atol=1e-6)


def test_packed_numbers_come_back_within_half_a_step():
    torch.manual_seed(0)
    values = torch.rand(3, 5) * 3 - 1
    for dtype, step in (("u1", 3 / 255), ("u2", 3 / 65535)):
        stored = unpacked(explorer.pack_range(values, -1, 2, dtype))
        assert stored == pytest.approx(values.numpy(), abs=0.51 * step)
    beyond = unpacked(explorer.pack_range([-9.0, float("nan"), 9.0], -1, 2))
    assert beyond == pytest.approx([-1, -1, 2])


@pytest.mark.parametrize("mask", [
    np.zeros((3, 4), bool), np.ones((3, 4), bool), np.eye(5, dtype=bool),
    np.arange(300 * 300).reshape(300, 300) >= 300 * 300 - 1], ids=["none", "all", "eye", "long"])
def test_run_lengths_describe_a_mask(mask):
    lengths = explorer.run_lengths(mask)
    values = np.repeat(np.arange(len(lengths)) % 2, lengths.astype(int))
    assert np.array_equal(values.reshape(mask.shape), mask)


# ---- bad input -----------------------------------------------------------------------------------

def test_a_huge_photo_is_scaled_down_and_the_page_says_so(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "best.pt")
    Image.new("RGB", (6000, 1500), (90, 120, 60)).save(tmp_path / "huge.png")
    explorer.explore(str(checkpoint), [str(tmp_path / "huge.png")], str(tmp_path / "page.html"))
    image, = page_of(tmp_path / "page.html")["images"]
    assert image["size"] == [6000, 1500]
    assert "6000 x 1500" in image["notes"][0] and "1024 x 256" in image["notes"][0]
    assert (tmp_path / "page.html").stat().st_size < 2e6


def test_an_image_without_objects_has_neither_matching_nor_noised_queries(made, tmp_path):
    checkpoint, _, _ = made("dino")
    empty = next(i for i in range(60) if not len(scenes.Shapes("val", 60).objects(i).labels))
    explorer.explore(str(checkpoint), [f"scene:{empty}"], str(tmp_path / "page.html"))
    image, = page_of(tmp_path / "page.html")["images"]
    assert image["truth"]["labels"] == []
    assert "matching" not in image and "denoising" not in image


def test_the_queries_of_a_published_detector_fit_into_a_megabyte():
    """900 queries, 6 layers, 80 classes. Sampling points are stored for those with the best
    scores."""
    A, Nq, M, L, K = 6, 900, 8, 4, 4
    torch.manual_seed(0)
    weights = torch.rand(1, Nq, M, L * K).softmax(-1).unflatten(-1, (L, K))
    record = {"reference": torch.rand(1, Nq, L, 4), "weights": weights,
              "locations": torch.rand(1, Nq, M, L, K, 2)}
    memory = SimpleNamespace(valid_ratios=torch.ones(1, L, 2), shapes=[(100, 134)] * L)
    sampling = explorer.pack_sampling([record] * A, memory, torch.linspace(0, 1, Nq))
    queries = unpacked(sampling["queries"])
    assert len(queries) >= 50 and queries.tolist() == list(range(Nq - len(queries), Nq))
    parts = [sampling, explorer.pack(torch.rand(A, Nq, 4), "f4"),
             explorer.pack_scores(torch.rand(A, Nq, 80)),
             explorer.pack_attention([torch.rand(Nq, Nq).softmax(-1)] * A)]
    assert len(json.dumps(parts)) < 8e5


def test_hundreds_of_objects_are_matched_with_fewer_queries():
    n = 300
    torch.manual_seed(0)
    targets = [{"labels": torch.zeros(n, dtype=torch.int64), "boxes": torch.rand(n, 4)}]
    layers = [{"pred_logits": torch.randn(1, 200, 3), "pred_boxes": torch.rand(1, 200, 4)}] * 6
    part = explorer.matching(layers, targets, (explorer.Weights(2, 5, 2), 0.0, None))
    assert len(json.dumps(part)) < 300_000
    assert unpacked(part["matched"]).sum(1).tolist() == [200.0] * 6


@pytest.mark.parametrize("images, out, words", [
    (["absent.jpg"], "page.html", "expected a readable image"),
    (["scene:1000"], "page.html", "scene:N with N in 0..499"),
    (["scene:x"], "page.html", "scene:N"),
    ([], "page.html", "at least one image"),
    (["scene"], "page.png", "expected a page to write, .html")])
def test_flags_that_cannot_work_are_errors_and_write_nothing(images, out, words, made, tmp_path):
    checkpoint, _, _ = made("dino")
    with pytest.raises(UserError, match=words):
        explorer.explore(str(checkpoint), images, str(tmp_path / out))
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_finite_is_an_error(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "best.pt", change=damage)
    with pytest.raises(UserError, match="expected finite detections"):
        explorer.explore(str(checkpoint), ["scene"], str(tmp_path / "page.html"))


def test_a_model_of_other_classes_explores_a_scene_without_ground_truth(opened, tmp_path):
    explorer.explore(str(opened.folder / "best.pt"), ["scene"], str(tmp_path / "page.html"))
    image, = page_of(tmp_path / "page.html")["images"]
    assert "truth" not in image and "does not know the classes" in image["notes"][0]
    assert Path(tmp_path / "page.html").stat().st_size < 2e6


# ---- the example ---------------------------------------------------------------------------------

def test_the_finished_example_is_small_and_its_links_lead_to_files_that_exist():
    path = explorer.ROOT / "assets" / "explorer.html"
    assert path.stat().st_size <= 2e6
    page = page_of(path)
    links = [entry["link"] for entries in page["views"].values() for entry in entries]
    assert links
    for link in filter(None, links):
        assert (path.parent / link.partition("#")[0]).resolve().is_file(), link
