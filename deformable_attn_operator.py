"""Register the kernels of deformable_attn.py as operators of PyTorch, and verify them.

The order of this file: the limits of the operator, the operator and its derivatives, which
implementation runs, the comparison with the reference implementation at first use, the self-test.
deformable_attn_build.py compiles and loads the kernels.
"""
import functools
import itertools
import os
import shutil
import threading
import time
import warnings

import torch
from torch import nn
from torch.autograd import forward_ad

from deformable_attn_build import DTYPES, MAX_LEVELS, BuildError, load_kernels

# Set by deformable_attn.py: (value, shapes, points, weights, reference or None) -> output.
reference_implementation = None

MAX_TOKENS = 2**29              # an image; the kernels number tokens and their neighbors in int32
MAX_CELLS = 2**31 - 2           # of the deterministic backward pass, which numbers them in int32


class KernelError(RuntimeError):
    """A kernel computes wrong numbers on this machine; the message names a way to go on."""


def coordinate_dtype(tensor):
    """The dtype of coordinates and weights: float64 beside float64 values, float32 beside others.

    In bfloat16 a point would be placed no better than 1/256 of the map.
    """
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_arguments(value, shapes, points, weights, reference=None):
    """Raise ValueError unless the tensors and shapes (H0, W0, H1, W1, ...) describe one problem."""

    def expect(condition, what, got):
        if not condition:
            raise ValueError(f"ms_deform_attn expected {what}, got {got}: "
                             "see the shapes at the top of deformable_attn.py")

    expect(value.ndim == 4, "value (B, S, M, D)", tuple(value.shape))
    B, S, M, D = value.shape
    levels = list(zip(shapes[::2], shapes[1::2]))
    L = len(levels)
    expect(1 <= L <= MAX_LEVELS, f"1 to {MAX_LEVELS} levels", L)
    expect(min(shapes) > 0, "non-empty levels", levels)
    expect(points.ndim == 6, f"points ({B}, Nq, {M}, {L}, K, 2)", tuple(points.shape))
    Nq, K = points.shape[1], points.shape[4]
    expect(points.shape == (B, Nq, M, L, K, 2), f"points ({B}, Nq, {M}, {L}, K, 2)",
           tuple(points.shape))
    expect(K > 0, "at least one sampling point a level", f"K = {K}")
    expect(weights.shape == (B, Nq, M, L, K), f"weights {(B, Nq, M, L, K)}", tuple(weights.shape))
    expect(S == sum(H * W for H, W in levels), f"S = the sum of H W over {levels}", f"S = {S}")
    expect(S < MAX_TOKENS, "fewer than 2^29 tokens an image", f"S = {S}")
    expect(S * M * D < 2**32, "fewer than 2^32 values an image", S * M * D)
    expect(value.dtype in DTYPES, f"value in {', '.join(DTYPES.values())}", value.dtype)
    tensors = [points, weights]
    if reference is not None:
        expect(reference.ndim == 4 and reference.shape[3] in (2, 4)
               and reference.shape[:3] == (B, Nq, L),
               f"reference ({B}, {Nq}, {L}, 2 or 4)", tuple(reference.shape))
        tensors.append(reference)
    devices = [str(tensor.device) for tensor in tensors]
    expect(set(devices) == {str(value.device)}, f"all tensors on {value.device}", devices)


# ---- The operator in PyTorch ---------------------------------------------------------------------
# One pair serves both forms: without a reference, points are locations and weights are weights;
# with one, they are offsets and logits. Shapes are passed as H0, W0, H1, W1, ...: torch.compile and
# CUDA graphs see one opaque call, and SymInt[] lets one graph serve every image size.

_operators = torch.library.Library("paperdetr", "DEF")
_operators.define("ms_deform_attn(Tensor value, SymInt[] shapes, Tensor points, Tensor weights, "
                  "Tensor? reference) -> Tensor")
_operators.define("ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] shapes, "
                  "Tensor points, Tensor weights, Tensor? reference, bool reference_grad) "
                  "-> (Tensor, Tensor, Tensor, Tensor)")


