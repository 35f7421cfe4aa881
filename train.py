"""Trains a paper file on generated scenes or on a COCO-layout folder.

    python train.py --model dino                             generated scenes, small model: minutes on two CPU cores
    python train.py --model dino --data DIR                  the published recipe on your images
    python train.py --model dino --data DIR --preset small --overfit 8
                                                             can it learn eight images? proves data and installation
    python train.py --model dino --resume                    continues runs/dino, to the bit
    torchrun --nproc_per_node 8 train.py --model dino --data DIR

Every field of `Run` below and of the paper file's `Config` is a flag. A paper file is any .py beside this one with
`Config` and `build`. The run folder receives config.json, log.jsonl (every loss), curves.png, predictions.png, last.pt
and best.pt.

What a run promises: the same seed gives the same bytes, on a CPU and with --deterministic on a GPU, resumed anywhere or
not; a step whose loss or gradient is not finite changes nothing and is reported; SIGTERM and SIGINT save first; checkpoints
are whole or absent; memory that runs out ends in the flag to try next.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import json
import math
import os
import random
import re
import signal
import sys
import time
import traceback
import typing
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "2000")   # threads that spin for long stop each other on a busy machine

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from engine.errors import UserError
from engine import checkpoints
from engine import class_rows
from engine import released
from engine.models import load_detector
from engine.recipe import Recipe, configure, override
import data
from engine import datasets
from tools import check_data
import visualize
from backbones import load_backbone_weights
from scenes import NUM_TRAIN, NUM_VAL
from deformable_attn import BuildError, ms_deform_attn
from eval import COLUMNS as AP_COLUMNS
from eval import KINDS, evaluate
from engine.cli import Flags
from engine.machine import prepare_cpu

LOG_EVERY = 10          # steps between lines of log.jsonl, and between waits for the device
BAD_LIMIT = 3           # steps in a row without a finite loss before the run stops
SAME_REQUEST = 2.0      # seconds in which several signals mean one
MAY_CHANGE = {"model", "out", "resume", "device", "workers", "threads", "eval_every", "save_every",   # by --resume
              "accum", "amp", "recompute", "compile", "deterministic"}
PARTS = r"(^|\.|_)((en|de)coder\.\d+|backbone\.(layer\d+\.\d+|(layers\.\d+\.)?blocks\.\d+))$"   # of --recompute, --compile
OVERFIT_STEPS, OVERFIT_EPOCHS, OVERFIT_AP = 100, 30, 0.95   # of --overfit: steps an epoch, epochs, AP that ends it


@dataclass
class Run:
    """What to train, on what and where."""
    model: str = "dino"              # paper file
    variant: str = ""                # one of the paper file's VARIANTS
    preset: str = ""                 # paper or small; empty: small on generated scenes, paper with --data
    data: str = ""                   # COCO-layout folder; empty: generated scenes
    detector: str = ""               # trained detector that a mask network builds on
    out: str = ""                    # run folder; empty: runs/MODEL
    resume: str = ""                 # continue the run in --out (no value needed), in this folder, or from this checkpoint
    init: str = ""                   # start from these weights: by name and shape, class rows by class name
    overfit: int = 0                 # train and evaluate on this many images, without augmentation
    check_data: str = ""             # only examine this folder
    device: str = ""                 # cuda or cpu; empty: cuda where there is one
    amp: bool | None = None          # bfloat16 autocast; none: where the hardware multiplies bfloat16
    num_train: int = NUM_TRAIN       # generated scenes to train on
    num_val: int = NUM_VAL           # and to evaluate on
    seed: int = 0
    accum: int = 1                   # micro-batches per optimiser step
    recompute: bool = False          # forget the activations of layers and blocks, compute them again: less memory, more time
    compile: bool = False            # torch.compile layers and blocks
    deterministic: bool = False      # the same bytes on a GPU too; slower
    workers: int = -1                # processes that read images; -1: chosen from the cores
    threads: int = 0                 # of PyTorch on the CPU; 0: OMP_NUM_THREADS, or one per core, at most 8
    eval_every: int = 1              # epochs
    save_every: int = 1000           # steps, besides the end of every epoch


@dataclass
class Progress:
    """Where a run stands: what decides how it goes on, beside weights, optimiser and random states."""
    epoch: int = 0
    batch: int = 0                   # optimiser steps done in this epoch
    step: int = 0                    # optimiser steps done
    seconds: float = 0.0             # spent training; evaluating and saving are not counted
    bad: int = 0                     # steps in a row that were skipped
    best: float = -1.0               # AP


@dataclass
class Plan:
    """How an epoch is cut: `total` images an optimiser step = `micro` x accum x `world`."""
    total: int
    micro: int
    repeats: int                     # passes over the images in one epoch
    steps: int                       # optimiser steps in an epoch
    rank: int
    world: int


# ---------------------------------------------------------------------------------------------- the loop

def train(run: Run, cfg, recipe: Recipe) -> dict:
    """Trains one model and returns the record of its last evaluation: {"AP", "AP50", ..., "epoch", "step",
    "train_seconds", "best", ...}. `cfg` is a Config of the paper file `run.model`; with `run.resume` it and `recipe` must
    equal the saved ones. Raises FloatingPointError after three bad steps in a row; exits with 128 + signal number when stopped."""
    run, device, rank, world = set_up(run)
    paper = load_paper(run.model)
    out, saved = run_folder(run, cfg, recipe, rank)
    cfg, recipe, train_set, val_set = load_data(run, cfg, recipe, rank)
    plan = make_plan(run, recipe, len(train_set), rank, world)
    frozen = [load_detector(run.detector)] if getattr(paper, "NEEDS_DETECTOR", False) else []
    model, criterion = paper.build(cfg, len(train_set.class_names), *frozen)
    notes = start_weights(run, cfg, model, train_set.class_names)
    model.to(device)
    torch.manual_seed(run.seed + rank)
    average = Average(model, recipe.ema)
    optimizer = torch.optim.AdamW(paper.param_groups(model, recipe), lr=recipe.lr, weight_decay=recipe.weight_decay,
                                  fused=True)
    base_lrs = [group["lr"] * plan.total / recipe.batch_size for group in optimizer.param_groups]   # a small set: a small batch
    prepare_parts(model, run)
    net = model if world == 1 else DistributedDataParallel(model, [device.index] if run.device == "cuda" else None,
                                                           broadcast_buffers=False)   # `step` averages what changes
    now = restore(saved, model, average, optimizer, plan) if saved else Progress()
    if rank == 0:
        (out / "config.json").write_text(json.dumps({"run": vars(run), "config": vars(cfg), "recipe": vars(recipe)}, indent=1) + "\n")
        print(report(run, cfg, recipe, plan, device, train_set, val_set, model, notes, now))
    log, record = Log(out, now, plan, recipe, run), {}

    def save() -> None:
        state = whole_state(run, cfg, recipe, train_set, model, average, optimizer, now, gather(checkpoints.random_state(), world))
        if rank == 0:
            checkpoints.save(out / "last.pt", state, keep_previous=True)

    with Stop() as stop, progress_bar(recipe, plan, now) as bar:
        for epoch in range(now.epoch, recipe.epochs):
            model.train()
            clock = time.perf_counter()
            for batches in epoch_batches(train_set, plan, run, epoch, now.batch):
                factor = lr_factor(recipe, now.step, plan.steps)
                for group, lr in zip(optimizer.param_groups, base_lrs):
                    group["lr"] = lr * factor
                log.waiting.append(step(net, model, criterion, optimizer, average, batches, recipe.clip, run.amp, now.step, world))
                now.step, now.batch = now.step + 1, now.batch + 1
                now.seconds += time.perf_counter() - clock
                clock = time.perf_counter()
                bar.update(plan.total)
                saving, stopping = now.step % run.save_every == 0, max(gather(stop.number, world))   # all ranks stop as one
                if now.step % LOG_EVERY == 0 or now.batch == plan.steps or saving or stopping:
                    log.flush(now, optimizer, bar, model, train_set)
                    if saving or stopping:
                        save()
                    if stopping:
                        log.say(f"stopped by signal {stopping} at step {now.step}, saved; go on with --resume")
                        sys.exit(128 + stopping)
                    clock = time.perf_counter()
            save()   # before evaluating: a run killed from here on evaluates again when it is resumed
            with stop.at_once():
                if (epoch + 1) % run.eval_every == 0 or epoch + 1 == recipe.epochs:
                    record = evaluation(average.model, paper, val_set, cfg, plan, run, now)
                    log.write(record)
                    if rank == 0 and record["AP"] >= now.best:
                        checkpoints.save(out / "best.pt", whole_state(run, cfg, recipe, train_set, model, average, None, now, []))
                    if rank == 0:
                        visualize.curves(out)
                        visualize.predictions(average.model, paper.detect, val_set, cfg, recipe, device, out / "predictions.png")
            now.epoch, now.batch = epoch + 1, 0
            if run.overfit and record.get("AP", 0.0) >= OVERFIT_AP:
                log.say(f"--overfit {run.overfit}: AP {record['AP']:.3f}, data and installation can learn")
                break
    return record


def step(net, model, criterion, optimizer, average, batches: list, clip: float, amp: bool, number: int, world: int):
    """One optimiser step on this rank's micro-batches; the host does not wait for its result.

    -> places in the data set of each micro-batch's images, {loss name: tensor}, gradient norm, whether all of it is finite
    (tensors). When it is not, parameters, optimiser, moving average and batch statistics stay what they were. Losses are
    divided by the number of objects in all micro-batches of all ranks, over ranks: gradients, averaged over ranks, are
    then those of one large batch."""
    num_boxes = sum(gather(sum(len(t["labels"]) for _, _, targets in batches for t in targets), world)) / world
    device = next(model.parameters()).device
    statistics = batch_statistics(model)
    before = [b.clone() for b in statistics]
    optimizer.zero_grad(set_to_none=True)
    losses = {}
    for i, (images, padding, targets) in enumerate(batches):
        targets = data.to_device(targets, device)
        with net.no_sync() if world > 1 and i + 1 < len(batches) else contextlib.nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                outputs = net(images.to(device, non_blocking=True), padding.to(device, non_blocking=True), targets)
            priced = criterion(outputs, targets, max(num_boxes, 1.0 / world))
            sum(priced.values()).backward()
        for name, value in priced.items():
            losses[name] = losses.get(name, 0.0) + value.detach()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf, foreach=True)
    finite = torch.isfinite(norm) & torch.isfinite(torch.stack(list(losses.values())).sum())
    if world > 1:
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    optimizer.found_inf = (~finite).float()   # the fused optimisers skip on it without asking the host (as GradScaler)
    optimizer.step()
    if world > 1:   # every rank has seen its own images; all go on with one model
        average_over_ranks([b for b in statistics if b.is_floating_point()], world)
    for live, old in zip(statistics, before):
        live.copy_(torch.where(finite, live, old))
    average.update(finite, number)
    return [[t["index"] for t in targets] for _, _, targets in batches], losses, norm, finite


def batch_statistics(model) -> list[Tensor]:
    """Buffers that a forward pass changes: not those of a frozen part, which stays in evaluation mode."""
    return [b for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.training
            for b in m.buffers()]


def average_over_ranks(tensors: list[Tensor], world: int) -> None:
    """In place, in one message."""
    if tensors:
        mean = torch.cat([t.flatten() for t in tensors]) / world
        dist.all_reduce(mean)
        for tensor, part in zip(tensors, mean.split([t.numel() for t in tensors])):
            tensor.copy_(part.view_as(tensor))


@contextlib.contextmanager
def statistics_kept(model):
    """Batch statistics come out as they went in. `.data`: a pending backward pass that has saved them notices no change."""
    before = [(b, b.clone()) for b in batch_statistics(model)]
    try:
        yield
    finally:
        for live, old in before:
            live.data.copy_(old)


def prepare_parts(model, run: Run) -> None:
    """--compile and --recompute, on encoder layers, decoder layers and backbone blocks. A part that cannot be compiled as a
    whole is an error. Recomputing keeps a part's inputs only, and repeats it in the backward pass with the random numbers
    it had; batch statistics count once."""
    parts = [module for name, module in model.named_modules() if re.search(PARTS, name)]
    if (run.compile or run.recompute) and not parts:
        raise UserError(f"expected modules named encoder.0, decoder.0 or backbone.layer1.0 for --compile and --recompute, "
                        f"got none in {run.model}: leave the flags out")
    for part in parts:
        if run.compile:
            part.forward = torch.compile(part.forward, fullgraph=True)
        if run.recompute:
            part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False, context_fn=lambda part=part:
                                             (contextlib.nullcontext(), statistics_kept(part)))


class Average:
    """Exponential moving average of every float tensor of a model, batch statistics included: `model` is what gets
    evaluated. The decay grows from 0.1 to its value over the first steps (the average would else remember the random
    start). With decay 0, `model` is the trained model itself."""

    def __init__(self, model, decay: float):
        self.decay, self.model = decay, model
        if decay:
            self.model = copy.deepcopy(model).eval().requires_grad_(False)
            pairs = [(kept, live) for part in ("parameters", "buffers")
                     for kept, live in zip(getattr(self.model, part)(), getattr(model, part)())
                     if kept.is_floating_point() and (part == "buffers" or live.requires_grad)]
            self.kept, self.live = [kept for kept, _ in pairs], [live for _, live in pairs]

    @torch.no_grad()
    def update(self, finite: Tensor, number: int) -> None:
        if self.decay:
            decay = min(self.decay, (1 + number) / (10 + number))
            change = torch._foreach_sub(self.live, self.kept)
            torch._foreach_mul_(change, finite * (1 - decay))
            torch._foreach_add_(self.kept, change)


def lr_factor(recipe, step: int, steps: int) -> float:
    """What every learning rate is multiplied by at this step. `steps`: of one epoch. Step: 0.1 once after epoch lr_drop;
    drops: 0.1 after each share of the run in lr_drops; cosine: from 1 to 0.01; all rise linearly over the first `warmup`
    share of the run."""
    total = steps * recipe.epochs
    rise = min(1.0, (step + 1) / max(1.0, recipe.warmup * total))
    if recipe.schedule == "step":
        return rise * (0.1 if step >= recipe.lr_drop * steps else 1.0)
    if recipe.schedule == "drops":
        return rise * 0.1 ** sum(step >= round(share * total) for share in recipe.lr_drops)
    if recipe.schedule == "cosine":
        return rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / total)))
    if recipe.schedule == "flat":
        return rise
    raise UserError(f"expected --schedule step, drops, cosine or flat, got {recipe.schedule!r}")


# ---------------------------------------------------------------------------------------------- data

def load_data(run: Run, cfg, recipe: Recipe, rank: int):
    """-> cfg, recipe, training set, validation set. With --overfit both are the same few images and nothing is random."""
    if run.overfit:
        recipe, cfg = dataclasses.replace(recipe, schedule="flat"), override(cfg, {"dropout": 0.0})
    masks = getattr(load_paper(run.model), "NEEDS_MASKS", False)
    train_set, val_set = datasets.build_datasets(run.data or None, recipe, run.seed, masks, overfit=run.overfit,
                                             num_train=run.num_train, num_val=run.num_val)
    if masks and not train_set.has_masks:
        raise UserError(f"expected a segmentation for every object of {train_set.name}, as {run.model} learns masks, got "
                        "objects without one: add them to the json, or train a detector")
    if rank == 0:
        check_data.quick_check(train_set)   # refuses a training set without one object
        check_data.quick_check(val_set, training=False)
    return cfg, recipe, train_set, val_set


def make_plan(run: Run, recipe: Recipe, images: int, rank: int, world: int) -> Plan:
    """Cuts the epoch; a training set smaller than the batch gets a smaller batch, said once."""
    parts = run.accum * world
    if recipe.batch_size % parts:
        raise UserError(f"expected --batch_size divisible by accum x processes = {parts}, got {recipe.batch_size}")
    micro = min(recipe.batch_size, images) // parts
    if not micro:
        raise UserError(f"expected at least accum x processes = {parts} training images, got {images}: lower --accum")
    total = micro * parts
    if total < recipe.batch_size and rank == 0:
        print(f"{images} training images: batch {total} instead of {recipe.batch_size}")
    repeats = math.ceil(OVERFIT_STEPS * total / images) if run.overfit else 1
    return Plan(total, micro, repeats, images * repeats // total, rank, world)


def epoch_batches(dataset, plan: Plan, run: Run, epoch: int, start: int):
    """Yields, for every optimiser step of the epoch from number `start` on, this rank's micro-batches.

    The order depends on (seed, epoch) alone and a sample on (seed, epoch, index) alone, so neither workers, ranks nor a
    restart change what is trained on. The images that do not fill a last batch wait for another epoch."""
    order = data.stream("order", run.seed, epoch)
    order = np.concatenate([order.permutation(len(dataset)) for _ in range(plan.repeats)])
    micro = order[:plan.steps * plan.total].reshape(-1, plan.micro)[start * run.accum * plan.world:][plan.rank::plan.world]
    dataset.set_epoch(epoch)
    loader = iter(data.batches(dataset, micro.tolist(), run.workers, run.device == "cuda"))
    for _ in range(start, plan.steps):
        yield [next(loader) for _ in range(run.accum)]


# ---------------------------------------------------------------------------------------------- evaluation

def evaluation(model, paper, dataset, cfg, plan: Plan, run: Run, now: Progress) -> dict:
    """AP on the validation set, printed as one row of a table and returned for the log."""
    begin = time.perf_counter()
    common = dict(batch_size=plan.micro, amp=run.amp, workers=run.workers)
    scores = evaluate(model, paper.detect, dataset, cfg, run.device, rank=plan.rank, world=plan.world, **common)
    main = scores.get("segm", scores["bbox"])["AP"]   # of masks, where the model makes them
    now.best = max(now.best, main)
    record = {"kind": "eval", "epoch": now.epoch + 1, "step": now.step, "train_seconds": round(now.seconds, 3),
              "AP": main, "best": now.best, **{k: scores[k] for k in KINDS if k in scores}}
    record["eval_seconds"] = round(time.perf_counter() - begin, 3)
    cells = [f"{name} {value:.3f}" for name, value in scores["bbox"].items() if name in AP_COLUMNS]
    cells += [f"{name} {scores[kind]['AP']:.3f}" for kind, name in list(KINDS.items())[1:] if kind in scores]
    if plan.rank == 0:
        tqdm.write(f"epoch {record['epoch']:>3}  trained {now.seconds / 60:6.2f} min  " + "  ".join(cells))
    return record


# ---------------------------------------------------------------------------------------------- what is kept

def whole_state(run, cfg, recipe, dataset, model, average, optimizer, now: Progress, rngs: list) -> dict:
    """Everything a checkpoint holds; without `optimizer` only what inference needs."""
    state = {"format": checkpoints.FORMAT, "model_name": run.model, "variant": run.variant,
             "config": dataclasses.asdict(cfg), "recipe": dataclasses.asdict(recipe), "run": dataclasses.asdict(run), "class_names": list(dataset.class_names),
             "category_ids": [int(i) for i in dataset.category_ids], "data": dataset.name, "model": model.state_dict(),
             "progress": dataclasses.asdict(now), "epoch": now.epoch, "step": now.step, "best": now.best}
    if average.decay:
        state["ema"] = average.model.state_dict()
    if optimizer is not None:
        state |= {"optimizer": optimizer.state_dict(), "rng": rngs}
    return state


def restore(state: dict, model, average: Average, optimizer, plan: Plan) -> Progress:
    """Puts a saved run back, random states last. A rank that the saved run did not have keeps the states of its seed."""
    now = override(Progress(), state["progress"])
    if now.step != now.epoch * plan.steps + now.batch:
        raise UserError(f"expected epochs of {(now.step - now.batch) // max(1, now.epoch)} steps as in the saved run, got "
                        f"{plan.steps}: train on the same images with a batch that accum x processes divides")
    model.load_state_dict(state["model"])
    if average.decay:
        average.model.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    if plan.rank < len(state["rng"]):
        checkpoints.set_random_state(state["rng"][plan.rank])
    return now


def start_weights(run: Run, cfg, model, class_names: list[str]) -> list[str]:
    """Fills a fresh model from --init or the backbone's weights -> lines for the report."""
    if getattr(model, "class_names", class_names) != class_names:   # of a wrapped detector
        raise UserError(f"expected a detector of the classes of the data, in this order,\n  {class_names}\n"
                        f"got\n  {model.class_names}\ntrain it on this data, or give --data what it was trained on")
    if run.resume:
        return [f"resumed from {run.resume}"]
    if not run.init:
        backbones = [module for name, module in model.named_modules() if name.split(".")[-1] == "backbone"]
        return [load_backbone_weights(backbone, cfg.backbone, cfg.backbone_weights) for backbone in backbones]
    state = checkpoints.load(run.init)
    if "model_name" not in state:
        state = released.convert(state, run.init)
    fitted, skipped = class_rows.fit(state.get("ema", state["model"]), state["class_names"], model.state_dict(),
                                      class_names)
    model.load_state_dict(fitted)
    return [f"started from {run.init}"] + [f"  skipped {line}" for line in skipped]


