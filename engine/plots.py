"""Plots of numbers: the log of a run, several runs, ablations."""
import json
import re
import sys
from pathlib import Path
from typing import Literal

import matplotlib
matplotlib.use("Agg")   # draws into files; no display is needed
import matplotlib.pyplot as plt
import numpy as np

from engine.errors import UserError
from engine.files import complete_picture, picture_format
from engine.forms import mismatch, read_results, read_text

Kind = Literal["bbox", "segm", "segm_cls"]   # see KINDS in eval.py
MAX_CLASSES = 10     # curves in one plot of precision and recall
LINE_FORMS = {
    "step": {"step": float, "train_seconds": float, "lr": float, "loss": float,
             "losses": {str: float}},
    "eval": {"step": float, "train_seconds": float},
}
EVALUATION_FORM = {
    "curves": {str: {"precision": [float]}},
    "per_class": {str: {"objects": float, "threshold": float, "AP50": float, "F1": float,
                        "recall": float, "precision": float}},
}
GROUPS = {"aux": "other layers", "enc": "encoder", "dn": "denoising"}   # prefixes of losses
MINUTES = "training minutes (without evaluation)"


def save_figure(figure, path, dpi=110, rect=(0, 0, 1, 1)):
    """Write and close a figure; the file is complete or absent. -> path"""
    figure.tight_layout(pad=0.6, rect=rect)
    path = Path(path)
    with complete_picture(path) as file:
        kind = picture_format(path)
        options = {"quality": 88} if kind == "JPEG" else {"optimize": True}
        figure.savefig(file, format=kind.lower(), dpi=dpi, bbox_inches="tight", pad_inches=0.08,
                       pil_kwargs=options)
    plt.close(figure)
    return path


def clean_axis(axis):
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


# ---- one run -------------------------------------------------------------------------------------

def read_log(run_dir: str | Path) -> tuple[list[dict], list[dict]]:
    """log.jsonl of a run folder -> its step lines and its eval lines, in order.

    Broken lines are left out, and counted on stderr; a killed run may leave one."""
    lines = {"step": [], "eval": []}
    broken = 0
    path = Path(run_dir) / "log.jsonl"
    for text in read_text(path).splitlines():
        if not text.strip():
            continue
        line = read_line(text)
        if line is None:
            broken += 1
        elif line["kind"] in lines:
            lines[line["kind"]].append(line)
    if broken:
        print(f"{path}: {broken} broken lines are left out", file=sys.stderr)
    return lines["step"], lines["eval"]


