"""Fidelity without the recordings: figures that the authors' code gave for small models.

The figures are literals. Weights, inputs and objects are hashed (`hashed`). The tolerances are
those that the recordings state. All but the last test run in a clone of this repository alone.
"""
import importlib
from typing import NamedTuple

import numpy as np
import pytest
import torch

from engine.recipe import override
from engine import authors_names
import co_detr
from heads import anchors
import dino
import hashed
from recordings import GivenMaps, narrow_resnet

SIZES = dict(dim=32, num_heads=4, encoder_layers=2, decoder_layers=3, ffn_dim=48, dropout=0.0,
             num_queries=20, backbone_weights="imagenet")
CO = {**SIZES, "num_heads": 8, "decoder_layers": 2, "num_queries": 30, "rpn_pre_nms": 200,
      "rpn_proposals": 80, "rpn_samples": 64, "roi_samples": 48, "roi_dim": 40, "dn_number": 50,
      "aux_queries": 12}
ENCODER = "encoder.0.self_attn.sampling_offsets.weight"
DECODER = "decoder.1.cross_attn.attention_weights.weight"
DETECTORS = {"deformable_detr": "DeformableDETR", "dino": "DINO", "h_detr": "HDETR",
             "co_detr": "CoDETR"}


class Figures(NamedTuple):
    """What is run and what must come out.

    What is run: family of checkpoints, Config, hash seed, channels of the given maps (none: a
    narrow ResNet), objects per image, height and width of the second image (the first: 96 x 128),
    training mode.

    What must come out: three logits of the first layer (second image, last query) and of the last
    (first image, first query), the mean of all |logits|, these two queries' boxes of the last
    layer, losses and gradient norms.
    """
    family: str
    config: dict
    seed: int
    logits: list
    mean: float
    boxes: list
    losses: dict
    gradients: dict = {}
    channels: tuple = (8, 12, 16)
    counts: tuple = (3, 5)
    second: tuple = (40, 60)
    train: bool = True


