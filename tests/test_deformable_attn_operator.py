"""The deformable attention as an operator of PyTorch, and on a GPU."""

import warnings

import pytest
import torch
from torch.library import opcheck

import deformable_attn_build as build
import deformable_attn_operator as operator
from deformable_attn import (
    MSDeformAttn,
    ms_deform_attn,
    ms_deform_attn_fused,
)
from deformable_attn_cases import (
    HALVES,
    PYRAMID,
    ROUNDING,
    assert_close,
    expected_output,
    problem,
    run,
)

pytest_plugins = ["deformable_attn_cases"]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


# ---- The operator in PyTorch ---------------------------------------------------------------------


@pytest.mark.parametrize("reference", [0, 2, 4])
def test_opcheck_and_compile(loops, reference):
    shapes = [(3, 4), (1, 2)]
    inputs = [
        None if t is None else t.requires_grad_() for t in problem(shapes, reference=reference)
    ]
    opcheck(torch.ops.paperdetr.ms_deform_attn.default, (inputs[0], [3, 4, 1, 2], *inputs[1:]))
    opcheck(
        torch.ops.paperdetr.ms_deform_attn_backward.default,
        (
            torch.ones(2, 6, 15, dtype=torch.float64),
            inputs[0].detach(),
            [3, 4, 1, 2],
            *[None if t is None else t.detach() for t in inputs[1:]],
            bool(reference),
        ),
    )

    def double(value, points, weights, ref):
        if ref is None:
            return 2 * ms_deform_attn(value, shapes, points, weights)
        return 2 * ms_deform_attn_fused(value, shapes, points, weights, ref)

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    results = []
    for function in (double, compiled):
        output = function(*inputs)
        results.append(
            [output, *torch.autograd.grad(output.sum(), [t for t in inputs if t is not None])]
        )
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
    attention = ms_deform_attn_fused if reference else ms_deform_attn

    def function(value, impl="kernel"):
        return attention(value, PYRAMID, *inputs[1:], impl=impl).square().sum()

    (gradient,) = torch.autograd.grad(function(inputs[0]), inputs[0], create_graph=True)
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
    (gradient,) = torch.autograd.grad(in_torch(inputs[0]), inputs[0], create_graph=True)
    assert torch.allclose(forward_mode, gradient.sum())
    (second,) = torch.autograd.grad(gradient.sum(), inputs[0])
    assert second.abs().sum() > 0


@pytest.mark.parametrize("impl", ["torch", "kernel"])
def test_references_in_pixels_give_one_warning(loops, monkeypatch, impl):
    value, offsets, logits, reference = problem(reference=2, dtype=torch.float32)
    monkeypatch.setattr(operator, "_examined_devices", set())
    with pytest.warns(UserWarning, match="divide pixels by the width and height") as record:
        for _ in range(2):
            ms_deform_attn_fused(value, PYRAMID, offsets, logits, 100 + reference, impl)
    assert len(record) == 1
    # One reference within reach is enough.
    operator._examined_devices.clear()
    partly = torch.where(torch.arange(6)[:, None, None] == 3, reference, 100 + reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ms_deform_attn_fused(value, PYRAMID, offsets, logits, partly, impl)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_autocast(loops, dtype):
    """Layers around the operator are bf16, its coordinates are not, gradients are float32."""
    torch.manual_seed(0)
    module = MSDeformAttn(32, 4, 4, 2)
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.02)
    query, tokens, reference = (
        torch.randn(2, 5, 32),
        torch.randn(2, 51, 32, requires_grad=True),
        torch.rand(2, 5, 4, 4),
    )
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
    for arguments, message in [
        ((value[0], PYRAMID, points, weights), "value"),
        ((value, PYRAMID[:3], points, weights), "points"),
        ((value[:, 1:], PYRAMID, points, weights), "S = "),
        ((value, PYRAMID, points, weights[..., :1]), "weights"),
        ((value.int(), PYRAMID, points, weights), "float32"),
        ((value, PYRAMID, points[..., :0, :], weights[..., :0]), "K = 0"),
        ((value[:, :0], [], points[:, :, :, :0], weights[:, :, :, :0]), "levels"),
        ((value, PYRAMID, points, weights.to("meta")), "meta"),
    ]:
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
        MSDeformAttn(8, 2, 1, 1)(
            torch.randn(1, 1, 8), torch.rand(1, 1, 2, 2), torch.randn(1, 2, 8), [(1, 1), (1, 1)]
        )


def test_more_than_the_kernels_can_number_is_refused(emulated):
    """Views of one number stand for tensors that would not fit into memory."""

    def large(*shape):
        return torch.zeros(1).expand(shape)

    S = 2**29
    with pytest.raises(ValueError, match="fewer than 2.29 tokens"):
        ms_deform_attn(large(1, S, 1, 1), [(1, S)], large(1, 1, 1, 1, 1, 2), large(1, 1, 1, 1, 1))
    with pytest.raises(RuntimeError, match="cells .* deterministic .* got 2172715008: use smaller"):
        operator.run_backward(
            emulated,
            large(2**15, 1, 32),
            large(2**15, 2**16, 1, 1),
            [2**8, 2**8 - 1, 2**8, 1],
            large(2**15, 1, 1, 2, 1, 2),
            large(2**15, 1, 1, 2, 1),
            None,
            False,
            True,
        )


