"""The maps that one-to-many heads read, made of the maps that a DETR's encoder has.

    Co-DETR, section 3.2 multi-scale adapter       multi_scale_adapter

The pyramid of a single map resembles the simple feature pyramid of ViTDet (Li et al. 2022), with
bilinear interpolation and one convolution for each map.
"""
import math

import torch.nn.functional as F
from torch import Tensor, nn


def adapter_step(dim: int, stride: int) -> nn.Sequential:
    """The convolution that makes one map of the adapter, with its norm."""
    convolution = nn.Conv2d(dim, dim, 3, stride, 1)
    return nn.Sequential(convolution, nn.GroupNorm(32, dim))


def multi_scale_adapter(
    maps: list[Tensor],
    finer: list[nn.Module],
    coarser: list[nn.Module],
    strides: list[int],
    image_size: tuple,
) -> list[Tensor]:
    """Section 3.2: the pyramid that the heads read, finest first, from the encoder's maps.

    maps [(B, C, H_l, W_l)], which stay as they are. Each of `finer` reads the finest map there is,
    enlarged bilinearly, each of `coarser` the coarsest one, and adds a map beyond it. strides: of
    the result; image_size (H, W): of the padded images, pixels. It gives a finer map its size."""
    maps = list(maps)
    finer_strides = reversed(strides[:len(finer)])
    for convolution, stride in zip(finer, finer_strides):
        height = math.ceil(image_size[0] / stride)
        width = math.ceil(image_size[1] / stride)
        x = F.interpolate(maps[0], scale_factor=2, mode="bilinear")                # (B, C, H, W)
        x = x[..., :height, :width]
        x = convolution(x)
        maps.insert(0, x.to(maps[0].dtype))
    for convolution in coarser:
        x = convolution(maps[-1])
        maps.append(x.to(maps[-1].dtype))
    return maps