def _prepare_inputs(kernels, value, points, weights, reference, **more):
    """The inputs as the kernels read them, and the dtype C of sums.

    Values, offsets and logits are in T, locations, weights and references in C.
    """
    T = value.dtype if value.dtype in kernels.dtypes else torch.float32
    C = coordinate_dtype(value)
    dtypes = dict(points=C, weights=C) if reference is None else dict(reference=C)
    tensors = dict(value=value, points=points, weights=weights, reference=reference, **more)
    inputs = {}
    for name, tensor in tensors.items():
        if tensor is not None:
            tensor = tensor.to(dtypes.get(name, T)).contiguous()
            inputs[name] = tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
    return inputs, C


def run_forward(kernels, value, shapes, points, weights, reference):
    """The operator through one set of kernels -> (B, Nq, M D)."""
    check_arguments(value, shapes, points, weights, reference)
    inputs, _ = _prepare_inputs(kernels, value, points, weights, reference)
    B, _, M, D = value.shape
    output = inputs["value"].new_empty(B, points.shape[1], M * D)
    kernels("forward", shapes, **inputs, output=output)
    return output.to(value.dtype)


def run_backward(kernels, grad_output, value, shapes, points, weights, reference, reference_grad,
                 deterministic):
    """Gradients of value, points, weights and reference (empty where reference_grad is False).

    deterministic: sum the value gradient in sorted order instead of by atomics. That takes a sort
    of B Nq M L K integers and about 20 bytes of memory for each. The CPU loops have one order in
    any case.
    """
    check_arguments(value, shapes, points, weights, reference)
    cells_of_levels = [(H + 1) * (W + 1) for H, W in zip(shapes[::2], shapes[1::2])]
    num_cells = value.shape[0] * value.shape[2] * sum(cells_of_levels)
    if deterministic and num_cells > MAX_CELLS:
        raise RuntimeError(f"expected at most {MAX_CELLS} cells (images x heads x pixels) in the "
                           f"deterministic backward pass, got {num_cells}: use smaller batches, or "
                           "turn torch.use_deterministic_algorithms off")
    inputs, C = _prepare_inputs(kernels, value, points, weights, reference, grad_output=grad_output)
    grads = dict(
        grad_points=torch.empty_like(inputs["points"]),
        grad_weights=torch.empty_like(inputs["weights"], dtype=C),
        grad_locations=torch.empty_like(inputs["points"], dtype=C) if reference_grad else None,
    )
    if deterministic:
        grad_value = torch.empty_like(inputs["value"], dtype=C)
        cells = torch.empty_like(inputs["weights"], dtype=torch.int32)
        corner_weights = cells.new_empty((*cells.shape, 4), dtype=C)
        kernels("backward", shapes, **inputs, **grads, cells=cells, corner_weights=corner_weights)
        cells, order = cells.flatten().sort(stable=True)
        numbers = torch.arange(num_cells + 1, device=cells.device, dtype=torch.int32)
        first = torch.searchsorted(cells, numbers)
        corner_weights = corner_weights.view(-1, 4)[order]
        rows = order // weights.shape[3:].numel()
        kernels("sum_by_cell", shapes, **inputs, grad_value=grad_value, first=first,
                corner_weights=corner_weights, rows=rows)
    else:
        grad_value = torch.zeros_like(inputs["value"], dtype=C)
        kernels("backward", shapes, **inputs, **grads, grad_value=grad_value)
    grad_reference = value.new_empty(0)
    if reference_grad:
        # Through `sampling_locations`: the center moves every location of its query and level.
        grad_locations = grads["grad_locations"]
        grad_reference = grad_locations.sum((2, 4))                     # (B, Nq, L, 2)
        if reference.shape[-1] == 4:
            # The size of a box scales its offsets.
            grad_size = (grad_locations * points).sum((2, 4)) * (0.5 / points.shape[-2])
            grad_reference = torch.cat([grad_reference, grad_size], -1)
        grad_reference = grad_reference.to(reference.dtype)             # (B, Nq, L, 2 or 4)
    return (grad_value.to(value.dtype), grads["grad_points"].to(points.dtype),
            grads["grad_weights"].to(weights.dtype), grad_reference)


