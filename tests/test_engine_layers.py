"""--compile, --recompute and --freeze."""

import functools

import pytest
import torch

from engine import batch_norm
from engine import layers
from engine import models
from engine.datasets import build_datasets
from engine.ema import make_ema
from engine.errors import UserError
from engine.machine import Machine
from engine.ranges import check_ranges
import backbones
import data
import dino
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


# ---- --freeze ------------------------------------------------------------------------------------

def test_a_frozen_backbone_keeps_weights_and_statistics_while_the_rest_learns():
    cfg, recipe = config("dino")
    torch.manual_seed(0)
    model, criterion = dino.build(cfg, 8)
    assert layers.freeze_backbone(model) == ["backbone is frozen"]
    ema = make_ema(model, 0.9)
    optimizer = torch.optim.AdamW(dino.param_groups(model, recipe), fused=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scenes, _ = build_datasets(None, recipe, 0, num_train=4, num_val=1)
    model.train()
    batch = data.collate([scenes[i] for i in range(4)])
    *_, finite = train.step(model, model, criterion, optimizer, ema, [batch], 1.0, Machine())
    assert finite and not model.backbone.training and model.training
    changed = {name.partition(".")[0] for name, value in model.state_dict().items()
               if not torch.equal(value, before[name])}
    assert "backbone" not in changed and {"encoder", "decoder"} <= changed
    assert ema.module.backbone is not model.backbone
    assert ema.module.backbone.train() is ema.module.backbone     # bound to the copy


def test_freezing_a_random_backbone_or_none_is_refused(tmp_path):
    run = train.Run(model="dino", freeze="backbone", device="cpu")
    cfg, _ = config("dino")
    with pytest.raises(UserError, match="expected trained weights with --freeze backbone, got ran"):
        models.make_model(run, dino, cfg, ["a"], Machine())
    with pytest.raises(UserError, match="expected a module named backbone"):
        layers.freeze_backbone(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="expected --freeze backbone, got 'encoder'"):
        check_ranges(train.Run(freeze="encoder"))
