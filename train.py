"""Train a detector on generated scenes or on a COCO-layout folder.

    python train.py --model dino                       generated scenes: minutes on two CPU cores
    python train.py --model dino --data DIR            the published recipe on your images
    python train.py --model dino --data DIR --preset small --overfit 8    can it learn eight images?
    python train.py --model dino --resume              continue runs/dino, bit-exactly
    torchrun --nproc_per_node 8 train.py --model dino --data DIR

To begin with: --model, --data, --preset, --out, --resume, --overfit; then --epochs, --batch_size,
--lr and --num_queries. The run folder receives config.json, log.jsonl, curves.png, predictions.png,
last.pt and best.pt.
"""
# A paper file is any .py beside this one with these names (`cp dino.py mine.py` is a new model):
#
#   Config                          dataclass: architecture and loss, also `top_k`, and `backbone`
#                                   and `backbone_weights` where the model has a backbone
#   RECIPE                          engine.recipe.Recipe: how the paper trains it
#   SMALL, VARIANTS                 optional: overrides of both by field name; {name: overrides}
#   NEEDS_MASKS, NEEDS_DETECTOR     optional: True where targets need masks; where `build` gets a
#                                   trained detector (engine.models.Loaded) as a third argument
#   build(cfg, num_classes)         -> model, criterion
#   model(images, padding, targets) -> outputs; images (B, 3, H, W), padding (B, H, W) True outside,
#                                   targets B x {labels (n,), boxes (n, 4) cxcywh in [0, 1]}
#   criterion(outputs, targets, num_boxes)   -> {name: weighted loss}
#   detect(outputs, sizes, cfg)     -> B x {scores (k,), labels (k,), boxes (k, 4) xyxy px, ...}
#   param_groups(model, recipe)     -> groups of parameters with their `lr`
#   outputs: pred_logits (B, N, classes), pred_boxes (B, N, 4); `anchors` and `memory` for analysis
import contextlib
import math
import os
import sys
import time
from dataclasses import dataclass, replace

# read when torch is imported: threads that spin for long stop each other on a busy machine
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# GPU memory in segments that grow: images of many sizes leave no gaps of unusable memory
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from torch.optim.swa_utils import AveragedModel

import data
import visualize
from engine import cli
from engine.batch_norm import batch_statistics
from engine.batches import BatchSizes, epoch_batches
from engine.checkpoints import RunFolder
from engine.datasets import build_datasets
from engine.errors import UserError
from engine.layers import compile_or_recompute, order_channels_last, prepare_attention
from engine.machine import (Machine, StopSignals, lost_peers, memory_advice, prepare_cpu,
                            set_up_machine, user_errors)
from engine.models import load_detector, load_paper, start_weights
from engine.recipe import Recipe, override
from engine.run_log import RunLog
from engine.schedules import ema_decay, is_kept
from eval import KINDS, evaluate, thresholds
from scenes import NUM_TRAIN, NUM_VAL
from tools import check_data

OVERFIT_AP = 0.95   # ends --overfit


@dataclass
class Run:
    """What to train, on what data, on which machine."""
    model: str = "dino"              # paper file
    data: str = ""                   # COCO-layout folder; none: generated scenes
    preset: str = ""                 # paper or small; with --data paper, else small
    variant: str = ""                # one of the paper file's VARIANTS
    out: str = ""                    # run folder; none: runs/MODEL
    resume: cli.OptionalText = ""    # continue the run in --out (no value needed) or in this folder
    overfit: int = 0                 # learn this many images by heart, without augmentation; 0: all
    init: str = ""                   # start from a checkpoint; class rows are copied by class name
    detector: str = ""               # trained detector that a mask network builds on
    check_data: str = ""             # only examine this COCO-layout folder
    num_train: int = NUM_TRAIN       # generated scenes to train on
    num_val: int = NUM_VAL           # generated scenes to evaluate on
    seed: int = 0                    # same seed, same bytes
    device: str = ""                 # cpu or cuda; none: cuda where there is a GPU
    amp: bool | None = None          # bfloat16 autocast; auto: if the hardware supports it
    accum: int = 1                   # micro-batches per optimizer step: less memory, same gradients
    recompute: bool = False          # recompute activations in the backward pass: less memory
    compile: bool = False            # torch.compile layers and blocks
    channels_last: bool = False      # GPU only: ResNet in NHWC order, faster on many GPUs
    impl: str = ""                   # deformable attention: kernel or torch; none: kernel if built
    deterministic: bool = False      # same bytes on a GPU too; slower
    workers: int = -1                # data-loading processes; -1: chosen from the number of cores
    threads: int = 0                 # PyTorch CPU threads; 0: OMP_NUM_THREADS, or one a core, max 8
    eval_every: int = 1              # epochs between evaluations
    save_every: int = 1000           # steps between saves; every epoch is saved too
    keep_every: int = 0              # keep epoch_NNNN.pt of every N epochs; 0: before lr drops only
    max_steps: int = 0               # end, saved, after this many optimizer steps; 0: all epochs


