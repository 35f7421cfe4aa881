"""..."""
import torch
from torch import Tensor, nn
from backbones.parts import ConvEmbed, DropPath, FeedForward, add_output_norms, drop_rates, from_windows, init_linear, output_map, pad_to_windows, to_windows

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
