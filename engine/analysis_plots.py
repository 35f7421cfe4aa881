"""Plots of what happens inside detectors: the figures of analysis.py and tools/layer_analysis.py.
"""
from pathlib import Path

import matplotlib
matplotlib.use("Agg")   # draws into files; no display is needed
import matplotlib.pyplot as plt
import numpy as np

from engine.plots import clean_axis, save_figure


def analysis_panels(analyses):
    """Functions (axis, analyses) that draw what analysis.json has: ATD, instability."""
    panels = []
    if any("ATD" in a for a in analyses.values()):
        panels.append(plot_atd)
    if any("instability" in a for a in analyses.values()):
        panels.append(plot_instability)
    return panels


def plot_atd(axis, analyses):
    """ATD of every checkpoint, a group of bars for each object size (DINO, figure 4)."""
    sizes = {"all": "ATD", "small": "ATD_small", "medium": "ATD_medium", "large": "ATD_large"}
    width = 0.8 / len(analyses)
    for number, (name, a) in enumerate(analyses.items()):
        heights = [max(0.0, a.get(key, 0.0)) for key in sizes.values()]    # -1: no such object
        places = np.arange(len(sizes)) + (number - (len(analyses) - 1) / 2) * width
        axis.bar(places, heights, width, color=f"C{number}", label=name)
    ks = sorted({a["k"] for a in analyses.values() if "k" in a})
    axis.set_xticks(range(len(sizes)), sizes, fontsize=8)
    axis.set_title(f"ATD({', '.join(map(str, ks))}): anchors to objects", fontsize=9)
    axis.set_xlabel("object size; lower is better", fontsize=8)
    axis.margins(y=0.1 + 0.12 * len(analyses))     # room for the legend
    axis.legend(loc="upper center", frameon=False, fontsize=8)


def plot_instability(axis, analyses):
    """Instability of each checkpoint beside the one before (DN-DETR, Eq. 2)."""
    found = {name: a["instability"] for name, a in analyses.items() if "instability" in a}
    axis.plot(range(len(found)), found.values(), "o-", color="C0")
    axis.set_xticks(range(len(found)), found, fontsize=8, rotation=30, ha="right")
    axis.set_ylim(0, None)
    axis.set_title("instability: queries whose object\nchanged since the checkpoint before",
                   fontsize=9)


def layers(measures: dict[str, dict], out: str | Path = "layers.png") -> Path:
    """What tools/layer_analysis.py measured, {checkpoint: figures}: AP and duplicates over the
    decoder layers, and recall over the number of proposals where the detector makes any."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for number, (name, figures) in enumerate(measures.items()):
        color = f"C{number}"
        places = range(1, len(figures["AP"]) + 1)
        axes[0].plot(places, figures["AP"], "o-", color=color, label=name)
        axes[1].plot(places, figures["duplicates"], "o-", color=color, label=name)
        if "recall" in figures:
            axes[2].plot(figures["counts"], figures["recall"], "o-", color=color, label=name)
    axes[0].set(title="AP by decoder layer", xlabel="decoder layer", ylim=(0, 1))
    axes[1].set(title="duplicates an object, by decoder layer", xlabel="decoder layer",
                ylim=(0, None))
    axes[2].set(title="recall of the encoder's proposals, IoU 0.5", xlabel="best proposals",
                xscale="log", ylim=(0, 1.02))
    for axis in axes[:2]:
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes:
        clean_axis(axis)
        if axis.lines:
            axis.legend(loc="best", frameon=False, fontsize=9)
        else:
            axis.text(0.5, 0.5, "no proposals", ha="center", transform=axis.transAxes)
    return save_figure(figure, out)


def plot_map(axis, picture, scores, title):
    axis.imshow(picture)
    axis.imshow(scores, cmap="inferno", alpha=0.75, extent=(0, picture.width, picture.height, 0))
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)


def plot_iof_iob(axis, part, analyses):
    """The curve of every checkpoint; the area under it in the legend."""
    for number, (name, a) in enumerate(analyses.items()):
        if part in a:
            curve = a[part]
            axis.plot(curve["IoB"], curve["IoF"], color=f"C{number}",
                      label=f"{name}: {curve['area']:.3f}")
    axis.plot((0, 1), (1, 0), color="#777777", linewidth=0.8, linestyle=":", label="random: 0.5")
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.set_title(f"{part}: objects against background", fontsize=9)
    axis.set_xlabel("IoB, background below the threshold", fontsize=8)
    axis.set_ylabel("IoF, objects above the threshold", fontsize=8)
    axis.legend(loc="lower left", frameon=False, fontsize=8, title="area under the curve",
                title_fontsize=8)


def plot_conflict(axis, name, conflict):
    """The divergences between the heads of one model as a table of shades."""
    axis.imshow(conflict["S"], cmap="Blues")
    largest = max(map(max, conflict["S"]))
    for i, row in enumerate(conflict["S"]):
        for j, value in enumerate(row):
            ink = "white" if value > 0.6 * largest else "black"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    ticks = range(len(conflict["heads"]))
    axis.set(xticks=ticks, yticks=ticks)
    axis.set_title(f"{name}: conflict of heads\nKL(row's map || column's)", fontsize=9)
    axis.set_xticklabels(conflict["heads"], fontsize=8)
    axis.set_yticklabels(conflict["heads"], fontsize=8)
