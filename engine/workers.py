"""Worker processes that read images: how many, how they start, fail and end."""
import atexit
import gc
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

from engine.errors import UserError
from engine.notices import notice_once, one_line
from engine.processes import own_place

TIMEOUT = 600   # seconds to wait for a batch
# bytes of the folder for temporary files: workers hand over batches through sockets in it, whose
# names have 32 more and may have 107
LONGEST_FOLDER = 75


def affordable_workers(workers: int, batch_bytes: int) -> int:
    """Return how many workers can hand over their batches, at most `workers`.

    They lie in /dev/shm, of each worker up to two at a time, and the training process holds one
    more. A worker that finds it full never answers; containers often have only 64 MB. Nor does a
    worker whose sockets would have too long a name.
    """
    folder = tempfile.gettempdir()
    if workers and len(os.fsencode(folder)) > LONGEST_FOLDER:
        notice_once("temporary files", (
            f"the folder for temporary files, {one_line(folder)}, has too long a name for the "
            "sockets of workers: the training process reads the images (set TMPDIR=/tmp)"))
        return 0
    if not os.path.isdir("/dev/shm"):
        return workers
    processes = own_place().local_world
    free = shutil.disk_usage("/dev/shm").free / processes
    affordable = int((free / batch_bytes - 1) / 2)   # solves free = needed, below
    if affordable >= workers:
        return workers
    affordable = max(affordable, 0)
    needed = (2 * workers + 1) * batch_bytes
    instead = f"{affordable} are used" if affordable else "the training process reads the images"
    notice_once("shared memory", (
        f"/dev/shm has {free / 1e6:.0f} MB free, {workers} workers need up to "
        f"{needed / 1e6:.0f} MB: {instead} (a container gets more with --shm-size or --ipc=host)"))
    return affordable


def one_line_errors(loader) -> Iterator:
    """Iterate over a DataLoader. Raises a one-line UserError if workers fail or do not answer."""
    try:
        yield from loader
    except UserError as error:
        # A worker's error comes with its traceback as text; the message is its last line.
        raise UserError(str(error).rsplit("UserError: ")[-1].strip()) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader"):
            raise
        raise UserError(
            f"expected a batch from {loader.num_workers} workers, got: {one_line(str(error))}; "
            "slow storage or too little memory (df -h /dev/shm): try fewer --workers; with 0 the "
            "training process reads the images") from None


def start_worker(number: int) -> None:
    """Prepare a worker process.

    It ignores the signals that Ctrl-C, schedulers and torchrun send to the whole process group. The
    training process still needs its workers to finish a step and save; it ends them itself.
    The garbage collector passes over inherited objects: visiting them would copy their memory.
    """
    gc.freeze()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """Kill workers left over from an interrupted loop.

    They ignore SIGTERM, so Python would wait for them forever at exit.
    """
    left = [process for process in multiprocessing.active_children() if process.daemon]
    if left and hasattr(signal, "SIGCHLD"):
        # PyTorch's handler would report their deaths as an error.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in left:
        process.kill()
