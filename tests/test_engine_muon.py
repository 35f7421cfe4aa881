"""Muon: orthogonal updates of hidden matrices, AdamW for the rest, saved and restored."""
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

import train
from engine import checkpoints
from engine.muon import (MOMENTUM, POLYNOMIALS, Muon, is_hidden_matrix, orthogonalize,
                         split_groups)
from small_runs import cheap_runs, config, run  # noqa: F401


@pytest.mark.parametrize("shape", [(3, 40, 64), (2, 64, 40), (1, 48, 48)])
def test_orthogonalized_matrices_keep_their_singular_vectors(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalize(x)
    middle = u.mT @ y @ vt.mT       # diagonal if the singular vectors are the same
    values = middle.diagonal(dim1=-2, dim2=-1)
    large = s > 0.2 * s.amax(-1, keepdim=True)
    assert values[large].min() > 0.6 and values.max() < 1.3
    off = middle - torch.diag_embed(values)
    assert off.abs().max() < 0.05 and y.dtype == x.dtype


@pytest.mark.parametrize("shape", [(1, 64, 576), (1, 32, 288), (2, 96, 96), (1, 48, 128)])
def test_matrices_with_a_single_singular_value_are_not_blown_up_by_rounding(shape):
    values = torch.linalg.svdvals(orthogonalize(torch.ones(shape)))
    assert 0.7 < values[:, 0].max() < 1.3


def test_each_polynomial_is_the_best_one_for_the_values_it_gets():
    """A linear program: the coefficients with the smallest largest |1 - p(x)| over the interval."""
    low, high = 0.01, 1.0
    for polynomial in POLYNOMIALS:
        x = np.linspace(low, high, 2000)
        powers = np.stack([x, x ** 3, x ** 5], 1)
        one = np.ones((len(x), 1))
        best = linprog([0, 0, 0, 1], np.block([[powers, -one], [-powers, -one]]),
                       np.concatenate([one, -one]), bounds=[(None, None)] * 3 + [(0, None)])
        np.testing.assert_allclose(polynomial, best.x[:3], rtol=5e-3)
        error = abs(1 - powers @ np.array(polynomial)).max()
        low, high = 1 - error, 1 + error
    assert 0.7 < low and high < 1.3


def test_one_step_is_the_equation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 8))
    before = [p.detach().clone() for p in model.parameters()]
    groups = split_groups([{"params": list(model.parameters()), "lr": 0.01}], model, 3.0)
    assert [group["muon"] for group in groups] == [0.0, 3.0]
    optimizer = Muon(groups, weight_decay=0.1, fused=True)
    adamw = torch.optim.AdamW([p.clone().requires_grad_() for p in before], 0.01, weight_decay=0.1,
                              fused=True)
    model(torch.randn(5, 40)).square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    for p, grad in zip(adamw.param_groups[0]["params"], grads):
        p.grad = grad.clone()
    optimizer.step()
    adamw.step()
    # G (64, 40): M = (1 - mu) G, U = (1 - mu) G + mu M
    update = (1 - MOMENTUM) * (1 + MOMENTUM) * grads[0]
    expected = before[0] * (1 - 0.03 * 0.1) - 0.03 * 0.2 * math.sqrt(64) * orthogonalize(
        update[None])[0]
    torch.testing.assert_close(model[0].weight.detach(), expected, atol=2e-4, rtol=0)
    others = [model[0].bias, model[1].weight, model[1].bias]
    for p, q in zip(others, adamw.param_groups[0]["params"][1:]):
        assert torch.equal(p.detach(), q.detach())


def test_the_memory_order_of_a_convolution_does_not_change_its_step():
    """--channels_last stores kernels, and so their gradients, in NHWC order."""
    results = []
    for order in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Conv2d(32, 64, 3, bias=False).to(memory_format=order)
        groups = split_groups([{"params": list(model.parameters()), "lr": 0.01}], model, 3.0)
        optimizer = Muon(groups, weight_decay=0.1, fused=True)
        model.weight.grad = torch.randn(64, 32, 3, 3).to(memory_format=order)
        optimizer.step()
        results.append(model.weight.detach())
    assert torch.equal(results[0], results[1])


def test_heads_embeddings_and_sampling_offsets_are_not_hidden_matrices():
    for name, shape, expected in (
            ("encoder.0.linear1.weight", (64, 32), True),
            ("backbone.layer1.0.conv1.weight", (48, 32, 3, 3), True),
            ("backbone.conv1.weight", (64, 3, 3, 3), False),
            ("encoder.0.linear1.bias", (64,), False),
            ("tgt_embed.weight", (64, 64), False),
            ("bbox_embed.0.layers.0.weight", (64, 64), True),
            ("bbox_embed.0.layers.2.weight", (4, 64), False),
            ("class_embed.0.weight", (91, 64), False),
            ("roi.cls.weight", (81, 1024), False),
            ("atss.cls.weight", (80, 256, 3, 3), False),
            ("backbone.layers.3.blocks.0.attn.relative_position_bias_table", (169, 48), False),
            ("encoder.0.self_attn.sampling_offsets.weight", (96, 64), False)):
        assert is_hidden_matrix(name, torch.zeros(shape)) == expected, name


def test_a_run_with_muon_resumes_with_the_same_bytes(tmp_path):
    cfg, recipe = config("dino", dim=32, muon=4.0, epochs=1)
    whole = train.train(run(tmp_path, "dino", "whole"), cfg, recipe)
    train.train(run(tmp_path, "dino", "cut", max_steps=2), cfg, recipe)
    state = checkpoints.load(tmp_path / "cut" / "last.pt")
    assert {group["muon"] for group in state["optimizer"]["param_groups"]} == {0.0, 4.0}
    resumed = train.train(run(tmp_path, "dino", "cut", resume=str(tmp_path / "cut" / "last.pt")),
                          cfg, recipe)
    assert whole["AP"] == resumed["AP"]
    a, b = (checkpoints.load(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    for key, x in a["model"].items():
        assert torch.equal(x, b["model"][key]), key
