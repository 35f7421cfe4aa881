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
    W_m        output_proj                   C -> C, all heads' side by side

B images, S = sum of H_l W_l tokens, Nq queries, C channels, M heads, D = C / M, L levels, K points per level.

    attention = MSDeformAttn(256, 8, 4, 4)
    output = attention(query, reference, tokens, [(100, 167), (50, 84), (25, 42), (13, 21)], padding)

Below: the module, the operator in two forms, its definition, the build and registration of the kernels, and the doctor
that `python deformable_attn.py` runs. References are relative to the padded level: a point of the unpadded image times
the level's valid share. `ms_deform_attn` takes the arguments of the authors' MSDeformAttnFunction, shapes as a list, and
needs neither level_start_index (levels follow each other) nor im2col_step. There is no second derivative, and devices
other than CPU and CUDA run the definition. Import the file under one name: PyTorch registers an operator once.
"""
import ctypes
import functools
import hashlib
import itertools
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

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
        the reference (in the larger of |x| and |y|), all points weighted alike (appendix A.4 of the paper)."""
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
        logits = self.attention_weights(query).view(B, Nq, M, L, K)
        return self.output_proj(ms_deform_attn_fused(value, shapes, offsets, logits, reference))


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
    """The operator: value (B, S, M, D), shapes [(H, W), ...], locations (B, Nq, M, L, K, 2) as (x, y), weights
    (B, Nq, M, L, K) -> (B, Nq, M D) in the dtype of value.

    impl: "kernel" = the C++ or CUDA kernel, "torch" = the definition, None = the kernel where one can be built.
    Values may be float64, float32, float16 or bfloat16; locations and weights are taken as float32 (float64 beside
    float64 values). All three have gradients. Raises ValueError where shapes, dtypes or devices do not fit together."""
    _check(value, shapes, locations, weights)
    if not _use_kernel(value, impl):
        return ms_deform_attn_torch(value, shapes, locations, weights)
    dtype = _coordinate_dtype(value)
    return torch.ops.paperdetr.ms_deform_attn(value, _flat(shapes), locations.to(dtype), weights.to(dtype), None)


def ms_deform_attn_fused(value, shapes, offsets, logits, reference, impl=None):
    """The same from what the linear layers give: offsets (B, Nq, M, L, K, 2), logits (B, Nq, M, L, K) and references
    (B, Nq, L, 2 or 4). The softmax over L K and `sampling_locations` happen inside: two tensors of the size of the
    offsets are never written, and offsets and logits may be half precision."""
    _check(value, shapes, offsets, logits, reference)
    if not _use_kernel(value, impl):
        weights = logits.flatten(-2).softmax(-1, dtype=_coordinate_dtype(value)).view_as(logits)
        locations = sampling_locations(reference, offsets.to(weights.dtype), shapes)
        return ms_deform_attn_torch(value, shapes, locations, weights)
    return torch.ops.paperdetr.ms_deform_attn(
        value, _flat(shapes), offsets.to(value.dtype), logits.to(value.dtype), reference.to(_coordinate_dtype(value)))


def ms_deform_attn_torch(value, shapes, locations, weights):
    """The definition. Every other implementation is measured against this one, in float64.

    A NaN location makes the output of its own query and head NaN and reaches nothing else."""
    B, S, M, D = value.shape
    dtype = torch.promote_types(_coordinate_dtype(value), locations.dtype)
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
        output = output + (looks * weights[:, :, None, :, l].transpose(1, 3)).sum(-1)           # (B, M, D, Nq)
    return output.flatten(1, 2).transpose(1, 2).to(value.dtype)                     # (B, Nq, M D)


