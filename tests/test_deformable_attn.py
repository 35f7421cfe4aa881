"""The reference implementation of the deformable attention, and the kernels compared with it."""

import math
import os
import re
import shutil
import subprocess
import textwrap

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

import deformable_attn
import deformable_attn_build as build
import deformable_attn_operator as operator
from deformable_attn import (
    MSDeformAttn,
    ms_deform_attn,
    ms_deform_attn_fused,
    ms_deform_attn_torch,
    sampling_locations,
)
from deformable_attn_cases import (
    HALVES,
    PYRAMID,
    ROOT,
    ROUNDING,
    assert_close,
    compile_cpp,
    expected_output,
    problem,
    run,
)

pytest_plugins = ["deformable_attn_cases"]

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None, reason="no C++ compiler c++ on the PATH"
)


# ---- The reference implementation ----------------------------------------------------------------


@pytest.mark.parametrize(
    "x, y, expected",
    [
        (0.5, 0.5, 3.5),
        (1 / 6, 0.25, 1),
        (0, 0, 0.25),
        (1, 1, 1.5),
        (0.5, 0, 1),
        (-0.1, 0.5, 0.5),
        (1.2, 0.5, 0),
        (1e6, 0.5, 0),
        (0.5, -math.inf, 0),
    ],
)
def test_sampling_is_bilinear_and_zero_outside(x, y, expected):
    value = torch.tensor([[1, 2, 3], [4, 5, 6.0]], dtype=torch.float64).view(1, 6, 1, 1)
    locations = torch.tensor([x, y], dtype=torch.float64).view(1, 1, 1, 1, 1, 2)
    for impl in ("torch", None):
        assert ms_deform_attn(
            value, [(2, 3)], locations, torch.ones(1, 1, 1, 1, 1), impl
        ).item() == pytest.approx(expected, abs=1e-12)


def test_the_reference_implementation_equals_loops_over_every_pixel():
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
                            expected[0, q, m] += (
                                weights[0, q, m, l, k]
                                * tent
                                * value[0, start + row * W + column, m]
                            )
                start += H * W
    assert torch.allclose(
        ms_deform_attn_torch(value, shapes, locations, weights), expected.flatten(2), atol=1e-12
    )


def test_the_literal_loop_agrees_with_every_implementation(loops, emulated):
    """The .cpp file opens with it: the forward pass written out, in double precision."""
    value, locations, weights, _ = problem(D=8)
    expected = torch.full((2, 6, 24), math.nan, dtype=torch.float64)
    tensors = dict(weights=weights, output=expected)
    loops("forward_literal", [n for shape in PYRAMID for n in shape], value, locations, **tensors)
    arguments = (value, PYRAMID, locations, weights)
    assert torch.allclose(ms_deform_attn_torch(*arguments), expected, atol=1e-12)
    assert torch.allclose(ms_deform_attn(*arguments, impl="kernel"), expected, atol=1e-12)
    results = run(
        (emulated, False),
        PYRAMID,
        (*arguments[::2][:1], locations, weights, None),
        torch.ones_like(expected),
    )
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
    recorded = {
        key[2:]: torch.from_numpy(array)
        for key, array in golden("01_deformable_sampling").items()
        if key.startswith(f"{case}_")
    }
    shapes = [tuple(shape) for shape in recorded["shapes"].tolist()]
    inputs = [recorded[key].double() for key in ("value", "locations", "weights")] + [None]
    if name == "torch":
        results = expected_output(shapes, inputs, recorded["grad_output"])
    else:
        fixture, _, deterministic = name.partition(", ")
        results = run(
            (request.getfixturevalue(fixture), bool(deterministic)),
            shapes,
            inputs,
            recorded["grad_output"],
        )
    results = dict(zip(("output", "grad_value", "grad_locations", "grad_weights"), results))
    for key in results.keys() & recorded.keys():
        assert (results[key] - recorded[key]).abs().max() <= 1e-10, key
    assert case == "f" or "grad_locations" in recorded


