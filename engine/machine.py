"""The machine of a run: device, processes, signals, and errors that a user can mend."""
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

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from engine.errors import UserError

SAME_REQUEST_SECONDS = 2.0   # several stop signals within this time are one request
QUIT_SECONDS = 1.0           # what a second request leaves the program to end in an orderly way
# In what gloo and NCCL say about a process that is gone.
LOST_PEER = "(?i)closed by peer|reset by peer|broken pipe|timed out|remote process exited|NCCL"
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP")
                if hasattr(signal, name)]


# ---- device and processes ------------------------------------------------------------------------

@dataclass
class Machine:
    """The device of this process, and its place among the processes of the run."""
    device: torch.device = torch.device("cpu")
    amp: bool = False            # bfloat16 autocast
    rank: int = 0
    world: int = 1               # number of processes
    local_rank: int = 0          # among the processes of this node
    threads: int = 1             # of PyTorch on the CPU
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
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

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
    """Choose device, threads and workers of a run, join its process group, and seed PyTorch alike
    on every rank, so that all of them build the same model."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    name = run.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no GPU here; leave the flag out, or give "
                            "--device cpu")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # matrix products in TF32, as the authors trained; eval.py computes them exactly
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        # gloo carries counts and flags from host to host, nccl the gradients
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")

    share = cores() // node_processes()
    threads = run.threads or omp_threads() or max(1, min(8, share))
    torch.set_num_threads(threads)
    workers = run.workers
    if workers < 0:
        workers = min(4, share // (2 if name == "cuda" else 4))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")   # for --deterministic on a GPU
    torch.use_deterministic_algorithms(run.deterministic)

    machine = Machine(device, bool(run.amp), rank, world, local_rank, threads, workers)
    if run.amp is None:   # where the hardware multiplies bfloat16, not where it is emulated
        machine.amp = (torch.cuda.is_bf16_supported(False) if name == "cuda"
                       else torch.cpu._is_avx512_bf16_supported())
    machine.seed_rank(run.seed)
    torch.manual_seed(run.seed)
    return machine


def cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def node_processes() -> int:
    """Processes of the run on this node, which share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))


def omp_threads() -> int:
    """Threads that OMP_NUM_THREADS asks for, 0 when it is not set."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    first = text.split(",")[0].strip() or "0"   # OpenMP allows one number a nesting level
    if not first.isdecimal():
        raise UserError(f"OMP_NUM_THREADS: expected a number, got {text!r}; unset it, or give "
                        "--threads")
    return int(first)


def prepare_cpu() -> None:
    """Set two things for the whole process that halve the time of an image on a CPU and change no
    result beyond rounding."""
    # glibc returns large tensors to the system after each use and has them zeroed again: keep them
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)         # M_MMAP_MAX: no block is mapped on its own
        libc.mallopt(-1, -1)        # M_TRIM_THRESHOLD: no memory is returned
    # float32 products by oneDNN are twice as fast as MKL's on AMD. PyTorch takes that way when
    # bfloat16 sums are allowed, which only AMX units use: machines with AMX are left alone.
    # Since PyTorch 2.9.
    if hasattr(torch.backends.mkldnn, "matmul") and not torch.cpu._is_amx_tile_supported():
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"


# ---- signals -------------------------------------------------------------------------------------

class Requests:
    """Tells a second request to stop from an echo of the first."""

    def __init__(self):
        self.first = None

    def again(self) -> bool:
        now = time.monotonic()
        if self.first is None:
            self.first = now
            return False
        return now >= self.first + SAME_REQUEST_SECONDS


class StopSignals:
    """Turn SIGTERM, SIGINT and SIGHUP into a request to save and stop after this step.

    `signal` is the number of the request, 0 for none. A second request quits at once. Schedulers
    signal every process and torchrun passes it on, so what follows within SAME_REQUEST_SECONDS is
    the same request. A thread watches the signals too: while the main thread waits for a peer that
    does not answer, Python runs no handlers."""

    def __init__(self):
        self.signal = 0
        self.all_saved = False    # the first signal quits
        self.active = False

    def __enter__(self):
        self.handlers = {}
        for number in STOP_SIGNALS:
            ignored = signal.getsignal(number) is signal.SIG_IGN
            if ignored and number != signal.SIGINT:   # nohup
                continue
            self.handlers[number] = signal.signal(number, self._handle)
        self.handled, self.watched = Requests(), Requests()
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
        if self.handled.again() or self.all_saved:
            sys.exit(128 + number)

    def _watch(self, reader):
        """Quit on behalf of a main thread that does not get to run its handler."""
        with reader:
            while True:
                number = reader.recv(1)
                if not number:
                    return
                if number[0] in self.handlers and (self.watched.again() or self.all_saved):
                    time.sleep(QUIT_SECONDS)
                    if self.active:
                        os.write(2, b"\nasked again to stop: quits without saving\n")
                        os._exit(128 + number[0])

    @contextlib.contextmanager
    def immediately(self):
        """Everything is saved here: the first signal quits."""
        self.all_saved = True
        if self.signal:
            sys.exit(128 + self.signal)
        yield
        self.all_saved = False


# ---- errors --------------------------------------------------------------------------------------

@contextlib.contextmanager
def user_errors(program: str):
    """End the program with one line for what a user can mend: a UserError, a training run that
    diverged, a full disk. All other exceptions keep their traceback."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)   # a closed pipe is noticed at the next line
    try:
        yield
    except BrokenPipeError:   # train.py | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except (UserError, FloatingPointError) as error:
        sys.exit(f"{program}: error: {one_line(error)}")
    except OSError as error:
        if error.errno is None or error.strerror is None:
            raise
        where = f": {error.filename}" if error.filename else ""
        sys.exit(f"{program}: error: {error.strerror}{where}")


def one_line(error: Exception) -> str:
    """The message of an error without line breaks and control characters."""
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else "?" for c in text)


@contextlib.contextmanager
def memory_advice(run, recipe):
    """Turn running out of memory into a UserError that names the flag to try next: first what
    leaves every result as it is."""
    try:
        yield
    except RuntimeError as error:
        full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not full:
            raise
        raise UserError(next_flag(error, run, recipe)) from error


def next_flag(error, run, recipe) -> str:
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
        return (f"out of memory ({error}). Try smaller images in a new run: "
                f"--max_size {recipe.max_size // 2}{start}")
    state = (f"{last} is complete: add --resume to continue from there" if saved
             else "nothing was saved yet")
    return f"out of memory ({error}). Try {flag}; {state}"


@contextlib.contextmanager
def lost_peers(run):
    """Turn the error of a message to a process that is gone into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(LOST_PEER, str(error)):
            raise
        raise UserError(
            "another process of this run has ended or does not answer; the first error among those "
            f"of all processes says why ({one_line(error)[:200]}). Continue with --resume --out "
            f"{run.out}") from error
