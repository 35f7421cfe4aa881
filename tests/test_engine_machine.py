"""Signals, memory that runs out, errors that a user can mend."""

import threading

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from engine import checkpoints
from engine import commands
from engine import machine as machines
import train
from engine.errors import UserError, user_errors
from engine.notices import forget_notices
from small_runs import (
    at_step,
    cheap_runs,
    coco_folder,
    config,
    FLAGS,
    forked,
    ROOT,
    run,
)  # noqa: F401


def test_sigterm(tmp_path):
    """A real process and its workers, all signalled at once and twice as schedulers do: it saves
    and exits with 143."""
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--model",
        "deformable_detr",
        "--out",
        str(tmp_path / "run"),
        *FLAGS,
        "--num_train=160",
        "--epochs=400",
        "--workers=2",
    ]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log, deadline = tmp_path / "run" / "log.jsonl", time.time() + 120
    try:
        while not log.exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.05)
        for _ in range(2):
            os.killpg(process.pid, signal.SIGTERM)
        errors = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert checkpoints.load(tmp_path / "run" / "last.pt")["step"] > 0


def test_a_second_signal_quits_at_once(tmp_path, monkeypatch):
    """Unless it follows so soon that it must be the same request."""

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # ignored in what a script starts in the background
    at_step(monkeypatch, 1, twice)
    for seconds, name in ((0.0, "quit"), (60.0, "saved")):
        monkeypatch.setattr(machines, "SAME_REQUEST_SECONDS", seconds)
        with pytest.raises(SystemExit) as stopped:
            train.train(run(tmp_path, name=name), *config("deformable_detr"))
        assert stopped.value.code == 128 + signal.SIGINT and (
            tmp_path / name / "last.pt"
        ).exists() == (name == "saved")
    assert signal.getsignal(signal.SIGINT) is before, "handlers are put back"


def test_out_of_memory_names_the_next_flag_and_loses_nothing(tmp_path, monkeypatch):
    """Each attempt proposes what the last one did not use; the saved steps are there, and the run
    goes on from them."""

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    last = tmp_path / "run" / "last.pt"
    command = [*FLAGS, "--model", "deformable_detr", "--out", str(last.parent), "--save_every=1"]
    for at, flags, proposed in (
        (0, [], "Try --recompute; nothing was saved yet"),
        (2, ["--recompute"], "Try --accum 2; .*last.pt is complete: add --resume"),
        (4, ["--recompute", "--accum=4", "--resume"], "Try smaller images.*--max_size 64 --init"),
    ):
        with monkeypatch.context() as patch:
            at_step(patch, at, full)
            with pytest.raises(
                SystemExit, match=f"train.py: error: out of memory.*2.00 GiB.*{proposed}"
            ):
                train.main([*command, *flags])
        assert last.exists() == bool(at) and (not at or checkpoints.load(last)["step"] == at)
    train.main([*command, "--resume"])
    assert checkpoints.load(last)["step"] == 6


