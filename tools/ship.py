"""Make a small weight file, in half precision, from a checkpoint.

    python -m tools.ship runs/dino/best.pt assets/weights/dino_small.safetensors

The file holds what inference and --init need: the EMA weights where there are any, model and
settings, class names, score thresholds, and the hash of its tensors. Read again, its weights are
float32 numbers that half precision can represent, so the detections of the checkpoint and of the
file differ by rounding. `--checkpoint dino_small` loads it from assets/weights by its name.

A mask network works only with the exact weights of its detector. Ship the detector first, and train
the mask network on the shipped file: --detector dino_small. A mask network that has trained its
detector has it in its checkpoint, and in its shipped file.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from engine import assets, checkpoints, commands, weight_files
from engine.errors import UserError, user_errors

FIELDS = ("format", "model_name", "variant", "config", "recipe", "class_names", "category_ids",
          "detector", "epoch", "step", "best", "thresholds")
RUN_FIELDS = ("seed", "overfit", "num_train", "num_val")


def ship(checkpoint: str | Path, out: str | Path) -> None:
    """Write the weight file of a checkpoint of ours, and print its size and hash."""
    checkpoint = Path(checkpoint)
    out = Path(out)
    if out.suffix != assets.SUFFIX:
        raise UserError(f"expected a file name that ends with {assets.SUFFIX}, got {out}")
    state = checkpoints.load(checkpoint)
    if "model_name" not in state:
        raise UserError(f"{checkpoint}: expected a checkpoint of train.py, got released weights: "
                        "they load as they are")
    fields = {name: state[name] for name in FIELDS if name in state}
    fields["run"] = described_run(state)
    weights = checkpoints.saved_weights(checkpoint, state)
    digest = weight_files.write(out, fields, weights)
    numbers = sum(value.numel() for value in weights.values())
    print(f"{out}: {fields['model_name']}, {numbers / 1e6:.2f} M numbers, "
          f"{out.stat().st_size / 1e6:.2f} MB, sha256 of the tensors {digest}")


def described_run(state: dict) -> dict:
    """Return what a shipped file says about its run: no path of the machine it was made on."""
    run = state.get("run", {})
    described = {name: run[name] for name in RUN_FIELDS if name in run}
    if not run.get("data"):
        described["data"] = ""       # the generated scenes, which every machine has
    detector = checkpoints.saved_detector(state)
    if detector and "detector" not in state:      # else the file has the detector inside
        name = Path(detector).stem
        if name not in assets.names():
            raise UserError(f"expected masks on a detector of assets/weights, got {detector}: ship "
                            "the detector first, then train the masks with --detector NAME")
        described["detector"] = name
    return described


@dataclass
class Options:
    """Make a small weight file, in half precision, from a checkpoint."""
    # best.pt of a run
    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    # file to write: assets/weights/NAME.safetensors
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]


def main(argv: list[str] | None = None) -> None:
    with user_errors("tools.ship"):
        options = commands.parse(Options, "python -m tools.ship", __doc__, argv)
        ship(options.checkpoint, options.out)


if __name__ == "__main__":
    main()
