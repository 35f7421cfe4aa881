"""Compile and load the kernels of deformable_attn.py, as libraries of C functions.

Nothing is compiled at import. The first use of the operator on a device compiles its kernel into
~/.cache/torch_extensions (or TORCH_EXTENSIONS_DIR). Where that fails, one warning says why, and the
reference implementation runs in its place.
"""
import ctypes
import functools
import hashlib
import os
import platform
import re
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
MAX_LEVELS = 32                 # of `struct Problem`
COMPILE_SECONDS = 600           # of the C++ compiler
CPU_FLAGS = [
    "-std=c++17", "-shared", "-fPIC", "-O3", "-march=native", "-fopenmp",
    # Sums may be reordered, which lets them be vectorized. NaN and infinity keep their meaning.
    "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros",
]


class BuildError(RuntimeError):
    """A kernel could not be built; the message says why and what would help."""


# ---- The kernel files as libraries of C functions ------------------------------------------------

class Problem(ctypes.Structure):
    """`struct Problem` of the kernel files, field by field."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in (
            "value", "points", "weights", "reference", "grad_output",
            "output", "grad_value", "grad_points", "grad_weights", "grad_locations",
            "cells", "corner_weights", "rows", "first")]
        + [(name, ctypes.c_int64) for name in ("B", "S", "Nq")]
        + [(name, ctypes.c_int) for name in ("M", "D", "L", "K", "reference_size", "threads")]
        + [(name, ctypes.c_int * MAX_LEVELS) for name in ("H", "W", "start")]
    )


class Kernels:
    """One compiled kernel file. It computes in `dtypes`; values of others are cast to float32."""

    def __init__(self, library, dtypes):
        self.library = library
        self.dtypes = dtypes
        self.process = os.getpid()

    def __call__(self, name, shapes, value, points, **tensors):
        """Run one entry point. Every tensor must be contiguous and 16-byte aligned."""
        B, S, M, D = value.shape
        Nq, L, K = points.shape[1], points.shape[3], points.shape[4]
        problem = Problem(value=value.data_ptr(), points=points.data_ptr())
        for key, tensor in tensors.items():
            if tensor is not None:
                setattr(problem, key, tensor.data_ptr())
        for key, number in dict(B=B, S=S, Nq=Nq, M=M, D=D, L=L, K=K).items():
            setattr(problem, key, number)
        if tensors.get("reference") is not None:
            problem.reference_size = tensors["reference"].shape[-1]
        # A forked process inherits OpenMP's list of threads without the threads: waiting for them
        # would never end, so it uses one.
        problem.threads = torch.get_num_threads() if os.getpid() == self.process else 1
        start = 0
        for l in range(L):
            problem.H[l] = shapes[2 * l]
            problem.W[l] = shapes[2 * l + 1]
            problem.start[l] = start
            start += shapes[2 * l] * shapes[2 * l + 1]
        self.launch(getattr(self.library, f"{name}_{DTYPES[value.dtype]}"), problem, value.device)

    def launch(self, function, problem, device):
        """Call one C function on the device's current stream. Raises RuntimeError by its code."""
        if device.type == "cpu":
            code = function(ctypes.byref(problem), None)
        else:
            with torch.cuda.device(device):
                stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
                code = function(ctypes.byref(problem), stream)
        if code:
            self.library.error_text.restype = ctypes.c_char_p
            message = self.library.error_text(code).decode()
            raise RuntimeError(f"{function.__name__} on {device}: {message}")


@functools.cache
def load_kernels(device_type, index):
    """The kernels of a device, compiled first where needed, or the BuildError that says why not."""
    try:
        if device_type == "cpu":
            library = load_library("cpp", [*CPU_FLAGS, _cpu_name()], _compile_cpu)
            return Kernels(library, (torch.float32, torch.float64))
        if device_type == "cuda" and torch.version.cuda:
            major, minor = torch.cuda.get_device_capability(index)
            return Kernels(load_cuda(f"{major}{minor}"), tuple(DTYPES))
        raise BuildError(f"there is no kernel for device {device_type!r}")
    except BuildError as error:
        consequence = "slower, and with more memory"
        if device_type == "cpu":
            consequence = "a training step takes about 1.7 times as long"
        warnings.warn(f"deformable attention runs as plain PyTorch ({consequence}): {error}")
        return error


# ---- The compiler and its cache ------------------------------------------------------------------

