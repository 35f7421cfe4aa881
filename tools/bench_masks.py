"""Parameters, time and memory of each part of the mask network of mask_frozen_detr.py."""
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

import dino
import mask_frozen_detr
from tools.timing import DEVICE, Device, median_ms, show_progress, write_table

DETECTIONS = 100     # regions at inference
OBJECTS = 7          # regions in training: the mean number of objects of a COCO image


@register_flop_formula(torch.ops.paperdetr.ms_deform_attn)
def attention_flops(value, shapes, points, *rest, out_shape=None, **options) -> int:
    """Four pixels for every sampling point and channel; a multiply-add counts as two."""
    B, Nq, channels = out_shape
    L, K = points[3:5]
    return 2 * 4 * B * Nq * channels * L * K


class Part(NamedTuple):
    """A part of the network, and one pass through it."""
    modules: list
    run: Callable


def mask_cost(device: Device = DEVICE, seconds: float = 2.0,
              size: tuple[int, int] = (800, 1333)):
    """Measure what each part of the mask network costs at its published size.

    Parameters, multiply-adds and time for one image with 100 detections; memory that one image with
    7 objects stores for the backward pass.

    Args:
        device: Where to run.
        seconds: How long each figure is measured; the median is reported.
        size: Height and width of the image in pixels.
    """
    detector, _ = dino.build(dino.Config(), 80)
    frozen = mask_frozen_detr.FrozenDetector(detector, dino.detect)
    model = mask_frozen_detr.MaskFrozenDETR(frozen, mask_frozen_detr.Config()).to(device)
    images = torch.randn(1, 3, *size, device=device)
    padding = torch.zeros(1, *size, dtype=torch.bool, device=device)
    outputs, _ = model.base(images, padding)
    inference = make_parts(model, outputs["memory"], DETECTIONS)
    training = make_parts(model, outputs["memory"], OBJECTS)
    rows = []
    for name, part in inference.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            part.run()
        parameters = sum(count_parameters(module) for module in part.modules)
        ms = median_ms(torch.no_grad()(part.run), seconds)
        mebibytes = saved_bytes(training[name].run, model) / 2 ** 20
        rows.append([name, f"{parameters:,}", f"{counter.get_total_flops() / 2e9:.1f}",
                     f"{ms:.0f}", f"{mebibytes:.0f}"])
        show_progress(rows[-1])
    ms = median_ms(lambda: model.base(images, padding), seconds)
    rows.append(["frozen detector (DINO, ResNet-50)", f"{count_parameters(detector):,}", "",
                 f"{ms:.0f}", "0"])
    columns = (f"part, {size[0]}x{size[1]}", "parameters", "GMACs", "ms", "MiB for backward")
    write_table("mask_cost", device, columns, rows)


def make_parts(model, memory, count) -> dict[str, Part]:
    """The parts of the network, with random inputs for `count` regions."""
    C = model.cfg.channel_dim
    side = model.cfg.roi_size
    width = model.base.dim
    map_of_stride_4 = memory.features[0]                           # (1, channels, H, W)
    device = map_of_stride_4.device
    fine = torch.randn(1, *map_of_stride_4.shape[-2:], width, device=device)
    region = torch.randn(count, side, side, C, device=device)
    queries = torch.randn(count, C, device=device)
    states = torch.randn(count, width, device=device)
    masks = torch.rand(count, side, side, device=device)

    def image_encoder():
        return mask_frozen_detr.encode(model.image_encoder, memory).tokens

    def mappers():
        return model.channel_mapper(fine).sum() + model.query_mapper(states).sum()

    def box_encoder():
        tokens = mask_frozen_detr.region_memory(region)
        return mask_frozen_detr.encode(model.box_encoder, tokens).tokens

    def box_to_object():
        return model.query_encoder.from_region(queries, mask_frozen_detr.region_memory(region))

    return {
        "neck": Part([model.neck], lambda: model.neck(map_of_stride_4)),
        "image encoder": Part([model.image_encoder], image_encoder),
        "channel and query mapper": Part([model.channel_mapper, model.query_mapper], mappers),
        "box encoder": Part([model.box_encoder], box_encoder),
        "box to object": Part([model.query_encoder], box_to_object),
        "mask scoring": Part([model.score_head], lambda: model.score_head(masks, region))}


def count_parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def saved_bytes(function, model) -> int:
    """Memory of all tensors that a function stores for its backward pass, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stored = {}      # address of the storage -> a tensor in it, which keeps the address taken

    def store(tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in parameters:
            stored[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
        function()
    return sum(tensor.untyped_storage().nbytes() for tensor in stored.values())
