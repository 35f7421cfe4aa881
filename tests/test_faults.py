"""Damaged files and wrong command lines: whatever is drawn, a program ends within a time limit, in
success or in one line that begins with its name; it runs no foreign code, writes nothing outside
its folder, and what was on disk before is complete afterwards.

    pytest tests/test_faults.py                                        a fixed small number of cases
    PAPERDETR_FAULTS=5000 pytest tests/test_faults.py --slow -s        as many as you like
    PAPERDETR_FAULTS=1 PAPERDETR_FAULTS_SEED=17 pytest ... --slow -s   a single one again

The damages are in faults.py, the commands in fault_cases.py. Every case runs in a forked child.
"""
import contextlib
import functools
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import analysis
import eval as evaluation
import fault_cases
import faults
import scenes
import train
import visualize
from backbones import resnet
from engine import batches
from engine import checkpoints
from engine import files
from engine import plots
from engine import released
from tools import check_data
from tools import convert
from tools import export

CASES = 60            # in the suite
LIMIT = int(os.environ.get("PAPERDETR_FAULTS_LIMIT", 60))   # seconds; more on a busy machine
MEMORY = 6 * 2 ** 30  # bytes, beyond what the tests use
LONGEST_LINE = 1300   # characters of an error message
TRACEBACK = 70        # exit code of a child
VERDICTS = ("ok", "one line", "unclear", "traceback", "hang", "crash", "ran code",
            "wrote outside", "lost or half a file")
PROGRAMS = {"train.py": train.main, "eval.py": evaluation.main, "analysis.py": analysis.main,
            "visualize.py": visualize.main, "scenes.py": scenes.main,
            "tools.check_data": check_data.main, "tools.convert": convert.main,
            "tools.export": export.main}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink",
                   "os.truncate")


class Result(NamedTuple):
    seed: int
    damage: str        # function
    what: str          # its choice
    command: str
    verdict: str
    text: str          # output, or what was wrong
    seconds: float


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    """A folder of intact files, for models of a few thousand parameters."""
    folder = tmp_path_factory.mktemp("materials")
    with narrow_backbones(), contextlib.chdir(folder):
        faults.make_materials(folder)
        yield folder


@contextlib.contextmanager
def narrow_backbones():
    """Within the block, ResNets have few channels, and what only takes long is shortened."""
    narrow = functools.partial(resnet.ResNet, resnet.BasicBlock, (1, 1, 1, 1), (8, 16, 24, 32), 8,
                               small_stem=True)
    save = Figure.savefig

    def save_small(figure, file, format=None, **options):
        save(figure, file, format=format, dpi=20)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("tiny", "resnet50"):
            patch.setitem(resnet.RESNETS, name, narrow)
        patch.setattr(batches, "OVERFIT_STEPS", 2)
        patch.setattr(train.visualize, "curves", plots.read_log)
        patch.setattr(Figure, "tight_layout", lambda *args, **options: None)
        patch.setattr(Figure, "savefig", save_small)
        patch.setattr(export, "trace", run_once)
        patch.setattr(export, "write_onnx", write_facts)
        patch.setattr(export, "write_program", write_facts)
        patch.setattr(export, "file_runner", lambda path: traced[-1])
        released.published_shapes.cache_clear()
        yield
    released.published_shapes.cache_clear()


traced = []      # modules that tools.export would have traced, which takes seconds


def run_once(module, inputs, dynamic):
    """In place of `export.trace`."""
    with torch.no_grad():
        module(*inputs)
    traced.append(module)


def write_facts(path, program, *more):
    """In place of a program, its facts."""
    with files.complete_file(path) as temporary:
        temporary.write_text(json.dumps(more[-1]))


# ---- one case ------------------------------------------------------------------------------------

def run_case(seed, materials, folder) -> Result:
    """Draw a case, run it in a child, and judge it. `folder` is made and removed."""
    shutil.copytree(materials, folder)
    damage, rng, program, words = fault_cases.draw_case(seed)
    what = damage(rng, folder)
    (folder / "tmp").mkdir()
    environment = folder / "environment.json"
    settings = json.loads(environment.read_text()) if environment.exists() else {}
    before = contents(folder)
    output = folder.with_suffix(".txt")
    start = time.perf_counter()
    code = in_child(output, lambda: run_program(folder, settings, program, words))
    seconds = time.perf_counter() - start
    text = output.read_text(errors="replace")
    fault = file_fault(folder, before, words)
    verdict, reason = judge(program, code, text, fault)
    shutil.rmtree(folder)
    output.unlink()
    command = f"{program} {' '.join(words)}"
    return Result(seed, damage.__name__, what, command, verdict, reason or text, seconds)


