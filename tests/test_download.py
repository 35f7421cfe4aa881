"""Files from the web: complete, with their checksum, or one line."""
import hashlib
import http.server
import threading

import pytest
import torch

from engine import download
from engine.commands import open_detector
from engine.errors import UserError
from tiny_checkpoint import write_checkpoint

CONTENT = b"PK some weights" * 1000
CHECKSUM = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the name of the file that is asked for."""
    files = {}
    requests = []

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.requests.append(name)
        content = self.files.get(name)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        extra = 10 if name == "cut.pt" else 0
        self.send_header("Content-Length", str(len(content) + extra))
        self.end_headers()
        if name == "slow.pt":
            self.server.stopped.wait(10)
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A web server with a few files; PyTorch's cache is a folder of the test."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    Handler.files = {"a.pt": CONTENT, "cut.pt": CONTENT, "slow.pt": CONTENT, "empty.pt": b"",
                     "page.pt": b"\n<!DOCTYPE html><html>", "text.pt": b"Quota exceeded."}
    Handler.requests = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.stopped = threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.stopped.set()
    server.shutdown()
    server.server_close()


def cached(tmp_path):
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_file_is_downloaded_once_and_its_checksum_shown(site, tmp_path, capsys):
    for _ in range(2):
        path = download.fetch(site + "a.pt")
        assert path.read_bytes() == CONTENT and path.name == "a.pt"
        assert f"a.pt: sha256 {CHECKSUM}" in capsys.readouterr().out
    assert Handler.requests == ["a.pt"] and cached(tmp_path) == [path]


def test_a_checksum_that_is_given_is_compared(site, tmp_path):
    assert download.fetch(f"{site}a.pt#sha256={CHECKSUM}").read_bytes() == CONTENT
    wrong = CHECKSUM[:-1] + ("0" if CHECKSUM[-1] != "0" else "1")
    with pytest.raises(UserError, match=f"expected sha256 {wrong}, got {CHECKSUM}"):
        download.fetch(f"{site}a.pt#sha256={wrong.upper()}")


def test_a_damaged_file_of_the_cache_is_downloaded_again_where_the_checksum_is_given(site):
    path = download.fetch(site + "a.pt")
    path.write_bytes(b"damaged")
    assert download.fetch(f"{site}a.pt#sha256={CHECKSUM}").read_bytes() == CONTENT


FAULTS = {
    "missing": ("b.pt", "b.pt: expected a file, got HTTP 404"),
    "cut short": ("cut.pt", "expected 15010 bytes, got 15000|IncompleteRead"),
    "a web page": ("page.pt", "expected a file of weights, got a web page"),
    "another kind of file": ("text.pt", "expected a file of weights, got another kind of file"),
    "empty": ("empty.pt", "got an empty answer"),
    "no checksum": ("a.pt#md5=0", "expected #sha256= and 64 hexadecimal digits"),
    "another checksum": (f"a.pt#sha256={'0' * 64}", "expected sha256 0000.* nothing was kept")}


@pytest.mark.parametrize("name, message", FAULTS.values(), ids=FAULTS)
def test_what_is_not_the_file_ends_in_one_line_and_leaves_nothing(name, message, site, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        download.fetch(site + name)
    assert "\n" not in str(caught.value) and not cached(tmp_path)


def test_a_server_that_does_not_answer_in_time_is_one_line(site, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    with pytest.raises(UserError, match="slow.pt: expected a file, got: .*timed out; try again"):
        download.fetch(site + "slow.pt")
    assert not cached(tmp_path)


@pytest.mark.parametrize("address", [
    "ftp://host/a.pt", "file:///etc/passwd", "https://", "s3://a/b", "http://127.0.0.1:1/a.pt",
    "http://no-such-host.invalid/a.pt", "http://127.0.0.1:99999/a.pt", "http://[a/b"])
def test_foreign_and_dead_addresses_are_one_line(address, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(UserError, match="expected a"):
        download.fetch(address)


def test_a_checkpoint_is_opened_by_its_address(site, tmp_path):
    Handler.files["dino.pt"] = write_checkpoint(tmp_path / "dino.pt").read_bytes()
    detector = open_detector(site + "dino.pt")
    expected = torch.load(tmp_path / "dino.pt", weights_only=True)["model"]["level_embed"]
    assert torch.equal(detector.model.state_dict()["level_embed"], expected)


def test_the_settings_of_transformers_come_with_the_weights(site):
    Handler.files |= {"model.safetensors": CONTENT, "config.json": b"{}"}
    path = download.fetch(site + "model.safetensors")
    assert path.with_name("config.json").read_bytes() == b"{}"
