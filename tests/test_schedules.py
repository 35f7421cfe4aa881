"""engine/schedules.py: averages, other lengths of a run, learning rates by depth."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import co_detr
import dino
import train
from engine.recipe import Recipe, configure
from engine.ema import ema_decay
from engine.schedules import layer_groups, other_length


def test_the_average_of_vit_l_follows_the_authors_momentum():
    """m_t = (1 - 1e-4) exp(-(1 + t) / 2000) + 1e-4: 0.99988 of the average stays at step 22,000."""
    _, recipe = configure(co_detr, co_detr.VARIANTS["vit_l"])
    decay = [ema_decay(recipe.ema, recipe.ema_warmup, step) for step in (0, 1999, 22_000, 200_000)]
    assert decay == pytest.approx([0.0004998, 0.632057, 0.999883, 0.9999], abs=1e-6)


def test_other_averages_rise_from_a_tenth():
    assert ema_decay(0.998, 0, 0) == 0.1
    assert ema_decay(0.998, 0, 90) == pytest.approx(0.91)
    assert ema_decay(0.998, 0, 1_000_000) == 0.998


def test_another_length_is_published_or_moves_the_drop_in_proportion():
    variants = {"24_epochs": {"lr_drop": 20}, "big_24_epochs": {"lr_drop": 21}}
    paper = SimpleNamespace(VARIANTS=variants)
    recipe = Recipe(epochs=12, lr_drop=11)
    changes, text = other_length(paper, "", recipe, 24)
    assert changes == {"lr_drop": 20} and text == "--epochs 24: the published recipe 24_epochs"
    assert other_length(paper, "big", recipe, 24)[0] == {"lr_drop": 21}
    changes, text = other_length(paper, "big", recipe, 36)
    assert changes == {"lr_drop": 33} and "no published recipe of this length" in text
    assert other_length(SimpleNamespace(), "", recipe, 1)[0] == {"lr_drop": 1}
    assert other_length(paper, "big", recipe, 12) == ({}, "")


def test_a_drop_moves_only_in_the_schedule_that_has_one():
    _, recipe = configure(dino, dino.SMALL)
    assert recipe.schedule == "cosine"
    changes, text = other_length(SimpleNamespace(), "", recipe, 30)
    assert changes == {} and "lr" not in text


def test_a_variant_of_another_length_takes_the_main_recipe_where_that_is_asked_for():
    variants = {"24_epochs": {"epochs": 24, "lr_drop": 20}, "big": {"drop_path": 0.3},
                "big_24_epochs": {"drop_path": 0.5, "epochs": 24, "lr_drop": 20}}
    paper = SimpleNamespace(VARIANTS=variants, RECIPE=Recipe(epochs=12, lr_drop=11))
    recipe = Recipe(epochs=24, lr_drop=20)
    changes, text = other_length(paper, "24_epochs", recipe, 12)
    assert changes == {"epochs": 12, "lr_drop": 11}
    assert text == "--epochs 12: the published recipe of the paper"
    changes, text = other_length(paper, "big_24_epochs", recipe, 12)
    assert changes == {"drop_path": 0.3, "epochs": 12, "lr_drop": 11}
    assert other_length(paper, "big_24_epochs", recipe, 48)[0] == {"lr_drop": 40}


def test_a_drop_that_is_given_stays_and_is_said(capsys):
    words = ["--model=dino", "--preset=paper", "--epochs=24", "--lr_drop=22"]
    _, _, recipe = train.parse(words)
    assert (recipe.epochs, recipe.lr_drop) == (24, 22)
    said = capsys.readouterr().out.strip()
    assert said == "--epochs 24: the published recipe 24_epochs, but --lr_drop 22"


def test_learning_rates_fall_towards_the_image():
    model = nn.Module()
    model.trunk = nn.Module()
    model.trunk.pos_embed = nn.Parameter(torch.zeros(2, 2))
    model.trunk.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    model.head = nn.Linear(2, 2)
    model.head.bias.requires_grad_(False)
    groups = layer_groups(model, "trunk.", Recipe(lr=1.0, layer_decay=0.5, weight_decay=0.1))
    rates = {}
    for group in groups:
        for parameter in group["params"]:
            rates[id(parameter)] = (group["lr"], group["weight_decay"])
    named = {name: rates.get(id(p)) for name, p in model.named_parameters()}
    assert named == {"trunk.pos_embed": (0.125, 0.1), "trunk.blocks.0.weight": (0.25, 0.1),
                     "trunk.blocks.0.bias": (0.25, 0.0), "trunk.blocks.1.weight": (0.5, 0.1),
                     "trunk.blocks.1.bias": (0.5, 0.0), "head.weight": (1.0, 0.1),
                     "head.bias": None}