@dataclass
class Progress:
    """Where a run stands. All of it is saved and restored."""
    epoch: int = 0
    batch: int = 0                   # optimizer steps done in this epoch
    step: int = 0                    # optimizer steps done in total
    seconds: float = 0.0             # of training; evaluating and saving are not counted
    bad_steps: int = 0               # skipped in a row
    best: float = -1.0               # highest AP so far

    def count(self, finite: bool) -> None:
        """Count one step."""
        self.step += 1
        self.batch += 1
        self.bad_steps = 0 if finite else self.bad_steps + 1


def train(run: Run, cfg, recipe: Recipe) -> dict:
    """Train one model -> the record of its last evaluation: {"AP", "bbox", "epoch", "step", ...}.
    FloatingPointError after three bad steps in a row; exits with 128 + signal when stopped."""
    paper = load_paper(run.model)
    machine = set_up_machine(run)
    with RunFolder(run, machine) as folder:
        # data
        cfg, recipe = without_noise(run, cfg, recipe)
        train_set, val_set = load_data(run, paper, recipe, machine)
        batch = BatchSizes(recipe.batch_size, run, machine, len(train_set))

        # model and optimizer; every rank has the same weights, and its own noise
        model, criterion = build_model(run, paper, cfg, len(train_set.class_names))
        with machine.first_on_node():     # one process downloads and compiles for all others
            notes = start_weights(run, cfg, model, train_set.class_names)
            prepare_attention(run.impl, machine.device)
        model.to(machine.device)
        if run.channels_last:
            order_channels_last(model, machine.device)
        machine.seed_rank(run.seed)
        ema = make_ema(model, recipe.ema, recipe.ema_warmup)
        optimizer, base_lrs = make_optimizer(paper, model, recipe, batch)
        compile_or_recompute(model, run)
        net = machine.distribute(model)

        # where the run stands
        progress = Progress()
        if run.resume:
            progress = folder.restore(progress, model, ema, optimizer, batch.steps)
        if run.max_steps and progress.step >= run.max_steps:
            raise UserError(f"expected --max_steps above {progress.step}, the steps this run has "
                            f"made, got {run.max_steps}: give more, or leave it out")
        folder.describe(cfg, recipe, train_set)
        log = RunLog(run, recipe, batch, machine, progress)
        log.report(paper, cfg, train_set, val_set, model, notes)

        record = {}
        with StopSignals() as stop, log.bar:
            for epoch in range(progress.epoch, recipe.epochs):
                model.train()
                log.start_clock()
                for micro_batches in epoch_batches(
                        train_set, batch, run, machine, epoch, progress.batch):
                    set_lr(optimizer, base_lrs, lr_factor(recipe, progress.step, batch.steps))
                    # the one small message between ranks: all stop after the same step
                    count, signal = machine.share(count_objects(micro_batches), stop.signal)
                    losses, grad_norm, finite = step(net, model, criterion, optimizer, ema,
                                                     micro_batches, recipe.clip, machine, count)
                    progress.count(finite)

                    if machine.world == 1:
                        signal = stop.signal     # also one that came during the step
                    ended = progress.step == run.max_steps
                    saving = progress.step % run.save_every == 0 or signal > 0 or ended
                    log.step(progress, losses, grad_norm, finite, optimizer, write=saving)
                    if not finite:
                        log.bad_step(progress, losses, model, micro_batches)
                    if saving:
                        folder.save("last.pt", progress, model, ema, optimizer)
                        log.start_clock()
                    if signal:
                        log.stopped(progress, signal)
                        sys.exit(128 + signal)
                    if ended:
                        machine.say(f"--max_steps: ended at step {progress.step}, saved; continue "
                                    "with --resume and a larger number")
                        return record

                # a run killed from here on evaluates again when it is resumed
                folder.save("last.pt", progress, model, ema, optimizer)
                if is_kept(run.keep_every, recipe, epoch, batch.steps):
                    folder.save(f"epoch_{epoch + 1:04}.pt", progress, model, ema, optimizer)
                with stop.immediately():
                    if (epoch + 1) % run.eval_every == 0 or epoch + 1 == recipe.epochs:
                        record = evaluation(ema, paper, val_set, cfg, batch, machine, progress)
                        log.evaluation(record)
                        if record["AP"] >= progress.best:
                            folder.save("best.pt", progress, model, ema,
                                        thresholds=thresholds(record))
                        if machine.is_main:
                            draw(run, ema.module, paper, val_set, cfg, machine)
                progress.epoch = epoch + 1
                progress.batch = 0
                if run.overfit and record.get("AP", 0.0) >= OVERFIT_AP:
                    machine.say(f"--overfit: AP {record['AP']:.3f}, it can learn from this data")
                    break
        return record


