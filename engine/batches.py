"""How an epoch is divided into optimizer steps and micro-batches.

One step trains on `total` images: each of the ranks (processes) runs `accum` micro-batches forward
and backward before the optimizer moves. data.batches loads the micro-batches.
"""
import math

import numpy as np

import data
from engine.errors import UserError
from engine.sampling import epoch_order
from transforms import random_generator

OVERFIT_STEPS = 100   # steps in one epoch of --overfit
OVERFIT_AP = 0.95     # at which --overfit ends


class BatchSizes:
    """Sizes of batches and epochs.

    total: images per optimizer step = micro x accum x ranks
    micro: images per micro-batch
    repeats: passes over the images in one epoch
    steps_per_epoch: optimizer steps in one epoch

    wanted is --batch_size, images the size of the training set, epoch_length the number of images
    in an epoch, the same unless rare classes are oversampled. If the set is smaller than the
    batch, the batch shrinks and a message says so. Raises UserError if `wanted` cannot be divided
    or if there are fewer images than micro-batches in a step.
    """

    def __init__(self, wanted: int, run, machine, images: int, epoch_length: int = 0):
        parts = run.accum * machine.world   # micro-batches per step
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
        self.repeats = 1
        if run.overfit:
            self.repeats = math.ceil(OVERFIT_STEPS * self.total / images)
        self.steps_per_epoch = (epoch_length or images) * self.repeats // self.total


def epoch_batches(dataset, batch: BatchSizes, run, machine, epoch: int, start: int):
    """Yield this rank's `accum` micro-batches, a list, for each step from step `start` on.

    The order depends on (seed, epoch) and a sample on (seed, epoch, index). Therefore neither the
    number of workers or ranks nor a restart changes what is trained on. Images that would not fill
    the last batch are left out of this epoch.
    """
    rng = random_generator("order", run.seed, epoch)
    order = np.concatenate([epoch_order(dataset, rng) for _ in range(batch.repeats)])
    micro_batches = order[:batch.steps_per_epoch * batch.total].reshape(-1, batch.micro)
    first = start * run.accum * machine.world
    # The ranks take turns, one micro-batch each.
    mine = micro_batches[first:][machine.rank::machine.world].tolist()
    dataset.set_epoch(epoch)
    pin_memory = machine.device.type == "cuda"
    loader = iter(data.batches(dataset, mine, machine.workers, pin_memory))
    for _ in range(start, batch.steps_per_epoch):
        yield [next(loader) for _ in range(run.accum)]
