"""Compare ways to train a detector on a folder of real images, on the same CPU threads.

    python -m tools.real_data --data DIR --epochs 40

- from scratch: our small DINO from random weights
- from scenes: the same from weights that were trained on generated scenes
- transformers: RT-DETR of that package at a similar size, from random weights, for as long as the
  run from scratch trained (tools/train_transformers.py)

Runs that are complete are not trained again. Every run leaves a reduced log.
"""
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from engine import commands
from engine.datasets import validation_set
from engine.errors import UserError, user_errors
from engine.models import load_model
from engine.notices import plural
from eval import evaluate
from tools.ablations import COMPARISON, ROOT, Row, Runs, comparison, mean, train_one, words_of
from tools.reduce_log import reduce_log
from tools.timing import DEVICE, write_table


@dataclass
class RealData(Runs):
    """What to train on, and how."""
    data: Path = tyro.MISSING             # COCO-layout folder
    out: Path = Path("runs/real_data")    # folder of the runs, one folder each
    epochs: int = 40                      # epochs of our runs
    start: str = "dino_small"             # initial weights of the runs from scenes
    train_sizes: tuple[int, ...] = (144, 160, 176, 192)   # shorter side in training, px
    eval_size: int = 176                  # shorter side at evaluation, px
    max_size: int = 260                   # maximum longer side, px
    crop: bool = False                    # crop a random part of half of our training images
    vertical_flip: bool = False           # also flip our training images vertically
    color_jitter: bool = True             # change the colors of our training images at random
    num_queries: int = 100                # objects that a detector can find in an image
    max_dets: int = 100                   # detections of an image and a class that count
    their_size: tuple[int, int] = (192, 256)   # height and width for transformers, px

    def check(self) -> None:
        super().check()
        if any(side % 32 for side in self.their_size):
            raise UserError(f"expected --their_size of multiples of 32, got {self.their_size}")


def compare(options: RealData) -> None:
    """Train all runs and write their table."""
    options.check()
    flags = {"num_queries": options.num_queries, "top_k": options.max_dets,
             "train_sizes": list(options.train_sizes), "eval_size": options.eval_size,
             "max_size": options.max_size, "crop": options.crop,
             "vertical_flip": options.vertical_flip, "color_jitter": options.color_jitter}
    rows = {
        "scratch": Row("DINO, from scratch", "dino", flags),
        "scenes": Row(f"DINO, from {options.start}", "dino", {**flags, "init": options.start},
                      baseline="scratch"),
        "transformers": Row("RT-DETR of transformers, from scratch", "", baseline="scratch")}
    runs = {name: [] for name in rows}
    for seed in range(options.seeds):
        for name in ("scratch", "scenes"):
            record = train_one(name, rows[name], seed, options.epochs, options)
            runs[name].append({**record, "bbox": evaluate_run(record["out"], options.max_dets)})
        minutes = runs["scratch"][seed]["train_seconds"] / 60
        runs["transformers"].append(train_theirs(seed, minutes, options))

    cells = []
    for name, row in rows.items():
        minutes = statistics.mean(record["train_seconds"] for record in runs[name]) / 60
        steps = statistics.mean(record["step"] for record in runs[name])
        figures = [mean(runs[name], "bbox", column) for column in ("AP50", "APs", "APm")]
        cells.append([row.title, *comparison(rows, runs, name), *figures, f"{steps:.0f}",
                      f"{minutes:.1f}"])
    columns = (f"{options.data.name}, {plural(options.seeds, 'seed')}", *COMPARISON, "AP50",
               "AP small", "AP medium", "steps", "minutes")
    write_table(f"real_data_{options.data.name}", DEVICE, columns, cells)


def evaluate_run(out: Path, max_dets: int) -> dict:
    """COCO's figures of boxes of the last checkpoint of a run."""
    detector = load_model(out / "last.pt")
    dataset = validation_set("", detector)
    scores = evaluate(detector.model, detector.paper.detect, dataset, detector.cfg, "cpu",
                      max_dets=max_dets)
    return scores["bbox"]


def train_theirs(seed: int, minutes: float, options: RealData) -> dict:
    """Train RT-DETR in a process of its own, unless the run is complete -> its record"""
    out = options.out / f"transformers_{seed}"
    log = out / "log.jsonl"
    if not log.exists():
        flags = {"data": options.data, "out": out, "minutes": minutes, "seed": seed,
                 "threads": options.threads, "num_queries": options.num_queries,
                 "max_dets": options.max_dets, "size": list(options.their_size)}
        command = [sys.executable, "-m", "tools.train_transformers", *words_of(flags)]
        done = subprocess.run(command, cwd=ROOT)
        if done.returncode:
            raise UserError(f"tools.train_transformers ended with exit code {done.returncode}")
    reduce_log(out, Path(options.logs or options.out / "logs") / f"{out.name}.jsonl")
    return json.loads(log.read_text())


def main(argv=None) -> None:
    with user_errors("tools.real_data"):
        compare(commands.parse(RealData, "python -m tools.real_data", __doc__, argv))


if __name__ == "__main__":
    main()
