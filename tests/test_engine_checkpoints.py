"""Files that are complete or absent, never run code, and are checked; the run folder."""

import errno
import math
import resource

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
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import checkpoints
from engine.errors import UserError
import train
from small_runs import (at_step, cheap_runs, coco_folder, config, FLAGS,  # noqa: F401
                        forked, run, same, start_ranks)

KILLS = int(os.environ.get("PAPERDETR_KILLS", 200))  # of the slow test


RANDOMLY_KILLED = [*FLAGS, "--model=dino", "--num_train=8", "--accum=2", "--save_every=1"]


@pytest.mark.parametrize("kills", (3, pytest.param(KILLS, marks=pytest.mark.slow)))
def test_killed_at_random_moments(tmp_path, kills):
    """A process killed by SIGKILL again and again, while it starts, trains, saves or evaluates:
    every resume succeeds, and the end has the bytes, and the log the lines, of a run left alone.
    """
    count = kill_at_random(tmp_path, kills, 1)
    print(f"{count['kills']} kills, {count['resumes']} of resumed runs, "
          f"{count['torn']} within a save")


@pytest.mark.slow
def test_two_ranks_killed_at_random_moments(tmp_path):
    """As above, for one rank of two, or both. The other one ends by itself, at the latest when it
    gets the SIGTERM that torchrun sends."""
    count = kill_at_random(tmp_path, KILLS // 4, 2)
    print(f"{count['kills']} kills of ranks of two, {count['resumes']} of resumed runs, "
          f"{count['torn']} within a save, {count['survivors']} ended after the other rank's death")


def kill_at_random(folder, kills, world):
    """Start a run of `world` ranks, kill ranks after random times, and resume, until `kills` kills
    were made and the run has ended. Whenever it ends, compare it with a run left alone."""
    rng = random.Random(0)
    out = folder / "run"
    count = collections.Counter()

    def begin(rank, out, *more):
        train.main([*RANDOMLY_KILLED, *more, "--out", str(out)])

    start = time.time()
    assert forked(world, begin, folder / "whole") == [0] * world
    seconds = time.time() - start
    while count["kills"] < kills or out.exists():
        saved = any((out / name).exists() for name in ("last.pt", "last.pt.prev"))
        processes = start_ranks(world, begin, out, *["--resume"] * saved)
        undisturbed = count["kills"] >= kills
        end = time.time() + (240 if undisturbed else rng.uniform(0, seconds))
        for process in processes:
            process.join(max(0, end - time.time()))
        alive = [process for process in processes if process.is_alive()]
        assert not (alive and undisturbed)
        if alive:
            kill_some(rng, alive, count)
            count["kills"] += 1
            count["resumes"] += saved
            count["torn"] += len(list(out.glob("last.pt.*.tmp")))
            continue
        assert [process.exitcode for process in processes] == [0] * world
        for name in ("last.pt", "best.pt"):
            same(checkpoints.load(folder / "whole" / name), checkpoints.load(out / name))
        assert log_lines(out) == log_lines(folder / "whole")
        shutil.rmtree(out)
    return count


def kill_some(rng, processes, count):
    """Kill one of the processes or all, and wait for the others, which torchrun would tell."""
    victims = rng.choice([processes, *([process] for process in processes)])
    for process in victims:
        process.kill()
    for process in processes:
        if process not in victims:
            time.sleep(rng.uniform(0, 0.5))
            process.terminate()
            process.join(60)
            assert not process.is_alive(), "it waits for a rank that was killed"
            count["survivors"] += 1
        process.join()


def log_lines(folder):
    """Step, loss and AP of every line."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(line["step"], line.get("loss"), line.get("AP")) for line in lines]


def test_a_folder_without_a_checkpoint_can_be_started_again(tmp_path, monkeypatch):
    """A run that ended before its first save leaves nothing worth protecting."""
    cfg = config("deformable_detr", epochs=1)
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(run(tmp_path), *cfg)
    assert (tmp_path / "run" / "config.json").exists()
    assert train.train(run(tmp_path), *cfg)["step"] == 3


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    train.train(run(tmp_path), *config("deformable_detr", epochs=1))
    with pytest.raises(ValueError, match="--resume.*--out"):
        train.train(run(tmp_path), *config("deformable_detr", epochs=1))


class Calls:
    """Pickled as the order to call something when it is read."""

    def __init__(self, function, *arguments):
        self.order = function, arguments

    def __reduce__(self):
        return self.order


def test_pickle_refused(tmp_path):
    """A checkpoint that wants to run code is refused by name, in torch's format and as a bare
    pickle, and runs nothing."""
    trap = tmp_path / "trap"
    order = Calls(os.mkdir, str(trap))
    torch.save({"model": {}, "args": order}, tmp_path / "zip.pt")
    torch.save(
        {"model": {}, "args": order}, tmp_path / "old.pt", _use_new_zipfile_serialization=False
    )
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"args": order}, protocol=2))
    for name in ("zip.pt", "old.pt", "bare.pt"):
        with pytest.raises(ValueError, match="tensors and plain types only.*mkdir"):
            checkpoints.load(tmp_path / name)
    (tmp_path / "new.pt").write_bytes(pickle.dumps({"args": order}, protocol=4))
    with pytest.raises(ValueError, match="protocol 3 or later"), pytest.warns(
        UserWarning, match="protocol 4"
    ):
        checkpoints.load(tmp_path / "new.pt")
    assert not trap.exists()


@pytest.mark.parametrize(
    "name, order",
    {
        "functools.partial": functools.partial(os.mkdir, "trap"),
        "eval": Calls(eval, "1"),
        "exec": Calls(exec, "1"),
        "__import__": Calls(__import__, "os"),
        "getattr": Calls(getattr, "os", "system"),
        "operator.attrgetter": operator.attrgetter("system"),
        "posix.mkdir": Calls(os.mkdir, "trap"),
        "numpy": Calls(np.load, "trap"),
    }.items(),
)
def test_orders_inside_options_are_refused_by_name(tmp_path, name, order):
    """The classes that options may hold open no way for others: not in a namespace, nor as an
    argument of an allowed one."""
    for options in (
        argparse.Namespace(lr=[{"drop": order}]),
        Calls(argparse.Namespace, order),
        collections.OrderedDict(a=Calls(np.dtype, order)),
    ):
        torch.save({"model": {}, "args": options}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=f"asks for {name}"):
            checkpoints.load(tmp_path / "a.pt")


def test_options_with_numbers_of_numpy_and_paths_are_read(tmp_path):
    options = argparse.Namespace(
        lr=np.float64(1e-4), epochs=np.int64(50), amp=np.bool_(True), output_dir=Path("a/b")
    )
    torch.save({"model": {}, "args": options}, tmp_path / "a.pt")
    read = checkpoints.load(tmp_path / "a.pt")["args"]
    assert (read.lr, read.epochs, read.amp, str(read.output_dir)) == (1e-4, 50, True, "a/b")


def safetensors(path, **tensors):
    """Writes the format by its description: length of the header, header, numbers."""
    header, numbers = {"__metadata__": {"format": "pt"}}, b""
    for name, (kind, tensor) in tensors.items():
        data = tensor.view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [len(numbers), len(numbers) + len(data)],
        }
        numbers += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)


def test_safetensors_are_read_without_their_package(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {
        "a": ("F16", torch.rand(3, dtype=torch.float16)),
        "b": ("F32", torch.rand(2, 5)),
        "c": ("I64", torch.arange(6).view(2, 3)),
        "d": ("BF16", torch.rand(1, 1, dtype=torch.bfloat16)),
    }
    safetensors(path, **tensors)
    read = checkpoints.load(path)
    assert read.keys() == tensors.keys() and all(
        torch.equal(read[name], tensor) for name, (_, tensor) in tensors.items()
    )
    whole = path.read_bytes()
    for broken in (
        whole[:-1],
        whole[:20],
        b"",
        whole[:8] + b"[1]" + whole[11:],
        whole.replace(b"BF16", b"F8_4"),
    ):
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
    assert checkpoints.newest(tmp_path) == (last, {"step": 2})
    last.write_bytes(b"not whole")
    assert checkpoints.newest(tmp_path) == (tmp_path / "last.pt.prev", {"step": 1})
    assert "last.pt.prev, for" in capsys.readouterr().out


def test_a_config_of_another_version_is_refused_by_field():
    with pytest.raises(ValueError, match="dino.Config.*wings"):
        checkpoints.settings(importlib.import_module("dino"), {"config": {"wings": 2}})


def save_for_ever(path, reports):
    torch.set_num_threads(1)  # those of the process it was forked from are not here
    for step in itertools.count(1):
        checkpoints.save(
            path, {"step": step, "weights": torch.full((300_000,), float(step))}, keep_previous=True
        )
        reports.send(step)


@pytest.mark.parametrize("kills", (3, pytest.param(200, marks=pytest.mark.slow)))
def test_kill_during_save(tmp_path, kills):
    """A process that only saves, killed at random moments: what it reported as saved, or newer,
    loads whole."""
    rng = random.Random(0)
    for attempt in range(kills):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        receive, send = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(
            target=save_for_ever, args=(folder / "last.pt", send)
        )
        process.start()
        send.close()
        reported = receive.recv()
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                reported = receive.recv()
        _, state = checkpoints.newest(folder)
        assert state["step"] >= reported - 1 and (state["weights"] == state["step"]).all()


# ---- faults of disks and of other processes


@pytest.mark.parametrize("where", (0.3, 0.6, 0.9))
def test_a_flipped_byte_is_noticed_and_the_previous_file_is_used(tmp_path, capsys, where):
    last = tmp_path / "last.pt"
    for step in (1, 2):
        state = dict(model_name="dino", config={}, class_names=[], category_ids=[], step=step)
        weights = {"a": torch.randn(20_000), "b": torch.arange(5000)}
        checkpoints.save(last, state | {"model": weights}, keep_previous=True)
    content = bytearray(last.read_bytes())
    content[int(where * len(content))] ^= 4
    last.write_bytes(content)
    with pytest.raises(UserError, match="broken: the checksum of archive/data/. is wrong"):
        checkpoints.load(last)
    _, state = checkpoints.newest(tmp_path)
    assert state["step"] == 1


def limited_save(rank, path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        checkpoints.save(path, {"a": torch.zeros(100_000)})
    except UserError as error:
        os._exit(7 if "what was saved before is complete" in str(error) else 8)


def test_a_full_disk_is_one_line_and_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoints.save(path, {"step": 1})
    assert forked(1, limited_save, path) == [7]  # a write is refused

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(UserError, match="last.pt, got: No space left on device. Free some space"):
        checkpoints.save(path, {"step": 2})
    assert checkpoints.load(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


def test_a_run_that_cannot_write_ends_in_one_line(tmp_path, monkeypatch):
    command = [*FLAGS, "--model=deformable_detr", "--out"]
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(SystemExit, match="^train.py: error: --out: expected a folder"):
            train.main([*command, str(out)])
    at_step(monkeypatch, 1, lambda: shutil.rmtree(tmp_path / "gone"))
    with pytest.raises(SystemExit, match="^train.py: error: .*No such file or directory"):
        train.main([*command, str(tmp_path / "gone")])


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to itself"])
@pytest.mark.parametrize("name", ["last.pt", "nan_report.jsonl", "log.jsonl", ".lock"])
def test_something_else_in_place_of_a_file_of_the_run_is_refused(tmp_path, kind, name):
    """A pipe would block, a device would give zeros without end."""
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else name)
    command = [*FLAGS, "--model=deformable_detr", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=f"^train.py: error: expected .*{name} to be a file"):
        train.main(command)


def hold_lock(rank, folder, connection):
    held = checkpoints.lock_folder(folder)
    connection.send("locked")
    time.sleep(60)
    held.close()


def test_a_folder_in_use_is_refused_and_the_lock_dies_with_its_process(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    receive, send = multiprocessing.Pipe(duplex=False)
    other = multiprocessing.get_context("fork").Process(target=hold_lock, args=(0, out, send))
    other.start()
    assert receive.recv() == "locked"
    settings = run(tmp_path), *config("deformable_detr", epochs=1)
    try:
        with pytest.raises(UserError, match="run is in use by another process that trains there"):
            train.train(*settings)
    finally:
        other.kill()
        other.join()
    assert [path.name for path in out.iterdir()] == [".lock"]
    (out / "last.pt.123.tmp").write_text("of a killed process")
    assert train.train(*settings)["step"] == 3
    assert not list(out.glob("*.tmp"))


def test_temporary_files_of_two_processes_differ(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(checkpoints.torch, "save", lambda state, file: names.append(file.name))
    for process in (1, 2):
        monkeypatch.setattr(checkpoints.os, "getpid", lambda: process)
        checkpoints.save(tmp_path / "a.pt", {})
    assert len(set(names)) == 2


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    """A learning rate that destroys the weights in one step: the loss before it was finite."""
    cfg, recipe = config("deformable_detr", epochs=2)
    folder = tmp_path / "run"
    at_step(monkeypatch, 3, lambda: setattr(recipe, "schedule", "flat"))
    original = train.set_lr

    def set_lr(optimizer, base_lrs, factor):
        original(optimizer, base_lrs, math.inf if recipe.schedule == "flat" else factor)

    monkeypatch.setattr(train, "set_lr", set_lr)
    with pytest.raises(
        FloatingPointError, match="finite weights, got NaN or infinity after step 4"
    ):
        train.train(run(tmp_path, save_every=1), cfg, recipe)
    state = checkpoints.load(folder / "last.pt")
    assert state["step"] == 3 and all(x.isfinite().all() for x in state["model"].values())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rng": None}, "rng"),
        ({"progress": 3}, "progress"),
        ({"optimizer": {}}, "optimizer state"),
        ({"run": None}, "expected run of type dict, got None"),
        ({"run": {**vars(train.Run()), "seed": "x"}}, "seed"),
    ],
)
def test_resuming_a_file_with_wrong_fields_is_one_line(tmp_path, changes, words):
    cfg, recipe = config("deformable_detr", epochs=1)
    train.train(run(tmp_path), cfg, recipe)
    last = tmp_path / "run" / "last.pt"
    checkpoints.save(last, checkpoints.load(last) | changes)
    with pytest.raises(SystemExit, match=f"^train.py: error: .*{words}"):
        train.main(["--resume", "--out", str(tmp_path / "run")])


def wrong_moments(state):
    moments = next(iter(state["optimizer"]["state"].values()))
    moments["exp_avg"] = torch.zeros(3, 5)


@pytest.mark.parametrize("change, words", [
    (wrong_moments, "optimizer .*exp_avg of shape .3, 5. for a parameter"),
    (lambda state: state["optimizer"]["state"].update({0: 3}), "optimizer"),
    (lambda state: state["optimizer"]["param_groups"].clear(), "optimizer"),
    (lambda state: state["rng"][0].update(torch=3), "random states of this run"),
    (lambda state: state["rng"][0].pop("numpy"), "random states of this run"),
    (lambda state: state["progress"].update(step="x"), "--step to be of type int"),
    (lambda state: state["progress"].update(best=math.nan), "best of the run from -1 .* got nan"),
    (lambda state: state["progress"].update(bad_steps=-9), "bad_steps of the run from -1 .* -9"),
    (lambda state: state.update(ema_updates="x"), "random states of this run, got: TypeError")])
def test_damage_inside_the_state_of_a_run_is_one_line(tmp_path, change, words):
    settings = config("deformable_detr", epochs=1)
    train.train(run(tmp_path), *settings)
    path = tmp_path / "run" / "last.pt"
    state = checkpoints.load(path)
    change(state)
    torch.save(state, path)
    with pytest.raises(UserError, match=words):
        train.train(run(tmp_path, resume=str(path)), *settings)


def test_options_of_the_optimizer_are_those_of_the_settings_and_not_of_the_file(tmp_path):
    """`maximize` in a file would turn the gradients around. Only the learning rate is loaded: a run
    that was killed in its last evaluation saves it again."""
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= {"maximize": True, "lr": 7.0, "betas": None}
    checkpoints.restore_optimizer(optimizer, saved)
    group = optimizer.param_groups[0]
    assert (group["maximize"], group["lr"], group["betas"]) == (False, 7.0, (0.9, 0.999))
    assert optimizer.state[weight]["step"] == 1


def test_a_run_goes_on_with_the_classes_it_was_trained_on_only(tmp_path):
    """Names that were exchanged in the json since would be learned by the columns of the others."""
    folder = coco_folder(tmp_path / "data", images=4)
    settings = config("deformable_detr", epochs=1)
    train.train(run(tmp_path, data=folder), *settings)
    path = tmp_path / "data/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    for category, name in zip(content["categories"], ("dog", "cat")):
        category["name"] = name
    path.write_text(json.dumps(content))
    last = str(tmp_path / "run" / "last.pt")
    with pytest.raises(UserError, match=r"classes of the saved run, .*'dog', 'cat'.*got .*'cat'"):
        train.train(run(tmp_path, data=folder, resume=last), *settings)


def list_pickle(levels, uses):
    """A pickle of {"a": a list of `levels` levels, each of which holds the next `uses` times}."""
    put = b"r\x00\x00\x00\x00"
    get = b"j\x00\x00\x00\x00"
    level = b"](" + get * uses + b"e" + put
    return b"\x80\x02]" + put + level * levels + b"}X\x01\x00\x00\x00a" + get + b"s."


def write_archive(path, data):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


@pytest.mark.parametrize("levels, uses", [(5000, 1), (40, 2)])
def test_lists_that_no_program_gets_through_are_refused(tmp_path, levels, uses):
    write_archive(tmp_path / "deep.pt", list_pickle(levels, uses))
    with pytest.raises(UserError, match="levels of lists and dictionaries"):
        checkpoints.load(tmp_path / "deep.pt")


def test_the_message_for_a_broken_pickle_is_not_the_proposal_to_run_its_code(tmp_path):
    """PyTorch's own message begins with it."""
    write_archive(tmp_path / "a.pt", b"\x80\x02}s.")
    with pytest.raises(UserError, match="broken or cut short .pop from empty list") as refused:
        checkpoints.load(tmp_path / "a.pt")
    assert "weights_only" not in str(refused.value)


def test_broken_lines_of_a_log_do_not_block_resuming(tmp_path):
    settings = config("deformable_detr", epochs=2)
    train.train(run(tmp_path), *settings)
    log = tmp_path / "run" / "log.jsonl"
    good = log.read_text().splitlines()
    broken = b"[1]\n{}\n\xff\xfe\n" + b"[" * 100_000 + b"\n{broken\n"
    log.write_bytes(broken + "\n".join([*good, '{"step"']).encode())
    train.train(run(tmp_path, resume=str(tmp_path / "run" / "last.pt")), *settings)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [3, 6]


def test_the_sampling_of_points_has_another_name_than_in_earlier_mask_networks():
    """`oversample` now says how often images with rare classes are shown."""
    paper = importlib.import_module("mask_frozen_detr")
    state = {"format": 2, "config": {"importance": 0.5, "oversample": 2.0}, "recipe": {}}
    cfg, recipe = checkpoints.settings(paper, state)
    assert (cfg.oversample_points, cfg.importance, recipe.oversample) == (2.0, 0.5, 0.0)