def step(net, model, criterion, optimizer, ema, micro_batches, clip, machine, count=None):
    """Make one optimizer step. -> {loss name: number}, gradient norm, whether all of it is finite

    net: the model, or its DistributedDataParallel. count: objects of all ranks, counted here where
    it is not given. A step that is not finite changes nothing:
    parameters, optimizer, EMA and batch statistics stay as they were. The loss is the mean over all
    micro-batches of all ranks. Each divides by the mean number of objects of a micro-batch, so that
    the gradient is that of one large batch, except where a criterion counts for itself
    (Co-DETR)."""
    if count is None:
        count, _ = machine.share(count_objects(micro_batches), 0)
    num_boxes = max(count, 1) / (machine.world * len(micro_batches))
    statistics = batch_statistics(model)
    before = [buffer.clone() for buffer in statistics]

    # gradients; those of ranks are averaged once, in the last backward pass
    optimizer.zero_grad(set_to_none=True)
    losses = {}
    for i, (images, padding, targets) in enumerate(micro_batches):
        images = images.to(machine.device, non_blocking=True)      # (B, 3, H, W)
        padding = padding.to(machine.device, non_blocking=True)    # (B, H, W)
        targets = data.to_device(targets, machine.device)
        is_last = i + 1 == len(micro_batches)
        with contextlib.nullcontext() if is_last or net is model else net.no_sync():
            with machine.autocast():
                outputs = net(images, padding, targets)
            weighted = criterion(outputs, targets, num_boxes)
            loss = sum(weighted.values()) / len(micro_batches)
            # 0 x NaN and 0 x infinity are NaN: a bad loss makes bad gradients on every rank, and
            # all skip the step without another message
            (loss * (1 + 0 * loss.detach())).backward()
        for name, value in weighted.items():
            losses[name] = losses.get(name, 0.0) + value.detach() / len(micro_batches)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf, foreach=True)

    # the one wait for the device
    numbers = torch.stack([*losses.values(), grad_norm]).tolist()
    finite = all(math.isfinite(x) for x in [*numbers, clip])
    if finite:
        optimizer.step()
        machine.average(statistics)     # every rank has seen its own images
        ema.update_parameters(model)
    else:
        for buffer, old in zip(statistics, before):
            buffer.copy_(old)
    return dict(zip(losses, numbers)), numbers[-1], finite


def count_objects(micro_batches) -> int:
    return sum(len(target["labels"]) for *_, targets in micro_batches for target in targets)


# ---- model and optimizer -------------------------------------------------------------------------

def build_model(run: Run, paper, cfg, num_classes: int) -> tuple:
    """The model with random weights, on a trained detector if it needs one, and its criterion."""
    if getattr(paper, "NEEDS_DETECTOR", False):
        return paper.build(cfg, num_classes, load_detector(run.detector))
    return paper.build(cfg, num_classes)


def make_optimizer(paper, model, recipe: Recipe, batch: BatchSizes) -> tuple:
    """AdamW, and the learning rates of its groups for the batch that is used."""
    groups = paper.param_groups(model, recipe)
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True)
    scale = batch.total / recipe.batch_size
    return optimizer, [group["lr"] * scale for group in optimizer.param_groups]


def make_ema(model, decay: float, warmup: int = 0):
    """Exponential moving average of parameters and batch statistics; `.module` is evaluated. The
    decay grows to its value, because early averages would mostly remember the random start (see
    schedules.ema_decay). With decay 0, `.module` is the model itself."""
    if not decay:
        return NoAverage(model)

    @torch.no_grad()
    def average(averages, values, _):
        if averages[0].is_floating_point():
            share = 1 - ema_decay(decay, warmup, int(ema.n_averaged))
            torch._foreach_lerp_(averages, values, share)
        else:
            torch._foreach_copy_(averages, values)     # counters

    ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    return ema.eval().requires_grad_(False)


