"""The place of this process among those that torchrun starts."""
import os
from typing import NamedTuple

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
