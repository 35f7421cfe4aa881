"""The machine of a run: device, processes, stop signals, and advice when memory runs out."""
import contextlib
import ctypes
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from engine.errors import UserError, error_line, is_out_of_memory
from engine.notices import notice_once
from engine.processes import gather, own_place

MAX_THREADS = 8              # by default; more help little at these sizes
BUSY_SECONDS = 0.5           # for which the load of the machine is measured
SAME_REQUEST_SECONDS = 2.0   # stop signals within this time are one request
QUIT_SECONDS = 1.0           # after a second request: time for the program to end by itself
# In what gloo and NCCL say about a process that is gone.
LOST_PEER = "(?i)closed by peer|reset by peer|broken pipe|timed out|remote process exited|NCCL"
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP")
                if hasattr(signal, name)]


# ---- device and processes ------------------------------------------------------------------------

@dataclass
class Machine:
    """The device of this process, and its rank among the processes of the run."""
    device: torch.device = torch.device("cpu")
    amp: bool = False            # bfloat16 autocast
    rank: int = 0
    world: int = 1               # number of processes
    local_rank: int = 0          # among the processes of this node
    threads: int = 1             # CPU threads of PyTorch
    workers: int = 0             # processes that read images

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line above the progress bar, once for all processes."""
        if self.is_main:
            tqdm.write(text)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    def share(self, count: int, signal: int) -> tuple[int, int]:
        """Sum of every rank's count, and largest of every rank's signal, in one message."""
        if self.world == 1:
            return count, signal
        mine = torch.tensor([count, signal])                  # on the CPU: gloo, no GPU wait
        ranks = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(ranks, mine)
        counts, signals = torch.stack(ranks).unbind(1)        # (world,) each
        return int(counts.sum()), int(signals.max())

    @contextlib.contextmanager
    def first_on_node(self):
        """Run a block on one process of each node, then on the others: what the first downloads or
        compiles, they find."""
        if self.world == 1:
            yield
            return
        if self.local_rank > 0:
            self._barrier()
        try:
            yield
        finally:     # after an error too: the others must not wait for ever
            if self.local_rank == 0:
                self._barrier()

    def _barrier(self):
        dist.all_reduce(torch.zeros(1))

    def gather(self, value) -> list:
        """Every rank's value, in the order of ranks."""
        return gather(value, self.world)

    @torch.no_grad()
    def average(self, tensors: list) -> None:
        """Replace float tensors by their mean over ranks, in one message."""
        tensors = [t for t in tensors if t.is_floating_point()]
        if self.world == 1 or not tensors:
            return
        mean = torch.cat([t.flatten() for t in tensors]) / self.world
        dist.all_reduce(mean)
        for tensor, part in zip(tensors, mean.split([t.numel() for t in tensors])):
            tensor.copy_(part.view_as(tensor))

    def distribute(self, model):
        """The model, wrapped so that gradients are averaged over ranks."""
        if self.world == 1:
            return model
        return DistributedDataParallel(model, broadcast_buffers=False)

    def seed_rank(self, seed: int) -> None:
        """Seed every generator, differently on every rank."""
        random.seed(seed + self.rank)
        np.random.seed(seed + self.rank)
        torch.manual_seed(seed + self.rank)


