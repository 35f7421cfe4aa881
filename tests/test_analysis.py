"""analysis.py: ATD, matching instability, IoF-IoB and conflict of heads by hand, the table, the
command."""
import json
import re

import numpy as np
import pytest
import torch
from tiny_checkpoint import two_checkpoints, write_checkpoint

import analysis
from deformable_attn import MSDeformAttn, ms_deform_attn_torch
from deformable_detr import Memory
from engine import models
from engine.errors import UserError


@pytest.fixture(scope="module", params=["dino", "deformable_detr"])
def checkpoint(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp(request.param) / "best.pt", request.param)


# ---- ATD -----------------------------------------------------------------------------------------

def test_atd_is_the_mean_of_the_k_largest_distances():
    distances = torch.tensor([0.1, 0.5, 0.2, 0.4])
    assert analysis.atd(distances, 2) == pytest.approx(0.45)
    assert analysis.atd(distances, 100) == pytest.approx(0.3)
    assert analysis.atd(torch.zeros(0), 100) == -1


class Fixed(torch.nn.Module):
    """Three queries; objects 0 and 1 are matched to queries 2 and 0."""

    def __init__(self, coordinates):
        super().__init__()
        anchors = [[0.2, 0.2, 0.1, 0.1], [0.9, 0.9, 0.9, 0.9], [0.5, 0.6, 0.3, 0.3]]
        self.anchors = torch.tensor(anchors)[:, :coordinates]

    def forward(self, images, padding, targets=None):
        return {"anchors": self.anchors[None]}

    def match(self, outputs, targets):
        return [(torch.tensor([2, 0]), torch.tensor([0, 1]))]