@pytest.mark.parametrize("impl", ["torch", "kernel"])
@pytest.mark.parametrize("reference", ["ref2", "ref4"])
@pytest.mark.parametrize("mask", ["nomask", "mask"])
def test_recorded_module(golden, monkeypatch, impl, reference, mask):
    recorded = {
        key: torch.from_numpy(array) for key, array in golden("02_deformable_attention").items()
    }
    module = MSDeformAttn(32, 4, 3, 4).double()
    module.load_state_dict(
        {key[3:]: array.double() for key, array in recorded.items() if key.startswith("sd.")}
    )
    inputs = {
        key: recorded[name].double().requires_grad_()
        for key, name in dict(query="query", ref=reference, features="features").items()
    }
    monkeypatch.setattr(MSDeformAttn, "impl", impl)
    shapes = [tuple(shape) for shape in recorded["shapes"].tolist()]
    output = module(
        inputs["query"],
        inputs["ref"],
        inputs["features"],
        shapes,
        recorded["padding_mask"] if mask == "mask" else None,
    )
    output.backward(recorded["grad_output"].double())
    case = f"{reference}_{mask}"
    assert (output - recorded[f"{case}.output"]).abs().max() <= 1e-10
    for name, tensor in [*inputs.items(), *module.named_parameters()]:
        expected = recorded[f"{case}.grad.{name}"]
        assert (tensor.grad - expected).abs().max() <= 1e-6 * expected.abs().max(), name


@pytest.mark.parametrize("heads, levels, points", [(8, 4, 4), (4, 2, 3), (6, 3, 2), (8, 5, 4)])
def test_a_fresh_module_samples_along_a_ring(golden, heads, levels, points):
    module = MSDeformAttn(heads * 8, heads, levels, points)
    recorded = golden("02_deformable_attention")[f"fresh_offsets_bias_h{heads}_l{levels}_p{points}"]
    assert np.abs(module.sampling_offsets.bias.detach().numpy() - recorded).max() < 1e-5
    for parameter in (
        module.sampling_offsets.weight,
        module.attention_weights.weight,
        module.attention_weights.bias,
        module.value_proj.bias,
        module.output_proj.bias,
    ):
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
    assert torch.allclose(outermost[0], torch.tensor([0.6, 0.4])) and torch.allclose(
        outermost[3], torch.tensor([0.4, 0.7])
    )


