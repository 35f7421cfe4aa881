"""ResNet: Deep Residual Learning for Image Recognition (He et al., CVPR 2016, arXiv 1512.03385).

The idea: let a block of convolutions learn what to add to its input. Gradients pass through the
additions unchanged, so that networks of a hundred layers can be trained.

    paper                                               here
    section 3.2, Eq. 1-2 residuals and shortcuts        BasicBlock, shortcut
    section 4.1, Figure 5 bottleneck                    Bottleneck
    Table 1 architectures                               RESNETS
    DETR, appendix A.4 and code: constant BatchNorm     FrozenBatchNorm2d
    DETR, section 4 the DC5 variant                     `dilation` in ResNet

Parameters have torchvision's names. B images, C2 to C5 the outputs of the four stages.

Differences from the paper
 1. In a bottleneck the 3x3 convolution has the stride, as in torchvision's weights (paper: 1x1).
 2. No pooling and no classifier: the outputs of the stages are what a detector reads.
 3. `tiny` (ours): four blocks for images of about 128 pixels that train from scratch in minutes on
    a CPU. It has a 3x3 stem without max pooling.
 4. Group normalization (ours) as an option for small batches.
 5. A frozen norm is folded into the convolution before it (`convolve`). Under bfloat16 autocast the
    folded weights and the output are rounded once each; DETR's code returns float32 maps there,
    which needs more memory.
"""
import functools
import math
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm with constant statistics, weight and bias: four buffers and no parameters."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W) of the same dtype, computed in the dtype of the buffers."""
        scale, shift = self.scale_and_shift()
        y = x * scale[:, None, None] + shift[:, None, None]
        return y.to(x.dtype)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The norm is x * scale + shift; (C,) each."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale


def convolve(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)). A frozen norm is folded into the weights of the convolution, so that no pass
    over the map is left of it: the same to rounding."""
    if not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(x))
    scale, shift = norm.scale_and_shift()
    weight = conv.weight * scale[:, None, None, None]                      # (outputs, inputs, k, k)
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalization with 32 groups, or as many as divide both 32 and `channels`."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


NORMS = {"frozen": FrozenBatchNorm2d, "batch": nn.BatchNorm2d, "group": group_norm}


def conv3x3(inputs: int, outputs: int, stride: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


def shortcut(inputs: int, outputs: int, stride: int, norm: Callable) -> nn.Module:
    """Identity where the shapes agree, otherwise a strided 1x1 convolution and its norm."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(conv1x1(inputs, outputs, stride), norm(outputs))


def apply_shortcut(module: nn.Module, x: Tensor) -> Tensor:
    """Apply what `shortcut` made, with its norm folded."""
    if isinstance(module, nn.Identity):
        return x
    return convolve(*module, x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and ResNet-34)."""
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, norm: Callable):
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride, dilation)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, 1, dilation)
        self.bn2 = norm(width)
        self.downsample = shortcut(inputs, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, width, H / stride, W / stride)."""
        y = F.relu(convolve(self.conv1, self.bn1, x), inplace=True)
        y = convolve(self.conv2, self.bn2, y)
        y += apply_shortcut(self.downsample, x)
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which has the stride) and 1x1 convolutions and a shortcut (ResNet-50 and -101)."""
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, norm: Callable):
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = conv1x1(inputs, width)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, stride, dilation)
        self.bn2 = norm(width)
        self.conv3 = conv1x1(width, outputs)
        self.bn3 = norm(outputs)
        self.downsample = shortcut(inputs, outputs, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, 4 width, H / stride, W / stride)."""
        y = F.relu(convolve(self.conv1, self.bn1, x), inplace=True)
        y = F.relu(convolve(self.conv2, self.bn2, y), inplace=True)
        y = convolve(self.conv3, self.bn3, y)
        y += apply_shortcut(self.downsample, x)
        return F.relu(y, inplace=True)


class ResNet(nn.Module):
    """Images (B, 3, H, W) -> [C2, C3, C4, C5] at strides 4, 8, 16, 32.

    `block` is BasicBlock or Bottleneck; `depths` and `widths` give the blocks of each stage and
    their channels before expansion; `stem` is the width of the first convolution. `dilation`: C5
    keeps stride 16 (the DC5 variant). `small_stem`: one 3x3 convolution instead of a 7x7
    convolution and max pooling, and the first stage has stride 2. `channels` lists the widths of
    the four maps.
    """

    def __init__(self, block: type, depths: tuple[int, ...],
                 widths: tuple[int, ...] = (64, 128, 256, 512), stem: int = 64,
                 norm: str = "frozen", dilation: bool = False, small_stem: bool = False):
        super().__init__()
        norm = NORMS[norm]
        kernel = 3 if small_stem else 7
        self.conv1 = nn.Conv2d(3, stem, kernel, 2, kernel // 2, bias=False)
        self.bn1 = norm(stem)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, 1)
        first_stride = 2 if small_stem else 1
        last_stride = 1 if dilation else 2
        strides = (first_stride, 2, 2, last_stride)
        dilations = (1, 1, 1, 2 if dilation else 1)
        self.channels = [width * block.expansion for width in widths]
        inputs = stem
        for i in range(4):
            # The first block of a dilated stage is not dilated itself, as in torchvision.
            blocks = [block(inputs, widths[i], strides[i], 1, norm)]
            inputs = self.channels[i]
            for _ in range(depths[i] - 1):
                blocks.append(block(inputs, widths[i], 1, dilations[i], norm))
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        # In NHWC order CPUs convolve faster, but group normalization loses two digits there, and
        # one gradient of a ResNet-50 in float32 left the tolerance of the recordings.
        exact = torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        if not (images.is_cuda or exact or isinstance(self.bn1, nn.GroupNorm)):
            images = images.contiguous(memory_format=torch.channels_last)
        x = convolve(self.conv1, self.bn1, images)                             # (B, stem, H/2, W/2)
        x = F.relu(x, inplace=True)
        x = self.maxpool(x)
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
    "tiny": functools.partial(ResNet, BasicBlock, (1, 1, 1, 1), (48, 96, 160, 224), 32,
                              small_stem=True),
}
