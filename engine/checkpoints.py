"""..."""
import json
import os
import pickle
import random
import re
from argparse import Namespace
from pathlib import Path, PurePosixPath
import numpy as np
import torch
from engine.errors import UserError
from engine.recipe import configure


FORMAT = 2
_SCALAR = np.float64(0).__reduce__()[0]   # what makes a pickled NumPy number; NumPy 1 and 2 name it differently
ALLOWED = [Namespace, *((PurePosixPath, f"pathlib{part}.PosixPath") for part in ("", "._local")),   # all that `load` makes
           *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")), np.dtype,
           *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64"))]
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
               "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def save(path: str | Path, state: dict, keep_previous: bool = False) -> None:
    """Writes `state` so that `path` always names a whole checkpoint or none: temporary file, fsync, rename.

    With `keep_previous` the file it replaces stays beside it as NAME.prev; a kill between the two renames leaves only
    that one, and `newest` finds it.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if keep_previous and path.exists():
        os.replace(path, path.with_name(path.name + ".prev"))
    os.replace(temporary, path)
    if os.name == "posix":   # the rename itself reaches the disk only with its folder
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def load(path: str | Path, map_location="cpu") -> dict:
    """Reads a checkpoint of tensors and plain types, or a .safetensors file. Beside them only ALLOWED classes are made, for
    the options that authors pickle: `Namespace`, NumPy numbers, paths. Raises FileNotFoundError, or ValueError for
    a file that is broken or asks for anything else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"expected a checkpoint at {path}, found no file; see what {path.parent} holds")
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    try:
        with torch.serialization.safe_globals(ALLOWED):
            state = torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise UserError(f"{path}: expected tensors and plain types only, got a pickle that asks for {asked.group(1)}. "
                            "Nothing of it was run. Ask whoever made the file for one that holds only weights") from error
        with open(path, "rb") as file:
            start = file.read(2)
        if start != b"PK" and start[:1] != b"\x80":   # neither torch.save's archive nor a pickle
            raise UserError(f"expected a checkpoint, got {path}, a file of another kind: give a .pt, .pth, .bin or "
                            ".safetensors file") from error
        if "Unsupported operand" in str(error):
            raise UserError(f"{path}: expected tensors and plain types only, got a pickle of protocol 3 or later, which "
                            "cannot be read without running it: save it again with torch.save's own protocol") from error
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: expected a checkpoint, got a file that is broken or cut short ({reason}). Copy it "
                        f"again, or use {path.name}.prev") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: expected a dictionary, got {type(state).__name__}; this is no checkpoint")
    return state


def load_safetensors(path: Path) -> dict:
    """Tensors of a .safetensors file: eight bytes that count a json header, the header, the numbers it points into."""
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    try:
        header = json.loads(whole[8:8 + size])
        header.pop("__metadata__", None)
        numbers = torch.frombuffer(bytearray(whole[8 + size:]), dtype=torch.uint8)
        return {name: numbers[slice(*row["data_offsets"])].clone().view(SAFETENSORS[row["dtype"]]).view(row["shape"])
                for name, row in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: expected a .safetensors file, got one that is broken or cut short "
                        f"({type(error).__name__}: {error}). Copy it again") from error


def newest(folder: str | Path) -> Path:
    """The newest whole checkpoint a run folder can go on from: last.pt, or last.pt.prev, which is then said."""
    last, reasons = Path(folder) / "last.pt", []
    for path in (last, last.with_name("last.pt.prev")):
        try:
            load(path)
        except (FileNotFoundError, ValueError) as error:
            reasons.append(str(error))
            continue
        print(f"resuming from {path}" + (f", for {reasons[0]}" if reasons else ""))
        return path
    raise UserError(f"nothing to resume in {folder}: {reasons[0]}. Start the run without --resume")


def settings(paper, state: dict) -> tuple:
    """The Config and the Recipe of a checkpoint. Before format 2 both were one dictionary, Co-DETR's `base` was called
    `detector`, and a mask network's detector was a field of its Config."""
    values = dict(state["config"]) | state.get("recipe", {})
    if state.get("format", 1) < 2 and "detector" in values:
        detector = values.pop("detector")
        if not getattr(paper, "NEEDS_DETECTOR", False):
            values["base"] = detector
    return configure(paper, values)


def saved_detector(state: dict) -> str:
    """Where the frozen detector of a mask network lay when it was trained."""
    return state["run"].get("detector") or state["config"].get("detector", "")


def random_state() -> dict:
    """The state of every random generator of this process, in plain types."""
    name, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None}


def set_random_state(state: dict) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
