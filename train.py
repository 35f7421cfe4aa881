"""Train a detector on generated scenes or on a COCO-layout folder.

Examples:
    python train.py --model dino                   generated scenes: minutes on two CPU cores
    python train.py --model dino --data DIR        the published recipe on your images
    python train.py --model dino --data DIR --preset small --overfit 8    can it learn eight images?
    python train.py --model dino --resume          continue runs/dino, bit-exactly
    torchrun --nproc_per_node 8 train.py --model dino --data DIR          eight GPUs

To begin with: --model, --data, --preset, --out, --resume, --overfit.
Then: --epochs, --batch_size, --lr, --num_queries.
Written to the run folder: config.json, log.jsonl, curves.png, predictions.png, last.pt, best.pt.
"""
# A paper file is any .py beside this one with these names (`cp dino.py mine.py` is a new model):
#
#   Config               dataclass of architecture and loss; has `top_k`, and with a backbone also
#                        `backbone` and `backbone_weights`
#   RECIPE               engine.recipe.Recipe: how the paper trains it
#   SMALL, VARIANTS      optional: {field of Config or RECIPE: value}; {name: such a dictionary}
#   NEEDS_MASKS          optional: True if targets need `masks`
#   NEEDS_DETECTOR       optional: True if `build` gets a trained detector as a third argument
#                        (a model that trains it describes it in `carried`, for checkpoints)
#   build(cfg, num_classes)         -> model, criterion
#   model(images, padding, targets) -> {pred_logits (B, N, classes), pred_boxes (B, N, 4), ...}, for
#                        analysis also `anchors`, `memory`; images (B, 3, H, W), padding (B, H, W)
#                        True outside, targets B x {labels (n,), boxes (n, 4) cxcywh in [0, 1], ...}
#                        If the model has a `top_k`, evaluation sets it to that of `detect`'s cfg
#   criterion(outputs, targets, num_boxes)   -> {name: weighted loss}; if it has
#                        set_image_counts(counts (N,)), it learns how many images have each class
#   detect(outputs, sizes, cfg)     -> B x {scores (k,), labels (k,), boxes (k, 4) xyxy px, ...};
#                        sizes (B, 2): height and width of the original images, px
#   param_groups(model, recipe)     -> groups of parameters with their `lr`
import math
import os
import sys
import time
from dataclasses import dataclass

# OpenMP reads this when torch is imported. Threads that wait in a long busy loop slow each other
# down when other programs use the cores too.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# GPU memory in segments that grow: images of many sizes leave no gaps of unusable memory. PyTorch
# 2.6 to 2.13 reads PYTORCH_CUDA_ALLOC_CONF; some versions warn unless the other name is set too.
if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
                            "PYTORCH_HIP_ALLOC_CONF"}:
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"

import torch

import data
import visualize
from engine import cli
from engine.batch_norm import batch_statistics
from engine.batches import OVERFIT_AP, BatchSizes, epoch_batches
from engine.checkpoints import RunFolder
from engine.datasets import build_datasets
from engine.ema import make_ema
from engine.errors import UserError, user_errors
from engine.layers import compile_or_recompute
from engine.machine import (Machine, StopSignals, lost_peers, memory_advice, prepare_cpu,
                            set_up_machine)
from engine.models import load_paper, make_model, require_detector
from engine.muon import Muon, split_groups
from engine.processes import from_rank_0
from engine.recipe import Recipe
from engine.run_log import RunLog
from engine.sampling import epoch_length, image_counts
from engine.schedules import is_kept
from eval import KINDS, evaluate, thresholds
from scenes import NUM_TRAIN, NUM_VAL
from tools import check_data


