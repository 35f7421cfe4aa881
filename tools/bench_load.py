"""Speed of a training run beside other busy programs."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from engine.errors import UserError
from tools.timing import show_progress, write_table

ROOT = Path(__file__).resolve().parent.parent


def load(busy: tuple[int, ...] = (0, 1, 2), steps: int = 100, scenes: int = 400):
    """Time the default training job beside processes that compute without a pause.

    Args:
        busy: Numbers of such processes, one row each.
        steps: Optimizer steps of a run.
        scenes: Training scenes; drawing them is not timed.
    """
    rows = []
    for count in busy:
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"])
                 for _ in range(count)]
        try:
            threads, speed = images_per_second(steps, scenes)
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()
        first = rows[0][2] if rows else speed
        rows.append([count, threads, speed, f"{speed / first:.2f}"])
        show_progress(rows[-1])
    columns = ("busy processes", "threads chosen", "images/s", "of the first row")
    write_table("load", "cpu", columns, rows, [f"{os.cpu_count()} cores, {steps} steps a row."])


def images_per_second(steps: int, scenes: int) -> tuple[int, float]:
    """Train DINO with default settings -> the number of threads that it chose, images a second"""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--model", "dino", "--out", f"{folder}/run",
                   "--num_train", str(scenes), "--num_val", "8", "--max_steps", str(steps)]
        environment = {**os.environ}
        environment.pop("OMP_NUM_THREADS", None)      # the program chooses its threads
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it printed no reason"]
            raise UserError(f"expected train.py to train {steps} steps, got exit code "
                            f"{done.returncode}: {lines[-1]}")
        config = json.loads(Path(folder, "run", "config.json").read_text())
        lines = Path(folder, "run", "log.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    images = last["step"] * config["recipe"]["batch_size"]
    return config["run"]["threads"], round(images / last["train_seconds"], 1)
