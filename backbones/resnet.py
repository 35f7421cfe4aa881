"""..."""
import functools
import math
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with constant statistics and affine terms: four buffers, nothing learned, no batch counter."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.), ("bias", 0.), ("running_mean", 0.), ("running_var", 1.)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels)
NORMS = {"frozen": FrozenBatchNorm2d, "batch": nn.BatchNorm2d, "group": group_norm}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18/34)."""
    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, dilation: int, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, dilation, dilation, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, dilation, dilation, bias=False)
        self.bn2 = norm(planes)
        self.downsample = shortcut(inputs, planes, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride), 1x1 convolutions and a shortcut (ResNet-50/101)."""
    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, dilation: int, norm):
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, dilation, dilation, bias=False)
        self.bn2 = norm(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = norm(outputs)
        self.downsample = shortcut(inputs, outputs, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def shortcut(inputs: int, outputs: int, stride: int, norm) -> nn.Module:
    """Identity where shapes agree, else a strided 1x1 convolution and its normalisation."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))


class ResNet(nn.Module):
    """Images (B, 3, H, W) -> [C2, C3, C4, C5] at strides 4, 8, 16, 32 (C5 at 16 with `dilation`, the DC5 variant).

    `channels` lists the four widths. `blocks` per stage, `planes` per stage before expansion, `stem` channels;
    `small_stem` replaces 7x7 convolution and max pooling by one 3x3 convolution, and stage 1 then has stride 2.
    """

    def __init__(self, block, blocks, planes=(64, 128, 256, 512), stem=64, norm="frozen", dilation=False,
                 small_stem=False):
        super().__init__()
        norm = NORMS[norm]
        kernel = 3 if small_stem else 7
        self.conv1 = nn.Conv2d(3, stem, kernel, 2, kernel // 2, bias=False)
        self.bn1 = norm(stem)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, 1)
        strides = (2 if small_stem else 1, 2, 2, 1 if dilation else 2)
        self.channels = [width * block.expansion for width in planes]
        inputs = stem
        for i, (count, width, stride) in enumerate(zip(blocks, planes, strides)):
            dilated = 2 if dilation and i == 3 else 1
            stage = [block(inputs, width, stride, 1, norm)]   # the first block keeps the previous stage's dilation
            inputs = width * block.expansion
            stage += [block(inputs, width, 1, dilated, norm) for _ in range(count - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps
RESNETS = {
    "resnet18": functools.partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": functools.partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": functools.partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": functools.partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "tiny": functools.partial(ResNet, BasicBlock, (1, 1, 1, 1), (48, 96, 160, 224), 32, small_stem=True),
}