def _forward(value, *inputs):
    return run_forward(load_kernels(value.device.type, value.device.index), value, *inputs)


def _backward(grad_output, value, *inputs):
    kernels = load_kernels(value.device.type, value.device.index)
    deterministic = value.is_cuda and torch.are_deterministic_algorithms_enabled()
    return run_backward(kernels, grad_output, value, *inputs, deterministic)


def _autocast_cuda(value, shapes, points, weights, reference):
    """Under CUDA autocast, values, offsets and logits are in the autocast dtype.

    Coordinates never are. The CPU has no such rule: its loops compute in float32, and values in
    half precision stay what the layers before made them.
    """
    dtype = torch.get_autocast_dtype("cuda")

    def lower(tensor):
        return tensor.to(dtype) if tensor.dtype == torch.float32 else tensor

    with torch.autocast("cuda", enabled=False):
        if reference is not None:
            points = lower(points)
            weights = lower(weights)
        value = lower(value)
        return torch.ops.paperdetr.ms_deform_attn(value, shapes, points, weights, reference)


for _device in ("CPU", "CUDA"):
    _operators.impl("ms_deform_attn", _forward, _device)
    _operators.impl("ms_deform_attn_backward", _backward, _device)
_operators.impl("ms_deform_attn", _autocast_cuda, "AutocastCUDA")


@torch.library.register_fake("paperdetr::ms_deform_attn", lib=_operators)
def _fake_forward(value, shapes, points, weights, reference):
    B, _, M, D = value.shape
    return value.new_empty(B, points.shape[1], M * D)


@torch.library.register_fake("paperdetr::ms_deform_attn_backward", lib=_operators)
def _fake_backward(grad_output, value, shapes, points, weights, reference, reference_grad):
    gradients = [value.new_empty(value.shape), points.new_empty(points.shape),
                 weights.new_empty(weights.shape), value.new_empty(0)]
    if reference_grad:
        gradients[3] = reference.new_empty(reference.shape)
    return tuple(gradients)


def _save_for_backward(ctx, inputs, output):
    value, ctx.shapes, points, weights, reference = inputs
    ctx.save_for_backward(value, points, weights, reference)


def _gradients(ctx, grad_output):
    value, points, weights, reference = ctx.saved_tensors
    reference_grad = ctx.needs_input_grad[4]
    grads = torch.ops.paperdetr.ms_deform_attn_backward(
        grad_output, value, ctx.shapes, points, weights, reference, reference_grad)
    return grads[0], None, grads[1], grads[2], grads[3] if reference_grad else None


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError('the deformable attention kernel has no second derivative: '
                              'give impl="torch", which has')


torch.library.register_autograd("paperdetr::ms_deform_attn", _gradients,
                                setup_context=_save_for_backward, lib=_operators)
torch.library.register_autograd("paperdetr::ms_deform_attn_backward", _no_second_derivative,
                                lib=_operators)


# ---- Which implementation runs -------------------------------------------------------------------

def use_kernel(impl, coordinates, value, *tensors):
    """Whether the kernel runs for these inputs, by `impl` of `ms_deform_attn`.

    Also checks what torch.compile must not trace: devices, coordinates far outside, forward mode.
    """
    if impl not in (None, "kernel", "torch"):
        raise ValueError(f'expected impl None, "kernel" or "torch", got {impl!r}')
    tensors = (coordinates, value, *tensors)
    if not torch.compiler.is_compiling():
        devices = [str(tensor.device) for tensor in tensors]
        if len(set(devices)) > 1:
            raise ValueError(f"expected all tensors on one device, got {devices}")
        _warn_if_outside(coordinates)
    if impl == "torch" or not _find_kernel(value.device.type, value.device.index, impl == "kernel"):
        return False
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            if forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError('the deformable attention kernel has no forward mode '
                                          'derivative: give impl="torch", which has')
    return True


