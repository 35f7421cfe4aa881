"""How an epoch is cut."""

import numpy as np
import pytest
import torch

from engine import batches
from engine.machine import Machine
import data
import train


class Numbers(data.DetectionData):
    """Samples that hold nothing but their number."""

    name = "numbers"

    def __init__(self, count):
        self.image_ids = np.arange(count)

    def __getitem__(self, index):
        return torch.zeros(3, 2, 2), {"index": index}


def epoch_of(count, batch_size, seed=0, epoch=0, start=0, rank=0, world=1, workers=0, accum=1):
    """-> places in the data set of every micro-batch of every step of one rank"""
    settings = train.Run(accum=accum, seed=seed)
    machine = Machine(rank=rank, world=world, workers=workers)
    batch = batches.BatchSizes(batch_size, settings, machine, count)
    return [
        [[t["index"] for t in targets] for _, _, targets in step]
        for step in batches.epoch_batches(Numbers(count), batch, settings, machine, epoch, start)
    ]


def test_the_order_depends_on_seed_and_epoch_alone():
    orders = {(seed, epoch): epoch_of(22, 4, seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert len({str(order) for order in orders.values()}) == 4
    for order in orders.values():
        assert [len(micro) for micro, in order] == [4] * 5 and len(
            {i for micro, in order for i in micro}
        ) == 20
    assert orders[0, 1] == epoch_of(22, 4, 0, 1, workers=2)
    assert (
        orders[0, 1][3:] == epoch_of(22, 4, 0, 1, start=3) and epoch_of(22, 4, 0, 1, start=5) == []
    )


@pytest.mark.parametrize("world, accum", ((2, 1), (1, 2), (2, 2), (4, 1)))
def test_ranks_and_micro_batches_share_a_step_without_overlap(world, accum):
    whole = [step[0] for step in epoch_of(26, 8)]
    ranks = [epoch_of(26, 8, rank=rank, world=world, accum=accum) for rank in range(world)]
    for number, images in enumerate(whole):
        micros = [micro for rank in ranks for micro in rank[number]]
        assert sorted(i for micro in micros for i in micro) == sorted(images)
        assert {len(micro) for micro in micros} == {8 // world // accum}
    assert [rank[1:] for rank in ranks] == [
        epoch_of(26, 8, start=1, rank=r, world=world, accum=accum) for r in range(world)
    ]


@pytest.mark.parametrize("count, world, total", ((1, 1, 1), (3, 1, 3), (7, 2, 6), (9, 2, 8)))
def test_a_training_set_smaller_than_the_batch_gets_a_smaller_batch(count, world, total, capsys):
    assert batches.BatchSizes(8, train.Run(), Machine(world=world), count).total == total
    assert capsys.readouterr().out.count("instead") == (total < 8)
    with pytest.raises(ValueError, match="at least .* 2 training images, got 1"):
        batches.BatchSizes(8, train.Run(accum=2), Machine(), 1)