def test_the_operator_alone_asks_for_its_reference_implementation(monkeypatch):
    monkeypatch.setattr(operator, "reference_implementation", None)
    with pytest.raises(ImportError, match="import deformable_attn first"):
        operator._verify.__wrapped__("cpu", None)


def test_launch_error_raises(emulated):
    too_much = build.Problem(B=2**40, Nq=1, S=2, M=1, D=4, L=1, K=1)
    with pytest.raises(RuntimeError, match="forward_float32 on cpu: invalid configuration"):
        emulated.launch(emulated.library.forward_float32, too_much, torch.device("cpu"))


def test_an_error_that_another_call_has_left_is_not_reported(emulated):
    emulated.library.leave_error(9)
    inputs = problem(reference=2, dtype=torch.float32)
    run((emulated, False), PYRAMID, inputs, torch.ones(2, 6, 15))
    emulated.library.leave_error(9)
    run((emulated, True), PYRAMID, inputs, torch.ones(2, 6, 15))


# ---- On a GPU ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def gpu():
    kernels = build.load_kernels("cuda", torch.cuda.current_device())
    assert not isinstance(kernels, build.BuildError), kernels
    return kernels


@needs_gpu
@pytest.mark.parametrize("dtype", build.DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_gpu_dtype_matrix(gpu, deterministic, dtype):
    for sizes in (
        dict(D=8, M=4),
        dict(D=5, K=1),
        dict(D=32, M=2, K=4, Nq=None),
        dict(D=1025, M=1),
        dict(B=0),
        dict(Nq=0),
    ):
        for reference in (0, 2, 4):
            inputs = [
                None if t is None else t.cuda()
                for t in problem(**sizes, reference=reference, dtype=dtype)
            ]
            B, Nq, (M, D) = inputs[0].shape[0], inputs[1].shape[1], inputs[0].shape[2:]
            grad_output = torch.randn(B, Nq, M * D, device="cuda").to(dtype)
            results = run((gpu, deterministic), PYRAMID, inputs, grad_output)
            if grad_output.numel():
                assert_close(
                    results, expected_output(PYRAMID, inputs, grad_output), ROUNDING[dtype]
                )


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_deterministic_backward_repeats_every_bit(gpu, dtype):
    shapes = [(40, 60), (20, 30), (10, 15), (5, 8)]
    value, points, weights, _ = (
        None if t is None else t.cuda()
        for t in problem(shapes, Nq=None, M=8, D=32, K=4, dtype=dtype)
    )
    value.requires_grad_()
    grads = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(5):
            grads.append(
                torch.autograd.grad(
                    ms_deform_attn(value, shapes, points, weights).float().square().sum(), value
                )[0]
            )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(grads[0], grad) for grad in grads[1:])


@needs_gpu
def test_gpu_graph_capture_and_autocast(gpu):
    value, offsets, logits, reference = (
        t.cuda() for t in problem(D=32, reference=4, dtype=torch.float32)
    )
    value.requires_grad_()

    def step():
        output = ms_deform_attn_fused(value, PYRAMID, offsets, logits, reference)
        return torch.autograd.grad(output.sum(), value)[0]

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
        assert (
            ms_deform_attn_fused(value, PYRAMID, offsets, logits, reference).dtype == torch.bfloat16
        )


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")
def test_second_device(gpu):
    inputs = problem(D=32, dtype=torch.float32)
    results = []
    for device in ("cuda:0", "cuda:1"):
        value, points, weights = (tensor.to(device) for tensor in inputs[:3])
        results.append(ms_deform_attn(value, PYRAMID, points, weights, impl="kernel").cpu())
    assert torch.equal(*results)


@needs_gpu
@pytest.mark.slow
def test_int64_offsets(gpu):
    """More than 2^31 values: the last image is read, and its gradient written, in its place."""
    shapes, B = [(512, 512)], 34
    value = torch.zeros(B, 512 * 512, 8, 32, device="cuda", dtype=torch.bfloat16)
    value[-1] = torch.randn(512 * 512, 8, 32, device="cuda")
    assert value.numel() > 2**31
    locations, weights = (
        torch.rand(B, 7, 8, 1, 4, 2, device="cuda"),
        torch.rand(B, 7, 8, 1, 4, device="cuda"),
    )
    results = []
    for v, n in ((value.requires_grad_(), B), (value[-1:].detach().requires_grad_(), 1)):
        output = ms_deform_attn(v, shapes, locations[-n:], weights[-n:], impl="kernel")
        results.append([output[-1], torch.autograd.grad(output[-1].float().sum(), v)[0][-1]])
    assert results[0][0].any() and torch.equal(results[0][0], results[1][0])
    assert results[0][1].any() and torch.allclose(
        results[0][1].float(), results[1][1].float(), atol=1e-2
    )
