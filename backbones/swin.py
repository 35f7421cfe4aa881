"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (Liu et al., ICCV 2021,
arXiv 2103.14030).

The idea: attention within windows of 7 x 7 or 12 x 12 cells, whose cost is linear in the pixels.
Every second block shifts the windows by half their size, so that neighboring windows exchange
information. Between stages four cells are merged into one, which gives maps at strides 4 to 32.

    paper                                                here
    section 3.1 patches and patch merging                layers.ConvEmbed, PatchMerging
    section 3.2, Eq. 4 relative position bias            WindowAttention, relative_position_index
    section 3.2, Eq. 3 shifted windows                   SwinBlock
    section 3.2, Figure 4 mask of shifted windows        shift_mask
    section 3.3 architectures                            SWINS

Parameters have the names of the published weights. B images, maps (B, H, W, C) with the channels
last, windows of N = window^2 cells, M heads of D channels.

Differences from the paper
 1. Cells that pad the last windows are keys like any other cell (code of the detectors).
 2. Every map that a detector reads has a LayerNorm (code of the detectors). The other maps have one
    without parameters.
"""
import torch
from torch import Tensor, nn

from backbones.layers import (ConvEmbed, DropPath, FeedForward, add_output_norms, drop_rates,
                              from_windows, init_linear, output_map, pad_to_windows, to_windows)


def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for every query and key of a window, (N, N).

    For a query that lies dy rows and dx columns after the key, the row is
    (dy + window - 1) (2 window - 1) + dx + window - 1.
    """
    cells = torch.arange(window)
    y, x = torch.meshgrid(cells, cells, indexing="ij")                            # (window, window)
    y = y.flatten()                                                                # (N,)
    x = x.flatten()                                                                # (N,)
    dy = y[:, None] - y + window - 1                                               # (N, N), from 0
    dx = x[:, None] - x + window - 1                                               # (N, N), from 0
    return dy * (2 * window - 1) + dx


