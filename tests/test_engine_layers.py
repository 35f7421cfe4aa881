"""--compile and --recompute."""

import functools

import pytest
import torch

from engine import batch_norm
from engine import layers
import backbones
import train
from small_runs import cheap_runs, config, MODELS, same, step_of  # noqa: F401

TRANSFORMERS = {  # table, small sizes under a published name, what else the model needs
    "swin_t": ("SWINS", (8, (2, 2, 2, 2), (1, 2, 2, 4), 3), {}),
    "vit_l": ("VITS", (32, 4, 2, 3, 2), dict(dim=256, num_feature_levels=5, aux_heads="none")),
    "focalnet_l_3level": ("FOCALNETS", (8, (1, 1, 2, 1), 2, 3), {}),
}


@pytest.mark.parametrize(
    "model, backbone",
    [
        *((model, "tiny") for model in MODELS),
        ("dino", "swin_t"),
        ("co_detr", "vit_l"),
        ("dino", "focalnet_l_3level"),
    ],
)
def test_recompute_gives_the_same_bytes_for_less_memory(monkeypatch, model, backbone):
    """Gradients, with dropout and stochastic depth, and batch statistics, which would else count
    every batch twice."""
    changes = dict(dropout=0.3)
    if backbone in TRANSFORMERS:
        table, sizes, needed = TRANSFORMERS[backbone]
        monkeypatch.setitem(getattr(backbones, table), backbone, sizes)
        changes |= dict(backbone=backbone, drop_path=0.3, **needed)
    plain, statistics, much = step_of(model, *config(model, **changes))
    again, again_statistics, little = step_of(
        model, *config(model, **changes), settings=train.Run(recompute=True)
    )
    same(plain, again)
    same(statistics, again_statistics)
    assert little < 0.6 * much, (little, much)


@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_a_compiled_step_equals_an_eager_one(monkeypatch, backend, model="dino"):
    """Encoder layers, decoder layers and backbone blocks, each traced as a whole, also when
    recomputed. The quick form stops before machine code is made, the slow one compiles with the
    default backend."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    cfg = config(model, dropout=0.0, decoder_layers=1)
    eager, statistics, _ = step_of(model, *cfg)
    for recompute in (False, True):
        compiled, compiled_statistics, _ = step_of(
            model, *cfg, settings=train.Run(compile=True, recompute=recompute)
        )
        for name, gradient in eager.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(
                compiled[name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name
            )
        torch.testing.assert_close(compiled_statistics, statistics, rtol=1e-4, atol=1e-5)


def test_recompute_refuses_a_model_without_parts():
    with pytest.raises(ValueError, match="got none in dino"):
        layers.compile_or_recompute(torch.nn.Linear(1, 1), train.Run(recompute=True))


def test_statistics_of_a_frozen_part_are_not_among_those_that_change():
    """Averaged over ranks, its bytes could change by rounding."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2))
    model[0].eval()
    changed = batch_norm.batch_statistics(model)
    model(torch.rand(4, 2))
    assert [b is kept for b, kept in zip(model[1].buffers(), changed, strict=True)] == [True] * 3
