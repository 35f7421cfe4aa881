"""Every speed and memory figure of this repository.

    python -m tools.bench             every table that this machine can make, one after the other
    python -m tools.bench inference   one of them: kernel, step, inference, transformers, mask_cost, memory, loading or scoring
    python -m tools.bench ladder      trains: what each part of each paper brings
    python -m tools.bench masks       trains: what each part of the mask network brings

Each command prints a table and writes it, with date, device, versions and its own command line, to runs/bench/NAME.md.
A figure is the median of repeated runs. In the tables kernel and step implementations take turns within one process, so
that their ratio survives a busy machine better than the milliseconds do.
"""
import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib
import importlib.util
import io
import json
import multiprocessing
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import torch

import deformable_attn
from deformable_attn import ms_deform_attn, ms_deform_attn_fused, sampling_locations
import data
import scenes
from engine import authors_names, checkpoints, datasets
from engine.layers import compile_or_recompute
from engine.machine import Machine
from engine.recipe import configure
from eval import coco_results, score
from engine.machine import prepare_cpu

ROOT = Path(__file__).resolve().parent.parent

L2_BYTES = 100 << 20    # rotate over inputs of at least this size together, so that none is still in the cache (H100: 50 MB)


# ---- Timing ---------------------------------------------------------------------------------------------------------

def milliseconds(functions, device, repeats):
    """Median time of one call, over a list of calls that do the same on different inputs -> (ms, how it was measured).

    On a GPU one CUDA graph holds all the calls: no launch gaps, no Python. A function that cannot be captured (it asks the
    device for a value, say) is timed by events around plain calls instead, which includes its launches."""
    if device == "cpu":
        return statistics.median(1e3 * clock(f) for _ in range(repeats) for f in functions), "clock"
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for f in functions:
            f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for f in functions:
                f()
        once, how = graph.replay, "graph"
    except RuntimeError:
        torch.cuda.synchronize()
        once, how = (lambda: [f() for f in functions]), "events"
    times = []
    for _ in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        once()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(functions))
    return statistics.median(times[3:]), how


