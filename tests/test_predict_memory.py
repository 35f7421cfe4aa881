"""tools/predict_memory.py: bytes saved for the backward pass, counted without values."""
import contextlib
import functools
import importlib

import pytest

from backbones import resnet
from engine.errors import UserError
from engine.recipe import Recipe, configure
from tools import predict_memory

TINY = dict(dim=32, num_heads=2, ffn_dim=32, encoder_layers=2, decoder_layers=2, num_queries=30,
            dropout=0.0)


@pytest.fixture(autouse=True)
def narrow_resnet50(monkeypatch):
    blocks = (3, 4, 6, 3)
    narrow = functools.partial(resnet.ResNet, resnet.Bottleneck, blocks, (8, 16, 24, 32), 8)
    monkeypatch.setitem(resnet.RESNETS, "resnet50", narrow)


def no_attention(q, k, v, *args, **kwargs):
    return q + k.mean() + v.mean()


def count(name, recompute):
    paper = importlib.import_module(name)
    cfg, _ = configure(paper, TINY)
    return predict_memory.count(paper, cfg, (96, 128), recompute)


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("name", ("detr", "deformable_detr", "dino", "h_detr"))
def test_the_count_without_values_is_near_that_of_a_real_forward_pass(monkeypatch, name, recompute):
    """Without attention: what that saves on a CPU depends on masks and values. The weights of heads
    in float32, a small part of real models, are counted a second time where there are no values."""
    monkeypatch.setattr(predict_memory, "fused_attention", no_attention)
    expected = count(name, recompute)
    monkeypatch.setattr(predict_memory, "FakeTensorMode", lambda **_: contextlib.nullcontext())
    assert count(name, recompute) == pytest.approx(expected, rel=0.04)


def test_recomputing_and_smaller_images_need_less_memory():
    paper = importlib.import_module("dino")
    cfg, _ = configure(paper, TINY, dict(denoising="none"))
    large = predict_memory.predict(paper, cfg, Recipe(ema=0.9), (192, 256))
    small = predict_memory.predict(paper, cfg, Recipe(), (96, 128))
    assert large.recomputed < 0.85 * large.image
    assert 2.5 < large.image / small.image < 4.5
    assert large.model == 1.25 * small.model


def test_every_detector_is_predicted(capsys):
    predict_memory.main(["co_detr", "24_epochs"])
    assert "co_detr          24_epochs" in capsys.readouterr().out


def test_help_shows_how_to_name_a_recipe(capsys):
    with pytest.raises(SystemExit, match="0"):
        predict_memory.main(["--help"])
    assert "PAPER" in capsys.readouterr().out


def test_other_names_are_refused():
    with pytest.raises(UserError, match="expected one of detr, .* got 'yolo'"):
        predict_memory.recipes(["yolo"])
    with pytest.raises(UserError, match="expected a variant of dino .5scale, .* got 'vit_l'"):
        predict_memory.recipes(["dino", "vit_l"])
