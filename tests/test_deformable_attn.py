"""Deformable attention: the reference implementation, and the kernels compared with it.

The kernels are the C++ loops, the CUDA source under emulation, and the CUDA kernel on a GPU.
"""
import ctypes
import math
import os
import re
import shutil
import subprocess
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

import deformable_attn
import deformable_attn_build as build
from deformable_attn import (MSDeformAttn, ms_deform_attn, ms_deform_attn_fused,
                             ms_deform_attn_torch, sampling_locations)

ROOT = Path(deformable_attn.__file__).parent
CUDA_SOURCE = ROOT / "deformable_attn_kernel.cu"
SM_90 = ("-D__CUDA_ARCH__=900", "-D__CUDACC_VER_MAJOR__=12", "-D__CUDACC_VER_MINOR__=1")
HALVES = (torch.float16, torch.bfloat16)
# The largest error allowed, relative to the largest value of a tensor.
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
PYRAMID = [(5, 7), (3, 4), (1, 1), (1, 3)]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler c++ on the PATH")


def compile_cpp(source, target, *flags):
    subprocess.run(["c++", "-std=c++17", *flags, str(source), "-o", str(target)], check=True)
    return target


def emulate(folder, *flags):
    """The CUDA source, rewritten just enough to be C++ and run one thread after another."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler c++ on the PATH")
    source = re.sub(r"#include <cuda.*\n", "", CUDA_SOURCE.read_text())
    source, launches = re.subn(r"(\w+<T, \w+>)<<<(\w+), (\w+), 0, stream>>>\((\w+)\);",
                               r"emulation::launch(\2, \3, [&] { \1(\4); });", source)
    source, additions = re.subn(r"asm volatile\(.*?\);", "add_four(to, x[0], x[1], x[2], x[3]);",
                                source, flags=re.S)
    assert launches == 3 and "<<<" not in source and additions == 1
    header = ROOT / "tests" / "cuda_emulation.h"
    (folder / "kernel.cpp").write_text(f'#include "{header}"\n{source}')
    library = compile_cpp(folder / "kernel.cpp", folder / "kernel.so", "-O1", "-shared", "-fPIC",
                          "-fno-strict-aliasing", "-Wno-unknown-pragmas", *flags)
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


def problem(shapes=PYRAMID, B=2, Nq=6, M=3, D=5, K=3, reference=0, dtype=torch.float64, seed=0, spread=0.3):
    """Random inputs; locations reach `spread` of the map beyond its borders. -> value, points, weights, reference or None."""
    generator = torch.Generator().manual_seed(seed)
    L, S = len(shapes), sum(H * W for H, W in shapes)
    Nq = S if Nq is None else Nq
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    uniform = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    value = normal(B, S, M, D).to(dtype)
    if reference:
        return value, normal(B, Nq, M, L, K, 2).mul(2).to(dtype), normal(B, Nq, M, L, K).to(dtype), uniform(B, Nq, L, reference).to(wide)
    locations = uniform(B, Nq, M, L, K, 2) * (1 + 2 * spread) - spread
    pixels = locations * torch.tensor([(W, H) for H, W in shapes])[:, None] - 0.5          # not on a whole pixel, where the
    locations = torch.where((pixels - pixels.round()).abs() < 1e-3, locations + 0.01, locations)    # gradient jumps
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
    return [output.detach(), *torch.autograd.grad(output, [t for t in inputs if t is not None], grad_output.double())]


def run(kernels, shapes, inputs, grad_output):
    """The same through compiled kernels -> [output, gradients ...]."""
    kernels, deterministic = kernels
    flat, fused = [n for shape in shapes for n in shape], inputs[3] is not None
    value, points, weights, reference = [None if t is None else t.detach() for t in inputs]
    output = build.run_forward(kernels, value, flat, points, weights, reference)
    grads = build.run_backward(kernels, grad_output.to(value.dtype), value, flat, points, weights,
                               reference, fused, deterministic)
    return [output, *grads[:4 if fused else 3]]


def assert_close(actual, expected, tolerance):
    """max |error| <= tolerance * max |reference|, tensor by tensor."""
    for name, a, e in zip(("output", "value", "points", "weights", "reference"), actual, expected):
        assert a.shape == e.shape, name
        if e.numel():
            error, size = (a.double() - e.double()).abs().max().item(), e.double().abs().max().item()
            assert error <= tolerance * size, f"{name}: error {error:.2g} beside values up to {size:.2g}"


# ---- The definition -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("x, y, expected", [(0.5, 0.5, 3.5), (1 / 6, 0.25, 1), (0, 0, 0.25), (1, 1, 1.5), (0.5, 0, 1),
                                            (-0.1, 0.5, 0.5), (1.2, 0.5, 0), (1e6, 0.5, 0), (0.5, -math.inf, 0)])
def test_looks_are_bilinear_and_zero_outside(x, y, expected):
    value = torch.tensor([[1, 2, 3], [4, 5, 6.0]], dtype=torch.float64).view(1, 6, 1, 1)
    locations = torch.tensor([x, y], dtype=torch.float64).view(1, 1, 1, 1, 1, 2)
    for impl in ("torch", None):
        assert ms_deform_attn(value, [(2, 3)], locations, torch.ones(1, 1, 1, 1, 1), impl).item() == pytest.approx(expected, abs=1e-12)


def test_the_definition_equals_loops_over_every_pixel():
    """The slowest oracle: every pixel of the map is a tent, one pixel wide to each side."""
    shapes = [(3, 5), (2, 1)]
    value, locations, weights, _ = problem(shapes, B=1, Nq=2, M=2, D=3, K=2)
    expected = torch.zeros(1, 2, 2, 3, dtype=torch.float64)
    for q in range(2):
        for m in range(2):
            start = 0
            for l, (H, W) in enumerate(shapes):
                for k in range(2):
                    x, y = (locations[0, q, m, l, k] * torch.tensor([W, H]) - 0.5).tolist()
                    for row in range(H):
                        for column in range(W):
                            tent = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
                            expected[0, q, m] += weights[0, q, m, l, k] * tent * value[0, start + row * W + column, m]
                start += H * W
    assert torch.allclose(ms_deform_attn_torch(value, shapes, locations, weights), expected.flatten(2), atol=1e-12)


def test_the_literal_loop_agrees_with_every_implementation(loops, emulated):
    """The .cpp file opens with it: the forward pass written out, in double precision."""
    value, locations, weights, _ = problem(D=8)
    expected = torch.full((2, 6, 24), math.nan, dtype=torch.float64)
    tensors = dict(weights=weights, output=expected)
    loops("forward_literal", [n for shape in PYRAMID for n in shape], value, locations, **tensors)
    arguments = (value, PYRAMID, locations, weights)
    assert torch.allclose(ms_deform_attn_torch(*arguments), expected, atol=1e-12)
    assert torch.allclose(ms_deform_attn(*arguments, impl="kernel"), expected, atol=1e-12)
    results = run((emulated, False), PYRAMID, (*arguments[::2][:1], locations, weights, None),
                  torch.ones_like(expected))
    assert torch.allclose(results[0], expected, atol=1e-12)


def test_the_example_of_the_docstring_runs():
    example = re.search(r"tokens:\n\n(    maps = .*?)\n\nThis file", deformable_attn.__doc__, re.S)
    names = dict(torch=torch, MSDeformAttn=MSDeformAttn)
    exec(textwrap.dedent(example[1]), names)
    assert names["output"].shape == (2, 20 * 30 + 10 * 15, 256)
    first, last = names["reference"][0, [0, 599], 0].tolist()
    assert first == pytest.approx([0.5 / 30, 0.5 / 20])
    assert last == pytest.approx([29.5 / 30, 19.5 / 20])


def implementations():
    return ["torch", "loops", "emulated", "emulated, deterministic"]


@pytest.mark.parametrize("case", "abcdef")
@pytest.mark.parametrize("name", implementations())
def test_recorded_sampling(golden, request, name, case):
    recorded = {key[2:]: torch.from_numpy(array) for key, array in golden("01_deformable_sampling").items() if key.startswith(f"{case}_")}
    shapes = [tuple(shape) for shape in recorded["shapes"].tolist()]
    inputs = [recorded[key].double() for key in ("value", "locations", "weights")] + [None]
    if name == "torch":
        results = expected_output(shapes, inputs, recorded["grad_output"])
    else:
        fixture, _, deterministic = name.partition(", ")
        results = run((request.getfixturevalue(fixture), bool(deterministic)), shapes, inputs, recorded["grad_output"])
    results = dict(zip(("output", "grad_value", "grad_locations", "grad_weights"), results))
    for key in results.keys() & recorded.keys():
        assert (results[key] - recorded[key]).abs().max() <= 1e-10, key
    assert case == "f" or "grad_locations" in recorded


@pytest.mark.parametrize("impl", ["torch", "kernel"])
@pytest.mark.parametrize("reference", ["ref2", "ref4"])
@pytest.mark.parametrize("mask", ["nomask", "mask"])
def test_recorded_module(golden, monkeypatch, impl, reference, mask):
    recorded = {key: torch.from_numpy(array) for key, array in golden("02_deformable_attention").items()}
    module = MSDeformAttn(32, 4, 3, 4).double()
    module.load_state_dict({key[3:]: array.double() for key, array in recorded.items() if key.startswith("sd.")})
    inputs = {key: recorded[name].double().requires_grad_() for key, name in
              dict(query="query", ref=reference, features="features").items()}
    monkeypatch.setattr(MSDeformAttn, "impl", impl)
    shapes = [tuple(shape) for shape in recorded["shapes"].tolist()]
    output = module(inputs["query"], inputs["ref"], inputs["features"], shapes, recorded["padding_mask"] if mask == "mask" else None)
    output.backward(recorded["grad_output"].double())
    case = f"{reference}_{mask}"
    assert (output - recorded[f"{case}.output"]).abs().max() <= 1e-10
    for name, tensor in [*inputs.items(), *module.named_parameters()]:
        expected = recorded[f"{case}.grad.{name}"]
        assert (tensor.grad - expected).abs().max() <= 1e-6 * expected.abs().max(), name


@pytest.mark.parametrize("heads, levels, points", [(8, 4, 4), (4, 2, 3), (6, 3, 2), (8, 5, 4)])
def test_a_fresh_module_looks_along_a_ring(golden, heads, levels, points):
    module = MSDeformAttn(heads * 8, heads, levels, points)
    recorded = golden("02_deformable_attention")[f"fresh_offsets_bias_h{heads}_l{levels}_p{points}"]
    assert np.abs(module.sampling_offsets.bias.detach().numpy() - recorded).max() < 1e-5
    for parameter in (module.sampling_offsets.weight, module.attention_weights.weight, module.attention_weights.bias,
                      module.value_proj.bias, module.output_proj.bias):
        assert not parameter.any()
    bound = math.sqrt(6 / (2 * heads * 8))
    for projection in (module.value_proj, module.output_proj):
        assert bound * 0.9 < projection.weight.abs().max() <= bound


def test_padded_tokens_cannot_be_seen():
    torch.manual_seed(0)
    module = MSDeformAttn(8, 2, 1, 2)
    tokens, padding = torch.randn(1, 6, 8), torch.tensor([[False, False, True] * 2])
    query, reference = torch.randn(1, 4, 8), torch.rand(1, 4, 1, 2)
    torch.nn.init.ones_(module.value_proj.bias)
    before = module(query, reference, tokens, [(2, 3)], padding)
    tokens[:, 2::3] = 1e6
    assert torch.equal(module(query, reference, tokens, [(2, 3)], padding), before)


def test_beside_a_box_the_outermost_point_of_the_ring_lies_on_its_border():
    offsets = MSDeformAttn(64, 8, 1, 4).sampling_offsets.bias.detach().view(1, 1, 8, 1, 4, 2)
    box = torch.tensor([0.5, 0.4, 0.2, 0.6]).view(1, 1, 1, 4)
    outermost = sampling_locations(box, offsets, [(10, 20)])[0, 0, :, 0, -1]
    assert torch.allclose(outermost[0], torch.tensor([0.6, 0.4])) and torch.allclose(outermost[3], torch.tensor([0.4, 0.7]))


# ---- Compiled kernels against the definition ------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", build.DTYPES)
@pytest.mark.parametrize("reference", [0, 2, 4])
@pytest.mark.parametrize("sizes", [dict(D=8, M=4), dict(D=5, K=1), dict(D=32, M=2, K=4, B=1, Nq=None), dict(D=72, M=1, K=5)])
def test_dtype_matrix(kernels, dtype, reference, sizes):
    inputs = problem(**sizes, reference=reference, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(inputs[0].shape[0], inputs[1].shape[1], inputs[0][0, 0].numel(), generator=generator).to(dtype)
    results = run(kernels, PYRAMID, inputs, grad_output)
    assert [r.dtype for r in results] == [dtype, *(t.dtype for t in inputs if t is not None)]
    assert_close(results, expected_output(PYRAMID, inputs, grad_output), ROUNDING[dtype])


@pytest.mark.parametrize("sizes", [dict(B=1), dict(B=65, Nq=1), dict(B=154, Nq=1), dict(B=0), dict(Nq=0), dict(D=1), dict(D=24), dict(D=33),
                                   dict(D=1025, B=1), dict(M=1), dict(K=1), dict(K=9)], ids=str)
def test_any_batch(kernels, sizes):
    sizes = dict(shapes=[(2, 3), (1, 1)], Nq=3, M=2, D=4, K=2) | sizes
    inputs = problem(**sizes, dtype=torch.float32)
    grad_output = torch.ones(inputs[0].shape[0], inputs[1].shape[1], inputs[0].shape[2] * inputs[0].shape[3])
    results = run(kernels, sizes["shapes"], inputs, grad_output)
    if grad_output.numel():
        assert_close(results, expected_output(sizes["shapes"], inputs, grad_output), 2e-6)
    else:
        assert results[0].numel() == 0 and not results[1].any()


@pytest.mark.parametrize("reference", [0, 4])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30, -1e6])
def test_a_location_that_is_no_number_reaches_only_its_own_query_and_head(kernels, reference, poison):
    value, points, weights, ref = problem(D=8, reference=reference, dtype=torch.float32)
    grad_output = torch.randn(2, 6, 24)
    without = weights.clone()
    without[1, 2, 0, 1, 2] = -math.inf if reference else 0
    expected, expected_value, *_ = run(kernels, PYRAMID, (value, points, without, ref), grad_output)
    points = points.clone()
    points[1, 2, 0, 1, 2, 1] = poison
    output, grad_value, grad_points, grad_weights, *_ = run(kernels, PYRAMID, (value, points, weights, ref), grad_output)
    poisoned = torch.zeros(2, 6, 3, dtype=torch.bool)
    poisoned[1, 2, 0] = math.isnan(poison)
    assert torch.equal(output.view(2, 6, 3, 8).isnan().all(-1), poisoned) and torch.equal(output.isnan().view(2, 6, 3, 8).any(-1), poisoned)
    assert grad_value.isfinite().all()
    others = ~poisoned[..., None, None]
    assert not (grad_weights.isnan() & others).any() and not (grad_points.isnan().any(-1) & others).any()
    if not reference:
        assert (grad_value - expected_value).abs().max() < 1e-5           # the other looks of the row count as before
        assert torch.allclose(output[~output.isnan()], expected[~output.isnan()], atol=1e-5)
        assert torch.equal(ms_deform_attn_torch(value, PYRAMID, points, weights).isnan(), output.isnan())


@pytest.mark.parametrize("name", implementations()[:3])
def test_a_value_that_is_not_finite_does_not_reach_points_outside_the_map(request, name):
    """Points that read it are not finite; points outside the map give zero in every case."""
    value = torch.ones(1, 12, 1, 8)
    value[0, 0] = math.inf
    value[0, 5, 0, 3] = math.nan
    x, y = torch.meshgrid(torch.linspace(-1.03, 2, 15), torch.linspace(-0.97, 2, 14),
                          indexing="ij")
    locations = torch.stack([x, y], -1).view(1, -1, 1, 1, 1, 2)
    weights = torch.ones(locations.shape[:-1])
    inputs = (value, locations, weights, None)
    expected = expected_output([(3, 4)], inputs)
    if name == "torch":
        output = ms_deform_attn_torch(value, [(3, 4)], locations, weights)
    else:
        kernels = request.getfixturevalue(name)
        output = build.run_forward(kernels, value, [3, 4], locations, weights, None)
    assert torch.equal(output.isfinite(), expected.isfinite())
    assert 0.5 < output.isfinite().float().mean() < 1
    outside = ((x < -0.13) | (x > 1.13) | (y < -0.17) | (y > 1.17)).flatten()
    assert not output[0, outside].any()


@pytest.mark.parametrize("dtype", HALVES)
def test_smooth_maps_give_exact_gradients_of_the_logits_in_half_precision(emulated, dtype):
    """Values that are alike make the gradients of a row's logits small beside their parts.

    Rounding the output before their mean is taken gives all of them one error of one sign.
    """
    value, offsets, logits, reference = problem(D=32, K=4, reference=2, dtype=torch.float64)
    offsets = offsets.mul(0.2)
    reference = reference.mul(0.2).add(0.4)
    shapes = [(8, 8), (6, 6)]
    value = 1 + 0.03 * problem(shapes, D=32)[0]
    inputs = [value.to(dtype), offsets[:, :, :, :2].to(dtype), logits[:, :, :, :2].to(dtype),
              reference[:, :, :2].float()]
    grad_output = torch.ones(2, 6, 96, dtype=dtype)
    exact = expected_output(shapes, inputs, grad_output)[3]
    result = run((emulated, False), shapes, inputs, grad_output)[3].double()
    assert (result - exact).abs().max() <= ROUNDING[dtype] * exact.abs().max()
    assert result.sum((-1, -2)).abs().max() <= 2 * ROUNDING[dtype] * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [dict(D=32, M=2, K=4), dict(D=24, M=2), dict(D=5)])
def test_four_additions_at_a_time_give_the_same(emulated, emulated_sm_90, dtype, sizes):
    inputs = problem(**sizes, reference=2, dtype=dtype)
    grad_output = torch.ones(2, 6, inputs[0][0, 0].numel(), dtype=dtype)
    results = run((emulated_sm_90, False), PYRAMID, inputs, grad_output)
    others = run((emulated, False), PYRAMID, inputs, grad_output)
    assert_close(results, others, 1e-6)
    assert_close(results, expected_output(PYRAMID, inputs, grad_output), ROUNDING[dtype])


@pytest.mark.parametrize("name, dtype, sectors", [
    ("emulated", torch.float32, 4), ("emulated", torch.float16, 8),
    ("emulated_sm_90", torch.float32, 4), ("emulated_sm_90", torch.float16, 4)])
def test_neighboring_lanes_add_to_neighboring_channels(request, name, dtype, sectors):
    """A row of 32 floats is four sectors of 32 bytes, and each should be accessed once a corner.

    Below sm_90 the four lanes of a half-precision group fill half a sector at a time. Four separate
    additions a lane, 16 bytes apart, would access 16 (float32) or 32 sectors (half precision).
    """
    kernels = request.getfixturevalue(name)
    value = torch.ones(1, 64, 1, 32, dtype=dtype)
    locations = torch.linspace(0.2, 0.8, 10).view(1, 1, 1, 1, 5, 2)
    weights = torch.ones(1, 1, 1, 1, 5)
    kernels.library.count_sectors(1)
    build.run_backward(kernels, torch.ones(1, 1, 32, dtype=dtype), value, [8, 8], locations,
                       weights, None, False, False)
    corners = 5 * 4
    assert kernels.library.count_sectors(0) == sectors * corners


def test_gradcheck(loops):
    for reference in (0, 2, 4):
        inputs = [t.requires_grad_() for t in problem([(3, 4), (1, 2)], B=1, Nq=3, M=2, D=3, K=2, reference=reference) if t is not None]
        operator = ms_deform_attn_fused if reference else ms_deform_attn
        function = lambda value, *rest: operator(value, [(3, 4), (1, 2)], *rest, impl="kernel")
        assert gradcheck(function, inputs, fast_mode=True)


def test_the_fused_form_equals_softmax_and_locations_outside(loops):
    for reference in (2, 4):
        value, offsets, logits, ref = problem(reference=reference)
        weights = logits.flatten(-2).softmax(-1).view_as(logits)
        expected = ms_deform_attn(value, PYRAMID, sampling_locations(ref, offsets, PYRAMID), weights)
        assert torch.allclose(ms_deform_attn_fused(value, PYRAMID, offsets, logits, ref), expected, atol=1e-12)


def test_threads_change_no_bit(loops):
    inputs = problem(D=32, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run((loops, False), PYRAMID, inputs, torch.ones(2, 6, 96)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_views_and_unaligned_tensors_are_accepted(kernels):
    value, points, weights, _ = problem(D=8, dtype=torch.float32)
    grad_output = torch.ones(2, 6, 24)
    expected = run(kernels, PYRAMID, (value, points, weights, None), grad_output)
    odd = lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)                  # 4 bytes past an aligned address
    turned = lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)
    for change in (odd, turned):
        results = run(kernels, PYRAMID, (change(value), change(points), change(weights), None), change(grad_output))
        assert all(torch.equal(a, b) for a, b in zip(results, expected))


@needs_compiler
def test_sanitizers_find_nothing_in_the_loops(tmp_path):
    """The real .cpp in a program of its own, on arrays of exactly the right size, odd sizes and points far outside."""
    (tmp_path / "main.cpp").write_text(f'#include "{ROOT / "deformable_attn_kernel.cpp"}"\n' + r"""
