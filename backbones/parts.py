"""..."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
