"""Building, caching, loading and verifying the kernels of the deformable attention."""
import ctypes.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import deformable_attn_build as build
import deformable_attn_operator as operator
from deformable_attn import ms_deform_attn

ROOT = Path(build.__file__).parent
FILES = ["deformable_attn.py", "deformable_attn_operator.py", "deformable_attn_build.py",
         "deformable_attn_kernel.cpp", "deformable_attn_kernel.cu"]


def python(code, folder=ROOT, **environment):
    """Run code in a fresh interpreter -> its completed process."""
    return subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=folder,
                          env=os.environ | environment, capture_output=True, text=True)


def fake_compiler(path, text, code=1):
    """A compiler that leaves a mark, prints `text` and exits with `code`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = f'echo called >> "{path.parent}/called"'
    path.write_text(f'#!/bin/sh\n{mark}\necho "{text}" >&2\nexit {code}\n')
    path.chmod(0o755)
    return path


def test_import_never_compiles_nor_loads_the_compiler_of_pytorch(tmp_path):
    for name in ("c++", "g++", "nvcc", "ninja"):
        fake_compiler(tmp_path / "bin" / name, "no compiler here")
    modules = [path.stem for path in sorted(ROOT.glob("*.py"))]
    program = f"import sys, {', '.join(modules)}; assert 'torch._dynamo' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, text=True,
        capture_output=True, env=os.environ | dict(PATH=str(tmp_path / "bin"),
                                                   TORCH_EXTENSIONS_DIR=str(tmp_path / "cache")))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "bin" / "called").exists()
    assert not (tmp_path / "cache").exists()


USE = """
import torch, deformable_attn as d
value = torch.ones(1, 4, 1, 2)
locations = torch.full((1, 1, 1, 1, 1, 2), 0.5)
weights = torch.ones(1, 1, 1, 1, 1)
for _ in range(3):
    print(d.ms_deform_attn(value, [(2, 2)], locations, weights).tolist())
