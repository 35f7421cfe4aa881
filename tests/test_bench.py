"""bench.py: the figures computed by hand, and a table from end to end."""
import argparse
import json
import sys
import types

import pytest
import torch

from tools import bench
from engine.recipe import override
from engine import checkpoints
import deformable_detr
import dino
import mask_frozen_detr
import train
from deformable_attn import ms_deform_attn_torch


def test_floors_count_every_corner_inside_the_map():
    """One head, one level of 2 x 2 pixels, two points: one in the middle (4 corners), one in the top left corner (1 corner)."""
    case = bench.Case("hand-made", 1, [(2, 2)], queries=1, heads=1, channels=4, points=2)
    value, logits, reference = torch.zeros(1, 4, 1, 4), torch.zeros(1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    offsets = torch.tensor([[1.0, 1.0], [0.25, 0.25]]).view(1, 1, 1, 1, 2, 2)
    forward, both, gathered, additions = bench.floors(case, [value, offsets, logits, reference])
    assert forward == 4 * (16 + 4 + 2 + 2 + 4)                   # value, offsets, logits, reference, output
    assert both == 2 * forward + 4 * (16 + 4 + 2)
    assert gathered == 5 * 4 * 4 and additions == 5


@pytest.mark.parametrize("uniform", [False, True])
def test_inputs_look_where_they_say(uniform):
    case = bench.Case("small", 2, [(8, 8), (4, 4)], heads=2, channels=4)
    value, offsets, logits, reference = (t.detach() for t in bench.make_inputs(case, "cpu", torch.float32, uniform, 0))
    assert value.shape == (2, 80, 2, 4) and offsets.shape == (2, 80, 2, 2, 4, 2) and reference.shape == (2, 80, 2, 2)
    locations = bench.sampling_locations(reference, offsets, case.shapes)
    if uniform:
        assert 0 <= locations.min() and locations.max() <= 1 and locations.std() == pytest.approx(12 ** -0.5, abs=0.02)
    else:
        assert offsets.std() == pytest.approx(2, abs=0.1)


def test_kernel_table_with_a_peer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    broken = lambda *args: torch.zeros(1) + torch.zeros(1, 2, 3).view(7)
    monkeypatch.setitem(sys.modules, "peer", types.SimpleNamespace(good=ms_deform_attn_torch, broken=broken))
    monkeypatch.setitem(bench.CASES, "cpu", [bench.Case("tiny", 1, [(2, 3)], heads=2, channels=4)])
    bench.kernel(argparse.Namespace(device="cpu", peer=["peer:good", "peer:broken"], case="", repeats=1))
    table = (tmp_path / "runs" / "bench" / "kernel_cpu.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("| tiny") == 2 * 2 * 9 and table.count("failed: shape") == 2 * 2 * 2 * 2


def test_the_ladder_reads_finished_runs_and_means_over_seeds(tmp_path, monkeypatch, capsys):
    """Steps 1 to 2 took 0.1 s, the pause before step 4 does not count: the median of three."""
    monkeypatch.chdir(tmp_path)
    for folder, ap in (("dino_0", 0.5), ("dino_1", 0.7), ("two_stage_0", 0.2), ("two_stage_1", 0.2)):
        (tmp_path / folder).mkdir()
        steps = [{"kind": "step", "step": step, "train_seconds": seconds} for step, seconds in ((1, 5), (2, 5.1), (4, 9), (5, 9.1))]
        record = {"kind": "eval", "epoch": 2, "bbox": {"AP": ap, "AP50": ap, "APs": ap, "APl": ap}}
        (tmp_path / folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*steps, record]))
    bench.ladder(argparse.Namespace(rows=["dino", "two_stage"], seeds=2, jobs=2, epochs=2, threads=1, out=str(tmp_path),
                                    plot="ladder.png", device="cpu"))
    printed = capsys.readouterr().out
    assert "| DINO | 0.600 | 0.200 | 0.600 | 0.600 | 0.600 | 100 |" in printed and "| + two-stage | 0.200 | 0.000 |" in printed
    assert (tmp_path / "ladder.png").stat().st_size > 5000