def in_child(output, function):
    """Run a function in a forked child with a time limit -> its exit code, -signal, None: too long.
    """
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = open(1, "w", errors="backslashreplace", closefd=False)
            sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)
            code = exit_code(function)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        finally:
            os._exit(99)   # the child never returns into pytest
    status = wait(child)
    kill_group(child)      # whatever it has left running
    if status is None:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(status)


def exit_code(function) -> int:
    """What Python would end with after calling a function as a program."""
    try:
        function()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return TRACEBACK
    return 0


def wait(child):
    deadline = time.monotonic() + LIMIT
    pause = 0.005
    while time.monotonic() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return status
        time.sleep(pause)
        pause = min(0.1, 1.3 * pause)
    return None


def kill_group(child):
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass


def run_program(folder, settings, program, words):
    """In the child: one thread, a memory limit, a watch on what is written, then the program."""
    torch.set_num_threads(1)
    os.chdir(folder)
    tempfile.tempdir = str(folder / "tmp")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    limit = settings.pop("file size", None)
    os.environ.update({"PYTHONWARNINGS": "ignore", **settings})
    watch_writing(folder)
    if limit is not None:
        # The output of the child is a file as well.
        output = os.fstat(2).st_size + 10 ** 5
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(limit, output), max(limit, output)))
    sys.argv = [program, *words]
    PROGRAMS[program](words)


def watch_writing(folder):
    """Print a line for everything that this process writes outside of a folder."""
    inside = os.path.realpath(folder)

    def watch(event, details):
        if event == "open":
            path, mode, flags = details
            writes = (flags or 0) & WRITING if mode is None else set(mode) & set("wax+")
        elif event in CHANGING_EVENTS:
            path = details[1] if event == "os.rename" else details[0]
            writes = True
        else:
            return
        if not writes or isinstance(path, int):
            return
        location = os.path.realpath(os.path.dirname(os.fsdecode(path)) or ".")
        if not (location + "/").startswith((inside + "/", "/dev/null/", "/proc/")) \
                and location != "/dev":
            os.write(2, f"\nOUTSIDE {event} {os.fsdecode(path)!r}\n".encode())

    sys.addaudithook(watch)


# ---- judging -------------------------------------------------------------------------------------

def judge(program, code, text, fault) -> tuple:
    """-> verdict, what was wrong (empty where the output says it)"""
    if "OUTSIDE" in text:
        return "wrote outside", ""
    if fault:
        kind = "ran code" if "executed" in fault else "lost or half a file"
        return kind, f"{fault}\n{text}"
    if code is None:
        return "hang", ""
    if code < 0 or code == 99:
        return "crash", f"exit code {code}\n{text}"
    if code == TRACEBACK or "Traceback (most recent" in text:
        return "traceback", ""
    if "\x1b" in text:
        return "unclear", f"terminal escapes in {text!r}"
    if code == 0:
        return "ok", ""
    lines = text.strip().splitlines() or [""]
    checks = program in ("tools.check_data", "tools.convert", "train.py")
    if checks and re.search(r"\d warnings?$", lines[-1]):
        return "ok", ""       # the check reports errors by its exit code
    if not lines[-1].startswith(f"{program}: ") or len(lines[-1]) > LONGEST_LINE:
        return "unclear", f"exit code {code}\n{text}"
    return "one line", ""


