"""Reduce the log of a run to what is stored beside a result.

    python -m tools.reduce_log runs/dino assets/logs/dino.jsonl
"""
import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro

from engine.errors import UserError, user_errors
from engine.flags import one_line_usage

EVERY = 50     # steps between lines
DIGITS = 5     # significant digits of numbers


def reduce_log(run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")],
               out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]):
    """Write the evaluation lines and every 50th step line of a run's log.jsonl.

    The first line holds the settings of the run and the version of PyTorch. Scores of single
    classes are left out.

    Args:
        run: Run folder.
        out: File to write.
    """
    log = run / "log.jsonl"
    if not log.exists():
        raise UserError(f"expected a run folder with log.jsonl, got {run}: train.py writes one")
    settings = json.loads((run / "config.json").read_text())
    settings["run"] = {name: without_folders(value) for name, value in settings["run"].items()}
    settings["run"]["out"] = f"runs/{out.stem}"
    records = [{"kind": "settings", "torch": torch.__version__, **settings}]
    for number, line in enumerate(log.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            raise UserError(f"{log}, line {number}: expected a complete line, got a broken one, as "
                            "a killed run leaves it; resume the run, or remove the line") from None
        if record["kind"] == "eval" or record["step"] % EVERY == 0:
            records.append(shorten(record))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"{out}: {len(records)} lines")


def without_folders(value):
    """Shorten an absolute path to its last two names, which name no folder of the machine."""
    if isinstance(value, str) and Path(value).is_absolute():
        return "/".join(Path(value).parts[-2:])
    return value


def shorten(value):
    """Round all numbers, and leave out `per_class`."""
    if isinstance(value, dict):
        return {name: shorten(x) for name, x in value.items() if name != "per_class"}
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    return value


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with user_errors("tools.reduce_log"), one_line_usage("python -m tools.reduce_log", argv):
        tyro.cli(reduce_log, args=argv, prog="python -m tools.reduce_log")


if __name__ == "__main__":
    main()
