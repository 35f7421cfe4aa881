"""Times of deformable attention, forward and backward: our kernels beside the reference
implementation and beside other implementations of the same signature.

Two kinds of rows. "operator" starts from sampling locations and weights, which are made before the
clock starts. "layer" starts from what the linear layers give, offsets and logits.
"""
import importlib
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from deformable_attn import ms_deform_attn, ms_deform_attn_fused, sampling_locations
from tools.timing import DEVICE, Device, each_ms, show_progress, write_table

# Inputs rotate over at least this much memory, so that none is still in the cache (H100: 50 MB).
CACHE_BYTES = 100 << 20
L1_BYTES_PER_CYCLE = 128     # that a multiprocessor reads from its L1 cache


# ---- cases ---------------------------------------------------------------------------------------

@dataclass
class Case:
    """One problem of the table. queries None: the tokens are the queries, as in an encoder."""
    name: str
    batch: int
    shapes: list                 # (H, W) of every level
    queries: int | None = None
    heads: int = 8
    channels: int = 32           # of one head
    points: int = 4


def levels(height, width, strides=(8, 16, 32, 64)):
    """Shapes of the feature levels of an image."""
    return [(-(-height // stride), -(-width // stride)) for stride in strides]


FOUR = levels(800, 1333)
FIVE = levels(800, 1333, (4, 8, 16, 32, 64))
SMALL = [(16, 16), (8, 8), (4, 4)]
CASES = {
    "cuda": [
        Case("4-scale encoder, 800x1333", 1, FOUR),
        Case("4-scale encoder, 800x1333", 2, FOUR),
        Case("4-scale encoder, 800x1333", 4, FOUR),
        Case("decoder, 800x1333", 2, FOUR, queries=300),
        Case("decoder, 800x1333", 2, FOUR, queries=900),
        Case("decoder, 800x1333", 2, FOUR, queries=1100),
        Case("5-scale encoder, 800x1333", 1, FIVE),
        Case("4-scale encoder, 512x512", 8, levels(512, 512))],
    "cpu": [
        Case("small encoder, 128x128", 8, SMALL, heads=4),
        Case("small decoder, 128x128", 8, SMALL, queries=140, heads=4),
        Case("decoder, 800x1333", 1, FOUR, queries=900),
        Case("4-scale encoder, 800x1333", 1, FOUR)]}
DTYPES = {"cuda": (torch.float32, torch.bfloat16, torch.float16),
          "cpu": (torch.float32, torch.bfloat16)}


class Inputs(NamedTuple):
    """Inputs of the fused form. The first three have gradients."""
    value: torch.Tensor          # (B, S, M, D)
    offsets: torch.Tensor        # (B, Nq, M, L, K, 2), in pixels
    logits: torch.Tensor         # (B, Nq, M, L, K)
    reference: torch.Tensor      # (B, Nq, L, 2)


def make_inputs(case, device, dtype, uniform, seed) -> Inputs:
    """Random inputs. Offsets are a few pixels (standard deviation 2) around a grid of tokens or, in
    a decoder, around random centers; `uniform` spreads all points over the whole map."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device)
    rand = partial(torch.rand, generator=generator, device=device)
    B, M, D, K = case.batch, case.heads, case.channels, case.points
    L = len(case.shapes)
    S = sum(H * W for H, W in case.shapes)
    Nq = case.queries or S
    if case.queries:
        centers = rand(B, Nq, 2)
    else:
        centers = token_centers(case.shapes).expand(B, -1, -1).to(device)   # (B, S, 2)
    if uniform:
        size = torch.tensor([(W, H) for H, W in case.shapes], device=device)
        targets = rand(B, Nq, M, L, K, 2)
        offsets = (targets - centers[:, :, None, None, None]) * size.view(L, 1, 2)
    else:
        offsets = normal(B, Nq, M, L, K, 2) * 2
    value = normal(B, S, M, D)
    logits = normal(B, Nq, M, L, K)
    reference = centers[:, :, None].expand(-1, -1, L, -1).contiguous()      # (B, Nq, L, 2)
    trained = [tensor.to(dtype).requires_grad_() for tensor in (value, offsets, logits)]
    return Inputs(*trained, reference)


def token_centers(shapes):
    """Centers of all tokens in [0, 1] -> (S, 2)"""
    centers = []
    for H, W in shapes:
        rows = (torch.arange(H) + 0.5) / H
        columns = (torch.arange(W) + 0.5) / W
        centers.append(torch.cartesian_prod(rows, columns).flip(1))         # (H W, 2)
    return torch.cat(centers)


# ---- implementations -----------------------------------------------------------------------------

def separately(operator, value, shapes, offsets, logits, reference):
    """A layer of separate calls: softmax and locations by PyTorch, then the operator."""
    weights = logits.flatten(-2).softmax(-1, dtype=torch.float32).view_as(logits)
    locations = sampling_locations(reference, offsets.float(), shapes)
    return operator(value, shapes, locations, weights)


def implementations(peers) -> dict:
    """name -> function. "operator" rows: of (value, shapes, locations, weights); "layer" rows: of
    (value, shapes, offsets, logits, reference).

    peers: "module:function", which take what "operator" rows take."""
    reference = partial(ms_deform_attn, impl="torch")
    kernel = partial(ms_deform_attn, impl="kernel")
    table = {
        "operator, PyTorch": reference,
        "operator, ours": kernel,
        "layer, PyTorch": partial(separately, reference),
        "layer, ours, not fused": partial(separately, kernel),
        "layer, ours, fused": partial(ms_deform_attn_fused, impl="kernel")}
    for peer in peers:
        module, _, name = peer.partition(":")
        function = getattr(importlib.import_module(module), name)
        table[f"operator, {peer}"] = function
        table[f"layer, {peer}"] = partial(separately, function)
    return table


def make_call(name, function, case, inputs, backward):
    """A function without arguments: the forward pass, or both passes."""
    if name.startswith("operator"):
        arguments = operator_inputs(case, inputs)
        trained = [inputs.value, *arguments]
    else:
        arguments = inputs[1:]
        trained = list(inputs[:3])

    B, Nq = inputs.offsets.shape[:2]
    ones = inputs.value.new_ones(B, Nq, case.heads * case.channels)

    def forward():
        return function(inputs.value, case.shapes, *arguments)

    def both():
        return torch.autograd.grad(forward(), trained, ones)

    return both if backward else torch.no_grad()(forward)


def operator_inputs(case, inputs) -> tuple:
    """Locations and weights with gradients."""
    with torch.no_grad():
        offsets = inputs.offsets.float()
        locations = sampling_locations(inputs.reference, offsets, case.shapes)
        logits = inputs.logits.float()
        weights = logits.flatten(-2).softmax(-1).view_as(logits)
    return locations.requires_grad_(), weights.requires_grad_()


# ---- lower bounds --------------------------------------------------------------------------------

class LowerBounds(NamedTuple):
    """What no implementation of the fused form can go below."""
    forward: int       # bytes through device memory, forward pass
    both: int          # bytes through device memory, both passes
    gathered: int      # bytes of pixels that the forward pass reads, from a cache at best
    additions: int     # additions of 16 bytes in the backward pass


def lower_bounds(case, inputs) -> LowerBounds:
    """Every tensor crosses device memory once; pixels outside the map are not read."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in inputs]
    element = inputs.value.element_size()
    B, Nq = inputs.offsets.shape[:2]
    output = B * Nq * case.heads * case.channels * element
    forward = sum(sizes) + output
    both = 2 * forward + sum(sizes[:3])   # the backward pass reads all again, writes 3 gradients
    pixels = count_pixels(case, inputs) * case.channels
    return LowerBounds(forward, both, pixels * element, pixels // 4)


@torch.no_grad()
def count_pixels(case, inputs) -> int:
    """Pixels inside the map that all sampling points read, up to four each."""
    offsets = inputs.offsets.float()
    locations = sampling_locations(inputs.reference, offsets, case.shapes)
    count = 0
    for l, (H, W) in enumerate(case.shapes):
        x = (locations[:, :, :, l, :, 0] * W - 0.5).floor()                 # (B, Nq, M, K)
        y = (locations[:, :, :, l, :, 1] * H - 0.5).floor()                 # (B, Nq, M, K)
        columns = inside(x, W) + inside(x + 1, W)
        rows = inside(y, H) + inside(y + 1, H)
        count += (columns * rows).sum().item()
    return count


def inside(index, size):
    """1 where an index lies in 0 ... size - 1, else 0."""
    return ((index >= 0) & (index < size)).int()


def copy_bandwidth(seconds) -> float:
    """Bytes per second that a plain copy moves through device memory, read and written."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    ms, _ = each_ms([lambda: target.copy_(source)], "cuda", seconds)
    return 2 * source.numel() * 4 / (ms * 1e-3)


# ---- the table -----------------------------------------------------------------------------------

def kernel(device: Device = DEVICE, seconds: float = 1.0, case: str = "",
           peer: tuple[str, ...] = ()):
    """Time the attention operator: our kernels, the reference implementation, and others.

    Args:
        device: Where to run.
        seconds: How long each figure is measured; the median is reported.
        case: Only cases whose name contains this text.
        peer: Other functions of ms_deform_attn's signature, as MODULE:FUNCTION on PYTHONPATH.
    """
    table = implementations(peer)
    bandwidth = copy_bandwidth(seconds) if device == "cuda" else 0.0
    rows = []
    for problem in CASES[device]:
        if case not in problem.name:
            continue
        for dtype in DTYPES[device]:
            for uniform in (False, True):
                sets = input_sets(problem, device, dtype, uniform)
                spread = "uniform" if uniform else "near"
                title = [describe(problem), str(dtype)[6:], spread]
                rows += time_all(table, title, problem, sets, device, seconds)
                if device == "cuda":
                    rows.append(deterministic_row(title, problem, sets, seconds))
                    rows.append(bound_row(title, problem, sets[0], bandwidth))
    columns = ("case", "values", "sampling points", "implementation", "forward ms",
               "forward + backward ms", "timed by")
    notes = []
    if bandwidth:
        notes.append("Lower bound: bytes through device memory, fused form, at the "
                     f"{bandwidth / 1e12:.2f} TB/s that a copy reaches here.")
    write_table("kernel", device, columns, rows, notes)


def describe(case) -> str:
    return f"{case.name}, batch {case.batch}, {case.queries or 'all'} queries"


def input_sets(case, device, dtype, uniform) -> list[Inputs]:
    """Inputs of several seeds: two, or on a GPU as many as exceed its cache."""
    first = make_inputs(case, device, dtype, uniform, 0)
    size = sum(tensor.numel() * tensor.element_size() for tensor in first)
    count = max(2, -(-CACHE_BYTES // size)) if device == "cuda" else 2
    others = [make_inputs(case, device, dtype, uniform, seed) for seed in range(1, count)]
    return [first, *others]


def time_all(table, title, case, sets, device, seconds) -> list:
    """A row for every implementation."""
    rows = []
    for name, function in table.items():
        cells = []
        how = ""
        for backward in (False, True):
            try:
                calls = [make_call(name, function, case, inputs, backward) for inputs in sets]
                ms, how = each_ms(calls, device, seconds)
                cells.append(f"{ms:.3f}")
            except (RuntimeError, TypeError) as error:   # a peer without this type or device
                cells.append(f"failed: {str(error).splitlines()[0][:60]}")
        rows.append([*title, name, *cells, how])
        show_progress(rows[-1])
    return rows


def deterministic_row(title, case, sets, seconds) -> list:
    """The time of the backward pass without atomic additions."""
    name = "layer, ours, fused, deterministic"
    function = partial(ms_deform_attn_fused, impl="kernel")
    torch.use_deterministic_algorithms(True)
    try:
        calls = [make_call(name, function, case, inputs, True) for inputs in sets]
        ms, how = each_ms(calls, "cuda", seconds)
    finally:
        torch.use_deterministic_algorithms(False)
    return [*title, name, "", f"{ms:.3f}", how]


def bound_row(title, case, inputs, bandwidth) -> list:
    """The lower bounds as times, with what the caches have to deliver."""
    bounds = lower_bounds(case, inputs)
    properties = torch.cuda.get_device_properties(0)
    clock = getattr(properties, "clock_rate", 0) * 1e3     # Hz; 0 where PyTorch does not know
    name = "lower bound: device memory"
    if clock:
        rate = properties.multi_processor_count * L1_BYTES_PER_CYCLE * clock
        name += f"; L1 {1e3 * bounds.gathered / rate:.3f}"
    return [*title, name, f"{1e3 * bounds.forward / bandwidth:.3f}",
            f"{1e3 * bounds.both / bandwidth:.3f}",
            f"{bounds.gathered / 1e6:.0f} MB gathered, {bounds.additions / 1e6:.1f} M 16-byte "
            "additions"]
