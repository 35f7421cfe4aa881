"""Results on disk are complete or absent, whatever the disk takes."""
import contextlib
import resource

import numpy as np
import pytest
from PIL import Image

from engine import drawing
from engine.errors import UserError
from engine.files import complete_file, complete_picture, write_json
import scenes


@contextlib.contextmanager
def file_limit(size):
    """Inside, no file of this process gets longer than `size` bytes; that of the log of a test run
    must not be among them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_picture_of_which_the_disk_takes_a_part_is_absent(tmp_path, suffix):
    """Encoders of pictures write by themselves, and take a part for the whole at the end."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    whole = tmp_path / f"whole{suffix}"
    drawing.save_picture(Image.fromarray(pixels), whole)
    size = whole.stat().st_size
    for limit in (0, 1, size // 2, size - 1):
        with file_limit(limit), pytest.raises(
                UserError,
                match=f"expected to write .*a{suffix}, got: File too large"):
            drawing.save_picture(Image.fromarray(pixels), tmp_path / f"a{suffix}")
    assert list(tmp_path.iterdir()) == [whole]


def test_a_json_of_which_the_disk_takes_a_part_leaves_the_one_of_before(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with file_limit(100), pytest.raises(UserError, match="a.json, got: File too large"):
        write_json(tmp_path / "a.json", {"a": "x" * 1000})
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{\n "a": 1\n}']


def test_scenes_of_which_the_disk_takes_a_part_have_no_half_files(tmp_path):
    with file_limit(1000), pytest.raises(UserError, match="000000.png, got: File too large"):
        scenes.write_scenes(tmp_path / "data", 2, 1)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_error_of_the_block_is_passed_on_and_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), complete_file(tmp_path / "a") as temporary:
        temporary.write_text("x")
        raise KeyError
    with pytest.raises(KeyError), complete_picture(tmp_path / "a.png"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file/a.json", tmp_path / "file/b/a.json"):
        with pytest.raises(UserError, match="--out: expected a folder"):
            write_json(path, 1)
