"""Runs of models of a few thousand parameters on images of 64 px, for the tests of training."""

import functools
import importlib
import json
import multiprocessing
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backbones import resnet
from engine import datasets
from engine import layers
from engine.machine import Machine
from engine.recipe import configure
import data
import scenes
import train

ROOT = Path(train.__file__).parent
MODELS = ("deformable_detr", "dino", "h_detr", "co_detr")
TINY = dict(
    backbone="tiny",
    backbone_weights="none",
    num_feature_levels=3,
    dim=32,
    num_heads=2,
    num_points=2,
    encoder_layers=1,
    decoder_layers=2,
    ffn_dim=32,
    num_queries=12,
    train_sizes=(64,),
    eval_size=64,
    max_size=128,
    crop=False,
    color_jitter=True,
    batch_size=4,
    epochs=2,
    schedule="cosine",
    warmup=0.2,
    ema=0.9,
    lr=1e-3,
    lr_backbone=1e-3,
    clip=1.0,
    dropout=0.1,
)
OWN = {
    "h_detr": dict(num_queries_one2many=24, k_one2many=3),
    "co_detr": dict(
        dim=64,
        aux_queries=12,
        rpn_pre_nms=32,
        rpn_proposals=16,
        rpn_samples=32,
        roi_samples=16,
        roi_dim=32,
    ),
}
ALONE = {
    "dino": dict(denoising="none")
}  # with group norm and this, nothing in a model looks across images
RUN = dict(
    num_train=12, num_val=4, device="cpu", amp=False, workers=0, threads=1
)  # three steps an epoch
FLAGS = [
    f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}"
    for k, v in {**TINY, **RUN}.items()
]


@pytest.fixture(autouse=True, scope="module")
def cheap_runs():
    """A narrow backbone, scenes drawn once, and no pictures: they have their own tests and cost
    more than these runs."""
    draw, drawn = scenes.Shapes.draw, {}

    def draw_once(scenes, index):
        key = scenes.split, scenes.seed, scenes.size, int(scenes.image_ids[index])
        drawn[key] = drawn.get(key) or draw(scenes, index)
        return drawn[key]

    narrow = functools.partial(
        resnet.ResNet, resnet.BasicBlock, (1, 1, 1, 1), (8, 16, 24, 32), 8, small_stem=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.RESNETS, "tiny", narrow)
        patch.setattr(scenes.Shapes, "draw", draw_once)
        patch.setattr(train.visualize, "predictions", lambda *args, **kwargs: None)
        patch.setattr(train.visualize, "curves", lambda *args, **kwargs: None)
        yield


def config(model, **changes):
    """-> Config and Recipe"""
    return configure(importlib.import_module(model), TINY, OWN.get(model, {}), changes)


def level_embed(state):
    """A tensor that every model has, alone or wrapped."""
    return next(value for key, value in state.items() if key.endswith("level_embed"))


def run(tmp_path, model="deformable_detr", name="run", **changes):
    return train.Run(**{**RUN, "model": model, "out": str(tmp_path / name), **changes})


def same(a, b, path=""):
    """Deep equality, tensors to the bit; times are not compared."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key not in ("seconds", "out", "resume"):
                same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{path}[{i}]")
    elif torch.is_tensor(a):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def at_step(monkeypatch, number, action):
    """Calls `action` just before optimizer step `number` of the next run."""
    original = train.lr_factor

    def wrapped(recipe, step, steps):
        if step == number:
            action()
        return original(recipe, step, steps)

    monkeypatch.setattr(train, "lr_factor", wrapped)


def forked(world, function, *args, timeout=240, wait_for=None):
    """Runs function(rank, *args) in `world` gloo processes -> their exit codes. Forked, as
    importing torch takes seconds; killed when they take too long. wait_for: ranks to wait for,
    default all."""
    processes = start_ranks(world, function, *args)
    try:
        deadline = time.time() + timeout
        awaited = [processes[rank] for rank in wait_for or range(world)]
        for process in awaited:
            process.join(max(0.0, deadline - time.time()))
        assert not any(process.is_alive() for process in awaited), f"running after {timeout} s"
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def start_ranks(world, function, *args):
    """Starts function(rank, *args) in `world` forked gloo processes -> the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def begin(rank):
        torch.set_num_threads(1)   # the OpenMP threads of the parent do not exist in a fork
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        function(rank, *args)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=begin, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def coco_folder(root, images=3, names=("cat", "dog"), ids=(7, 3), empty=False):
    """A COCO-layout folder of 64 px squares on grey, training and validation alike."""
    categories = [{"id": i, "name": n} for i, n in zip(ids, names)]
    for split in ("train2017", "val2017"):
        (root / split).mkdir(parents=True)
        content = {"images": [], "annotations": [], "categories": categories}
        for i in range(images):
            picture = np.full((64, 64, 3), 90, np.uint8)
            picture[10:30, 8 + i : 40 + i] = (220, 40 * (i % 5), 30)
            Image.fromarray(picture).save(root / split / f"{i}.png")
            content["images"].append(
                {"id": i + 1, "file_name": f"{i}.png", "width": 64, "height": 64}
            )
            if not empty:
                content["annotations"].append(
                    {
                        "id": i + 1,
                        "image_id": i + 1,
                        "category_id": ids[i % len(ids)],
                        "bbox": [8 + i, 10, 32, 20],
                        "area": 640,
                        "iscrowd": 0,
                    }
                )
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return str(root)


def step_of(
    model, cfg, recipe, machine=Machine(), places=(0, 1, 2, 3), settings=train.Run(), empty=False
):
    """One training step of a fresh model on these generated scenes -> gradients by name, batch
    statistics, bytes kept for the backward pass."""
    paper = importlib.import_module(model)
    scenes, _ = datasets.build_datasets(None, recipe, 0, num_train=8, num_val=1)
    torch.manual_seed(0)
    net, criterion = paper.build(cfg, 8)
    net.train()
    optimizer = torch.optim.AdamW(paper.param_groups(net, recipe), fused=True)
    layers.compile_or_recompute(net, settings)
    batch = data.collate([scenes[i] for i in places])
    if empty:
        batch = (
            *batch[:2],
            [{**t, "labels": t["labels"][:0], "boxes": t["boxes"][:0]} for t in batch[2]],
        )
    kept = []
    wrapped = machine.distribute(net)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.nbytes) or x, lambda x: x
    ):
        *_, finite = train.step(
            wrapped, net, criterion, optimizer, train.make_ema(net, 0.0), [batch], 0.0, machine
        )
    assert finite
    gradients = {name: p.grad for name, p in net.named_parameters()}
    assert all(g is not None for g in gradients.values()), [
        name for name, g in gradients.items() if g is None
    ]
    return gradients, {name: b.clone() for name, b in net.named_buffers()}, sum(kept)
