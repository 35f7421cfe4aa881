"""Everything that can only be measured on a GPU, in one command and under nine minutes.

    python -m tools.bench gpu                 all parts; runs/bench/gpu_cuda.json and .md
    python -m tools.bench gpu --device cpu    a rehearsal: the same code with tiny shapes
    python -m tools.bench gpu_tables          the tables of the json, written into RESULTS.md

Every part runs in a process of its own with a time limit: a part that crashes, hangs or is not
installed becomes one line of the tables, and the rows that it had measured stay. What matters most
comes first. A rehearsal does not run CUDA graphs, the GPU's memory counters and the CUDA kernels.

Kernels are timed as one CUDA graph of many calls. A synchronization after every call would measure
the launch instead: small kernels appear about four times as slow, and in another order. The part
"timing" measures that.
"""
import contextlib
import datetime
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import dino
import train
from deformable_attn import verify_kernel
from engine.errors import UserError, error_line
from engine.files import write_json
from engine.layers import compile_or_recompute
from engine.recipe import configure
from tools import bench_transformers
from tools.bench_kernel import FOUR, Case, describe, input_sets, lower_bounds, make_inputs
from tools.bench_models import Setting, TrainingStep, random_batch, step_cost
from tools.bench_peers import IMPLEMENTATIONS, errors, is_installed
from tools.gpu_tables import tables
from tools.timing import (FOLDER, Device, device_name, each_ms, median_ms, peak_gib,
                          show_progress)

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {"cuda": 0.2, "cpu": 0.01}     # how long each figure of a kernel is measured
STEP_SECONDS = {"cuda": 3.0, "cpu": 0.1}
LEAST = 5                                # with fewer seconds left no part begins
SLOWER = {"cuda": 1, "cpu": 10}          # factor of the time limits; CPU cores are shared
DECODER_CALLS = 20                       # in one graph, about, so that its launch hardly counts

TINY = [(8, 8), (4, 4)]
CASES = {
    "cuda": [Case("encoder, 800x1333", 2, FOUR),
             Case("decoder, 800x1333", 4, FOUR, queries=300),     # the case of published figures
             Case("decoder, 800x1333", 2, FOUR, queries=900)],
    "cpu": [Case("encoder, tiny", 1, TINY, heads=2, channels=8),
            Case("decoder, tiny", 1, TINY, queries=5, heads=2, channels=8)]}
CHECKED = {
    "cuda": [Case("encoder, small", 2, [(16, 20), (8, 10), (4, 5)]),
             Case("decoder, small", 2, [(16, 20), (8, 10), (4, 5)], queries=100),
             Case("encoder, 800x1333", 1, FOUR)],
    "cpu": CASES["cpu"]}
# Largest relative error by type.
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# The gradient of locations or offsets may differ by this much in any type: for a point within
# rounding of a pixel's center, it is that of either side. `beside_centers` avoids most such points.
PLACE_LIMIT = 1e-2
SHIFT = 0.3                              # by which `beside_centers` moves points, pixels

# name -> precision of float32 matrix products, whether bfloat16 autocast is on
PRECISIONS = {"float32": ("highest", False), "TF32": ("high", False), "bfloat16": ("high", True)}
IMAGE = {"cuda": (800, 1333), "cpu": (64, 64)}
MEMORY = {"cuda": [("deformable_detr", 2), ("dino", 2), ("dino", 4), ("co_detr", 2)],
          "cpu": [("dino", 1)]}
TESTS = {"cuda": [["tests/test_deformable_attn_operator.py", "-k", "gpu"],
                  ["tests/test_train.py", "-k", "gpu"]],
         "cpu": [["tests/test_boxes.py", "-k", "format"]]}
LOG_CHARACTERS = 3000                    # of a failed part or test, kept in the json


# ---- what the parts measure: every function yields rows ------------------------------------------

def machine(device):
    """The most that the device can do in a second: bytes copied, operations of matrix products."""
    numbers = 1 << 28 if device == "cuda" else 1 << 10
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    ms, _ = each_ms([lambda: target.copy_(source)], device, SECONDS[device])
    yield {"what": "copy, bytes read and written", "unit": "TB/s",
           "value": 2 * 4 * numbers / ms * 1e-9}

    side = 8192 if device == "cuda" else 64
    for name, (precision, amp) in PRECISIONS.items():
        torch.set_float32_matmul_precision(precision)
        matrix = torch.randn(side, side, device=device).to(torch.bfloat16 if amp else torch.float32)
        ms, _ = each_ms([lambda matrix=matrix: matrix @ matrix], device, SECONDS[device])
        yield {"what": f"matrix product, {name}", "unit": "TFLOP/s",
               "value": 2 * side ** 3 / ms * 1e-9}


