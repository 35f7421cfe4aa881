"""How figures are measured (the median of repeated calls) and the table they are written to."""
import datetime
import platform
import shlex
import statistics
import sys
from pathlib import Path
from typing import Literal

import torch
from torch.utils import benchmark

try:
    import resource
except ImportError:   # Windows
    resource = None

Device = Literal["cpu", "cuda"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FOLDER = Path("runs/bench")     # of the tables
WARM_UP = 3                     # replays of a CUDA graph that do not count


def median_ms(function, seconds=2.0):
    """Median time of one call, ms. Calls after a first one for `seconds`, at least once; on a GPU
    each measurement waits for the device."""
    threads = torch.get_num_threads()
    timer = benchmark.Timer("function()", globals={"function": function}, num_threads=threads)
    return 1e3 * timer.blocked_autorange(min_run_time=seconds).median


def alternating_ms(functions: dict, repeats: int) -> dict:
    """Median time of one call of each function, ms; see `alternating`."""
    return {name: times[0] for name, times in alternating(functions, repeats).items()}


def alternating(functions: dict, repeats: int, warm_up: int = 2) -> dict:
    """Median, shortest and longest time of one call of each function, ms. They take turns, so that
    their ratio is right on a busy machine too; the first `warm_up` turns do not count."""
    times = {name: [] for name in functions}
    for _ in range(repeats + warm_up):
        for name, function in functions.items():
            begin = benchmark.timer()
            function()
            times[name].append(1e3 * (benchmark.timer() - begin))
    counted = {name: values[warm_up:] for name, values in times.items()}
    return {name: (statistics.median(values), min(values), max(values))
            for name, values in counted.items()}


def each_ms(functions: list, device: Device, seconds=2.0) -> tuple[float, str]:
    """Median time of one of several calls that do the same on different inputs.

    On a GPU one CUDA graph holds all the calls: no gaps between launches, no Python. Functions that
    cannot be captured (they ask the device for a value, say) are called plainly instead, which
    includes their launches. -> ms, "graph" or "calls"
    """
    def call_all():
        for function in functions:
            function()

    graph = capture(call_all) if device == "cuda" else None
    if graph is None:
        return median_ms(call_all, seconds) / len(functions), "calls"
    for _ in range(WARM_UP):
        graph.replay()
    return median_ms(graph.replay, seconds) / len(functions), "graph"


def capture(function):
    """Record a function's kernels -> CUDAGraph, or None if the function cannot be captured."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def peak_gib(device: str = "cpu") -> float:
    """Largest memory until now, GiB: of PyTorch's allocator on a GPU, or of this process; nan on
    Windows, where Python does not know it."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    if resource is None:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024     # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


# ---- tables --------------------------------------------------------------------------------------

def device_name(device: Device) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    names.append(platform.processor())
    return f"{names[0]}, {torch.get_num_threads()} threads"


def write_table(name: str, device: Device, columns, rows, notes=()) -> str:
    """Print a table with its date, device, versions and command, and write it to
    runs/bench/NAME_DEVICE.md. -> its text"""
    command = shlex.join(["python", *sys.orig_argv[1:]])
    lines = [f"{datetime.date.today()}, {device_name(device)}, torch {torch.__version__}, "
             f"CUDA {torch.version.cuda}; `{command}`", ""]
    lines.append(table_row(columns))
    lines.append("|" + "---|" * len(columns))
    lines += [table_row(row) for row in rows]
    lines += ["", *notes]
    text = "\n".join(lines)
    path = FOLDER / f"{name}_{device}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    print(f"{text}\nwritten to {path}")
    return text


def table_row(cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def show_progress(cells) -> None:
    """Print a row as soon as it is measured; the table follows at the end."""
    print("  ".join(str(cell) for cell in cells), file=sys.stderr, flush=True)
