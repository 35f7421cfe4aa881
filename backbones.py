"""Backbones of DETR detectors, each with the parameter names of its published weights, so that they load by name. No local
imports: copy it alone.

ResNet (He et al. 2016)       torchvision's, with the stride on the 3x3 convolution; `tiny`: four blocks for images of about
                              128 px that train from scratch in minutes on a CPU (OUR CHOICE): a 3x3 stem, no max pooling
Swin (Liu et al. 2021)        windows of 7 or 12 cells
ViT (Dosovitskiy et al. 2021) EVA-02's ViT-L with windows and a simple feature pyramid, as Co-DETR uses it
FocalNet (Yang et al. 2022)   the large model, with 3 or 4 focal levels

All map images (B, 3, H, W) to [C2, C3, C4, C5] at strides 4 to 32 and list their widths in `channels`; ViT adds stride 64.

    backbone = build_backbone("swin_t", "imagenet")
    print(load_backbone_weights(backbone, "swin_t", "imagenet"))
    c2, c3, c4, c5 = backbone(images)
"""
import functools
import math
import re
from pathlib import Path
from urllib.error import URLError

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



# ---------------------------------------------------------------------------------------- parts of the transformers

class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, a residual branch of an image counts for nothing with
    probability `rate`, and for 1 / (1 - rate) otherwise."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        keep = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * (keep / (1 - self.rate)).to(x.dtype)


def drop_rates(last: float, depths) -> list[list[float]]:
    """Per stage the rates of its blocks: rising evenly from 0 to `last` over all blocks."""
    count = sum(depths)
    rates = iter([last * i / max(1, count - 1) for i in range(count)])
    return [[next(rates) for _ in range(depth)] for depth in depths]


class ConvEmbed(nn.Module):
    """A strided convolution and a normalisation; rows and columns that the stride does not divide are filled with zeros."""

    def __init__(self, inputs: int, dim: int, kernel: int, stride: int, padding: int = 0, norm: bool = True):
        super().__init__()
        self.stride = stride
        self.proj = nn.Conv2d(inputs, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, H / stride, W / stride, dim), rounded up."""
        x = F.pad(x, (0, -x.shape[3] % self.stride, 0, -x.shape[2] % self.stride))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def pad_to_windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> the same with zeros below and to the right, H and W multiples of `window`."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % window, 0, -x.shape[1] % window))


def to_windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B, windows, window^2, C), windows and their cells row by row."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))                   # (B, H/w, w, W/w, w, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_windows(x: Tensor, window: int, height: int) -> Tensor:
    """The inverse of `to_windows` for a map of `height` rows."""
    x = x.unflatten(2, (window, window)).unflatten(1, (height // window, -1))      # (B, H/w, W/w, w, w, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def add_output_norms(backbone: nn.Module, maps: int) -> None:
    """norm0 ... norm3 for the `maps` coarsest of the four stages: only maps that a detector reads have one to learn."""
    for i in range(4 - maps, 4):
        backbone.add_module(f"norm{i}", nn.LayerNorm(backbone.channels[i]))


def output_map(backbone: nn.Module, stage: int, x: Tensor) -> Tensor:
    """A stage's output (B, H, W, C), normalised -> (B, C, H, W). Without a norm of its own: one that learns nothing."""
    norm = getattr(backbone, f"norm{stage}", None)
    return (norm(x) if norm else F.layer_norm(x, x.shape[-1:])).permute(0, 3, 1, 2)