def correctness(device):
    """Errors of our kernels against the reference implementation in float64."""
    yield {"what": "self-test of the kernel", "ok": verify_kernel(device)}
    for case in CHECKED[device]:
        for dtype, limit in LIMITS.items():
            for name in ("ours", "ours, fused"):
                inputs = beside_centers(case, make_inputs(case, device, dtype, False, 0))
                measured = errors(IMPLEMENTATIONS[name].prepare(case, inputs))
                limits = [limit, limit, max(limit, PLACE_LIMIT), limit]
                ok = all(error <= most for error, most in zip(measured, limits))
                yield {"what": f"{name}, {describe(case)}, {str(dtype)[6:]}", "errors": measured,
                       "limits": limits, "ok": ok}
    yield repeated_gradients(device)


def beside_centers(case, inputs):
    """The inputs with points moved away from the centers of pixels, where they would often lie: an
    encoder's references are centers, and many offsets in half precision are integers. The gradient
    of such a point is that of its left or its right side, as rounding has it."""
    sizes = torch.tensor([(W, H) for H, W in case.shapes], device=inputs.reference.device)  # (L, 2)
    return inputs._replace(reference=inputs.reference + SHIFT / sizes)


def repeated_gradients(device) -> dict:
    """Whether the deterministic backward pass gives the same bytes twice."""
    inputs = make_inputs(CHECKED[device][0], device, torch.float32, False, 0)
    call = IMPLEMENTATIONS["ours, fused"].prepare(CHECKED[device][0], inputs)
    torch.use_deterministic_algorithms(True)
    first, second = [torch.autograd.grad(call.forward().sum(), call.trained) for _ in range(2)]
    torch.use_deterministic_algorithms(False)
    same = all(torch.equal(a, b) for a, b in zip(first, second))
    return {"what": "deterministic gradients, twice", "ok": same}


def run_tests(device):
    """The tests that need a GPU; the output of those that fail."""
    for words in TESTS[device]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = done.stdout.splitlines() or done.stderr.splitlines() or [""]
        ok = done.returncode == 0
        yield {"what": f"pytest {' '.join(words)}: {lines[-1].strip('= ')}", "ok": ok,
               "log": "" if ok else (done.stderr + done.stdout)[-LOG_CHARACTERS:]}


def kernel(name, device):
    """Times, memory and errors of one implementation."""
    torch.use_deterministic_algorithms(name.endswith("deterministic"))
    for case in CASES[device]:
        for dtype in LIMITS:
            row = {"case": describe(case), "dtype": str(dtype)[6:], "implementation": name,
                   "form": IMPLEMENTATIONS[name].form}
            try:
                row |= measure(name, case, dtype, device)
            except Exception as error:       # a peer may fail in any way
                row["failed"] = error_line(error)[:100] or type(error).__name__
            yield row


