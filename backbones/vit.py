"""ViT-L of EVA-02 (Fang et al., Image and Vision Computing 2024, arXiv 2303.11331) with a simple
feature pyramid (Li et al., ViTDet, ECCV 2022, arXiv 2203.16527), as Co-DETR uses them.

The idea: a plain Vision Transformer has a single map of stride 16. Most of its blocks attend within
windows, a few to the complete map, and a small pyramid on top makes the maps that a detector needs.

    paper                                                here
    EVA-02, section 2 SwiGLU, rotary positions           SwiGLU, RotaryAttention, rotary_table
    ViTDet, section 3 window and global attention        ViTBlock
    ViTDet, section 3 simple feature pyramid             SimpleFeaturePyramid
    Co-DETR, code: sizes of the model on COCO            VITS

Parameters have the names of the published weights. B images, maps (B, H, W, C) with the channels
last, N cells that attend to each other, M heads of D channels.

Differences from the papers
 1. The pyramid has five maps at strides 4 to 64 and two convolutions for each (Co-DETR's code).
 2. Cells that pad the last windows are keys like any other cell (code).
 3. No class token (Co-DETR's code): its row of the position table is in the weights, but unused.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers import (ConvEmbed, DropPath, drop_rates, from_windows, init_linear,
                              pad_to_windows, to_windows)

PRETRAINED_GRID = 16   # cells per side of the map on which EVA-02 was pretrained


def rotary_table(height: int, width: int, dim: int, device=None) -> Tensor:
    """Cosine and sine of the rotary positions of a map: (2, H W, dim).

    Attention rotates each pair of channels of a cell by an angle. The first half of the channels
    encodes the row, the second half the column: cell i of n has position 16 i / n, and pair j
    rotates by this position times 10000^(-4 j / dim).
    """
    rows = axis_angles(height, dim // 4, device)                                   # (H, dim / 4)
    columns = axis_angles(width, dim // 4, device)                                 # (W, dim / 4)
    rows = rows[:, None, :].expand(-1, width, -1)                                  # (H, W, dim / 4)
    columns = columns[None, :, :].expand(height, -1, -1)                           # (H, W, dim / 4)
    angles = torch.cat((rows, columns), -1)                                        # (H, W, dim / 2)
    angles = angles.repeat_interleave(2, -1)                                       # (H, W, dim)
    angles = angles.flatten(0, 1)                                                  # (H W, dim)
    return torch.stack((angles.cos(), angles.sin()))


def axis_angles(length: int, pairs: int, device) -> Tensor:
    """Angles of every cell of an axis for each of its pairs of channels: (length, pairs)."""
    cells = torch.arange(length, device=device)
    positions = PRETRAINED_GRID * cells / length                                   # (length,)
    exponents = torch.arange(pairs, device=device) / pairs                         # (pairs,)
    frequencies = 10000 ** -exponents                                              # (pairs,)
    return positions[:, None] * frequencies


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate each pair of neighboring channels of x (..., N, dim) by its angle."""
    cosine, sine = rotary                                                          # (N, dim) each
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)                          # (..., N, dim / 2)
    perpendicular = torch.stack((-second, first), -1).flatten(-2)                  # (..., N, dim)
    return x * cosine + perpendicular * sine


class RotaryAttention(nn.Module):
    """Multi-head attention with rotary positions; keys have no bias."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """x (B, N, C), rotary (2, N, D) -> (B, N, C)."""
        q = F.linear(x, self.q_proj.weight, self.q_bias)                           # (B, N, C)
        k = self.k_proj(x)                                                         # (B, N, C)
        v = F.linear(x, self.v_proj.weight, self.v_bias)                           # (B, N, C)
        v = self.split_heads(v)                                                    # (B, M, N, D)
        q = rotate(self.split_heads(q), rotary).to(v.dtype)                        # (B, M, N, D)
        k = rotate(self.split_heads(k), rotary).to(v.dtype)                        # (B, M, N, D)
        values = F.scaled_dot_product_attention(q, k, v)                           # (B, M, N, D)
        return self.proj(values.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, M, N, D)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class SwiGLU(nn.Module):
    """Feed-forward network with a gate and a LayerNorm before its last layer."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(dim, hidden)
        self.w3 = nn.Linear(hidden, dim)
        self.ffn_ln = nn.LayerNorm(hidden, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        gate = F.silu(self.w1(x))                                                  # (..., hidden)
        x = self.ffn_ln(gate * self.w2(x))                                         # (..., hidden)
        return self.w3(x)


class ViTBlock(nn.Module):
    """Attention and a feed-forward network, each with a LayerNorm before and a residual.

    Attention is within windows of `window` x `window` cells, or over the complete map if it is 0.
    """

    def __init__(self, dim: int, num_heads: int, window: int, drop_path: float):
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = RotaryAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, dim * 8 // 3)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """x (B, H, W, C), rotary (2, N, D) of a window's or the map's N cells -> (B, H, W, C)."""
        attended = self.attend(self.norm1(x), rotary)                              # (B, H, W, C)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Attention of x (B, H, W, C) within windows or over the complete map -> (B, H, W, C)."""
        B, H, W = x.shape[:3]
        if not self.window:
            return self.attn(x.flatten(1, 2), rotary).unflatten(1, (H, W))
        x = pad_to_windows(x, self.window)                                         # (B, H', W', C)
        padded_height = x.shape[1]
        windows = to_windows(x, self.window).flatten(0, 1)                       # (B windows, N, C)
        windows = self.attn(windows, rotary).unflatten(0, (B, -1))              # (B, windows, N, C)
        x = from_windows(windows, self.window, padded_height)                      # (B, H', W', C)
        return x[:, :H, :W]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x.permute(0, 2, 3, 1))                                 # (B, H, W, C)
        return x.permute(0, 3, 1, 2)