def contents(folder) -> dict:
    """{path: bytes} of all regular files of a folder."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 10 ** 8:
            found[path] = path.read_bytes()
    return found


def file_fault(folder, before, words) -> str:
    """What is wrong with the files after a case, or nothing."""
    after = contents(folder)
    for path in folder.rglob("*"):
        if path.name == "executed":
            return "executed: the code in a checkpoint was run"
        if path not in before and path.suffix == ".tmp":
            return f"{path.name} was left behind"
    for path, content in before.items():
        name = str(path.relative_to(folder))
        written = name.startswith(("runs/", "out/")) or any(name in word for word in words)
        if path not in after:
            if path.suffix != ".tmp" and content not in after.values():
                return f"{name} is gone"
        elif after[path] != content and not written:
            return f"{name} was changed"
        elif after[path] != content and not is_complete(path):
            return f"{name} is only half written"
    return ""


def is_complete(path) -> bool:
    """Whether a file that a program wrote can be read again. A log may end within a line."""
    try:
        if path.suffix in (".pt", ".prev"):
            checkpoints.load(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines()[:-1]:
                json.loads(line)
        elif path.suffix in (".png", ".jpg"):
            with Image.open(path) as image:
                image.load()
    except (ValueError, OSError):
        return False
    return True


# ---- the property --------------------------------------------------------------------------------

def run_cases(seeds, materials, folder, report=None) -> list:
    results = []
    for seed in seeds:
        result = run_case(seed, materials, folder / str(seed))
        results.append(result)
        if report:
            report(result)
    return results


def table(results) -> str:
    """Counts of verdicts by damage, as Markdown."""
    counts = Counter((result.damage, result.verdict) for result in results)
    lines = ["| damage | " + " | ".join(VERDICTS) + " |", "|---" * (len(VERDICTS) + 1) + "|"]
    for damage in sorted({result.damage for result in results}):
        numbers = [str(counts[damage, verdict]) for verdict in VERDICTS]
        lines.append(f"| {damage.replace('_', ' ')} | " + " | ".join(numbers) + " |")
    sums = [str(sum(result.verdict == verdict for result in results)) for verdict in VERDICTS]
    return "\n".join([*lines, f"| all {len(results)} | " + " | ".join(sums) + " |"])


def describe(result) -> str:
    return (f"seed {result.seed}: {result.verdict}: {result.damage}, {result.what}\n"
            f"{result.command}\n{result.text[-3000:]}\n")


def check(results):
    bad = [result for result in results if result.verdict not in ("ok", "one line")]
    assert not bad, "\n".join(map(describe, bad[:20])) + table(results)


@pytest.fixture
def short_folder(tmp_path_factory):
    """Its name leaves room for those of sockets: see LONGEST_FOLDER of engine/workers.py."""
    return tmp_path_factory.mktemp("f")


def test_every_fault_ends_in_success_or_in_one_line(materials, short_folder):
    check(run_cases(range(CASES), materials, short_folder))


@pytest.mark.slow
def test_every_fault_of_many_ends_in_success_or_in_one_line(materials, short_folder):
    count = int(os.environ.get("PAPERDETR_FAULTS", 2000))
    first = int(os.environ.get("PAPERDETR_FAULTS_SEED", 0))
    results = run_cases(range(first, first + count), materials, short_folder,
                        report=print_result)
    print(table(results))
    check(results)


def print_result(result):
    print(f"case {result.seed}: {result.damage}: {result.verdict}: {result.seconds:.2f} s")
    if result.verdict not in ("ok", "one line"):
        print(describe(result), flush=True)


# ---- the judge -----------------------------------------------------------------------------------

def stop(message):
    return lambda words: sys.exit(message)


def write(name, content=b"x"):
    return lambda words: Path(name).write_bytes(content)


ENDS = {
    "success": (lambda words: None, "ok"),
    "a line with the name": (stop("train.py: error: expected 1, got 2"), "one line"),
    "a line without the name": (stop("expected 1, got 2"), "unclear"),
    "a very long line": (stop("train.py: " + "x" * 5000), "unclear"),
    "an exit code without a word": (stop(3), "unclear"),
    "an exception": (lambda words: {}["key"], "traceback"),
    "no end": (lambda words: time.sleep(60), "hang"),
    "a segmentation fault": (lambda words: os.kill(os.getpid(), signal.SIGSEGV), "crash"),
    "code of a checkpoint": (lambda words: os.mkdir("executed"), "ran code"),
    "a file beside the folder": (write("../file"), "wrote outside"),
    "a damaged checkpoint": (write("runs/small/last.pt"), "lost or half a file"),
    "a changed image": (write("photos/photo.jpg"), "lost or half a file"),
    "a removed image": (lambda words: os.remove("photos/photo.jpg"), "lost or half a file"),
    "a temporary file": (write("runs/small/last.pt.tmp"), "lost or half a file"),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_judge_recognizes(materials, tmp_path, monkeypatch, end):
    program, verdict = ENDS[end]
    monkeypatch.setitem(PROGRAMS, "train.py", program)
    monkeypatch.setattr(fault_cases, "draw_case", lambda seed: (
        faults.nothing, None, "train.py", []))
    monkeypatch.setitem(globals(), "LIMIT", 1 if end == "no end" else LIMIT)
    assert run_case(0, materials, tmp_path / "case").verdict == verdict
