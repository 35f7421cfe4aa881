"""The place among processes is what torchrun writes, and nothing else. What one computes, all have.
"""
import warnings

import numpy as np
import pytest
import torch.distributed as dist

from engine.errors import UserError
from engine.processes import from_rank_0, own_place
from small_runs import forked


def test_without_torchrun_this_is_the_only_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert own_place() == (0, 1, 0, 1)


def test_the_place_is_that_of_torchrun(monkeypatch):
    for name, value in (("RANK", 3), ("WORLD_SIZE", 4), ("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", 2),
                        ("MASTER_ADDR", "localhost"), ("MASTER_PORT", 29500)):
        monkeypatch.setenv(name, str(value))
    assert own_place() == (3, 4, 1, 2)


@pytest.mark.parametrize("values, words", [
    ({"RANK": "1,2"}, "RANK: expected a number, got '1,2'"),
    ({"WORLD_SIZE": "-1"}, "WORLD_SIZE: expected a number"),
    ({"WORLD_SIZE": "9" * 20}, "WORLD_SIZE: expected a number"),
    ({"RANK": "1"}, "RANK from 0 to WORLD_SIZE - 1, got 1 of 1"),
    ({"LOCAL_WORLD_SIZE": "0"}, "expected LOCAL_RANK from 0 to LOCAL_WORLD_SIZE - 1, got 0 of 0"),
    ({"WORLD_SIZE": "0"}, "got 0 of 0"), ({"WORLD_SIZE": "2"}, "expected MASTER_ADDR")])
def test_values_that_torchrun_would_not_write_are_refused(monkeypatch, values, words):
    """A process that takes itself for the second of one trains and writes nothing."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                 "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        own_place()


def arrays():
    """Arrays of several kinds, some of which pickle would not leave out of its message."""
    grid = np.arange(12.0).reshape(3, 4)
    return {"float": grid, "transposed": grid.T, "part": grid[:, 1:3],
            "names": np.array(["a", "bc"]), "empty": np.zeros((0, 4)),
            "read-only": np.frombuffer(b"text", np.uint8), "number": 7,
            "nested": [np.arange(3), ("x", np.ones(2, bool))]}


def fail(error):
    raise error


def exchange(rank, folder):
    dist.init_process_group("gloo")
    calls = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = from_rank_0(lambda: calls.append(rank) or arrays())
    np.testing.assert_equal(value, arrays())
    if rank > 0:
        value["float"] += 1            # its own
    assert from_rank_0(lambda: None) is None
    assert calls == [0] * (rank == 0)

    with pytest.raises(UserError, match="^the json is broken$"):
        from_rank_0(lambda: fail(UserError("the json is broken")))
    kind = KeyError if rank == 0 else UserError
    with pytest.raises(kind, match="bbox") as caught:
        from_rank_0(lambda: fail(KeyError("bbox")))
    assert rank == 0 or str(caught.value).startswith("the first process of this run failed: KeyErr")


def test_what_the_first_process_computes_or_fails_at_reaches_all(tmp_path):
    assert forked(3, exchange, tmp_path, timeout=60) == [0, 0, 0]


def test_one_process_computes_for_itself():
    value = arrays()
    assert from_rank_0(lambda: value) is value
    with pytest.raises(KeyError):
        from_rank_0(lambda: fail(KeyError("bbox")))