def run_folder(run: Run, cfg, recipe: Recipe, rank: int) -> tuple[Path, dict | None]:
    """The run folder, made if need be, and the checkpoint to go on from. Refuses to mix two runs."""
    out = Path(run.out)
    if run.resume:
        state = checkpoints.load(run.resume)   # after `parse`: a path, never "auto"
        if "optimizer" not in state:
            raise UserError(f"{run.resume} holds weights only, a run cannot go on from it: give last.pt, or --init")
        if checkpoints.settings(load_paper(run.model), state) != (cfg, recipe):
            raise UserError(f"expected the config of {run.resume}, got another one: start a new run with --out")
        return out, state
    if rank == 0 and any((out / name).exists() for name in ("last.pt", "last.pt.prev", "best.pt")):
        raise UserError(f"{out} already holds a run: continue it with --resume, or name another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    return out, None


class Log:
    """log.jsonl: a line of mean losses every LOG_EVERY steps and a line of scores at every evaluation; nan_report.jsonl: a
    line for every skipped step. A resumed run drops the lines that it is about to write again."""

    def __init__(self, out: Path, now: Progress, plan: Plan, recipe: Recipe, run: Run):
        self.out, self.plan, self.epochs, self.run, self.waiting, self.seconds = out, plan, recipe.epochs, run, [], now.seconds
        self.start, self.told = now.step, False   # told: what the run costs
        for path in (out / "log.jsonl", out / "nan_report.jsonl"):
            if plan.rank == 0 and path.exists():
                whole = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
                kept = [line for line, record in zip(whole, map(json.loads, whole))
                        if record["step"] + (record.get("kind") == "eval") <= now.step]
                path.with_suffix(".tmp").write_text("".join(kept))
                os.replace(path.with_suffix(".tmp"), path)

    def say(self, text: str) -> None:
        if self.plan.rank == 0:
            tqdm.write(text)

    def write(self, record: dict, name: str = "log.jsonl") -> None:
        if self.plan.rank == 0:
            with open(self.out / name, "a") as file:
                file.write(json.dumps(record) + "\n")

    def flush(self, now: Progress, optimizer, bar, model, dataset) -> None:
        """Reads what the device has computed since the last call, reports bad steps, writes the mean of good ones."""
        names = sorted({name for _, losses, _, _ in self.waiting for name in losses})
        zero = self.waiting[0][2].new_zeros(()).float()
        table = torch.stack([torch.stack([losses.get(name, zero).float() for name in names] + [norm.float(), finite.float()])
                             for _, losses, norm, finite in self.waiting]).cpu()             # (steps, names + 2)
        good = table[table[:, -1] > 0]
        for number, (indices, row) in enumerate(zip((i for i, *_ in self.waiting), table), now.step - len(table) + 1):
            now.bad = 0 if row[-1] else now.bad + 1   # on every rank alike
            if now.bad:
                self.bad_step(number, indices, [n for n, x in zip(names, row) if not x.isfinite()], now.bad, model, dataset)
        speed = len(self.waiting) * self.plan.total / max(now.seconds - self.seconds, 1e-9)
        self.waiting = []
        if len(good):
            *means, norm, _ = good.mean(0).tolist()
            loss = sum(means)
            self.write({"kind": "step", "step": now.step, "epoch": now.epoch, "train_seconds": round(now.seconds, 3),
                        "lr": max(group["lr"] for group in optimizer.param_groups), "images_per_second": round(speed, 2),
                        "loss": loss, "grad_norm": norm, "losses": dict(zip(names, means))})
            bar.set_postfix_str(f"epoch {now.epoch + 1} loss {loss:.3f} {speed:.1f} images/s")
        warm = now.step - self.start >= 2 * LOG_EVERY or now.batch == self.plan.steps   # the first steps are slow
        if warm and not self.told:
            self.told, seconds = True, self.plan.steps * self.plan.total / speed
            self.say(f"expected  {speed:.1f} images/s: {duration(seconds)} an epoch, {duration(seconds * self.epochs)} in all "
                     f"without evaluations; memory at most {peak_memory(self.run.device)} so far")
        self.seconds = now.seconds

    def bad_step(self, number: int, indices: list, losses: list[str], in_a_row: int, model, dataset) -> None:
        """Reports a skipped step with images, losses and first bad module of the ranks where something was wrong; all are
        named when only the gradient was. FloatingPointError when it is the BAD_LIMIT-th in a row."""
        mine = {"images": [int(dataset.image_ids[i]) for micro in indices for i in micro], "losses": losses,
                "module": first_bad_module(model, dataset, indices, self.run.amp)}
        ranks = gather(mine, self.plan.world)
        ranks = [rank for rank in ranks if rank["losses"] or rank["module"]] or ranks
        record = {"kind": "bad", "step": number, "images": [i for rank in ranks for i in rank["images"]],
                  "losses": sorted({name for rank in ranks for name in rank["losses"]}) or ["gradient"],
                  "module": next((rank["module"] for rank in ranks if rank["module"]), ""), "in_a_row": in_a_row}
        self.write(record, "nan_report.jsonl")
        where = f"first in {record['module']}" if record["module"] else "every module's output is finite when run again"
        named = ", ".join(record["losses"][:6]) + (", ..." if len(record["losses"]) > 6 else "")
        self.say(f"step {number}: {named} not finite on images {record['images']} ({where}); skipped, nothing changed")
        if in_a_row >= BAD_LIMIT:
            raise FloatingPointError(f"expected finite losses and gradients, got {in_a_row} bad steps in a row, the last on "
                                     f"images {record['images']} ({where}). {self.out / 'nan_report.jsonl'} names all: look at "
                                     "these images, lower --lr, or try --amp false")


@torch.no_grad()
def first_bad_module(model, dataset, indices: list[list[int]], amp: bool) -> str:
    """Makes these micro-batches again (a sample depends on seed, epoch and index only), runs them forward in training mode
    and uncompiled -> the name of the first module whose output is not finite, "" when there is none. Statistics and random
    states stay what they were; weights are those of now, not more than LOG_EVERY steps after the bad one."""
    device, bad, handles = next(model.parameters()).device, [], []
    for name, module in model.named_modules():
        def look(module, inputs, output, name=name):
            if not bad and torch.is_tensor(output) and not output.isfinite().all():
                bad.append(name)
        handles.append(module.register_forward_hook(look))
    try:
        with statistics_kept(model), torch.random.fork_rng([device] if device.type == "cuda" else []), \
                torch.compiler.set_stance("force_eager"), torch.autocast(device.type, torch.bfloat16, enabled=amp):
            for micro in indices:
                images, padding, targets = data.collate([dataset[i] for i in micro])
                model(images.to(device), padding.to(device), data.to_device(targets, device))
    finally:
        for handle in handles:
            handle.remove()
    return bad[0] if bad else ""


# ---------------------------------------------------------------------------------------------- the machine

def set_up(run: Run) -> tuple[Run, torch.device, int, int]:
    """Device, threads, process group and seeds -> the run with its choices filled in, device, rank, world size."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = run.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    if name == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")   # counts travel from host to host
    threads = run.threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, min(8, cores() // world))
    torch.set_num_threads(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")   # what cuBLAS needs to be deterministic
    torch.use_deterministic_algorithms(run.deterministic)
    amp = run.amp
    if amp is None:
        amp = torch.cuda.is_bf16_supported(False) if name == "cuda" else torch.cpu._is_avx512_bf16_supported()   # no emulation
    workers = run.workers if run.workers >= 0 else min(4, cores() // world // (2 if name == "cuda" else 4))
    random.seed(run.seed + rank)
    np.random.seed(run.seed + rank)
    torch.manual_seed(run.seed)   # every rank builds the same model; `train` then gives each its own chance
    out = run.out or (str(Path(run.resume).parent) if run.resume else f"runs/{run.model}")
    return dataclasses.replace(run, device=name, amp=amp, threads=threads, workers=workers, out=out), device, rank, world


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def gather(value, world: int) -> list:
    """This value of every rank, in order."""
    if world == 1:
        return [value]
    values = [None] * world
    dist.all_gather_object(values, value)
    return values


class Stop:
    """Turns SIGTERM and SIGINT into a request to save and stop after this step; asked again, it quits. What follows within
    SAME_REQUEST seconds is no second request: a scheduler signals every process, and torchrun then passes it on."""

    def __init__(self):
        self.number, self.asked, self.immediately, self.previous = 0, 0.0, False, {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame) -> None:
        if self.immediately or self.number and time.monotonic() > self.asked + SAME_REQUEST:
            sys.exit(128 + number)
        if not self.number:
            self.number, self.asked = number, time.monotonic()

    @contextlib.contextmanager
    def at_once(self):
        """Inside, everything is saved already: the first signal quits."""
        self.immediately = True
        if self.number:
            sys.exit(128 + self.number)
        yield
        self.immediately = False


def progress_bar(recipe: Recipe, plan: Plan, now: Progress):
    """Images of the whole run, images a second, time left."""
    return tqdm(total=recipe.epochs * plan.steps * plan.total, initial=now.step * plan.total, unit="image",
                disable=plan.rank > 0, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 60,
                bar_format="{percentage:3.0f}%|{bar}| {elapsed}, left {remaining} {postfix}")


def attention(device: torch.device) -> str:
    """Which deformable attention this device gets, found out on one pixel."""
    value, points = torch.zeros(1, 1, 1, 4, device=device), torch.zeros(1, 1, 1, 1, 1, 2, device=device)
    try:
        ms_deform_attn(value, [(1, 1)], points, points[..., 0], impl="kernel")
    except BuildError as error:
        return f"plain PyTorch ({error})"
    return "kernel"


def duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def peak_memory(device: str) -> str:
    """The most that was in use so far: of the GPU, or by this process, where the system tells (Linux)."""
    if device == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB"
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    return f"{int(found[1]) / 2 ** 20:.1f} GiB" if found else "unknown"


def report(run: Run, cfg, recipe: Recipe, plan: Plan, device, train_set, val_set, model, notes: list[str], now: Progress) -> str:
    """What is about to happen, in about ten lines."""
    counts = sorted(zip(data.class_counts(train_set).tolist(), train_set.class_names), reverse=True)
    classes = ", ".join(f"{name} {count}" for count, name in counts[:12]) + (", ..." if len(counts) > 12 else "")
    without = sum(not count for count, _ in counts)
    kinds = f"{len(counts)} classes" + (f" ({without} without any)" if without else "")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    busy = f" (busy: load {load:.1f}; --threads 1 may be faster)" if run.threads > 1 and load > cores() / 2 else ""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {run.threads} threads{busy}"
    batch = f"batch {plan.total}" + (f" = {plan.micro} x {run.accum} x {plan.world}" if plan.micro < plan.total else "")
    _, made_for = preset(load_paper(run.model), run)
    hint = "" if plan.total == made_for.batch_size else (
        f" (the recipe: {made_for.lr:g} for batch {made_for.batch_size}; lr follows the batch unless --lr is given)")
    options = "".join(f"; {name}" for name in ("recompute", "compile", "deterministic") if getattr(run, name))
    lines = [f"config    {json.dumps(dataclasses.asdict(cfg))}",
             f"recipe    {json.dumps(dataclasses.asdict(recipe))}",
             f"device    {where}; {'bfloat16 autocast' if run.amp else 'float32'}; "
             f"deformable attention: {attention(device)}{options}",
             f"data      {train_set.name}: {len(train_set)} images to train on, {len(val_set)} to evaluate on; "
             f"{run.workers} workers",
             f"objects   {sum(c for c, _ in counts)} in {kinds}: {classes}",
             f"model     {' '.join((run.model, run.variant)).strip()}: {trainable / 1e6:.2f} M parameters to train of "
             f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
             f"training  {batch}, lr {recipe.lr * plan.total / recipe.batch_size:g}{hint}, {recipe.epochs} epochs of {plan.steps} "
             f"steps, seed {run.seed}",
             *(f"weights   {note}" for note in notes),
             f"folder    {run.out}"]
    if now.step:
        ended = ", trained to the end: evaluates again" if now.step == recipe.epochs * plan.steps else ""
        lines.append(f"resuming  at step {now.step} of {recipe.epochs * plan.steps}{ended}")
    if run.device == "cpu" and run.preset == "paper":
        lines.append("note      the published sizes are meant for a GPU: a CPU takes minutes a step, 1.5 GB or more for each "
                     "image of a batch (--accum N divides it); --preset small is meant for CPUs")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- the command line

def paper_files() -> list[str]:
    """Names of the files beside this one that define both `Config` and `build`."""
    sources = {path.stem: path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))}
    return [name for name, text in sources.items() if "\nclass Config" in text and "\ndef build(" in text]


def load_paper(name: str):
    """The module of a paper file; ValueError lists the files that qualify."""
    found = importlib.util.find_spec(name) if re.fullmatch(r"\w+", name) else None
    paper = importlib.import_module(name) if found else None
    if not (hasattr(paper, "Config") and hasattr(paper, "build")):
        raise UserError(f"expected --model to name a file with Config and build, got {name!r}: "
                        f"there are {', '.join(paper_files())}")
    return paper


def parser_of(hint, default):
    """The function that reads a flag of this type from text: tuples are comma lists, `X | None` reads as X."""
    if typing.get_args(hint) and type(None) in typing.get_args(hint):
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if hint is bool:
        def boolean(text: str) -> bool:
            if text.lower() not in ("true", "false", "1", "0"):
                raise ValueError(text)   # argparse names flag and text
            return text.lower() in ("true", "1")
        return boolean
    if isinstance(default, tuple):
        def comma_list(text: str) -> tuple:
            return tuple(type(default[0])(part) for part in text.split(",") if part)
        return comma_list
    return hint


@functools.cache   # `parse` asks twice for those of Run, and finding a class compiles its whole file
def field_comments(cls) -> dict[str, str]:
    """Field of a dataclass -> its comment in the source."""
    return dict(re.findall(r"^    (\w+)\s*:[^#\n]*#\s*(.*)$", inspect.getsource(cls), re.M))


def add_flags(parser, defaults, small: dict) -> None:
    """One flag per field of a dataclass; its comment in the source is its help text."""
    cls = type(defaults)
    comments, hints = field_comments(cls), typing.get_type_hints(cls)
    group = parser.add_argument_group(f"{cls.__module__.replace('__main__', 'train')}.{cls.__name__}")
    show = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else value
    for item in dataclasses.fields(cls):
        shown = f"{show(getattr(defaults, item.name))}" + (f" ({show(small[item.name])})" if item.name in small else "")
        options = dict(dest=item.name, default=argparse.SUPPRESS, type=parser_of(hints[item.name], item.default),
                       help=f"{comments.get(item.name, '')} [{shown}]".strip().replace("%", "%%"), metavar="X")
        if hints[item.name] in (bool, bool | None):
            group.add_argument(f"--no_{item.name}", dest=item.name, action="store_const", const=False,
                               default=argparse.SUPPRESS, help=argparse.SUPPRESS)
            options |= dict(nargs="?", const=True)
        if item.name == "resume":
            options |= dict(nargs="?", const="auto")
        group.add_argument(f"--{item.name}", **options)


def preset(paper, run: Run) -> tuple:
    """The paper file's Config and Recipe for this preset and variant, before flags."""
    return configure(paper, getattr(paper, "SMALL", {}) if run.preset == "small" else {},
                     getattr(paper, "VARIANTS", {}).get(run.variant, {}))


def parse(argv: list[str]) -> tuple[Run, object, Recipe]:
    """Command line -> Run, Config and Recipe: the file's defaults, then its SMALL with preset small, then the variant, then
    flags; learning rates follow --batch_size in proportion unless --lr is given. A resumed run takes everything from its
    checkpoint and refuses flags that contradict it."""
    first = Flags(add_help=False)
    add_flags(first, Run(), {})
    peek = Run(**vars(first.parse_known_args(argv)[0]))
    base = Run()
    if peek.resume:
        path = Path(peek.resume if peek.resume != "auto" else peek.out or f"runs/{peek.model}")
        if peek.resume == "auto" or path.is_dir():
            path = checkpoints.newest(path)
        state = checkpoints.load(path)
        saved_run = {**state["run"], "detector": checkpoints.saved_detector(state)}
        base = dataclasses.replace(Run(**saved_run), resume=str(path), init="", out=str(path.parent))
    paper = load_paper(base.model if peek.resume else peek.model)
    small, variants = getattr(paper, "SMALL", {}), getattr(paper, "VARIANTS", {})
    parser = Flags(description=__doc__.split("\n")[0], usage="python train.py --model NAME [--flag value ...]",
                   epilog="Defaults in brackets; in parentheses those of --preset small. "
                          f"Models: {', '.join(paper_files())}. Variants of this one: {', '.join(variants) or 'none'}.")
    add_flags(parser, Run(), {})
    add_flags(parser, paper.Config(), small)
    add_flags(parser, paper.RECIPE, small)
    given = vars(parser.parse_args(argv))
    known = {item.name for item in dataclasses.fields(Run)}
    run_given = {name: value for name, value in given.items() if name in known}
    cfg_given = {name: value for name, value in given.items() if name not in known}
    if peek.resume:
        cfg, recipe = checkpoints.settings(paper, state)
        now = {**dataclasses.asdict(base), **dataclasses.asdict(cfg), **dataclasses.asdict(recipe)}
        other = sorted(name for name in set(given) - MAY_CHANGE if given[name] != now[name])
        if other:
            parser.error(f"--resume goes on with the saved settings ({path}), got another --{other[0]} {given[other[0]]}: "
                         f"the run has {now[other[0]]}; leave it out, or start a new run with --init and --out")
        kept = {name: value for name, value in run_given.items() if name in MAY_CHANGE - {"resume", "out"}}
        return dataclasses.replace(base, **kept), cfg, recipe
    run = Run(**run_given)
    run.preset = run.preset or ("paper" if run.data else "small")
    if run.preset not in ("paper", "small"):
        parser.error(f"expected --preset paper or small, got {run.preset!r}")
    if run.variant not in ("", *variants):
        parser.error(f"expected --variant {' or '.join(variants) or 'left out: this file has none'}, got {run.variant!r}")
    _, made_for = preset(paper, run)
    values = {**small, **variants.get(run.variant, {})} if run.preset == "small" else dict(variants.get(run.variant, {}))
    if "batch_size" in cfg_given and "lr" not in cfg_given:
        share = cfg_given["batch_size"] / made_for.batch_size
        values |= {name: getattr(made_for, name) * share for name in ("lr", "lr_backbone", "lr_offsets")}
    if run.overfit:
        values["epochs"] = OVERFIT_EPOCHS
    return run, *configure(paper, values, cfg_given)


def out_of_memory(error, run: Run, recipe: Recipe) -> str:
    """What is lost (nothing that was saved) and what to try next: first what leaves every result as it is."""
    last = Path(run.out or f"runs/{run.model}") / "last.pt"
    flag = f"--accum {2 * run.accum}"
    if not run.recompute:
        flag = "--recompute"
    elif run.amp is False and torch.cuda.is_available():
        flag = "--amp true"
    elif recipe.batch_size % (2 * run.accum * int(os.environ.get("WORLD_SIZE", 1))):
        start = f" --init {last} --out DIR" if last.exists() else ""
        return f"out of memory ({error}). Try smaller images in a new run: --max_size {recipe.max_size // 2}{start}"
    went = f"{last} is whole: add --resume to go on from there" if last.exists() else "nothing was saved yet"
    return f"out of memory ({error}). Try {flag}; {went}"


def main(argv: list[str] | None = None) -> None:
    try:
        run, cfg, recipe = parse(sys.argv[1:] if argv is None else argv)
        if run.check_data:
            sys.exit(1 if check_data.check(run.check_data) else 0)
        train(run, cfg, recipe)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (ValueError, RuntimeError, FileNotFoundError, FloatingPointError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            sys.exit(f"train.py: error: {out_of_memory(error, run, recipe)}")
        raised = traceback.extract_tb(error.__traceback__)[-1]   # what this project raises is meant to be read without a trace
        if Path(__file__).parent not in Path(raised.filename).parents or not raised.line.startswith("raise"):
            raise
        sys.exit(f"train.py: error: {error}")


if __name__ == "__main__":
    prepare_cpu()
    main()