def init_linear(model: nn.Module):
    """N(0, 0.02), cut off at two, for every linear layer, and no bias."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------------------- Swin

def relative_position_index(window: int) -> Tensor:
    """(N, N): which row of the bias table belongs to a query and a key of a window of N = window^2 cells:
    (dy + window - 1)(2 window - 1) + dx + window - 1."""
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    dy, dx = (c.flatten()[:, None] - c.flatten() + window - 1 for c in (y, x))     # (N, N)
    return dy * (2 * window - 1) + dx


class WindowAttention(nn.Module):
    """Liu et al. 2021, Eq. 4: attention within a window, with a learned bias for each head and relative position."""

    def __init__(self, dim: int, num_heads: int, window: int):
        super().__init__()
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (..., windows, N, C), mask (windows, N, N) that is added -> (..., windows, N, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim((-3, -2), (0, -3))    # (..., M, N, D) each
        bias = self.relative_position_bias_table[self.relative_position_index].movedim(-1, 0)      # (M, N, N)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + bias              # (..., M, N, N)
        if mask is not None:
            scores = scores + mask[:, None]
        return self.proj((scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2))


def shift_mask(height: int, width: int, window: int, device) -> Tensor:
    """(windows, N, N): -100 between cells of a shifted window that come from different ends of the padded map, else 0."""
    def ends(length: int) -> Tensor:
        length += -length % window
        place = torch.arange(length, device=device)
        return (place >= length - window).int() + (place >= length - window // 2).int()
    regions = 3 * ends(height)[:, None] + ends(width)                              # (H, W)
    regions = to_windows(regions[None, ..., None], window)[0, ..., 0]              # (windows, N)
    return (regions[:, :, None] != regions[:, None]) * -100.0


class SwinBlock(nn.Module):
    """Window attention and a feed-forward network, each behind a normalisation and beside a shortcut. With `shift`, windows
    begin half a window further down and right, around the border."""

    def __init__(self, dim: int, num_heads: int, window: int, shift: bool, mlp_ratio: int, drop_path: float):
        super().__init__()
        self.window, self.shift = window, window // 2 if shift else 0
        self.norm1, self.attn = nn.LayerNorm(dim), WindowAttention(dim, num_heads, window)
        self.norm2, self.mlp = nn.LayerNorm(dim), FeedForward(dim, mlp_ratio * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, H, W, C), mask of shifted windows -> (B, H, W, C)."""
        x = x + self.drop_path(self.attend(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        """Cells that fill up the last windows are keys like any other (code; their value is the bias)."""
        H, W = x.shape[1:3]
        x = pad_to_windows(x, self.window)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        windows = self.attn(to_windows(x, self.window), mask if self.shift else None)              # (B, windows, N, C)
        x = from_windows(windows, self.window, x.shape[1])
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return x[:, :H, :W]


class PatchMerging(nn.Module):
    """Halves a map: four neighbours side by side, normalised, mixed into twice the channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H / 2, W / 2, 2 C), rounded up."""
        x = pad_to_windows(x, 2)
        x = torch.cat([x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], -1)         # (B, H/2, W/2, 4 C)
        return self.reduction(self.norm(x))


class Swin(nn.Module):
    """Swin Transformer (Liu et al. 2021, arXiv 2103.14030): images (B, 3, H, W) -> [C2, C3, C4, C5] at strides 4 to 32.
    `maps` of them, the coarsest, are read by the detector."""

    def __init__(self, dim, depths, num_heads, window: int, maps: int = 4, drop_path: float = 0.0, mlp_ratio: int = 4):
        super().__init__()
        self.channels = [dim * 2 ** i for i in range(4)]
        self.window = window
        self.patch_embed = ConvEmbed(3, dim, 4, 4)
        self.layers = nn.ModuleList()
        for width, heads, rates in zip(self.channels, num_heads, drop_rates(drop_path, depths)):
            blocks = [SwinBlock(width, heads, window, j % 2 == 1, mlp_ratio, rate) for j, rate in enumerate(rates)]
            self.layers.append(nn.ModuleDict({"blocks": nn.ModuleList(blocks)}))
        for layer, width in zip(self.layers[:3], self.channels):
            layer["downsample"] = PatchMerging(width)
        add_output_norms(self, maps)
        init_linear(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.patch_embed(images)                                               # (B, H/4, W/4, C)
        outputs = []
        for i, layer in enumerate(self.layers):
            mask = shift_mask(*x.shape[1:3], self.window, x.device)
            for block in layer["blocks"]:
                x = block(x, mask)
            outputs.append(output_map(self, i, x))
            if "downsample" in layer:
                x = layer["downsample"](x)
        return outputs


SWINS = {   # width, depths, heads, window; the file of the published weights says which images they have seen
    "swin_t": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "swin_s": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "swin_b": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "swin_b_window7": (128, (2, 2, 18, 2), (4, 8, 16, 32), 7),
    "swin_l": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
    "swin_l_window7": (192, (2, 2, 18, 2), (6, 12, 24, 48), 7),
}


# -------------------------------------------------------------------------------------------------------------- ViT

def rotary_table(height: int, width: int, dim: int, device=None) -> Tensor:
    """(2, H W, dim): cosine and sine of the angles by which attention turns the pairs of channels of a cell.

    The first half of the channels tells rows apart, the second columns: cell i of n stands at 16 i / n, whatever n, and
    pair j turns by that times 10000^(-4 j / dim) (EVA-02; 16 is the grid it was pretrained on)."""
    frequency = 10000 ** -(torch.arange(0, dim // 2, 2, device=device) / (dim // 2))               # (dim / 4,)
    rows, columns = ((16 * torch.arange(n, device=device) / n)[:, None] * frequency for n in (height, width))
    angle = torch.cat((rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)), -1)   # (H, W, dim / 2)
    angle = angle.flatten(0, 1).repeat_interleave(2, -1)                           # (H W, dim)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turns each pair of neighbouring channels of x (..., N, dim) by its angle."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * rotary[0] + torch.stack((-b, a), -1).flatten(-2) * rotary[1]


class RotaryAttention(nn.Module):
    """Multi-head attention whose scores depend on how far cells are apart; keys have no bias."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """x (B, N, C), rotary (2, N, D) -> (B, N, C)."""
        q, k, v = (F.linear(x, layer.weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)   # (B, M, N, D)
                   for layer, bias in ((self.q_proj, self.q_bias), (self.k_proj, None), (self.v_proj, self.v_bias)))
        q, k = (rotate(t, rotary).to(v.dtype) for t in (q, k))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Feed-forward network with a gate, normalised before its last layer."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.ffn_ln = nn.LayerNorm(hidden, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class ViTBlock(nn.Module):
    """Attention, within windows or over the whole map (`window` 0), and a feed-forward network."""

    def __init__(self, dim: int, num_heads: int, window: int, drop_path: float):
        super().__init__()
        self.window = window
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), RotaryAttention(dim, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), SwiGLU(dim, dim * 8 // 3)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """x (B, H, W, C), rotary (2, N, D) of the window's or the map's N cells -> (B, H, W, C)."""
        x = x + self.drop_path(self.attend(self.norm1(x), rotary))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Cells that fill up the last windows are keys like any other."""
        B, H, W, _ = x.shape
        if not self.window:
            return self.attn(x.flatten(1, 2), rotary).unflatten(1, (H, W))
        x = pad_to_windows(x, self.window)
        windows = self.attn(to_windows(x, self.window).flatten(0, 1), rotary)      # (B windows, N, C)
        return from_windows(windows.unflatten(0, (B, -1)), self.window, x.shape[1])[:, :H, :W]


class ChannelNorm(nn.LayerNorm):
    """Normalises the channels of every cell of a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimpleFeaturePyramid(nn.Module):
    """Li et al. 2022 (ViTDet), section 3: five maps at strides 4 to 64 from a single one of stride 16."""

    def __init__(self, dim: int, outputs: int):
        super().__init__()
        def conv(inputs, outputs, kernel, stride=1):
            return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), ChannelNorm(outputs, eps=1e-6)
        def up(inputs):
            return nn.Upsample(scale_factor=2), *conv(inputs, inputs // 2, 3), nn.GELU()
        def last(inputs):
            return *conv(inputs, outputs, 1), nn.GELU(), *conv(outputs, outputs, 3)
        self.p2 = nn.Sequential(*up(dim), *up(dim // 2), *last(dim // 4))
        self.p3 = nn.Sequential(*up(dim), *last(dim // 2))
        self.p4 = nn.Sequential(*last(dim))
        self.p5 = nn.Sequential(nn.MaxPool2d(3, 2, 1), *last(dim))
        self.p6 = nn.Sequential(nn.MaxPool2d(3, 2, 1), *conv(dim, dim, 3, 2), nn.GELU(), *last(dim))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, dim, H, W) -> five maps of `outputs` channels, finest first."""
        return [level(x) for level in (self.p2, self.p3, self.p4, self.p5, self.p6)]


class ViT(nn.Module):
    """EVA-02's Vision Transformer (Fang et al. 2023, arXiv 2303.11331) as Co-DETR uses it, with the pyramid on top: images
    (B, 3, H, W) -> five maps at strides 4 to 64, which need no projection. Every `every`-th block looks at the whole map,
    the others at windows. Positions are learned on a `grid` x `grid` map."""

    def __init__(self, dim: int, depth: int, num_heads: int, window: int, every: int, drop_path: float = 0.0,
                 grid: int = 32, outputs: int = 256):
        super().__init__()
        self.channels, self.head_dim = [outputs] * 5, dim // num_heads
        self.patch_embed = ConvEmbed(3, dim, 16, 16, norm=False)
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid ** 2, dim))          # row 0: the class token of pretraining
        self.register_buffer("window_rotary", rotary_table(window, window, self.head_dim), persistent=False)
        self.blocks = nn.ModuleList(ViTBlock(dim, num_heads, 0 if i % every == every - 1 else window, rate)
                                    for i, rate in enumerate(drop_rates(drop_path, [depth])[0]))
        self.out_norm = nn.LayerNorm(dim)
        self.neck = SimpleFeaturePyramid(dim, outputs)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        init_linear(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.neck(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, dim, H / 16, W / 16)."""
        x = self.patch_embed(images)                                               # (B, H/16, W/16, C)
        H, W = x.shape[1:3]
        x = x + resize_positions(self.pos_embed, H, W).unflatten(1, (H, W))
        rotary = rotary_table(H, W, self.head_dim, x.device)                       # (2, N, D)
        for block in self.blocks:
            x = block(x, self.window_rotary if block.window else rotary)
        return self.out_norm(x).permute(0, 3, 1, 2)


def resize_positions(table: Tensor, height: int, width: int) -> Tensor:
    """Position table (1, 1 + n^2, C), class token first -> (1, H W, C), bicubic."""
    n = math.isqrt(table.shape[1] - 1)
    square = table[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)                 # (1, C, n, n)
    if (height, width) != (n, n):
        square = F.interpolate(square, (height, width), mode="bicubic")
    return square.flatten(2).transpose(1, 2)


VITS = {"vit_l": (1024, 24, 16, 24, 4)}   # width, depth, heads, window, every n-th block global


# --------------------------------------------------------------------------------------------------------- FocalNet

class FocalModulation(nn.Module):
    """Yang et al. 2022, Eq. 4-7: what surrounds a cell, in `levels` growing sizes and as a whole, gated and summed,
    modulates the cell."""

    def __init__(self, dim: int, levels: int, window: int):
        super().__init__()
        self.f, self.proj = nn.Linear(dim, 2 * dim + levels + 1), nn.Linear(dim, dim)
        self.h = nn.Conv2d(dim, dim, 1)
        self.focal_layers = nn.ModuleList()
        for kernel in range(window, window + 2 * levels, 2):
            conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)
            self.focal_layers.append(nn.Sequential(conv, nn.GELU()))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        C, levels = x.shape[-1], len(self.focal_layers)
        query, context, gates = self.f(x).permute(0, 3, 1, 2).split((C, C, levels + 1), 1)         # (B, C or levels + 1, H, W)
        total = 0
        for layer, gate in zip(self.focal_layers, gates.split(1, 1)):
            context = layer(context)
            total = total + context * gate
        total = total + F.gelu(context.mean((2, 3), keepdim=True)) * gates[:, -1:]
        return self.proj((query * self.h(total)).permute(0, 2, 3, 1))


class FocalBlock(nn.Module):
    """Modulation and a feed-forward network, each normalised after and scaled channel by channel."""

    def __init__(self, dim: int, levels: int, window: int, drop_path: float):
        super().__init__()
        self.modulation, self.norm1 = FocalModulation(dim, levels, window), nn.LayerNorm(dim)
        self.mlp, self.norm2 = FeedForward(dim, 4 * dim), nn.LayerNorm(dim)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), 1e-4)) for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.drop_path(self.gamma_1 * self.norm1(self.modulation(x)))
        return x + self.drop_path(self.gamma_2 * self.norm2(self.mlp(x)))


class FocalNet(nn.Module):
    """Focal modulation network (Yang et al. 2022, arXiv 2203.11926) in the form of its large models: images (B, 3, H, W)
    -> [C2, C3, C4, C5] at strides 4 to 32. `maps` of them, the coarsest, are read by the detector."""

    def __init__(self, dim: int, depths, levels: int, window: int, maps: int = 4, drop_path: float = 0.0):
        super().__init__()
        self.channels = [dim * 2 ** i for i in range(4)]
        self.patch_embed = ConvEmbed(3, dim, 7, 4, 2)
        self.layers = nn.ModuleList()
        for width, rates in zip(self.channels, drop_rates(drop_path, depths)):
            blocks = nn.ModuleList(FocalBlock(width, levels, window, rate) for rate in rates)
            self.layers.append(nn.ModuleDict({"blocks": blocks}))
        for layer, width in zip(self.layers[:3], self.channels):
            layer["downsample"] = ConvEmbed(width, 2 * width, 3, 2, 1)
        add_output_norms(self, maps)
        init_linear(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.patch_embed(images)                                               # (B, H/4, W/4, C)
        outputs = []
        for i, layer in enumerate(self.layers):
            for block in layer["blocks"]:
                x = block(x)
            outputs.append(output_map(self, i, x))
            if "downsample" in layer:
                x = layer["downsample"](x.permute(0, 3, 1, 2))
        return outputs


FOCALNETS = {   # width, depths, focal levels, smallest kernel
    "focalnet_l_3level": (192, (2, 2, 18, 2), 3, 5),
    "focalnet_l_4level": (192, (2, 2, 18, 2), 4, 3),
}


# ---------------------------------------------------------------------------------------------- backbones by name

SWIN_FILES, FOCALNET_FILES = (f"https://github.com/{place}/releases/download/v1.0.0/" for place in
                              ("SwinTransformer/storage", "microsoft/FocalNet"))
WEIGHT_FILES = {   # ImageNet-1k; _22k and FocalNet: ImageNet-22k
    **{name: "https://download.pytorch.org/models/" + file for name, file in (
        ("resnet18", "resnet18-f37072fd.pth"), ("resnet34", "resnet34-b627a593.pth"),
        ("resnet50", "resnet50-0676ba61.pth"), ("resnet101", "resnet101-63fe2227.pth"))},
    **{name: f"{SWIN_FILES}swin_{file}.pth" for name, file in (
        ("swin_t", "tiny_patch4_window7_224"), ("swin_s", "small_patch4_window7_224"),
        ("swin_b", "base_patch4_window12_384_22k"), ("swin_b_window7", "base_patch4_window7_224_22k"),
        ("swin_l", "large_patch4_window12_384_22k"), ("swin_l_window7", "large_patch4_window7_224_22k"))},
    "focalnet_l_3level": FOCALNET_FILES + "focalnet_large_lrf_384.pth",
    "focalnet_l_4level": FOCALNET_FILES + "focalnet_large_lrf_384_fl4.pth",
}
BACKBONES = (*RESNETS, *SWINS, *VITS, *FOCALNETS)
UNUSED = ("fc.", "head.", "norm.", "lm_head.", "cls_token", "mask_token")   # classifiers and pretraining


def build_backbone(name: str, weights: str, norm: str = "batch", dilation: bool = False, maps: int = 4,
                   drop_path: float = 0.0) -> nn.Module:
    """The backbone's structure, without reading a file (`load_backbone_weights` does that).

    `weights` "none": trained from scratch; of a ResNet with live `norm` ("batch" or "group"). Anything else: a ResNet has
    frozen batch normalisation and a frozen stem and first stage (Deformable DETR, section 5 and code); all of the others
    is trained. `maps`: how many maps, from the coarsest on, the detector reads. `drop_path`: of the last block.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}: choose one of {', '.join(BACKBONES)}")
    if norm not in ("batch", "group"):
        raise ValueError(f"unknown backbone_norm {norm!r}: choose batch or group")
    if dilation and name not in RESNETS or drop_path and name in RESNETS:
        raise ValueError(f"expected dilation with a ResNet and drop_path with another backbone, got {name} with dilation "
                         f"{dilation} and drop_path {drop_path:g}: leave out the one that does not fit")
    if name in SWINS:
        return Swin(*SWINS[name], maps, drop_path)
    if name in VITS and maps < 4:
        raise ValueError(f"expected five feature levels with {name}, whose pyramid has five maps: --num_feature_levels 5")
    if name in VITS:
        return ViT(*VITS[name], drop_path)
    if name in FOCALNETS:
        return FocalNet(*FOCALNETS[name], maps, drop_path)
    if weights == "none":
        return RESNETS[name](norm=norm, dilation=dilation)
    backbone = RESNETS[name](norm="frozen", dilation=dilation)
    for module in (backbone.conv1, backbone.layer1):
        module.requires_grad_(False)
    return backbone


def load_backbone_weights(backbone: nn.Module, name: str, weights: str) -> str:
    """Fills `backbone` in place from `weights` ("imagenet", a path, or "none"); returns a line that says what was done.

    Raises RuntimeError when the public weights cannot be fetched, or do not fit, and names the remedy.
    """
    if weights == "none":
        return f"backbone {name}: random weights, trained from scratch"
    if weights == "imagenet":
        if name not in WEIGHT_FILES:
            raise RuntimeError(f"no public ImageNet weights for backbone {name!r} (they exist for "
                               f"{', '.join(WEIGHT_FILES)}): pass --backbone_weights FILE with weights of your own, or none "
                               "to train it from scratch")
        url = WEIGHT_FILES[name]
        try:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        except (URLError, OSError) as error:
            raise RuntimeError(f"expected ImageNet weights at {url}, got: {error}. Pass --backbone_weights FILE with a "
                               "downloaded copy, or --backbone_weights none to train from scratch") from error
    else:
        if not Path(weights).is_file():
            raise RuntimeError(f"--backbone_weights expects imagenet, none or a file; there is no file {weights}")
        state = torch.load(weights, map_location="cpu", weights_only=True)
    own = backbone.state_dict()
    known = {key: resized(key, value, own) for key, value in learned(state.get("model", state)).items()
             if not key.startswith(UNUSED)}
    new = re.compile(r"norm\d\.|neck\.|.*num_batches_tracked")   # begins with the detector, as the files have none
    misfits = {"missing": [key for key in own if key not in known and not new.match(key)],
               "unexpected": [key for key in known if key not in own],
               "of another shape": [key for key in known if key in own and known[key].shape != own[key].shape]}
    if any(misfits.values()):
        found = ", ".join(f"{kind} {keys[:3]} ({len(keys)} in all)" for kind, keys in misfits.items())
        raise RuntimeError(f"{weights} does not fit backbone {name}: {found}; give the weights of {name}")
    backbone.load_state_dict(known, strict=False)
    return f"backbone {name}: {len(known)} tensors from {weights}"


def learned(state: dict) -> dict:
    """A published state dict without counters and without tables that follow from its shapes.

    Dropped: num_batches_tracked; attn_mask (Swin's, of its pretraining size); relative_position_index (Swin) and freqs_cos
    and freqs_sin (ViT), after a comparison with ours. ValueError when they differ."""
    result = {}
    for key, value in state.items():
        kind = key.rsplit(".", 1)[-1]
        if kind in ("relative_position_index", "freqs_cos", "freqs_sin"):
            side = math.isqrt(len(value))
            ours = relative_position_index(side) if kind == "relative_position_index" else (
                rotary_table(side, side, value.shape[1])[int(kind == "freqs_sin")])
            if ours.shape != value.shape or not (value.is_meta or torch.allclose(value.float(), ours.float(), atol=1e-3)):
                raise ValueError(f"expected {key} {tuple(value.shape)} to be the table that this backbone computes, got "
                                 "another one: these weights come from a changed model that this file cannot represent")
        elif kind not in ("num_batches_tracked", "attn_mask"):
            result[key] = value
    return result


def resized(key: str, value: Tensor, own: dict) -> Tensor:
    """EVA-02's position table and patches, bicubic, in the model's size; everything else as it is."""
    if key not in own or value.shape == own[key].shape:
        return value
    if key == "pos_embed":
        n = math.isqrt(own[key].shape[1] - 1)
        return torch.cat((value[:, :1], resize_positions(value, n, n)), 1)
    if key == "patch_embed.proj.weight":
        return F.interpolate(value, own[key].shape[2:], mode="bicubic")
    return value