def _coordinate_dtype(tensor):
    """Coordinates and weights are float32 even beside half-precision values: bf16 would place a point no better than
    1/256 of the map. float64 stays float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _flat(shapes):
    return [n for shape in shapes for n in shape]


def _check(value, shapes, points, weights, reference=None):
    """Raises ValueError unless the tensors describe one problem."""
    def expect(good, what, got):
        if not good:
            raise ValueError(f"ms_deform_attn expected {what}, got {got}: see the shapes at the top of {__name__}.py")

    expect(value.ndim == 4, "value (B, S, M, D)", tuple(value.shape))
    B, S, M, D = value.shape
    expect(points.ndim == 6 and points.shape[0] == B and points.shape[2:4] == (M, len(shapes)) and points.shape[5] == 2,
           f"points ({B}, Nq, {M}, {len(shapes)}, K, 2)", tuple(points.shape))
    expect(weights.shape == points.shape[:-1], f"weights {tuple(points.shape[:-1])}", tuple(weights.shape))
    expect(len(shapes) <= MAX_LEVELS and all(H > 0 and W > 0 for H, W in shapes), f"1 to {MAX_LEVELS} non-empty levels", shapes)
    expect(S == sum(H * W for H, W in shapes), f"S = the sum of H W over {list(shapes)}", f"S = {S}")
    expect(S * M * D < 2**32, "fewer than 2^32 values an image", S * M * D)
    expect(value.dtype in DTYPES, f"value in {', '.join(DTYPES.values())}", value.dtype)
    tensors = [points, weights]
    if reference is not None:
        expect(reference.ndim == 4 and reference.shape[:3] == (B, points.shape[1], len(shapes)) and reference.shape[3] in (2, 4),
               f"reference ({B}, {points.shape[1]}, {len(shapes)}, 2 or 4)", tuple(reference.shape))
        tensors.append(reference)
    expect(all(t.device == value.device for t in tensors), f"all tensors on {value.device}", [str(t.device) for t in tensors])


# ---- Kernels: built at first use, loaded once, called through ctypes ------------------------------------------------

DTYPES = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
MAX_LEVELS = 32
CPU_FLAGS = ["-std=c++17", "-shared", "-fPIC", "-O3", "-march=native", "-fopenmp",
             # Sums may be reordered, which makes them vector code. NaN and infinity keep their meaning.
             "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"]


class Problem(ctypes.Structure):
    """`struct Problem` of the kernel files, field by field."""
    _fields_ = ([(name, ctypes.c_void_p) for name in (
                    "value", "points", "weights", "reference", "grad_output",
                    "output", "grad_value", "grad_points", "grad_weights", "grad_locations",
                    "cells", "corner_weights", "rows", "first")]
                + [(name, ctypes.c_int64) for name in ("B", "S", "Nq")]
                + [(name, ctypes.c_int) for name in ("M", "D", "L", "K", "reference_size", "threads")]
                + [(name, ctypes.c_int * MAX_LEVELS) for name in ("H", "W", "start")])


class BuildError(RuntimeError):
    """A kernel could not be built; the text says why and what would help."""


class Kernels:
    """One compiled kernel file. `dtypes` are those it computes in; it is handed other values as float32."""

    def __init__(self, path, dtypes):
        self.library, self.dtypes = ctypes.CDLL(str(path)), dtypes

    def __call__(self, name, shapes, value, points, **tensors):
        """Runs one entry point. Every tensor is contiguous, 16-byte aligned and kept alive by the caller during the call."""
        (B, S, M, D), (_, Nq, _, L, K, _) = value.shape, points.shape
        reference = tensors.get("reference")
        problem = Problem(value=value.data_ptr(), points=points.data_ptr(), B=B, S=S, Nq=Nq, M=M, D=D, L=L, K=K,
                          reference_size=0 if reference is None else reference.shape[-1], threads=torch.get_num_threads(),
                          **{key: tensor.data_ptr() for key, tensor in tensors.items() if tensor is not None})
        sizes = [H * W for H, W in zip(shapes[::2], shapes[1::2])]
        problem.H[:L], problem.W[:L], problem.start[1:L] = shapes[::2], shapes[1::2], list(itertools.accumulate(sizes[:-1]))
        self.launch(getattr(self.library, f"{name}_{DTYPES[value.dtype]}"), problem, value.device)

    def launch(self, function, problem, device):
        if device.type == "cpu":
            code = function(ctypes.byref(problem), None)
        else:
            with torch.cuda.device(device):
                code = function(ctypes.byref(problem), ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream))
        if code:
            self.library.error_text.restype = ctypes.c_char_p
            raise RuntimeError(f"{function.__name__} on {device}: {self.library.error_text(code).decode()}")


def _use_kernel(value, impl):
    if impl not in (None, "kernel", "torch"):
        raise ValueError(f'expected impl None, "kernel" or "torch", got {impl!r}')
    return impl != "torch" and _kernel_works(value.device.type, value.device.index, impl == "kernel")


@torch.compiler.assume_constant_result    # torch.compile asks once, while tracing, and does not look inside
def _kernel_works(device_type, index, required):
    kernels = _kernels(device_type, index)
    if required and isinstance(kernels, BuildError):
        raise kernels
    return not isinstance(kernels, BuildError)


@functools.cache
def _kernels(device_type, index):
    """The kernels of a device, built first where they are not in the cache. Where that fails: a warning, once, that says
    why and what is used instead, and the BuildError in place of the kernels."""
    try:
        if device_type == "cpu":
            return Kernels(build("cpp", [*CPU_FLAGS, _cpu_name()], _compile_cpu), (torch.float32, torch.float64))
        if device_type == "cuda" and torch.version.cuda:
            major, minor = torch.cuda.get_device_capability(index)
            return Kernels(build_cuda(f"{major}{minor}"), tuple(DTYPES))
        raise BuildError(f"there is no kernel for device {device_type!r}")
    except BuildError as error:
        cost = "a training step takes about 1.7 times as long" if device_type == "cpu" else "slower, and with more memory"
        warnings.warn(f"deformable attention runs as plain PyTorch ({cost}): {error}")
        return error


def build(suffix, facts, compile):
    """Path of the compiled deformable_attn_kernel.<suffix>. Everything the machine code depends on is in the cached file's
    name (source, torch, `facts`), so a stale one is never picked up. The build happens in a folder of its own and is
    renamed when whole: a killed build leaves nothing that could be loaded or waited for. Raises BuildError."""
    source = Path(__file__).with_name(f"deformable_attn_kernel.{suffix}")
    try:
        key = hashlib.sha256("\n".join([source.read_text(), torch.__version__, *facts]).encode()).hexdigest()[:16]
        folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
        target = folder / f"deformable_attn_{suffix}_{key}.so"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix="deformable_attn_build_") as scratch:
                os.replace(compile(source, Path(scratch)), target)
        return target
    except OSError as error:
        raise BuildError(f"{error}; TORCH_EXTENSIONS_DIR names the folder for compiled kernels") from error


def _compile_cpu(source, scratch):
    compiler, target = os.environ.get("CXX", "c++"), scratch / "kernel.so"
    try:
        run = subprocess.run([compiler, *CPU_FLAGS, str(source), "-o", str(target)], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise BuildError(f"no C++ compiler {compiler!r} found; install g++ or clang++, or set CXX") from error
    if run.returncode:
        raise BuildError(f"{compiler} failed: {_first_error(run.stderr)}")
    return target


def build_cuda(sm):
    """Path of the CUDA kernels for one architecture, such as "90". Needs nvcc and ninja. Raises BuildError."""
    def compile(source, scratch):
        from torch.utils import cpp_extension    # not at the top: importing it searches for compilers
        flags = ["-O3", f"-gencode=arch=compute_{sm},code=sm_{sm}"]
        try:
            cpp_extension.load("deformable_attn_kernel", [str(source)], extra_cuda_cflags=flags, build_directory=str(scratch),
                               is_python_module=False)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            raise BuildError(f"the CUDA build failed: {_first_error(str(error))}") from error
        return next(scratch.glob("*.so"))

    return build("cu", [str(torch.version.cuda), sm], compile)


def _first_error(log):
    lines = log.strip().splitlines() or ["no message"]
    return next((line.strip() for line in lines if re.search(r"\b(error|fatal)\b", line)), lines[-1])


def _cpu_name():
    """What -march=native looks at: a cache folder may be shared by different machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor() + platform.machine())


