"""tools/bench_gpu.py, bench_peers.py and gpu_tables.py: a rehearsal on the CPU, what failing parts
leave behind, other implementations (stand-ins with their interfaces), and the tables."""
import json
import os
import sys
import types

import pytest
import torch

from deformable_attn import ms_deform_attn_torch
from engine.errors import UserError
from source_files import ROOT
from tools import bench, bench_gpu, bench_peers, gpu_tables
from tools.bench_gpu import PARTS
from tools.bench_kernel import make_inputs
from tools.bench_peers import IMPLEMENTATIONS

CASE, DECODER = bench_gpu.CASES["cpu"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def float32_only(monkeypatch):
    monkeypatch.setattr(bench_gpu, "LIMITS", {torch.float32: 1e-4})


def results_of(*names):
    """The results of parts that run in this process."""
    results = bench_gpu.describe_run("cpu")
    for name in names:
        rows = json.loads(json.dumps(list(PARTS[name].rows("cpu"))))
        results["parts"][name] = {"rows": rows, "failed": "", "seconds": 1.0}
    return results


# ---- the rehearsal -------------------------------------------------------------------------------

def test_the_rehearsal_measures_kernels_and_writes_their_tables(float32_only):
    names = ("machine", "correctness", "kernel: ours", "kernel: ours, fused",
             "kernel: ours, fused, deterministic", "kernel: PyTorch", "timing")
    results = results_of(*names)
    assert all(row["ok"] for row in results["parts"]["correctness"]["rows"])
    text = gpu_tables.tables(results)
    assert "**no**" not in text and "failed" not in text
    for case in ("encoder, tiny, batch 1, all queries", "decoder, tiny, batch 1, 5 queries"):
        assert text.count(f"| {case} |") == 1
    assert text.count("| float32 | ours, fused |") == 2
    assert text.count("lower bound: device memory") == 2
    assert "a synchronization after every call" in text


def test_every_part_has_a_limit_and_the_first_ones_matter_most():
    assert list(PARTS)[:2] == ["machine", "correctness"]
    assert {f"kernel: {name}" for name in IMPLEMENTATIONS} < set(PARTS)
    for precision in ("float32", "TF32", "bfloat16"):
        assert {f"step: {precision}", f"step: {precision}, compiled"} < set(PARTS)
    assert all(5 < part.seconds < 200 for part in PARTS.values())


def test_a_wrong_kernel_is_reported_as_wrong(float32_only, monkeypatch):
    def wrong(case, inputs):
        call = bench_peers.plain(case, inputs)
        return call._replace(forward=lambda: 1.001 * call.forward())

    monkeypatch.setitem(IMPLEMENTATIONS, "ours", IMPLEMENTATIONS["ours"]._replace(prepare=wrong))
    results = results_of("correctness")
    assert [row["ok"] for row in results["parts"]["correctness"]["rows"]] == [
        True, False, True, False, True, True]
    assert gpu_tables.tables(results).count("**no**") == 2


@pytest.mark.parametrize("dtype", bench_gpu.LIMITS)
def test_correct_kernels_pass_the_check_at_sizes_of_a_gpu(dtype, monkeypatch):
    """In an encoder of half precision many points would lie at centers of pixels, where rounding
    chooses between two gradients of a location."""
    monkeypatch.setitem(bench_gpu.CHECKED, "cpu", bench_gpu.CHECKED["cuda"][:2])
    monkeypatch.setattr(bench_gpu, "LIMITS", {dtype: bench_gpu.LIMITS[dtype]})
    rows = list(bench_gpu.correctness("cpu"))
    assert [row["what"] for row in rows if not row["ok"]] == []


def test_an_element_that_nobody_writes_is_an_error():
    inputs = make_inputs(CASE, "cpu", torch.float32, False, 0)
    call = bench_peers.plain(CASE, inputs)

    def forward():
        output = call.forward()
        return torch.where(torch.arange(len(output[0, 0])) == 3, torch.nan, output)

    assert not bench_peers.errors(call._replace(forward=forward))[0] <= 1


@pytest.mark.slow
def test_a_full_rehearsal_ends_with_no_failed_part(tmp_path):
    """Every part, each in its own process: about five minutes."""
    bench.main(["gpu", "--device", "cpu", "--minutes", "30"])
    results = json.loads((tmp_path / "runs" / "bench" / "gpu_cpu.json").read_text())
    failed = {name: part["failed"] for name, part in results["parts"].items() if part["failed"]}
    assert set(failed.values()) <= {"not installed"}, failed
    assert list(results["parts"]) == list(PARTS)


def test_memory_beside_the_inputs_is_the_peak_of_the_second_call(monkeypatch):
    """With a stand-in for the counters of a GPU; the first call may compile."""
    used = {"now": 100, "peak": 0}

    def call():
        used["peak"] = max(used["peak"], used["now"] + 3 * 2 ** 20)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: used["now"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: used.update(peak=0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: used["peak"])
    assert bench_gpu.peak_mib(call, "cuda") == 3.0
    assert bench_gpu.peak_mib(call, "cpu") is None


# ---- parts that fail -----------------------------------------------------------------------------

ROW = '{"what": "copy", "unit": "TB/s", "value": 1.0}'
SCRIPTS = {
    "machine": f"import sys; open(sys.argv[1], 'w').write('{ROW}\\n' '{{\"what'); sys.exit('so')",
    "timing": "import time; time.sleep(60)",
    "memory": "import os; os.write(2, b'last words\\n'); os.kill(os.getpid(), 9)"}


def test_parts_that_crash_hang_or_are_missing_are_one_line_each(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_gpu, "child_command", lambda name, device, rows: [
        sys.executable, "-S", "-c", SCRIPTS[name], str(rows)])
    monkeypatch.setitem(PARTS, "timing", PARTS["timing"]._replace(seconds=1))
    monkeypatch.setitem(bench_gpu.SLOWER, "cpu", 1)
    monkeypatch.setattr(bench_gpu, "LEAST", 0.5)
    parts = ("machine", "kernel: mmcv", "timing", "memory")
    bench_gpu.gpu("cpu", minutes=1, parts=parts, out="a.json")
    results = json.loads((tmp_path / "a.json").read_text())["parts"]
    assert {name: part["failed"] for name, part in results.items()} == {
        "machine": "so", "kernel: mmcv": "not installed",
        "timing": "ended after its limit of 1 s", "memory": "ended by signal 9"}
    assert results["memory"]["log"] == "last words\n"
    assert results["machine"]["rows"] == [json.loads(ROW)]   # the complete line that it wrote
    table = (tmp_path / "a.md").read_text()
    assert "| timing | ended after its limit of 1 s |" in table
    assert table in capsys.readouterr().out


def test_of_a_failed_test_its_name_is_kept(monkeypatch):
    monkeypatch.setitem(bench_gpu.TESTS, "cpu", [["tests/missing.py"]])
    row, = bench_gpu.run_tests("cpu")
    assert not row["ok"] and "not found: " in row["log"] and "tests/missing.py" in row["log"]


def test_a_step_without_enough_memory_is_one_row_and_the_next_is_measured(monkeypatch):
    def step_cost(setting):
        if not setting.recompute:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return 10.0, 1.5

    monkeypatch.setattr(bench_gpu, "step_cost", step_cost)
    results = results_of("memory")
    text = gpu_tables.tables(results)
    assert "| dino | 1 | no | CUDA out of memory. Tried to allocate |  |" in text
    assert "| dino | 1 | yes | 10 | 1.50 |" in text


def test_where_the_package_transformers_fails_ours_is_measured(monkeypatch):
    def broken(amp):
        raise ValueError("matrix contains NaN")

    package = types.SimpleNamespace(
        make_models=lambda: (None, None), compare_logits=lambda *arguments: 1e-6,
        their_passes=lambda *arguments: {"inference": broken},
        our_passes=lambda *arguments: {"inference": lambda amp: None})
    monkeypatch.setattr(bench_gpu, "bench_transformers", package)
    rows = list(bench_gpu.transformers("cpu"))
    assert [row.get("failed") for row in rows] == ["matrix contains NaN"] * 2 + [None] * 2
    assert all(row["ms"] > 0 for row in rows[2:])


def test_a_child_writes_a_row_a_line(tmp_path):
    words = bench_gpu.child_command("machine", "cpu", tmp_path / "rows")
    assert words[1:3] == ["-m", "tools.bench_gpu"]
    bench_gpu.main(*words[3:])
    rows = bench_gpu.read_rows(tmp_path / "rows")
    assert [row["unit"] for row in rows] == ["TB/s", "TFLOP/s", "TFLOP/s", "TFLOP/s"]


def test_no_part_begins_after_the_time_is_up(tmp_path):
    bench_gpu.gpu("cpu", minutes=0, parts=("machine",), out="a.json")
    part = json.loads((tmp_path / "a.json").read_text())["parts"]["machine"]
    assert part["failed"] == "not run: the time was up"


def test_an_unknown_part_and_a_missing_gpu_are_refused_by_name(monkeypatch):
    with pytest.raises(UserError, match="expected --parts out of machine, .* got kernels"):
        bench_gpu.gpu("cpu", parts=("machine", "kernels"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="expected a GPU, .*--device cpu rehearses"):
        bench_gpu.gpu()


def test_an_implementation_that_raises_is_a_row_with_its_message(float32_only, monkeypatch):
    def broken(case, inputs):
        raise ValueError("only\nfloat16")

    monkeypatch.setitem(IMPLEMENTATIONS, "mmcv", IMPLEMENTATIONS["mmcv"]._replace(prepare=broken))
    results = results_of("kernel: mmcv")
    assert "| float32 | mmcv | plain | only float16 |" in gpu_tables.tables(results)


# ---- other implementations -----------------------------------------------------------------------

def by_reference(value, shapes, starts, locations, weights, *more, **options):
    """A stand-in for a plain operator. Level starts must be those of the shapes."""
    sizes = shapes.prod(1).tolist()
    assert starts.tolist() == [sum(sizes[:l]) for l in range(len(sizes))]
    return ms_deform_attn_torch(value, shapes.tolist(), locations, weights)


def flash(value, shapes, starts, joined, step, points):
    """A stand-in for DCNv4's function."""
    L = len(shapes)
    locations, logits = joined.split([2 * L * points, L * points], -1)
    weights = logits.softmax(-1).unflatten(-1, (L, points))
    return by_reference(value, shapes, starts, locations.unflatten(-1, (L, points, 2)), weights)


def extension_backward(value, shapes, starts, locations, weights, grad_output, step):
    with torch.enable_grad():
        tensors = [x.detach().requires_grad_() for x in (value, locations, weights)]
        output = by_reference(tensors[0], shapes, starts, *tensors[1:])
        return torch.autograd.grad(output, tensors, grad_output)


def fake(**members):
    return types.SimpleNamespace(**members)


BACKENDS = fake(TRITON="triton", CUDA="cuda")
PACKAGES = {
    "MultiScaleDeformableAttention": fake(
        ms_deform_attn_forward=by_reference, ms_deform_attn_backward=extension_backward),
    "mmcv.ops.multi_scale_deform_attn": fake(
        MultiScaleDeformableAttnFunction=fake(apply=by_reference)),
    "msda_triton": fake(multi_scale_deformable_attention=by_reference),
    "deformops.registry": fake(msda=by_reference, Backend=BACKENDS),
    "DCNv4.functions": fake(FlashDeformAttnFunction=fake(apply=flash))}
PEERS = [name for name, implementation in IMPLEMENTATIONS.items() if implementation.module]


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("case", [CASE, DECODER], ids=lambda case: case.name)
def test_other_implementations_get_the_same_problem(name, case, monkeypatch):
    for module, package in PACKAGES.items():
        monkeypatch.setitem(sys.modules, module, package)
    inputs = make_inputs(case, "cpu", torch.float32, False, 0)
    call = IMPLEMENTATIONS[name].prepare(case, inputs)
    ours = bench_peers.plain(case, inputs)
    assert torch.allclose(call.forward(), ours.forward(), atol=1e-5)
    assert all(error < 1e-4 for error in bench_peers.errors(call))
    half = make_inputs(case, "cpu", torch.float16, False, 0)
    types_given = [x.dtype for x in IMPLEMENTATIONS[name].prepare(case, half).trained]
    locations_stay = name.startswith("deformops")
    assert types_given.count(torch.float16) == len(types_given) - locations_stay


def test_deformops_gets_the_options_that_it_would_choose_itself(monkeypatch):
    monkeypatch.delenv("DEFORMOPS_COMPILE", raising=False)
    options = {}

    def msda(*arguments, **named):
        options.update(named)
        return by_reference(*arguments)

    package = fake(msda=msda, Backend=BACKENDS)
    monkeypatch.setitem(sys.modules, "deformops.registry", package)
    inputs = make_inputs(CASE, "cpu", torch.bfloat16, False, 0)
    IMPLEMENTATIONS["deformops, CUDA"].prepare(CASE, inputs).forward()
    assert options == {"backend": "cuda"} and os.environ["DEFORMOPS_COMPILE"] == "fallback"
    IMPLEMENTATIONS["deformops, Triton"].prepare(CASE, inputs).forward()
    assert options == {"backend": "triton", "fp32acc": False}


def test_what_is_not_installed_is_known_without_an_import(monkeypatch):
    assert bench_peers.is_installed("ours")
    monkeypatch.setattr(bench_peers.importlib.util, "find_spec", lambda name: None)
    assert not bench_peers.is_installed("mmcv")
    assert bench_gpu.not_installed("transformers") and not bench_gpu.not_installed("memory")


# ---- tables --------------------------------------------------------------------------------------

def kernel_row(name, dtype, forward, both, mib=10.0, case=gpu_tables.PUBLISHED_CASE):
    return {"case": case, "dtype": dtype, "implementation": name, "form": "plain",
            "forward_us": forward, "both_us": both, "how": "graph", "mib": mib, "error": 1e-7,
            "gradient_error": 2e-7, "bytes_forward": 1e6, "bytes_both": 3e6, "additions": 8e6}


def part(*rows):
    return {"rows": list(rows), "failed": "", "seconds": 1.0}


def test_published_figures_stand_beside_those_of_the_same_case_here():
    results = bench_gpu.describe_run("cpu")
    results["parts"] = {
        "kernel: ours": part(kernel_row("ours", "float32", 10, 50, 20.0)),
        "kernel: PyTorch": part(kernel_row("PyTorch", "float32", 100, 600, 80.0)),
        "kernel: msda-triton": part(kernel_row("msda-triton", "float32", 13, 113, 40.0))}
    text = gpu_tables.tables(results)
    assert "| forward | float32 | 12 | 2.17 | 13.0 |  | 10.0 |  |" in text
    assert "| backward | float32 | 92 | 1.33 | 100.0 |  | 40.0 |  |" in text
    assert "| float32 | PyTorch | plain | 100.0 | 500.0 | 10.00 | 12.00 | 80 |" in text
    assert "| ours |  | float32 75% |" in text


def test_without_a_run_the_tables_hold_published_figures_alone():
    text = gpu_tables.tables({})
    assert gpu_tables.NO_RUN in text
    assert "kernel" not in text.replace("no such kernel", "")
    assert "| forward | float32 | 12 | 2.17 |  |  |  |  |" in text


def test_times_of_transformers_are_compared_by_pass_and_type():
    rows = [{"what": "inference", "dtype": "float32", "implementation": name, "ms": ms,
             "difference": 1e-6} for name, ms in (("transformers", 20.0), ("ours", 8.0))]
    rows += [{"what": "inference", "dtype": "bfloat16", "implementation": "transformers",
              "failed": "no half", "difference": 1e-6}]
    results = {**bench_gpu.describe_run("cpu"), "parts": {"transformers": part(*rows)}}
    text = gpu_tables.tables(results)
    assert "| inference | float32 | ours | 8.0 | 2.50 |" in text
    assert "| inference | bfloat16 | transformers | no half |  |" in text


def test_the_tables_are_written_between_the_markers(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{gpu_tables.BEGIN}\nold\n{gpu_tables.END}\nafter\n")
    gpu_tables.gpu_tables("none", "page.md")
    lines = page.read_text().splitlines()
    assert lines[:2] == ["before", gpu_tables.BEGIN] and lines[-2:] == [gpu_tables.END, "after"]
    assert "old" not in lines and gpu_tables.NO_RUN in lines
    before = page.read_text()
    gpu_tables.gpu_tables("none", "page.md")
    assert page.read_text() == before
    page.write_text("no markers")
    with pytest.raises(UserError, match="expected <!-- .* once each"):
        gpu_tables.gpu_tables("none", "page.md")
    with pytest.raises(UserError, match="which does not exist"):
        gpu_tables.gpu_tables("missing.json", "page.md")
    (tmp_path / "rehearsal.json").write_text(json.dumps(bench_gpu.describe_run("cpu")))
    with pytest.raises(UserError, match="expected a run on a GPU, got the rehearsal"):
        gpu_tables.gpu_tables("rehearsal.json", "page.md")


def test_a_page_with_the_markers_twice_is_refused(tmp_path):
    block = f"{gpu_tables.BEGIN}\nold\n{gpu_tables.END}\n"
    (tmp_path / "page.md").write_text(block + block)
    with pytest.raises(UserError, match="expected <!-- .* once each"):
        gpu_tables.gpu_tables("none", "page.md")
    assert (tmp_path / "page.md").read_text() == block + block


def test_the_page_of_results_has_the_markers():
    text = (ROOT / "RESULTS.md").read_text()
    assert text.count(gpu_tables.BEGIN) == text.count(gpu_tables.END) == 1
