"""..."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from backbones.parts import ConvEmbed, DropPath, FeedForward, add_output_norms, drop_rates, init_linear, output_map

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
