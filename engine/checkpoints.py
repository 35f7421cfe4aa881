"""Save and load checkpoints safely, and the folder of a run.

A checkpoint of a run is a dictionary: format, model_name, variant, config, recipe, run,
class_names, category_ids, data, model, ema (EMA weights), epoch, step, best; last.pt also
holds progress, ema_updates, optimizer and rng, so that a run continues bit-exactly. `detector`
describes a detector whose weights are among those of a mask network.
"""
import contextlib
import dataclasses
import os
import pathlib
import pickle
import random
import re
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

from engine import weight_files
from engine.errors import UserError
from engine.files import prepare_folder, write_json
from engine.forms import mismatch
from engine.notices import one_line
from engine.ranges import check_ranges, check_type, check_values
from engine.recipe import configure, override

try:
    import fcntl
except ImportError:   # Windows
    fcntl = None
    import msvcrt

FORMAT = 2
DEEPEST = 50   # levels of lists and dictionaries in a checkpoint; ours have 6
MOST_VALUES = 1_000_000   # in all of them
LARGEST = 1e12   # number of steps or seconds

# Besides tensors and plain types, `load` allows these classes, which released files contain.
NUMPY_SCALAR = np.float64(0).__reduce__()[0]   # NumPy 1 and 2 name its module differently
ALLOWED = [
    Namespace,
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PurePosixPath, "pathlib._local.PosixPath"),
    (NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64")),
]

# Fields of every checkpoint of this project, and their types.
FIELDS = {"model_name": str, "config": dict, "model": dict, "class_names": list,
          "category_ids": list}
# The forms of what it may hold besides; see engine.forms.
FORMS = {"format": int, "class_names": [str], "category_ids": [int], "recipe": {}, "ema": {},
         "run": {},
         "variant": str, "step": int, "epoch": int, "thresholds": {str: float},
         "detector": {"model_name": str, "config": {}, "recipe": {}, "class_names": [str]}}
RUN_DEFAULTS = {"data": "", "seed": 0, "overfit": 0, "num_train": 1, "num_val": 1,
                "detector": ""}   # what evaluating reads of a run
RUN_FILES = (".lock", "config.json", "log.jsonl", "nan_report.jsonl", "last.pt", "last.pt.prev",
             "best.pt", "curves.png", "predictions.png")
# Fields that last.pt has too.
RESUME_FIELDS = {"run": dict, "progress": dict, "optimizer": dict, "rng": list}


# ---- one file ------------------------------------------------------------------------------------

def save(path: str | Path, state: dict, keep_previous: bool = False) -> None:
    """Write `state` so that `path` always names a complete checkpoint or none: temporary file,
    fsync, rename. UserError where the disk refuses; the temporary file is removed then.

    keep_previous: rename the file it replaces to NAME.prev. When the process is killed between the
    two renames, there is only NAME.prev, and `newest` returns it."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            os.replace(path, path.with_name(path.name + ".prev"))
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise   # only torch's zip writer, which has this name, reports a failed write so
        reason = getattr(error, "strerror", None) or "the disk took only a part of it"
        raise UserError(f"expected to write {path}, got: {reason}. Free some space or name another "
                        "folder; what was saved before is complete") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk: only then does a rename inside it survive a power failure."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def load(path: str | Path, map_location="cpu") -> dict:
    """Read a checkpoint or a .safetensors file without running any code in it.

    Besides tensors and plain types only ALLOWED classes are created. For our own files the
    checksums that torch.save wrote are compared, which takes about 1.3 s per GB. UserError for a
    missing or broken file, and for one that contains other classes."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"expected a checkpoint at {path}, found no file; see what {path.parent} "
                        "holds")
    if path.suffix == ".safetensors":
        state = weight_files.read(path)
        if "model_name" in state:
            check_fields(path, state, FIELDS)
            check_forms(path, state)
        return state
    try:
        with torch.serialization.safe_globals(ALLOWED):
            state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:   # a damaged file can raise nearly anything
        raise UserError(why_unreadable(path, error)) from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: expected a dictionary, got {type(state).__name__}; this is no "
                        "checkpoint")
    check_contents(path, state)
    if "model_name" in state:
        check_sums(path)
        check_fields(path, state, FIELDS)
        check_forms(path, state)
    return state


