"""Time and memory of whole models: training steps and inference."""
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Literal

import torch
from torch.utils import benchmark

import data
import train
from deformable_attn import MSDeformAttn
from engine.datasets import build_datasets
from engine.layers import compile_or_recompute
from engine.machine import Machine, prepare_cpu
from engine.models import load_paper
from engine.recipe import configure, preset_values
from tools.timing import (DEVICE, Device, alternating_ms, median_ms, peak_gib, show_progress,
                          write_table)

SMALL_BATCHES = (8, 32)     # of the small preset, on a CPU
PAPER_BATCHES = (1, 2, 4)   # of the published sizes, on a GPU
BATCHES = PAPER_BATCHES if DEVICE == "cuda" else SMALL_BATCHES
PRESET = "paper" if DEVICE == "cuda" else "small"


class TrainingStep:
    """A model with the optimizer and the EMA of its recipe; calling it makes one training step on
    a batch. `paper`: its paper file."""

    def __init__(self, paper, model, criterion, recipe, device: Device):
        self.model = model.to(device).train()
        self.criterion = criterion
        batch = SimpleNamespace(total=recipe.batch_size)
        self.optimizer, _ = train.make_optimizer(paper, model, recipe, batch)
        self.ema = train.make_ema(model, recipe.ema)
        self.clip = recipe.clip
        self.device = torch.device(device)

    def __call__(self, batch, amp=False):
        """batch: images, padding, targets. amp: bfloat16 autocast"""
        train.step(self.model, self.model, self.criterion, self.optimizer, self.ema, [batch],
                   self.clip, Machine(self.device, amp))


def random_batch(size, count):
    """Images of noise without padding, eight objects each -> images, padding, targets"""
    targets = []
    for i in range(count):
        boxes = torch.rand(8, 4) * 0.3 + 0.3
        targets.append({"labels": torch.arange(8), "boxes": boxes, "index": i})
    images = torch.randn(count, 3, *size)
    padding = torch.zeros(count, *size, dtype=torch.bool)
    return images, padding, targets


def logit_difference(logits, others) -> float:
    """Largest difference between the logits (N, K) of one image and others (N, K): each row is
    compared with the nearest one of the other tensor, in both directions. NaN if any is not finite.

    Row i is not compared with row i: proposals whose scores differ by rounding change places."""
    if not (logits.isfinite().all() and others.isfinite().all()):
        return math.nan
    distances = torch.cdist(logits, others, p=math.inf)                  # (N, N)
    return max(distances.amin(0).max().item(), distances.amin(1).max().item())


# ---- the kernel in a training step ---------------------------------------------------------------

def step(device: Device = DEVICE, repeats: int = 9,
         models: tuple[str, ...] = ("deformable_detr", "dino")):
    """Time training steps of the small preset, with our kernels and with PyTorch alone.

    Args:
        device: Where to run.
        repeats: Steps of each kind; the median is reported.
        models: Paper files.
    """
    rows = []
    for name in models:
        paper = load_paper(name)
        cfg, recipe = configure(paper, preset_values(paper, "small", ""))
        batch = scene_batch(recipe, recipe.batch_size)
        model, criterion = paper.build(cfg, num_classes=8)
        training = TrainingStep(paper, model, criterion, recipe, device)
        for amp in (False, True):
            functions = {}
            for impl in ("torch", "kernel"):
                functions[impl] = with_attention(impl, training, batch, amp)
            ms = alternating_ms(functions, repeats)
            rows.append([name, "bfloat16" if amp else "float32", f"{ms['torch']:.0f}",
                         f"{ms['kernel']:.0f}", f"{ms['torch'] / ms['kernel']:.2f}"])
            show_progress(rows[-1])
    columns = ("model (small preset)", "autocast", "PyTorch ms", "kernels ms", "ratio")
    write_table("step", device, columns, rows)


def scene_batch(recipe, count):
    """The first generated scenes -> images, padding, targets"""
    dataset, _ = build_datasets("", recipe, seed=0, num_train=count, num_val=1)
    return data.collate([dataset[i] for i in range(count)])


def with_attention(impl, training, batch, amp):
    """A training step with one implementation of the attention, as a function of nothing."""
    def call():
        MSDeformAttn.impl = impl
        training(batch, amp)
        MSDeformAttn.impl = None
    return call


# ---- compiled layers -----------------------------------------------------------------------------

def compiled(device: Device = DEVICE, repeats: int = 5, model: str = "dino",
             preset: Literal["paper", "small"] = PRESET, batch: int = 8, amp: bool = False,
             size: tuple[int, int] = (480, 640)):
    """Time training steps with and without --compile, which take turns, and the compilation.

    Args:
        device: Where to run.
        repeats: Steps of each kind; the median is reported.
        model: Paper file.
        preset: Sizes of the model and the images.
        batch: Images of a step.
        amp: Use bfloat16 autocast.
        size: Height and width of the images with the preset paper, in pixels.
    """
    paper = load_paper(model)
    cfg, recipe = configure(paper, preset_values(paper, preset, ""))
    if preset == "small":
        inputs = scene_batch(recipe, batch)
    else:
        inputs = random_batch(size, batch)
    functions = {}
    for name in ("plain", "compiled"):
        net, criterion = paper.build(cfg, num_classes=80)
        compile_or_recompute(net, train.Run(model=model, compile=name == "compiled"))
        training = TrainingStep(paper, net, criterion, recipe, device)
        functions[name] = partial(training, inputs, amp)
    begin = benchmark.timer()
    functions["compiled"]()
    seconds = benchmark.timer() - begin
    ms = alternating_ms(functions, repeats)
    images = "x".join(map(str, inputs[0].shape))
    columns = ("model", "images", "ms a step", "with --compile", "ratio", "first step s")
    row = [f"{model}, {preset} preset", images, f"{ms['plain']:.0f}", f"{ms['compiled']:.0f}",
           f"{ms['plain'] / ms['compiled']:.2f}", f"{seconds:.0f}"]
    write_table(f"compiled_{preset}", device, columns, [row])


