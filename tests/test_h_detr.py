"""h_detr.py: the authors' recordings, then one test per claim of the paper."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.recipe import override
from engine import authors_names
from engine import released
import matcher
import recordings
from h_detr import (
    RECIPE, SMALL, VARIANTS, Config, Criterion, HDETR, build, detect, group_mask, param_groups)
from recordings import batch, close, config_fields, given_maps, overfit, randomize_heads, tensor


def recorded_config(rec):
    s = recordings.settings(rec)
    fields = config_fields(rec)
    known = {k: v for k, v in fields.items() if k not in ("with_box_refine", "two_stage")}
    return Config(**known, num_queries=s["num_queries_one2one"], k_one2many=s["k_one2many"],
                  num_queries_one2many=s["num_queries_one2many"],
                  lambda_one2many=s["lambda_one2many"])


def our_order(rec):
    """The authors call `many.aux0.cls` loss_ce_0_one2many; `recordings` expects the group before
    the layer: loss_ce_many_0."""
    for key in (k for k in rec if k.endswith("loss_names")):
        names = rec[key].tolist()
        for i, name in enumerate(names):
            if name.endswith("_one2many"):
                loss, term, *layer = name.removesuffix("_one2many").split("_")
                names[i] = "_".join([loss, term, "many", *layer])
        rec[key] = np.array(names)
    return rec


def check_many(rec, outputs):
    layers = outputs["many_outputs"]["aux_outputs"] + [outputs["many_outputs"]]
    logits = recordings.stacked(layers, "pred_logits")
    boxes = recordings.stacked(layers, "pred_boxes")
    close(logits, rec["out.logits_one2many"], 2e-4, "one-to-many logits")
    close(boxes, rec["out.boxes_one2many"], 5e-5, "one-to-many boxes")


def test_a_tiny_model_equals_the_authors_forward_and_backward(golden):
    rec = our_order(golden("08_tiny_h_detr"))
    cfg = recorded_config(rec)
    model = HDETR(given_maps(rec), cfg, 11)
    outputs = recordings.check_model(rec, model, Criterion(cfg), "h_detr", detect=detect)
    check_many(rec, outputs)


def test_at_test_time_only_the_one_to_one_group_remains(golden):
    rec = golden("08_tiny_h_detr_eval")
    cfg = replace(recorded_config(rec), num_queries_one2many=24)
    model = HDETR(given_maps(rec), cfg, 11)
    outputs = recordings.check_model(rec, model, Criterion(cfg), "h_detr", detect=detect)
    assert "many_outputs" not in outputs


def test_a_full_size_model_equals_the_authors(golden, recipe):
    rec = our_order(golden("10_full_h_detr"))
    model, criterion = build(recorded_config(rec), 91)
    outputs = recordings.check_model(
        rec, model, criterion, "h_detr", torch.float64, recipe, detect=detect)
    check_many(rec, outputs)


@pytest.mark.parametrize("case", "abc")
def test_losses_matches_and_gradients_equal_the_authors(golden, case):
    rec = our_order(golden("06_losses_h_detr"))

    def recorded(part):
        return {f"pred_{kind}": tensor(rec[f"{case}_{part}_{kind}"]).requires_grad_()
                for kind in ("logits", "boxes")}

    names = [f"{group}layer{i}" for group in ("", "one2many_") for i in range(3)] + ["enc"]
    parts = {name: recorded(name) for name in names}
    one = [parts[f"layer{i}"] for i in range(3)]
    many = [parts[f"one2many_layer{i}"] for i in range(3)]
    outputs = {**one[2], "aux_outputs": one[:2], "enc_outputs": parts["enc"],
               "many_outputs": {**many[2], "aux_outputs": many[:2]}}
    targets = recordings.read_targets(rec, f"{case}_")
    criterion = Criterion(Config(k_one2many=3))
    losses = criterion(outputs, targets)
    recordings.check_losses(rec, losses, f"{case}_")
    recordings.check_matches(rec, criterion.match(outputs, targets), "final", f"{case}_")
    many = criterion.set_loss.match_groups(criterion.groups(outputs, targets))[-1][0]
    for i, (query, index) in enumerate(many):
        theirs = rec[f"{case}_match_one2many_final_img{i}"]
        count = max(1, len(targets[i]["labels"]))   # copies of an object are interchangeable
        pairs = sorted(zip(query.tolist(), index.tolist()))
        assert pairs == sorted(zip(theirs[0], theirs[1] % count))
    sum(losses.values()).backward()
    for part, prediction in parts.items():
        for kind in ("logits", "boxes"):
            expected = rec[f"{case}_{part}_grad_{kind}"]
            np.testing.assert_allclose(prediction[f"pred_{kind}"].grad, expected,
                                       rtol=1e-4, atol=1e-5, err_msg=part)


def test_the_released_checkpoint_maps_one_to_one(shared, recipe):
    keys = recipe.read_keys(shared / "golden" / "keys_h_deformable_detr_r50.txt")
    assert len(keys) == 631
    authors = {name: torch.empty(shape, device="meta") for name, shape in keys}
    family, found = released.recognize(authors)
    assert family == "h_detr"
    assert (found["num_queries"], found["num_queries_one2many"]) == (300, 1500)
    with torch.device("meta"):
        model, _ = build(Config(**found), 91)
        baseline, _ = build(override(Config(), VARIANTS["baseline"]), 91)
    assert sum(p.numel() for p in model.parameters()) == 47_946_073
    assert sum(p.numel() for p in baseline.parameters()) == 47_562_073
    ours = authors_names.from_authors(authors, family)
    recordings.check_names(ours, model, family, keys)


def test_a_fresh_model_is_initialized_as_the_authors_model(shared):
    torch.manual_seed(0)
    model, _ = build(Config(), 91)
    path = shared / "golden" / "init_h_deformable_detr_r50.txt"
    recordings.check_initialization(path, model, "h_detr")


# ------------------------------------------------------------------------ claims and corner cases

def small(**changes):
    """A two-layer model of width 32 on the tiny backbone; forward and backward in milliseconds."""
    torch.manual_seed(0)
    cfg = override(Config(), {**SMALL, **dict(dim=32, ffn_dim=48, decoder_layers=2, num_queries=9,
                                               num_queries_one2many=20, k_one2many=3), **changes})
    return (cfg, *build(cfg, 5))


@pytest.mark.parametrize("many", [20, 0])
@pytest.mark.parametrize("objects", [(3, 0), (0, 0), (14, 1)])
def test_every_parameter_gets_a_finite_gradient(many, objects):
    cfg, model, criterion = small(num_queries_one2many=many)
    images, padding, targets = batch((64, 96), (48, 64), objects=objects)
    losses = criterion(model(images, padding, targets), targets)
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    assert ("many.aux0.cls" in losses) == (many > 0)


def test_it_overfits_four_scenes():
    cfg, model, criterion = small()
    groups = param_groups(model, override(RECIPE, SMALL))
    steps = overfit(model, criterion, groups)
    totals = [losses["cls"] + losses["l1"] + losses["giou"] for losses in steps]
    assert sum(totals[-5:]) / 5 < totals[0] / 2


def test_the_groups_never_see_each_other():
    """The first n queries decode as if the others were not there, and the other way round."""
    cfg, model, _ = small(backbone_norm="group")
    randomize_heads(model)
    images, padding, targets = batch((64, 96), (48, 64))
    alone, both = model.eval()(images, padding), model.train()(images, padding, targets)
    for name in ("pred_logits", "pred_boxes", "queries", "anchors"):
        assert (alone[name] - both[name]).abs().max() < 1e-6, name
    memory = model.encode(images, padding)
    queries, _ = model.propose(memory)
    mask = group_mask(9, queries.content)
    assert mask.sum() == 2 * 9 * 20
    content = torch.cat((queries.content[:, :9], torch.randn(2, 20, 32)), 1)
    disturbed = queries._replace(content=content)
    layers, disturbed = (model.decode(memory, q, mask)[0][-1] for q in (queries, disturbed))
    assert torch.equal(layers["pred_logits"][:, :9], disturbed["pred_logits"][:, :9])
    assert not torch.equal(layers["pred_logits"][:, 9:], disturbed["pred_logits"][:, 9:])
    assert group_mask(29, queries.content) is None


def test_the_rank_of_a_proposal_decides_its_group():
    cfg, model, _ = small(backbone_norm="group")
    images, padding, _ = batch((64, 96), (48, 64))
    few, enc = model.eval().propose(model.encode(images, padding))
    many, _ = model.train().propose(model.encode(images, padding))
    assert few.reference.shape[1] == 9 and many.reference.shape[1] == 29
    assert torch.allclose(few.reference, many.reference[:, :9])
    best = enc["pred_logits"][..., 0].topk(29).indices
    boxes = enc["pred_boxes"].gather(1, best[..., None].expand(-1, -1, 4))
    assert torch.equal(many.reference, boxes)
    assert torch.equal(many.content[0], model.query_embed.weight)


def test_every_object_gets_k_queries_and_their_mean_counts_lambda_times():
    cfg, model, criterion = small(lambda_one2many=0.5)
    images, padding, targets = batch((64, 96), (48, 64), objects=(3, 1))
    outputs = model(images, padding, targets)
    rows = criterion.set_loss.match_groups(criterion.groups(outputs, targets))[-1][0]
    l1 = 0.0
    for t, b, (query, index) in zip(targets, outputs["many_outputs"]["pred_boxes"], rows):
        n = len(t["labels"])
        assert torch.bincount(index % n, minlength=n).tolist() == [3] * n
        l1 += (b[query] - t["boxes"][index % n]).abs().sum()
    losses = criterion(outputs, targets)
    expected = float(0.5 * 5 * l1.detach() / (3 * 4))
    assert float(losses["many.l1"].detach()) == pytest.approx(expected, rel=1e-5)
    assert "many.enc.cls" not in losses


def test_looking_forward_twice_trains_two_box_heads_per_layer():
    reached = {0: {0}, 1: {0, 1}, 2: {1, 2}}
    for layer, heads in reached.items():
        _, model, _ = small(decoder_layers=3)
        randomize_heads(model)
        out = model(*batch((64, 96))[:2])
        (out["aux_outputs"] + [out])[layer]["pred_boxes"].sum().backward()
        got = {i for i, h in enumerate(model.bbox_embed)
               if h.layers[-1].bias.grad is not None and h.layers[-1].bias.grad.abs().sum() > 0}
        assert got == heads


def test_more_queries_than_tokens_take_from_the_one_to_many_group_first():
    cfg, model, criterion = small(num_queries=40, num_queries_one2many=900)
    images, padding, targets = batch((64, 64), objects=(2,))
    out = model(images, padding, targets)
    assert out["pred_logits"].shape[1] == 40
    assert out["many_outputs"]["pred_logits"].shape[1] == 64 + 16 + 4 - 40
    assert sum(criterion(out, targets).values()).isfinite()


@pytest.mark.parametrize("size", [(16, 16), (8, 200), (33, 65)])
def test_tiny_and_thin_images(size):
    cfg, model, criterion = small(num_queries=300, dim=64, backbone_norm="group")
    images, padding, targets = batch(size, objects=(2,))
    out = model(images, padding, targets)
    assert sum(criterion(out, targets).values()).isfinite()
    found = detect(out, torch.tensor([size]), Config(top_k=10_000))[0]
    assert len(found["scores"]) == out["pred_logits"].numel()


def test_costs_of_repeated_objects_are_computed_once(monkeypatch):
    """Copies of an object have the same cost, so the cost matrix has a column an object."""
    _, model, criterion = small()
    images, padding, targets = batch((64, 96), (48, 64), objects=(3, 1))
    shapes = []

    match_cost = matcher.match_cost

    def recorded(*args):
        cost = match_cost(*args)
        shapes.append(tuple(cost.shape))
        return cost

    monkeypatch.setattr(matcher, "match_cost", recorded)
    criterion(model(images, padding, targets), targets)
    assert shapes == [(2, 2, 9, 3), (1, 2, 126, 3), (2, 2, 20, 3)]


def test_under_autocast_proposals_are_ranked_by_float32_scores():
    _, model, _ = small()
    randomize_heads(model)
    images, padding, _ = batch((96, 128))
    with torch.autocast("cpu", torch.bfloat16):
        out = model.eval()(images, padding)
    logits = out["enc_outputs"]["pred_logits"]
    assert logits.dtype == out["pred_logits"].dtype == out["pred_boxes"].dtype == torch.float32
    usable = logits[logits != logits[0, 0]]
    assert len(usable.unique()) > 0.95 * usable.numel()


def test_five_levels_are_three_backbone_maps_and_two_coarser_ones():
    """As the authors take them; DINO's fifth level is C2."""
    with torch.device("meta"):
        model, _ = build(Config(num_feature_levels=5), 91)
    convolutions = [projection[0] for projection in model.input_proj]
    assert [conv.in_channels for conv in convolutions] == [512, 1024, 2048, 2048, 256]
