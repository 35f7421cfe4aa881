"""FocalNet: Focal Modulation Networks (Yang et al., NeurIPS 2022, arXiv 2203.11926), large models.

The idea: instead of comparing a cell with every other one, summarize its surroundings first, in
several growing sizes and for the complete map, and let the sum of these contexts, weighted by gates
that the cell chooses, modulate the cell. Convolutions do all of it; there is no attention.

    paper                                                here
    section 3.2, step 1 hierarchical contextualization   FocalModulation.contexts
    section 3.2, step 2 gated aggregation                FocalModulation.forward
    section 3.2 focal modulation y = q * h(sum of G Z)   FocalModulation.forward
    code: sizes of the large models                      FOCALNETS

    symbol     here
    L, k_l     `levels`; kernel sizes `window`, `window` + 2, ...
    q, Z_l, G  query, context, gate
    h          FocalModulation.h

Parameters have the names of the published weights. B images, maps (B, H, W, C) with the channels
last or (B, C, H, W) before a convolution.

Differences from the paper
 1. LayerNorm after modulation and feed-forward network instead of before, and a learned factor for
    each channel (code, of the large models).
 2. `normalize_modulator`: the sum of the L + 1 gated contexts is divided by L + 1. The authors'
    models of four levels were trained with it, those of three levels without (code; not in the
    paper). detrex's detectors with four levels leave it out, although they start from weights
    trained with it: "focalnet_l_4level_sum" is for those. Names and shapes of the weights are equal
    in both, so that only their origin tells them apart.
 3. Every map that a detector reads has a LayerNorm (code of the detectors). The other maps have one
    without parameters.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers import (ConvEmbed, DropPath, FeedForward, add_output_norms, drop_rates,
                              init_linear, output_map)


class FocalModulation(nn.Module):
    """Modulate every cell by the gated sum of its contexts.

    `levels` contexts come from depthwise convolutions with kernels of `window`, `window` + 2, ...
    cells, one after the other, and one more from the mean of the last. `normalize_modulator`
    divides their sum by their number.
    """

    def __init__(self, dim: int, levels: int, window: int, normalize_modulator: bool = True):
        super().__init__()
        self.normalize_modulator = normalize_modulator
        self.f = nn.Linear(dim, 2 * dim + levels + 1)
        self.h = nn.Conv2d(dim, dim, 1)
        self.proj = nn.Linear(dim, dim)
        self.focal_layers = nn.ModuleList()
        for level in range(levels):
            kernel = window + 2 * level
            conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)
            self.focal_layers.append(nn.Sequential(conv, nn.GELU()))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        C = x.shape[-1]
        x = self.f(x).permute(0, 3, 1, 2)                                   # (B, 2 C + L + 1, H, W)
        query, context, gates = x.split((C, C, x.shape[1] - 2 * C), 1)
        modulator = 0
        for context, gate in zip(self.contexts(context), gates.split(1, 1)):
            modulator = modulator + context * gate                                 # (B, C, H, W)
        if self.normalize_modulator:
            modulator = modulator / gates.shape[1]
        x = query * self.h(modulator)                                              # (B, C, H, W)
        return self.proj(x.permute(0, 2, 3, 1))

    def contexts(self, context: Tensor) -> list[Tensor]:
        """Z_1 ... Z_L (B, C, H, W) and the context of the complete map (B, C, 1, 1)."""
        contexts = []
        for layer in self.focal_layers:
            context = layer(context)
            contexts.append(context)
        contexts.append(F.gelu(context.mean((2, 3), keepdim=True)))
        return contexts


class FocalBlock(nn.Module):
    """Modulation and a feed-forward network, each with a LayerNorm after, a factor for each channel
    and a residual."""

    def __init__(self, dim: int, levels: int, window: int, normalize_modulator: bool,
                 drop_path: float):
        super().__init__()
        self.modulation = FocalModulation(dim, levels, window, normalize_modulator)
        self.norm1 = nn.LayerNorm(dim)
        self.gamma_1 = nn.Parameter(torch.full((dim,), 1e-4))
        self.mlp = FeedForward(dim, 4 * dim)
        self.norm2 = nn.LayerNorm(dim)
        self.gamma_2 = nn.Parameter(torch.full((dim,), 1e-4))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.drop_path(self.gamma_1 * self.norm1(self.modulation(x)))
        return x + self.drop_path(self.gamma_2 * self.norm2(self.mlp(x)))


class FocalNet(nn.Module):
    """Images (B, 3, H, W) -> [C2, C3, C4, C5] at strides 4, 8, 16, 32.

    `dim` is the width of C2; `depths` are given for each stage; `levels`, `window` and
    `normalize_modulator` as in FocalModulation. `maps`: how many maps, from the coarsest on, the
    detector reads. `drop_path` is the maximum stochastic-depth rate. `channels` lists the widths of
    the four maps.
    """

    def __init__(self, dim: int, depths: tuple[int, ...], levels: int, window: int,
                 normalize_modulator: bool = True, maps: int = 4, drop_path: float = 0.0):
        super().__init__()
        self.channels = [dim, 2 * dim, 4 * dim, 8 * dim]
        self.patch_embed = ConvEmbed(3, dim, kernel=7, stride=4, padding=2)
        self.layers = nn.ModuleList()
        for width, rates in zip(self.channels, drop_rates(drop_path, depths)):
            blocks = nn.ModuleList()
            for rate in rates:
                blocks.append(FocalBlock(width, levels, window, normalize_modulator, rate))
            self.layers.append(nn.ModuleDict({"blocks": blocks}))
        for stage in range(3):
            width = self.channels[stage]
            self.layers[stage]["downsample"] = ConvEmbed(width, 2 * width, 3, stride=2, padding=1)
        add_output_norms(self, maps)
        init_linear(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.patch_embed(images)                                              # (B, H/4, W/4, C)
        outputs = []
        for stage, layer in enumerate(self.layers):
            for block in layer["blocks"]:
                x = block(x)
            outputs.append(output_map(self, stage, x))
            if "downsample" in layer:
                x = layer["downsample"](x.permute(0, 3, 1, 2))                  # (B, H/2, W/2, 2 C)
        return outputs


# Width of C2, depths, focal levels, smallest kernel, normalize_modulator.
FOCALNETS = {
    "focalnet_l_3level": (192, (2, 2, 18, 2), 3, 5, False),
    "focalnet_l_4level": (192, (2, 2, 18, 2), 4, 3, True),        # the authors' and FocalNet-DINO's
    "focalnet_l_4level_sum": (192, (2, 2, 18, 2), 4, 3, False),   # detrex's detectors
}
