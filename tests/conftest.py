"""Fixtures.

Recorded inputs and outputs of the authors' code lie outside this repository, in a folder `shared`
beside the checkout or where PAPERDETR_SHARED points. Tests that need them skip and name the folder
when it is absent; with PAPERDETR_STRICT they fail instead. A test that is not slow and takes longer
than HANGS seconds ends its process with a trace. With --numprocesses that is one worker: the test
has failed, another worker goes on."""
import faulthandler
import os
import sys
from pathlib import Path

# read when torch is imported: waiting threads must not spin on a busy machine
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
if "PYTEST_XDIST_WORKER" in os.environ:              # one of --numprocesses
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

HANGS = 300
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long checks as well")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a long check, run with --slow")
    config.stderr = os.dup(2)   # not captured yet


@pytest.fixture(autouse=True)
def never_hang(request):
    if "slow" not in request.keywords:
        faulthandler.dump_traceback_later(HANGS, exit=True, file=request.config.stderr)
    yield
    faulthandler.cancel_dump_traceback_later()


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long check: add --slow"))


@pytest.fixture(scope="session")
def shared():
    """Folder of recorded data."""
    folder = Path(os.environ.get("PAPERDETR_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        message = (f"no recorded data at {folder}: set PAPERDETR_SHARED to the folder that holds "
                   "golden/ and data/")
        pytest.fail(message) if os.environ.get("PAPERDETR_STRICT") else pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def golden(shared):
    """`golden("05_matcher")` opens one recording as a dictionary of arrays."""
    return lambda name: dict(np.load(shared / "golden" / f"{name}.npz"))


@pytest.fixture(scope="session")
def recipe(shared):
    """The generator of the weights and images that full-size recordings use."""
    sys.path.insert(0, str(shared / "golden"))
    import recipe
    sys.path.remove(str(shared / "golden"))
    return recipe
