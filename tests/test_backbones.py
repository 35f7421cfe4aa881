"""backbones.py: torchvision's names and shapes, strides, freezing, and loading."""
import pytest
import torch
from torch import nn

from backbones import (RESNETS, WEIGHT_FILES, Bottleneck, FrozenBatchNorm2d, ResNet, build_backbone,
                       load_backbone_weights)


@pytest.mark.parametrize("name", RESNETS)
def test_maps_have_strides_4_to_32_and_the_listed_widths(name):
    backbone = build_backbone(name, "none").eval()
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, c, 64 // s, 96 // s) for c, s in zip(backbone.channels, (4, 8, 16, 32))]


def test_dilation_keeps_the_last_stage_at_stride_16_with_the_same_weights():
    torch.manual_seed(0)
    plain, dilated = build_backbone("resnet50", "none"), build_backbone("resnet50", "none", dilation=True)
    dilated.load_state_dict(plain.state_dict())
    assert dilated.eval()(torch.randn(1, 3, 64, 64))[-1].shape[-2:] == (4, 4)
    assert [dilated.layer4[i].conv2.dilation for i in range(3)] == [(1, 1), (2, 2), (2, 2)]


@pytest.mark.parametrize("name, parameters", [("resnet18", 11_176_512), ("resnet34", 21_284_672),
                                              ("resnet50", 23_508_032), ("resnet101", 42_500_160)])
def test_parameter_counts_are_the_published_ones_without_the_classifier(name, parameters):
    assert sum(p.numel() for p in build_backbone(name, "none").parameters()) == parameters


def test_names_are_torchvisions(shared, recipe):
    keys = dict(recipe.read_keys(shared / "golden" / "keys_deformable_detr_r50.txt"))
    theirs = {k.removeprefix("backbone.0.body."): s for k, s in keys.items() if k.startswith("backbone.")}
    assert {k: tuple(v.shape) for k, v in build_backbone("resnet50", "imagenet").state_dict().items()} == theirs


def test_published_weights_freeze_normalisation_stem_and_first_stage():
    backbone = build_backbone("resnet50", "imagenet")
    frozen = {n.split(".")[0] for n, p in backbone.named_parameters() if not p.requires_grad}
    live = {n.split(".")[0] for n, p in backbone.named_parameters() if p.requires_grad}
    assert frozen == {"conv1", "layer1"} and live == {"layer2", "layer3", "layer4"}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())


@pytest.mark.parametrize("norm, kind", [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)])
def test_from_scratch_every_parameter_trains_with_live_normalisation(norm, kind):
    backbone = build_backbone("tiny", "none", norm)
    assert all(p.requires_grad for p in backbone.parameters())
    assert any(isinstance(m, kind) for m in backbone.modules())


def test_frozen_normalisation_equals_batch_normalisation_in_eval_mode():
    live, frozen = nn.BatchNorm2d(6).eval(), FrozenBatchNorm2d(6)
    for tensor in (live.weight.data, live.bias.data, live.running_mean, live.running_var):
        tensor.uniform_(0.5, 2.0)
    frozen.load_state_dict({k: v for k, v in live.state_dict().items() if k != "num_batches_tracked"})
    x = torch.randn(2, 6, 3, 5)
    assert torch.allclose(live(x), frozen(x), atol=1e-6)


def test_a_weight_file_is_loaded_and_a_wrong_one_is_refused(tmp_path):
    torch.save(build_backbone("resnet18", "none").state_dict() | {"fc.weight": torch.zeros(1), "fc.bias": torch.zeros(1)},
               tmp_path / "r18.pth")
    backbone = build_backbone("resnet18", "file")
    assert "r18.pth" in load_backbone_weights(backbone, "resnet18", str(tmp_path / "r18.pth"))
    assert torch.equal(backbone.conv1.weight, torch.load(tmp_path / "r18.pth")["conv1.weight"])
    with pytest.raises(RuntimeError, match="does not fit backbone resnet34"):
        load_backbone_weights(build_backbone("resnet34", "file"), "resnet34", str(tmp_path / "r18.pth"))
    with pytest.raises(RuntimeError, match="no file"):
        load_backbone_weights(backbone, "resnet18", str(tmp_path / "absent.pth"))


def test_imagenet_weights_that_cannot_be_fetched_name_the_remedy(monkeypatch):
    def refuse(url, **_):
        assert url.endswith(WEIGHT_FILES["resnet50"])
        raise OSError("no route")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(RuntimeError, match="--backbone_weights none"):
        load_backbone_weights(build_backbone("resnet50", "imagenet"), "resnet50", "imagenet")
    with pytest.raises(RuntimeError, match="no public ImageNet weights"):
        load_backbone_weights(build_backbone("tiny", "imagenet"), "tiny", "imagenet")


def test_unknown_names_list_the_choices():
    with pytest.raises(ValueError, match="resnet18, resnet34"):
        build_backbone("resnet19", "none")
    with pytest.raises(ValueError, match="batch or group"):
        build_backbone("resnet18", "none", "layer")


def test_a_narrow_resnet_keeps_the_proportions():
    assert ResNet(Bottleneck, (3, 4, 6, 3), (4, 8, 16, 32), 4).channels == [16, 32, 64, 128]
