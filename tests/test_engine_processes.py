"""The place among processes is what torchrun writes, and nothing else."""
import pytest

from engine.errors import UserError
from engine.processes import own_place


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
