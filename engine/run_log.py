"""What a run reports: the opening report, log.jsonl, the progress bar, skipped steps."""
import json
import re
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data
from deformable_attn import verify_kernel
from engine.batch_norm import restore_statistics
from engine.batches import OVERFIT_AP
from engine.errors import printable
from engine.files import complete_file
from engine.machine import cores
from engine.notices import plural
from engine.recipe import configure, preset_values

LOG_EVERY = 10     # steps between lines of log.jsonl
BAD_STEPS = 3      # steps in a row that are not finite before the run stops
AP_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")   # r, c, f: LVIS
MASK_COLUMNS = {"segm": "mask AP", "segm_cls": "by class score"}


class RunLog:
    """Write the logs of a run, and move its progress bar.

    log.jsonl: a line of mean losses every LOG_EVERY steps, a line of scores at every evaluation.
    nan_report.jsonl: a line for every skipped step. A resumed run removes the lines of steps that
    it is about to repeat."""

    def __init__(self, run, recipe, batch, machine, progress):
        self.run = run
        self.recipe = recipe
        self.out = Path(run.out)
        self.machine = machine
        self.batch = batch
        self.first_step = progress.step
        self.seconds = progress.seconds    # training time at the last line
        self.clock = time.perf_counter()
        self.steps = 0                     # all steps since the last line
        self.good_steps = []               # ({loss: value}, gradient norm) of those not skipped
        self.speed_reported = False
        if machine.is_main:
            for name in ("log.jsonl", "nan_report.jsonl"):
                remove_later_lines(self.out / name, progress.step)
        images = recipe.epochs * batch.steps_per_epoch * batch.total
        done = progress.step * batch.total
        self.bar = tqdm(
            total=images, initial=done, unit="image",
            disable=not machine.is_main or done == images, dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 60, delay=0.001,
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}, left {remaining} {postfix}")

    def report(self, paper, cfg, train_set, val_set, model, notes) -> None:
        """Print the opening report, see `opening_report`."""
        if not self.machine.is_main:
            return
        text = opening_report(self.run, paper, cfg, self.recipe, self.batch, self.machine,
                              train_set, val_set, model, notes)
        total = self.batch.steps_per_epoch * self.recipe.epochs
        if self.first_step:
            ended = ", trained to the end: evaluates again" if self.first_step == total else ""
            text += f"\nresuming  at step {self.first_step} of {total}{ended}"
        print(text)
        self.bar.delay = 0    # from here on the bar may be drawn, and ends its line when it closes

    def write(self, record: dict, name: str = "log.jsonl") -> None:
        """Append one line to a log, from rank 0."""
        if self.machine.is_main:
            with open(self.out / name, "a") as file:
                file.write(json.dumps(record) + "\n")

    def start_clock(self) -> None:
        """Count training time from here, so that saving and evaluating before it do not count."""
        self.clock = time.perf_counter()

    def step(self, progress, losses, grad_norm, finite, optimizer, write=False) -> None:
        """Count one step. Every LOG_EVERY steps, at the end of an epoch and on demand (`write`)
        write the means over the steps since the last line, without the skipped ones."""
        now = time.perf_counter()
        progress.seconds += now - self.clock
        self.clock = now
        self.bar.update(self.batch.total)
        self.steps += 1
        if finite:
            self.good_steps.append((losses, grad_norm))
        ends_epoch = progress.batch == self.batch.steps_per_epoch
        if not (write or ends_epoch or progress.step % LOG_EVERY == 0):
            return

        speed = self.steps * self.batch.total / max(progress.seconds - self.seconds, 1e-9)
        if self.good_steps:
            self._write_means(progress, speed, optimizer)
        warm = progress.step - self.first_step >= 2 * LOG_EVERY    # the first steps are slow
        if not self.speed_reported and (warm or ends_epoch):
            self._report_speed(speed)
        self.good_steps = []
        self.steps = 0
        self.seconds = progress.seconds

    def _write_means(self, progress, speed: float, optimizer) -> None:
        """Write a line of means to log.jsonl, and show them beside the progress bar."""
        means = {name: self._mean(name) for name in sorted(loss_names(self.good_steps))}
        norm = sum(norm for _, norm in self.good_steps) / len(self.good_steps)
        loss = sum(means.values())
        lr = max(group["lr"] for group in optimizer.param_groups)
        self.write({"kind": "step", "step": progress.step, "epoch": progress.epoch,
                    "train_seconds": round(progress.seconds, 3), "lr": lr,
                    "images_per_second": round(speed, 2), "loss": loss, "grad_norm": norm,
                    "losses": means})
        self.bar.set_postfix_str(
            f"epoch {progress.epoch + 1} loss {loss:.3f} {speed:.1f} images/s")

    def _mean(self, name: str) -> float:
        """Mean of a loss over the good steps; 0 counts where a step has no such loss."""
        return sum(losses.get(name, 0.0) for losses, _ in self.good_steps) / len(self.good_steps)

    def _report_speed(self, speed: float) -> None:
        """Print, once, how long an epoch and the run are expected to take."""
        self.speed_reported = True
        seconds = self.batch.steps_per_epoch * self.batch.total / speed
        end = f", but --overfit ends at AP {OVERFIT_AP}" if self.run.overfit else ""
        self.machine.say(
            f"expected  {speed:.1f} images/s: {duration(seconds)} an epoch, "
            f"{duration(seconds * self.recipe.epochs)} in all without evaluations{end}; memory at "
            f"most {peak_memory(self.machine.device)} so far")

    def ended(self, progress) -> None:
        """Say that --max_steps ended the run."""
        self.machine.say(f"--max_steps: ended at step {progress.step}, saved; continue with "
                         "--resume and a larger number")

    def stopped(self, progress, signal: int) -> None:
        """Say that a signal ended the run."""
        self.machine.say(f"stopped by signal {signal} at step {progress.step}, saved; continue "
                         "with --resume")

    def bad_step(self, progress, losses, model, micro_batches) -> None:
        """Report a skipped step: images, losses and first module that were not finite, of the ranks
        where something was wrong, or of all ranks when only the gradient was not finite.
        FloatingPointError for the BAD_STEPS-th such step in a row."""
        mine = {"images": [int(t["image_id"]) for *_, targets in micro_batches for t in targets],
                "losses": [name for name, x in losses.items() if not abs(x) < float("inf")],
                "module": first_bad_module(model, micro_batches, self.machine)}
        ranks = self.machine.gather(mine)
        ranks = [rank for rank in ranks if rank["losses"] or rank["module"]] or ranks
        images = [i for rank in ranks for i in rank["images"]]
        names = sorted({name for rank in ranks for name in rank["losses"]}) or ["gradient"]
        modules = [rank["module"] for rank in ranks if rank["module"]] or [""]
        self.write({"kind": "bad", "step": progress.step, "images": images, "losses": names,
                    "module": modules[0], "in_a_row": progress.bad_steps}, "nan_report.jsonl")
        where = "every module's output is finite when run again"
        if modules[0]:
            where = f"first in {modules[0]}"
        named = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        self.machine.say(f"step {progress.step}: {named} not finite on images {images} ({where}); "
                         "skipped, nothing changed")
        if progress.bad_steps >= BAD_STEPS:
            raise FloatingPointError(
                f"expected finite losses and gradients, got {BAD_STEPS} bad steps in a row, the "
                f"last on images {images} ({where}). {self.out / 'nan_report.jsonl'} names all: "
                "look at these images, lower --lr, or try --amp false")

    def evaluation(self, record: dict) -> None:
        """Write the scores of an evaluation, and print them as a row of a table."""
        self.write(record)
        columns = [name for name in AP_COLUMNS if name in record["bbox"]]
        cells = [f"{name} {figure(record['bbox'][name])}" for name in columns]
        cells += [f"{title} {figure(record[kind]['AP'])}" for kind, title in MASK_COLUMNS.items()
                  if kind in record]
        self.machine.say(f"epoch {record['epoch']:>3}  trained "
                         f"{record['train_seconds'] / 60:6.2f} min  " + "  ".join(cells))


