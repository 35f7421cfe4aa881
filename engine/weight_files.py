"""Small weight files: a .safetensors file in half precision that describes itself.

Its header has one entry, "paperdetr", a json with the fields of a checkpoint (see checkpoints.py)
except tensors, and `sha256`, the hash of its tensors. Such a file is read as a checkpoint: with
tensors in float32, as the model computes in float32.
"""
import contextlib
import hashlib
import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from engine.errors import UserError
from engine.files import complete_file
from engine.notices import one_line

ENTRY = "paperdetr"


def write(path: str | Path, fields: dict, weights: dict) -> str:
    """Write a weight file. -> the hash of its tensors

    fields: a checkpoint without tensors. weights: {name: tensor}; floating point becomes half
    precision. Raises UserError for weights that half precision cannot hold.
    """
    halved = {}
    for name, value in weights.items():
        halved[name] = value.detach().cpu().contiguous()
        if value.is_floating_point():
            halved[name] = halved[name].half()
            if not halved[name].isfinite().all():
                raise UserError(f"expected weights of at most 65504, the largest number of half "
                                f"precision, got {value.abs().max():g} in {name}")
    digest = tensor_hash(halved)
    header = {ENTRY: json.dumps({**fields, "sha256": digest})}
    with complete_file(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(halved, header))
    return digest


@contextlib.contextmanager
def opened(path: Path):
    """Yield an open .safetensors file. UserError if it cannot be opened, or read in the block."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except Exception as error:   # the library has its own exception, and raises built-in ones
        raise UserError(f"{path}: expected a .safetensors file, got one that is broken or cut "
                        f"short ({type(error).__name__}: {error}). Copy it again") from error


def read(path: Path) -> dict:
    """Read a .safetensors file: a checkpoint, if it describes itself, else its tensors by name.

    Raises UserError for a file that is broken.
    """
    with opened(path) as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if ENTRY not in header:
        return tensors
    fields = parse_fields(path, header)
    if tensor_hash(tensors) != fields.get("sha256"):
        raise UserError(f"{path}: expected tensors with the hash {one_line(fields.get('sha256'))}, "
                        "got others: the file is damaged; copy it again")
    weights = {}
    for name, value in tensors.items():
        weights[name] = value.float() if value.is_floating_point() else value
    return {**fields, "model": weights}


def read_header(path: Path) -> tuple[dict, dict[str, tuple]]:
    """Return the fields of a weight file and the shapes of its tensors, without reading them."""
    with opened(path) as file:
        header = file.metadata() or {}
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return (parse_fields(path, header) if ENTRY in header else {}), shapes


def parse_fields(path: Path, header: dict) -> dict:
    """Return the fields in the header of a weight file. Lists become tuples in the settings."""
    try:
        fields = json.loads(header[ENTRY])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON in the header, got text that cannot be parsed: the "
                        "file is damaged; copy it again") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: expected a dictionary in the header, got "
                        f"{type(fields).__name__}: the file is damaged; copy it again")
    restore_tuples(fields)
    if isinstance(fields.get("detector"), dict):
        restore_tuples(fields["detector"])
    return fields


def restore_tuples(fields: dict) -> None:
    """Turn the lists in config and recipe into tuples, which JSON does not know."""
    for part in ("config", "recipe"):
        if isinstance(fields.get(part), dict):
            fields[part] = {name: tuple(value) if isinstance(value, list) else value
                            for name, value in fields[part].items()}


def tensor_hash(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256, as hexadecimal text, of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
