"""backbones/resnet.py: torchvision's names and sizes, strides, frozen norms."""
import pytest
import torch
from torch import nn

from backbones import build_backbone, resnet
from backbones.resnet import RESNETS, Bottleneck, FrozenBatchNorm2d, ResNet


@pytest.mark.parametrize("name", RESNETS)
def test_maps_have_strides_4_to_32_and_the_listed_widths(name):
    backbone = build_backbone(name, "none").eval()
    maps = backbone(torch.randn(1, 3, 64, 96))
    expected = [(1, c, 64 // s, 96 // s) for c, s in zip(backbone.channels, (4, 8, 16, 32))]
    assert [tuple(m.shape) for m in maps] == expected


def test_dilation_keeps_the_last_stage_at_stride_16_with_the_same_weights():
    torch.manual_seed(0)
    plain = build_backbone("resnet50", "none")
    dilated = build_backbone("resnet50", "none", dilation=True)
    dilated.load_state_dict(plain.state_dict())
    assert dilated.eval()(torch.randn(1, 3, 64, 64))[-1].shape[-2:] == (4, 4)
    assert [dilated.layer4[i].conv2.dilation for i in range(3)] == [(1, 1), (2, 2), (2, 2)]


@pytest.mark.parametrize("name, parameters", [("resnet18", 11_176_512), ("resnet34", 21_284_672),
                                              ("resnet50", 23_508_032), ("resnet101", 42_500_160)])
def test_parameter_counts_are_the_published_ones_without_the_classifier(name, parameters):
    assert sum(p.numel() for p in build_backbone(name, "none").parameters()) == parameters


def test_names_are_torchvisions(shared, recipe):
    keys = dict(recipe.read_keys(shared / "golden" / "keys_deformable_detr_r50.txt"))
    theirs = {key.removeprefix("backbone.0.body."): shape for key, shape in keys.items()
              if key.startswith("backbone.")}
    ours = build_backbone("resnet50", "imagenet").state_dict()
    assert {key: tuple(value.shape) for key, value in ours.items()} == theirs


def test_published_weights_freeze_normalization_stem_and_first_stage():
    backbone = build_backbone("resnet50", "imagenet")
    named = [(name.split(".")[0], p.requires_grad) for name, p in backbone.named_parameters()]
    assert {name for name, trains in named if not trains} == {"conv1", "layer1"}
    assert {name for name, trains in named if trains} == {"layer2", "layer3", "layer4"}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())


@pytest.mark.parametrize("norm, kind", [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)])
def test_from_scratch_every_parameter_trains_with_trainable_norms(norm, kind):
    backbone = build_backbone("tiny", "none", norm)
    assert all(p.requires_grad for p in backbone.parameters())
    assert any(isinstance(m, kind) for m in backbone.modules())


def random_frozen_norm(channels):
    norm = FrozenBatchNorm2d(channels)
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2.0)
    return norm


def test_frozen_normalization_equals_batch_normalization_in_eval_mode():
    frozen = random_frozen_norm(6)
    live = nn.BatchNorm2d(6).eval()
    live.load_state_dict(frozen.state_dict(), strict=False)
    x = torch.randn(2, 6, 3, 5)
    assert torch.allclose(live(x), frozen(x), atol=1e-6)


def test_frozen_normalization_of_bfloat16_is_computed_in_float32_and_rounded_once():
    torch.manual_seed(0)
    norm = random_frozen_norm(6)
    x = torch.randn(2, 6, 3, 5).bfloat16()
    deviation = (norm.running_var + 1e-5).sqrt()
    columns = [t[:, None, None] for t in (norm.running_mean, deviation, norm.weight, norm.bias)]
    mean, deviation, weight, bias = columns
    exact = (x.double() - mean) / deviation * weight + bias
    y = norm(x)
    assert y.dtype == torch.bfloat16
    half_a_unit = exact.abs() * 2.0 ** -8 + 1e-6
    assert ((y.double() - exact).abs() <= half_a_unit).all()


def test_features_after_frozen_norms_under_autocast_are_as_exact_as_bfloat16_outputs_allow(
        monkeypatch):
    """With scale and shift rounded after the convolution, the error of C2 is a third larger."""
    torch.manual_seed(0)
    model = ResNet(Bottleneck, (3, 4, 6, 3), (8, 16, 32, 64), 8)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.3)
            module.running_mean.normal_(std=0.3)
    images = torch.randn(1, 3, 128, 160)
    exact = model(images)[0]
    with torch.autocast("cpu", torch.bfloat16):
        ours = model(images)[0]
        monkeypatch.setattr(resnet, "convolve", convolve_with_rounded_terms)
        rounded = model(images)[0]
    assert (ours - exact).norm() < 0.85 * (rounded - exact).norm()


def convolve_with_rounded_terms(conv, norm, x):
    """Convolution, then scale and shift of the frozen norm in the dtype of the features."""
    x = conv(x)
    scale, shift = norm.scale_and_shift()
    return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)


def test_a_folded_norm_gives_the_values_and_gradients_of_convolution_and_norm():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, 2, padding=2, dilation=2, bias=False).double()
    norm = random_frozen_norm(6).double()
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64, requires_grad=True)
    results = []
    for y in (norm(conv(x)), resnet.convolve(conv, norm, x)):
        gradients = torch.autograd.grad(y.sin().sum(), (x, conv.weight))
        results.append((y, *gradients))
    for expected, ours in zip(*results):
        torch.testing.assert_close(ours, expected)


def test_on_a_cpu_maps_are_in_nhwc_order_but_for_float32_gradients():
    model = build_backbone("tiny", "none").eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        inference = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        bfloat16 = model(images)
    for features in (*inference, *bfloat16):
        assert features.is_contiguous(memory_format=torch.channels_last)
    for features in model(images):
        assert features.is_contiguous() and features.requires_grad


def test_a_narrow_resnet_keeps_the_proportions():
    assert ResNet(Bottleneck, (3, 4, 6, 3), (4, 8, 16, 32), 4).channels == [16, 32, 64, 128]