# ---- Compiled kernels ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", build.DTYPES)
@pytest.mark.parametrize("reference", [0, 2, 4])
@pytest.mark.parametrize(
    "sizes",
    [dict(D=8, M=4), dict(D=5, K=1), dict(D=32, M=2, K=4, B=1, Nq=None), dict(D=72, M=1, K=5)],
)
def test_dtype_matrix(kernels, dtype, reference, sizes):
    inputs = problem(**sizes, reference=reference, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(
        inputs[0].shape[0], inputs[1].shape[1], inputs[0][0, 0].numel(), generator=generator
    ).to(dtype)
    results = run(kernels, PYRAMID, inputs, grad_output)
    assert [r.dtype for r in results] == [dtype, *(t.dtype for t in inputs if t is not None)]
    assert_close(results, expected_output(PYRAMID, inputs, grad_output), ROUNDING[dtype])


@pytest.mark.parametrize(
    "sizes",
    [
        dict(B=1),
        dict(B=65, Nq=1),
        dict(B=154, Nq=1),
        dict(B=0),
        dict(Nq=0),
        dict(D=1),
        dict(D=24),
        dict(D=33),
        dict(D=1025, B=1),
        dict(M=1),
        dict(K=1),
        dict(K=9),
    ],
    ids=str,
)
def test_any_batch(kernels, sizes):
    sizes = dict(shapes=[(2, 3), (1, 1)], Nq=3, M=2, D=4, K=2) | sizes
    inputs = problem(**sizes, dtype=torch.float32)
    grad_output = torch.ones(
        inputs[0].shape[0], inputs[1].shape[1], inputs[0].shape[2] * inputs[0].shape[3]
    )
    results = run(kernels, sizes["shapes"], inputs, grad_output)
    if grad_output.numel():
        assert_close(results, expected_output(sizes["shapes"], inputs, grad_output), 2e-6)
    else:
        assert results[0].numel() == 0 and not results[1].any()


@pytest.mark.parametrize("reference", [0, 4])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30, -1e6])
def test_a_location_that_is_no_number_reaches_only_its_own_query_and_head(
    kernels, reference, poison
):
    value, points, weights, ref = problem(D=8, reference=reference, dtype=torch.float32)
    grad_output = torch.randn(2, 6, 24)
    without = weights.clone()
    without[1, 2, 0, 1, 2] = -math.inf if reference else 0
    expected, expected_value, *_ = run(kernels, PYRAMID, (value, points, without, ref), grad_output)
    points = points.clone()
    points[1, 2, 0, 1, 2, 1] = poison
    output, grad_value, grad_points, grad_weights, *_ = run(
        kernels, PYRAMID, (value, points, weights, ref), grad_output
    )
    poisoned = torch.zeros(2, 6, 3, dtype=torch.bool)
    poisoned[1, 2, 0] = math.isnan(poison)
    by_head = output.view(2, 6, 3, 8).isnan()
    assert torch.equal(by_head.all(-1), poisoned) and torch.equal(by_head.any(-1), poisoned)
    assert grad_value.isfinite().all()
    others = ~poisoned[..., None, None]
    assert (
        not (grad_weights.isnan() & others).any()
        and not (grad_points.isnan().any(-1) & others).any()
    )
    if not reference:
        # The other points of the row count as before.
        assert (grad_value - expected_value).abs().max() < 1e-5
        assert torch.allclose(output[~output.isnan()], expected[~output.isnan()], atol=1e-5)
        assert torch.equal(
            ms_deform_attn_torch(value, PYRAMID, points, weights).isnan(), output.isnan()
        )


@pytest.mark.parametrize("name", implementations()[:3])
def test_a_value_that_is_not_finite_does_not_reach_points_outside_the_map(request, name):
    """Points that read it are not finite; points outside the map give zero in every case, and so
    does the gradient of their weights."""
    value = torch.ones(1, 12, 1, 8)
    value[0, 0] = math.inf
    value[0, 5, 0, 3] = math.nan
    x, y = torch.meshgrid(torch.linspace(-1.03, 2, 15), torch.linspace(-0.97, 2, 14), indexing="ij")
    locations = torch.stack([x, y], -1).view(1, -1, 1, 1, 1, 2)
    weights = torch.ones(locations.shape[:-1])
    inputs = (value, locations, weights, None)
    expected = expected_output([(3, 4)], inputs)
    if name == "torch":
        weights.requires_grad_()
        output = ms_deform_attn_torch(value, [(3, 4)], locations, weights)
        (gradient,) = torch.autograd.grad(output.sum(), weights)
    else:
        kernels = request.getfixturevalue(name)
        output = operator.run_forward(kernels, value, [3, 4], locations, weights, None)
        gradient = operator.run_backward(
            kernels, torch.ones_like(output), value, [3, 4], locations, weights, None, False, False
        )[2]
    assert torch.equal(output.isfinite(), expected.isfinite())
    assert 0.5 < output.isfinite().float().mean() < 1
    outside = ((x < -0.13) | (x > 1.13) | (y < -0.17) | (y > 1.17)).flatten()
    assert not output[0, outside].any()
    assert not gradient.flatten()[outside].any()


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
    inputs = [
        value.to(dtype),
        offsets[:, :, :, :2].to(dtype),
        logits[:, :, :, :2].to(dtype),
        reference[:, :, :2].float(),
    ]
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