def figure(value: float) -> str:
    """An AP as text; -1 stands for "no such object"."""
    return "-    " if value == -1 else f"{value:.3f}"


def loss_names(good_steps: list) -> set:
    return {name for losses, _ in good_steps for name in losses}


def remove_later_lines(path: Path, step: int) -> None:
    """Remove the lines of a log that belong to steps after `step`, and those that are broken."""
    if not path.exists():
        return
    remaining = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
            last = record["step"]
            # An evaluation comes after its step: a run resumed from this step evaluates again.
            if record.get("kind") == "eval":
                last += 1
            if line.endswith("\n") and last <= step:
                remaining.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    with complete_file(path) as temporary:
        temporary.write_text("".join(remaining))


@torch.no_grad()
def first_bad_module(model, micro_batches, machine) -> str:
    """Name of the first module whose output is not finite when these micro-batches are run forward
    again, uncompiled, in training mode; "" when there is none. Batch statistics and random states
    stay as they were."""
    bad = []
    handles = []

    def watch(name):
        def hook(module, inputs, output):
            if not bad and torch.is_tensor(output) and not output.isfinite().all():
                bad.append(name)
        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(watch(name)))
    device = machine.device
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), \
                restore_statistics(model), machine.autocast():
            for images, padding, targets in micro_batches:
                model(images.to(device), padding.to(device), data.to_device(targets, device))
    finally:
        for handle in handles:
            handle.remove()
    return bad[0] if bad else ""


