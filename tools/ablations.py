"""Train models with and without a part, and compare their AP.

    python -m tools.ablations ladder     what each part of each paper brings
    python -m tools.ablations masks      what each part of the mask network brings
    python -m tools.ablations convergence     AP along the training of DETR and its children
    python -m tools.ablations --models dino mine --seeds 3 --steps 1000     your model beside DINO

All runs of a table train the small preset on generated scenes, or on the images of --data, for the
same number of steps, with seeds 0, 1, ... AP is the mean over the seeds; the spread is the largest
AP minus the smallest. A row says whether its difference exceeds the spreads of both rows that it
compares, and gives the difference of each seed. Runs that are complete are not trained again; those
that were interrupted are continued. Every run leaves a reduced log (tools/reduce_log.py).
"""
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from engine import checkpoints
from engine.coco_json import json_path, read_json
from engine.errors import UserError, user_errors
from engine.flags import one_line_usage
from engine.models import load_paper
from engine.notices import plural
from engine.plots import convergence as plot_convergence
from engine.plots import ladder as plot_ladder
from engine.plots import read_log
from engine.recipe import configure, preset_values
from scenes import NUM_TRAIN
from tools.reduce_log import reduce_log
from tools.timing import DEVICE, write_table

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Row:
    """One row of a table: a paper file, with what changes in its small preset."""
    title: str
    model: str             # the paper file
    flags: dict = field(default_factory=dict)   # flags of train.py that differ from the preset
    baseline: str = ""     # the row that it is compared with
    detector: str = ""     # of mask networks: the row of DETECTORS that is their frozen detector
    length: int = 1        # its epochs, as a multiple of those of the table


# ---- rows ----------------------------------------------------------------------------------------

REFINED = {"with_box_refine": True}
TWO_STAGE = {"with_box_refine": True, "two_stage": True}
CO_DEFORMABLE = {"variant": "co_deformable_small"}

LADDER = {
    "detr": Row("DETR", "detr"),
    "one_scale": Row(
        "Deformable DETR, one scale", "deformable_detr", {"num_feature_levels": 1},
        "deformable_detr"),
    "deformable_detr": Row("Deformable DETR", "deformable_detr", baseline="detr"),
    "iterative_refinement": Row(
        "+ iterative refinement", "deformable_detr", REFINED, "deformable_detr"),
    "two_stage": Row("+ two-stage", "deformable_detr", TWO_STAGE, "iterative_refinement"),
    "h_detr_baseline": Row(
        "H-DETR without one-to-many queries", "h_detr", {"num_queries_one2many": 0}, "two_stage"),
    "h_detr": Row("H-DETR", "h_detr", {}, "h_detr_baseline"),
    "dino": Row("DINO", "dino"),
    "dino_without_denoising": Row(
        "DINO without denoising", "dino", {"denoising": "none"}, "dino"),
    "dino_with_plain_denoising": Row(
        "DINO with plain denoising", "dino", {"denoising": "plain"}, "dino"),
    "dino_with_static_queries": Row(
        "DINO with static queries", "dino", {"query_selection": "static"}, "dino"),
    "dino_with_pure_queries": Row(
        "DINO with pure query selection", "dino", {"query_selection": "pure"}, "dino"),
    "dino_looking_forward_once": Row(
        "DINO looking forward once", "dino", {"look_forward_twice": False}, "dino")}


def co_detr_rows(name, title, flags) -> dict[str, Row]:
    """Co-DETR without auxiliary heads, and with one, two and three; each beside the one before."""
    rows = {}
    last = ""
    for heads in ("none", "atss", "atss,rcnn", "atss,rcnn,retinanet"):
        key = f"{name}_{heads.replace(',', '_')}"
        changes = {**flags, "aux_heads": heads}
        rows[key] = Row(f"{title}, heads: {heads}", "co_detr", changes, last)
        last = key
    return rows


