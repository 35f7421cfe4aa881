"""Multi-scale deformable attention (Deformable DETR, ICLR 2021, https://arxiv.org/abs/2010.04159, equations 2 and 3).

Each query looks at K points per feature level instead of at every pixel. From the query itself two linear layers
predict, per head, where to look (offsets from the query's reference point) and how much each look counts (a softmax
over all L K points). A look reads the value map by bilinear interpolation; everything outside the map is zero.

    output(q) = sum over heads m of  W_m [ sum over l, k of  A_mlqk  W'_m x_l( phi_l(p_q) + dp_mlqk ) ]

    symbol     here                          shape
    x_l        tokens (all levels, flat)     (B, S, C)
    W'_m x     value                         (B, S, M, D)
    p_q        reference, in [0, 1]          (B, Nq, L, 2) points, or (B, Nq, L, 4) boxes cx, cy, w, h
    dp_mlqk    sampling offsets              (B, Nq, M, L, K, 2), (x, y)
    phi + dp   locations                     (B, Nq, M, L, K, 2), (x, y); 0 and 1 are the outer borders of the map
    A_mlqk     weights                       (B, Nq, M, L, K)
    W_m        output_proj                   C -> C

B images, S = sum of H_l W_l tokens, Nq queries, C channels, M heads, D = C / M, L levels, K points per level.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


class MSDeformAttn(nn.Module):
    """The attention module. Parameter names and layouts are those of the released checkpoints."""

    def __init__(self, dim=256, num_heads=8, num_levels=4, num_points=4):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"expected dim divisible by num_heads, got {dim} and {num_heads}: change one of them")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, samples * 2)    # rows: head, level, point, (x, y)
        self.attention_weights = nn.Linear(dim, samples)       # rows: head, level, point
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self):
        """At the start every query looks the same way: head m along the direction 2 pi m / M, point k at k pixels from
        the reference (measured to the side of a square), all points weighted alike (appendix A.4 of the paper)."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = 2 * math.pi / self.num_heads * torch.arange(self.num_heads, dtype=torch.float64)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)                             # (M, 2)
        distance = torch.arange(1, self.num_points + 1, dtype=torch.float64)[:, None]              # (K, 1)
        ring = (direction[:, None, None] * distance).expand(-1, self.num_levels, -1, -1)           # (M, L, K, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(ring.reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query, reference, tokens, shapes, padding=None):
        """query (B, Nq, C), reference (B, Nq, L, 2 or 4) in [0, 1] of each padded level, tokens (B, S, C),
        shapes [(H, W), ...] of the L levels, padding (B, S) bool, True on padding -> (B, Nq, C)."""
        B, Nq, C = query.shape
        M, L, K = self.num_heads, self.num_levels, self.num_points
        if len(shapes) != L:
            raise ValueError(f"expected {L} level shapes, got {len(shapes)}: give num_levels={len(shapes)} to MSDeformAttn")
        value = self.value_proj(tokens)                                             # (B, S, C)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0)    # after the projection: its bias must not leak in either
        value = value.unflatten(-1, (M, C // M))                                    # (B, S, M, D)
        offsets = self.sampling_offsets(query).view(B, Nq, M, L, K, 2)
        logits = self.attention_weights(query).view(B, Nq, M, L * K)
        weights = logits.softmax(-1, dtype=_coordinate_dtype(logits)).view(B, Nq, M, L, K)
        locations = sampling_locations(reference, offsets, shapes)                  # (B, Nq, M, L, K, 2)
        return self.output_proj(ms_deform_attn(value, shapes, locations, weights))


def sampling_locations(reference, offsets, shapes):
    """phi_l(p) + dp: reference (B, Nq, L, 2 or 4), offsets (B, Nq, M, L, K, 2) -> locations (B, Nq, M, L, K, 2).

    Beside a point, one unit of offset is one pixel of the level; beside a box, K units are half its width or height,
    so that the outermost point of the initial ring lies on the border of the box."""
    center = reference[:, :, None, :, None, :2]                                     # (B, Nq, 1, L, 1, 2)
    if reference.shape[-1] == 2:
        size = torch.stack([center.new_full((), n) for H, W in shapes for n in (W, H)])    # no copy from the host
        return center + offsets / size.view(-1, 1, 2)
    if reference.shape[-1] == 4:
        return center + offsets * (0.5 / offsets.shape[-2]) * reference[:, :, None, :, None, 2:]
    raise ValueError(f"expected references with 2 (x, y) or 4 (cx, cy, w, h) coordinates, got {reference.shape[-1]}")


def ms_deform_attn(value, shapes, locations, weights, impl=None):
    """value (B, S, M, D), shapes [(H, W), ...], locations (B, Nq, M, L, K, 2) as (x, y), weights (B, Nq, M, L, K)
    -> (B, Nq, M D) in the dtype of value."""
    return ms_deform_attn_torch(value, shapes, locations, weights)


def ms_deform_attn_torch(value, shapes, locations, weights):
    """The definition. Every other implementation is measured against this one, in float64.

    A NaN location makes the output of its own query and head NaN and reaches nothing else."""
    B, S, M, D = value.shape
    dtype = torch.promote_types(value.dtype, locations.dtype)
    nan = locations.isnan().any(-1)                                                 # (B, Nq, M, L, K)
    weights = weights.to(dtype).masked_fill(nan, math.nan)
    # A location reaches at most half a pixel beyond the map, so [-1, 2] keeps every point that sees anything.
    grid = 2 * locations.to(dtype).nan_to_num(nan=-1).clamp(-1, 2) - 1              # grid_sample wants [-1, 1]
    output = 0
    for l, level in enumerate(value.to(dtype).split([H * W for H, W in shapes], dim=1)):
        level = level.permute(0, 2, 3, 1).reshape(B * M, D, *shapes[l])             # (B M, D, H, W)
        points = grid[:, :, :, l].transpose(1, 2).flatten(0, 1)                     # (B M, Nq, K, 2)
        looks = F.grid_sample(level, points, mode="bilinear", padding_mode="zeros", align_corners=False)
        looks = looks.view(B, M, D, *points.shape[1:3])                             # (B, M, D, Nq, K)
        output = output + torch.einsum("bmdqk,bqmk->bqmd", looks, weights[:, :, :, l])
    return output.flatten(2).to(value.dtype)                                        # (B, Nq, M D)


def _coordinate_dtype(tensor):
    """Coordinates and weights are float32 even beside half-precision values: bf16 would place a point no better than
    1/256 of the map. float64 stays float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