#include <random>
using Pass = int (*)(const Problem*, void*);
template <typename T>
void once(int B, int Nq, int M, int D, int K, int R, std::vector<int> H, std::vector<int> W, Pass forward, Pass backward) {
  std::mt19937 random(1);
  std::uniform_real_distribution<T> uniform(-1.5, 2.5);
  const int L = H.size();
  Problem p{};
  p.B = B, p.Nq = Nq, p.M = M, p.D = D, p.L = L, p.K = K, p.reference_size = R, p.threads = 2;
  for (int l = 0; l < L; l++) p.H[l] = H[l], p.W[l] = W[l], p.start[l] = p.S, p.S += H[l] * W[l];
  auto fill = [&](size_t n) { std::vector<T> v(n); for (T& x : v) x = uniform(random); return v; };
  const size_t looks = size_t(B) * Nq * M * L * K, rows = size_t(B) * Nq * M * D;
  std::vector<T> value = fill(size_t(B) * p.S * M * D), points = fill(2 * looks), weights = fill(looks), grad = fill(rows);
  std::vector<T> reference = fill(size_t(B) * Nq * L * R);
  std::vector<T> output(rows), gv(value.size()), gp(2 * looks), gw(looks), gl(2 * looks);
  if (looks) points[0] = T(1e30), points[points.size() - 1] = std::numeric_limits<T>::quiet_NaN();
  p.value = value.data(), p.points = points.data(), p.weights = weights.data(), p.reference = reference.data();
  p.grad_output = grad.data(), p.output = output.data(), p.grad_value = gv.data(), p.grad_points = gp.data();
  p.grad_weights = gw.data(), p.grad_locations = R ? gl.data() : nullptr;
  forward(&p, nullptr), backward(&p, nullptr);
}
int main() {
  for (int R : {0, 2, 4})
    for (int D : {1, 5, 32}) {
      once<float>(2, 5, 3, D, 3, R, {3, 1}, {4, 1}, forward_float32, backward_float32);
      once<double>(1, 4, 2, D, 1, R, {1}, {5}, forward_float64, backward_float64);
      once<float>(0, 4, 2, D, 1, R, {1}, {5}, forward_float32, backward_float32);
      once<float>(1, 0, 2, D, 1, R, {1}, {5}, forward_float32, backward_float32);
    }
}
""")
    flags = ["-g", "-O0", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    compile_cpp(tmp_path / "main.cpp", tmp_path / "main", *flags)
    # LeakSanitizer cannot run under a debugger or in some containers, and the loops own no memory anyway.
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"})
    assert done.returncode == 0, done.stderr


# ---- The operator in PyTorch ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("reference", [0, 2, 4])
def test_opcheck_and_compile(loops, reference):
    shapes = [(3, 4), (1, 2)]
    inputs = [None if t is None else t.requires_grad_() for t in problem(shapes, reference=reference)]
    opcheck(torch.ops.paperdetr.ms_deform_attn.default, (inputs[0], [3, 4, 1, 2], *inputs[1:]))
    opcheck(torch.ops.paperdetr.ms_deform_attn_backward.default,
            (torch.ones(2, 6, 15, dtype=torch.float64), inputs[0].detach(), [3, 4, 1, 2],
             *[None if t is None else t.detach() for t in inputs[1:]], bool(reference)))

    def double(value, points, weights, ref):
        if ref is None:
            return 2 * ms_deform_attn(value, shapes, points, weights)
        return 2 * ms_deform_attn_fused(value, shapes, points, weights, ref)

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    results = []
    for function in (double, compiled):
        output = function(*inputs)
        results.append([output, *torch.autograd.grad(output.sum(), [t for t in inputs if t is not None])])
    assert_close(results[1], results[0], 1e-12)


@pytest.mark.parametrize("reference", [0, 2])
def test_one_compiled_graph_serves_every_image_size(loops, reference):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def both(value, shapes, points, weights, ref):
        if ref is None:
            return ms_deform_attn(value, shapes, points, weights)
        return ms_deform_attn_fused(value, shapes, points, weights, ref)

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend=backend)
    for shapes in ([(6, 8), (3, 4)], [(7, 5), (4, 3)], [(12, 9), (6, 5)]):
        Nq = sum(H * W for H, W in shapes)
        value, points, weights, ref = problem(shapes, Nq=Nq, reference=reference)
        value.requires_grad_()
        output = compiled(value, shapes, points, weights, ref)
        expected = both(value, shapes, points, weights, ref)
        assert torch.equal(output, expected)
        assert torch.equal(*(torch.autograd.grad(o.sum(), value)[0] for o in (output, expected)))
    assert len(graphs) == 1
    value = value.detach()[:, 1:]
    with pytest.raises(ValueError, match="S = "):
        compiled(value, shapes, points, weights, ref)


@pytest.mark.parametrize("reference", [0, 2])
def test_second_derivatives_and_forward_mode_raise(loops, reference):
    inputs = [t.requires_grad_() for t in problem(reference=reference) if t is not None]
    operator = ms_deform_attn_fused if reference else ms_deform_attn

    def function(value, impl="kernel"):
        return operator(value, PYRAMID, *inputs[1:], impl=impl).square().sum()

    gradient, = torch.autograd.grad(function(inputs[0]), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match='impl="torch"'):
        torch.autograd.grad(gradient.sum(), inputs[0])
    tangent = torch.ones_like(inputs[0])
    with pytest.raises(NotImplementedError, match='impl="torch"'):
        torch.func.jvp(function, (inputs[0].detach(),), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[0].detach(), tangent)
        with pytest.raises(NotImplementedError, match='impl="torch"'):
            function(dual)

    def in_torch(value):
        return function(value, impl="torch")

    _, forward_mode = torch.func.jvp(in_torch, (inputs[0].detach(),), (tangent,))
    gradient, = torch.autograd.grad(in_torch(inputs[0]), inputs[0], create_graph=True)
    assert torch.allclose(forward_mode, gradient.sum())
    second, = torch.autograd.grad(gradient.sum(), inputs[0])
    assert second.abs().sum() > 0


@pytest.mark.parametrize("impl", ["torch", "kernel"])
def test_references_in_pixels_give_one_warning(loops, monkeypatch, impl):
    value, offsets, logits, reference = problem(reference=2, dtype=torch.float32)
    monkeypatch.setattr(build, "_examined_devices", set())
    with pytest.warns(UserWarning, match="divide pixels by the width and height") as record:
        for _ in range(2):
            ms_deform_attn_fused(value, PYRAMID, offsets, logits, 100 + reference, impl)
    assert len(record) == 1
    # One reference within reach is enough.
    build._examined_devices.clear()
    partly = torch.where(torch.arange(6)[:, None, None] == 3, reference, 100 + reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ms_deform_attn_fused(value, PYRAMID, offsets, logits, partly, impl)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_autocast(loops, dtype):
    """Under CPU autocast the layers around the operator are bf16; its coordinates are not, and gradients arrive in float32."""
    torch.manual_seed(0)
    module = MSDeformAttn(32, 4, 4, 2)
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.02)
    query, tokens, reference = torch.randn(2, 5, 32), torch.randn(2, 51, 32, requires_grad=True), torch.rand(2, 5, 4, 4)
    exact = module.double()(query.double(), reference.double(), tokens.double(), PYRAMID)
    module.float()
    with torch.autocast("cpu", dtype, enabled=dtype in HALVES):
        output = module(query, reference, tokens, PYRAMID)
    assert output.dtype == dtype
    assert (output.double() - exact).abs().max() <= 3 * ROUNDING[dtype] * exact.abs().max()
    output.float().sum().backward()
    assert tokens.grad.dtype == torch.float32 and tokens.grad.abs().sum() > 0


def test_wrong_arguments_are_named():
    value, points, weights, _ = problem(dtype=torch.float32)
    for arguments, message in [((value[0], PYRAMID, points, weights), "value"),
                               ((value, PYRAMID[:3], points, weights), "points"),
                               ((value[:, 1:], PYRAMID, points, weights), "S = "),
                               ((value, PYRAMID, points, weights[..., :1]), "weights"),
                               ((value.int(), PYRAMID, points, weights), "float32"),
                               ((value, PYRAMID, points[..., :0, :], weights[..., :0]), "K = 0"),
                               ((value[:, :0], [], points[:, :, :, :0], weights[:, :, :, :0]), "levels"),
                               ((value, PYRAMID, points, weights.to("meta")), "meta")]:
        with pytest.raises(ValueError, match=message):
            ms_deform_attn(*arguments)
    with pytest.raises(ValueError, match="reference"):
        ms_deform_attn_fused(value, PYRAMID, points, weights, torch.rand(2, 6, 4, 3))
    with pytest.raises(ValueError, match="impl"):
        ms_deform_attn(value, PYRAMID, points, weights, impl="cuda")
    with pytest.raises(ValueError, match="at least one channel, head, level and point"):
        MSDeformAttn(8, 2, 1, 0)
    with pytest.raises(ValueError, match="divisible"):
        MSDeformAttn(10, 4)
    with pytest.raises(ValueError, match="num_levels=2"):
        MSDeformAttn(8, 2, 1, 1)(torch.randn(1, 1, 8), torch.rand(1, 1, 2, 2), torch.randn(1, 2, 8), [(1, 1), (1, 1)])


def test_more_than_the_kernels_can_number_is_refused(emulated):
    """Views of one number stand for tensors that would not fit into memory."""
    def large(*shape):
        return torch.zeros(1).expand(shape)

    S = 2**29
    with pytest.raises(ValueError, match="fewer than 2.29 tokens"):
        ms_deform_attn(large(1, S, 1, 1), [(1, S)], large(1, 1, 1, 1, 1, 2), large(1, 1, 1, 1, 1))
    with pytest.raises(RuntimeError, match="cells .* deterministic .* got 2172715008: use smaller"):
        build.run_backward(emulated, large(2**15, 1, 32), large(2**15, 2**16, 1, 1),
                           [2**8, 2**8 - 1, 2**8, 1], large(2**15, 1, 1, 2, 1, 2),
                           large(2**15, 1, 1, 2, 1), None, False, True)


def test_launch_error_raises(emulated):
    too_much = build.Problem(B=2**40, Nq=1, S=2, M=1, D=4, L=1, K=1)
    with pytest.raises(RuntimeError, match="forward_float32 on cpu: invalid configuration"):
        emulated.launch(emulated.library.forward_float32, too_much, torch.device("cpu"))


# ---- On a GPU -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def gpu():
    kernels = build.load_kernels("cuda", torch.cuda.current_device())
    assert not isinstance(kernels, build.BuildError), kernels
    return kernels


@needs_gpu
@pytest.mark.parametrize("dtype", build.DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_gpu_dtype_matrix(gpu, deterministic, dtype):
    for sizes in (dict(D=8, M=4), dict(D=5, K=1), dict(D=32, M=2, K=4, Nq=None), dict(D=1025, M=1), dict(B=0), dict(Nq=0)):
        for reference in (0, 2, 4):
            inputs = [None if t is None else t.cuda() for t in problem(**sizes, reference=reference, dtype=dtype)]
            B, Nq, (M, D) = inputs[0].shape[0], inputs[1].shape[1], inputs[0].shape[2:]
            grad_output = torch.randn(B, Nq, M * D, device="cuda").to(dtype)
            results = run((gpu, deterministic), PYRAMID, inputs, grad_output)
            if grad_output.numel():
                assert_close(results, expected_output(PYRAMID, inputs, grad_output), ROUNDING[dtype])


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_deterministic_backward_repeats_every_bit(gpu, dtype):
    shapes = [(40, 60), (20, 30), (10, 15), (5, 8)]
    value, points, weights, _ = (None if t is None else t.cuda() for t in problem(shapes, Nq=None, M=8, D=32, K=4, dtype=dtype))
    value.requires_grad_()
    grads = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(5):
            grads.append(torch.autograd.grad(ms_deform_attn(value, shapes, points, weights).float().square().sum(), value)[0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(grads[0], grad) for grad in grads[1:])


@needs_gpu
def test_gpu_graph_capture_and_autocast(gpu):
    value, offsets, logits, reference = (t.cuda() for t in problem(D=32, reference=4, dtype=torch.float32))
    value.requires_grad_()
    step = lambda: torch.autograd.grad(ms_deform_attn_fused(value, PYRAMID, offsets, logits, reference).sum(), value)[0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert torch.allclose(captured, expected, atol=1e-5)
    with torch.autocast("cuda", torch.bfloat16):
        assert ms_deform_attn_fused(value, PYRAMID, offsets, logits, reference).dtype == torch.bfloat16


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")
def test_second_device(gpu):
    inputs = problem(D=32, dtype=torch.float32)
    results = [ms_deform_attn(*(inputs[0].to(d), PYRAMID, inputs[1].to(d), inputs[2].to(d)), impl="kernel").cpu() for d in ("cuda:0", "cuda:1")]
    assert torch.equal(*results)


@needs_gpu
@pytest.mark.slow
def test_int64_offsets(gpu):
    """A value tensor of more than 2^31 elements: the last image must be read, and its gradient written, in its place."""
    shapes, B = [(512, 512)], 34
    value = torch.zeros(B, 512 * 512, 8, 32, device="cuda", dtype=torch.bfloat16)
    value[-1] = torch.randn(512 * 512, 8, 32, device="cuda")
    assert value.numel() > 2**31
    locations, weights = torch.rand(B, 7, 8, 1, 4, 2, device="cuda"), torch.rand(B, 7, 8, 1, 4, device="cuda")
    results = []
    for v, n in ((value.requires_grad_(), B), (value[-1:].detach().requires_grad_(), 1)):
        output = ms_deform_attn(v, shapes, locations[-n:], weights[-n:], impl="kernel")
        results.append([output[-1], torch.autograd.grad(output[-1].float().sum(), v)[0][-1]])
    assert results[0][0].any() and torch.equal(results[0][0], results[1][0])
    assert results[0][1].any() and torch.allclose(results[0][1].float(), results[1][1].float(), atol=1e-2)
