"""What exists on POSIX systems only has a guard, so that the programs start on Windows."""
import ast
import pickle
import re

import numpy as np
import pytest

import data
import scenes
from coco_folders import write_folder
from source_files import MODULES

POSIX_MODULES = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_NAMES = {
    "os": {"chown", "fchmod", "fork", "forkpty", "getloadavg", "getpgid", "getuid", "geteuid",
           "killpg", "mkfifo", "nice", "openpty", "sched_getaffinity", "sched_setaffinity",
           "setpgid", "setsid", "statvfs", "sysconf", "uname", "wait", "waitpid", "O_DIRECTORY",
           "O_NONBLOCK"},
    "signal": {"SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGUSR1",
               "SIGUSR2", "alarm", "pthread_kill", "pthread_sigmask", "setitimer", "sigwait"}}
# signal.SIGTERM means "kill at once" there, and os.kill knows few other signals.
POSIX_NAMES["os"].add("kill")
POSIX_PATHS = re.compile(r"/(dev|proc|tmp|sys|etc)(/|$)")
GUARDS = ("hasattr", "os.name", "sys.platform")
PATH_GUARDS = (*GUARDS, ".exists()", ".is_file()", "isdir(")


def parents_of(tree):
    """node -> the node around it"""
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def around(node, parents):
    """The nodes around a node, from the inside out."""
    while node in parents:
        node = parents[node]
        yield node


def is_guarded(node, parents):
    """Whether a test of the platform, or `except ImportError`, stands around a node."""
    for outer in around(node, parents):
        if isinstance(outer, (ast.If, ast.IfExp)):
            if any(guard in ast.unparse(outer.test) for guard in GUARDS):
                return True
        if isinstance(outer, ast.FunctionDef) and any(leaves(part, node) for part in outer.body):
            return True
        if isinstance(outer, ast.Try):
            if any("ImportError" in ast.unparse(handler) for handler in outer.handlers):
                return True
    return False


def leaves(part, node):
    """Whether a statement before a node leaves the function on other platforms."""
    if not isinstance(part, ast.If) or part.lineno > node.lineno:
        return False
    has_guard = any(guard in ast.unparse(part.test) for guard in GUARDS)
    return has_guard and isinstance(part.body[-1], (ast.Return, ast.Raise))


def path_is_guarded(node, parents):
    """Whether the function around a path asks if it exists."""
    for outer in around(node, parents):
        if isinstance(outer, ast.FunctionDef):
            return any(guard in ast.unparse(outer) for guard in PATH_GUARDS)
    return False


def is_text_for_people(node, parents):
    """Whether a string is a docstring or a part of a longer message."""
    return isinstance(parents.get(node), (ast.Expr, ast.JoinedStr)) or " " in node.value


def unguarded(text):
    """Names in a source file that exist on POSIX systems only and have no guard."""
    tree = ast.parse(text)
    parents = parents_of(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name in POSIX_MODULES]
            if names and not is_guarded(node, parents):
                found += names
        elif isinstance(node, ast.ImportFrom) and node.module in POSIX_MODULES:
            if not is_guarded(node, parents):
                found.append(node.module)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in POSIX_NAMES.get(node.value.id, ()) and not is_guarded(node, parents):
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if is_text_for_people(node, parents):
                continue
            if POSIX_PATHS.match(node.value) and not path_is_guarded(node, parents):
                found.append(node.value)
            call = parents.get(node)
            if node.value in ("fork", "forkserver") and "context" in ast.unparse(call):
                found.append(node.value)
    return found


@pytest.mark.parametrize("text, expected", [
    ("import fcntl", ["fcntl"]),
    ("try:\n    import fcntl\nexcept ImportError:\n    fcntl = None", []),
    ("os.kill(3, 9)", ["os.kill"]),
    ("os.fork() if hasattr(os, 'fork') else 0", []),
    ("if os.name == 'posix':\n    signal.signal(signal.SIGHUP, f)", []),
    ("def f():\n    if os.name != 'posix':\n        return\n    os.fork()", []),
    ("def f():\n    os.fork()\n    if os.name != 'posix':\n        return", ["os.fork"]),
    ("signal.signal(signal.SIGUSR1, f)", ["signal.SIGUSR1"]),
    ("def f():\n    return open('/dev/shm/a')", ["/dev/shm/a"]),
    ("def f():\n    if os.path.isdir('/dev/shm'):\n        return 1", []),
    ("multiprocessing.get_context('fork')", ["fork"])])
def test_the_search_finds_what_it_should(text, expected):
    assert unguarded(text) == expected


@pytest.mark.parametrize("name", MODULES)
def test_nothing_that_exists_on_posix_only_is_used_unguarded(name):
    assert unguarded(MODULES[name].read_text()) == []


def test_data_sets_can_be_sent_to_workers_that_are_not_forked(tmp_path):
    """Windows and macOS start workers afresh and send them the data set."""
    for dataset in (data.CocoFolder(write_folder(tmp_path)), scenes.Shapes("train", 4)):
        sent = pickle.loads(pickle.dumps(dataset))
        assert np.array_equal(sent[0][0], dataset[0][0])
