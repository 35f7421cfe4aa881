"""The place of this process among those that torchrun starts, and what they send each other."""
import os
import pickle
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from engine.errors import UserError


class Place(NamedTuple):
    """What torchrun says in the environment; without torchrun, the only process."""
    rank: int          # number of this process
    world: int         # number of processes
    local_rank: int    # number of this process on its machine
    local_world: int   # number of processes on its machine


def own_place() -> Place:
    """Read the environment. UserError for what torchrun does not write: another program may have
    left it there, and a process that takes itself for the second writes nothing."""
    world = number("WORLD_SIZE", 1)
    place = Place(number("RANK", 0), world, number("LOCAL_RANK", 0),
                  number("LOCAL_WORLD_SIZE", world))
    for kind, rank, world in (("", place.rank, place.world),
                              ("LOCAL_", place.local_rank, place.local_world)):
        if rank >= world:
            raise UserError(f"expected {kind}RANK from 0 to {kind}WORLD_SIZE - 1, got {rank} of "
                            f"{world}: unset both, or start with torchrun")
    if place.world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(f"expected MASTER_ADDR and MASTER_PORT beside WORLD_SIZE {place.world}, "
                        "got none: unset WORLD_SIZE, or start with torchrun")
    return place


def number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or len(text) > 6:
        raise UserError(f"{name}: expected a number, got {text!r}; unset it, or start with "
                        "torchrun")
    return int(text)


# ---- messages ------------------------------------------------------------------------------------

def gather(value, world: int) -> list:
    """Return this value of every rank, in the order of ranks."""
    if world == 1:
        return [value]
    values = [None] * world
    dist.all_gather_object(values, value)
    return values


def from_rank_0(make: Callable) -> Any:
    """Return on every rank what `make()` returns on rank 0: only that rank calls it.

    For what takes long or much memory, such as reading annotations. NumPy arrays travel by
    themselves, without a copy for the message; each rank has its own afterwards. With one process
    this is `make()`.

    Every rank has to call this. An error of `make` ends all of them: a UserError is raised on every
    rank, another exception on rank 0, with a UserError on the others. They wait as long as the
    process group allows (30 minutes), or until the connection to rank 0 is closed.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return make()
    if dist.get_rank() > 0:
        return receive()
    value = None
    failure = None
    buffers = []
    try:
        value = make()
        content = pickle.dumps((value, ""), protocol=5, buffer_callback=buffers.append)
    except Exception as error:     # whatever it is: the others wait for an answer
        failure = error
        buffers = []
        content = pickle.dumps((None, reason_of(error)))
    send(content, buffers)
    if failure is not None:
        raise failure
    return value


def reason_of(failure: Exception) -> str:
    """What the other ranks say when rank 0 fails."""
    reason = str(failure) or type(failure).__name__
    if isinstance(failure, UserError):
        return reason
    return f"the first process of this run failed: {type(failure).__name__}: {reason}"


def send(content: bytes, buffers: list) -> None:
    """Send a pickled value and its reason, and the arrays that belong to it, to all other ranks."""
    arrays = [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
    dist.broadcast_object_list([content, [len(array) for array in arrays]], 0)
    for array in arrays:
        with warnings.catch_warnings():     # of a read-only array, which is only read here
            warnings.simplefilter("ignore")
            part = torch.from_numpy(array)
        if len(part):
            dist.broadcast(part, 0)


def receive():
    """Return what rank 0 sends. UserError where it says why there is nothing."""
    message = [None, None]
    dist.broadcast_object_list(message, 0)
    content, lengths = message
    arrays = []
    for length in lengths:
        part = torch.empty(length, dtype=torch.uint8)
        if length:
            dist.broadcast(part, 0)
        arrays.append(part.numpy())
    value, reason = pickle.loads(content, buffers=arrays)
    if reason:
        raise UserError(reason)
    return value
