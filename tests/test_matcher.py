"""matcher.py: the cheapest assignment, and the losses that follow from it."""
import itertools

import numpy as np
import pytest
import torch

from matcher import Group, SetLoss, Weights, assign, count_boxes, focal_loss, match, match_cost
from recordings import check_losses, check_matches, read_targets, tensor

COST = Weights(2.0, 5.0, 2.0)
EPS = {"deformable_detr": 0.0, "dino": 1e-6}


def objects(*counts):
    """Targets with this many objects an image, all alike."""
    return [{"labels": torch.zeros(n, dtype=torch.int64), "boxes": torch.full((n, 4), 0.5)}
            for n in counts]


@pytest.mark.parametrize("case", "abcd")
@pytest.mark.parametrize("model", EPS)
def test_costs_and_matches_equal_the_authors(golden, case, model):
    rec = golden("05_matcher")
    targets = read_targets(rec, f"{case}_")
    logits = tensor(rec[f"{case}_logits"])
    boxes = tensor(rec[f"{case}_boxes"])
    cost = match_cost(logits, boxes, targets, COST, EPS[model])
    start = 0
    for image, target in enumerate(targets):
        n = len(target["labels"])
        expected = rec[f"{case}_cost_{model}"][image, :, start:start + n]
        np.testing.assert_allclose(cost[image, :, :n].numpy(), expected, rtol=1e-4, atol=1e-5)
        start += n
    predictions = {"pred_logits": logits, "pred_boxes": boxes}
    matches = match(predictions, targets, COST, EPS[model])
    renamed = {key.replace(f"_{model}", "_x"): value for key, value in rec.items()}
    check_matches(renamed, matches, "x", f"{case}_")


def test_the_assignment_is_the_brute_force_optimum():
    cost = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0))
    (query, index), = assign(cost, objects(3))
    best = min(itertools.permutations(range(5), 3),
               key=lambda p: sum(cost[0, q, j] for j, q in enumerate(p)))
    assert [int(query[index == j]) for j in range(3)] == list(best)


def test_more_objects_than_queries_match_every_query_once():
    (query, index), = assign(torch.rand(1, 3, 7), objects(7))
    assert sorted(query.tolist()) == [0, 1, 2]
    assert len(set(index.tolist())) == 3


def test_columns_beyond_the_objects_of_an_image_are_ignored():
    cost = torch.rand(2, 4, 3)
    cost[1, :, 1:] = -100.0
    _, (query, index) = assign(cost, objects(3, 1))
    assert query.tolist() == [int(cost[1, :, 0].argmin())]
    assert index.tolist() == [0]


def test_copies_of_objects_are_matched_as_repeated_objects_are():
    cost = torch.rand(1, 9, 2)
    (query, index), = assign(cost, objects(2), copies=3)
    (expected, repeated), = assign(cost.repeat(1, 1, 3), objects(6))
    assert torch.equal(query, expected)
    assert torch.equal(index, repeated % 2)
    assert torch.bincount(index).tolist() == [3, 3]