AUTHORS = {
    "deformable_plain": Figures(
        "deformable_detr", {}, 800,
        [-1.71608, -2.86147, -1.52266, -1.79119, -1.74642, -0.47605], 2.204133,
        [0.792481, 0.739802, 0.38666, 0.437337, 0.853333, 0.369761, 0.40416, 0.202027],
        {"cls": 2.821318, "l1": 4.475003, "giou": 2.298749, "aux0.giou": 2.775174,
         "total": 30.14178},
        {ENCODER: 2.86598, DECODER: 1.56650, "class_embed.0.weight": 24.3937}),
    "deformable_single_scale": Figures(
        "deformable_detr", dict(num_feature_levels=1), 1115,
        [-0.56701, -2.88967, -1.67069, -3.51133, -1.51435, -2.09516], 2.178141,
        [0.451938, 0.521903, 0.257008, 0.299346, 0.231657, 0.791644, 0.083237, 0.270879],
        {"cls": 2.366327, "l1": 4.063991, "giou": 2.427632, "total": 27.24288},
        {ENCODER: 8.32511}, channels=(16,)),
    "deformable_refine": Figures(
        "deformable_detr_refine", dict(with_box_refine=True), 2260,
        [-3.45336, -2.47146, -1.04479, -0.37684, -1.68548, -2.42088], 2.083275,
        [0.137502, 0.985482, 0.788673, 0.654881, 0.091377, 0.723259, 0.995006, 0.908176],
        {"cls": 1.373108, "l1": 7.000870, "giou": 1.960934, "aux1.cls": 3.342070,
         "total": 31.18921},
        {ENCODER: 2.57383, DECODER: 1.46855, "class_embed.0.weight": 6.66574}),
    "deformable_two_stage": Figures(
        "deformable_detr_two_stage", dict(with_box_refine=True, two_stage=True), 2049,
        [-1.61871, -2.92704, -2.55783, -1.21942, -1.3118, -0.70844], 1.917927,
        [0.012233, 0.854896, 0.296338, 0.068366, 0.002781, 0.996356, 0.385028, 0.171523],
        {"cls": 4.696977, "l1": 5.624377, "giou": 3.031523, "enc.cls": 35.43965,
         "enc.l1": 2.855311, "total": 76.05396},
        {ENCODER: 9.02223, DECODER: 1.96841, "class_embed.0.weight": 18.56937}),
    "deformable_dc5": Figures(
        "deformable_detr",
        dict(num_feature_levels=1, dilation=True, encoder_layers=1, decoder_layers=2), 970,
        [-2.29905, 0.33423, -0.41797, -1.28562, -2.57366, -0.83324], 2.004631,
        [0.605353, 0.555145, 0.436344, 0.439873, 0.277914, 0.623186, 0.1829, 0.576071],
        {"cls": 3.183976, "l1": 4.063048, "giou": 1.793880, "total": 20.03944},
        {ENCODER: 6.46982, "backbone.layer2.0.conv1.weight": 1.05696}, channels=()),
    "dino_4scale": Figures(
        "dino", {}, 1205,
        [0.35585, -2.41671, -1.69094, -1.08984, -1.18966, -2.37541], 1.977001,
        [0.012509, 0.041352, 0.940856, 0.015538, 0.671605, 0.566764, 0.991069, 0.167087],
        {"cls": 1.670847, "l1": 3.468652, "giou": 2.480549, "enc.cls": 2.605935,
         "enc.l1": 5.053598, "total": 32.91997},
        train=False),
    "dino_5scale": Figures(
        "dino", dict(num_feature_levels=5), 1630,
        [-2.13668, -2.74577, -3.22039, -1.83946, -1.10661, -0.00736], 1.5763,
        [0.002171, 0.99962, 0.00003, 0.00042, 0.00338, 0.999847, 0.000027, 0.000221],
        {"cls": 3.094959, "l1": 9.976866, "giou": 3.348511, "aux0.cls": 2.432824,
         "enc.giou": 2.783341},
        channels=(6, 8, 12, 16), train=False),
    "dino_without_objects": Figures(
        "dino", {}, 1509,
        [-1.54542, -2.06242, -2.95949, -3.28121, -5.58814, -1.6346], 2.012212,
        [0.801371, 0.993803, 0.044433, 0.068545, 0.411597, 0.999611, 0.089566, 0.533108],
        {"cls": 6.294818, "l1": 0.0, "aux0.cls": 12.95141, "enc.cls": 34.91187, "total": 67.70490},
        {ENCODER: 16.78845, DECODER: 2.48339, "label_enc.weight": 0.0}, counts=(0, 0)),
    "h_detr": Figures(
        "h_detr",
        dict(num_queries=12, num_queries_one2many=24, k_one2many=3, lambda_one2many=0.5), 1710,
        [-2.63706, -2.0995, -3.68585, -2.24673, -2.87238, -1.6451], 2.127988,
        [0.034588, 0.763094, 0.222258, 0.161279, 0.373595, 0.950307, 0.074714, 0.037117],
        {"cls": 1.572174, "l1": 3.126657, "giou": 2.554850, "many.cls": 0.606662,
         "many.aux0.giou": 1.376630, "enc.cls": 34.87379, "total": 78.73398},
        {ENCODER: 15.28288, DECODER: 2.57421}, second=(64, 88)),
}


