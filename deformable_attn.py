"""Multi-scale deformable attention (Deformable DETR, ICLR 2021, arXiv 2010.04159, Eq. 2 and 3).

Each query samples K points per feature level instead of every pixel. Two linear layers predict
from the query, for each head, where the points lie (offsets from the query's reference point) and
how much each point counts (a softmax over all L K points). A sampling point reads the value map by
bilinear interpolation. Everything outside the map is zero.

    output(q) = sum over m of  W_m [ sum over l, k of  A_mlqk  W'_m x_l( phi_l(p_q) + dp_mlqk ) ]

    symbol     here                          shape
    x_l        tokens (all levels, flat)     (B, S, C)
    W'_m x     value                         (B, S, M, D)
    p_q        reference, in [0, 1]          (B, Nq, L, 2): x, y, or (B, Nq, L, 4): cx, cy, w, h
    dp_mlqk    sampling offsets              (B, Nq, M, L, K, 2), (x, y)
    phi + dp   locations                     (B, Nq, M, L, K, 2), (x, y), the map being [0, 1]
    A_mlqk     weights                       (B, Nq, M, L, K)
    W_m        output_proj                   C -> C, all heads' side by side

B images, S = sum of H_l W_l tokens, Nq queries, C channels, M heads, D = C / M, L levels, K points
per level. References are relative to the padded level: a point of the image before padding times
the part of the level that the image fills.

From feature maps to tokens and reference points, as in an encoder whose queries are its tokens:

    maps = [torch.randn(2, 256, 20, 30), torch.randn(2, 256, 10, 15)]        # (B, C, H, W) each
    shapes = [(map.shape[2], map.shape[3]) for map in maps]
    tokens = torch.cat([map.flatten(2).transpose(1, 2) for map in maps], 1)  # (B, S, C)
    centers = []
    for H, W in shapes:
        rows = (torch.arange(H) + 0.5) / H
        columns = (torch.arange(W) + 0.5) / W
        centers.append(torch.cartesian_prod(rows, columns).flip(1))          # (H W, 2)
    reference = torch.cat(centers)[None, :, None].expand(2, -1, 2, -1)       # (B, S, L, 2)
    attention = MSDeformAttn(256, 8, num_levels=2, num_points=4)
    output = attention(tokens, reference, tokens, shapes)                    # (B, S, C)

This file holds the module, the operator in two forms and its reference implementation.
deformable_attn_build.py compiles the kernels, deformable_attn_operator.py registers and verifies
them: copy all files deformable_attn* to use the attention elsewhere. `python deformable_attn.py`
runs a self-test.

`ms_deform_attn` takes the arguments of the authors' MSDeformAttnFunction, with shapes as a list. It
needs neither level_start_index (levels follow each other) nor im2col_step. The kernels have no
second derivatives and no forward mode (both raise; impl="torch" has them). Devices other than CPU
and CUDA use the reference implementation. Import the file under one name only: PyTorch registers an
operator once.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

import deformable_attn_operator
from deformable_attn_build import BuildError
from deformable_attn_operator import (KernelError, check_arguments, coordinate_dtype, use_kernel,
                                      verify_kernel)

__all__ = ["BuildError", "KernelError", "MSDeformAttn", "ms_deform_attn", "ms_deform_attn_fused",
           "ms_deform_attn_torch", "sampling_locations", "verify_kernel"]


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with the parameter names of the released checkpoints.

    `MSDeformAttn.impl` selects the implementation of all modules, as `impl` of `ms_deform_attn`.
    Raises ValueError where dim is not divisible by num_heads, or a number is below 1.
    """

    impl = None

    def __init__(self, dim=256, num_heads=8, num_levels=4, num_points=4):
        super().__init__()
        if min(dim, num_heads, num_levels, num_points) < 1:
            got = f"dim {dim}, {num_heads} heads, {num_levels} levels, {num_points} points"
            raise ValueError(f"expected at least one channel, head, level and point, got {got}")
        if dim % num_heads:
            raise ValueError(f"expected dim divisible by num_heads, got {dim} and {num_heads}: "
                             "change one of them")
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, samples * 2)    # rows: head, level, point, (x, y)
        self.attention_weights = nn.Linear(dim, samples)       # rows: head, level, point
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self):
        """Initialize so that every query samples the same ring of points (appendix A.4).

        Head m samples in the direction 2 pi m / M. Its point k lies k pixels from the reference
        (in the larger of |x| and |y|). All points have the same weight.
        """
        nn.init.zeros_(self.sampling_offsets.weight)
        head = torch.arange(self.num_heads, dtype=torch.float64)
        angle = 2 * math.pi * head / self.num_heads                     # (M,)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)                  # (M, 2)
        distance = torch.arange(1, self.num_points + 1, dtype=torch.float64)[:, None]   # (K, 1)
        ring = direction[:, None, None] * distance                      # (M, 1, K, 2)
        ring = ring.expand(-1, self.num_levels, -1, -1)                 # (M, L, K, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(ring.reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query, reference, tokens, shapes, padding=None):
        """Sample the tokens around the reference of each query -> (B, Nq, C).

        query (B, Nq, C), reference (B, Nq, L, 2 or 4) in [0, 1] of each padded level, tokens
        (B, S, C), shapes [(H, W), ...] of the L levels, padding (B, S) bool, True on padding.
        """
        B, Nq, C = query.shape
        M, L, K = self.num_heads, self.num_levels, self.num_points
        if len(shapes) != L:
            raise ValueError(f"expected {L} level shapes, got {len(shapes)}: "
                             f"construct MSDeformAttn with num_levels={len(shapes)}")
        value = self.value_proj(tokens)                                 # (B, S, C)
        if padding is not None:
            # After the projection, so that its bias does not fill the padding either.
            value.masked_fill_(padding[..., None], 0)
        value = value.unflatten(-1, (M, C // M))                        # (B, S, M, D)
        offsets = self.sampling_offsets(query).view(B, Nq, M, L, K, 2)
        logits = self.attention_weights(query).view(B, Nq, M, L, K)
        output = ms_deform_attn_fused(value, shapes, offsets, logits, reference, self.impl)
        return self.output_proj(output)                                 # (B, Nq, C)


def sampling_locations(reference, offsets, shapes):
    """phi_l(p) + dp: reference (B, Nq, L, 2 or 4), offsets (B, Nq, M, L, K, 2) -> like offsets.

    With a point as reference, one unit of offset is one pixel of the level. With a box, K units are
    half its width or height: the outermost point of the initial ring lies on the border of the box.
    """
    center = reference[:, :, None, :, None, :2]                         # (B, Nq, 1, L, 1, 2)
    if reference.shape[-1] == 2:
        return center + offsets / _level_sizes(center, shapes)
    if reference.shape[-1] == 4:
        size = reference[:, :, None, :, None, 2:]                       # (B, Nq, 1, L, 1, 2)
        return center + offsets * (0.5 / offsets.shape[-2]) * size
    raise ValueError("expected references with 2 (x, y) or 4 (cx, cy, w, h) coordinates, "
                     f"got {reference.shape[-1]}")


def ms_deform_attn(value, shapes, locations, weights, impl=None):
    """Sample `value` at `locations`, weighted: the operator, plain form -> (B, Nq, M D) like value.

    value (B, S, M, D) in float64, float32, float16 or bfloat16, shapes [(H, W), ...], locations
    (B, Nq, M, L, K, 2) as (x, y) and weights (B, Nq, M, L, K), both used as float32 (float64 beside
    float64 values). All three tensors have gradients.

    impl: "kernel" = the C++ or CUDA kernel, "torch" = the reference implementation, None = the
    kernel where one can be built. Raises ValueError where shapes, dtypes or devices do not fit
    together, BuildError where impl is "kernel" and none can be built, KernelError where the kernel
    computes wrong numbers on this device.
    """
    if not use_kernel(impl, locations, value, weights):
        check_arguments(value, _flat(shapes), locations, weights)
        return ms_deform_attn_torch(value, shapes, locations, weights)
    dtype = coordinate_dtype(value)
    return torch.ops.paperdetr.ms_deform_attn(
        value, _flat(shapes), locations.to(dtype), weights.to(dtype), None)


def ms_deform_attn_fused(value, shapes, offsets, logits, reference, impl=None):
    """The operator from what the linear layers give, fused form -> (B, Nq, M D) like value.

    offsets (B, Nq, M, L, K, 2), logits (B, Nq, M, L, K), reference (B, Nq, L, 2 or 4). The softmax
    over L K and `sampling_locations` happen inside: two tensors of the size of the offsets are not
    written to memory, and offsets and logits may be in half precision.
    """
    if not use_kernel(impl, reference, value, offsets, logits):
        check_arguments(value, _flat(shapes), offsets, logits, reference)
        return _reference_implementation(value, shapes, offsets, logits, reference)
    return torch.ops.paperdetr.ms_deform_attn(
        value, _flat(shapes), offsets.to(value.dtype), logits.to(value.dtype),
        reference.to(coordinate_dtype(value)))


def ms_deform_attn_torch(value, shapes, locations, weights):
    """The reference implementation of the plain form, which every kernel is compared with.

    A sampling point is the sum of the four pixels around it, each times the area of the rectangle
    between the point and the opposite pixel. A NaN location makes the output of its own query and
    head NaN and reaches nothing else. A pixel outside the map adds exactly zero.
    """
    B, S, M, D = value.shape
    dtype = torch.promote_types(coordinate_dtype(value), locations.dtype)
    locations = locations.to(dtype)
    weights = weights.to(dtype)

    # Borders of zeros, two pixels before and three behind: no point needs a test.
    maps = []
    for level, (H, W) in zip(value.to(dtype).split([H * W for H, W in shapes], dim=1), shapes):
        level = F.pad(level.view(B, H, W, M * D), (0, 0, 2, 3, 2, 3))   # (B, H + 5, W + 5, M D)
        maps.append(level.flatten(1, 2))
    rows = torch.cat(maps, 1).view(-1, D)                               # (B S' M, D)

    # In pixels: (0, 0) is the center of the top left one. Beyond these limits all is zero.
    size = _level_sizes(locations, shapes)                              # (L, 1, 2): W, H
    position = (locations * size - 0.5).clamp(min=-2).minimum(size + 1)  # (B, Nq, M, L, K, 2)
    cell = position.detach().nan_to_num(nan=0.0).floor()                # the pixel at the top left
    right, below = (position - cell).unbind(-1)                         # (B, Nq, M, L, K) each
    left = 1 - right
    above = 1 - below

    # The rows of the four pixels, and their sum.
    x, y = (cell.long() + 2).unbind(-1)                                 # (B, Nq, M, L, K) each
    width, height = (size.long() + 5).unbind(-1)                        # (L, 1) each
    cells = width * height
    start = cells.cumsum(0) - cells                                     # (L, 1)
    image = torch.arange(B, device=value.device).view(-1, 1, 1, 1, 1)
    head = torch.arange(M, device=value.device).view(-1, 1, 1)          # (M, 1, 1)
    first = (image * cells.sum() + start + y * width + x) * M + head    # (B, Nq, M, L, K)
    output = 0
    for step, area in ((0, left * above), (M, right * above),
                       (width * M, left * below), (width * M + M, right * below)):
        pixels = rows.index_select(0, (first + step).flatten())         # (B Nq M L K, D)
        pixels = pixels.view(*first.shape[:3], -1, D)                   # (B, Nq, M, L K, D)
        area = (area * weights).flatten(3)                              # (B, Nq, M, L K)
        output = output + (area[..., None] * pixels).sum(-2)            # (B, Nq, M, D)
    return output.flatten(2).to(value.dtype)                            # (B, Nq, M D)


def _reference_implementation(value, shapes, points, weights, reference=None):
    """Both forms: without reference, points and weights are locations and weights."""
    if reference is not None:
        logits = weights
        weights = logits.flatten(-2).softmax(-1, dtype=coordinate_dtype(value)).view_as(logits)
        points = sampling_locations(reference, points.to(weights.dtype), shapes)
    return ms_deform_attn_torch(value, shapes, points, weights)


def _level_sizes(like, shapes):
    """Width and height of all levels, (L, 1, 2), on the device and in the dtype of a tensor."""
    # Filled on the device: copying a list from the host would make it wait.
    return torch.stack([like.new_full((), n) for H, W in shapes for n in (W, H)]).view(-1, 1, 2)


def _flat(shapes):
    return [n for shape in shapes for n in shape]


deformable_attn_operator.reference_implementation = _reference_implementation


if __name__ == "__main__":
    deformable_attn_operator.self_test(ms_deform_attn_fused)
