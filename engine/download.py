"""Files from the web: downloaded once into a cache, complete or not at all, with a checksum.

    fetch("https://host/dino.pth")                    prints the SHA-256 of the file
    fetch("https://host/dino.pth#sha256=0f3a...")     and refuses another one
"""
import hashlib
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from tqdm import tqdm

from engine.errors import UserError
from engine.files import complete_file
from engine.notices import one_line
from engine.processes import own_place

TIMEOUT = 30            # seconds without an answer
BLOCK = 1 << 20         # bytes read at a time
# transformers' names of weights; their settings are in config.json beside them.
WITH_CONFIG = ("model.safetensors", "pytorch_model.bin")


def is_url(text: str) -> bool:
    """Whether a text is an address on the web, and not a path."""
    return "://" in text


def fetch(address: str) -> Path:
    """Return the cached file of an address, downloaded if need be. Prints its SHA-256.

    address: http or https, optionally followed by #sha256= and the expected checksum

    The cache is a folder of PyTorch's (`torch.hub.get_dir()`). Raises UserError for an address that
    does not answer with a file, and for another checksum.
    """
    url, expected = split_address(address)
    path = cache_path(url)
    if not path.is_file() or expected not in ("", file_hash(path)):
        if path.name in WITH_CONFIG:
            beside = url.rpartition("/")[0] + "/config.json"
            download(beside, path.with_name("config.json"))
        download(url, path, expected)
    if own_place().rank == 0:
        print(f"{one_line(url, 300)}: sha256 {file_hash(path)}, kept at {path}")
    return path


def split_address(address: str) -> tuple[str, str]:
    """Return the address without its fragment, and the expected checksum, "" if there is none."""
    url, _, fragment = address.partition("#")
    if not is_web_address(url):
        raise UserError(f"expected an address as https://host/file, got {one_line(address, 200)!r};"
                        " give that, or the path of a file")
    if not fragment:
        return url, ""
    found = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if not found:
        raise UserError(f"expected #sha256= and 64 hexadecimal digits after the address, got "
                        f"#{one_line(fragment, 100)}; correct it, or leave it out")
    return url, found[1].lower()


def is_web_address(url: str) -> bool:
    """Whether a text is https://host/file or http://host/file."""
    try:
        parts = urlsplit(url)
        valid_port = parts.port is None or parts.port > 0
    except ValueError:
        return False
    has_file = bool(parts.path.strip("/")) and not re.search(r"\s", url)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and valid_port and has_file


def cache_path(url: str) -> Path:
    """Return where the file of an address is kept: a folder for each address, as names repeat."""
    folder = hashlib.sha256(url.encode()).hexdigest()[:16]
    name = unquote(urlsplit(url).path.rpartition("/")[2])
    name = re.sub(r"[^\w.\-]", "_", name).lstrip(".")[-100:] or "weights"
    return Path(torch.hub.get_dir()) / "paperdetr" / folder / name


def download(url: str, path: Path, expected: str = "") -> None:
    """Download a file to `path`, which appears when it is complete and has the checksum."""
    digest = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete_file(path) as temporary:
        with open(temporary, "wb") as file:
            for block in blocks(url, path.name):
                digest.update(block)
                file.write(block)
        if expected and digest.hexdigest() != expected:
            raise UserError(f"{one_line(url, 300)}: expected sha256 {expected}, got "
                            f"{digest.hexdigest()}: the file there is another one or was damaged; "
                            "nothing was kept")


def blocks(url: str, name: str) -> Iterator[bytes]:
    """Yield the content of an address, with a progress bar. Raises UserError for what fails."""
    request = urllib.request.Request(url, headers={"User-Agent": "paperDETR"})
    received = 0
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            total = response.length or 0       # 0: the server does not say
            hidden = True if own_place().rank else None    # None: no bar where there is no terminal
            with tqdm(total=total or None, unit="B", unit_scale=True, desc=name, leave=False,
                      disable=hidden) as bar:
                while block := response.read(BLOCK):
                    if not received:
                        refuse_other_files(url, name, block)
                    received += len(block)
                    bar.update(len(block))
                    yield block
    except urllib.error.HTTPError as error:
        raise UserError(f"{one_line(url, 300)}: expected a file, got HTTP {error.code} "
                        f"{error.reason}; correct the address") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{one_line(url, 300)}: expected a file, got: {one_line(str(reason))}; "
                        "try again, or download it by other means and give its path") from error
    if received < total:
        raise UserError(f"{one_line(url, 300)}: expected {total} bytes, got {received}: the "
                        "connection broke off; try again")
    if not received:
        raise UserError(f"{one_line(url, 300)}: expected a file, got an empty answer; correct the "
                        "address")


def refuse_other_files(url: str, name: str, block: bytes) -> None:
    """Raise UserError for what does not begin as weights do, so that it is not kept.

    It is often a page: an address that a browser shows is not that of the file.
    """
    if block.lstrip()[:1] == b"<":
        raise UserError(f"{one_line(url, 300)}: expected a file of weights, got a web page: give "
                        "the address behind its download button")
    # an archive of torch.save, a pickle, or safetensors, whose header follows 8 bytes of length
    is_weights = block[:2] == b"PK" or block[:1] == b"\x80" or block[8:9] == b"{"
    if not is_weights and name != "config.json":
        raise UserError(f"{one_line(url, 300)}: expected a file of weights, got another kind of "
                        "file; correct the address")


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