# ---- The registered operator ----------------------------------------------------------------------------------------
# One pair serves both forms: without a reference, points are locations and weights are weights; with one, they are
# offsets and logits. Shapes travel as H0, W0, H1, W1, ...: torch.compile and CUDA graphs see one opaque call.

_operators = torch.library.Library("paperdetr", "DEF")
_operators.define("ms_deform_attn(Tensor value, int[] shapes, Tensor points, Tensor weights, Tensor? reference) -> Tensor")
_operators.define("ms_deform_attn_backward(Tensor grad_output, Tensor? output, Tensor value, int[] shapes, Tensor points, "
                  "Tensor weights, Tensor? reference, bool reference_grad) -> (Tensor, Tensor, Tensor, Tensor)")


def _ready(kernels, value, points, weights, reference, **more):
    """The inputs as the kernels read them: `T` for values, offsets and logits, `C` for locations, weights and references."""
    T = value.dtype if value.dtype in kernels.dtypes else torch.float32
    C = _coordinate_dtype(value)
    dtypes = dict(points=C if reference is None else T, weights=C if reference is None else T, reference=C)
    inputs = {}
    for name, tensor in dict(value=value, points=points, weights=weights, reference=reference, **more).items():
        if tensor is not None:
            tensor = tensor.to(dtypes.get(name, T)).contiguous()
            inputs[name] = tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
    return inputs, C