def read_line(text: str) -> dict | None:
    """One line of a log; None where it is broken."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if mismatch(line, {"kind": str}):
        return None
    form = LINE_FORMS.get(line["kind"], {})
    kinds = {kind: {"AP": float, "AP50": float} for kind in ("bbox", "segm") if kind in line}
    return None if mismatch(line, {**form, **kinds}) else line


def curves(run_dir: str) -> Path:
    """Plot log.jsonl of a run folder to its curves.png: AP over training minutes and steps, losses
    by group, learning rate.

    Args:
        run_dir: Run folder.
    """
    steps, evals = read_log(run_dir)
    figure, ((ap, loss), (parts, lr)) = plt.subplots(2, 2, figsize=(12, 7.5))
    plot_ap(ap, evals, steps)
    plot_losses(loss, parts, steps)
    lr.plot([line["step"] for line in steps], [line["lr"] for line in steps], color="#444")
    lr.set(title="learning rate", xlabel="step")
    for axis in (ap, loss, parts, lr):
        clean_axis(axis)
    return save_figure(figure, Path(run_dir) / "curves.png", dpi=90)


def plot_ap(axis, evals, steps):
    """AP and AP50 of boxes, and of masks where there are any, over minutes; steps on a second
    scale."""
    for kind, style, suffix in (("bbox", "-", ""), ("segm", "--", " masks")):
        lines = [line for line in evals if kind in line]
        minutes = [line["train_seconds"] / 60 for line in lines]
        for name, rgb in (("AP", "#d62728"), ("AP50", "#1f77b4")):
            values = [line[kind][name] for line in lines]
            if values:
                label = f"{name}{suffix}, best {max(values):.3f}"
                axis.plot(minutes, values, style, marker="o", markersize=3, color=rgb, label=label)
    axis.set(title="validation", xlabel=MINUTES, ylim=(0, 1))
    if evals:
        axis.legend(loc="lower right", frameon=False)
    add_step_axis(axis, steps + evals)


def add_step_axis(axis, lines):
    """A second scale on top: the steps at these minutes."""
    pairs = [(0, 0)] + [(line["train_seconds"] / 60, line["step"]) for line in lines]
    minutes, steps = np.array(sorted(pairs)).T
    if minutes[-1] == 0:
        return

    def to_steps(values):
        return np.interp(values, minutes, steps)

    def to_minutes(values):
        return np.interp(values, steps, minutes)

    axis.set_xlim(0, minutes[-1] * 1.02)
    top = axis.secondary_xaxis("top", functions=(to_steps, to_minutes))
    top.set_xlabel("steps", fontsize=8)
    top.tick_params(labelsize=8)


def plot_losses(total, parts, steps):
    """The sum of all losses on one axis; on the other a line for each group, see `loss_group`."""
    x = np.array([line["step"] for line in steps])
    losses = [line["loss"] for line in steps]
    total.plot(x, losses, color="#bbb", linewidth=0.8)
    total.plot(x, smooth(losses), color="#444")
    total.set(title="total loss, weighted sum of all terms", xlabel="step")
    groups = {}
    for number, line in enumerate(steps):
        for name, value in line["losses"].items():
            values = groups.setdefault(loss_group(name), np.zeros(len(steps)))
            values[number] += value
    for number, group in enumerate(sorted(groups)):
        parts.plot(x, smooth(groups[group]), label=group, color=f"C{number % 10}")
    parts.set(title="losses: last layer by term, other groups summed", xlabel="step", yscale="log")
    if groups:
        parts.legend(ncols=2, frameon=False, fontsize=8)


def loss_group(name: str) -> str:
    """Group of a loss: each term of the last layer, such as cls, is a group of its own; "aux2.cls"
    belongs to "other layers (sum)", "dn.l1" to "denoising (sum)"."""
    if "." not in name:
        return name
    group = re.match(r"[a-z_]*[a-z]", name)[0]
    return GROUPS.get(group, group) + " (sum)"


def smooth(values, window=9):
    """Mean over up to `window` points around each."""
    values = np.asarray(values, float)
    if not len(values):
        return values
    kernel = np.ones(min(window, len(values)))
    weights = np.convolve(np.ones(len(values)), kernel, "same")
    return np.convolve(values, kernel, "same") / weights


# ---- several runs --------------------------------------------------------------------------------

def compare_curves(run_dirs: list[str], out: str = "compare_curves.png", kind: Kind = "bbox",
                   labels: list[str] | None = None) -> Path:
    """AP (solid) and AP50 (dashed) over training minutes of several runs.

    Args:
        run_dirs: Run folders.
        out: Picture to write, .png or .jpg.
        kind: Scores of boxes, of masks, or of masks ranked by class score.
        labels: Names of the runs in the legend; default: the names of their folders.
    """
    labels = labels or [Path(run_dir).name for run_dir in run_dirs]
    if len(labels) != len(run_dirs):
        raise UserError(f"expected as many --labels as --run_dirs, got {len(labels)} and "
                        f"{len(run_dirs)}: give each run a label, or leave --labels out")
    figure, axis = plt.subplots(figsize=(8, 4.8))
    for number, (run_dir, label) in enumerate(zip(run_dirs, labels)):
        evals = [line for line in read_log(run_dir)[1] if kind in line]
        minutes = [line["train_seconds"] / 60 for line in evals]
        ap = [line[kind]["AP"] for line in evals]
        ap50 = [line[kind]["AP50"] for line in evals]
        text = f"{label}: AP {ap[-1]:.3f}" if ap else label
        axis.plot(minutes, ap, color=f"C{number}", linewidth=2.2, label=text)
        axis.plot(minutes, ap50, "--", color=f"C{number}", linewidth=0.9, alpha=0.8)
    axis.set(xlabel=MINUTES, ylabel="AP (solid), AP50 (dashed)", ylim=(0, 1), xlim=(0, None))
    axis.legend(loc="lower right", frameon=False)
    clean_axis(axis)
    return save_figure(figure, out, dpi=100)


def ladder(scores: dict[str, list[float]], out: str | Path = "ladder.png") -> Path:
    """Ablations, {title: [AP of each seed]}: a bar for the mean, a dot for every seed."""
    titles = list(scores)
    means = [np.mean(ap) for ap in scores.values()]
    figure, axis = plt.subplots(figsize=(8, 0.3 * len(titles) + 0.8))
    axis.barh(titles, means, color="#9ecae1")
    for title, ap in scores.items():
        axis.plot(ap, [title] * len(ap), "o", color="#08519c", markersize=3)
    texts = [f"{mean:.3f}" for mean in means]
    axis.bar_label(axis.containers[0], texts, label_type="center", fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("AP on held-out generated scenes; dots: seeds")
    axis.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, out)


def convergence(curves: dict[str, list], out: str | Path = "convergence.png") -> Path:
    """AP over epochs, {title: [{epoch: {"AP": .., "APs": ..}} of each seed]}, of all objects and of
    small ones: a line for the mean, an area from the lowest to the highest seed."""
    panels = (("AP", "all objects"), ("APs", "small objects"))
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4), sharey=True)
    for axis, (name, title) in zip(axes, panels):
        for number, (label, seeds) in enumerate(curves.items()):
            epochs = sorted(set.intersection(*[set(seed) for seed in seeds]))
            values = np.array([[seed[epoch][name] for epoch in epochs] for seed in seeds])
            mean = values.mean(0)                                              # (epochs,)
            text = f"{label}: {mean[-1]:.3f}" if epochs else label
            axis.plot(epochs, mean, marker="o", markersize=3, color=f"C{number}", label=text)
            axis.fill_between(epochs, values.min(0), values.max(0), color=f"C{number}", alpha=0.2)
        axis.set(title=title, xlabel="epochs", xlim=(0, None), ylim=(0, 1))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc="best", frameon=False, fontsize=9)
        clean_axis(axis)
    axes[0].set_ylabel("AP on held-out scenes; areas: seeds")
    return save_figure(figure, out)


# ---- one evaluation ------------------------------------------------------------------------------

def precision_recall(evaluation: str, out: str = "precision_recall.png",
                     kind: Kind = "bbox") -> Path:
    """Precision over recall at IoU 0.5 of each class, with the threshold of its best F1 (dot).

    Args:
        evaluation: eval.json that eval.py wrote.
        out: Picture to write, .png or .jpg.
        kind: Scores of boxes, of masks, or of masks ranked by class score.
    """
    figures = read_results(evaluation, {}).get(kind)
    if mismatch(figures, EVALUATION_FORM):
        raise UserError(f"expected an evaluation of {kind} with curves, got {evaluation}: "
                        "python eval.py --checkpoint RUN makes eval.json")
    if set(figures["curves"]) != set(figures["per_class"]):
        raise UserError(f"{evaluation}: expected a curve for every class; write the file anew")
    # the classes with the most objects, no more than the colors can tell apart
    rows = sorted(figures["per_class"].items(), key=lambda item: -item[1]["objects"])
    figure, axis = plt.subplots(figsize=(7, 5))
    recall = np.linspace(0, 1, 101)
    for number, (name, row) in enumerate(rows[:MAX_CLASSES]):
        text = f"{name}: never detected" if row["objects"] else f"{name}: no objects"
        if row["threshold"] >= 0:
            text = (f"{name}: AP50 {row['AP50']:.3f}, best F1 {row['F1']:.2f} at "
                    f"{row['threshold']:.2f}")
            axis.plot(row["recall"], row["precision"], "o", color=f"C{number}")
        axis.plot(recall, figures["curves"][name]["precision"], color=f"C{number}", label=text)
    title = "precision and recall, IoU 0.5; dot: threshold of the best F1"
    if len(rows) > MAX_CLASSES:
        title += f"\nthe {MAX_CLASSES} most frequent of {len(rows)} classes"
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axis.set_title(title, fontsize=10)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8)
    clean_axis(axis)
    return save_figure(figure, out, dpi=100)