def _find_kernel(device_type, index, required):
    kernels = load_kernels(device_type, index)
    if isinstance(kernels, BuildError):
        if required:
            raise kernels
        return False
    # The comparison makes the host wait for the GPU, which a graph capture forbids.
    if device_type != "cuda" or not torch.cuda.is_current_stream_capturing():
        _verify(device_type, index)
    return True


# torch.compile calls it once, while tracing. torch.compiler.assume_constant_result sets the same,
# but loads the compiler first, which makes the start of every program two seconds longer.
_find_kernel._dynamo_marked_constant = True

_examined_devices = set()


def _warn_if_outside(coordinates):
    """Warn if all references or locations of the first call on a device lie far outside [0, 1].

    That is what pixels in place of relative coordinates give, and the output is then zero. Later
    calls are not examined: they cost nothing, and no GPU is waited for again.
    """
    device = coordinates.device
    plain_tensor = type(coordinates) in (torch.Tensor, nn.Parameter) and device.type != "meta"
    if device in _examined_devices or not plain_tensor or coordinates.numel() == 0:
        return
    if coordinates.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    _examined_devices.add(device)
    xy = coordinates.detach()[..., :2]
    if ((xy < -1) | (xy > 2)).any(-1).all():
        warnings.warn("all reference points of the deformable attention lie far outside [0, 1], so "
                      "that its output is zero: divide pixels by the width and height of the map")


# ---- The comparison with the reference implementation --------------------------------------------

def verify_kernel(device):
    """Compare the kernel of a device with the reference implementation, once per process.

    Returns True where it is right, False where none can be built (a warning has said why). Raises
    KernelError where its numbers are wrong. The operator calls it at its first use on a device; a
    training program calls it at its start.
    """
    device = torch.device(device)
    index = device.index
    if device.type == "cuda" and index is None:
        index = torch.cuda.current_device()
    return _find_kernel(device.type, index, False)


@functools.cache
def _verify(device_type, index):
    """Raise KernelError unless both forms, forward and backward, agree in every dtype."""
    if reference_implementation is None:
        raise ImportError("expected deformable_attn.py, whose reference implementation the kernel "
                          "is compared with, got deformable_attn_operator.py alone: "
                          "import deformable_attn first")
    kernels = load_kernels(device_type, index)
    failures = []

    def compare_all():
        try:
            for reference_size in (0, 2, 4):
                _compare(kernels, torch.device(device_type, index), reference_size)
        except Exception as error:   # whatever it is: it is raised again outside the thread
            failures.append(error)

    # In a thread of its own, where no autocast, inference mode, dispatch mode or fake tensors of
    # the caller are active.
    thread = threading.Thread(target=compare_all)
    thread.start()
    thread.join()
    if failures:
        raise KernelError(f"the deformable attention kernel on {device_type} is wrong here: "
                          f'{failures[0]}; go on without it by --impl torch (impl="torch" or '
                          'MSDeformAttn.impl = "torch" in Python)') from failures[0]


VERIFY_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 1e-2,
                    torch.bfloat16: 6e-2}