class NoAverage:
    """Takes the place of AveragedModel with decay 0."""

    def __init__(self, model):
        self.module = model

    def update_parameters(self, model):
        pass


# ---- learning rate -------------------------------------------------------------------------------

def lr_factor(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Factor of every learning rate at this step: a linear rise over the first `warmup` fraction of
    the run, then step (x 0.1 after epoch lr_drop), drops (x 0.1 after each fraction of the run in
    lr_drops), cosine (from 1 to 0.01) or flat."""
    total = steps_per_epoch * recipe.epochs
    rise = min(1.0, (step + 1) / max(1.0, recipe.warmup * total))
    if recipe.schedule == "step":
        return rise * (0.1 if step >= recipe.lr_drop * steps_per_epoch else 1.0)
    if recipe.schedule == "drops":
        return rise * 0.1 ** sum(step >= round(part * total) for part in recipe.lr_drops)
    if recipe.schedule == "cosine":
        return rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / total)))
    if recipe.schedule == "flat":
        return rise
    raise UserError(f"expected --schedule step, drops, cosine or flat, got {recipe.schedule!r}")


def set_lr(optimizer, base_lrs: list[float], factor: float) -> None:
    for group, lr in zip(optimizer.param_groups, base_lrs):
        group["lr"] = lr * factor


# ---- data ----------------------------------------------------------------------------------------

def without_noise(run: Run, cfg, recipe: Recipe) -> tuple:
    """Config and Recipe of --overfit: constant learning rate, no dropout."""
    if not run.overfit:
        return cfg, recipe
    return override(cfg, {"dropout": 0.0}), replace(recipe, schedule="flat")


def load_data(run: Run, paper, recipe: Recipe, machine: Machine) -> tuple:
    """The training and the validation set; with --overfit both are the same few images."""
    masks = getattr(paper, "NEEDS_MASKS", False)
    train_set, val_set = build_datasets(run.data, recipe, run.seed, masks, run.overfit,
                                        run.num_train, run.num_val)
    if masks and not train_set.has_masks:
        raise UserError(f"expected a segmentation for every object of {train_set.name}, as "
                        f"{run.model} learns masks, got objects without one: add them to the json, "
                        "or train a detector")
    if machine.is_main:
        check_data.quick_check(train_set)
        check_data.quick_check(val_set, training=False)
    return train_set, val_set


# ---- evaluation ----------------------------------------------------------------------------------

def evaluation(ema, paper, dataset, cfg, batch, machine: Machine, progress: Progress) -> dict:
    """Evaluate on the validation set. -> a record for the log; its "AP" is that of masks where the
    model makes them"""
    begin = time.perf_counter()
    scores = evaluate(ema.module, paper.detect, dataset, cfg, machine.device,
                      batch_size=batch.micro, amp=machine.amp, workers=machine.workers,
                      rank=machine.rank, world=machine.world)
    kinds = {kind: scores[kind] for kind in KINDS if kind in scores}
    ap = kinds.get("segm", kinds["bbox"])["AP"]
    progress.best = max(progress.best, ap)
    return {"kind": "eval", "epoch": progress.epoch + 1, "step": progress.step,
            "train_seconds": round(progress.seconds, 3), "AP": ap, "best": progress.best, **kinds,
            "eval_seconds": round(time.perf_counter() - begin, 3)}


def draw(run: Run, model, paper, dataset, cfg, machine: Machine) -> None:
    """Draw curves of the run, and predictions beside the ground truth."""
    visualize.curves(run.out)
    path = os.path.join(run.out, "predictions.png")
    visualize.predictions(model, paper.detect, dataset, cfg, machine.device, path)


# ---- command line --------------------------------------------------------------------------------

def parse(argv: list[str]) -> tuple:
    """Command line -> Run, Config, Recipe."""
    return cli.parse(argv, Run, __doc__)


def main(argv: list[str] | None = None) -> None:
    with user_errors("train.py"):
        run, cfg, recipe = parse(sys.argv[1:] if argv is None else argv)
        if run.check_data:
            sys.exit(1 if check_data.check(run.check_data) else 0)
        with memory_advice(run, recipe), lost_peers(run):
            train(run, cfg, recipe)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    prepare_cpu()
    main()