def test_errors_meant_for_the_user_are_one_line_and_others_keep_their_trace(tmp_path, monkeypatch):
    command = [*FLAGS, "--model", "deformable_detr", "--epochs=1"]
    train.main([*command, "--out", str(tmp_path / "run")])
    for flags, words in (
        (["--out", str(tmp_path / "run")], "already holds a run"),
        (
            ["--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "a")],
            "expected a data folder with a COCO json",
        ),
        (
            ["--data", coco_folder(tmp_path / "data", empty=True), "--out", str(tmp_path / "b")],
            "usable box",
        ),
        (
            ["--backbone_weights", "missing.pt", "--out", str(tmp_path / "c")],
            "got missing.pt, which is no file",
        ),
        (["--accum=3", "--out", str(tmp_path / "d")], "divisible by accum"),
        (["--schedule=linear", "--out", str(tmp_path / "e")], "expected --schedule"),
    ):
        with pytest.raises(SystemExit, match=f"^train.py: error: .*{words}"):
            train.main([*command, *flags])
    for bug in (lambda: int("many"), lambda: torch.zeros(2).view(3)):
        with monkeypatch.context() as patch:
            at_step(patch, 1, bug)
            with pytest.raises((ValueError, RuntimeError)):
                train.main([*command, "--out", str(tmp_path / "f")])


def test_threads_do_not_spin():
    """Waiting OpenMP threads that spin stop each other where cores are fewer than threads; read
    once, by importing torch."""
    source = (ROOT / "train.py").read_text()
    assert (
        0 < source.index('os.environ.setdefault("GOMP_SPINCOUNT"') < source.index("import torch\n")
    )
    assert os.environ["GOMP_SPINCOUNT"]


def test_busy_cores_are_measured():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as loop:
        try:
            assert machines.busy_cores() >= 0.4     # beside others it may not get a whole core
        finally:
            loop.kill()


def test_threads_follow_the_load_and_a_resumed_run_has_as_many(tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machines, "cores", lambda: 4)
    out = tmp_path / "run"
    for busy, extra, expected in (
        (1.8, ["--out", str(out), "--max_steps", "1"], 2),
        # the load has gone, but the run keeps its setting
        (0.0, ["--resume", str(out), "--max_steps", "2"], 2),
        (0.2, ["--out", str(tmp_path / "idle"), "--max_steps", "1"], 4),
        (9.0, ["--out", str(tmp_path / "crowded"), "--max_steps", "1"], 1),
    ):
        monkeypatch.setattr(machines, "busy_cores", lambda: busy)
        flags = [flag for flag in FLAGS if not flag.startswith("--threads")]
        train.main([*flags, "--model", "deformable_detr", *extra])
        text = capsys.readouterr().out
        assert ("cores busy" in text) == (busy > 1)
        assert f"cpu, {expected} thread" in text and torch.get_num_threads() == expected
        assert checkpoints.load(out / "last.pt")["run"]["threads"] == 2
    torch.set_num_threads(threads)


def test_no_run_uses_more_threads_than_there_are_cores_and_it_says_so(monkeypatch, capsys):
    """A resumed run keeps the number for the larger machine that it may come from; a new one is
    saved with the number that it uses, so that resuming it here gives the same bytes."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(machines, "cores", lambda: 2)
    for settings, used, saved in ((dict(threads=8, resume="last.pt"), 2, 8),
                                  (dict(threads=2, resume="last.pt"), 2, 2),
                                  (dict(threads=8), 2, 2), (dict(threads=1), 1, 1)):
        run = train.Run(device="cpu", workers=0, **settings)
        assert machines.set_up_machine(run).threads == torch.get_num_threads() == used
        assert run.threads == saved
        text = capsys.readouterr().out
        notice = "notice: the run has --threads 8, this machine has 2 cores: it uses 2 threads"
        assert text.startswith(notice) if settings["threads"] == 8 else not text
        assert ("rounding" in text) == (saved == 8)
    torch.set_num_threads(threads)


def wait_for_a_stopped_peer(rank, folder):
    """Rank 1 stops (it is not dead) before its second step; rank 0, which waits for it inside a
    collective call, is asked twice to end."""
    machines.SAME_REQUEST_SECONDS = 0.3
    stopping = folder / "stopping"

    def stop():
        stopping.touch()
        os.kill(os.getpid(), signal.SIGSTOP)

    def ask_twice():
        while not stopping.exists():
            time.sleep(0.05)
        for _ in range(2):
            time.sleep(0.7)
            os.kill(os.getpid(), signal.SIGTERM)

    if rank == 1:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 1, stop)
            train.train(run(folder), *config("deformable_detr"))
    threading.Thread(target=ask_twice, daemon=True).start()
    train.train(run(folder), *config("deformable_detr"))


def test_a_second_request_ends_a_rank_whose_peer_is_stopped(tmp_path):
    codes = forked(2, wait_for_a_stopped_peer, tmp_path, timeout=60, wait_for=(0,))
    assert codes[0] == 128 + signal.SIGTERM


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP on this system")
def test_a_closed_terminal_saves_as_sigterm_does_and_nohup_is_respected(tmp_path, monkeypatch):
    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)     # these tests may run under nohup
    try:
        with pytest.raises(SystemExit) as stopped:
            train.train(run(tmp_path), *config("deformable_detr"))
        assert stopped.value.code == 128 + signal.SIGHUP
        assert checkpoints.load(tmp_path / "run" / "last.pt")["step"] == 2
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        settings = config("deformable_detr", epochs=1)
        assert train.train(run(tmp_path, name="nohup"), *settings)["step"] == 3
    finally:
        signal.signal(signal.SIGHUP, before)


def print_into_a_pipe(rank, folder, reader, writer):
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = open(1, "w")
    os.close(writer)
    train.main(["--model=deformable_detr", *FLAGS, "--epochs=4000", f"--out={folder / 'run'}"])


def test_training_ends_when_nobody_reads_its_output(tmp_path):
    """train.py | head -1"""
    reader, writer = os.pipe()

    def read_one_line():
        with open(reader) as lines:
            first.append(lines.readline())

    first = []
    thread = threading.Thread(target=read_one_line)
    thread.start()
    codes = forked(1, print_into_a_pipe, tmp_path, reader, writer, timeout=60)
    os.close(writer)
    thread.join()
    assert codes == [128 + signal.SIGPIPE] and first[0].startswith("config")


def test_messages_are_one_line_without_control_characters():
    with pytest.raises(SystemExit) as stopped, user_errors("train.py"):
        raise UserError("expected\n  \x1b[31ma cat\x07")
    assert stopped.value.code == "train.py: error: expected ?[31ma cat?"


def test_a_message_has_a_longest_length():
    with pytest.raises(SystemExit) as stopped, user_errors("train.py"):
        raise UserError("got " + "x" * 100_000)
    assert len(stopped.value.code) < 1300 and stopped.value.code.endswith("x...")


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")])
def test_every_program_ends_in_one_line_where_memory_is_used_up(error):
    with pytest.raises(SystemExit, match="^eval.py: error: out of memory"), user_errors("eval.py"):
        raise error


def test_an_operation_without_deterministic_results_is_named_with_the_flag():
    """Fill a tensor at places of which some may be equal: PyTorch refuses it on a CPU, too."""
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(SystemExit, match=r"got put_, which has none .* --deterministic$"):
            with user_errors("train.py"):
                torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    finally:
        torch.use_deterministic_algorithms(False)


def test_other_errors_of_the_program_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"), user_errors("eval.py"):
        raise RuntimeError("a bug")


# ---- devices -------------------------------------------------------------------------------------

@pytest.mark.parametrize("device, message", [
    ("gpu", "expected --device cpu, cuda or mps, got 'gpu'"),
    ("cuda", "--device cuda: PyTorch finds no GPU here"),
    ("cuda:12", "--device cuda:12: PyTorch finds no GPU here"),
    ("mps", "--device mps: PyTorch finds no Apple GPU here")])
def test_a_device_that_is_not_there_is_one_line_in_every_program(device, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for choose in (machines.choose_device, commands.join_processes):
        with pytest.raises(UserError, match=message):
            choose(device)
    with pytest.raises(UserError, match=message):
        commands.open_detector("none.pt", device)


def test_mps_is_accepted_and_said_to_be_untested(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    forget_notices()
    assert machines.choose_device("mps") == "mps"
    assert not machines.multiplies_bfloat16("mps")
    assert "--device mps is untested" in capsys.readouterr().err
    forget_notices()
