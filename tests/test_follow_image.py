"""One image is followed through a detector, step by step."""
import pytest

from tiny_checkpoint import write_checkpoint
from tools import follow_image

STEPS = ("read", "transform", "batch", "backbone", "encode", "propose", "decode", "match", "loss",
         "detect")


def steps_of(printed):
    """The first word of every line that has one, each once."""
    words = [line[:10].strip() for line in printed.splitlines()]
    return list(dict.fromkeys(word for word in words if word))


def test_every_step_of_a_trained_dino_is_printed(tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "best.pt")
    follow_image.main(["--checkpoint", str(checkpoint), "--index", "1"])
    printed = capsys.readouterr().out
    assert set(steps_of(printed)) == {*STEPS, "denoise"}
    assert "images (1, 3, 64, 64)" in printed and "logits (1, 12, 8)" in printed
    assert "proposal with score" in printed and "IoU of reference, then layers 1 to 2" in printed


def test_a_model_without_proposals_has_points_for_references(tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "best.pt", "deformable_detr")
    follow_image.main(["--checkpoint", str(checkpoint)])
    printed = capsys.readouterr().out
    assert steps_of(printed) == list(STEPS)
    assert "IoU of layers 1 to 2" in printed


@pytest.mark.parametrize("arguments, words", [
    (["--model", "detr"], "expected a model with encode, propose and decode.*got detr"),
    (["--index", "50"], "expected --index in 0..49, got 50"),
    (["--data", "photos"], "expected --checkpoint with --data")])
def test_what_cannot_be_followed_is_one_line(arguments, words):
    with pytest.raises(SystemExit, match=words):
        follow_image.main(arguments)
