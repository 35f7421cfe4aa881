"""tools/layer_analysis.py: duplicates and recall by hand, and the command on tiny detectors."""
import json
import re

import pytest
import torch
from PIL import Image
from tiny_checkpoint import damage, write_checkpoint

from engine.commands import open_detector, with_data
from eval import evaluate
from tools import layer_analysis


def run(*words):
    layer_analysis.main([*map(str, words), "--device", "cpu", "--batch_size", "3"])


def test_duplicates_are_confident_detections_of_an_object_beyond_its_first():
    """An image of 200 x 100 px with an object of class 0 and one of class 1."""
    target = {"labels": torch.tensor([0, 1]), "canvas_size": torch.tensor([100, 200]),
              "boxes": torch.tensor([[0.25, 0.5, 0.2, 0.4], [0.75, 0.5, 0.2, 0.4]])}
    first = [30.0, 30.0, 70.0, 70.0]
    second = [130.0, 30.0, 170.0, 70.0]
    found = {"scores": torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.2]),
             "labels": torch.tensor([0, 1, 0, 1, 0, 0]),
             # the fourth has the wrong class, the fifth lies elsewhere, the last is not confident
             "boxes": torch.tensor([first, second, first, first, [0.0, 0.0, 9.0, 9.0], first])}
    assert layer_analysis.count_duplicates(found, target) == 1
    nothing = {name: values[:0] for name, values in found.items()}
    assert layer_analysis.count_duplicates(nothing, target) == 0
    empty = {**target, "labels": target["labels"][:0], "boxes": target["boxes"][:0]}
    assert layer_analysis.count_duplicates(found, empty) == 0


def test_the_rank_of_an_object_is_that_of_its_first_near_proposal():
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.1, 0.9, 0.1, 0.1]])
    proposals = torch.stack([boxes[1], boxes[0], boxes[1]])
    assert layer_analysis.first_ranks(proposals, boxes).tolist() == [1, 0, 3]
    assert layer_analysis.first_ranks(proposals, boxes[:0]).tolist() == []


def test_detectors_are_measured_layer_by_layer(tmp_path, capsys):
    """A DINO beside a Deformable DETR without proposals; the last layer has the detector's AP."""
    names = ("dino", "deformable_detr")
    paths = [write_checkpoint(tmp_path / f"{name}.pt", name) for name in names]
    run("--checkpoint", *paths)
    measures = json.loads((tmp_path / "layers.json").read_text())
    assert list(measures) == list(names)
    for name, path in zip(names, paths):
        figures = measures[name]
        detector, dataset = with_data(open_detector(path))
        found = evaluate(detector.model, detector.paper.detect, dataset, detector.cfg, "cpu", 3)
        assert figures["AP"][-1] == found["bbox"]["AP"]
        assert len(figures["AP"]) == len(figures["duplicates"]) == 2
        assert figures["objects"] == sum(len(dataset[i][1]["labels"]) for i in range(6))
    assert measures["dino"]["counts"] == [1, 3, 10, 12]
    assert sorted(measures["dino"]["recall"]) == measures["dino"]["recall"]
    assert "recall" not in measures["deformable_detr"]
    printed = capsys.readouterr().out
    assert re.search(r"AP, layer 2 +\d\.\d+ +\d\.\d+\n", printed)
    assert re.search(r"recall, proposals 12 +\d\.\d+ +-\n", printed)
    assert Image.open(tmp_path / "layers.png").width > 800
    alone = layer_analysis.layer_table({"deformable_detr": measures["deformable_detr"]})
    assert "recall" in printed and "recall" not in alone


@pytest.mark.parametrize("words, message", [
    (("--batch_size", "0"), "--batch_size"), (("--checkpoint", "mask_frozen_detr_small"),
                                              "expected a detector of boxes"),
    (("--data", "nowhere"), "nowhere"), (("--nothing", "1"), "Unrecognized options")])
def test_what_cannot_be_measured_ends_in_one_line(words, message, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "best.pt")
    with pytest.raises(SystemExit, match=f"layer_analysis: .*{message}"):
        layer_analysis.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path), *words])


def test_a_detector_that_is_not_finite_has_no_figures(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "best.pt", change=damage)
    with pytest.raises(SystemExit, match="finite outputs"):
        run("--checkpoint", checkpoint)