def six_equal_heads(name, title, flags) -> dict[str, Row]:
    """Six ATSS heads, beside one: as many heads as the paper has at most, but of one kind."""
    changes = {**flags, "aux_heads": ",".join(["atss"] * 6)}
    row = Row(f"{title}, heads: 6 x atss", "co_detr", changes, f"{name}_atss")
    return {f"{name}_six_atss": row}


def single_scale_rows() -> dict[str, Row]:
    """Deformable DETR on C5 alone, whose heads read the maps of the multi-scale adapter."""
    flags = {"variant": "plain_deformable_small", "num_feature_levels": 1}
    title = "Single-scale Deformable DETR, heads"
    none = Row(f"{title}: none", "co_detr", {**flags, "aux_heads": "none"})
    both = Row(f"{title}: atss,rcnn", "co_detr", {**flags, "aux_heads": "atss,rcnn"},
               "single_scale_none")
    return {"single_scale_none": none, "single_scale_atss_rcnn": both}


LADDER |= co_detr_rows("co_deformable", "Co-Deformable-DETR", CO_DEFORMABLE)
LADDER |= six_equal_heads("co_deformable", "Co-Deformable-DETR", CO_DEFORMABLE)
LADDER |= co_detr_rows("co_dino", "Co-DINO", {})
LADDER |= single_scale_rows()


# Frozen detectors of the mask networks. --detector is the first; the others are trained when a row
# needs them.
DETECTORS = {
    "dino": Row("DINO", "dino"),
    "dino_2_layers": Row("DINO with two encoder layers", "dino", {"encoder_layers": 2}),
    "h_detr": Row("H-DETR", "h_detr")}


def mask_row(title, baseline="default", detector="dino", length=1, **flags) -> Row:
    return Row(title, "mask_frozen_detr", flags, baseline, detector, length)


def baseline_row(title, level, **flags) -> Row:
    """A baseline, which has no encoder and no mask scoring, with one of them."""
    name = f"{level}_baseline"
    return mask_row(f"{level} level, {title}", baseline=name, variant=name, **flags)


# The tables of the paper, with its names.
MASKS = {
    "default": mask_row("default", baseline=""),

    # mask head design: image level and box level, with and without each encoder
    "image_baseline": mask_row("image level, no encoder", variant="image_baseline"),
    "image_level_image": baseline_row("image encoder", "image", image_encoder="deformable"),
    "box_baseline": mask_row("box level, no encoder", variant="box_baseline"),
    "box_level_image": baseline_row("image encoder", "box", image_encoder="deformable"),
    "box_level_box": baseline_row("box encoder", "box", box_encoder="deformable"),
    "box_level_query": baseline_row("query encoder", "box", query_encoder="box2obj"),
    "box_level_scoring": baseline_row("mask scoring", "box", mask_scoring=True),
    "no_mask_scoring": mask_row("without mask scoring", mask_scoring=False),

    # image feature encoder (Table 2) and its depth
    "image_none": mask_row("image encoder: none", image_encoder="none"),
    "image_swin": mask_row("image encoder: Swin", image_encoder="swin"),
    "image_convnext": mask_row("image encoder: ConvNeXt", image_encoder="convnext"),
    "image_2_layers": mask_row("image encoder: two layers", image_layers=2),
    "image_3_layers": mask_row("image encoder: three layers", image_layers=3),

    # box feature encoder (Table 3) and its depth
    "box_none": mask_row("box encoder: none", box_encoder="none"),
    "box_swin": mask_row("box encoder: Swin", box_encoder="swin"),
    "box_convnext": mask_row("box encoder: ConvNeXt", box_encoder="convnext"),
    "box_1_layer": mask_row("box encoder: one layer", box_layers=1),
    "box_3_layers": mask_row("box encoder: three layers", box_layers=3),

    # channel mapper (Table 4)
    "width_32": mask_row("channel mapper: 32", channel_dim=32),
    "width_128": mask_row("channel mapper: 128", channel_dim=128),

    # query feature encoder
    "query_none": mask_row("query encoder: none", query_encoder="none"),
    "query_obj2obj": mask_row("query encoder: object to object", query_encoder="obj2obj"),
    "query_both": mask_row("query encoder: both", query_encoder="both"),
    "query_both_ffn": mask_row(
        "query encoder: both and FFN", query_encoder="both", query_ffn=True),

    # region size (Table 10), boxes, loss
    "roi_8": mask_row("region of 8 cells", roi_size=8),
    "roi_32": mask_row("region of 32 cells", roi_size=32),
    "gt_boxes": mask_row("regions from the true boxes", roi_box="gt"),
    "dense_loss": mask_row("loss at every cell", point_loss=False),

    # training epochs; batch size, with the learning rate in proportion and the same epochs
    "epochs_2": mask_row("epochs: twice as many", length=2),
    "epochs_4": mask_row("epochs: four times as many", length=4),
    "batch_4": mask_row("batch size: half", batch_size=4, lr=2e-3),
    "batch_16": mask_row("batch size: double", batch_size=16, lr=8e-3),

    "large_scale_jitter": mask_row("large-scale jitter", augment="lsj"),

    # index of the encoder layer whose map is used
    "layer_2_of_2": mask_row("encoder layer: second of two", detector="dino_2_layers"),
    "layer_1_of_2": mask_row("encoder layer: first of two", baseline="layer_2_of_2",
                             detector="dino_2_layers", enc_layer=1),

    # fine-tuning the detector; another detector
    "train_detector": mask_row("detector fine-tuned", train_detector=True),
    "h_detr": mask_row("on H-DETR", detector="h_detr"),
    "h_detr_trained": mask_row("on H-DETR, fine-tuned", baseline="h_detr", detector="h_detr",
                               train_detector=True)}