def run_forward(kernels, value, shapes, points, weights, reference):
    """The operator through one set of kernels -> (B, Nq, M D)."""
    inputs, _ = _ready(kernels, value, points, weights, reference)
    (B, _, M, D), Nq = value.shape, points.shape[1]
    output = inputs["value"].new_empty(B, Nq, M * D)
    kernels("forward", shapes, **inputs, output=output)
    return output.to(value.dtype)


def run_backward(kernels, grad_output, output, value, shapes, points, weights, reference, reference_grad, deterministic):
    """-> gradients of value, points, weights, reference (empty where not wanted). `output` is needed beside a reference.

    deterministic: the value gradient is summed in sorted order instead of by atomics. It costs a sort of B Nq M L K
    integers and about 20 bytes of memory for each; the CPU's loops have one order in any case."""
    inputs, C = _ready(kernels, value, points, weights, reference, grad_output=grad_output, output=output)
    grad_points, grad_weights = torch.empty_like(inputs["points"]), torch.empty_like(inputs["weights"])
    grad_locations = torch.empty_like(inputs["points"], dtype=C) if reference_grad else None
    grads = dict(grad_points=grad_points, grad_weights=grad_weights, grad_locations=grad_locations)
    if deterministic:
        grad_value = torch.empty_like(inputs["value"], dtype=C)
        cells = torch.empty_like(inputs["weights"], dtype=torch.int32)
        corner_weights = cells.new_empty((*cells.shape, 4), dtype=C)
        kernels("backward", shapes, **inputs, **grads, cells=cells, corner_weights=corner_weights)
        cells, order = cells.flatten().sort(stable=True)
        number = value.shape[0] * value.shape[2] * sum((H + 1) * (W + 1) for H, W in zip(shapes[::2], shapes[1::2]))
        first = torch.searchsorted(cells, torch.arange(number + 1, device=cells.device, dtype=torch.int32))
        kernels("sum_by_cell", shapes, **inputs, grad_value=grad_value, first=first,
                corner_weights=corner_weights.view(-1, 4)[order], rows=order // weights.shape[3:].numel())
    else:
        grad_value = torch.zeros_like(inputs["value"], dtype=C)    # summed in C whatever T is
        kernels("backward", shapes, **inputs, **grads, grad_value=grad_value)
    if reference_grad:      # through `sampling_locations`: the centre moves every location of its query and level, a box's
        grad_reference = grad_locations.sum((2, 4))                                 # size scales the offsets (B, Nq, L, 2)
        if reference.shape[-1] == 4:
            grad_size = (grad_locations * points).sum((2, 4)) * (0.5 / points.shape[-2])
            grad_reference = torch.cat([grad_reference, grad_size], -1)
        grad_reference = grad_reference.to(reference.dtype)                         # (B, Nq, L, 2 or 4)
    else:
        grad_reference = value.new_empty(0)
    return grad_value.to(value.dtype), grad_points.to(points.dtype), grad_weights.to(weights.dtype), grad_reference


def _forward(value, *inputs):
    return run_forward(_kernels(value.device.type, value.device.index), value, *inputs)


def _backward(grad_output, output, value, *inputs):
    deterministic = value.is_cuda and torch.are_deterministic_algorithms_enabled()
    return run_backward(_kernels(value.device.type, value.device.index), grad_output, output, value, *inputs, deterministic)


def _autocast_cuda(value, shapes, points, weights, reference):
    """Under CUDA autocast values (and, fused, offsets and logits) are in the autocast type; coordinates never are. There is
    no such rule for the CPU: its loops compute in float32, and half-precision values stay what the layers before made them."""
    dtype = torch.get_autocast_dtype("cuda")
    low = lambda tensor: tensor.to(dtype) if tensor.dtype == torch.float32 else tensor
    with torch.autocast("cuda", enabled=False):
        if reference is not None:
            points, weights = low(points), low(weights)
        return torch.ops.paperdetr.ms_deform_attn(low(value), shapes, points, weights, reference)


for _device in ("CPU", "CUDA"):
    _operators.impl("ms_deform_attn", _forward, _device)
    _operators.impl("ms_deform_attn_backward", _backward, _device)
_operators.impl("ms_deform_attn", _autocast_cuda, "AutocastCUDA")


@torch.library.register_fake("paperdetr::ms_deform_attn", lib=_operators)
def _(value, shapes, points, weights, reference):
    B, _, M, D = value.shape
    return value.new_empty(B, points.shape[1], M * D)


@torch.library.register_fake("paperdetr::ms_deform_attn_backward", lib=_operators)
def _(grad_output, output, value, shapes, points, weights, reference, reference_grad):
    gradients = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (value, points, weights)]
    return (*gradients, reference.new_empty(reference.shape) if reference_grad else value.new_empty(0))