def set_up_machine(run) -> Machine:
    """Choose device, threads and workers of a run, and join its process group. Seed PyTorch with
    the same number on every rank, so that all of them build the same model."""
    rank, world, local_rank, _ = own_place()
    name = choose_device(run.device)
    device = torch.device(name)
    if name == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # matrix products in TF32, as the authors trained; eval.py computes them exactly
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        # gloo: counts and flags, from CPU to CPU; nccl: gradients, from GPU to GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")

    share = cores() // node_processes()
    # saved with the run: resumed under another load, it computes the same numbers
    run.threads = run.threads or omp_threads() or default_threads()
    threads = usable_threads(run)
    if not run.resume:
        run.threads = threads
    torch.set_num_threads(threads)
    workers = run.workers
    if workers < 0:
        workers = min(4, share // (2 if name == "cuda" else 4))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")   # for --deterministic on a GPU
    torch.use_deterministic_algorithms(run.deterministic)

    machine = Machine(device, bool(run.amp), rank, world, local_rank, threads, workers)
    if run.amp is None:
        machine.amp = multiplies_bfloat16(name)
    machine.seed_rank(run.seed)
    torch.manual_seed(run.seed)
    return machine


def choose_device(name: str) -> str:
    """Return a device by its name; "" stands for cuda if there is a GPU, else cpu. UserError for a
    device that PyTorch does not have here."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"expected --device cpu, cuda or mps, got {name!r}")
    kind, _, number = name.partition(":")
    there = {"cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}
    if not there[kind]:
        kind_of_gpu = "Apple GPU" if kind == "mps" else "GPU"
        raise UserError(f"--device {name}: PyTorch finds no {kind_of_gpu} here; leave the flag "
                        "out, or give --device cpu")
    if number and int(number) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: expected one of {torch.cuda.device_count()} GPUs, "
                        "counted from 0")
    if kind == "mps":
        notice_once("mps", "--device mps is untested: compare its results with --device cpu; if "
                           "PyTorch lacks an operator there, set PYTORCH_ENABLE_MPS_FALLBACK=1")
    return name


def multiplies_bfloat16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16; emulation would be slow."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


def cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def default_threads() -> int:
    """One thread for each core of this process that other programs leave idle, 1 to 8. A thread
    that has to wait for a core stops all others."""
    share = cores() // node_processes()
    busy = 0
    if node_processes() == 1:      # else the other processes of the run would be counted
        busy = round(busy_cores())
    threads = max(1, min(MAX_THREADS, share - busy))
    if busy:
        print(f"other programs keep {busy} of {cores()} cores busy: --threads {threads} is chosen, "
              "as more would wait for them")
    return threads


def usable_threads(run) -> int:
    """The threads of a run, but no more than there are cores here; says so. A resumed run may come
    from a larger machine: its `run.threads` stays, for a return to that machine."""
    if run.threads <= cores():
        return run.threads
    if own_place().rank == 0:
        rounding = ", and results may differ by rounding" if run.resume else ""
        print(f"notice: the run has --threads {run.threads}, this machine has {cores()} cores: "
              f"it uses {cores()} threads{rounding}")
    return cores()


def busy_cores() -> float:
    """How many of its cores other programs use now, measured for BUSY_SECONDS; 0 where the system
    does not say. Programs of low priority (nice) do not count: they give way."""
    before = busy_seconds()
    time.sleep(BUSY_SECONDS)
    return (busy_seconds() - before) / BUSY_SECONDS


def busy_seconds() -> float:
    """Time that the cores of this process have worked since the system started, seconds; 0 where
    the system does not say."""
    if sys.platform != "linux" or not os.path.exists("/proc/stat"):
        return 0.0
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *times = line.split()
        if name in mine:
            user, _, system = times[:3]
            ticks += int(user) + int(system)
    return ticks / os.sysconf("SC_CLK_TCK")


def node_processes() -> int:
    """Processes of the run on this node, which share its cores."""
    return own_place().local_world


def omp_threads() -> int:
    """The number of threads in OMP_NUM_THREADS, 0 when it is not set."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    first = text.split(",")[0].strip() or "0"   # OpenMP allows a list: one per nesting level
    if not first.isdecimal():
        raise UserError(f"OMP_NUM_THREADS: expected a number, got {text!r}; unset it, or give "
                        "--threads")
    return int(first)


def prepare_cpu() -> None:
    """Halve the time of an image on a CPU by two settings of the whole process. Results change by
    rounding only."""
    # glibc returns the memory of large tensors to the system after each use, and new memory has
    # to be zeroed: let it hold the memory instead
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)         # M_MMAP_MAX: no block is mapped on its own
        libc.mallopt(-1, -1)        # M_TRIM_THRESHOLD: no memory is returned
    # On AMD, oneDNN multiplies float32 matrices twice as fast as MKL. PyTorch (2.9 or newer)
    # chooses oneDNN when bfloat16 is allowed inside float32 products. Only AMX units then really
    # use bfloat16, so machines with AMX are left as they are.
    if hasattr(torch.backends.mkldnn, "matmul") and not torch.cpu._is_amx_tile_supported():
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"