def why_unreadable(path: Path, error: Exception) -> str:
    """The message for a file that torch.load refused with `error`."""
    asked = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and asked:
        return (f"{path}: expected tensors and plain types only, got a pickle that asks for "
                f"{asked.group(1)}. Nothing of it was run. Ask whoever made the file for one that "
                "holds only weights")
    try:
        with open(path, "rb") as file:
            start = file.read(2)
    except OSError as refused:
        return f"expected to read {path}, got: {refused.strerror}"
    if start != b"PK" and start[:1] != b"\x80":   # neither torch.save's archive nor a pickle
        return (f"expected a checkpoint, got {path}, a file of another kind: give a .pt, .pth, "
                ".bin or .safetensors file")
    if "Unsupported operand" in str(error):
        return (f"{path}: expected tensors and plain types only, got a pickle of protocol 3 or "
                "later, which cannot be read without running it: save it again with torch.save's "
                "own protocol")
    # PyTorch's message begins with the proposal to read the file in a way that runs its code
    reason = str(error).rpartition("WeightsUnpickler error: ")[2]
    reason = reason.strip().partition("\n")[0] or type(error).__name__
    return (f"{path}: expected a checkpoint, got a file that is broken or cut short ({reason}). "
            f"Copy it again, or use {path.name}.prev")