def _save_for_backward(ctx, inputs, output):
    value, ctx.shapes, points, weights, reference = inputs
    ctx.save_for_backward(None if reference is None else output, value, points, weights, reference)


def _gradients(ctx, grad_output):
    output, value, points, weights, reference = ctx.saved_tensors
    wanted = ctx.needs_input_grad[4]
    grads = torch.ops.paperdetr.ms_deform_attn_backward(
        grad_output, output, value, ctx.shapes, points, weights, reference, wanted)
    return grads[0], None, grads[1], grads[2], grads[3] if wanted else None


torch.library.register_autograd("paperdetr::ms_deform_attn", _gradients, setup_context=_save_for_backward, lib=_operators)


# ---- The doctor: python deformable_attn.py -------------------------------------------------------------------------

def doctor():
    """Prints what was found and built, the error of every implementation against the float64 definition, and times."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CUDA {torch.version.cuda}")
    for name in (os.environ.get("CXX", "c++"), "nvcc", "ninja"):
        print(f"{name:6} {shutil.which(name) or 'not found'}")
    for device in devices:
        start = time.perf_counter()
        kernels = _kernels(device, torch.cuda.current_device() if device == "cuda" else None)
        done = f"none: {kernels}" if isinstance(kernels, BuildError) else kernels.library._name
        print(f"{device} kernels, {time.perf_counter() - start:.1f} s: {done}")
    print("\nlargest error / largest value against the float64 definition (output; gradients of value, offsets, logits)")
    print("milliseconds, forward and forward + backward: 8 images of 128 x 128 pixels, 336 queries, 4 heads of 32 channels")
    shapes, generator = [(16, 16), (8, 8), (4, 4)], torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    inputs = normal(8, 336, 4, 32), normal(8, 336, 4, 3, 4, 2) * 2, normal(8, 336, 4, 3, 4)
    reference = torch.rand(8, 336, 3, 2, generator=generator)

    def passes(device, dtype, impl, rounded_to=None):
        value, offsets, logits = (t.to(rounded_to or dtype).to(device, dtype).requires_grad_() for t in inputs)
        output = ms_deform_attn_fused(value, shapes, offsets, logits, reference.to(device, _coordinate_dtype(value)), impl)
        yield output
        yield from torch.autograd.grad(output.sum(), (value, offsets, logits))

    def milliseconds(count, *case):
        def once():
            start = time.perf_counter()
            list(itertools.islice(passes(*case), count))
            if case[0] == "cuda":
                torch.cuda.synchronize()
            return 1e3 * (time.perf_counter() - start)
        return sorted(once() for _ in range(7))[3]

    for device, dtype, impl in itertools.product(devices, (torch.float32, torch.bfloat16), ("torch", "kernel")):
        if impl == "kernel" and not _kernel_works(device, torch.cuda.current_device() if device == "cuda" else None, False):
            continue
        exact = passes("cpu", torch.float64, "torch", rounded_to=dtype)
        results = [tensor.detach().cpu().double() for tensor in passes(device, dtype, impl)]
        errors = " ".join(f"{(r - e).abs().max() / e.abs().max():.0e}" for r, e in zip(results, exact))
        print(f"{device:5}{DTYPES[dtype]:9} {impl:7} {errors}   "
              f"{milliseconds(1, device, dtype, impl):6.2f} {milliseconds(4, device, dtype, impl):6.2f}")


if __name__ == "__main__":
    doctor()
