"""bench.py: the figures computed by hand, and a table from end to end."""
import argparse
import dataclasses
import json
import sys
import types

import pytest
import torch

import bench
import deformable_detr
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
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "LADDER", {"DINO": ("dino", {}), "+ two-stage": ("deformable_detr", {"two_stage": True})})
    for folder, ap in (("dino_0", 0.5), ("dino_1", 0.7), ("two_stage_0", 0.2), ("two_stage_1", 0.2)):
        (tmp_path / folder).mkdir()
        record = {"kind": "eval", "epoch": 2, "bbox": {"AP": ap, "AP50": ap, "APs": ap, "APl": ap}}
        (tmp_path / folder / "log.jsonl").write_text(json.dumps(record) + "\n")
    bench.ladder(argparse.Namespace(seeds=2, jobs=2, epochs=2, out=str(tmp_path), device="cpu"))
    printed = capsys.readouterr().out
    assert "| DINO | 0.600 | 0.200 |" in printed and "| + two-stage | 0.200 | 0.000 |" in printed


def test_the_published_step_of_a_model_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = dataclasses.replace(deformable_detr.Config(), **deformable_detr.SMALL)
    monkeypatch.setattr(deformable_detr, "Config", lambda: small)
    bench.published(argparse.Namespace(models=["deformable_detr"], size=(64, 96), batch=2, repeats=1, device="cpu"))
    assert capsys.readouterr().out.count("| deformable_detr |") == 2