class OneImage(torch.utils.data.Dataset):
    """Two objects of 80 x 40 px and 20 x 15 px: the second is small."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.2, 0.3, 0.1, 0.15]])
        return torch.zeros(3, 8, 8), {"boxes": boxes, "labels": torch.tensor([0, 0]),
                                      "canvas_size": torch.tensor([100, 200])}


def test_a_model_that_is_not_finite_has_no_figures():
    """The matching takes a NaN for a large number, and the figures would look like others."""
    model = Fixed(4)
    forward = model.forward
    model.forward = lambda *batch: {**forward(*batch), "pred_boxes": torch.full((1, 3, 4), np.nan)}
    for measure in (analysis.analyze, analysis.assignments):
        with pytest.raises(UserError, match="finite outputs, got NaN or infinity in pred_boxes"):
            measure(model, model, OneImage(), "cpu")


def test_atd_by_hand_for_anchors_that_are_boxes_and_points():
    model = Fixed(4)
    figures = analysis.analyze(model, model, OneImage(), "cpu", k=1)
    assert figures["ATD"] == pytest.approx(0.3)           # |.5-.5| + |.6-.5| + |.3-.4| + |.3-.4|
    assert figures["ATD_small"] == pytest.approx(0.15)    # |.2-.2| + |.2-.3| + |.1-.1| + |.1-.15|
    assert figures["ATD_medium"] == figures["ATD"] and figures["ATD_large"] == -1
    counts = (figures["objects"], figures["small_objects"], figures["coordinates"])
    assert counts == (2, 1, "xywh")
    points = analysis.analyze(Fixed(2), model, OneImage(), "cpu", k=2)
    assert points["ATD"] == pytest.approx(0.1)            # both centers are 0.1 away
    assert points["coordinates"] == "xy"
    table = analysis.analysis_table({"box": figures, "point": points})
    assert re.search(r"ATD\(1\) +0.3000 +0.1000\n", table)
    assert re.search(r"ATD\(1\) medium +0.3000 +0.1000\n", table) and ") large" not in table
    assert "point: |x| + |y| of anchors that are points" in table
    alone = analysis.analysis_table({"box": figures})
    assert "points" not in alone and "IoF-IoB" not in alone


def test_a_model_without_anchors_is_refused_in_one_line():
    class Plain(Fixed):
        def forward(self, images, padding, targets=None):
            return {}

    with pytest.raises(UserError, match=r"outputs\['anchors'\]"):
        analysis.analyze(Plain(4), Plain(4), OneImage(), "cpu")


# ---- matching instability ------------------------------------------------------------------------

def test_matchings_of_images_with_different_numbers_of_queries_fill_one_table(monkeypatch):
    batches = []
    for queries in (4, 2):
        targets = [{"labels": torch.zeros(1, dtype=torch.int64)}]
        batches.append(({"pred_logits": torch.zeros(1, queries, 2)}, targets))

    class Criterion:
        def match(self, outputs, targets):
            return [(torch.tensor([1]), torch.tensor([0]))]

    monkeypatch.setattr(analysis, "predict", lambda *args, **kwargs: iter(batches))
    rows = analysis.assignments(None, Criterion(), range(2), "cpu").tolist()
    assert rows == [[-1, 0, -1, -1], [-1, 0, -1, -1]]


def test_instability_counts_the_queries_of_an_image_whose_object_changed():
    before = torch.tensor([[-1, 0, 1, -1], [0, -1, -1, -1]])
    after = torch.tensor([[0, -1, 1, -1], [0, -1, -1, -1]])
    assert analysis.instability(before, after) == 1.0
    assert analysis.instability(before, before) == 0.0
    assert analysis.instability(before, after[:1]) is None


# ---- Co-DETR, section 3.4 ------------------------------------------------------------------------

def memory_of(tokens, shapes, padding=None):
    """A Memory of B images from tokens (B, S, C)."""
    if padding is None:
        padding = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    return Memory(tokens, None, padding, shapes, None, [], torch.tensor([[2, 2]]), (2, 2))


def test_recorded_sampling_points_reproduce_the_output_of_every_decoder_layer(checkpoint):
    model, _, cfg, *_ = models.load_model(checkpoint)
    for module in model.modules():                # offsets and weights that differ between queries
        if isinstance(module, MSDeformAttn):
            torch.nn.init.normal_(module.sampling_offsets.weight, std=0.3)
            torch.nn.init.normal_(module.attention_weights.weight, std=0.3)
    modules = [layer.cross_attn for layer in model.decoder]
    calls = []

    def remember(module, inputs, output):
        calls.append((module, inputs, output))

    for module in modules:
        module.register_forward_hook(remember)
    images = torch.randn(2, 3, 48, 80)
    padding = torch.zeros(2, 48, 80, dtype=torch.bool)
    padding[1, 32:] = True
    with analysis.recorded_attention(model) as records:
        model(images, padding)
    assert len(records) == len(calls) == cfg.decoder_layers
    for record, (module, inputs, output) in zip(records, calls):
        _, _, tokens, shapes, mask = inputs
        value = module.value_proj(tokens).masked_fill(mask[..., None], 0)
        value = value.unflatten(-1, (cfg.num_heads, -1))
        sampled = ms_deform_attn_torch(value, shapes, record["locations"], record["weights"])
        assert torch.allclose(module.output_proj(sampled), output, atol=1e-5)
        assert torch.allclose(record["weights"].sum((-1, -2)), torch.ones(()))
    assert not any(module._forward_pre_hooks for module in modules)      # nothing stays behind


def test_discriminability_is_the_mean_of_normalized_norms():
    norms = torch.tensor([0.0, 3.0, 4.0, 1.0])
    fine = norms[None, :, None] * torch.tensor([0.6, 0.8])
    coarse = torch.tensor([[[3.0, 4.0]]])
    padding = torch.tensor([[False, False, False, True, False]])
    memory = memory_of(torch.cat((fine, coarse), 1), [(2, 2), (1, 1)], padding)
    expected = (torch.tensor([[0.0, 0.75], [1.0, 0.0]]) + 1) / 2
    maps = analysis.discriminability(analysis.encoder_norms(memory), memory)
    assert torch.allclose(maps[0], expected)


def test_iof_iob_by_hand():
    """A row of four pixels; the object covers the last two."""
    scores = torch.tensor([[0.1, 0.6, 0.55, 0.9]])
    counts = analysis.score_counts(scores, torch.tensor([[0.75, 0.5, 0.5, 1.0]]), (1, 4))
    curve = analysis.iof_iob(counts)
    assert (curve["IoB"][0], curve["IoB"][75], curve["IoB"][-1]) == pytest.approx((0, 0.75, 1))
    # all of the object lies above 0.55, half of it between 0.55 and 0.6
    assert (curve["IoF"][25], curve["IoF"][75]) == pytest.approx((1, 0.5))
    assert curve["area"] == pytest.approx(3 / 4)   # of four pairs, one is in the wrong order
    assert not analysis.score_counts(scores, torch.zeros(0, 4), (1, 3))[1].any()


def test_attention_is_distributed_over_the_four_tokens_around_a_point():
    """Levels of 2 x 4 and 1 x 1 tokens. One point lies between the first two tokens of the second
    row, a quarter of the way; one at a token that is padding; one at the only token of level 2."""
    memory = memory_of(torch.zeros(1, 9, 8), [(2, 4), (1, 1)], torch.arange(9)[None] == 7)
    first = torch.tensor([[[0.75 / 4, 0.75]], [[0.5, 0.5]]])
    second = torch.tensor([3.5 / 4, 0.75, 0.5, 0.5])
    records = [{"locations": first.view(1, 1, 1, 2, 1, 2),                 # (B, Nq, M, L, K, 2)
                "weights": torch.tensor([0.6, 0.4]).view(1, 1, 1, 2, 1)},
               {"locations": second.view(1, 1, 1, 2, 1, 2),
                "weights": torch.ones(1, 1, 1, 2, 1)}]
    attention = analysis.decoder_attention(memory, records)
    expected = torch.tensor([[0, 0, 0, 0, 0.45, 0.15, 0, 0, 1.4]])
    assert torch.allclose(attention, expected, atol=1e-6)


def test_grad_cam_by_hand_level_by_level():
    """Two levels of two tokens and of one, two channels; the mean gradient weights the channels."""
    tokens = torch.tensor([[[1.0, 2], [3, -5], [4, 1]]])
    memory = memory_of(tokens, [(1, 2), (1, 1)])
    gradient = torch.tensor([[[1.0, 1], [3, 1], [0, 2]]])                  # means (2, 1) and (0, 2)
    expected = torch.tensor([[4.0, 1, 2]]) / 7
    assert torch.allclose(analysis.grad_cam(memory, gradient), expected, atol=1e-6)
    # nothing speaks for it: a uniform map
    assert torch.allclose(analysis.grad_cam(memory, -gradient), torch.ones(1, 3) / 3)


def test_conflict_is_the_divergence_of_grad_cam_maps():
    class Heads(torch.nn.Module):
        """The first head depends on channel 0, the second on channel 1."""

        def confidences(self, memory):
            return {"detr": memory.tokens[..., 0].sum(), "atss": memory.tokens[..., 1].sum()}

    tokens = torch.tensor([[[3.0, 1], [1, 3]], [[2.0, 2], [1, 1]]])
    heads, S = analysis.head_divergences(Heads(), memory_of(tokens, [(1, 2)]))
    kl = 0.75 * np.log(0.75 / 0.25) + 0.25 * np.log(0.25 / 0.75)
    expected = torch.tensor([[[0, kl], [kl, 0]], [[0.0, 0], [0, 0]]]).float()
    assert heads == ["detr", "atss"] and torch.allclose(S, expected, atol=1e-6)
    S = torch.tensor([[0.0, 1, 2], [3, 0, 4], [5, 6, 0]])
    average = analysis.conflict(["detr", "rcnn", "atss"], S)["average"]
    assert average == pytest.approx({"rcnn": 5, "atss": 5})
    average = analysis.conflict(["detr", "atss"], S[:2, :2])["average"]
    assert average == pytest.approx({"detr": 2, "atss": 2})


def test_the_average_conflict_is_that_of_the_papers_figure_8():
    """Two auxiliary heads: the divergences between them alone, not those from the detector."""
    S = torch.tensor([[0, 0.0078, 0.0085], [0.0073, 0, 0.0062], [0.0079, 0.0059, 0]])
    average = analysis.conflict(["detr", "atss", "rcnn"], S)["average"]
    assert average == pytest.approx({"atss": 0.00605, "rcnn": 0.00605}, rel=1e-5)


def test_the_floor_under_the_logarithm_sets_the_size_of_a_conflict():
    """Two heads that depend on different tokens: the divergence is the logarithm of the floor."""
    class Heads(torch.nn.Module):
        def confidences(self, memory):
            return {"detr": memory.tokens[:, 0, 0].sum(), "atss": memory.tokens[:, 1, 1].sum()}

    memory = memory_of(torch.tensor([[[1.0, 0], [0, 1]]]), [(1, 2)])
    _, S = analysis.head_divergences(Heads(), memory)
    assert float(S[0, 0, 1]) == pytest.approx(np.log(1e8), rel=1e-4)


def test_the_table_shows_conflicts_and_a_dash_for_the_head_that_has_none():
    conflict = analysis.conflict(["detr", "rcnn", "atss"],
                                 torch.tensor([[0.0, 1, 2], [3, 0, 4], [5, 6, 0]]))
    sizes = dict.fromkeys(("ATD_small", "ATD_medium", "ATD_large"), -1.0)
    figures = {"ATD": 0.1, **sizes, "k": 9, "coordinates": "xywh", "conflict": conflict}
    table = analysis.analysis_table({"run": figures})
    assert re.search(r"conflict of heads +5.0000\n", table)
    assert re.search(r"detr +0.0000 +1.0000 +2.0000 +-\n", table)


# ---- command line --------------------------------------------------------------------------------

def run(*words):
    analysis.main([*map(str, words), "--device", "cpu", "--batch_size", "3"])


def test_checkpoints_are_analyzed_side_by_side(tmp_path, capsys):
    """A Co-DETR with two heads beside a DINO: curves of encoder and decoder, conflicts of the first
    alone, and no instability between two models."""
    first, second = two_checkpoints(tmp_path)
    run("--checkpoint", first, second.parent, "--out", tmp_path)
    printed = capsys.readouterr().out
    assert re.search(r"co_detr +dino\n", printed)
    assert re.search(r"IoF-IoB decoder +0\.\d+ +0\.\d+", printed)
    assert re.search(r"conflict of heads +\d+\.\d+ +-\n", printed)
    assert re.search(r"detr +rcnn +atss +average", printed)
    assert "instability" not in printed
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert list(found) == ["co_detr", "dino"]
    assert found["dino"]["checkpoint"] == str(second.parent)
    S = np.array(found["co_detr"]["conflict"]["S"])
    assert S.shape == (3, 3) and (np.diag(S) == 0).all() and (S[~np.eye(3, dtype=bool)] > 0).all()
    for part in ("encoder", "decoder"):
        curve = found["dino"][part]
        assert len(curve["IoF"]) == 101 and 0 < curve["area"] < 1
        assert (np.diff(curve["IoF"]) <= 1e-6).all()


def test_checkpoints_of_one_run_get_the_instability_of_their_matching(tmp_path, capsys):
    def other(state):
        for key in state:
            if key.startswith("bbox_embed"):
                state[key] = torch.randn_like(state[key])

    write_checkpoint(tmp_path / "epoch_1.pt")
    write_checkpoint(tmp_path / "epoch_2.pt", change=other)
    paths = [tmp_path / name for name in ("epoch_1.pt", "epoch_2.pt")]
    run("--checkpoint", *paths)
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert list(found) == ["epoch_1", "epoch_2"]
    assert "instability" not in found["epoch_1"] and 0 < found["epoch_2"]["instability"] < 12
    assert re.search(r"instability +- +\d+\.\d{4}\n", capsys.readouterr().out)


def test_a_run_folder_follows_a_checkpoint_in_it(tmp_path):
    write_checkpoint(tmp_path / "epoch_1.pt")
    write_checkpoint(tmp_path / "best.pt")
    run("--checkpoint", tmp_path / "epoch_1.pt", tmp_path, "--out", tmp_path)
    first, second = json.loads((tmp_path / "analysis.json").read_text()).values()
    assert "instability" not in first and second["instability"] == 0


def test_runs_of_the_same_model_have_no_instability_between_them(tmp_path, capsys):
    for name in ("seed_0", "seed_1"):
        (tmp_path / name).mkdir()
    first = write_checkpoint(tmp_path / "seed_0" / "best.pt")
    second = write_checkpoint(tmp_path / "seed_1" / "best.pt")
    run("--checkpoint", first, second.parent, "--out", tmp_path)
    assert "ATD" in capsys.readouterr().out
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert not any("instability" in figures for figures in found.values())


@pytest.mark.parametrize("words, message", [
    (("--k", "0"), "--k of at least 1"), (("--batch_size", "0"), "--batch_size"),
    (("--data", "nowhere"), "nowhere"), (("--out", "/proc/nowhere"), "--out")])
def test_what_cannot_be_measured_ends_in_one_line(checkpoint, words, message):
    with pytest.raises(SystemExit, match=f"analysis.py: .*{message}"):
        analysis.main(["--checkpoint", str(checkpoint), "--device", "cpu", *words])


def test_short_names_of_checkpoints_tell_them_apart(tmp_path):
    assert analysis.run_names(["a/best.pt", "b/best.pt"]) == ["a", "b"]
    assert analysis.run_names(["a/best.pt", "dino_small"]) == ["a", "dino_small"]
    assert analysis.run_names(["a/one.pt", "a/two.pt"]) == ["one", "two"]
    assert analysis.run_names(["a/x.pt", "a/y.pt", "b/x.pt"]) == ["a/x.pt", "a/y.pt", "b/x.pt"]
    (tmp_path / "dino").mkdir()
    assert analysis.run_names([tmp_path / "dino"]) == ["dino"]