# The claim that opens Deformable DETR (its Figure 3): ten times fewer epochs than DETR.
CONVERGENCE = ("detr", "deformable_detr", "dino")


# ---- commands ------------------------------------------------------------------------------------

@dataclass
class Runs:
    """What to train, with how many seeds; shared by the commands here and tools/real_data.py."""
    out: Path                # folder of the runs, one folder each
    seeds: int = 3           # runs of every row
    threads: int = 1         # CPU threads of each run
    data: str = ""           # COCO-layout folder, of crowded scenes for example; none: usual scenes
    logs: str = ""           # folder for the reduced logs; default: logs/ in --out

    counts: ClassVar = ("seeds", "threads")     # fields that are at least 1

    def check(self) -> None:
        for name in self.counts:
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"expected --{name} of at least 1, got {value}")

    def epochs_between_evaluations(self, epochs: int) -> int:
        """Evaluate at the end of a run only: after all of its epochs."""
        return epochs


@dataclass
class Training(Runs):
    """What the commands of this file share."""
    steps: int = 1000        # optimizer steps of every run
    jobs: int = 1            # runs at the same time

    counts: ClassVar = ("steps", "seeds", "jobs", "threads")


@dataclass
class Ladder(Training):
    """Measure what each part of each paper brings, and draw a bar for every row."""
    out: Path = Path("runs/ladder")   # folder of the runs, one folder each
    rows: tuple[Literal[tuple(LADDER)], ...] = tuple(LADDER)   # rows of the table

    def run(self) -> None:
        rows = {name: LADDER[name] for name in self.rows}
        runs = train_rows(rows, self)
        box_table("ladder", rows, runs, self)
        scores = {rows[name].title: [ap(run) for run in runs[name]] for name in rows}
        print(f"written to {plot_ladder(scores, self.out / 'ladder.png')}")