@dataclass
class Run:
    """What to train, on what data, on which machine."""
    model: str = "dino"              # paper file, without .py
    data: str = ""                   # COCO-layout folder; none: generated scenes
    preset: str = ""                 # paper or small settings; none: paper with --data, else small
    variant: str = ""                # variant of the model; none: the paper's main one
    out: str = ""                    # run folder; none: runs/MODEL
    resume: cli.OptionalText = ""    # continue the run in --out (give no value) or in this folder
    overfit: int = 0                 # overfit this many images, without augmentation; 0: off
    # initial weights: a file, a name of assets/weights or a URL. Left out, --preset small with
    # --data starts from weights of assets/weights that fit; --init none never does
    init: str = ""
    freeze: str = ""                 # backbone: keep its initial weights; none: train everything
    detector: str = ""               # trained detector, for models that add masks to one
    check_data: str = ""             # check this COCO-layout folder and exit
    num_train: int = NUM_TRAIN       # generated scenes to train on
    num_val: int = NUM_VAL           # generated scenes to evaluate on
    seed: int = 0                    # random seed; runs with the same seed are bit-identical
    device: str = ""                 # cpu, cuda or mps; none: cuda if there is a GPU
    amp: bool | None = None          # bfloat16 autocast; auto: if the hardware supports it
    accum: int = 1                   # micro-batches per optimizer step: less memory, same gradients
    recompute: bool = False          # recompute activations in the backward pass: less memory
    compile: bool = False            # torch.compile layers that have no convolution
    channels_last: bool = False      # GPU only: ResNet in NHWC order, faster on many GPUs
    impl: str = ""                   # deformable attention: kernel or torch; none: kernel if built
    deterministic: bool = False      # bit-identical runs on a GPU too; slower
    workers: int = -1                # processes that read images; -1: depends on the CPU cores
    threads: int = 0                 # CPU threads; 0: OMP_NUM_THREADS or one per idle core, up to 8
    eval_every: int = 1              # epochs between evaluations
    save_every: int = 1000           # steps between saves; every epoch is saved too
    keep_every: int = 0              # keep epoch_NNNN.pt of every N epochs; 0: before lr drops only
    max_steps: int = 0               # end, saved, after this many optimizer steps; 0: all epochs


@dataclass
class Progress:
    """How far a run is. All of it is saved and restored."""
    epoch: int = 0                   # epochs done
    batch: int = 0                   # optimizer steps done in this epoch
    step: int = 0                    # optimizer steps done in total
    seconds: float = 0.0             # training time, without evaluations and saves
    bad_steps: int = 0               # steps skipped in a row until now
    best: float = -1.0               # highest AP so far

    def count(self, finite: bool) -> None:
        """Count one step; finite: it was not skipped."""
        self.step += 1
        self.batch += 1
        self.bad_steps = 0 if finite else self.bad_steps + 1