# ---- signals -------------------------------------------------------------------------------------

class SecondRequest:
    """Recognize a second request to stop: a signal SAME_REQUEST_SECONDS or more after the first."""

    def __init__(self):
        self.first = None

    def received(self) -> bool:
        """Register a signal. -> whether it is a second request"""
        now = time.monotonic()
        if self.first is None:
            self.first = now
            return False
        return now >= self.first + SAME_REQUEST_SECONDS


class StopSignals:
    """Turn SIGTERM, SIGINT and SIGHUP into a request to save and stop after this step.

    `signal` is the number of the first signal, 0 for none. A second request quits at once.
    Schedulers signal every process and torchrun passes signals on, so all signals within
    SAME_REQUEST_SECONDS are one request. A thread watches the signals too, because Python runs no
    handler while the main thread waits for a rank that does not answer."""

    def __init__(self):
        self.signal = 0
        self.all_saved = False    # if true, the first signal quits
        self.active = False

    def __enter__(self):
        self.handlers = {}
        for number in STOP_SIGNALS:
            ignored = signal.getsignal(number) is signal.SIG_IGN
            if ignored and number != signal.SIGINT:   # started with nohup
                continue
            self.handlers[number] = signal.signal(number, self._handle)
        self.handled = SecondRequest()    # of the handler
        self.watched = SecondRequest()    # of the thread
        self.active = True
        reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.wakeup = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.active = False
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.writer.close()   # ends the thread

    def _handle(self, number, frame):
        self.signal = self.signal or number
        if self.handled.received() or self.all_saved:
            sys.exit(128 + number)

    def _watch(self, reader):
        """Quit if the main thread does not get to run its handler."""
        with reader:
            while True:
                number = reader.recv(1)
                if not number:
                    return
                if number[0] in self.handlers and (self.watched.received() or self.all_saved):
                    time.sleep(QUIT_SECONDS)
                    if self.active:
                        os.write(2, b"\nstopped by a signal: quits without saving\n")
                        os._exit(128 + number[0])

    @contextlib.contextmanager
    def nothing_to_save(self):
        """Inside this block everything is saved already: the first signal quits at once."""
        self.all_saved = True
        if self.signal:
            sys.exit(128 + self.signal)
        yield
        self.all_saved = False


# ---- out of memory -------------------------------------------------------------------------------

@contextlib.contextmanager
def memory_advice(run, recipe):
    """Turn running out of memory into a UserError that names the flag to try next. Flags that leave
    the results as they are come first."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(next_flag(error, run, recipe)) from error


def next_flag(error, run, recipe) -> str:
    """The message: what to try next, and how to continue."""
    last = os.path.join(run.out, "last.pt")
    parts = 2 * run.accum * int(os.environ.get("WORLD_SIZE", 1))
    saved = os.path.exists(last)
    if not run.recompute:
        flag = "--recompute"
    elif run.amp is False and torch.cuda.is_available():
        flag = "--amp true"
    elif recipe.batch_size % parts == 0:
        flag = f"--accum {2 * run.accum}"
    else:
        start = f" --init {last} --out DIR" if saved else ""
        smaller = f"--max_size {recipe.max_size // 2}"
        if recipe.augment == "lsj":
            smaller = f"--lsj_size {recipe.lsj_size // 2}"
        return f"out of memory ({error}). Try smaller images in a new run: {smaller}{start}"
    state = (f"{last} is complete: add --resume to continue from there" if saved
             else "nothing was saved yet")
    return f"out of memory ({error}). Try {flag}; {state}"


@contextlib.contextmanager
def lost_peers(remedy: str):
    """Turn the error of a message to a process that is gone into a UserError. remedy: what to do
    then, the end of its message."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(LOST_PEER, str(error)):
            raise
        raise UserError(
            "another process of this run has ended or does not answer; the first error among those "
            f"of all processes says why ({error_line(error)[:200]}). {remedy}") from error