# ---- the opening report ------------------------------------------------------------------------

def opening_report(run, paper, cfg, recipe, batch, machine, train_set, val_set, model,
                   notes) -> str:
    """Describe the run in about ten lines: settings, machine, data, model, batch, weights."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in model.parameters())
    size = f"batch {batch.total}"
    if batch.micro < batch.total:
        size += f" = {batch.micro} x {run.accum} x {machine.world}"
    lr = recipe.lr * batch.total / recipe.batch_size
    usual_cfg, usual_recipe = usual_settings(run, paper)
    lines = [
        f"config    {changes(cfg, usual_cfg)}",
        f"recipe    {changes(recipe, usual_recipe)}; all settings: {run.out}/config.json",
        f"device    {describe_machine(run, machine)}",
        f"data      {train_set.name}: {len(train_set)} images to train on, {len(val_set)} to "
        f"evaluate on; {machine.workers} workers",
        f"objects   {describe_objects(train_set)}",
        f"model     {' '.join((run.model, run.variant)).strip()}: {trainable / 1e6:.2f} M "
        f"parameters to train of {parameters / 1e6:.2f} M",
        f"training  {size}, lr {lr:g}{batch_hint(run, paper, batch)}, "
        f"{plural(recipe.epochs, 'epoch')} of {plural(batch.steps_per_epoch, 'step')}, "
        f"seed {run.seed}"]
    lines += [f"weights   {note}" for note in notes]
    lines.append(f"folder    {run.out}")
    if machine.device.type == "cpu" and run.preset == "paper":
        lines.append("note      the published sizes are meant for a GPU: a CPU takes minutes a "
                     "step and 1.5 GB or more for each image of a batch (--accum N divides it); "
                     "--preset small is meant for CPUs")
    return "\n".join(printable(line) for line in lines)


def usual_settings(run, paper) -> tuple:
    """The Config and the Recipe of the run's preset and variant, without its other flags."""
    return configure(paper, preset_values(paper, run.preset or "paper", run.variant))


def changes(settings, usual) -> str:
    """The fields in which two dataclass instances differ, as text."""
    before = vars(usual)
    changed = {name: x for name, x in vars(settings).items() if x != before[name]}
    if not changed:
        return "the usual settings"
    return "as usual, but " + ", ".join(f"{name} {x}" for name, x in changed.items())


def describe_objects(dataset) -> str:
    """Number of objects of each class, most frequent first, as text."""
    counts = list(zip(data.class_counts(dataset).tolist(), dataset.class_names))
    counts.sort(reverse=True)
    unused = sum(count == 0 for count, _ in counts)
    without = f" ({unused} without any)" if unused else ""
    first = ", ".join(f"{name} {count}" for count, name in counts[:12])
    more = ", ..." if len(counts) > 12 else ""
    total = sum(count for count, _ in counts)
    return f"{total} in {plural(len(counts), 'class', 'classes')}{without}: {first}{more}"


def describe_machine(run, machine) -> str:
    if machine.device.type == "cuda":
        name = torch.cuda.get_device_name(machine.device)
    else:
        name = f"cpu, {plural(machine.threads, 'thread')} on {plural(cores(), 'core')}"
    precision = "bfloat16 autocast" if machine.amp else "float32"
    flags = ("recompute", "compile", "channels_last", "deterministic")
    options = [flag for flag in flags if getattr(run, flag)]
    return "; ".join([name, precision, f"deformable attention: {attention(run, machine)}",
                      *options])


def attention(run, machine) -> str:
    """Which deformable attention this run uses."""
    if run.impl == "torch":
        return "plain PyTorch (--impl torch)"
    return "kernel" if verify_kernel(machine.device) else "plain PyTorch (no kernel, see above)"


def batch_hint(run, paper, batch) -> str:
    """For a batch size that is not the recipe's: the recipe's batch size and learning rate."""
    _, made_for = usual_settings(run, paper)
    if batch.total == made_for.batch_size:
        return ""
    return (f" (the recipe: {made_for.lr:g} for batch {made_for.batch_size}; lr follows the batch "
            "unless --lr is given)")


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def peak_memory(device) -> str:
    """Peak memory so far: of the GPU, or of this process on the CPU ("unknown" if not on Linux)."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB"
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    return f"{int(found[1]) / 2 ** 20:.1f} GiB" if found else "unknown"
