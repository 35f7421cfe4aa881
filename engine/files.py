"""Results on disk: folders that can be written to, files that are complete or absent."""
import contextlib
import io
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
    and is removed otherwise. Whoever finds `path` finds a complete file. UserError where the disk
    refuses."""
    path = Path(path)
    if not path.parent.is_dir():
        prepare_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"expected to write {path}, got: {error.strerror or error}; free some "
                        "space, or name another folder with --out") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def complete_picture(path):
    """Yield a file in memory, which is written to `path` when the block ends without an error: the
    encoders of pictures do not notice a disk that takes only a part. UserError for a name that is
    neither .png nor .jpg."""
    if picture_format(path) is None:
        raise UserError(f"--out: expected a picture to write, .png or .jpg, got {path}")
    memory = io.BytesIO()
    yield memory
    with complete_file(path) as temporary:
        temporary.write_bytes(memory.getvalue())


def picture_format(path):
    """Pillow's name for the format of a picture; None for a suffix that is not ours."""
    return {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}.get(Path(path).suffix.lower())


def write_json(path, value):
    with complete_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))
