"""Every speed and memory figure of this repository.

    python -m tools.bench                all tables that this machine can make, one after the other
    python -m tools.bench inference      one of them
    python -m tools.bench kernel --help  the flags of one of them
    python -m tools.bench gpu            what can only be measured on a GPU, in under nine minutes

Each command prints a table and writes it to runs/bench/, with date, device, versions and its own
command line. A figure is the median of repeated calls. CPU threads: OMP_NUM_THREADS.
"""
import subprocess
import sys
from pathlib import Path

import tyro

from engine.errors import user_errors
from engine.machine import prepare_cpu
from tools.bench_data import loading, scoring
from tools.bench_gpu import gpu
from tools.bench_kernel import kernel
from tools.bench_load import load
from tools.bench_masks import mask_cost
from tools.bench_models import compiled, inference, memory, step
from tools.bench_onnx import all_installed, onnx
from tools.bench_transformers import installed, transformers
from tools.gpu_tables import gpu_tables

ROOT = Path(__file__).resolve().parent.parent
TABLES = {"kernel": kernel, "step": step, "compiled": compiled, "inference": inference,
          "transformers": transformers, "onnx": onnx, "mask_cost": mask_cost, "memory": memory,
          "loading": loading, "scoring": scoring, "load": load}
COMMANDS = {**TABLES, "gpu": gpu, "gpu_tables": gpu_tables}
# tables that need packages of tests/requirements.txt, and whether these are installed
OPTIONAL = {"transformers": installed, "onnx": all_installed}
UNPREPARED = ("transformers",)   # calls prepare_cpu itself, after timing the package without it


def make_all() -> None:
    """Make every table, each in a process of its own: settings and memory start anew."""
    for name in TABLES:
        if name in OPTIONAL and not OPTIONAL[name]():
            continue
        subprocess.run([sys.executable, "-m", "tools.bench", name], check=True, cwd=ROOT)


def main(argv=None) -> None:
    """Run one of COMMANDS, or make all TABLES; the parameters of its function are the flags."""
    argv = sys.argv[1:] if argv is None else argv
    with user_errors("tools.bench"):
        if not argv:
            make_all()
            return
        if argv[0] not in UNPREPARED:
            prepare_cpu()
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, args=argv, prog="python -m tools.bench", use_underscores=True,
            description=__doc__.partition("\n")[0])


if __name__ == "__main__":
    main()