def check_contents(path: Path, state: dict) -> None:
    """UserError for a tensor that the file does not hold itself: one without numbers, or a view
    that repeats few numbers until it is larger than any memory. Also for lists and dictionaries
    nested so deep, or holding each other so often, that no program gets through them."""
    waiting = [("the file", state, 0)]
    visited = 0
    while waiting:
        name, value, depth = waiting.pop()
        visited += 1
        if depth > DEEPEST or visited > MOST_VALUES:
            raise UserError(f"{path}: expected at most {DEEPEST} levels of lists and dictionaries "
                            f"and {MOST_VALUES} values, got more in {one_line(name, 80)}: the file "
                            "is damaged; copy it again")
        if isinstance(value, dict):
            waiting += [(key if isinstance(key, str) else name, part, depth + 1)
                        for key, part in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [(name, part, depth + 1) for part in value]
        elif torch.is_tensor(value):
            plain = value.layout == torch.strided and not value.is_meta
            if not plain or value.nbytes > value.untyped_storage().nbytes():
                raise UserError(f"{path}: expected tensors with all their numbers, got another "
                                f"kind in {one_line(name, 80)}: the file is damaged; copy it again")


def check_sums(path: Path) -> None:
    """Compare every part of the archive with its CRC-32."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        damaged = str(error)
    if damaged:
        raise UserError(f"{path}: expected a checkpoint, got a file that is broken: the checksum "
                        f"of {damaged} is wrong. Copy it again, or use {path.name}.prev")


def check_fields(path: Path, state: dict, fields: dict) -> None:
    """UserError unless `state` has these fields {name: type}."""
    for name, kind in fields.items():
        if not isinstance(state.get(name), kind):
            got = type(state[name]).__name__ if name in state else "nothing"
            raise UserError(f"{path}: expected a checkpoint with {name}, a {kind.__name__}, got "
                            f"{got}: the file was made by something else; copy it again")


def saved_weights(path: str | Path, state: dict) -> dict:
    """The averaged weights of a checkpoint, or else its weights. UserError unless all of them are
    finite tensors."""
    weights = state.get("ema", state["model"])
    for name, value in weights.items():
        if not isinstance(name, str) or not torch.is_tensor(value) or value.is_complex():
            raise UserError(f"{path}: expected tensors by name, got {type(value).__name__} as "
                            f"{one_line(name, 80)}: the file is damaged; copy it again")
    require_finite(weights, path)
    return weights


def check_forms(path: Path, state: dict) -> None:
    """UserError for a part of a checkpoint that is there and has another type than ours."""
    fault = mismatch(state, {name: FORMS[name] for name in FORMS if name in state})
    if not fault and len(state["class_names"]) != len(state["category_ids"]):
        fault = "as many category_ids as class_names"
    if fault:
        raise UserError(f"{path}: expected {fault}: the file is damaged; copy it again")
    if "run" in state:
        check_values(state["run"], RUN_DEFAULTS)


def newest(folder: str | Path) -> tuple[Path, dict]:
    """The newest complete checkpoint that a run folder can continue from, last.pt or else
    last.pt.prev: its path and what it holds. Prints which one."""
    last = Path(folder) / "last.pt"
    reasons = []
    for path in (last, last.with_name("last.pt.prev")):
        try:
            state = load(path)
        except UserError as error:
            reasons.append(str(error))
            continue
        print(f"resuming from {path}" + (f", for {reasons[0]}" if reasons else ""))
        return path, state
    raise UserError(f"nothing to resume in {folder}: {reasons[0]}. Start the run without --resume")


def settings(paper, state: dict) -> tuple:
    """The Config and the Recipe of a checkpoint. Before format 2 both were one dictionary,
    Co-DETR's `base` was called `detector`, and a mask network's detector was a field of its
    Config."""
    values = dict(state["config"]) | state.get("recipe", {})
    if state.get("format", 1) < 2 and "detector" in values:
        detector = values.pop("detector")
        if not getattr(paper, "NEEDS_DETECTOR", False):
            values["base"] = detector
    if {"importance", "oversample"} <= values.keys() and "oversample_points" not in values:
        values["oversample_points"] = values.pop("oversample")   # its name in earlier mask networks
    cfg, recipe = configure(paper, values)
    check_ranges(cfg, recipe)
    return cfg, recipe


def saved_detector(state: dict) -> str:
    """Path of a mask network's frozen detector when it was trained."""
    return state.get("run", {}).get("detector") or state["config"].get("detector", "")


def load_weights(model, state: dict, path: str | Path) -> None:
    """model.load_state_dict with a UserError that names the first tensors that do not fit."""
    check_fit(model, state, path)
    model.load_state_dict(state)


def check_fit(model, state: dict, path: str | Path) -> None:
    """UserError unless these are the tensors of this model; it may be one on the device "meta"."""
    own = model.state_dict()
    wrong = [f"{name} missing" for name in own if name not in state]
    wrong += [f"{name} unknown" for name in state if name not in own]
    for name in own:
        if name in state and torch.is_tensor(own[name]):
            shape = tuple(getattr(state[name], "shape", ()))
            if not torch.is_tensor(state[name]) or shape != tuple(own[name].shape):
                wrong.append(f"{name} {shape} instead of {tuple(own[name].shape)}")
            elif own[name].is_floating_point() and not state[name].is_floating_point():
                wrong.append(f"{name} {state[name].dtype} instead of {own[name].dtype}")
    if wrong:
        raise UserError(f"{path}: expected the tensors of this model, got {len(wrong)} that do not "
                        f"fit ({'; '.join(wrong[:3])}): the file belongs to another version or to "
                        "another model")


def require_finite(state: dict, path: str | Path) -> None:
    """UserError for weights that are NaN or infinite: their detections would be nonsense."""
    for name, value in state.items():
        if torch.is_tensor(value) and value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{path}: expected finite weights, got NaN or infinity in {name}: "
                            "training diverged there; use an earlier checkpoint")


# ---- the run folder ------------------------------------------------------------------------------