@pytest.mark.parametrize("row", bench.LADDER)
def test_every_row_of_the_ladder_is_a_training_run(row):
    """Flags are known to train.py, and what a row changes is not what the small preset does anyway."""
    _, model, changes = bench.LADDER[row]
    run, *cfg = train.parse(["--model", model, *(word for flag, value in changes.items() for word in (f"--{flag}", str(value)))])
    assert run.preset == "small" and (not changes or row == "co_dino_atss_rcnn" or cfg != list(train.parse(["--model", model])[1:]))


def test_the_ladder_trains_what_is_missing(tmp_path, monkeypatch, capsys):
    """From nothing to a table with the process that trains replaced; its output is kept."""
    monkeypatch.chdir(tmp_path)

    def training(words, check, stdout, stderr):
        words = dict(zip(words[2::2], words[3::2]))
        assert check and words["--model"] == "co_detr" and words["--aux_heads"] == "atss" and words["--threads"] == "3"
        lines = [{"kind": "step", "step": step, "train_seconds": step} for step in (1, 2)]
        lines.append({"kind": "eval", "epoch": 1, "bbox": dict.fromkeys(("AP", "AP50", "APs", "APl"), 0.25)})
        with open(f"{words['--out']}/log.jsonl", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        stdout.write("trained")

    monkeypatch.setattr(bench.subprocess, "run", training)
    bench.ladder(argparse.Namespace(rows=["co_dino_atss"], seeds=1, jobs=1, epochs=1, threads=3, out="runs", plot="ladder.png",
                                    device="cpu"))
    assert "| Co-DINO, heads: atss | 0.250 | 0.000 |" in capsys.readouterr().out
    assert (tmp_path / "runs" / "co_dino_atss_0" / "output.txt").read_text() == "trained"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The small preset in place of the published one, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    cfg = override(deformable_detr.Config(), deformable_detr.SMALL)
    monkeypatch.setattr(deformable_detr, "Config", lambda: cfg)


def test_inference_is_timed_by_model_and_variant(small, capsys):
    bench.inference(argparse.Namespace(models=["deformable_detr", "deformable_detr:two_stage"], size=(64, 96), repeats=1, device="cpu"))
    printed = capsys.readouterr().out
    assert "| deformable_detr  |" in printed and "| deformable_detr two_stage |" in printed


@pytest.mark.slow
def test_recomputing_saves_memory_in_the_table(small, capsys):
    """From end to end, every figure from a process of its own."""
    bench.memory(argparse.Namespace(models=["deformable_detr"], preset="small", batches=[64], amp=False, size=None, repeats=1,
                                    threads=1, device="cpu"))
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| deformable_detr")]
    assert [row[3].strip() for row in rows] == ["no", "yes"] and 0.3 < float(rows[1][6]) < float(rows[0][6]) - 0.05


def test_a_training_step_costs_time_and_memory(small, monkeypatch):
    monkeypatch.setattr(bench, "prepare_cpu", lambda: None)     # it holds for the whole process
    args = argparse.Namespace(preset="small", amp=False, threads=1, repeats=1, device="cpu")
    ms, gib = bench.step_cost("deformable_detr", 2, True, args)
    assert ms > 1 and 0.1 < gib < 100


def test_images_and_scores_are_timed(small, capsys):
    bench.loading(argparse.Namespace(data="", images=4, workers=[0, 1], device="cpu"))
    assert capsys.readouterr().out.count(" published preset |") == 2
    bench.scoring(argparse.Namespace(images=3, repeats=1, device="cpu"))
    assert "| 3 | 300 |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_package_transformers_gets_the_same_weights_and_is_timed(tmp_path, monkeypatch, capsys):
    """At a fraction of the size; the logits agree, and every pass ran."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "prepare_cpu", lambda: None)     # it holds for the whole process
    bench.transformers(argparse.Namespace(size=(192, 256), batch=1, repeats=1, device="cpu",     # 1020 tokens, 300 proposals
                                          types=["float32", "bfloat16"]))
    printed = capsys.readouterr().out
    assert printed.count("| ours | yes |") == 4 and printed.count("| transformers | no |") == 4
    assert float(printed.split("difference of the logits: ")[1].split(". ")[0]) < 1e-4


def test_bench_alone_makes_every_table(monkeypatch):
    started = []
    monkeypatch.setattr(bench.sys, "argv", ["bench.py"])
    monkeypatch.setattr(bench.subprocess, "run", lambda words, check, cwd: started.append(words[-1]))
    bench.main()
    assert started[:3] == ["kernel", "step", "inference"] and started[-3:] == ["memory", "loading", "scoring"]


@pytest.mark.parametrize("row", bench.MASKS)
def test_every_row_of_the_mask_tables_is_a_training_run(row):
    _, changes = bench.MASKS[row]
    flags = [word for flag, value in changes.items() for word in (f"--{flag}", str(value))]
    default = train.parse(["--model", "mask_frozen_detr"])[1]
    assert (train.parse(["--model", "mask_frozen_detr", *flags])[1] == default) == (row == "default")


def test_mask_tables_are_read_from_finished_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, ap in (("default", 0.5), ("roi_8", 0.4)):
        (tmp_path / name).mkdir()
        lines = [{"kind": "step", "step": step, "train_seconds": step / 10} for step in (1, 2)]
        lines.append({"kind": "eval", "epoch": 1, "bbox": {"AP": 0.8}, "segm": dict.fromkeys(("AP", "AP75", "APs", "APl"), ap),
                      "segm_cls": {"AP": ap - 0.1}})
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        checkpoints.save(tmp_path / name / "best.pt", {"model": {"a": torch.zeros(30_000), "_extra_state": torch.zeros(32)}})
    bench.masks(argparse.Namespace(rows=["default", "roi_8"], epochs=1, threads=1, jobs=1, out=str(tmp_path), detector="d",
                                   device="cpu"))
    printed = capsys.readouterr().out
    assert "|  | default | 0.500 | 0.500 | 0.500 | 0.500 | 0.400 | 0.800 | 0.03 | 100 |" in printed
    assert "| size of a region | roi_8 | 0.400 |" in printed


def test_the_parts_of_the_mask_network_are_counted_and_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for paper in (dino, mask_frozen_detr):
        small = override(paper.Config(), paper.SMALL)
        monkeypatch.setattr(paper, "Config", lambda small=small: small)
    bench.mask_cost(argparse.Namespace(size=(64, 96), repeats=1, device="cpu"))
    printed = capsys.readouterr().out
    rows = {name: cells for name, *cells in (row[2:].split(" | ") for row in printed.splitlines() if row.startswith("| "))}
    assert rows["neck"][0] == "6,400" and len(rows) == 8
    assert all(float(cells[1]) >= 0 and float(cells[2]) >= 0 and float(cells[3].rstrip(" |")) >= 0
               for part, cells in rows.items() if part not in ("part, 64x96", "frozen detector (DINO, ResNet-50)"))


def test_the_box_encoder_keeps_within_its_budget():
    """63.3 billion multiply-adds for 100 regions at the default sizes, the looks of the attention included."""
    from torch.utils.flop_counter import FlopCounterMode
    cfg = mask_frozen_detr.Config()
    sizes = mask_frozen_detr.BlockConfig(cfg.channel_dim, cfg.num_heads, 1, cfg.num_points, cfg.box_ffn_dim)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        layers = mask_frozen_detr.build_blocks(cfg.box_encoder, cfg.box_layers, sizes)
        region = torch.randn(100, cfg.roi_size, cfg.roi_size, cfg.channel_dim)
        mask_frozen_detr.encode(layers, mask_frozen_detr.region_memory(region))
    looks = cfg.box_layers * 100 * cfg.roi_size ** 2 * cfg.num_points * 4 * cfg.channel_dim
    assert counter.get_total_flops() / 2 + looks == pytest.approx(63.3e9, rel=1e-3)
