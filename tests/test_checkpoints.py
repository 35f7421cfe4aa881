"""Files that are whole or absent, never run code, and carry the authors' names back and forth."""
import argparse
import collections
import contextlib
import functools
import importlib
import itertools
import json
import multiprocessing
import operator
import os
import pickle
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine import checkpoints

# ---- files

class Calls:
    """Pickled as the order to call something when it is read."""
    def __init__(self, function, *arguments):
        self.order = function, arguments

    def __reduce__(self):
        return self.order


def test_pickle_refused(tmp_path):
    """A checkpoint that wants to run code is refused by name, in torch's format and as a bare pickle, and runs nothing."""
    trap = tmp_path / "trap"
    order = Calls(os.mkdir, str(trap))
    torch.save({"model": {}, "args": order}, tmp_path / "zip.pt")
    torch.save({"model": {}, "args": order}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"args": order}, protocol=2))
    for name in ("zip.pt", "old.pt", "bare.pt"):
        with pytest.raises(ValueError, match="tensors and plain types only.*mkdir"):
            checkpoints.load(tmp_path / name)
    (tmp_path / "new.pt").write_bytes(pickle.dumps({"args": order}, protocol=4))
    with pytest.raises(ValueError, match="protocol 3 or later"), pytest.warns(UserWarning, match="protocol 4"):
        checkpoints.load(tmp_path / "new.pt")
    assert not trap.exists()


@pytest.mark.parametrize("name, order", {
    "functools.partial": functools.partial(os.mkdir, "trap"), "eval": Calls(eval, "1"), "exec": Calls(exec, "1"),
    "__import__": Calls(__import__, "os"), "getattr": Calls(getattr, "os", "system"),
    "operator.attrgetter": operator.attrgetter("system"), "posix.mkdir": Calls(os.mkdir, "trap"),
    "numpy": Calls(np.load, "trap")}.items())
def test_orders_inside_options_are_refused_by_name(tmp_path, name, order):
    """The classes that options may hold open no way for others: not in a namespace, nor as an argument of an allowed one."""
    for options in (argparse.Namespace(lr=[{"drop": order}]), Calls(argparse.Namespace, order),
                    collections.OrderedDict(a=Calls(np.dtype, order))):
        torch.save({"model": {}, "args": options}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=f"asks for {name}"):
            checkpoints.load(tmp_path / "a.pt")


def test_options_with_numbers_of_numpy_and_paths_are_read(tmp_path):
    options = argparse.Namespace(lr=np.float64(1e-4), epochs=np.int64(50), amp=np.bool_(True), output_dir=Path("a/b"))
    torch.save({"model": {}, "args": options}, tmp_path / "a.pt")
    read = checkpoints.load(tmp_path / "a.pt")["args"]
    assert (read.lr, read.epochs, read.amp, str(read.output_dir)) == (1e-4, 50, True, "a/b")


def safetensors(path, **tensors):
    """Writes the format by its description: length of the header, header, numbers."""
    header, numbers = {"__metadata__": {"format": "pt"}}, b""
    for name, (kind, tensor) in tensors.items():
        data = tensor.view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(numbers), len(numbers) + len(data)]}
        numbers += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)


def test_safetensors_are_read_without_their_package(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"a": ("F16", torch.rand(3, dtype=torch.float16)), "b": ("F32", torch.rand(2, 5)),
               "c": ("I64", torch.arange(6).view(2, 3)), "d": ("BF16", torch.rand(1, 1, dtype=torch.bfloat16))}
    safetensors(path, **tensors)
    read = checkpoints.load(path)
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensor) for name, (_, tensor) in tensors.items())
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:20], b"", whole[:8] + b"[1]" + whole[11:], whole.replace(b"BF16", b"F8_4")):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="broken or cut short"):
            checkpoints.load(path)


def test_broken_missing_and_foreign_files_are_told_apart(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(UserError, match="found no file"):
        checkpoints.load(path)
    checkpoints.save(path, {"a": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="cut short"):
        checkpoints.load(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="expected a dictionary, got list"):
        checkpoints.load(path)
    for other in (b"", b"# a text\n"):
        path.write_bytes(other)
        with pytest.raises(ValueError, match="another kind"):
            checkpoints.load(path)


def test_an_error_while_saving_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    checkpoints.save(path, {"step": 1})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoints.save(path, {"step": lambda: 2})
    assert checkpoints.load(path) == {"step": 1}


def test_newest_falls_back_and_says_so(tmp_path, capsys):
    with pytest.raises(UserError, match="nothing to resume.*without --resume"):
        checkpoints.newest(tmp_path)
    last = tmp_path / "last.pt"
    for step in (1, 2):
        checkpoints.save(last, {"step": step}, keep_previous=True)
    assert checkpoints.newest(tmp_path) == last and checkpoints.load(last)["step"] == 2
    last.write_bytes(b"not whole")
    found = checkpoints.newest(tmp_path)
    assert found.name == "last.pt.prev" and checkpoints.load(found)["step"] == 1
    assert "last.pt.prev, for" in capsys.readouterr().out


def test_a_config_of_another_version_is_refused_by_field():
    with pytest.raises(ValueError, match="dino.Config.*wings"):
        checkpoints.settings(importlib.import_module("dino"), {"config": {"wings": 2}})


def save_for_ever(path, reports):
    torch.set_num_threads(1)   # those of the process it was forked from are not here
    for step in itertools.count(1):
        checkpoints.save(path, {"step": step, "weights": torch.full((300_000,), float(step))}, keep_previous=True)
        reports.send(step)


@pytest.mark.parametrize("kills", (3, pytest.param(200, marks=pytest.mark.slow)))
def test_kill_during_save(tmp_path, kills):
    """A process that only saves, killed at random moments: what it reported as saved, or newer, loads whole."""
    rng = random.Random(0)
    for attempt in range(kills):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        receive, send = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(folder / "last.pt", send))
        process.start()
        send.close()
        reported = receive.recv()
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                reported = receive.recv()
        state = checkpoints.load(checkpoints.newest(folder))
        assert state["step"] >= reported - 1 and (state["weights"] == state["step"]).all()