# ---- inference -----------------------------------------------------------------------------------

MODELS = ("deformable_detr:two_stage", "h_detr", "dino", "co_detr")


def inference(device: Device = DEVICE, seconds: float = 5.0, models: tuple[str, ...] = MODELS,
              size: tuple[int, int] = (800, 1199)):
    """Time models of published size from an image tensor to detections, one image at a time.

    Args:
        device: Where to run.
        seconds: How long each figure is measured; the median is reported.
        models: Paper files, each with a variant if wanted: FILE:VARIANT.
        size: Height and width of the image in pixels.
    """
    rows = []
    for text in models:
        paper, cfg, _ = paper_of_size(text)
        model, _ = paper.build(cfg, num_classes=80)
        model.to(device).eval()
        cells = []
        for amp in (False, True):
            call = detection(model, paper, cfg, size, device, amp)
            ms = median_ms(call, seconds)
            cells += [f"{ms:.0f}", f"{1e3 / ms:.2f}"]
        rows.append([text.replace(":", " "), *cells])
        show_progress(rows[-1])
    columns = (f"{size[0]}x{size[1]}", "float32 ms", "images/s", "bfloat16 ms", "images/s")
    write_table("inference", device, columns, rows)


def paper_of_size(text: str) -> tuple:
    """FILE or FILE:VARIANT -> the paper file, its Config and its Recipe, at the published size."""
    name, _, variant = text.partition(":")
    paper = load_paper(name)
    return paper, *configure(paper, preset_values(paper, "paper", variant))


def detection(model, paper, cfg, size, device, amp):
    """Detection on one image of noise, as a function of nothing."""
    images, padding, _ = random_batch(size, 1)
    images = images.to(device)
    padding = padding.to(device)

    @torch.inference_mode()
    def call():
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            outputs = model(images, padding)
        paper.detect(outputs, torch.tensor([size]), cfg)
    return call


# ---- memory --------------------------------------------------------------------------------------

@dataclass
class Setting:
    """One row of the memory table."""
    model: str
    preset: str
    batch: int
    recompute: bool
    amp: bool
    size: tuple[int, int]
    device: Device
    seconds: float


def memory(device: Device = DEVICE, seconds: float = 2.0,
           models: tuple[str, ...] = ("deformable_detr", "h_detr", "dino", "co_detr"),
           preset: Literal["paper", "small"] = PRESET, batches: tuple[int, ...] = BATCHES,
           amp: bool = True, size: tuple[int, int] = (800, 1333)):
    """Measure time and peak memory of a training step, with and without --recompute.

    Args:
        device: Where to run.
        seconds: How long each figure is measured; the median is reported.
        models: Paper files.
        preset: Sizes of the models and the images.
        batches: Images of a step.
        amp: Use bfloat16 autocast.
        size: Height and width of the images with the preset paper, in pixels.
    """
    rows = []
    for name in models:
        for batch in batches:
            for recompute in (False, True):
                setting = Setting(name, preset, batch, recompute, amp, size, device, seconds)
                ms, gib = in_new_process(step_cost, setting)
                rows.append([name, batch, "yes" if recompute else "no", f"{ms:.0f}",
                             f"{1e3 * batch / ms:.1f}", f"{gib:.2f}"])
                show_progress(rows[-1])
    columns = (f"{preset} preset, {'bfloat16' if amp else 'float32'}", "batch", "--recompute",
               "ms a step", "images/s", "peak GiB")
    notes = ["Peak: of the process, or on a GPU of PyTorch's allocator."]
    write_table("memory", device, columns, rows, notes)


def in_new_process(function, *arguments):
    """Call a function in a process of its own, whose peak memory starts anew."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def step_cost(setting: Setting) -> tuple[float, float]:
    """Median ms of a training step, and the peak memory of this process in GiB."""
    prepare_cpu()
    paper = load_paper(setting.model)
    cfg, recipe = configure(paper, preset_values(paper, setting.preset, ""))
    if setting.preset == "small":
        batch = scene_batch(recipe, setting.batch)
    else:
        batch = random_batch(setting.size, setting.batch)
    model, criterion = paper.build(cfg, num_classes=80)
    compile_or_recompute(model, train.Run(recompute=setting.recompute))
    training = TrainingStep(paper, model, criterion, recipe, setting.device)
    ms = median_ms(lambda: training(batch, setting.amp), setting.seconds)
    return ms, peak_gib(setting.device)