def hashed_model(run):
    """The model with hashed weights under the authors' names, and its criterion."""
    layout = authors_names.FAMILIES[run.family]
    paper = importlib.import_module(layout.model_name)
    sizes = CO if paper is co_detr else SIZES
    cfg = override(paper.Config(), {**layout.overrides, **sizes, **run.config})
    finest = 16 if len(run.channels) == 1 else 2 ** (6 - len(run.channels))
    maps = []
    for level, channels in enumerate(run.channels):
        stride = finest << level
        maps.append(hashed.feature(level, (2, channels, 96 // stride, 128 // stride), run.seed))
    backbone = GivenMaps(maps) if maps else narrow_resnet(cfg.dilation)
    model = getattr(paper, DETECTORS[paper.__name__])(backbone, cfg, 11)
    names = authors_names.to_authors(model.state_dict(), run.family)
    weights = {name: hashed.weight(name, x.shape, run.seed, layout.tied)
               for name, x in names.items()}
    model.load_state_dict(authors_names.from_authors(weights, run.family))
    return model, paper.Criterion(cfg)


def hashed_batch(run):
    """Images, padding and targets."""
    images = torch.zeros(2, 3, 96, 128)
    padding = torch.ones(2, 96, 128, dtype=torch.bool)
    for i, (h, w) in enumerate(((96, 128), run.second)):
        images[i, :, :h, :w] = hashed.image(i, h, w, run.seed)
        padding[i, :h, :w] = False
    targets = [hashed.objects(i, count, 11, run.seed) for i, count in enumerate(run.counts)]
    return images, padding, targets


def check(run, model, criterion, images, padding, targets):
    outputs = model.train(run.train)(images, padding, targets)
    layers = [*outputs["aux_outputs"], outputs]
    first = layers[0]
    last = layers[-1]
    everything = torch.cat([layer["pred_logits"].detach().flatten() for layer in layers])
    found = torch.cat((first["pred_logits"][1, -1, :3], last["pred_logits"][0, 0, :3]))
    np.testing.assert_allclose(found.detach(), run.logits, rtol=0, atol=2e-4)
    assert float(everything.abs().mean()) == pytest.approx(run.mean, abs=2e-5)
    found = torch.cat((last["pred_boxes"][1, -1], last["pred_boxes"][0, 0]))
    np.testing.assert_allclose(found.detach(), run.boxes, rtol=0, atol=5e-5)
    losses = criterion(outputs, targets)
    total = sum(losses.values())
    for name, value in run.losses.items():
        assert float(losses.get(name, total).detach()) == pytest.approx(value, rel=1e-5), name
    if run.gradients:
        total.backward()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in run.gradients.items():
        assert float(parameters[name].grad.norm()) == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize("name", AUTHORS)
def test_small_models_give_the_figures_of_the_authors(name):
    run = AUTHORS[name]
    check(run, *hashed_model(run), *hashed_batch(run))


OURS = {
    "co_dino": Figures(
        "co_dino", {}, 31,
        [-1.148109, 0.262893, 0.515285, -0.088771, -1.645052, -1.947591], 0.744951,
        [0.523709, 0.02345, 0.022716, 0.047642, 0.350609, 0.109604, 0.023199, 0.037263],
        {"cls": 25.37930, "enc.cls": 48.63662, "dn.aux0.cls": 12.65910, "rpn.l1": 1.099976,
         "rcnn.giou": 1.846497, "atss.cls": 284.3122, "rcnn.queries.cls": 2.571886,
         "atss.queries.l1": 2.834545, "total": 498.0969},
        {"detector." + ENCODER: 13.01705, "detector." + DECODER: 3.70944,
         "rpn.conv.weight": 5.10510, "atss.cls.weight": 750.513,
         "aux_queries.atss.pos_trans.weight": 17.94707}, channels=(8, 12, 16, 24)),
    "co_deformable": Figures(
        "co_deformable", dict(num_feature_levels=4), 32,
        [-0.885401, -0.430831, 0.269699, -0.255954, -0.089239, -1.40121], 0.85172,
        [0.99999, 0.999987, 0.999985, 0.999985, 0.258484, 0.037027, 0.167701, 0.094136],
        {"cls": 40.42455, "enc.cls": 351.5482, "rpn.cls": 2.446201, "rcnn.cls": 11.51107,
         "atss.centerness": 3.255815, "rcnn.queries.l1": 2.905833, "atss.queries.cls": 5.224502,
         "total": 666.0033},
        {"detector." + ENCODER: 21.40448, "detector." + DECODER: 3.17381,
         "roi.fc1.weight": 19.11720, "aux_queries.atss.pos_trans.weight": 24.91559},
        channels=(12, 16, 24)),
}


def hashed_noise(copies, objects, num_classes, device):
    def uniform(name, *shape):
        return torch.from_numpy((hashed.signed(name, (copies, objects, *shape), 0) + 1) / 2)
    labels = (uniform("labels") * num_classes).long()
    sign = uniform("sign", 4).round() * 2 - 1
    return dino.Noise(uniform("relabel"), labels, sign, uniform("amount", 4))


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", OURS)
def test_small_co_detrs_give_the_figures_of_this_code_when_it_equaled_the_authors(
        monkeypatch, double, name):
    """Co-DETR was recorded with other weights, so these figures are our own.

    They were computed while every recording matched, so they preserve what the recordings proved.
    In double precision, with the first k of n wherever k are drawn.
    """
    monkeypatch.setattr(anchors, "draw", lambda n, k: torch.arange(n)[:k])
    monkeypatch.setattr(dino, "draw_noise", hashed_noise)
    run = OURS[name]
    check(run, *hashed_model(run), *hashed_batch(run))


def test_hashed_numbers_are_those_of_the_recordings(shared, recipe):
    for path in sorted((shared / "golden").glob("keys_*.txt")):
        for name, shape in recipe.read_keys(path):
            shape = tuple(min(n, 12) for n in shape)
            for tied in (False, True):
                expected = recipe.value(name, shape, 3, tied)
                assert np.array_equal(hashed.weight(name, shape, 3, tied), expected), name
    assert np.array_equal(hashed.image(1, 5, 7, 3), recipe.image(1, 5, 7, 3))
    labels, boxes = recipe.targets(1, 5, 11, 3)
    ours = hashed.objects(1, 5, 11, 3)
    assert ours["labels"].tolist() == labels.tolist()
    assert np.array_equal(ours["boxes"][3:], boxes[3:])