@dataclass
class Masks(Training):
    """Measure what each part of the mask network brings, on frozen detectors."""
    out: Path = Path("runs/masks")    # folder of the runs, one folder each
    steps: int = 500                  # optimizer steps of every run
    seeds: int = 1                    # runs of every row
    detector: str = "runs/dino/best.pt"   # small DINO that most rows share
    detector_steps: int = 6000        # optimizer steps of the detectors of the other rows
    rows: tuple[Literal[tuple(MASKS)], ...] = tuple(MASKS)   # rows of the table

    def run(self) -> None:
        detectors = {"dino": self.detector}
        rows = {}
        for name in self.rows:
            row = MASKS[name]
            if row.detector not in detectors:
                detectors[row.detector] = self.train_detector(row.detector)
            rows[name] = replace(row, flags={**row.flags, "detector": detectors[row.detector]})
        mask_table(rows, train_rows(rows, self), self)

    def train_detector(self, name: str) -> str:
        """Train a row of DETECTORS, once for all seeds -> its checkpoint"""
        row_name = f"detector_{name}"
        options = replace(self, steps=self.detector_steps, seeds=1)
        records = train_rows({row_name: DETECTORS[name]}, options)[row_name]
        return str(records[0]["out"] / "best.pt")


@dataclass
class Convergence(Training):
    """Compare AP along the training of DETR and its children, or of other rows of the ladder, and
    draw the curves."""
    out: Path = Path("runs/convergence")   # folder of the runs, one folder each
    steps: int = 6000                 # optimizer steps of every run
    eval_every: int = 1               # epochs between evaluations
    rows: tuple[Literal[tuple(LADDER)], ...] = CONVERGENCE   # rows of the table

    def epochs_between_evaluations(self, epochs: int) -> int:
        return self.eval_every

    def run(self) -> None:
        rows = {name: LADDER[name] for name in self.rows}
        runs = train_rows(rows, self)
        curves = {}
        for name, row in rows.items():
            curves[row.title] = [ap_by_epoch(record["out"]) for record in runs[name]]
        convergence_table(rows, curves, runs, self)
        print(f"written to {plot_convergence(curves, self.out / 'convergence.png')}")


@dataclass
class Compare(Training):
    """Compare paper files with the first of them. The word `compare` can be left out."""
    out: Path = Path("runs/compare")    # folder of the runs, one folder each
    models: tuple[str, ...] = ("deformable_detr", "dino")   # paper files; the first: the baseline

    def run(self) -> None:
        first, *others = self.models
        rows = {first: Row(first, first)}
        for name in others:
            rows[name] = Row(name, name, {}, baseline=first)
        box_table("compare", rows, train_rows(rows, self), self)


# ---- runs ----------------------------------------------------------------------------------------

def train_rows(rows: dict[str, Row], options: Training) -> dict[str, list[dict]]:
    """Train every row with every seed -> {row: [record of the last evaluation of each seed]}"""
    options.check()
    images = NUM_TRAIN
    if options.data:
        path = json_path(options.data, "train")
        images = len(read_json(path, options.data, "train")["images"])
    epochs = {}
    for name, row in rows.items():
        epochs[name] = row.length * count_epochs(row, options.steps, images)
    jobs = [(name, seed) for seed in range(options.seeds) for name in rows]

    def run(job):
        name, seed = job
        return train_one(name, rows[name], seed, epochs[name], options)

    pool = ThreadPoolExecutor(options.jobs)
    try:
        records = dict(zip(jobs, pool.map(run, jobs)))
    finally:
        pool.shutdown(cancel_futures=True)   # after an error no further run begins
    return {name: [records[name, seed] for seed in range(options.seeds)] for name in rows}


def count_epochs(row: Row, steps: int, images: int) -> int:
    """How many epochs make `steps` optimizer steps with the batch size of the preset, even where
    the row changes that size. images: of the training set. UserError where the steps end within an
    epoch."""
    paper = load_paper(row.model)
    _, recipe = configure(paper, preset_values(paper, "small", row.flags.get("variant", "")))
    steps_per_epoch = images // recipe.batch_size
    if steps_per_epoch == 0:
        raise UserError(f"expected at least {recipe.batch_size} training images, got {images}")
    if steps % steps_per_epoch:
        raise UserError(f"expected --steps divisible by the {steps_per_epoch} steps of an epoch of "
                        f"{row.model}, got {steps}")
    return steps // steps_per_epoch


