"""How an epoch is cut into optimizer steps and micro-batches."""
import math

import numpy as np

import data
from engine.errors import UserError

OVERFIT_STEPS = 100   # of one epoch of --overfit


class BatchSizes:
    """How an epoch is cut: `total` images per optimizer step = `micro` x accum x ranks. A training
    set smaller than the batch gets a smaller batch, and that is said once."""

    def __init__(self, wanted: int, run, machine, images: int):
        parts = run.accum * machine.world
        if wanted % parts:
            raise UserError(f"expected --batch_size divisible by accum x processes = {parts}, got "
                            f"{wanted}")
        self.micro = min(wanted, images) // parts
        if not self.micro:
            raise UserError(f"expected at least accum x processes = {parts} training images, got "
                            f"{images}: lower --accum")
        self.total = self.micro * parts
        if self.total < wanted:
            machine.say(f"{images} training images: batch {self.total} instead of {wanted}")
        self.repeats = 1    # passes over the images in an epoch
        if run.overfit:
            self.repeats = math.ceil(OVERFIT_STEPS * self.total / images)
        self.steps = images * self.repeats // self.total


def epoch_batches(dataset, batch: BatchSizes, run, machine, epoch: int, start: int):
    """Yield this rank's micro-batches for every optimizer step of the epoch from number `start` on.

    The order depends on (seed, epoch) and a sample on (seed, epoch, index), so neither workers, nor
    ranks, nor a restart change what is trained on. Images that do not fill the last batch wait for
    another epoch."""
    rng = data.random_generator("order", run.seed, epoch)
    order = np.concatenate([rng.permutation(len(dataset)) for _ in range(batch.repeats)])
    micro_batches = order[:batch.steps * batch.total].reshape(-1, batch.micro)
    first = start * run.accum * machine.world
    mine = micro_batches[first:][machine.rank::machine.world].tolist()
    dataset.set_epoch(epoch)
    pin_memory = machine.device.type == "cuda"
    loader = iter(data.batches(dataset, mine, machine.workers, pin_memory))
    for _ in range(start, batch.steps):
        yield [next(loader) for _ in range(run.accum)]
