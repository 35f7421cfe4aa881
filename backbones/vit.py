"""..."""
import math
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from backbones.parts import ConvEmbed, DropPath, drop_rates, from_windows, init_linear, pad_to_windows, to_windows

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