def measure(name, case, dtype, device) -> dict:
    """One row of the kernel tables."""
    prepare = IMPLEMENTATIONS[name].prepare
    small = CHECKED[device][0]
    checked = beside_centers(small, make_inputs(small, device, dtype, False, 1))
    output_error, *gradient_errors = errors(prepare(small, checked))
    sets = input_sets(case, device, dtype, uniform=False)
    calls = [prepare(case, inputs) for inputs in sets]
    if case.queries:
        calls = calls * max(1, DECODER_CALLS // len(calls))
    forward = [torch.no_grad()(call.forward) for call in calls]
    both = [partial(both_passes, call, torch.randn_like(call.forward())) for call in calls]
    mib = peak_mib(both[0], device)
    forward_ms, how = each_ms(forward, device, SECONDS[device])
    both_ms, both_how = each_ms(both, device, SECONDS[device])
    bounds = lower_bounds(case, sets[0])
    return {"forward_us": 1e3 * forward_ms, "both_us": 1e3 * both_ms,
            "how": how if how == both_how else f"{how}, {both_how}", "mib": mib,
            "error": output_error, "gradient_error": torch.tensor(gradient_errors).max().item(),
            "bytes_forward": bounds.forward, "bytes_both": bounds.both,
            "additions": bounds.additions}


def both_passes(call, grad_output):
    return torch.autograd.grad(call.forward(), call.trained, grad_output)


def peak_mib(function, device):
    """Memory that a call needs beside its inputs, MiB; None where it is not counted."""
    function()
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def timing(device):
    """One small kernel, timed in three ways."""
    case = CASES[device][1]
    inputs = make_inputs(case, device, torch.float16, False, 0)
    forward = torch.no_grad()(IMPLEMENTATIONS["ours, fused"].prepare(case, inputs).forward)
    ms, how = each_ms([forward] * 100, device, SECONDS[device])
    together = "100 calls in one graph" if how == "graph" else "100 calls, one after the other"
    yield {"what": together, "us": 1e3 * ms}
    yield {"what": "100 calls, then one synchronization", "us": host_us(forward, 100, 1, device)}
    yield {"what": "a synchronization after every call", "us": host_us(forward, 1, 100, device)}


def host_us(function, calls, rounds, device) -> float:
    """Mean time of a call, by the host's clock; it waits for the device after every round."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(rounds):
        for _ in range(calls):
            function()
        synchronize(device)
    return 1e6 * (time.perf_counter() - begin) / (calls * rounds)


def synchronize(device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def training_step(precision, compiled, device):
    """A training step of DINO with the published sizes; tiny in a rehearsal."""
    products, amp = PRECISIONS[precision]
    allow_tf32(products == "high")
    batch = 2 if device == "cuda" else 1
    cfg, recipe = configure(dino, {} if device == "cuda" else dino.SMALL)
    kernels = verify_kernel(device)
    model, criterion = dino.build(cfg, num_classes=80)
    compile_or_recompute(model, train.Run(compile=compiled))
    step = TrainingStep(dino, model, criterion, recipe, device)
    images, padding, targets = random_batch(IMAGE[device], batch)
    inputs = (images.to(device), padding.to(device), targets)

    begin = time.perf_counter()
    for _ in range(3):
        step(inputs, amp)
    warm_up = time.perf_counter() - begin
    ms = median_ms(lambda: step(inputs, amp), STEP_SECONDS[device])
    yield {"precision": precision, "compiled": compiled, "batch": batch, "ms": ms,
           "gib": peak_gib(device), "warm_up_s": warm_up,
           "attention": "kernel" if kernels else "PyTorch"}


def memory(device):
    """Peak memory of training steps, with and without recomputation, in bfloat16."""
    preset = "paper" if device == "cuda" else "small"
    for model, batch in MEMORY[device]:
        for recompute in (False, True):
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            setting = Setting(model, preset, batch, recompute, True, IMAGE[device], device,
                              STEP_SECONDS[device] / 3)
            row = {"model": model, "batch": batch, "recompute": recompute}
            try:
                row["ms"], row["gib"] = step_cost(setting)
            except RuntimeError as error:     # too little memory; the next row may fit
                row["failed"] = error_line(error)[:100]
            yield row


def transformers(device):
    """Two-stage Deformable DETR beside the package transformers, with float32 products in TF32;
    first the logits of both are compared in float32."""
    size, batch = ((800, 1199), 2) if device == "cuda" else ((192, 256), 1)
    theirs, ours = bench_transformers.make_models()
    inputs = random_batch(size, batch)
    passes = {"transformers": bench_transformers.their_passes(theirs, inputs, device),
              "ours": bench_transformers.our_passes(ours, inputs, device)}
    allow_tf32(False)
    images, padding, targets = inputs
    on_device = (images.to(device), padding.to(device), targets)
    difference = bench_transformers.compare_logits(theirs, ours, on_device)
    allow_tf32(True)
    for name, functions in passes.items():
        for what, function in functions.items():
            for dtype in ("float32", "bfloat16"):
                row = {"what": what, "dtype": dtype, "implementation": name,
                       "difference": difference}
                try:
                    call = partial(function, dtype == "bfloat16")
                    row["ms"] = median_ms(call, STEP_SECONDS[device] / 2)
                except Exception as error:        # the package, in half precision
                    row["failed"] = error_line(error)[:100] or type(error).__name__
                yield row


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products and convolutions on a GPU are rounded to TF32."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


# ---- parts ---------------------------------------------------------------------------------------

class Part(NamedTuple):
    rows: Callable        # of the device; yields rows
    seconds: int          # time limit


def all_parts() -> dict[str, Part]:
    """Name -> part, in the order in which they run."""
    parts = {"machine": Part(machine, 30), "correctness": Part(correctness, 150),
             "tests": Part(run_tests, 120)}
    for name, implementation in IMPLEMENTATIONS.items():
        limit = 60 if implementation.module else 40       # others may tune themselves first
        parts[f"kernel: {name}"] = Part(partial(kernel, name), limit)
    parts["timing"] = Part(timing, 20)
    for precision in PRECISIONS:
        parts[f"step: {precision}"] = Part(partial(training_step, precision, False), 40)
    parts["transformers"] = Part(transformers, 75)
    parts["memory"] = Part(memory, 75)
    for precision in reversed(PRECISIONS):
        step = partial(training_step, precision, True)
        parts[f"step: {precision}, compiled"] = Part(step, 110)
    return parts


PARTS = all_parts()


def not_installed(name) -> bool:
    if name == "transformers":
        return not bench_transformers.installed()
    return name.startswith("kernel: ") and not is_installed(name.removeprefix("kernel: "))


# ---- the command ---------------------------------------------------------------------------------

def gpu(device: Device = "cuda", minutes: float = 8.8, parts: tuple[str, ...] = tuple(PARTS),
        out: str = ""):
    """Measure everything that needs a GPU: one json, and the tables of it.

    Args:
        device: Where to run; cpu rehearses all of it with tiny shapes.
        minutes: No part runs beyond this.
        parts: Names of parts; all of them if left out.
        out: The json; runs/bench/gpu_DEVICE.json if left out.
    """
    unknown = [name for name in parts if name not in PARTS]
    if unknown:
        raise UserError(f"expected --parts out of {', '.join(PARTS)}, got {', '.join(unknown)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("expected a GPU, got none that PyTorch finds: --device cpu rehearses "
                        "everything with tiny shapes")
    path = Path(out or FOLDER / f"gpu_{device}.json")
    begin = time.monotonic()
    results = describe_run(device)
    for name in parts:
        left = 60 * minutes - (time.monotonic() - begin)
        results["parts"][name] = run_part(name, device, left)
        results["seconds"] = round(time.monotonic() - begin, 1)
        show_progress([name, results["parts"][name]["failed"] or "done"])
        write_json(path, results)
    text = tables(results)
    path.with_suffix(".md").write_text(text)
    print(f"{text}\nwritten to {path} and {path.with_suffix('.md')}")


def describe_run(device) -> dict:
    return {"date": str(datetime.date.today()), "device": device, "name": device_name(device),
            "torch": torch.__version__, "cuda": torch.version.cuda,
            "python": sys.version.split()[0], "seconds": 0.0, "parts": {}}


def run_part(name, device, left) -> dict:
    """Run a part in a process of its own. left: seconds until the time of all parts is up
    -> {"rows", "failed": why, or "", "seconds", "log": the end of what a failed part wrote}"""
    nothing = {"rows": [], "seconds": 0.0, "log": ""}
    if not_installed(name):
        return {**nothing, "failed": "not installed"}
    limit = min(PARTS[name].seconds * SLOWER[device], left)
    if limit < LEAST:
        return {**nothing, "failed": "not run: the time was up"}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        log = Path(folder) / "log.txt"
        with open(log, "w") as output:
            child = subprocess.Popen(child_command(name, device, rows), cwd=ROOT, stdout=output,
                                     stderr=output, start_new_session=True)
            failed = wait_for(child, limit)
        text = log.read_text(errors="replace") if failed else ""
        if failed.startswith("exit"):
            failed = last_line(text) or failed
        return {"rows": read_rows(rows), "failed": failed,
                "seconds": round(time.monotonic() - begin, 1), "log": text[-LOG_CHARACTERS:]}


def child_command(name, device, rows) -> list[str]:
    return [sys.executable, "-m", "tools.bench_gpu", name, device, str(rows)]


def wait_for(child, limit) -> str:
    """Wait for a process at most `limit` seconds, then end it and all that it started -> why it
    failed, or nothing."""
    try:
        code = child.wait(limit)
        if code < 0:
            return f"ended by signal {-code}"
        return f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        return f"ended after its limit of {limit:.0f} s"
    finally:
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        else:                    # Windows
            child.kill()
        child.wait()


def last_line(text) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:160] if lines else ""


def read_rows(path) -> list[dict]:
    """The complete lines of a file of rows."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def main(name, device, path) -> None:
    """Write the rows of one part to a file, each as soon as it is measured."""
    with open(path, "w") as file:
        for row in PARTS[name].rows(device):
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