def train_one(name: str, row: Row, seed: int, epochs: int, options: Runs) -> dict:
    """Train in a process of its own, unless the run is there already, and keep its log.

    -> the record of its last evaluation, with `step_ms`, the median time of a step"""
    out = options.out / f"{name}_{seed}"
    flags = {"model": row.model, "seed": seed, "epochs": epochs}
    if options.data:
        # as for generated scenes: small, from random weights unless the row says otherwise
        flags |= {"data": str(options.data), "preset": "small", "init": "none"}
    flags |= row.flags
    check_settings(out, flags)
    if not is_complete(out, epochs):
        words = {"out": out, "threads": options.threads}
        if (out / "last.pt").exists():
            words["resume"] = out
        else:
            words |= {"eval_every": options.epochs_between_evaluations(epochs), **flags}
        run_train(out, words)
    steps, evaluations = read_log(out)
    record = evaluations[-1]
    print(f"{out.name}: AP {ap(record):.3f}", file=sys.stderr)
    logs = Path(options.logs or options.out / "logs")
    reduce_log(out, logs / f"{out.name}.jsonl")
    return {**record, "step_ms": step_ms(steps), "out": out}


def check_settings(out: Path, flags: dict) -> None:
    """UserError if the folder holds a run with other settings."""
    path = out / "config.json"
    if not path.exists():
        return
    parts = json.loads(path.read_text())
    saved = {name: x for part in parts.values() for name, x in part.items()}
    for name, value in flags.items():
        if saved.get(name) != value:
            raise UserError(f"{out}: expected a run with --{name} {value}, got one with "
                            f"{saved.get(name)}; give another --out, or remove it")


def is_complete(out: Path, epochs: int) -> bool:
    if not (out / "log.jsonl").exists():
        return False
    _, evaluations = read_log(out)
    return bool(evaluations) and evaluations[-1]["epoch"] == epochs


def run_train(out: Path, flags: dict) -> None:
    """Run train.py; what it prints goes to output.txt in the run folder."""
    command = [sys.executable, str(ROOT / "train.py"), *words_of(flags)]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "output.txt", "a") as output:
        done = subprocess.run(command, stdout=output, stderr=output)
    if done.returncode:
        raise UserError(f"train.py ended with exit code {done.returncode}: see {output.name}")


def words_of(flags: dict) -> list[str]:
    """Flags as words of a command line; a list gives a flag several values."""
    words = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def step_ms(steps: list[dict]) -> float:
    """Median time of a training step between two lines of a log. A log of one line has only the
    time since the start of the run, whose first steps are slow."""
    if len(steps) == 1:
        steps = [{"step": 0, "train_seconds": 0}, *steps]
    times = []
    for first, second in zip(steps, steps[1:]):
        seconds = second["train_seconds"] - first["train_seconds"]
        times.append(1e3 * seconds / (second["step"] - first["step"]))
    return statistics.median(times)


# ---- tables --------------------------------------------------------------------------------------

def ap(record: dict) -> float:
    """AP of masks where the model makes them, else of boxes."""
    return record.get("segm", record["bbox"])["AP"]


def mean(records, kind, name) -> str:
    """The mean of a figure over the seeds, as a cell. kind: bbox, segm or segm_cls"""
    return f"{statistics.mean(record[kind][name] for record in records):.3f}"


def comparison(rows, runs, name) -> list[str]:
    """Cells: AP, spread, baseline, difference to it, whether it is larger than the spread, and the
    difference of each seed. Runs of a seed have the same data and mostly the same initial weights,
    so these may agree where the spread of the seeds is large."""
    mine = [ap(record) for record in runs[name]]
    cells = [f"{statistics.mean(mine):.3f}", f"{max(mine) - min(mine):.3f}"]
    baseline = rows[name].baseline
    if baseline not in runs:
        return [*cells, "", "", "", ""]
    other = [ap(record) for record in runs[baseline]]
    difference = statistics.mean(mine) - statistics.mean(other)
    spread = max(max(mine) - min(mine), max(other) - min(other))
    verdict = "yes" if abs(difference) > spread else "no"
    if len(mine) == 1:
        verdict = "one seed"
    each = " ".join(f"{a - b:+.3f}" for a, b in zip(mine, other))
    return [*cells, rows[baseline].title, f"{difference:+.3f}", verdict, each]