class SimpleFeaturePyramid(nn.Module):
    """Five maps of `outputs` channels at strides 4 to 64 from a single map of stride 16."""

    def __init__(self, dim: int, outputs: int):
        super().__init__()
        half = dim // 2
        quarter = dim // 4
        self.p2 = nn.Sequential(
            *upsample(dim),
            *upsample(half),
            *output_convs(quarter, outputs),
        )
        self.p3 = nn.Sequential(*upsample(dim), *output_convs(half, outputs))
        self.p4 = nn.Sequential(*output_convs(dim, outputs))
        self.p5 = nn.Sequential(nn.MaxPool2d(3, 2, 1), *output_convs(dim, outputs))
        self.p6 = nn.Sequential(
            nn.MaxPool2d(3, 2, 1),
            *conv_norm(dim, dim, 3, stride=2),
            nn.GELU(),
            *output_convs(dim, outputs),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, dim, H, W) -> five maps (B, outputs, ., .), finest first."""
        levels = (self.p2, self.p3, self.p4, self.p5, self.p6)
        return [level(x) for level in levels]


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A convolution without bias and its norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [conv, ChannelNorm(outputs, eps=1e-6)]


def upsample(inputs: int) -> list[nn.Module]:
    """Twice the height and width, half the channels."""
    nearest = nn.Upsample(scale_factor=2)
    return [nearest, *conv_norm(inputs, inputs // 2, 3), nn.GELU()]


def output_convs(inputs: int, outputs: int) -> list[nn.Module]:
    """The last two convolutions of every level."""
    first = conv_norm(inputs, outputs, 1)
    second = conv_norm(outputs, outputs, 3)
    return [*first, nn.GELU(), *second]


class ViT(nn.Module):
    """Images (B, 3, H, W) -> five maps of `outputs` channels at strides 4, 8, 16, 32, 64.

    Every `every`-th block attends to the complete map, the others within windows of `window` cells.
    The learned positions are those of a `grid` x `grid` map, interpolated to the size of the map.
    `drop_path` is the maximum stochastic-depth rate. `channels` lists the widths of the five maps,
    which need no projection in the detector.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, window: int, every: int,
                 drop_path: float = 0.0, grid: int = 32, outputs: int = 256):
        super().__init__()
        self.channels = [outputs] * 5
        self.head_dim = dim // num_heads
        self.patch_embed = ConvEmbed(3, dim, kernel=16, stride=16, norm=False)
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid ** 2, dim))   # row 0: class token
        window_rotary = rotary_table(window, window, self.head_dim)
        self.register_buffer("window_rotary", window_rotary, persistent=False)
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(drop_rates(drop_path, (depth,))[0]):
            is_global = i % every == every - 1
            self.blocks.append(ViTBlock(dim, num_heads, 0 if is_global else window, rate))
        self.out_norm = nn.LayerNorm(dim)
        self.neck = SimpleFeaturePyramid(dim, outputs)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        init_linear(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.neck(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The map below the pyramid: (B, 3, H, W) -> (B, dim, H / 16, W / 16)."""
        x = self.patch_embed(images)                                            # (B, H/16, W/16, C)
        H, W = x.shape[1:3]
        positions = resize_positions(self.pos_embed, H, W)                         # (1, H W, C)
        x = x + positions.unflatten(1, (H, W))
        rotary = rotary_table(H, W, self.head_dim, x.device)                       # (2, H W, D)
        for block in self.blocks:
            x = block(x, self.window_rotary if block.window else rotary)
        return self.out_norm(x).permute(0, 3, 1, 2)


def resize_positions(table: Tensor, height: int, width: int) -> Tensor:
    """Interpolate a position table (1, 1 + n^2, C), class token first -> (1, H W, C), bicubic."""
    n = math.isqrt(table.shape[1] - 1)
    square = table[:, 1:].unflatten(1, (n, n))                                     # (1, n, n, C)
    square = square.permute(0, 3, 1, 2)                                            # (1, C, n, n)
    if (height, width) != (n, n):
        square = F.interpolate(square, (height, width), mode="bicubic")            # (1, C, H, W)
    return square.flatten(2).transpose(1, 2)


# Width, depth, heads, window size, every how many blocks one attends to the complete map; on COCO
# and on LVIS.
VITS = {
    "vit_l": (1024, 24, 16, 24, 4),
    "vit_l_window16": (1024, 24, 16, 16, 3),
}