class RunFolder:
    """The folder of one run. Inside `with` it is locked against other processes; the lock ends with
    this process, however it ends."""

    def __init__(self, run, machine):
        self.path = Path(run.out)
        self.run = run
        self.machine = machine
        self.lock = None

    def __enter__(self):
        self.is_new = not self.path.exists()
        if self.machine.is_main:
            prepare_folder(self.path)
            self._refuse_other_kinds()
            self.lock = lock_folder(self.path)
            if not self.run.resume:
                self._refuse_another_run()
            for temporary in self.path.glob("*.tmp"):   # left by a killed process
                temporary.unlink()
        return self

    def __exit__(self, kind, *error):
        if not self.lock:
            return
        self.lock.close()
        failed_at_start = kind is not None and os.listdir(self.path) == [".lock"]
        if failed_at_start and self.is_new:
            (self.path / ".lock").unlink()
            self.path.rmdir()

    def _refuse_other_kinds(self):
        """A pipe or a device in place of a file would block, a folder would fail late."""
        for name in RUN_FILES:
            path = self.path / name
            if os.path.lexists(path) and not path.is_file():
                raise UserError(f"expected {path} to be a file that the run can replace, got "
                                "something else: remove it, or name another folder with --out")

    def _refuse_another_run(self):
        for name in ("last.pt", "last.pt.prev", "best.pt"):
            if (self.path / name).exists():
                self.lock.close()
                raise UserError(f"{self.path} already holds a run: continue it with --resume, or "
                                "name another folder with --out")

    def describe(self, cfg, recipe, dataset, carried: dict | None = None) -> None:
        """Set `header`, the part of every checkpoint that describes the run. Write config.json.

        carried: the description of a detector that the model trains as a part of itself."""
        described = {"run": dataclasses.asdict(self.run), "config": dataclasses.asdict(cfg),
                     "recipe": dataclasses.asdict(recipe)}
        self.header = {
            "format": FORMAT, "model_name": self.run.model, "variant": self.run.variant,
            **described,
            "class_names": list(dataset.class_names),
            "category_ids": [int(i) for i in dataset.category_ids], "data": dataset.name}
        if carried:
            self.header["detector"] = {"format": FORMAT, **carried}
        if self.machine.is_main:
            write_json(self.path / "config.json", described)

    def save(self, name: str, progress, model, ema, optimizer=None, **more) -> None:
        """Write a checkpoint from rank 0; all ranks call this. `more`: further fields. Without an
        optimizer it holds only what inference needs. FloatingPointError for weights that are not
        finite."""
        norms = torch._foreach_norm([p.detach() for p in model.parameters()])
        if not torch.stack(norms).isfinite().all():
            raise FloatingPointError(
                f"expected finite weights, got NaN or infinity after step {progress.step}: lower "
                f"--lr. {self.path} holds what was saved before")
        state = {**self.header, "model": model.state_dict(), "epoch": progress.epoch,
                 "step": progress.step, "best": progress.best,
                 "progress": dataclasses.asdict(progress), **more}
        if hasattr(ema, "n_averaged"):
            state["ema"] = ema.module.state_dict()
            state["ema_updates"] = int(ema.n_averaged)
        if optimizer is not None:
            state["optimizer"] = optimizer.state_dict()
            state["rng"] = self.machine.gather(random_state())
        if self.machine.is_main:
            save(self.path / name, state, keep_previous=optimizer is not None)

    def save_best(self, progress, model, ema, thresholds: dict) -> None:
        """Write best.pt, from rank 0; all ranks call this. A run that was resumed after its last
        evaluation has written it already, and leaves it."""
        if self.run.resume and self.machine.is_main:
            with contextlib.suppress(UserError):     # none yet, or a damaged one
                written = load(self.path / "best.pt")
                if (written.get("step"), written.get("best")) == (progress.step, progress.best):
                    return
        self.save("best.pt", progress, model, ema, thresholds=thresholds)

    def restore(self, progress, model, ema, optimizer, steps_per_epoch: int,
                class_names: list[str]):
        """Restore the run that `run.resume` names: weights, EMA, optimizer and random states.
        -> its progress

        progress: a new one. A rank that the saved run did not have goes on with its seed."""
        path = self.run.resume
        state = load(path)
        if "optimizer" not in state:
            raise UserError(f"{path} holds weights only, a run cannot continue from it: give "
                            "last.pt, or --init")
        check_fields(path, state, RESUME_FIELDS)
        if state["class_names"] != list(class_names):
            raise UserError(f"expected the classes of the saved run, in its order, "
                            f"{one_line(state['class_names'])}, got {one_line(class_names)}: train "
                            "on the same data, or start a new run with --init and --out")
        progress = saved_progress(progress, state["progress"], path)
        self._check_steps(progress, steps_per_epoch)
        load_weights(model, state["model"], path)
        if hasattr(ema, "n_averaged"):
            load_weights(ema.module, state.get("ema", {}), path)
        try:
            if hasattr(ema, "n_averaged"):
                ema.n_averaged.fill_(state.get("ema_updates", progress.step))
            restore_optimizer(optimizer, state["optimizer"])
            if self.machine.rank < len(state["rng"]):
                set_random_state(state["rng"][self.machine.rank])
        except Exception as error:   # a damaged file can raise nearly anything
            raise UserError(f"{path}: expected the optimizer state and random states of this run, "
                            f"got: {type(error).__name__}: {error}") from error
        return progress

    def _check_steps(self, progress, steps_per_epoch: int) -> None:
        """UserError unless the run can continue from this step, in epochs of this length."""
        if progress.step != progress.epoch * steps_per_epoch + progress.batch:
            saved_steps = (progress.step - progress.batch) // max(1, progress.epoch)
            raise UserError(f"expected epochs of {saved_steps} steps as in the saved run, got "
                            f"{steps_per_epoch}: train on the same images, with a batch that accum "
                            "x processes divides")
        if self.run.max_steps and progress.step >= self.run.max_steps:
            raise UserError(f"expected --max_steps above {progress.step}, the steps this run has "
                            f"made, got {self.run.max_steps}: give more, or leave it out")