COMPARISON = ("AP", "spread", "compared with", "difference", "larger than the spread",
              "of each seed")


def box_table(name, rows, runs, options) -> None:
    """Write the table of detectors."""
    cells = []
    for key, row in rows.items():
        records = runs[key]
        sizes = [mean(records, "bbox", column) for column in ("AP50", "APs", "APl")]
        ms = statistics.median(record["step_ms"] for record in records)
        cells.append([row.title, *comparison(rows, runs, key), *sizes, f"{ms:.0f}"])
    columns = (heading(options), *COMPARISON, "AP50", "AP small", "AP large", "ms a step")
    write_table(name, DEVICE, columns, cells)


def mask_table(rows, runs, options) -> None:
    """Write the table of mask networks."""
    cells = []
    for key, row in rows.items():
        records = runs[key]
        scores = [mean(records, "segm", column) for column in ("AP75", "APs", "APl")]
        scores += [mean(records, "segm_cls", "AP"), mean(records, "bbox", "AP")]
        millions = count_parameters(records[0]["out"] / "best.pt") / 1e6
        ms = statistics.median(record["step_ms"] for record in records)
        cells.append([row.title, *comparison(rows, runs, key), *scores, f"{millions:.2f}",
                      f"{ms:.0f}"])
    columns = (heading(options), *COMPARISON, "AP75", "AP small", "AP large", "by class score",
               "box AP", "M parameters", "ms a step")
    write_table("masks", DEVICE, columns, cells)


def ap_by_epoch(out: Path) -> dict[int, dict]:
    """Box AP of every evaluation of a run, over all and over small objects: {epoch: {AP, APs}}. Of
    an epoch that was evaluated again after a kill, the last one counts."""
    _, evaluations = read_log(out)
    return {line["epoch"]: line["bbox"] for line in evaluations}


def convergence_table(rows, curves, runs, options) -> None:
    """AP after each epoch that all runs evaluated, over all and over small objects; the comparison
    is that of the last epoch."""
    runs_of_all = [run for seeds in curves.values() for run in seeds]
    epochs = sorted(set.intersection(*[set(run) for run in runs_of_all]))
    cells = []
    for key, row in rows.items():
        ms = statistics.median(record["step_ms"] for record in runs[key])
        for name, objects in (("AP", "all"), ("APs", "small")):
            means = []
            for epoch in epochs:
                values = [run[epoch][name] for run in curves[row.title]]
                means.append(f"{statistics.mean(values):.3f}")
            spread = max(values) - min(values)               # of the last epoch
            compared = comparison(rows, runs, key)[2:] if name == "AP" else [""] * 4
            cells.append([row.title, objects, *means, f"{spread:.3f}", *compared, f"{ms:.0f}"])
    columns = (heading(options), "objects", *[f"epoch {epoch}" for epoch in epochs],
               *COMPARISON[1:], "ms a step")
    write_table("convergence", DEVICE, columns, cells)


def heading(options: Training) -> str:
    return f"{options.steps} steps, {plural(options.seeds, 'seed')}"


def count_parameters(path: Path) -> int:
    """Numbers in a checkpoint of a mask network, without its frozen detector."""
    weights = checkpoints.load(path)["model"]
    return sum(value.numel() for key, value in weights.items() if key != "_extra_state")


# ---- command line --------------------------------------------------------------------------------

COMMANDS = {"ladder": Ladder, "masks": Masks, "convergence": Convergence, "compare": Compare}


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].startswith("--") and argv[0] != "--help":
        argv = ["compare", *argv]
    with user_errors("tools.ablations"):
        with one_line_usage("python -m tools.ablations", argv):
            command = tyro.extras.subcommand_cli_from_dict(
                COMMANDS, args=argv, prog="python -m tools.ablations", use_underscores=True,
                description=__doc__.partition("\n\n")[0])
        command.run()


if __name__ == "__main__":
    main()
