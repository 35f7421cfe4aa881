"""--compile on the structure of the published models: ResNet-50 with narrow layers, images of
several sizes, and evaluations whose last batch is smaller.

The quick form traces every layer but makes no machine code, the slow one uses PyTorch's default.
"""
import functools
import importlib

import pytest
import torch

import small_runs
import test_mask_frozen_detr
import train
from backbones import resnet
from engine import layers
from engine.recipe import configure
from recordings import batch
from test_mask_frozen_detr import scene

TINY = dict(dim=32, num_heads=2, ffn_dim=32, encoder_layers=2, decoder_layers=2, num_queries=12,
            dropout=0.0)
POINTS = dict(num_points=2)
OWN = {
    "deformable_detr": POINTS,
    "dino": POINTS,
    "h_detr": POINTS | small_runs.OWN["h_detr"],
    "co_detr": POINTS | small_runs.OWN["co_detr"],
    "detr": {},
}
TRAINING = [((96, 128), (96, 80)), ((128, 96), (64, 96)), ((130, 161), (96, 161))]   # two images
EVALUATION = [((128, 96), (96, 96)), ((96, 160),)]                                   # two, then one


versions = []      # what `without_machine_code` was given: one entry a version


def without_machine_code(graph, inputs):
    """A backend of torch.compile that runs what was traced as it is."""
    versions.append(graph)
    return graph.forward


@pytest.fixture(scope="module", autouse=True)
def narrow_resnet50():
    """Models of this file share what was compiled for the backbone."""
    blocks = (3, 4, 6, 3)
    narrow = functools.partial(resnet.ResNet, resnet.Bottleneck, blocks, (8, 16, 24, 32), 8)
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.RESNETS, "resnet50", narrow)
        yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch):
    compile = functools.partial(torch.compile, backend=without_machine_code)
    monkeypatch.setattr(torch, "compile", compile)


def detector(name):
    """A model with the published structure, and its criterion."""
    paper = importlib.import_module(name)
    cfg, _ = configure(paper, TINY | OWN[name])
    torch.manual_seed(0)
    return paper.build(cfg, 5)


def masks():
    _, model, criterion = test_mask_frozen_detr.network(image_layers=2, box_layers=2)
    return model, criterion


def losses(model, criterion, sizes, make_batch):
    """The losses of one training step's forward pass, after a backward pass."""
    torch.manual_seed(1)
    images, padding, targets = make_batch(*sizes, objects=(3, 1))
    values = criterion(model.train()(images, padding, targets), targets, 4.0)
    sum(values.values()).backward()
    return {name: value.item() for name, value in values.items()}


@torch.no_grad()
def boxes(model, sizes, make_batch):
    images, padding, _ = make_batch(*sizes, objects=(1,) * len(sizes))
    return model.eval()(images, padding)["pred_boxes"]


def compare(name, build, make_batch, recompute=False):
    """Train on three sizes and evaluate on two, plain and compiled: the same numbers."""
    plain, criterion = build()
    compiled, _ = build()
    layers.compile_or_recompute(compiled, train.Run(model=name, compile=True, recompute=recompute))
    for sizes in TRAINING:
        expected = losses(plain, criterion, sizes, make_batch)
        assert losses(compiled, criterion, sizes, make_batch) == pytest.approx(expected, rel=1e-3)
    for sizes in EVALUATION:
        expected = boxes(plain, sizes, make_batch)
        torch.testing.assert_close(boxes(compiled, sizes, make_batch), expected, rtol=0, atol=1e-3)
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    scales = {}
    for name, gradient in gradients.items():
        scales[name] = 0.0 if gradient is None else gradient.abs().max().item()
    # a bias without effect, such as that of attention's keys, has a gradient of rounding errors
    rounding = 1e-7 * max(scales.values())
    for name, parameter in compiled.named_parameters():
        tolerance = 1e-3 * scales[name] + rounding
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-2, atol=tolerance,
                                   msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", [name if name == "dino" else pytest.param(
    name, marks=pytest.mark.slow) for name in OWN])
def test_compiled_detectors_train_and_evaluate_on_images_of_several_sizes(traced, name):
    compare(name, lambda: detector(name), batch)


def test_compiled_mask_networks_train_and_evaluate_on_images_of_several_sizes(traced):
    compare("mask_frozen_detr", masks, scene)


def test_a_further_image_size_needs_no_further_compilation(traced):
    model, criterion = detector("dino")
    layers.compile_or_recompute(model, train.Run(model="dino", compile=True))
    for sizes in TRAINING[:2]:
        losses(model, criterion, sizes, batch)
    count = len(versions)
    losses(model, criterion, TRAINING[2], batch)
    assert len(versions) == count


@pytest.mark.slow
def test_machine_code_serves_further_image_sizes(monkeypatch):
    """PyTorch's code for a convolution serves one size: compiled, ResNet's blocks fail this."""
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    torch._dynamo.reset()
    model, criterion = detector("dino")
    layers.compile_or_recompute(model, train.Run(model="dino", compile=True))
    losses(model, criterion, TRAINING[0], batch)
    counters = torch._dynamo.utils.counters["stats"]
    count = counters["unique_graphs"]
    assert count > 0
    for sizes in TRAINING[1:]:
        losses(model, criterion, sizes, batch)
    assert counters["unique_graphs"] == count


def test_layers_with_convolutions_are_not_compiled(traced):
    model, _ = detector("dino")
    plain = [type(module).forward for module in (model.backbone.layer1[0], model.encoder[0])]
    layers.compile_or_recompute(model, train.Run(model="dino", compile=True))
    assert model.backbone.layer1[0].forward.__func__ is plain[0]
    assert getattr(model.encoder[0].forward, "__func__", None) is not plain[1]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("name", OWN)
def test_machine_code_of_compiled_detectors_computes_the_same(name, recompute):
    compare(name, lambda: detector(name), batch, recompute)