def load_library(suffix, facts, compile):
    """The compiled deformable_attn_kernel.<suffix>, from the cache where an intact one lies there.

    suffix: "cpp" or "cu". facts: strings that the machine code depends on, beside the source and
    the version of torch. compile(source, folder) -> path of the library. Raises BuildError.
    """
    try:
        source = Path(__file__).with_name(f"deformable_attn_kernel.{suffix}")
        target = _cache_path(source, suffix, facts)
        fresh = not _is_intact(target)
        if fresh:
            _compile_into(target, source, compile)
        try:
            return ctypes.CDLL(str(target))
        except OSError:
            if fresh:
                raise
        # It was compiled where the libraries that it links lay elsewhere.
        _compile_into(target, source, compile)
        return ctypes.CDLL(str(target))
    except OSError as error:
        remedy = "TORCH_EXTENSIONS_DIR names the folder for compiled kernels"
        raise BuildError(f"{error}; {remedy}") from error


def _cache_path(source, suffix, facts):
    """A name made of everything the machine code depends on: no outdated library is loaded."""
    text = "\n".join([source.read_text(), torch.__version__, *facts])
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    default = Path.home() / ".cache" / "torch_extensions"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", default))
    return folder / f"deformable_attn_{suffix}_{key}.so"


def _is_intact(path):
    """Whether a library ends with the SHA-256 of what stands before it. Loaders ignore the end."""
    content = path.read_bytes() if path.exists() else b""
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _compile_into(target, source, compile):
    """Compile in a folder of its own, then rename: a killed build leaves nothing to be loaded."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="deformable_attn_build_") as scratch:
        library = compile(source, Path(scratch))
        digest = hashlib.sha256(library.read_bytes()).digest()
        with library.open("ab") as file:
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        os.replace(library, target)


def _compile_cpu(source, scratch):
    compiler = os.environ.get("CXX", "c++")
    target = scratch / "kernel.so"
    log = scratch / "log"
    command = [compiler, *CPU_FLAGS, str(source), "-o", str(target)]
    try:
        # Messages go to a file: the end of a pipe would wait for what a killed compiler started.
        with log.open("wb") as file:
            run = subprocess.run(command, stdout=file, stderr=file, timeout=COMPILE_SECONDS)
    except FileNotFoundError as error:
        message = f"no C++ compiler {compiler!r}; install g++ or clang++, or set CXX"
        raise BuildError(message) from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{compiler} ran for {COMPILE_SECONDS} s without an end") from error
    if run.returncode or not target.exists():
        raise BuildError(f"{compiler} failed: {_first_error(log.read_text(errors='replace'))}")
    return target


def load_cuda(architecture):
    """The CUDA library for one architecture, such as "90". Needs nvcc, ninja and setuptools."""

    def compile(source, scratch):
        flags = ["-O3", f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
        try:
            # Not at the top: this import searches for compilers, and needs setuptools.
            from torch.utils import cpp_extension
            cpp_extension.load("deformable_attn_kernel", [str(source)], extra_cuda_cflags=flags,
                               extra_ldflags=_link_cuda_runtime(scratch / "link"),
                               build_directory=str(scratch), is_python_module=False)
        except ImportError as error:
            raise BuildError(f"the CUDA build failed: {error}; pip install setuptools") from error
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            raise BuildError(f"the CUDA build failed: {_first_error(str(error))}") from error
        libraries = [*scratch.glob("*.so"), *scratch.glob("*.pyd")]
        if not libraries:
            raise BuildError("the CUDA build failed: it ended without an error and left no library")
        return libraries[0]

    return load_library("cu", [str(torch.version.cuda), architecture], compile)


def _link_cuda_runtime(folder):
    """Linker flags by which -lcudart is the CUDA runtime of PyTorch: beside nvcc there may be none,
    where nvcc is a script on the PATH, or comes from pip's packages."""
    loaded = _loaded_library("libcudart.so")
    if loaded:
        folder.mkdir()
        (folder / "libcudart.so").symlink_to(loaded)
    return [f"-L{folder}"]      # linkers skip a folder that does not exist


def _loaded_library(name):
    """Path of a library of this process, or None."""
    maps = Path("/proc/self/maps")
    text = maps.read_text() if maps.exists() else ""
    found = re.search(rf"/.*/{re.escape(name)}[.\d]*", text)
    return found and found[0]


def _first_error(log):
    """The line of a compiler's or linker's output that says what is wrong."""
    lines = [line.strip() for line in log.strip().splitlines()] or ["no message"]
    consequence = r"ld returned|linker command failed|build stopped"
    causes = [line for line in lines if not re.search(consequence, line)]
    for pattern in (r"\b(error|fatal)\b", r"cannot find|not found|undefined (reference|symbol)"):
        for line in causes:
            if re.search(pattern, line):
                return line
    return lines[-1]


def _cpu_name():
    """What -march=native depends on: different machines may share one cache folder."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor() + platform.machine()