"""


def forget_kernels():
    build.load_kernels.cache_clear()
    operator._verify.cache_clear()


@pytest.fixture
def fall_back(monkeypatch, capsys):
    """Use the operator with nothing built yet: the right output and one warning, its text."""
    def use(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        forget_kernels()
        with pytest.warns(UserWarning) as record:
            exec(USE, {})
        assert capsys.readouterr().out.splitlines() == ["[[[1.0, 1.0]]]"] * 3
        warning, = record
        return str(warning.message)
    yield use
    forget_kernels()


BROKEN = "kernel.cpp:3: error: this compiler is broken"
LINKER = "/usr/bin/ld: cannot find -lcudart: No such file or directory"


@pytest.mark.parametrize("text, reason", [
    (f"In file included:\n{BROKEN}\nmore", BROKEN),
    (f"{LINKER}\ncollect2: error: ld returned 1 exit status", LINKER),
    ("ld: library not found for -lomp\nclang: error: linker command failed with exit code 1",
     "ld: library not found for -lomp"),
    ("a.o: undefined reference to `f'\ncollect2: error: ld returned 1 exit status\nninja: build "
     "stopped: subcommand failed.", "a.o: undefined reference to `f'"),
])
def test_a_broken_compiler_falls_back_and_the_message_names_the_cause(
        tmp_path, fall_back, text, reason):
    compiler = fake_compiler(tmp_path / "compiler", text.replace("`", "\\`"))
    message = fall_back(CXX=compiler, TORCH_EXTENSIONS_DIR=tmp_path / "cache")
    assert f"failed: {reason};" in message + ";"
    assert list((tmp_path / "cache").glob("*")) == []


def test_an_absent_compiler_falls_back(tmp_path, fall_back):
    cache = tmp_path / "cache"
    message = fall_back(CXX=tmp_path / "absent", TORCH_EXTENSIONS_DIR=cache)
    assert "no C++ compiler" in message and "install g++" in message


def test_a_compiler_that_leaves_no_library_falls_back(tmp_path, fall_back):
    compiler = fake_compiler(tmp_path / "compiler", "done", code=0)
    message = fall_back(CXX=compiler, TORCH_EXTENSIONS_DIR=tmp_path / "cache")
    assert "failed: done" in message


def test_a_compiler_that_never_ends_falls_back(tmp_path, fall_back, monkeypatch):
    monkeypatch.setattr(build, "COMPILE_SECONDS", 0.2)
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\nsleep 20\n")
    compiler.chmod(0o755)
    start = time.monotonic()
    message = fall_back(CXX=compiler, TORCH_EXTENSIONS_DIR=tmp_path / "cache")
    assert "without an end" in message
    assert time.monotonic() - start < 10


@pytest.fixture
def pretend_gpu(tmp_path, monkeypatch):
    """The CUDA build as it runs with a GPU -> the message of its one warning."""
    def load():
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
        monkeypatch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
        with pytest.warns(UserWarning, match="plain PyTorch") as record:
            assert isinstance(build.load_kernels.__wrapped__("cuda", 0), build.BuildError)
        messages = [str(warning.message) for warning in record]
        message, = [message for message in messages if "plain PyTorch" in message]
        assert list((tmp_path / "cache").glob("*")) == []
        return message
    return load


@pytest.mark.filterwarnings("ignore")
def test_a_broken_nvcc_falls_back(tmp_path, monkeypatch, pretend_gpu):
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    if not cpp_extension.is_ninja_available():
        pytest.skip("no ninja")
    text = "kernel.cu(3): error: this nvcc is broken\nmore"
    fake_compiler(tmp_path / "cuda" / "bin" / "nvcc", text)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path / "cuda"))
    assert "kernel.cu(3): error: this nvcc is broken" in pretend_gpu()
    assert (tmp_path / "cuda" / "bin" / "called").exists()


def test_a_missing_setuptools_falls_back(monkeypatch, pretend_gpu):
    monkeypatch.delitem(sys.modules, "torch.utils.cpp_extension", raising=False)
    monkeypatch.delattr(torch.utils, "cpp_extension", raising=False)
    monkeypatch.setitem(sys.modules, "setuptools", None)
    message = pretend_gpu()
    assert "setuptools" in message and "; pip install setuptools" in message


@pytest.mark.filterwarnings("ignore")
def test_the_cuda_kernel_is_linked_with_the_runtime_that_pytorch_has_loaded(
        tmp_path, monkeypatch, pretend_gpu):
    """Where nvcc is a script on the PATH, there is no libcudart beside it."""
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    library = tmp_path / "libcudart.so.13"
    library.write_bytes(b"")
    names = []

    def loaded(name):
        names.append(name)
        return str(library)

    def load(name, sources, extra_ldflags, build_directory, **options):
        flag, = extra_ldflags
        folder = Path(flag.removeprefix("-L"))
        assert (folder / "libcudart.so").samefile(library)
        assert folder.parent == Path(build_directory)

    monkeypatch.setattr(build, "_loaded_library", loaded)
    monkeypatch.setattr(cpp_extension, "load", load)
    assert "left no library" in pretend_gpu()
    assert names == ["libcudart.so"]


def test_a_library_of_this_process_is_found_by_its_name():
    assert re.fullmatch(r"/.*/libtorch_cpu\.so", build._loaded_library("libtorch_cpu.so"))
    assert build._loaded_library("libnothing.so") is None


@pytest.mark.filterwarnings("ignore")
def test_a_cuda_build_that_leaves_no_library_falls_back(monkeypatch, pretend_gpu):
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    monkeypatch.setattr(cpp_extension, "load", lambda *args, **options: None)
    assert "left no library" in pretend_gpu()


# ---- The cache -----------------------------------------------------------------------------------

def compile_constant(number):
    """A stand-in for the compiler: a library whose function `number` returns a constant."""
    def compile(source, scratch):
        compile.calls += 1
        code = scratch / "number.cpp"
        code.write_text(f'extern "C" int number() {{ return {number}; }}')
        command = ["c++", "-shared", "-fPIC", str(code), "-o", str(scratch / "kernel.so")]
        subprocess.run(command, check=True)
        return scratch / "kernel.so"
    compile.calls = 0
    return compile


@pytest.mark.parametrize("damage", ["emptied", "cut", "flipped", "foreign"])
def test_a_damaged_library_in_the_cache_is_compiled_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    compile = compile_constant(7)
    path = build._cache_path(ROOT / "deformable_attn_kernel.cpp", "cpp", [damage])
    build._compile_into(path, ROOT / "deformable_attn_kernel.cpp", compile)
    content = path.read_bytes()
    path.unlink()                       # a file that is mapped must not change under its readers
    if damage == "emptied":
        content = b""
    elif damage == "cut":
        content = content[:len(content) // 2]
    elif damage == "flipped":
        content = content[:1000] + bytes([content[1000] ^ 255]) + content[1001:]
    else:
        content = Path(ctypes.util.find_library("c") or sys.executable).name.encode()
    path.write_bytes(content)
    assert build.load_library("cpp", [damage], compile).number() == 7
    assert compile.calls == 2
    assert build.load_library("cpp", [damage], compile).number() == 7
    assert compile.calls == 2


def test_a_library_that_does_not_load_is_compiled_once_more_then_given_up(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    calls = []

    def compile(source, scratch):
        calls.append(source)
        (scratch / "kernel.so").write_bytes(b"no library")
        return scratch / "kernel.so"

    for expected in (1, 2):
        with pytest.raises(build.BuildError, match="so: .*TORCH_EXTENSIONS_DIR"):
            build.load_library("cpp", ["x"], compile)
        assert len(calls) == expected


def test_the_library_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    events = []
    fsync = os.fsync
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (events.append("fsync"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("rename"), replace(*names)))
    build.load_library("cpp", ["y"], compile_constant(1))
    assert events == ["fsync", "rename"]


def test_cache_key(tmp_path, monkeypatch):
    """Another source, torch, CUDA or architecture is another file."""
    source = tmp_path / "kernel.cu"
    source.write_text("// first")

    def name(*facts):
        return build._cache_path(source, "cu", facts).name

    names = {name("13.0", "90"), name("13.0", "80"), name("12.8", "90")}
    assert name("13.0", "90") in names
    monkeypatch.setattr(torch, "__version__", "2.99")
    names.add(name("13.0", "90"))
    monkeypatch.undo()
    source.write_text("// second")
    names.add(name("13.0", "90"))
    assert len(names) == 5


def test_an_unwritable_cache_falls_back(tmp_path, fall_back):
    (tmp_path / "file").write_text("")
    message = fall_back(TORCH_EXTENSIONS_DIR=tmp_path / "file" / "cache")
    assert "TORCH_EXTENSIONS_DIR" in message


# ---- The kernel files ----------------------------------------------------------------------------

def test_no_deprecated_aten():
    for suffix in ("cpp", "cu"):
        source = (ROOT / f"deformable_attn_kernel.{suffix}").read_text()
        for spelling in (".type()", "THC", ".data<", "printf(", "AT_ASSERTM", "torch/", "ATen"):
            assert spelling not in source, spelling


def test_the_problem_struct_is_the_same_in_all_three_files():
    fields = []
    for suffix in ("cpp", "cu"):
        source = (ROOT / f"deformable_attn_kernel.{suffix}").read_text()
        struct = re.search(r"struct Problem \{(.*?)\n\};", source, re.S)[1]
        fields.append(re.findall(r"\*?(\w+)(?:\[32\])?[,;]", re.sub(r"//.*", "", struct)))
    assert fields[0] == fields[1] == [name for name, _ in build.Problem._fields_]


def test_the_five_files_work_copied_alone(tmp_path):
    if isinstance(build.load_kernels("cpu", None), build.BuildError):
        pytest.skip("no kernel")
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    done = python(USE, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("architecture", [80, 90])
def test_nvcc_compiles(tmp_path, architecture):
    """Without optimization, which takes most of the time and warns of nothing."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on the PATH")
    # PyTorch compiles extensions with these.
    flags = [f"-D__CUDA_NO_{name}__" for name in (
        "HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")]
    command = ["nvcc", "-std=c++17", f"-arch=sm_{architecture}", "-Werror", "all-warnings", *flags,
               "-Xcicc", "-O0", "-Xptxas", "-O0", "-cubin", str(ROOT / "deformable_attn_kernel.cu"),
               "-o", str(tmp_path / "kernel.cubin")]
    subprocess.run(command, check=True)