def train(run: Run, cfg, recipe: Recipe) -> dict:
    """Train one model. Returns the record of its last evaluation, see `validate`.

    Raises FloatingPointError after three bad steps in a row. Stopped by a signal, it saves and
    exits with the code 128 + signal."""
    paper = load_paper(run.model)
    if getattr(paper, "NEEDS_DETECTOR", False) and not run.resume:
        require_detector(run.detector)
    machine = set_up_machine(run)
    with RunFolder(run, machine) as folder:
        # data
        train_set, val_set = load_data(run, paper, cfg, recipe)
        batch = BatchSizes(recipe.batch_size, run, machine, len(train_set),
                           epoch_length(train_set))

        # model and optimizer: same initial weights on every rank, other random numbers afterwards
        model, criterion, notes = make_model(run, paper, cfg, train_set.class_names, machine)
        if hasattr(criterion, "set_image_counts"):
            criterion.set_image_counts(torch.from_numpy(image_counts(train_set)))
        machine.seed_rank(run.seed)
        ema = make_ema(model, recipe.ema, recipe.ema_warmup)
        optimizer, base_lrs = make_optimizer(paper, model, recipe, batch)
        compile_or_recompute(model, run)
        net = machine.distribute(model)

        # progress, run folder and log
        progress = Progress()
        if run.resume:
            progress = folder.restore(progress, model, ema, optimizer, batch.steps_per_epoch,
                                      train_set.class_names)
        folder.describe(cfg, recipe, train_set, getattr(model, "carried", None))
        log = RunLog(run, recipe, batch, machine, progress)
        log.report(paper, cfg, train_set, val_set, model, notes)

        record = {}
        with StopSignals() as stop, log.bar:
            for epoch in range(progress.epoch, recipe.epochs):
                model.train()
                log.start_clock()
                for micro_batches in epoch_batches(
                        train_set, batch, run, machine, epoch, progress.batch):
                    factor = lr_factor(recipe, progress.step, batch.steps_per_epoch)
                    set_lr(optimizer, base_lrs, factor)
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
                        log.ended(progress)
                        return record

                # not counted as done yet: a run killed from here on evaluates when it is resumed
                folder.save("last.pt", progress, model, ema, optimizer)
                if is_kept(run.keep_every, recipe, epoch, batch.steps_per_epoch):
                    folder.save(f"epoch_{epoch + 1:04}.pt", progress, model, ema, optimizer)
                with stop.nothing_to_save():
                    if (epoch + 1) % run.eval_every == 0 or epoch + 1 == recipe.epochs:
                        record = validate(ema, paper, val_set, cfg, batch, machine, progress)
                        log.evaluation(record)
                        if record["AP"] >= progress.best:
                            progress.best = record["AP"]
                            folder.save_best(progress, model, ema, thresholds(record))
                        draw(run, ema.module, paper, val_set, cfg, machine)
                progress.epoch = epoch + 1
                progress.batch = 0
                if run.overfit and record.get("AP", 0.0) >= OVERFIT_AP:
                    machine.say(f"--overfit: AP {record['AP']:.3f}, it can learn from this data")
                    break
        return record


def step(net, model, criterion, optimizer, ema, micro_batches, clip, machine, count=None):
    """Make one optimizer step. Returns {loss name: number}, the gradient norm, and whether all of
    these are finite. If they are not, the step changes nothing: parameters, optimizer, EMA and
    batch statistics stay as they were.

    net: the model, or its DistributedDataParallel. clip: limit of the gradient norm, 0 for none.
    count: objects in the micro-batches of all ranks, summed here where it is not given.

    The loss is the mean over all micro-batches of all ranks. Every micro-batch divides its losses
    by the same `num_boxes`, the mean number of objects of a micro-batch. So the gradient is that
    of one large batch, except where a criterion counts objects itself (Co-DETR)."""
    if count is None:
        count, _ = machine.share(count_objects(micro_batches), 0)
    num_boxes = max(count, 1) / (machine.world * len(micro_batches))
    statistics = batch_statistics(model)
    before = [buffer.clone() for buffer in statistics]

    # gradients
    optimizer.zero_grad(set_to_none=True)
    losses = {}
    for i, (images, padding, targets) in enumerate(micro_batches):
        images = images.to(machine.device, non_blocking=True)      # (B, 3, H, W)
        padding = padding.to(machine.device, non_blocking=True)    # (B, H, W)
        targets = data.to_device(targets, machine.device)
        if net is not model:    # average gradients over ranks in the last backward pass only
            net.require_backward_grad_sync = i + 1 == len(micro_batches)
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

    # read all numbers from the GPU at once; a clip that is not finite makes a bad step, too
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
    """Count the objects in this rank's micro-batches of a step."""
    return sum(len(target["labels"]) for *_, targets in micro_batches for target in targets)


# ---- optimizer and learning rate -----------------------------------------------------------------

def make_optimizer(paper, model, recipe: Recipe, batch: BatchSizes) -> tuple:
    """Make the optimizer. Returns it, and the learning rate of each of its groups at factor 1,
    which follows the batch size in proportion."""
    groups = paper.param_groups(model, recipe)
    optimizer_class = torch.optim.AdamW
    if recipe.muon:
        groups = split_groups(groups, model, recipe.muon)
        optimizer_class = Muon
    optimizer = optimizer_class(groups, weight_decay=recipe.weight_decay, fused=True)
    scale = batch.total / recipe.batch_size
    return optimizer, [group["lr"] * scale for group in optimizer.param_groups]


