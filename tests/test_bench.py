"""tools/bench*.py: bounds computed by hand, and small tables from end to end."""
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import deformable_detr
import dino
import mask_frozen_detr
from deformable_attn import MSDeformAttn, ms_deform_attn_torch, sampling_locations
from engine.errors import UserError
from engine.muon import Muon
from engine.recipe import configure, override
from tools import bench, bench_data, bench_kernel, bench_masks, bench_models, bench_transformers
from tools import bench_load, bench_onnx, timing
from tools.bench_kernel import Case, Inputs


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small(monkeypatch):
    """The small preset of Deformable DETR in place of the published one."""
    cfg = override(deformable_detr.Config(), deformable_detr.SMALL)
    monkeypatch.setattr(deformable_detr, "Config", lambda: cfg)


@pytest.fixture
def unprepared(monkeypatch):
    """prepare_cpu holds for the whole process: not in a test."""
    for module in (bench, bench_models, bench_transformers):
        monkeypatch.setattr(module, "prepare_cpu", lambda: None)


def rows_of(text):
    """The rows of a printed table as lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# ---- timing --------------------------------------------------------------------------------------

def test_the_median_is_that_of_the_calls_after_the_first(monkeypatch):
    """Times 9 s (warm-up), 3, 1, 2 s: the median of the last three."""
    clock = 0.0
    durations = iter([9.0, 3.0, 1.0, 2.0])

    def call():
        nonlocal clock
        clock += next(durations)

    timer = timing.benchmark.Timer

    def timer_of_the_test(*args, **options):
        return timer(*args, timer=lambda: clock, **options)

    monkeypatch.setattr(timing.benchmark, "Timer", timer_of_the_test)
    assert timing.median_ms(call, seconds=5.0) == pytest.approx(2000)


def test_alternating_functions_take_turns_and_the_first_two_do_not_count(monkeypatch):
    clock = 0.0
    order = []

    def make(name, durations):
        def call():
            nonlocal clock
            order.append(name)
            clock += durations.pop(0)
        return call

    monkeypatch.setattr(timing.benchmark, "timer", lambda: clock)
    functions = {"a": make("a", [90, 90, 1, 3, 2]), "b": make("b", [90, 90, 5, 4, 6])}
    assert timing.alternating_ms(functions, 3) == pytest.approx({"a": 2000, "b": 5000})
    assert "".join(order) == "ababababab"


@pytest.mark.parametrize("muon, kind", [(8.0, Muon), (0.0, torch.optim.AdamW)])
def test_a_timed_training_step_has_the_optimizer_of_its_recipe(muon, kind):
    cfg, recipe = configure(dino, dino.SMALL, {"muon": muon})
    model, criterion = dino.build(cfg, num_classes=8)
    step = bench_models.TrainingStep(dino, model, criterion, recipe, "cpu")
    assert type(step.optimizer) is kind
    rates = {group["lr"] for group in step.optimizer.param_groups}
    assert recipe.lr in rates and 1e-5 not in rates


# ---- the operator --------------------------------------------------------------------------------

def test_lower_bounds_count_every_pixel_inside_the_map():
    """One head, one level of 2 x 2 pixels, two points: one in the middle (4 pixels), one in the top
    left corner (1 pixel)."""
    case = Case("hand-made", 1, [(2, 2)], queries=1, heads=1, channels=4, points=2)
    offsets = torch.tensor([[1.0, 1.0], [0.25, 0.25]]).view(1, 1, 1, 1, 2, 2)
    inputs = Inputs(torch.zeros(1, 4, 1, 4), offsets, torch.zeros(1, 1, 1, 1, 2),
                    torch.zeros(1, 1, 1, 2))
    bounds = bench_kernel.lower_bounds(case, inputs)
    assert bounds.forward == 4 * (16 + 4 + 2 + 2 + 4)   # value, offsets, logits, reference, output
    assert bounds.both == 2 * bounds.forward + 4 * (16 + 4 + 2)
    assert bounds.gathered == 5 * 4 * 4
    assert bounds.additions == 5


@pytest.mark.parametrize("uniform", [False, True])
def test_inputs_sample_where_they_say(uniform):
    case = Case("small", 2, [(8, 8), (4, 4)], heads=2, channels=4)
    inputs = bench_kernel.make_inputs(case, "cpu", torch.float32, uniform, 0)
    value, offsets, logits, reference = (tensor.detach() for tensor in inputs)
    assert value.shape == (2, 80, 2, 4)
    assert offsets.shape == (2, 80, 2, 2, 4, 2)
    assert reference.shape == (2, 80, 2, 2)
    locations = sampling_locations(reference, offsets, case.shapes)
    if uniform:
        assert 0 <= locations.min() and locations.max() <= 1
        assert locations.std() == pytest.approx(12 ** -0.5, abs=0.02)
    else:
        assert offsets.std() == pytest.approx(2, abs=0.1)


def test_the_kernel_table_with_a_working_and_a_broken_peer(tmp_path, monkeypatch, capsys):
    def broken(*args):
        return torch.zeros(2, 3).view(7)

    peer = types.SimpleNamespace(good=ms_deform_attn_torch, broken=broken)
    monkeypatch.setitem(sys.modules, "peer", peer)
    monkeypatch.setitem(bench_kernel.CASES, "cpu", [Case("tiny", 1, [(2, 3)], heads=2, channels=4)])
    bench_kernel.kernel("cpu", 0.001, peer=("peer:good", "peer:broken"))
    table = (tmp_path / "runs" / "bench" / "kernel_cpu.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("| tiny") == 2 * 2 * 9        # types, spreads, implementations
    assert table.count("failed: shape") == 2 * 2 * 2 * 2


# ---- models --------------------------------------------------------------------------------------

def test_inference_is_timed_by_model_and_variant(small, capsys):
    models = ("deformable_detr", "deformable_detr:two_stage")
    bench_models.inference("cpu", 0.01, models, (64, 96))
    names = [row[0] for row in rows_of(capsys.readouterr().out)]
    assert names == ["64x96", "deformable_detr", "deformable_detr two_stage"]


def test_models_and_variants_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match="expected a model among .* got 'yolo'"):
        bench_models.inference(models=("yolo",))
    with pytest.raises(UserError, match="expected --variant .* got 'x'"):
        bench_onnx.raw_model("dino:x")


def test_the_step_table_compares_both_kinds_of_attention(monkeypatch, capsys):
    monkeypatch.setitem(deformable_detr.SMALL, "batch_size", 1)
    bench_models.step("cpu", 1, ("deformable_detr",))
    _, *rows = rows_of(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [["deformable_detr", "float32"],
                                         ["deformable_detr", "bfloat16"]]
    assert MSDeformAttn.impl is None


@pytest.mark.slow
def test_recomputing_saves_memory_in_the_table(small, capsys):
    """From end to end, every figure from a process of its own."""
    bench_models.memory("cpu", 0.1, ("deformable_detr",), "small", (64,), amp=False)
    _, first, second = rows_of(capsys.readouterr().out)
    assert [first[2], second[2]] == ["no", "yes"]
    assert 0.3 < float(second[5]) < float(first[5]) - 0.05


def test_a_training_step_costs_time_and_memory(small, unprepared):
    setting = bench_models.Setting("deformable_detr", "small", 2, True, False, (64, 64), "cpu", 0.1)
    ms, gib = bench_models.step_cost(setting)
    assert ms > 1
    assert 0.1 < gib < 100


@pytest.mark.slow
def test_the_package_transformers_gets_the_same_weights_and_is_timed(unprepared, capsys):
    """At a fraction of the size (1020 tokens, 300 proposals); the logits agree, and every pass
    ran."""
    pytest.importorskip("transformers")
    bench_transformers.transformers("cpu", 1, batch=1, size=(192, 256))
    printed = capsys.readouterr().out
    assert printed.count("| ours | yes |") == 4
    assert printed.count("| transformers | no |") == 4
    assert float(printed.split("difference of the logits: ")[1].split(". ")[0]) < 1e-4


def test_without_the_package_transformers_the_table_says_what_to_install(monkeypatch):
    monkeypatch.setattr(bench_transformers, "installed", lambda: False)
    with pytest.raises(UserError, match="pip install"):
        bench_transformers.transformers()


def test_without_the_engines_the_table_says_what_to_install(monkeypatch):
    monkeypatch.setattr(bench_onnx, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime openvino"):
        bench_onnx.onnx()


# ---- images and scores ---------------------------------------------------------------------------

def test_images_are_counted_for_every_number_of_workers(capsys):
    bench_data.loading(images=4, workers=(0, 1))
    rows = rows_of(capsys.readouterr().out)
    assert [row[:2] for row in rows[1:]] == [
        ["generated scenes, small preset", "0"], ["generated scenes, small preset", "1"],
        ["scenes as files, published preset", "0"], ["scenes as files, published preset", "1"]]


def test_processes_score_shares_of_the_same_results(monkeypatch):
    """What two processes have is what one has, and the figures are those of the images."""
    case = bench_data.Case(images=5, detections=20, classes=3, repeats=1)
    truth, results = bench_data.simulated_results(case, range(5))
    shares = [bench_data.simulated_results(case, range(rank, 5, 2)) for rank in (0, 1)]
    together = [row for _, share in shares for row in share]
    assert len(results) == 100 and sorted(map(str, together)) == sorted(map(str, results))
    assert len(truth.anns) == sum(len(share.anns) for share, _ in shares) > 0
    seconds, cpu_seconds, peak, ap = bench_data.score_share(case, 0, 1, "")
    assert len(seconds) == len(cpu_seconds) == 1 and seconds[0] > 0 and peak > 0
    assert ap == bench_data.score(truth, results)["AP"] > 0


def test_plain_and_compiled_steps_take_turns(small, monkeypatch, capsys):
    def traced(function, **options):
        assert options == dict(fullgraph=True, dynamic=True)
        return function

    monkeypatch.setattr(torch, "compile", traced)
    batch = bench_models.random_batch((64, 64), 2)
    monkeypatch.setattr(bench_models, "scene_batch", lambda *args: batch)
    bench_models.compiled("cpu", 1, "deformable_detr", "small")
    row = rows_of(capsys.readouterr().out)[1]
    assert row[:2] == ["deformable_detr, small preset", "2x3x64x64"]
    assert float(row[2]) > 0 and float(row[3]) > 0


@pytest.mark.slow
def test_scoring_times_one_process_and_two(capsys):
    bench_data.scoring(images=6, detections=20, classes=3)
    rows = rows_of(capsys.readouterr().out)
    assert [row[:3] for row in rows[1:]] == [["1", "6", "120"], ["2", "6", "120"]]
    assert rows[1][-1] == rows[2][-1]


# ---- the mask network ----------------------------------------------------------------------------

def test_the_parts_of_the_mask_network_are_counted_and_timed(monkeypatch, capsys):
    for paper in (dino, mask_frozen_detr):
        small = override(paper.Config(), paper.SMALL)
        monkeypatch.setattr(paper, "Config", lambda small=small: small)
    bench_masks.mask_cost("cpu", 0.01, (64, 96))
    rows = {name: cells for name, *cells in rows_of(capsys.readouterr().out)}
    assert rows["neck"][0] == "6,400"
    assert len(rows) == 8
    for name in list(rows)[1:-1]:
        _, macs, ms, mebibytes = rows[name]
        assert float(macs) >= 0 and float(ms) >= 0 and float(mebibytes) >= 0


def test_attention_counts_four_multiply_adds_for_every_sampling_point_and_channel():
    """2 images, 5 queries, 8 channels, 1 level, 3 points."""
    module = MSDeformAttn(8, 2, num_levels=1, num_points=3)
    query = torch.randn(2, 5, 8)
    tokens = torch.randn(2, 6, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(query, torch.rand(2, 5, 1, 2), tokens, [(2, 3)])
    linear = 2 * (10 * 8 * 12 + 10 * 8 * 6 + 12 * 8 * 8 + 10 * 8 * 8)
    assert counter.get_total_flops() == linear + 2 * 4 * 2 * 5 * 8 * 3


def test_the_box_encoder_stays_within_its_budget():
    """63.3 billion multiply-adds for 100 regions at the default sizes, with the sampling points of
    the attention."""
    cfg = mask_frozen_detr.Config()
    sizes = mask_frozen_detr.BlockConfig(cfg.channel_dim, cfg.num_heads, 1, cfg.num_points,
                                         cfg.box_ffn_dim)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        layers = mask_frozen_detr.build_blocks(cfg.box_encoder, cfg.box_layers, sizes)
        region = torch.randn(100, cfg.roi_size, cfg.roi_size, cfg.channel_dim)
        mask_frozen_detr.encode(layers, mask_frozen_detr.region_memory(region))
    points = cfg.box_layers * 100 * cfg.roi_size ** 2 * cfg.num_points * 4 * cfg.channel_dim
    assert counter.get_total_flops() / 2 + points == pytest.approx(63.3e9, rel=1e-3)


def test_a_run_beside_busy_programs_is_compared_with_one_alone(monkeypatch, capsys):
    running = []

    class Loop:
        def __init__(self, command):
            running.append(self)

        def kill(self):
            running.remove(self)

        def wait(self):
            assert self not in running

    def train(command, env, **options):
        assert "OMP_NUM_THREADS" not in env and "--threads" not in command
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir()
        config = {"recipe": {"batch_size": 8}, "run": {"threads": 2 - len(running)}}
        (folder / "config.json").write_text(json.dumps(config))
        last = {"step": 10, "train_seconds": 4.0 + len(running)}
        (folder / "log.jsonl").write_text("{}\n" + json.dumps(last) + "\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    stand_in = types.SimpleNamespace(Popen=Loop, run=train)
    monkeypatch.setattr(bench_load, "subprocess", stand_in)
    bench.load(busy=(0, 1), steps=10)
    assert not running
    text = capsys.readouterr().out
    assert "| 0 | 2 | 20.0 | 1.00 |" in text and "| 1 | 1 | 16.0 | 0.80 |" in text


# ---- command line --------------------------------------------------------------------------------

def test_a_run_that_ends_without_a_word_is_reported_with_its_exit_code(monkeypatch):
    ended = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    stand_in = types.SimpleNamespace(run=lambda command, **options: ended)
    monkeypatch.setattr(bench_load, "subprocess", stand_in)
    with pytest.raises(UserError, match="expected train.py to train 10 steps, got exit code -9"):
        bench_load.images_per_second(10, 400)


def test_without_a_name_every_table_is_made_in_its_own_process(monkeypatch):
    started = []

    def run(words, check, cwd):
        started.append(words[-1])

    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench, "OPTIONAL", dict.fromkeys(bench.OPTIONAL, lambda: False))
    bench.main([])
    assert started == [name for name in bench.TABLES if name not in ("transformers", "onnx")]


def test_the_name_of_a_table_and_its_flags_select_what_runs(unprepared, capsys):
    bench.main(["loading", "--images", "3", "--workers", "0"])
    assert [row[1] for row in rows_of(capsys.readouterr().out)[1:]] == ["0", "0"]


def test_an_unknown_flag_is_refused_with_the_near_name(unprepared, capsys):
    with pytest.raises(SystemExit):
        bench.main(["scoring", "--image", "3"])
    assert "--images" in capsys.readouterr().err
