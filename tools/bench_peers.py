"""Implementations of deformable attention under one interface, ours and others, to compare their
results and their times.

They start from different inputs: "plain" from sampling locations and weights, "fused" from the
outputs of the linear layers, offsets and logits. DCNv4 takes locations and logits. Inputs that an
implementation needs in another type or order are prepared before the clock starts.
"""
import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from deformable_attn import ms_deform_attn, ms_deform_attn_fused, ms_deform_attn_torch
from tools.bench_kernel import operator_inputs

IM2COL_STEP = 64   # images that the authors' kernel computes at a time


class Call(NamedTuple):
    """One implementation, on one input."""
    forward: Callable        # function of nothing -> output (B, Nq, M D)
    trained: list[Tensor]    # the tensors that have gradients
    exact: Callable          # the reference implementation, as a function of tensors like `trained`


class Implementation(NamedTuple):
    """prepare makes a Call of (case, inputs); see `Case` and `Inputs` of bench_kernel.py."""
    form: str                # what it starts from
    prepare: Callable
    module: str = ""         # the package that it needs, for others than ours


# ---- ours ----------------------------------------------------------------------------------------

def plain(case, inputs, impl="kernel") -> Call:
    """Our operator from locations and weights."""
    locations, weights = operator_inputs(case, inputs)
    trained = [inputs.value, locations, weights]

    def forward():
        return ms_deform_attn(inputs.value, case.shapes, locations, weights, impl)
    return Call(forward, trained, partial(plain_exact, case))


def fused(case, inputs) -> Call:
    """Our operator from offsets and logits."""
    value, offsets, logits, reference = inputs

    def forward():
        return ms_deform_attn_fused(value, case.shapes, offsets, logits, reference, "kernel")

    def exact(value, offsets, logits):
        points = reference.to(value.dtype)
        return ms_deform_attn_fused(value, case.shapes, offsets, logits, points, "torch")
    return Call(forward, [value, offsets, logits], exact)


def plain_exact(case, value, locations, weights):
    return ms_deform_attn_torch(value, case.shapes, locations, weights)


# ---- others --------------------------------------------------------------------------------------

def shapes_and_starts(case, inputs) -> tuple[Tensor, Tensor]:
    """Level shapes (L, 2) and the first token of each level (L,), as tensors for the others."""
    shapes = torch.tensor(case.shapes, device=inputs.value.device)
    sizes = shapes.prod(1)
    return shapes, sizes.cumsum(0) - sizes


def in_one_type(case, inputs) -> list[Tensor]:
    """Value, locations and weights, all in the type of the values: others accept one type only."""
    dtype = inputs.value.dtype
    places = [tensor.detach().to(dtype) for tensor in operator_inputs(case, inputs)]
    return [inputs.value, *(tensor.requires_grad_() for tensor in places)]


class Extension(torch.autograd.Function):
    """The extension that Deformable DETR's authors compile."""

    @staticmethod
    def forward(ctx, module, value, shapes, starts, locations, weights):
        ctx.module = module
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        return module.ms_deform_attn_forward(value, shapes, starts, locations, weights, IM2COL_STEP)

    @staticmethod
    def backward(ctx, grad_output):
        grads = ctx.module.ms_deform_attn_backward(*ctx.saved_tensors, grad_output.contiguous(),
                                                   IM2COL_STEP)
        return None, grads[0], None, None, grads[1], grads[2]


def authors(case, inputs) -> Call:
    """The authors' kernel, from their extension."""
    module = importlib.import_module("MultiScaleDeformableAttention")
    shapes, starts = shapes_and_starts(case, inputs)
    trained = in_one_type(case, inputs)
    value, locations, weights = trained

    def forward():
        return Extension.apply(module, value, shapes, starts, locations, weights)
    return Call(forward, trained, partial(plain_exact, case))


def mmcv(case, inputs) -> Call:
    """The authors' kernel as mmcv compiles it, for half precision too."""
    module = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    function = module.MultiScaleDeformableAttnFunction.apply
    shapes, starts = shapes_and_starts(case, inputs)
    trained = in_one_type(case, inputs)
    value, locations, weights = trained

    def forward():
        return function(value, shapes, starts, locations, weights, IM2COL_STEP)
    return Call(forward, trained, partial(plain_exact, case))