def saved_progress(progress, saved: dict, path: str | Path):
    """The progress of a checkpoint. UserError for values that no run has.

    progress: a new one; saved: the fields of the saved one."""
    for name, default in vars(progress).items():
        value = saved.get(name, default)
        check_type(name, value, default)
        if not -1 <= value <= LARGEST:   # False for NaN
            raise UserError(f"{path}: expected {name} of the run from -1 to {LARGEST:g}, got "
                            f"{value}: the file is damaged")
    return override(progress, saved)


def restore_optimizer(optimizer, saved: dict) -> None:
    """optimizer.load_state_dict, except that the options of the groups stay those of the settings.
    The learning rate is loaded: every step sets it anew, and a run that makes no further step
    saves it again. ValueError for a state of another shape, which would fail at the first step."""
    options = [{name: x for name, x in group.items() if name not in ("params", "lr")}
               for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, own in zip(optimizer.param_groups, options):
        group.update(own)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape not in ((), parameter.shape):
                raise ValueError(f"{name} of shape {tuple(value.shape)} for a parameter of "
                                 f"{tuple(parameter.shape)}")


def lock_folder(folder: Path):
    """Lock a folder until the returned file is closed or the process ends. UserError where another
    process holds the lock."""
    file = open(folder / ".lock", "a+")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(f"{folder} is in use by another process that trains there: wait for it, or "
                        "name another folder with --out") from None
    except OSError as error:   # some network file systems have no locks
        print(f"{folder}: not locked ({error.strerror}); start no second run there")
    return file


def random_state() -> dict:
    """The state of every random generator of this process, in plain types."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest),
            "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
