"""Problems for the tests of the deformable attention, and every kernel that runs on a CPU.

A pytest plugin: test files name it in `pytest_plugins` for its fixtures.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import deformable_attn
import deformable_attn_build as build
import deformable_attn_operator as operator
from deformable_attn import (
    ms_deform_attn_fused,
    ms_deform_attn_torch,
)

ROOT = Path(deformable_attn.__file__).parent
CUDA_SOURCE = ROOT / "deformable_attn_kernel.cu"
SM_90 = ("-D__CUDA_ARCH__=900", "-D__CUDACC_VER_MAJOR__=12", "-D__CUDACC_VER_MINOR__=1")
HALVES = (torch.float16, torch.bfloat16)
# The largest error allowed, relative to the largest value of a tensor.
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
PYRAMID = [(5, 7), (3, 4), (1, 1), (1, 3)]


def compile_cpp(source, target, *flags):
    subprocess.run(["c++", "-std=c++17", *flags, str(source), "-o", str(target)], check=True)
    return target


def emulate(folder, *flags):
    """The CUDA source, rewritten just enough to be C++ and run one thread after another."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler c++ on the PATH")
    source = re.sub(r"#include <cuda.*\n", "", CUDA_SOURCE.read_text())
    source, launches = re.subn(
        r"(\w+<T, \w+>)<<<(\w+), (\w+), 0, stream>>>\((\w+)\);",
        r"emulation::launch(\2, \3, [&] { \1(\4); });",
        source,
    )
    source, additions = re.subn(
        r"asm volatile\(.*?\);", "add_four(to, x[0], x[1], x[2], x[3]);", source, flags=re.S
    )
    assert launches == 3 and "<<<" not in source and additions == 1
    header = ROOT / "tests" / "cuda_emulation.h"
    (folder / "kernel.cpp").write_text(f'#include "{header}"\n{source}')
    library = compile_cpp(
        folder / "kernel.cpp",
        folder / "kernel.so",
        "-O1",
        "-shared",
        "-fPIC",
        "-fno-strict-aliasing",
        "-Wno-unknown-pragmas",
        *flags,
    )
    return build.Kernels(ctypes.CDLL(str(library)), tuple(build.DTYPES))


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """As compiled below sm_90: one addition at a time."""
    return emulate(tmp_path_factory.mktemp("emulation"))


@pytest.fixture(scope="session")
def emulated_sm_90(tmp_path_factory):
    """As compiled for sm_90 by CUDA 12.1: four additions at a time."""
    return emulate(tmp_path_factory.mktemp("emulation_sm_90"), *SM_90)


@pytest.fixture(scope="session")
def loops():
    kernels = build.load_kernels("cpu", None)
    if isinstance(kernels, build.BuildError):
        pytest.skip(str(kernels))
    return kernels


@pytest.fixture(params=["loops", "emulated", "emulated, deterministic"])
def kernels(request):
    """Every compiled implementation that runs on a CPU, as (kernels, deterministic)."""
    name, _, deterministic = request.param.partition(", ")
    return request.getfixturevalue(name), bool(deterministic)


def problem(shapes=PYRAMID, B=2, Nq=6, M=3, D=5, K=3, reference=0, dtype=torch.float64, seed=0):
    """Random inputs -> value, points, weights, reference or None.

    Locations reach 0.3 of the map beyond its borders.
    """
    generator = torch.Generator().manual_seed(seed)
    L, S = len(shapes), sum(H * W for H, W in shapes)
    Nq = S if Nq is None else Nq

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    value = normal(B, S, M, D).to(dtype)
    if reference:
        offsets = normal(B, Nq, M, L, K, 2).mul(2).to(dtype)
        logits = normal(B, Nq, M, L, K).to(dtype)
        return value, offsets, logits, uniform(B, Nq, L, reference).to(wide)
    locations = uniform(B, Nq, M, L, K, 2) * 1.6 - 0.3
    # Not on the center of a pixel, where the gradient jumps.
    pixels = locations * torch.tensor([(W, H) for H, W in shapes])[:, None] - 0.5
    on_center = (pixels - pixels.round()).abs() < 1e-3
    locations = torch.where(on_center, locations + 0.01, locations)
    return value, locations.to(wide), normal(B, Nq, M, L, K).to(wide), None


def expected_output(shapes, inputs, grad_output=None):
    """The reference implementation in float64 on (possibly rounded) inputs.

    -> output, or [output, gradients ...]
    """
    inputs = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    value, points, weights, reference = inputs
    if reference is None:
        output = ms_deform_attn_torch(value, shapes, points, weights)
    else:
        output = ms_deform_attn_fused(value, shapes, points, weights, reference, impl="torch")
    if grad_output is None:
        return output.detach()
    return [
        output.detach(),
        *torch.autograd.grad(output, [t for t in inputs if t is not None], grad_output.double()),
    ]


def run(kernels, shapes, inputs, grad_output):
    """The same through compiled kernels -> [output, gradients ...]."""
    kernels, deterministic = kernels
    flat, fused = [n for shape in shapes for n in shape], inputs[3] is not None
    value, points, weights, reference = [None if t is None else t.detach() for t in inputs]
    output = operator.run_forward(kernels, value, flat, points, weights, reference)
    grads = operator.run_backward(
        kernels,
        grad_output.to(value.dtype),
        value,
        flat,
        points,
        weights,
        reference,
        fused,
        deterministic,
    )
    return [output, *grads[: 4 if fused else 3]]


def assert_close(actual, expected, tolerance):
    """Expect max |error| <= tolerance * max |expected|, tensor by tensor."""
    for name, a, e in zip(("output", "value", "points", "weights", "reference"), actual, expected):
        assert a.shape == e.shape, name
        if e.numel():
            error = (a.double() - e.double()).abs().max().item()
            size = e.double().abs().max().item()
            assert error <= tolerance * size, f"{name}: error {error:.2g}, values to {size:.2g}"
