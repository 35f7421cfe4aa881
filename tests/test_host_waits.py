"""A training step makes the host wait for the GPU once to match and once at its end, not more."""
import pytest
import torch

import deformable_detr
import dino
import h_detr
import recordings
import test_deformable_detr
import test_dino
import test_h_detr
from host_waits import HostWaits
from recordings import batch

MODELS = {
    "deformable_detr": (deformable_detr, test_deformable_detr.small, {}),
    "two_stage": (deformable_detr, test_deformable_detr.small,
                  dict(with_box_refine=True, two_stage=True)),
    "dino": (dino, test_dino.small, {}),
    "static": (dino, test_dino.small, dict(query_selection="static", denoising="plain")),
    "h_detr": (h_detr, test_h_detr.small, {}),
}


@pytest.fixture(scope="module", autouse=True)
def first_use():
    """At its first use the attention kernel is checked, once in a process."""
    _, model, _ = test_deformable_detr.small()
    model(*batch((64, 96))[:2])


@pytest.mark.parametrize("name", MODELS)
def test_forward_matching_losses_and_backward_wait_for_the_cost_matrices_only(name):
    _, small, changes = MODELS[name]
    _, model, criterion = small(**changes)
    images, padding, targets = batch((64, 96), (48, 64), objects=(3, 1))
    num_boxes = torch.tensor(4.0)
    on_gpu = [list(model.state_dict().values()), images, padding, targets, num_boxes]
    with HostWaits(on_gpu) as waits:
        outputs = model(images, padding, targets)
        losses = criterion(outputs, targets, num_boxes)
        sum(losses.values()).backward()
    assert waits.found == ["cpu"]


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_waits_once_more_at_its_end(name):
    paper, small, changes = MODELS[name]
    _, model, criterion = small(**changes)
    images, padding, targets = batch((64, 96), (48, 64), objects=(3, 1))
    run = recordings.TrainingRun(paper, model, criterion, paper.RECIPE)
    with HostWaits([list(model.state_dict().values()), images, padding, targets]) as waits:
        run.step(0, steps_per_epoch=1, batch=(images, padding, targets))
    assert waits.found == ["cpu", "tolist"]      # the costs; losses and gradient norm


@pytest.mark.parametrize("wait", [
    lambda x: x[[1, 0]],
    lambda x: x[torch.tensor([1, 0])],
    lambda x: x[x > 0],
    lambda x: x.nonzero(),
    lambda x: x.sum().item(),
    lambda x: bool(x[0] > 0),
    lambda x: x / torch.tensor([2.0, 3.0], device=x.device),
    lambda x: x + torch.ones(2).to(x.device),
    lambda x: x.tolist(),
], ids=["list index", "host index", "mask", "nonzero", "item", "bool", "tensor", "to", "tolist"])
def test_each_kind_of_wait_is_counted_once(wait):
    x = torch.tensor([1.0, -1.0])
    with HostWaits([x]) as waits:
        wait(x)
    assert len(waits.found) == 1, waits.found


def test_work_on_the_device_and_copies_that_do_not_wait_are_not_counted():
    x = torch.tensor([1.0, -1.0])
    with HostWaits([x]) as waits:
        index = torch.arange(2, device=x.device)
        x[index] + x.new_full((2,), 3.0) * torch.zeros(2).to(x.device, non_blocking=True)
        torch.arange(3)[torch.tensor([0, 1])].tolist()
    assert waits.found == []
