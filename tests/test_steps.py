"""Whole training steps: the authors' losses, gradients, clipping, AdamW and learning rates.

Recordings 13 hold four steps of the authors' own training loop, two steps an epoch, with the rates
divided by ten after the first epoch. Here train.py's step, the paper's parameter groups and the
schedule run the same steps in float64, from the same weights and images.
"""
import numpy as np
import pytest
import torch

import deformable_detr
import detr
import dino
import h_detr
import recordings
from engine.recipe import Recipe
from recordings import narrow_resnet, settings
from test_detr import recorded_config as detr_config
from test_dino import recorded_config as dino_config
from test_dino import recorded_noise
from test_h_detr import our_order
from test_h_detr import recorded_config as h_detr_config

LOSS = 1e-8       # relative
GRADIENT = 1e-7   # of the gradient's norm, or of a thousandth of the largest norm
VALUE = 1e-10     # of the parameter's norm
CHANGE = 1e-6     # of the change's norm, or of a thousandth of the largest norm


def deformable_config(rec):
    return deformable_detr.Config(**recordings.config_fields(rec))


MODELS = {
    "detr": (detr, detr.DETR, detr_config, "detr"),
    "deformable_plain": (deformable_detr, deformable_detr.DeformableDETR, deformable_config,
                         "deformable_detr"),
    "deformable_two_stage": (deformable_detr, deformable_detr.DeformableDETR, deformable_config,
                             "deformable_detr_two_stage"),
    "dino_4scale": (dino, dino.DINO, dino_config, "dino"),
    "h_detr": (h_detr, h_detr.HDETR, h_detr_config, "h_detr"),
}


def recorded_recipe(rec):
    """The authors' settings as a Recipe."""
    s = settings(rec)
    offsets = s["lr"] * s.get("lr_linear_proj_mult", 1.0)
    return Recipe(lr=s["lr"], lr_backbone=s["lr_backbone"], clip=s["clip_max_norm"],
                  lr_offsets=offsets, weight_decay=s["weight_decay"], epochs=2,
                  schedule="step", lr_drop=s["lr_drop"], warmup=0.0)


@pytest.mark.parametrize("name", MODELS)
def test_four_training_steps_equal_the_authors(golden, monkeypatch, name):
    rec = our_order(golden(f"13_steps_{name}"))
    paper, architecture, config, family = MODELS[name]
    cfg = config(rec)
    model = architecture(narrow_resnet(), cfg, 11)
    recordings.load(model, recordings.weights(rec), family, torch.float64)
    run = recordings.TrainingRun(paper, model, paper.Criterion(cfg), recorded_recipe(rec))
    names = rec["param_names"].tolist()
    check_values(rec, 0, named(model, family, lambda p: p.detach().clone(), names))

    for i in range(4):
        prefix = f"step{i + 1}."
        step = {key.removeprefix(prefix): x for key, x in rec.items() if key.startswith(prefix)}
        if name.startswith("dino"):
            noise = recorded_noise(step, cfg.dn_label_noise, torch.float64)
            monkeypatch.setattr(dino, "draw_noise", noise)
        images, padding = recordings.images_and_padding(step, torch.float64, None)
        targets = recordings.read_targets(step, dtype=torch.float64)
        before = named(model, family, lambda p: p.detach().clone(), names)

        losses, norm = run.step(i, steps_per_epoch=2, batch=(images, padding, targets))

        encoder = "interm" if paper is dino else "enc"
        recordings.check_losses(step, losses, rtol=LOSS, enc=encoder, atol=LOSS)
        assert float(norm) == pytest.approx(float(step["grad_total_norm"]), rel=LOSS)
        check_rates(rec, i, run, names, family)
        check_gradients(rec, i, named(model, family, lambda p: p.grad, names), float(norm))
        after = named(model, family, lambda p: p.detach().clone(), names)
        check_values(rec, i + 1, after)
        changes = {n: after[n] - before[n] for n in names}
        check_rows(rec, i, "delta", changes, CHANGE)
        check_moments(rec, i, run, names, family)


def named(model, family, value, names):
    """value(parameter) of every trainable parameter under the authors' names, each once."""
    ours = {n: value(p) for n, p in model.named_parameters(remove_duplicate=False)
            if p.requires_grad}
    theirs = recordings.authors_names.to_authors(ours, family)
    return {n: theirs[n].double() for n in names}


def wave(value):
    """The projection that the recordings use: with cos(0.7 (i + 1))."""
    flat = value.flatten().numpy()
    return flat @ np.cos(0.7 * (np.arange(flat.size) + 1.0))


def check_rows(rec, row, kind, values, tolerance):
    """Norm and projection of every value, relative to its norm or a thousandth of the largest."""
    norms = rec[f"{kind}_norm"][row]
    for name, norm, dot in zip(rec["param_names"].tolist(), norms, rec[f"{kind}_dot"][row]):
        scale = tolerance * max(norm, norms.max() / 1000)
        assert abs(float(values[name].norm()) - norm) < scale, f"{kind}_norm of {name}, row {row}"
        assert abs(wave(values[name]) - dot) < scale, f"{kind}_dot of {name}, row {row}"


def check_values(rec, row, values):
    """Norm and projection of every parameter, relative to its norm."""
    columns = zip(rec["param_names"].tolist(), rec["param_norm"][row], rec["param_dot"][row])
    for name, norm, dot in columns:
        assert abs(float(values[name].norm()) - norm) <= VALUE * norm, f"{name}, row {row}"
        assert abs(wave(values[name]) - dot) <= VALUE * norm, f"{name}, row {row}"


def check_gradients(rec, row, clipped, norm):
    """The step leaves clipped gradients; the recording's are those before clipping."""
    factor = min(1.0, 0.1 / (norm + 1e-6))
    total = float(torch.stack([g.norm() for g in clipped.values()]).norm())
    assert total == pytest.approx(float(rec[f"step{row + 1}.clipped_total_norm"]), rel=LOSS)
    check_rows(rec, row, "grad", {n: g / factor for n, g in clipped.items()}, GRADIENT)


def check_rates(rec, row, run, names, family):
    """Every parameter is in the authors' group, with its learning rate and weight decay."""
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    decay = {group["weight_decay"] for group in run.optimizer.param_groups}
    ours = named(run.model, family, lambda p: torch.full(p.shape, rates[id(p)]).double(), names)
    for name, group in zip(names, rec["param_group"]):
        assert ours[name].unique().tolist() == pytest.approx([rec["lr"][row][group]]), name
    assert decay == set(rec["group_weight_decay"].tolist())
    assert len(rates) == len(names)


def check_moments(rec, row, run, names, family):
    """Adam's moments, which show whether gradients were clipped."""
    state = run.optimizer.state
    for key, kind in (("exp_avg", "adam_m_norm"), ("exp_avg_sq", "adam_v_norm")):
        values = named(run.model, family, lambda p: state[p][key], names)
        norms = rec[kind][row]
        for name, norm in zip(names, norms):
            difference = abs(float(values[name].norm()) - norm)
            assert difference <= CHANGE * max(norm, norms.max() / 1000), f"{kind} of {name}"
