"""matcher.py: the cheapest assignment, and the losses it is charged with."""
import itertools

import numpy as np
import pytest
import torch

from matcher import SetLoss, Weights, count_boxes, focal_loss, hungarian, match_cost
from recordings import check_losses, check_matches, read_targets, tensor

COST = Weights(2.0, 5.0, 2.0)
EPS = {"deformable_detr": 0.0, "dino": 1e-6}


@pytest.mark.parametrize("case", "abcd")
@pytest.mark.parametrize("model", EPS)
def test_costs_and_matches_equal_the_authors(golden, case, model):
    rec = golden("05_matcher")
    targets = read_targets(rec, f"{case}_")
    logits, boxes = tensor(rec[f"{case}_logits"])[None], tensor(rec[f"{case}_boxes"])[None]
    cost = match_cost(logits, boxes, targets, COST, EPS[model])
    counts = [len(t["labels"]) for t in targets]
    start = 0
    for image, n in enumerate(counts):
        expected = rec[f"{case}_cost_{model}"][image, :, start:start + n]
        np.testing.assert_allclose(cost[0, image, :, :n].numpy(), expected, rtol=1e-4, atol=1e-5)
        start += n
    check_matches({k.replace(f"_{model}", "_x"): v for k, v in rec.items()}, hungarian([cost], [counts])[0][0], "x",
                  f"{case}_")


def test_the_assignment_is_the_brute_force_optimum():
    cost = torch.randn(1, 1, 5, 3, generator=torch.Generator().manual_seed(0))
    query, index = hungarian([cost], [[3]])[0][0][0]
    best = min(itertools.permutations(range(5), 3), key=lambda p: sum(cost[0, 0, q, j] for j, q in enumerate(p)))
    assert [int(query[index == j]) for j in range(3)] == list(best)


def test_more_objects_than_queries_match_every_query_once():
    query, index = hungarian([torch.rand(1, 1, 3, 7)], [[7]])[0][0][0]
    assert sorted(query.tolist()) == [0, 1, 2] and len(set(index.tolist())) == 3


def test_groups_with_different_objects_are_matched_each_to_its_own():
    prediction = {"pred_logits": torch.randn(1, 9, 4), "pred_boxes": torch.rand(1, 9, 4)}
    targets = [{"labels": torch.tensor([0, 3]), "boxes": torch.rand(2, 4)}]
    many = [{"labels": t["labels"].repeat(3), "boxes": t["boxes"].repeat(3, 1)} for t in targets]
    set_loss = SetLoss(COST, COST)
    together = set_loss.match(([prediction], targets), ([prediction], many))
    for matches, objects in zip(together, (targets, many)):
        (query, index), = matches[0]
        (expected, to), = set_loss.match(([prediction], objects))[0][0]
        assert len(query) == len(objects[0]["labels"]) and torch.equal(query, expected) and torch.equal(index, to)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_cost_that_is_not_finite_is_avoided(value):
    cost = torch.zeros(1, 1, 3, 2)
    cost[0, 0, 1] = value
    query, _ = hungarian([cost], [[2]])[0][0][0]
    assert query.tolist() == [0, 2]


def test_focal_sum_equals_the_hand_computed_figure():
    logits = torch.tensor([[-4.59512, 0.0, 2.0]])
    assert torch.isclose(focal_loss(logits, torch.tensor([1])).sum(), torch.tensor(1.280881), atol=1e-5)


def predictions(rec, case, name, grad):
    return {f"pred_{x}": tensor(rec[f"{case}_{name}_{x}"]).requires_grad_(grad) for x in ("logits", "boxes")}


@pytest.mark.parametrize("case", "abc")
def test_losses_matches_and_gradients_equal_deformable_detrs(golden, case):
    from deformable_detr import Config, Criterion
    for name in ("06_losses_deformable", "06_losses_deformable_two_stage"):
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
        parts = {f"layer{i}": layer for i, layer in enumerate(layers)} | {"enc": outputs.get("enc_outputs", {})}
        check_input_gradients(rec, case, parts)


@pytest.mark.parametrize("case", ["a", "b", "c", "nodn"])
def test_losses_matches_and_gradients_equal_dinos(golden, case):
    from dino import Config, Criterion
    rec = golden("06_losses_dino")
    layers = [predictions(rec, case, f"layer{i}", True) for i in range(3)]
    outputs = {**layers[2], "aux_outputs": layers[:2], "enc_outputs": predictions(rec, case, "interm", True)}
    targets = read_targets(rec, f"{case}_")
    parts = {f"layer{i}": layer for i, layer in enumerate(layers)} | {"interm": outputs["enc_outputs"]}
    if f"{case}_dn_layer0_logits" in rec:
        dn = [predictions(rec, case, f"dn_layer{i}", True) for i in range(3)]
        groups, fullest = int(rec[f"{case}_dn_groups"]), max(len(t["labels"]) for t in targets)
        slots = torch.arange(groups)[:, None] * 2 * fullest
        matches = [((slots + torch.arange(len(t["labels"]))).flatten(), torch.arange(len(t["labels"])).repeat(groups))
                   for t in targets]
        outputs["dn_outputs"] = {**dn[2], "aux_outputs": dn[:2], "matches": matches, "groups": groups}
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
                np.testing.assert_allclose(prediction[f"pred_{kind}"].grad.numpy(), rec[name], rtol=1e-4, atol=1e-5,
                                           err_msg=name)
                compared += 1
    assert compared >= 6


def test_costs_of_all_layers_reach_the_host_in_one_copy(monkeypatch):
    copies = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or cpu(self))
    layer = {"pred_logits": torch.randn(2, 6, 3), "pred_boxes": torch.rand(2, 6, 4)}
    targets = [{"labels": torch.tensor([0, 1]), "boxes": torch.rand(2, 4)}] * 2
    SetLoss(COST, COST).match(([layer] * 6, targets), ([layer], targets))
    assert len(copies) == 1


def test_an_unfinished_batch_without_objects_costs_only_background():
    layer = {"pred_logits": torch.randn(2, 6, 3, requires_grad=True), "pred_boxes": torch.rand(2, 6, 4, requires_grad=True)}
    targets = [{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}] * 2
    loss = SetLoss(COST, COST)
    losses = loss.price({"": layer}, targets, loss.match(([layer], targets))[0], count_boxes(targets))
    assert losses["l1"] == 0 and losses["giou"] == 0 and losses["cls"] > 0
    sum(losses.values()).backward()
    assert layer["pred_boxes"].grad.abs().sum() == 0 and layer["pred_logits"].grad.abs().sum() > 0


def test_half_precision_predictions_are_priced_in_float32():
    layer = {"pred_logits": torch.randn(1, 6, 3).bfloat16(), "pred_boxes": torch.rand(1, 6, 4).bfloat16()}
    targets = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[.5, .5, .2, .2]])}]
    loss = SetLoss(COST, COST)
    full = {k: v.float() for k, v in layer.items()}
    for a, b in zip(loss.price({"": layer}, targets, loss.match(([layer], targets))[0], 1.0).values(),
                    loss.price({"": full}, targets, loss.match(([full], targets))[0], 1.0).values()):
        assert a.dtype == torch.float32 and a == b