def clock(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"{(names or [platform.processor()])[0]}, {torch.get_num_threads()} threads"


def report(name, args, columns, rows, notes=()):
    """Prints a table as it goes to the README and keeps it in runs/bench/."""
    head = (f"{datetime.date.today()}, {device_name(args.device)}, torch {torch.__version__}, CUDA {torch.version.cuda}; "
            f"`python {shlex.join(sys.argv)}`")
    lines = [head, "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows] + ["", *notes]
    text = "\n".join(lines)
    path = Path("runs/bench") / f"{name}_{args.device}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    print(f"{text}\nsaved to {path}")


# ---- The operator ---------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Case:
    """One problem of the kernel table. queries None: the tokens are the queries, as in an encoder."""
    name: str
    batch: int
    shapes: list
    queries: int | None = None
    heads: int = 8
    channels: int = 32
    points: int = 4


def levels(height, width, strides=(8, 16, 32, 64)):
    return [(-(-height // s), -(-width // s)) for s in strides]


FOUR, FIVE = levels(800, 1333), levels(800, 1333, (4, 8, 16, 32, 64))
SMALL = dict(shapes=[(16, 16), (8, 8), (4, 4)], heads=4)
CASES = {
    "cuda": [*(Case("4-scale encoder, 800x1333", batch, FOUR) for batch in (1, 2, 4)),
             *(Case("decoder, 800x1333", 2, FOUR, queries) for queries in (300, 900, 1100)),
             Case("5-scale encoder, 800x1333", 1, FIVE), Case("4-scale encoder, 512x512", 8, levels(512, 512))],
    "cpu": [Case("small encoder, 128x128", 8, **SMALL), Case("small decoder, 128x128", 8, queries=140, **SMALL),
            Case("decoder, 800x1333", 1, FOUR, 900), Case("4-scale encoder, 800x1333", 1, FOUR)],
}


def make_inputs(case, device, dtype, uniform, seed):
    """value, offsets, logits, reference. Offsets are a few pixels (standard deviation 2) around a grid of tokens or, in a
    decoder, around random centres; `uniform` spreads every look over the whole map."""
    generator = torch.Generator(device).manual_seed(seed)
    normal, uniformly = (functools.partial(f, generator=generator, device=device) for f in (torch.randn, torch.rand))
    B, M, D, L, K = case.batch, case.heads, case.channels, len(case.shapes), case.points
    S = sum(H * W for H, W in case.shapes)
    Nq = case.queries or S
    if case.queries:
        centers = uniformly(B, Nq, 2)
    else:
        grids = [torch.meshgrid((torch.arange(H) + 0.5) / H, (torch.arange(W) + 0.5) / W, indexing="ij") for H, W in case.shapes]
        centers = torch.cat([torch.stack([x, y], -1).flatten(0, 1) for y, x in grids]).expand(B, -1, -1).to(device)    # (B, S, 2)
    if uniform:
        size = torch.tensor([(W, H) for H, W in case.shapes], device=device).view(L, 1, 2)
        offsets = (uniformly(B, Nq, M, L, K, 2) - centers[:, :, None, None, None]) * size
    else:
        offsets = normal(B, Nq, M, L, K, 2) * 2
    value, logits = normal(B, S, M, D), normal(B, Nq, M, L, K)
    reference = centers[:, :, None].expand(-1, -1, L, -1).contiguous()                                          # (B, Nq, L, 2)
    return [tensor.to(dtype).requires_grad_() for tensor in (value, offsets, logits)] + [reference]


def eager(operator, value, shapes, offsets, logits, reference):
    """From offsets and logits as everybody else does it: softmax and locations as PyTorch calls, then the operator."""
    weights = logits.flatten(-2).softmax(-1, dtype=torch.float32).view_as(logits)
    return operator(value, shapes, sampling_locations(reference, offsets.float(), shapes), weights)


def implementations(peers):
    """name -> function of (value, shapes, offsets, logits, reference). "operator" rows get locations and weights made before
    the clock starts; "layer" rows start from offsets and logits."""
    table = {
        "operator, PyTorch": functools.partial(ms_deform_attn, impl="torch"),
        "operator, ours": functools.partial(ms_deform_attn, impl="kernel"),
        "layer, PyTorch": functools.partial(eager, functools.partial(ms_deform_attn, impl="torch")),
        "layer, ours, not fused": functools.partial(eager, functools.partial(ms_deform_attn, impl="kernel")),
        "layer, ours, fused": functools.partial(ms_deform_attn_fused, impl="kernel"),
    }
    for peer in peers:
        module, _, function = peer.partition(":")
        function = getattr(importlib.import_module(module), function)
        table |= {f"operator, {peer}": function, f"layer, {peer}": functools.partial(eager, function)}
    return table


def calls(name, function, case, sets, backward):
    """One function without arguments per set of inputs."""
    def make(value, offsets, logits, reference):
        if name.startswith("operator"):
            with torch.no_grad():
                points = sampling_locations(reference, offsets.float(), case.shapes)
                weights = logits.float().flatten(-2).softmax(-1).view_as(logits)
            inputs = [value, points.requires_grad_(), weights.requires_grad_()]
            forward = lambda: function(value, case.shapes, points, weights)
        else:
            inputs = [value, offsets, logits]
            forward = lambda: function(value, case.shapes, offsets, logits, reference)
        if not backward:
            return torch.no_grad()(forward)
        ones = torch.ones(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3], device=value.device, dtype=value.dtype)
        return lambda: torch.autograd.grad(forward(), inputs, ones)

    return [make(*inputs) for inputs in sets]


def floors(case, inputs):
    """What no implementation can go below -> bytes through HBM of the forward pass and of both, fused form; bytes gathered
    from L1; additions of 16 bytes in the backward pass. Every tensor crosses once; corners outside the map are not read."""
    value, offsets, logits, reference = inputs
    once = lambda *tensors: sum(t.numel() * t.element_size() for t in tensors)
    output = offsets.shape[0] * offsets.shape[1] * case.heads * case.channels * value.element_size()
    forward = once(value, offsets, logits, reference) + output
    corners = 0
    with torch.no_grad():
        locations = sampling_locations(reference, offsets.float(), case.shapes)
        for l, (H, W) in enumerate(case.shapes):
            x, y = ((locations[:, :, :, l, :, i] * n - 0.5).floor() for i, n in ((0, W), (1, H)))      # (B, Nq, M, K)
            columns, rows = (((at >= 0) & (at < n)).int() + ((at + 1 >= 0) & (at + 1 < n)) for at, n in ((x, W), (y, H)))
            corners += (columns * rows).sum().item()
    both = 2 * forward + once(value, offsets, logits)    # the backward pass reads all of it again and writes three gradients
    return forward, both, corners * case.channels * value.element_size(), corners * case.channels // 4


def copy_bandwidth():
    """Bytes per second that a plain copy moves through device memory, read and write counted."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    ms, _ = milliseconds([lambda: target.copy_(source)], "cuda", 20)
    return 2 * source.numel() * 4 / (ms * 1e-3)


def kernel(args):
    """The table of the operator: our kernels beside the definition and beside peers."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16] if args.device == "cuda" else [torch.float32, torch.bfloat16]
    rows, notes, table = [], [], implementations(args.peer)
    bandwidth = copy_bandwidth() if args.device == "cuda" else None
    for case in CASES[args.device]:
        if args.case not in case.name:
            continue
        for dtype in dtypes:
            for uniform in (False, True):
                first = make_inputs(case, args.device, dtype, uniform, 0)
                size = sum(t.numel() * t.element_size() for t in first)
                copies = max(2, -(-L2_BYTES // size)) if args.device == "cuda" else 2
                sets = [first] + [make_inputs(case, args.device, dtype, uniform, seed) for seed in range(1, copies)]
                title = f"{case.name}, batch {case.batch}, {case.queries or 'all'} queries", str(dtype)[6:], "uniform" if uniform else "near"
                for name, function in table.items():
                    cells, how = [], "clock"
                    for backward in (False, True):
                        try:
                            ms, how = milliseconds(calls(name, function, case, sets, backward), args.device, args.repeats)
                            cells.append(f"{ms:.3f}")
                        except (RuntimeError, TypeError) as error:      # a peer without this type, shape or device
                            cells.append(f"failed: {str(error).splitlines()[0][:60]}")
                    rows.append([*title, name, *cells, how])
                    print("  ".join(rows[-1]), file=sys.stderr, flush=True)
                if args.device == "cuda":
                    rows += cuda_only(case, sets, title, args.repeats, bandwidth)
    if bandwidth:
        notes.append(f"Floor: bytes through device memory, fused form, at the {bandwidth / 1e12:.2f} TB/s that a copy reaches here.")
    columns = ["case", "values", "looks", "implementation", "forward ms", "forward + backward ms", "timed by"]
    report("kernel", args, columns, rows, notes)


def cuda_only(case, sets, title, repeats, bandwidth):
    """The price of a deterministic backward, and the computed floors."""
    torch.use_deterministic_algorithms(True)
    try:
        functions = calls("layer", functools.partial(ms_deform_attn_fused, impl="kernel"), case, sets, True)
        ms, how = milliseconds(functions, "cuda", repeats)
    finally:
        torch.use_deterministic_algorithms(False)
    forward, both, gathered, additions = floors(case, sets[0])
    properties = torch.cuda.get_device_properties(0)
    clock_rate = getattr(properties, "clock_rate", 0) * 1e3                                # Hz, where this version says it
    l1 = f"; L1 {1e3 * gathered / (properties.multi_processor_count * 128 * clock_rate):.3f}" if clock_rate else ""
    return [[*title, "layer, ours, fused, deterministic", "", f"{ms:.3f}", how],
            [*title, f"floor: HBM{l1}", f"{1e3 * forward / bandwidth:.3f}", f"{1e3 * both / bandwidth:.3f}",
             f"{gathered / 1e6:.0f} MB gathered, {additions / 1e6:.1f} M 16-byte additions"]]


# ---- The training step ----------------------------------------------------------------------------------------------

def step(args):
    """One training step (forward, losses, backward, optimiser, average) of the small preset, with our kernels and without."""
    import train
    rows = []
    for name in args.models:
        paper = importlib.import_module(name)
        cfg, recipe = configure(paper, paper.SMALL)
        dataset, _ = datasets.build_datasets(None, recipe, 0)
        model, criterion = paper.build(cfg, len(dataset.class_names))
        model.to(args.device).train()
        optimizer = torch.optim.AdamW(paper.param_groups(model, recipe), lr=1e-4, fused=True)
        average = train.make_ema(model, recipe.ema)
        batches = [data.collate([dataset[i] for i in range(k * recipe.batch_size, (k + 1) * recipe.batch_size)]) for k in range(3)]
        for amp in (False, True):
            times = {"torch": [], "kernel": []}
            for k in range(args.repeats + 2):
                for impl in times:
                    deformable_attn.MSDeformAttn.impl = impl
                    run = lambda: train.step(model, model, criterion, optimizer, average, [batches[k % 3]], recipe.clip, Machine(torch.device(args.device), amp))
                    times[impl].append(1e3 * clock(run))
            slow, fast = (statistics.median(times[impl][2:]) for impl in ("torch", "kernel"))
            rows.append([name, "bfloat16" if amp else "float32", f"{slow:.0f}", f"{fast:.0f}", f"{slow / fast:.2f}"])
    deformable_attn.ms_deform_attn_fused = ms_deform_attn_fused
    report("step", args, ["model (small preset)", "autocast", "PyTorch ms", "kernels ms", "ratio"], rows)


# ---- Whole models at published size ---------------------------------------------------------------------------------

def median_ms(function, device, repeats):
    """Median time of one call after one that does not count, ms."""
    def run():
        function()
        if device == "cuda":
            torch.cuda.synchronize()
    run()
    return statistics.median(1e3 * clock(run) for _ in range(repeats))


def random_batch(size, batch):
    """Images of noise without padding, eight objects each -> images, padding, targets."""
    targets = [{"labels": torch.arange(8), "boxes": torch.rand(8, 4) * 0.3 + 0.3, "index": i} for i in range(batch)]
    return torch.randn(batch, 3, *size), torch.zeros(batch, *size, dtype=torch.bool), targets


def inference(args):
    """Time from an image tensor to detections, published models, one image at a time."""
    rows = []
    for name, variant in (model.partition(":")[::2] for model in args.models):
        paper = importlib.import_module(name)
        cfg, _ = configure(paper, paper.VARIANTS[variant] if variant else {})
        model = paper.build(cfg, 80)[0].to(args.device).eval()
        images, padding, _ = (x.to(args.device) if torch.is_tensor(x) else x for x in random_batch(args.size, 1))
        cells = []
        for amp in (False, True):
            @torch.inference_mode()
            def run():
                with torch.autocast(args.device, torch.bfloat16, enabled=amp):
                    outputs = model(images, padding)
                paper.detect(outputs, torch.tensor([args.size]), cfg)

            ms = median_ms(run, args.device, args.repeats)
            cells += [f"{ms:.0f}", f"{1e3 / ms:.2f}"]
        rows.append([f"{name} {variant}", *cells])
    report("inference", args, [f"{args.size[0]}x{args.size[1]}", "float32 ms", "images/s", "bfloat16 ms", "images/s"], rows)


def transformers(args):
    """Two-stage Deformable DETR beside the one of the package transformers: same weights, same images, same losses."""
    if not importlib.util.find_spec("transformers"):
        sys.exit("bench.py: the package transformers is not installed: pip install -r tests/requirements.txt")
    import train
    theirs, model, criterion, recipe = peers()
    images, padding, targets = random_batch(args.size, args.batch)
    theirs_inputs, inputs = (images[:1], ~padding[:1]), (images[:1], padding[:1])
    with torch.no_grad():
        error = (theirs.eval()(*theirs_inputs).logits - model.eval()(*inputs)["pred_logits"]).abs().max().item()
    to = lambda *tensors: [tensor.to(args.device) for tensor in tensors]
    theirs_inputs, inputs = to(*theirs_inputs), to(*inputs)
    images, padding, valid = to(images, padding, ~padding)
    labels = [{"class_labels": t["labels"].to(args.device), "boxes": t["boxes"].to(args.device)} for t in targets]
    theirs_optimizer, optimizer = (torch.optim.AdamW([p for p in m.to(args.device).parameters() if p.requires_grad], lr=1e-5,
                                                     fused=True) for m in (theirs, model))

    @torch.inference_mode()
    def detect(detector, inputs, amp):
        with torch.autocast(args.device, torch.bfloat16, enabled=amp):
            detector.eval()(*inputs)

    def theirs_step(amp):
        theirs_optimizer.zero_grad()
        with torch.autocast(args.device, torch.bfloat16, enabled=amp):
            loss = theirs.train()(images, valid, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in theirs.parameters() if p.grad is not None], recipe.clip, foreach=True)
        theirs_optimizer.step()

    def our_step(amp):
        train.step(model.train(), model, criterion, optimizer, train.make_ema(model, 0), [(images, padding, targets)],
                   recipe.clip, Machine(torch.device(args.device), amp))

    package = {"inference, 1 image": functools.partial(detect, theirs, theirs_inputs), f"training step, {args.batch}": theirs_step}
    ours = {"inference, 1 image": functools.partial(detect, model, inputs), f"training step, {args.batch}": our_step}
    rounds = [("transformers", package, ""), ("ours", ours, "")]
    if args.device == "cpu":
        rounds = [("transformers", package, "no"), ("transformers", package, "yes"), ("ours", ours, "yes")]
    rows, first = [], {}
    for name, passes, settings in rounds:
        if settings == "yes":
            prepare_cpu()
        for what, run in passes.items():
            for dtype in args.types:
                kind = what, dtype
                try:
                    ms = median_ms(functools.partial(run, dtype == "bfloat16"), args.device, args.repeats)
                    rows.append([*kind, name, settings, f"{ms:.0f}", f"{first.setdefault(kind, ms) / ms:.2f}"])
                except RuntimeError as error_text:          # the package, with half precision on a CPU
                    rows.append([*kind, name, settings, f"failed: {str(error_text)[:60]}", ""])
                print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    report("transformers", args, [f"{args.size[0]}x{args.size[1]}", "autocast", "implementation", "CPU settings", "ms", "ratio"],
           sorted(rows, key=lambda row: row[:2]), [f"Largest difference of the logits: {error:.1e}. Ratio: to the first row of "
           "its kind. CPU settings: those of `eval.prepare_cpu`, which hold for the whole process."])


def peers():
    """transformers' model with random weights, ours with the same, our criterion and Config: two-stage, ResNet-50, 91 classes."""
    import deformable_detr
    import transformers
    stages = transformers.ResNetConfig(embedding_size=64, hidden_sizes=[256, 512, 1024, 2048], depths=[3, 4, 6, 3],
                                       out_features=["stage2", "stage3", "stage4"])
    torch.manual_seed(0)
    theirs = transformers.DeformableDetrForObjectDetection(transformers.DeformableDetrConfig(
        use_timm_backbone=False, backbone_config=stages, num_labels=91, with_box_refine=True, two_stage=True, auxiliary_loss=True,
        disable_custom_kernels=True))
    cfg = deformable_detr.Config(**deformable_detr.VARIANTS["two_stage"])
    model, criterion = deformable_detr.build(cfg, 91)
    weights = authors_names.from_transformers(theirs.state_dict())
    model.load_state_dict(authors_names.from_authors(weights, "deformable_detr_two_stage"))
    return theirs, model, criterion, deformable_detr.RECIPE


# ---- Memory and time of a training step -----------------------------------------------------------------------------

def memory(args):
    """Time and peak memory of a training step over batch sizes, with and without --recompute: the small preset on a CPU, the
    published one on a GPU."""
    rows = []
    for name in args.models:
        for batch in args.batches:
            for recompute in (False, True):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:     # a peak of its own
                    ms, gib = fresh.submit(step_cost, name, batch, recompute, args).result()
                rows.append([name, batch, "yes" if recompute else "no", f"{ms:.0f}", f"{1e3 * batch / ms:.1f}", f"{gib:.2f}"])
                print("  ".join(map(str, rows[-1])), file=sys.stderr, flush=True)
    report("memory", args, [f"{args.preset} preset, {'bfloat16' if args.amp else 'float32'}", "batch", "--recompute", "ms a step",
                            "images/s", "peak GiB"], rows, ["Peak: of the process, or on a GPU of its allocator."])


def step_cost(name, batch, recompute, args):
    """One setting -> median ms of a training step, peak GiB."""
    import train
    torch.set_num_threads(args.threads)
    prepare_cpu()
    paper = importlib.import_module(name)
    cfg, recipe = configure(paper, paper.SMALL if args.preset == "small" else {})
    images = datasets.build_datasets(None, recipe, 0, num_train=batch, num_val=1)[0] if args.preset == "small" else None
    samples = data.collate([images[i] for i in range(batch)]) if images else random_batch(args.size, batch)
    model, criterion = paper.build(cfg, 80)
    model.to(args.device).train()
    compile_or_recompute(model, train.Run(recompute=recompute))
    optimizer = torch.optim.AdamW(paper.param_groups(model, recipe), lr=1e-5, fused=True)
    average = train.make_ema(model, recipe.ema)
    ms = median_ms(lambda: train.step(model, model, criterion, optimizer, average, [samples], recipe.clip, Machine(torch.device(args.device), args.amp)),
                   args.device, args.repeats)
    if args.device == "cuda":
        return ms, torch.cuda.max_memory_allocated() / 2 ** 30
    import resource
    return ms, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


# ---- Images in, scores out ------------------------------------------------------------------------------------------

def loading(args):
    """Images a second that arrive as augmented training batches: generated scenes at the small size, and a COCO-layout
    folder (--data, or scenes written as files) at the published size."""
    import dino
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            with contextlib.redirect_stdout(io.StringIO()):
                scenes.write_scenes(folder, args.images, 1)
        for title, source, recipe in (("generated scenes, small preset", None, configure(dino, dino.SMALL)[1]),
                                   (f"{Path(args.data).name or 'scenes as files'}, published preset", args.data or folder,
                                    dino.RECIPE)):
            images = datasets.build_datasets(source, recipe, 0, num_train=args.images, num_val=1)[0]
            places = [[(2 * i + k) % len(images) for k in range(2)] for i in range(args.images // 2)]
            for workers in args.workers:
                seconds = clock(lambda: sum(len(padding) for _, padding, _ in data.batches(images, places, workers)))
                rows.append([title, workers, f"{args.images / seconds:.0f}"])
    report("loading", args, ["images", "workers", "images/s"], rows,
           [f"{args.images} images once, batches of 2, starting the workers included."])


def scoring(args):
    """Time of COCO AP: every object found with a jittered box, filled up with 100 detections an image."""
    dataset = scenes.Shapes("val", args.images)
    truth, generator = dataset.coco(), torch.Generator().manual_seed(0)
    results = []
    for image in truth.dataset["images"]:
        boxes = torch.tensor([row["bbox"] for row in truth.imgToAnns[image["id"]]], dtype=torch.float64).reshape(-1, 4)
        boxes = boxes.repeat(-(-100 // max(1, len(boxes))), 1)[:100]                                      # (100, 4)
        jitter = boxes[:, 2:].repeat(1, 2) * torch.randn(len(boxes), 4, generator=generator, dtype=torch.float64)
        scores, labels = torch.rand(len(boxes), generator=generator), torch.randint(8, (len(boxes),), generator=generator)
        corners = boxes + 0.1 * jitter
        corners[:, 2:] += corners[:, :2]
        results += coco_results([{"boxes": corners, "scores": scores, "labels": labels}], [image["id"]],
                                           dataset.category_ids)
    seconds = statistics.median(clock(lambda: score(truth, results)) for _ in range(args.repeats))
    report("scoring", args, ["images", "detections", "seconds", "ms an image"],
           [[args.images, len(results), f"{seconds:.2f}", f"{1e3 * seconds / args.images:.2f}"]])


# ---- What each part brings ------------------------------------------------------------------------------------------

LADDER = {   # row, also its folder: title, paper file, what changes in that file's small preset
    "deformable_detr": ("Deformable DETR", "deformable_detr", {}),
    "iterative_refinement": ("+ iterative refinement", "deformable_detr", {"with_box_refine": True}),
    "two_stage": ("+ two-stage", "deformable_detr", {"with_box_refine": True, "two_stage": True}),
    "h_detr_baseline": ("H-DETR without one-to-many queries", "h_detr", {"num_queries_one2many": 0}),
    "h_detr": ("H-DETR", "h_detr", {}),
    "dino_without_denoising": ("DINO without denoising", "dino", {"denoising": "none"}),
    "dino_with_static_queries": ("DINO with static queries", "dino", {"query_selection": "static"}),
    "dino_looking_forward_once": ("DINO looking forward once", "dino", {"look_forward_twice": False}),
    "dino": ("DINO", "dino", {}),
} | {f"co_{base}_{heads.replace(',', '_')}": (f"{title}, heads: {heads}", "co_detr", {**variant, "aux_heads": heads})
     for base, title, variant in (("deformable", "Co-Deformable-DETR", {"variant": "co_deformable_small"}), ("dino", "Co-DINO", {}))
     for heads in ("none", "atss", "atss,rcnn", "atss,rcnn,retinanet")}


def ladder(args):
    """Trains rows of LADDER on the generated scenes, same number of steps, several seeds: AP with its spread (largest minus
    smallest) and the median time of a step. Finished runs in --out are not repeated, broken off ones go on; every run's
    folder stays."""
    import visualize
    jobs = [(name, seed) for seed in range(args.seeds) for name in args.rows]
    with ThreadPoolExecutor(args.jobs) as pool:
        records = dict(zip(jobs, pool.map(lambda job: ladder_run(*job, args), jobs)))
    rows = []
    for name in args.rows:
        runs = [records[name, seed] for seed in range(args.seeds)]
        ap = [run["bbox"]["AP"] for run in runs]
        rows.append([LADDER[name][0], f"{statistics.mean(ap):.3f}", f"{max(ap) - min(ap):.3f}",
                     *(f"{statistics.mean(run['bbox'][key] for run in runs):.3f}" for key in ("AP50", "APs", "APl")),
                     f"{statistics.median(run['step_ms'] for run in runs):.0f}"])
    report("ladder", args, [f"{args.epochs} epochs, {args.seeds} seeds", "AP", "spread", "AP50", "AP small", "AP large",
                            "ms a step"], rows)
    scores = {LADDER[name][0]: [records[name, seed]["bbox"]["AP"] for seed in range(args.seeds)] for name in args.rows}
    print(f"saved to {visualize.ladder(scores, args.plot)}")


def ladder_run(name: str, seed: int, args) -> dict:
    """One row of the ladder -> the record of its last evaluation, with `step_ms`."""
    _, model, changes = LADDER[name]
    return run_row(Path(args.out) / f"{name}_{seed}", {"model": model, "seed": seed, **changes}, args)


def run_row(out: Path, flags: dict, args) -> dict:
    """One training run of args.epochs in a process of its own, unless `out` holds it already -> the record of its last
    evaluation, with `step_ms`."""
    log = out / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not lines or lines[-1]["kind"] != "eval" or lines[-1]["epoch"] < args.epochs:
        flags = {"out": out, "epochs": args.epochs, "threads": args.threads, "eval_every": args.epochs, **flags}
        words = ["--resume", "--out", str(out)] if (out / "last.pt").exists() else [
            word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "output.txt", "a") as output:
            subprocess.run([sys.executable, str(ROOT / "train.py"), *words], check=True, stdout=output,
                           stderr=output)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    print(f"{out.name}: AP {lines[-1].get('segm', lines[-1]['bbox'])['AP']:.3f}", file=sys.stderr)
    steps = [line for line in lines if line["kind"] == "step"]
    return lines[-1] | {"step_ms": statistics.median(1e3 * (b["train_seconds"] - a["train_seconds"]) / (b["step"] - a["step"])
                                                     for a, b in zip(steps, steps[1:]))}


# ---- What each part of the mask network brings, and costs -----------------------------------------------------------

FAMILIES = ("none", "deformable", "swin", "convnext")
MASKS = {   # row, also its folder: the paper's ablation it belongs to, and what changes in mask_frozen_detr's small preset
    "default": ("", {}),
    "image_baseline": ("baselines", {"variant": "image_baseline"}), "box_baseline": ("baselines", {"variant": "box_baseline"}),
    "gt_boxes": ("regions from the ground truth", {"roi_box": "gt"}),
    "roi_8": ("size of a region", {"roi_size": 8}), "roi_32": ("size of a region", {"roi_size": 32}),
    **{f"image_{kind}": ("image encoder", {"image_encoder": kind}) for kind in FAMILIES if kind != "deformable"},
    "image_2_layers": ("image encoder", {"image_layers": 2}),
    **{f"box_{kind}": ("box encoder", {"box_encoder": kind}) for kind in FAMILIES if kind != "deformable"},
    "box_1_layer": ("box encoder", {"box_layers": 1}),
    **{f"width_{width}": ("channel mapper", {"channel_dim": width}) for width in (32, 128)},
    **{f"query_{kind}": ("query encoder", {"query_encoder": kind}) for kind in ("none", "obj2obj", "both")},
    "query_both_ffn": ("query encoder", {"query_encoder": "both", "query_ffn": True}),
    "dense_loss": ("loss", {"point_loss": False}), "no_mask_scoring": ("mask scoring", {"mask_scoring": False}),
}


def masks(args):
    """Trains rows of MASKS on the same frozen detector, same number of steps: the paper's ablation tables, reduced and with
    our own figures. Resumable as the ladder. Left out: what a small detector with one encoder layer and 48 channels of
    stride 4 cannot vary (which layer is tapped, no neck), and the rows on schedule, batch, jitter and fine-tuning."""
    rows, common = [], {"model": "mask_frozen_detr", "detector": args.detector}
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = pool.map(lambda name: run_row(Path(args.out) / name, common | MASKS[name][1], args), args.rows)
    for name, run in zip(args.rows, runs):
        weights = checkpoints.load(Path(args.out) / name / "best.pt")["model"]
        parameters = sum(value.numel() for key, value in weights.items() if key != "_extra_state")
        scores = [run["segm"][key] for key in ("AP", "AP75", "APs", "APl")] + [run["segm_cls"]["AP"], run["bbox"]["AP"]]
        rows.append([MASKS[name][0], name, *(f"{score:.3f}" for score in scores), f"{parameters / 1e6:.2f}", f"{run['step_ms']:.0f}"])
    report("masks", args, ["ablation", f"row, {args.epochs} epochs", "mask AP", "AP75", "small", "large", "by class score",
                           "box AP", "M parameters", "ms a step"], rows)


def mask_cost(args):
    """What each part of the mask network costs at its default sizes: parameters, multiply-adds and milliseconds for one image
    with 100 detections, and memory kept for the backward pass of one image with 7 objects."""
    from torch.utils.flop_counter import FlopCounterMode, register_flop_formula
    import dino
    import mask_frozen_detr as paper

    @register_flop_formula(torch.ops.paperdetr.ms_deform_attn)
    def looks(value, shapes, points, *rest, out_shape=None, **options):            # four corners for every look and channel
        return 2 * 4 * out_shape[0] * out_shape[1] * out_shape[2] * points[3] * points[4]

    detector, _ = dino.build(dino.Config(), 80)
    model = paper.MaskFrozenDETR(paper.FrozenDetector(detector, dino.detect), paper.Config()).to(args.device)
    image = torch.randn(1, 3, *args.size, device=args.device)
    padding = torch.zeros(1, *args.size, dtype=torch.bool, device=args.device)
    outputs, _ = model.frozen(image, padding)
    memory, C, r = outputs["memory"], model.cfg.channel_dim, model.cfg.roi_size
    fine = torch.randn(1, *memory.features[0].shape[-2:], model.frozen.dim, device=args.device)

    def parts(n):
        region, queries = torch.randn(n, r, r, C, device=args.device), torch.randn(n, C, device=args.device)
        states, probabilities = torch.randn(n, model.frozen.dim, device=args.device), torch.rand(n, r, r, device=args.device)
        return {"neck": ([model.neck], lambda: model.neck(memory.features[0])),
                "image encoder": ([model.image_encoder], lambda: paper.encode(model.image_encoder, memory).tokens),
                "channel and query mapper": ([model.channel_mapper, model.query_mapper],
                                             lambda: model.channel_mapper(fine).sum() + model.query_mapper(states).sum()),
                "box encoder": ([model.box_encoder], lambda: paper.encode(model.box_encoder, paper.region_memory(region)).tokens),
                "box to object": ([model.query_encoder],
                                  lambda: model.query_encoder.from_region(queries, paper.region_memory(region))),
                "mask scoring": ([model.score_head], lambda: model.score_head(probabilities, region))}

    milliseconds_of = lambda function: median_ms(torch.no_grad()(function), args.device, args.repeats)

    def kept_for_backward(function):
        kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = function()   # alive until everything is counted
        return result is not None and sum(t.untyped_storage().nbytes() for where, t in kept.items() if where not in weights)

    rows = []
    for (name, (modules, full)), (_, (_, seven)) in zip(parts(100).items(), parts(7).items()):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            full()
        parameters = sum(p.numel() for module in modules for p in module.parameters())
        rows.append([name, f"{parameters:,}", f"{counter.get_total_flops() / 2e9:.1f}", f"{milliseconds_of(full):.0f}",
                     f"{kept_for_backward(seven) / 2 ** 20:.0f}"])
    rows.append(["frozen detector (DINO, ResNet-50)", f"{sum(p.numel() for p in detector.parameters()):,}", "",
                 f"{milliseconds_of(lambda: model.frozen(image, padding)):.0f}", "0"])
    report("mask_cost", args, [f"part, {args.size[0]}x{args.size[1]}", "parameters", "GMACs", "ms", "MiB for backward"], rows)


# ---- Command line ---------------------------------------------------------------------------------------------------

TABLES = (kernel, step, inference, transformers, mask_cost, memory, loading, scoring)     # what `python -m tools.bench` alone makes


def main():
    if len(sys.argv) == 1:
        for table in TABLES:                    # each in a process of its own: settings and memory start anew
            if table is not transformers or importlib.util.find_spec("transformers"):
                subprocess.run([sys.executable, "-m", "tools.bench", table.__name__], check=True, cwd=ROOT)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    on_gpu = torch.cuda.is_available()

    def command(function, repeats=None):
        sub = commands.add_parser(function.__name__, help=function.__doc__, allow_abbrev=False)
        sub.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=("cuda", "cpu"))
        sub.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
        if repeats:
            sub.add_argument("--repeats", type=int, default=repeats, help="the median is reported (%(default)s)")
        sub.set_defaults(run=function)
        return sub

    def size(sub, height, width):
        sub.add_argument("--size", type=int, nargs=2, default=(height, width), metavar=("H", "W"))

    sub = command(kernel, 15)
    sub.add_argument("--peer", action="append", default=[], metavar="MODULE:FUNCTION",
                     help="time another function of ms_deform_attn's signature as well (repeatable; it lies on PYTHONPATH)")
    sub.add_argument("--case", default="", help="only cases whose name contains this")
    sub = command(step, 9)
    sub.add_argument("--models", nargs="+", default=["deformable_detr", "dino"])
    sub = command(inference, 20 if on_gpu else 3)
    sub.add_argument("--models", nargs="+", default=["deformable_detr:two_stage", "h_detr", "dino", "co_detr"],
                     metavar="FILE[:VARIANT]")
    size(sub, 800, 1199)
    sub = command(transformers, 20 if on_gpu else 2)
    sub.add_argument("--batch", type=int, default=2 if on_gpu else 1, help="images of the training step (%(default)s)")
    sub.add_argument("--types", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"), help="autocast")
    size(sub, 800, 1199)
    sub = command(memory, 5)
    sub.add_argument("--models", nargs="+", default=["deformable_detr", "h_detr", "dino", "co_detr"])
    sub.add_argument("--preset", default="paper" if on_gpu else "small", choices=("paper", "small"))
    sub.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4] if on_gpu else [8, 32])
    sub.add_argument("--amp", type=lambda text: text == "true", default=True, metavar="true|false", help="bfloat16 autocast (true)")
    size(sub, 800, 1333)
    sub = command(loading)
    sub.add_argument("--data", default="", help="COCO-layout folder")
    sub.add_argument("--images", type=int, default=256)
    sub.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    sub = command(scoring, 3)
    sub.add_argument("--images", type=int, default=500)
    sub = command(ladder)
    sub.add_argument("--seeds", type=int, default=3)
    sub.add_argument("--rows", nargs="+", default=list(LADDER), choices=LADDER, metavar="ROW", help=", ".join(LADDER))
    sub.add_argument("--epochs", type=int, default=2, help="500 steps each")
    sub.add_argument("--jobs", type=int, default=1, help="training runs at a time, --threads each")
    sub.add_argument("--out", default="runs/ladder")
    sub.add_argument("--plot", default="runs/bench/ladder.png")
    sub = command(masks)
    sub.add_argument("--detector", default="runs/dino/best.pt", help="small detector that all rows share (%(default)s)")
    sub.add_argument("--rows", nargs="+", default=list(MASKS), choices=MASKS, metavar="ROW", help=", ".join(MASKS))
    sub.add_argument("--epochs", type=int, default=1, help="500 steps each")
    sub.add_argument("--jobs", type=int, default=1, help="training runs at a time, --threads each")
    sub.add_argument("--out", default="runs/masks")
    sub = command(mask_cost, repeats=3)
    sub.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.run is not transformers:            # which times the package as it comes first
        prepare_cpu()
    args.run(args)


if __name__ == "__main__":
    main()