@pytest.mark.parametrize("architecture, major, minor, expected", [
    (900, 12, 1, True), (900, 13, 0, True), (900, 12, 0, False), (900, 11, 8, False),
    (800, 13, 0, False)])
def test_the_addition_of_four_floats_needs_sm_90_and_cuda_12_1(
        tmp_path, architecture, major, minor, expected):
    source = (ROOT / "deformable_attn_kernel.cu").read_text()
    (tmp_path / "kernel.cpp").write_text(re.sub(r"#include.*", "", source))
    done = subprocess.run(
        ["c++", "-E", f"-D__CUDA_ARCH__={architecture}", f"-D__CUDACC_VER_MAJOR__={major}",
         f"-D__CUDACC_VER_MINOR__={minor}", str(tmp_path / "kernel.cpp")],
        capture_output=True, text=True, check=True)
    assert f"ADDED = {int(expected)} &&" in done.stdout


# ---- The comparison at first use -----------------------------------------------------------------

ONE_POINT = (torch.ones(1, 4, 1, 2), [(2, 2)], torch.full((1, 1, 1, 1, 1, 2), 0.5),
             torch.ones(1, 1, 1, 1, 1))


@pytest.fixture
def wrong_kernel(tmp_path, monkeypatch):
    """Compile the C++ loops with one passage replaced."""
    def use(passage, replacement):
        for name in FILES:
            shutil.copy(ROOT / name, tmp_path)
        kernel = tmp_path / "deformable_attn_kernel.cpp"
        source = kernel.read_text()
        assert source.count(passage) == 1
        kernel.write_text(source.replace(passage, replacement))
        monkeypatch.setattr(build, "__file__", str(tmp_path / "deformable_attn_build.py"))
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
        monkeypatch.setattr(build, "CPU_FLAGS", [f for f in build.CPU_FLAGS if f != "-O3"])
        forget_kernels()
    yield use
    forget_kernels()