def msda_triton(case, inputs) -> Call:
    """The Triton kernel of roulbac/msda-triton."""
    function = importlib.import_module("msda_triton").multi_scale_deformable_attention
    shapes, starts = shapes_and_starts(case, inputs)
    trained = in_one_type(case, inputs)
    value, locations, weights = trained

    def forward():
        return function(value, shapes, starts, locations, weights)
    return Call(forward, trained, partial(plain_exact, case))


def deformops(backend, case, inputs) -> Call:
    """deformops 3 with one of its backends, TRITON or CUDA. Locations stay in float32.

    `fp32acc` is what deformops chooses by itself: from sm_90 on, Triton sums the gradients of the
    values in the type of the values."""
    # Compile its CUDA kernels where none are installed.
    os.environ.setdefault("DEFORMOPS_COMPILE", "fallback")
    registry = importlib.import_module("deformops.registry")
    options = {"backend": getattr(registry.Backend, backend)}
    if backend == "TRITON":
        options["fp32acc"] = inputs.value.is_cuda and torch.cuda.get_device_capability() < (9, 0)
    shapes, starts = shapes_and_starts(case, inputs)
    value, _, weights = in_one_type(case, inputs)
    locations, _ = operator_inputs(case, inputs)
    trained = [value, locations, weights]

    def forward():
        return registry.msda(value, shapes, starts, locations, weights, **options)
    return Call(forward, trained, partial(plain_exact, case))


def dcnv4(case, inputs) -> Call:
    """DCNv4's FlashDeformAttn: locations and logits of a head in one tensor of float16."""
    function = importlib.import_module("DCNv4.functions").FlashDeformAttnFunction.apply
    shapes, starts = shapes_and_starts(case, inputs)
    L = len(case.shapes)
    K = case.points
    locations, _ = operator_inputs(case, inputs)
    value = inputs.value
    parts = (locations.flatten(-3), inputs.logits.flatten(-2))
    joined = torch.cat(parts, -1).detach().to(value.dtype).requires_grad_()     # (B, Nq, M, 3 L K)

    def forward():
        return function(value, shapes, starts, joined, IM2COL_STEP, K)

    def exact(value, joined):
        locations, logits = joined.split([2 * L * K, L * K], -1)
        locations = locations.unflatten(-1, (L, K, 2))
        weights = logits.softmax(-1).unflatten(-1, (L, K))
        return ms_deform_attn_torch(value, case.shapes, locations, weights)
    return Call(forward, [value, joined], exact)


IMPLEMENTATIONS = {
    "ours": Implementation("plain", plain),
    "ours, fused": Implementation("fused", fused),
    "ours, fused, deterministic": Implementation("fused", fused),
    "PyTorch": Implementation("plain", partial(plain, impl="torch")),
    "Deformable-DETR": Implementation("plain", authors, "MultiScaleDeformableAttention"),
    "mmcv": Implementation("plain", mmcv, "mmcv"),
    "DCNv4": Implementation("fused", dcnv4, "DCNv4"),
    "msda-triton": Implementation("plain", msda_triton, "msda_triton"),
    "deformops, Triton": Implementation("plain", partial(deformops, "TRITON"), "deformops"),
    "deformops, CUDA": Implementation("plain", partial(deformops, "CUDA"), "deformops")}


def is_installed(name: str) -> bool:
    """Whether an implementation can be imported here."""
    module = IMPLEMENTATIONS[name].module
    return not module or importlib.util.find_spec(module) is not None


# ---- errors --------------------------------------------------------------------------------------

def errors(call: Call) -> list[float]:
    """Relative error, |x - exact| / |exact| over all elements, of the output and of each gradient.

    The exact values are those of the reference implementation in float64. Memory is filled with NaN
    before the call: an element that nobody writes gives NaN."""
    fill_with_nan(call.trained)
    output = call.forward()
    grad_output = torch.randn_like(output)
    results = [output, *torch.autograd.grad(output, call.trained, grad_output)]
    doubles = [tensor.detach().double().requires_grad_() for tensor in call.trained]
    exact = call.exact(*doubles)
    grads = torch.autograd.grad(exact, doubles, grad_output.double().view_as(exact))
    return [relative_error(x, y) for x, y in zip(results, [exact, *grads])]


def fill_with_nan(tensors) -> None:
    """Leave NaN in the memory that tensors of these sizes are allocated from next."""
    filled = [torch.full_like(tensor, torch.nan) for tensor in tensors for _ in range(2)]
    del filled


def relative_error(x, exact) -> float:
    exact = exact.detach()
    return ((x.detach().double().view_as(exact) - exact).norm() / exact.norm()).item()
