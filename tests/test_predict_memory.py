"""tools/predict_memory.py: bytes saved for the backward pass, counted without values."""
import contextlib
import functools
import importlib

import pytest

from backbones import resnet
from engine.recipe import Recipe, configure
from tools import predict_memory

TINY = dict(dim=32, num_heads=2, ffn_dim=32, encoder_layers=2, decoder_layers=2, num_queries=30,
            dropout=0.0)


@pytest.fixture(autouse=True)
def narrow_resnet50(monkeypatch):
    blocks = (3, 4, 6, 3)
    narrow = functools.partial(resnet.ResNet, resnet.Bottleneck, blocks, (8, 16, 24, 32), 8)
    monkeypatch.setitem(resnet.RESNETS, "resnet50", narrow)


# Without a mask: with one, attention on a CPU is not fused and saves its matrix.
UNMASKED = {"detr": {}, "deformable_detr": {}, "dino": dict(denoising="none"),
            "h_detr": dict(num_queries_one2many=0)}


def count(name, recompute):
    paper = importlib.import_module(name)
    cfg, _ = configure(paper, TINY | UNMASKED[name])
    return predict_memory.count(paper, cfg, (96, 128), recompute)


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("name", UNMASKED)
def test_the_count_without_values_equals_that_of_a_real_forward_pass(monkeypatch, name, recompute):
    expected = count(name, recompute)
    monkeypatch.setattr(predict_memory, "FakeTensorMode", lambda **_: contextlib.nullcontext())
    assert count(name, recompute) == expected


def test_recomputing_and_smaller_images_need_less_memory():
    paper = importlib.import_module("dino")
    cfg, _ = configure(paper, TINY)
    large = predict_memory.predict(paper, cfg, Recipe(ema=0.9), (192, 256))
    small = predict_memory.predict(paper, cfg, Recipe(), (96, 128))
    assert large.recomputed < 0.75 * large.image
    assert 3 < large.image / small.image < 4.5
    assert large.model == 1.25 * small.model


def test_every_detector_is_predicted(capsys):
    predict_memory.main(["co_detr", "24_epochs"])
    assert "co_detr          24_epochs" in capsys.readouterr().out