@pytest.mark.parametrize("passage, replacement, wrong", [
    ("s.area[1][i] = (1 - fy) * fx;", "s.area[1][i] = (1 - fy) * (1 - fx);", "output"),
    ("gv[2][d] += a[2] * g[d];", "gv[2][d] -= a[2] * g[d];", "gradient of value"),
    ("grad_location[2 * i + 1] = s.H[i] * grad_y;", "grad_location[2 * i + 1] = s.W[i] * grad_y;",
     "gradient of reference"),
    ("grad_weight[i] = s.A[i] * (grad_weight[i] - mean);", "grad_weight[i] = s.A[i] * mean;",
     "gradient of weights"),
])
def test_a_wrong_kernel_ends_in_one_error_that_names_the_way_on(
        wrong_kernel, passage, replacement, wrong):
    wrong_kernel(passage, replacement)
    for _ in range(2):
        with pytest.raises(operator.KernelError, match=wrong) as caught:
            ms_deform_attn(*ONE_POINT)
        assert "--impl torch" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(operator.KernelError):
        operator.verify_kernel("cpu")
    assert ms_deform_attn(*ONE_POINT, impl="torch").tolist() == [[[1.0, 1.0]]]


def test_the_comparison_leaves_no_trace():
    """No random number is drawn, and no mode of the caller reaches it."""
    if isinstance(build.load_kernels("cpu", None), build.BuildError):
        pytest.skip("no kernel")
    operator._verify.cache_clear()
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert operator.verify_kernel("cpu")
    assert torch.equal(torch.get_rng_state(), state)
    start = time.perf_counter()
    assert operator.verify_kernel("cpu")
    assert time.perf_counter() - start < 0.1


def test_a_forked_process_does_not_wait_for_threads_it_does_not_have():
    if isinstance(build.load_kernels("cpu", None), build.BuildError):
        pytest.skip("no kernel")
    done = python("""
import os, time, torch
import deformable_attn as d
torch.set_num_threads(2)
problem = (torch.ones(1, 4, 1, 2), [(2, 2)], torch.full((1, 40, 1, 1, 1, 2), 0.5),
           torch.ones(1, 40, 1, 1, 1))
d.ms_deform_attn(*problem)
child = os.fork()
if not child:
    d.ms_deform_attn(*problem)
    os._exit(3)
for _ in range(100):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        break
    time.sleep(0.1)
else:
    os.kill(child, 9)
    raise SystemExit("the child hangs")
assert os.waitstatus_to_exitcode(status) == 3
""")
    assert done.returncode == 0, done.stderr