def test_groups_are_matched_as_each_set_alone():
    """Groups with different targets and copies, layers and images each get their own matches."""
    generator = torch.Generator().manual_seed(0)

    def layer(queries):
        return {"pred_logits": torch.randn(2, queries, 4, generator=generator),
                "pred_boxes": torch.rand(2, queries, 4, generator=generator)}

    first = [{"labels": torch.tensor([0, 3]), "boxes": torch.rand(2, 4, generator=generator)},
             {"labels": torch.tensor([1]), "boxes": torch.rand(1, 4, generator=generator)}]
    second = [{**t, "labels": torch.zeros_like(t["labels"])} for t in first]
    repeated = [{"labels": t["labels"].repeat(3), "boxes": t["boxes"].repeat(3, 1)} for t in first]
    groups = [Group({"": layer(9), "aux0": layer(9)}, first), Group({"enc": layer(20)}, second),
              Group({"many": layer(15)}, first, copies=3)]
    set_loss = SetLoss(COST, COST)
    for group, matches in zip(groups, set_loss.match_groups(groups)):
        targets = repeated if group.copies == 3 else group.targets
        assert len(matches) == len(group.layers)
        for predictions, pairs in zip(group.layers.values(), matches):
            alone = set_loss.match(predictions, targets)
            for target, (query, index), (wanted, of) in zip(first, pairs, alone):
                assert len(query) == group.copies * len(target["labels"])
                assert torch.equal(query, wanted)
                assert torch.equal(index, of % len(target["labels"]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_cost_that_is_not_finite_is_avoided(value):
    cost = torch.zeros(1, 3, 2)
    cost[0, 1] = value
    (query, _), = assign(cost, objects(2))
    assert query.tolist() == [0, 2]


def test_focal_sum_equals_the_hand_computed_figure():
    logits = torch.tensor([[-4.59512, 0.0, 2.0]])
    loss = focal_loss(logits, torch.tensor([1])).sum()
    assert torch.isclose(loss, torch.tensor(1.280881), atol=1e-5)


def predictions(rec, case, name, grad):
    return {f"pred_{x}": tensor(rec[f"{case}_{name}_{x}"]).requires_grad_(grad)
            for x in ("logits", "boxes")}


@pytest.mark.parametrize("case", "abc")
@pytest.mark.parametrize("name", ["06_losses_deformable", "06_losses_deformable_two_stage"])
def test_losses_matches_and_gradients_equal_deformable_detrs(golden, name, case):
    from deformable_detr import Config, Criterion
    rec = golden(name)
    layers = [predictions(rec, case, f"layer{i}", True) for i in range(3)]
    outputs = {**layers[2], "aux_outputs": layers[:2]}
    if "two_stage" in name:
        outputs["enc_outputs"] = predictions(rec, case, "enc", True)
    targets = read_targets(rec, f"{case}_")
    criterion = Criterion(Config())
    losses = criterion(outputs, targets)
    check_losses(rec, losses, f"{case}_")
    check_matches(rec, criterion.match(outputs, targets), "final", f"{case}_")
    sum(losses.values()).backward()
    parts = {f"layer{i}": layer for i, layer in enumerate(layers)}
    parts["enc"] = outputs.get("enc_outputs", {})
    check_input_gradients(rec, case, parts)


@pytest.mark.parametrize("case", ["a", "b", "c", "nodn"])
def test_losses_matches_and_gradients_equal_dinos(golden, case):
    from dino import Config, Criterion
    rec = golden("06_losses_dino")
    layers = [predictions(rec, case, f"layer{i}", True) for i in range(3)]
    proposals = predictions(rec, case, "interm", True)
    outputs = {**layers[2], "aux_outputs": layers[:2], "enc_outputs": proposals}
    parts = {f"layer{i}": layer for i, layer in enumerate(layers)} | {"interm": proposals}
    targets = read_targets(rec, f"{case}_")
    if f"{case}_dn_layer0_logits" in rec:
        dn = [predictions(rec, case, f"dn_layer{i}", True) for i in range(3)]
        groups = int(rec[f"{case}_dn_groups"])
        most = max(len(t["labels"]) for t in targets)
        first = torch.arange(groups)[:, None] * 2 * most           # first query of each group
        matches = []
        for target in targets:
            index = torch.arange(len(target["labels"]))
            matches.append(((first + index).flatten(), index.repeat(groups)))
        outputs["dn_outputs"] = {**dn[2], "aux_outputs": dn[:2], "matches": matches,
                                 "groups": groups}
        parts |= {f"dn_layer{i}": layer for i, layer in enumerate(dn)}
    criterion = Criterion(Config(loss_class=1.0))
    losses = criterion(outputs, targets)
    check_losses(rec, losses, f"{case}_", enc="interm")
    check_matches(rec, criterion.match(outputs, targets), "final", f"{case}_")
    sum(losses.values()).backward()
    check_input_gradients(rec, case, parts)


def check_input_gradients(rec, case, parts):
    compared = 0
    for part, prediction in parts.items():
        for kind in ("logits", "boxes"):
            name = f"{case}_{part}_grad_{kind}"
            if name in rec and prediction:
                np.testing.assert_allclose(prediction[f"pred_{kind}"].grad.numpy(), rec[name],
                                           rtol=1e-4, atol=1e-5, err_msg=name)
                compared += 1
    assert compared >= 6


def test_costs_of_all_layers_reach_the_host_in_one_copy(monkeypatch):
    copies = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or cpu(self))
    layer = {"pred_logits": torch.randn(2, 6, 3), "pred_boxes": torch.rand(2, 6, 4)}
    targets = [{"labels": torch.tensor([0, 1]), "boxes": torch.rand(2, 4)}] * 2
    layers = {str(i): layer for i in range(6)}
    SetLoss(COST, COST).match_groups([Group(layers, targets), Group({"enc": layer}, targets, 2)])
    assert len(copies) == 1


def test_a_batch_without_objects_costs_only_background():
    logits = torch.randn(2, 6, 3, requires_grad=True)
    boxes = torch.rand(2, 6, 4, requires_grad=True)
    layer = {"pred_logits": logits, "pred_boxes": boxes}
    targets = [{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}] * 2
    losses = losses_of(layer, targets)
    assert losses["l1"] == 0 and losses["giou"] == 0 and losses["cls"] > 0
    sum(losses.values()).backward()
    assert boxes.grad.abs().sum() == 0 and logits.grad.abs().sum() > 0


def test_losses_of_half_precision_predictions_are_computed_in_float32():
    logits = torch.randn(1, 6, 3).bfloat16()
    boxes = torch.rand(1, 6, 4).bfloat16()
    targets = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[.5, .5, .2, .2]])}]
    half = losses_of({"pred_logits": logits, "pred_boxes": boxes}, targets)
    full = losses_of({"pred_logits": logits.float(), "pred_boxes": boxes.float()}, targets)
    for name, value in half.items():
        assert value.dtype == torch.float32
        assert value == full[name]


def losses_of(layer, targets):
    """{"cls", "l1", "giou"} of one layer."""
    set_loss = SetLoss(COST, COST)
    matches = set_loss.match(layer, targets)
    return set_loss.compute_losses({"": layer}, targets, [matches], count_boxes(targets))