def _compare(kernels, device, reference_size):
    """Raise ArithmeticError unless the kernels agree with the reference implementation.

    The case: two levels with padding on the right, queries that are the tokens (as in an encoder),
    points that reach beyond the map. Values, offsets and logits are exact in every dtype.
    """
    shapes = [(5, 7), (3, 4)]
    B, S, M, D, L, K = 2, 47, 2, 16, 2, 3
    generator = torch.Generator().manual_seed(0)

    def eighths(*shape):
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (8 * normal).round() / 8

    value = eighths(B, S, M, D)
    value[:, 4:35:7] = 0
    value[:, 38:47:4] = 0
    points = eighths(B, S, M, L, K, 2)
    weights = eighths(B, S, M, L, K)
    grad_output = eighths(B, S, M * D)
    reference = None
    inputs = [value, points, weights]
    if reference_size:
        points.mul_(2).add_(1 / 16)
        reference = torch.rand(B, S, L, reference_size, generator=generator).double()
        inputs.append(reference)
    else:
        points.mul_(0.5).add_(0.53)
        points.copy_(points.float())
    for tensor in inputs:
        tensor.requires_grad_()
    output = reference_implementation(value, shapes, points, weights, reference)
    expected = [output, *torch.autograd.grad(output, inputs, grad_output)]

    flat = [n for shape in shapes for n in shape]
    names = ("output", "gradient of value", "gradient of points", "gradient of weights",
             "gradient of reference")
    for dtype in kernels.dtypes:
        C = torch.float64 if dtype == torch.float64 else torch.float32
        dtypes = (dtype, dtype, dtype, C) if reference_size else (dtype, C, C)
        cast = [t.detach().to(device, to) for t, to in zip(inputs, dtypes)]
        arguments = [cast[0], flat, *cast[1:]] + [None] * (reference_size == 0)
        grad = grad_output.to(device, dtype)
        for deterministic in (False, True) if device.type == "cuda" else (False,):
            results = [run_forward(kernels, *arguments)]
            results += run_backward(kernels, grad, *arguments, bool(reference_size), deterministic)
            for name, result, truth in zip(names, results, expected):
                error = (result.cpu().double() - truth).abs().max().item()
                size = truth.abs().max().item()
                if not error <= VERIFY_TOLERANCE[dtype] * size:
                    raise ArithmeticError(f"{name} in {DTYPES[dtype]}: error {error:.2g} beside "
                                          f"values up to {size:.2g}")


# ---- The self-test: python deformable_attn.py ----------------------------------------------------

def self_test(ms_deform_attn_fused):
    """Print what was found and built, the error of every implementation, and times."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, CUDA {torch.version.cuda}")
    for name in (os.environ.get("CXX", "c++"), "nvcc", "ninja"):
        print(f"{name:6} {shutil.which(name) or 'not found'}")
    verified = {}
    for device in devices:
        start = time.perf_counter()
        verified[device] = verify_kernel(device)
        seconds = time.perf_counter() - start
        state = "agree with the reference implementation" if verified[device] else "none"
        print(f"{device} kernels: {state} ({seconds:.1f} s)")

    print("\nlargest error / largest value against the reference implementation in float64")
    print("(output; gradients of value, offsets, logits), then milliseconds, forward and forward +")
    print("backward: 8 images of 128 x 128 pixels, 336 queries, 4 heads of 32 channels")
    shapes = [(16, 16), (8, 8), (4, 4)]
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(8, 336, 4, 32, generator=generator)
    offsets = 2 * torch.randn(8, 336, 4, 3, 4, 2, generator=generator)
    logits = torch.randn(8, 336, 4, 3, 4, generator=generator)
    reference = torch.rand(8, 336, 3, 2, generator=generator)

    def run(device, dtype, impl, backward=True, rounded_to=None):
        inputs = [t.to(rounded_to or dtype).to(device, dtype).requires_grad_()
                  for t in (value, offsets, logits)]
        centers = reference.to(device, coordinate_dtype(inputs[0]))
        output = ms_deform_attn_fused(inputs[0], shapes, *inputs[1:], centers, impl)
        if not backward:
            return [output]
        return [output, *torch.autograd.grad(output.sum(), inputs)]

    def milliseconds(*case):
        times = []
        for _ in range(7):
            start = time.perf_counter()
            run(*case)
            if case[0] == "cuda":
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        return sorted(times)[3]

    dtypes = (torch.float32, torch.bfloat16)
    for device, dtype, impl in itertools.product(devices, dtypes, ("torch", "kernel")):
        if impl == "kernel" and not verified[device]:
            continue
        exact = run("cpu", torch.float64, "torch", rounded_to=dtype)
        results = run(device, dtype, impl)
        errors = []
        for result, truth in zip(results, exact):
            error = (result.cpu().double() - truth).abs().max() / truth.abs().max()
            errors.append(f"{error.item():.0e}")
        forward = milliseconds(device, dtype, impl, False)
        both = milliseconds(device, dtype, impl, True)
        print(f"{device:5}{DTYPES[dtype]:9} {impl:7} {' '.join(errors)}  "
              f"{forward:7.2f} {both:7.2f}")