class WindowAttention(nn.Module):
    """Attention within a window with a learned bias for each head and relative position."""

    def __init__(self, dim: int, num_heads: int, window: int):
        super().__init__()
        self.num_heads = num_heads
        table = torch.empty((2 * window - 1) ** 2, num_heads)
        self.relative_position_bias_table = nn.Parameter(table)
        index = relative_position_index(window)
        self.register_buffer("relative_position_index", index, persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (..., windows, N, C); mask (windows, N, N) is added to the scores -> like x."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))                 # (..., N, 3, M, D)
        q, k, v = qkv.movedim((-3, -2), (0, -3))                               # (..., M, N, D) each
        bias = self.relative_position_bias_table[self.relative_position_index]     # (N, N, M)
        scale = q.shape[-1] ** -0.5
        scores = q * scale @ k.transpose(-2, -1) + bias.movedim(-1, 0)             # (..., M, N, N)
        if mask is not None:
            scores = scores + mask[:, None]
        values = scores.softmax(-1) @ v                                            # (..., M, N, D)
        return self.proj(values.transpose(-3, -2).flatten(-2))


def shift_mask(height: int, width: int, window: int, device) -> Tensor:
    """Mask of the shifted windows of a map, (windows, N, N), to be added to the scores.

    -100 between cells that come from opposite ends of the padded map, 0 elsewhere.
    """
    rows = shift_regions(height, window, device)                                   # (H,)
    columns = shift_regions(width, window, device)                                 # (W,)
    regions = 3 * rows[:, None] + columns                                          # (H, W), 0 to 8
    regions = to_windows(regions[None, :, :, None], window)[0, :, :, 0]            # (windows, N)
    different = regions[:, :, None] != regions[:, None, :]                         # (windows, N, N)
    return different * -100.0


def shift_regions(length: int, window: int, device) -> Tensor:
    """Region of every cell of a padded and shifted axis: 0, 1 in the last window, 2 in the half of
    it that comes from the other end."""
    padded = length + -length % window
    position = torch.arange(padded, device=device)
    in_last_window = (position >= padded - window).int()
    from_other_end = (position >= padded - window // 2).int()
    return in_last_window + from_other_end


class SwinBlock(nn.Module):
    """Window attention and a feed-forward network, each with a LayerNorm before and a residual.

    With `shift`, the windows start half a window further down and right and wrap around.
    """

    def __init__(self, dim: int, num_heads: int, window: int, shift: bool, mlp_ratio: int,
                 drop_path: float):
        super().__init__()
        self.window = window
        self.shift = window // 2 if shift else 0
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, mlp_ratio * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, H, W, C), mask of the shifted windows (windows, N, N) -> (B, H, W, C)."""
        attended = self.attend(self.norm1(x), mask)                                # (B, H, W, C)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attention within the windows of x (B, H, W, C) -> (B, H, W, C)."""
        H, W = x.shape[1:3]
        x = pad_to_windows(x, self.window)                                         # (B, H', W', C)
        padded_height = x.shape[1]
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        windows = to_windows(x, self.window)                                    # (B, windows, N, C)
        windows = self.attn(windows, mask if self.shift else None)
        x = from_windows(windows, self.window, padded_height)                      # (B, H', W', C)
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return x[:, :H, :W]


class PatchMerging(nn.Module):
    """Halve a map: concatenate four neighbors, normalize, and project to twice the channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H / 2, W / 2, 2 C), rounded up."""
        x = pad_to_windows(x, 2)
        top_left = x[:, 0::2, 0::2]                                               # (B, H/2, W/2, C)
        bottom_left = x[:, 1::2, 0::2]
        top_right = x[:, 0::2, 1::2]
        bottom_right = x[:, 1::2, 1::2]
        x = torch.cat((top_left, bottom_left, top_right, bottom_right), -1)     # (B, H/2, W/2, 4 C)
        return self.reduction(self.norm(x))


class Swin(nn.Module):
    """Images (B, 3, H, W) -> [C2, C3, C4, C5] at strides 4, 8, 16, 32.

    `dim` is the width of C2; `depths` and `num_heads` are given for each stage. `maps`: how many
    maps, from the coarsest on, the detector reads. `drop_path` is the maximum stochastic-depth
    rate. `channels` lists the widths of the four maps.
    """

    def __init__(self, dim: int, depths: tuple[int, ...], num_heads: tuple[int, ...], window: int,
                 maps: int = 4, drop_path: float = 0.0, mlp_ratio: int = 4):
        super().__init__()
        self.channels = [dim, 2 * dim, 4 * dim, 8 * dim]
        self.window = window
        self.patch_embed = ConvEmbed(3, dim, kernel=4, stride=4)
        self.layers = nn.ModuleList()
        for width, heads, rates in zip(self.channels, num_heads, drop_rates(drop_path, depths)):
            blocks = nn.ModuleList()
            for i, rate in enumerate(rates):
                shift = i % 2 == 1
                blocks.append(SwinBlock(width, heads, window, shift, mlp_ratio, rate))
            self.layers.append(nn.ModuleDict({"blocks": blocks}))
        for stage in range(3):
            self.layers[stage]["downsample"] = PatchMerging(self.channels[stage])
        add_output_norms(self, maps)
        init_linear(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.patch_embed(images)                                              # (B, H/4, W/4, C)
        outputs = []
        for stage, layer in enumerate(self.layers):
            mask = shift_mask(x.shape[1], x.shape[2], self.window, x.device)       # (windows, N, N)
            for block in layer["blocks"]:
                x = block(x, mask)
            outputs.append(output_map(self, stage, x))
            if "downsample" in layer:
                x = layer["downsample"](x)                                      # (B, H/2, W/2, 2 C)
        return outputs


# Width of C2, depths, heads, window size. `swin_b` and `swin_l` have the window of their weights
# for images of 384 pixels; the names of the weight files say which images they were trained on.
SWINS = {
    "swin_t": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "swin_s": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "swin_b": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "swin_b_window7": (128, (2, 2, 18, 2), (4, 8, 16, 32), 7),
    "swin_l": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
    "swin_l_window7": (192, (2, 2, 18, 2), (6, 12, 24, 48), 7),
}
