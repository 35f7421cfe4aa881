"""Layers that Swin, ViT and FocalNet share.

    stochastic depth (Huang et al. 2016, arXiv 1603.09382)  DropPath, drop_rates
    patches and downsampling by strided convolutions        ConvEmbed
    feed-forward network                                    FeedForward
    windows of a map (Swin, ViT)                            to_windows, from_windows, pad_to_windows
    normalization of the maps that a detector reads         add_output_norms, output_map
    initial values                                          init_linear

B images, maps (B, H, W, C) with the channels last, windows of N = window^2 cells.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch of an image with probability `rate` in training.

    Branches that remain are multiplied by 1 / (1 - rate), so that the mean stays the same.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        one_per_image = (len(x),) + (1,) * (x.dim() - 1)                           # (B, 1, ...)
        remains = torch.rand(one_per_image, device=x.device) >= self.rate
        return x * (remains / (1 - self.rate)).to(x.dtype)


def drop_rates(maximum: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Rates of the blocks of every stage: linear over all blocks, from 0 to `maximum`."""
    last = max(1, sum(depths) - 1)
    rates = []
    first = 0
    for depth in depths:
        rates.append([maximum * i / last for i in range(first, first + depth)])
        first += depth
    return rates


class ConvEmbed(nn.Module):
    """A strided convolution and a LayerNorm; maps are zero-padded to multiples of the stride."""

    def __init__(self, inputs: int, dim: int, kernel: int, stride: int, padding: int = 0,
                 norm: bool = True):
        super().__init__()
        self.stride = stride
        self.proj = nn.Conv2d(inputs, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, H / stride, W / stride, dim), rounded up."""
        right = -x.shape[3] % self.stride
        bottom = -x.shape[2] % self.stride
        x = F.pad(x, (0, right, 0, bottom))                                    # (B, inputs, H', W')
        x = self.proj(x).permute(0, 2, 3, 1)                                  # (B, H'/s, W'/s, dim)
        return self.norm(x)


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.fc2(F.gelu(self.fc1(x)))


def pad_to_windows(x: Tensor, window: int) -> Tensor:
    """Zero-pad (B, H, W, C) below and to the right until `window` divides H and W."""
    right = -x.shape[2] % window
    bottom = -x.shape[1] % window
    return F.pad(x, (0, 0, 0, right, 0, bottom))


def to_windows(x: Tensor, window: int) -> Tensor:
    """Cut (B, H, W, C) into (B, windows, N, C); windows and their cells are in row-major order."""
    x = x.unflatten(2, (-1, window))                                             # (B, H, W/w, w, C)
    x = x.unflatten(1, (-1, window))                                        # (B, H/w, w, W/w, w, C)
    x = x.transpose(2, 3)                                                   # (B, H/w, W/w, w, w, C)
    return x.flatten(3, 4).flatten(1, 2)


def from_windows(x: Tensor, window: int, height: int) -> Tensor:
    """The inverse of `to_windows`: (B, windows, N, C) -> (B, H, W, C) with H = `height`."""
    x = x.unflatten(2, (window, window))                                     # (B, windows, w, w, C)
    x = x.unflatten(1, (height // window, -1))                              # (B, H/w, W/w, w, w, C)
    x = x.transpose(2, 3)                                                   # (B, H/w, w, W/w, w, C)
    return x.flatten(3, 4).flatten(1, 2)


def add_output_norms(backbone: nn.Module, maps: int) -> None:
    """Add norm0 ... norm3 for the `maps` coarsest of four stages: only maps that a detector reads
    have parameters of their own."""
    for stage in range(4 - maps, 4):
        backbone.add_module(f"norm{stage}", nn.LayerNorm(backbone.channels[stage]))


def output_map(backbone: nn.Module, stage: int, x: Tensor) -> Tensor:
    """Normalize the output (B, H, W, C) of a stage -> (B, C, H, W).

    A stage without a norm of its own has a LayerNorm without parameters.
    """
    norm = getattr(backbone, f"norm{stage}", None)
    if norm is None:
        x = F.layer_norm(x, x.shape[-1:])
    else:
        x = norm(x)
    return x.permute(0, 3, 1, 2)


def init_linear(model: nn.Module) -> None:
    """Initialize all linear layers: weights N(0, 0.02) truncated at 2, biases 0."""
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            continue
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