@pytest.mark.parametrize(
    "name, dtype, sectors",
    [
        ("emulated", torch.float32, 4),
        ("emulated", torch.float16, 8),
        ("emulated_sm_90", torch.float32, 4),
        ("emulated_sm_90", torch.float16, 4),
    ],
)
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
    operator.run_backward(
        kernels,
        torch.ones(1, 1, 32, dtype=dtype),
        value,
        [8, 8],
        locations,
        weights,
        None,
        False,
        False,
    )
    corners = 5 * 4
    assert kernels.library.count_sectors(0) == sectors * corners


def test_gradcheck(loops):
    for reference in (0, 2, 4):
        inputs = [
            t.requires_grad_()
            for t in problem([(3, 4), (1, 2)], B=1, Nq=3, M=2, D=3, K=2, reference=reference)
            if t is not None
        ]
        attention = ms_deform_attn_fused if reference else ms_deform_attn

        def function(value, *rest):
            return attention(value, [(3, 4), (1, 2)], *rest, impl="kernel")

        assert gradcheck(function, inputs, fast_mode=True)


def test_the_fused_form_equals_softmax_and_locations_outside(loops):
    for reference in (2, 4):
        value, offsets, logits, ref = problem(reference=reference)
        weights = logits.flatten(-2).softmax(-1).view_as(logits)
        expected = ms_deform_attn(
            value, PYRAMID, sampling_locations(ref, offsets, PYRAMID), weights
        )
        assert torch.allclose(
            ms_deform_attn_fused(value, PYRAMID, offsets, logits, ref), expected, atol=1e-12
        )


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

    def unaligned(t):
        """4 bytes past an aligned address"""
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    def transposed(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    for change in (unaligned, transposed):
        results = run(
            kernels,
            PYRAMID,
            (change(value), change(points), change(weights), None),
            change(grad_output),
        )
        assert all(torch.equal(a, b) for a, b in zip(results, expected))


@needs_compiler
def test_sanitizers_find_nothing_in_the_loops(tmp_path):
    """The real .cpp in a program of its own: arrays of the exact size, points far outside."""
    (tmp_path / "main.cpp").write_text(
        f'#include "{ROOT / "deformable_attn_kernel.cpp"}"\n'
        + r"""
#include <random>
using Pass = int (*)(const Problem*, void*);
template <typename T>
void once(int B, int Nq, int M, int D, int K, int R, std::vector<int> H, std::vector<int> W,
          Pass forward, Pass backward) {
  std::mt19937 random(1);
  std::uniform_real_distribution<T> uniform(-1.5, 2.5);
  const int L = H.size();
  Problem p{};
  p.B = B, p.Nq = Nq, p.M = M, p.D = D, p.L = L, p.K = K, p.reference_size = R, p.threads = 2;
  for (int l = 0; l < L; l++) p.H[l] = H[l], p.W[l] = W[l], p.start[l] = p.S, p.S += H[l] * W[l];
  auto fill = [&](size_t n) { std::vector<T> v(n); for (T& x : v) x = uniform(random); return v; };
  const size_t samples = size_t(B) * Nq * M * L * K, rows = size_t(B) * Nq * M * D;
  std::vector<T> value = fill(size_t(B) * p.S * M * D), points = fill(2 * samples);
  std::vector<T> weights = fill(samples), grad = fill(rows);
  std::vector<T> reference = fill(size_t(B) * Nq * L * R);
  std::vector<T> output(rows), gv(value.size()), gp(2 * samples), gw(samples), gl(2 * samples);
  if (samples) points[0] = T(1e30), points[points.size() - 1] = std::numeric_limits<T>::quiet_NaN();
  p.value = value.data(), p.points = points.data(), p.weights = weights.data();
  p.reference = reference.data(), p.grad_output = grad.data(), p.output = output.data();
  p.grad_value = gv.data(), p.grad_points = gp.data();
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
"""
    )
    flags = ["-g", "-O0", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    compile_cpp(tmp_path / "main.cpp", tmp_path / "main", *flags)
    # LeakSanitizer cannot run in some containers, and the loops own no memory.
    done = subprocess.run(
        [tmp_path / "main"],
        capture_output=True,
        text=True,
        env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"},
    )
    assert done.returncode == 0, done.stderr