def lr_factor(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Factor of every learning rate at this step, counted from 0. A linear warmup comes first; the
    schedule is step (x 0.1 after epoch lr_drop), drops (x 0.1 after each fraction of the run in
    lr_drops), cosine (from 1 to 0.01) or flat."""
    total = steps_per_epoch * recipe.epochs
    warmup = min(1.0, (step + 1) / max(1.0, recipe.warmup * total))
    if recipe.schedule == "step":
        return warmup * (0.1 if step >= recipe.lr_drop * steps_per_epoch else 1.0)
    if recipe.schedule == "drops":
        return warmup * 0.1 ** sum(step >= round(part * total) for part in recipe.lr_drops)
    if recipe.schedule == "cosine":
        return warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / total)))
    if recipe.schedule == "flat":
        return warmup
    raise UserError(f"expected --schedule step, drops, cosine or flat, got {recipe.schedule!r}")


def set_lr(optimizer, base_lrs: list[float], factor: float) -> None:
    """Set the learning rate of every group to `factor` times its own."""
    for group, lr in zip(optimizer.param_groups, base_lrs):
        group["lr"] = lr * factor


# ---- data ----------------------------------------------------------------------------------------

def load_data(run: Run, paper, cfg, recipe: Recipe) -> tuple:
    """Open and check the training set and the validation set; with --overfit both are the same few
    images."""
    masks = getattr(paper, "NEEDS_MASKS", False)
    train_set, val_set = build_datasets(run.data, recipe, run.seed, masks, run.overfit,
                                        run.num_train, run.num_val)
    if masks and not train_set.has_masks:
        raise UserError(f"expected a segmentation for every object of {train_set.name}, as "
                        f"{run.model} learns masks, got objects without one: add them to the json, "
                        "or train a detector")

    def check():
        check_data.quick_check(train_set, num_queries=getattr(cfg, "num_queries", 0))
        check_data.quick_check(val_set, training=False)

    from_rank_0(check)     # one process examines them; what it refuses ends all
    return train_set, val_set


# ---- evaluation ----------------------------------------------------------------------------------

def validate(ema, paper, dataset, cfg, batch, machine: Machine, progress: Progress) -> dict:
    """Evaluate on the validation set. Returns a record for log.jsonl: {"AP", "bbox", "epoch", ...}.

    Its "AP" is that of the masks where the model makes them, else of the boxes."""
    begin = time.perf_counter()
    scores = evaluate(ema.module, paper.detect, dataset, cfg, machine.device,
                      batch_size=batch.micro, amp=machine.amp, workers=machine.workers,
                      rank=machine.rank, world=machine.world)
    kinds = {kind: scores[kind] for kind in KINDS if kind in scores}
    ap = kinds.get("segm", kinds["bbox"])["AP"]
    return {"kind": "eval", "epoch": progress.epoch + 1, "step": progress.step,
            "train_seconds": round(progress.seconds, 3), "AP": ap, "best": max(progress.best, ap),
            **kinds, "eval_seconds": round(time.perf_counter() - begin, 3)}


def draw(run: Run, model, paper, dataset, cfg, machine: Machine) -> None:
    """Draw curves of the run, and predictions beside the ground truth, on rank 0."""
    if not machine.is_main:
        return
    visualize.curves(run.out)
    path = os.path.join(run.out, "predictions.png")
    visualize.predictions(model, paper.detect, dataset, cfg, machine.device, path)


# ---- command line --------------------------------------------------------------------------------

def parse(argv: list[str]) -> tuple:
    """Read the command line. Returns Run, Config and Recipe."""
    return cli.parse(argv, Run, __doc__)


def main(argv: list[str] | None = None) -> None:
    with user_errors("train.py"):
        run, cfg, recipe = parse(sys.argv[1:] if argv is None else argv)
        if run.check_data:
            sys.exit(1 if check_data.check(run.check_data) else 0)
        with memory_advice(run, recipe), lost_peers(f"Continue with --resume --out {run.out}"):
            train(run, cfg, recipe)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    prepare_cpu()
    main()
