"""Results on disk: folders that can be written to, files that are complete or absent."""
import contextlib
import json
import os
import tempfile
from pathlib import Path

from engine.errors import UserError


def prepare_folder(path):
    """Create a folder for results, and try at once whether it can be written to."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"--out: expected a folder, got the file {path}")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"--out: expected a folder to write to, got {path}: {error.strerror}; "
                        "choose another one") from error
    return path


@contextlib.contextmanager
def complete_file(path):
    """Yield a temporary name beside `path`; it gets its name when the block ends without an error,
    and is removed otherwise. Whoever finds `path` finds a complete file."""
    path = Path(path)
    if not path.parent.is_dir():
        prepare_folder(path.parent)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def complete_picture(path):
    """`complete_file` of a picture. UserError for a name that is neither .png nor .jpg."""
    if Path(path).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"--out: expected a picture to write, .png or .jpg, got {path}")
    return complete_file(path)


def write_json(path, value):
    with complete_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))
