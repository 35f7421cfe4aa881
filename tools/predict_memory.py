"""Predict the GPU memory that training needs, without a GPU.

    python -m tools.predict_memory                    every published recipe
    python -m tools.predict_memory co_detr vit_l      one of them

The model runs forward on tensors without values, and the bytes that autograd saves for the backward
pass are counted, each storage once. The image is the largest of the recipe (800 x 1333 pixels in
most), in float32, with 20 objects of the 80 classes of COCO or the 1203 of LVIS.

    for each image    what autograd saves. With --recompute: the inputs of the layers, what is saved
                      outside of them, and what the largest layer saves
    for the model     parameters, gradients, two moments of AdamW, and the EMA where there is one,
                      4 bytes each

Not counted: temporary tensors of single operations, losses, gradients of activations, the buckets
of DistributedDataParallel (4 bytes a parameter), the CUDA context, fragmentation; for Co-DETR the
RoI head. The figures are counts, not measurements; 10 to 20 % more should be free.
"""
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Annotated
from unittest import mock

import torch
import torch.nn.functional as F
import tyro
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from engine.commands import parse
from engine.errors import UserError, user_errors
from engine.layers import compile_or_recompute, find_layers
from engine.models import load_paper
from engine.recipe import configure

GIB = 2 ** 30
OBJECTS = 20
NUM_CLASSES = 80         # of COCO
LVIS_CLASSES = 1203      # recipes that show rare classes more often are for LVIS
PAPERS = ("detr", "deformable_detr", "dino", "h_detr", "co_detr")


@dataclass
class Prediction:
    """Bytes."""
    model: int          # whatever the batch
    image: int          # for each image of a micro-batch
    recomputed: int     # for each image, with --recompute


class AsOnGPU(TorchFunctionMode):
    """Take the branches for GPUs."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.is_cuda.__get__:
            return True
        return function(*args, **(kwargs or {}))


scaled_dot_product_attention = F.scaled_dot_product_attention


def fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, *args, **kwargs):
    """Attention that does not save its matrix: on CPUs only without dropout, on GPUs also with."""
    return scaled_dot_product_attention(q, k, v, attn_mask, 0.0, *args, **kwargs)


class SavedBytes:
    """`with SavedBytes(model) as saved:` counts what autograd saves inside, each storage once."""

    def __init__(self, model):
        own = [x.untyped_storage() for x in (*model.parameters(), *model.buffers())]
        # the storages stay alive, so that none of their addresses is used again
        self.own = {storage._cdata: storage for storage in own}
        self.storages = {}

    def add(self, x):
        if x.untyped_storage()._cdata not in self.own:
            self.storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.add, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


def predict(paper, cfg, recipe, size: tuple[int, int]) -> Prediction:
    """Count for a training step on images of this height and width."""
    classes = num_classes(recipe)
    image, largest, parameters = count(paper, cfg, size, recompute=False, classes=classes)
    recomputed, _, _ = count(paper, cfg, size, recompute=True, classes=classes)
    copies = 5 if recipe.ema else 4
    return Prediction(4 * copies * parameters, image, recomputed + largest)


def num_classes(recipe) -> int:
    """Classes of the data that a recipe is for."""
    return LVIS_CLASSES if recipe.oversample else NUM_CLASSES


def count(paper, cfg, size, recompute: bool, classes: int = NUM_CLASSES) -> tuple[int, int, int]:
    """-> bytes saved for one image, those of them in the largest layer, number of parameters"""
    fused = mock.patch.object(F, "scaled_dot_product_attention", fused_attention)
    with fused, FakeTensorMode(allow_non_fake_inputs=True), AsOnGPU():
        with mock.patch("torch.nn.init.trunc_normal_"):     # it reads values, which are not there
            model, _ = paper.build(cfg, classes)
        model.train()
        if recompute:
            settings = SimpleNamespace(compile=False, recompute=True, model=paper.__name__)
            compile_or_recompute(model, settings)
        layer_bytes = [0]
        with SavedBytes(model) as saved:
            for layer in find_layers(model):
                if recompute:
                    keep_inputs(layer, saved)
                else:
                    measure(layer, saved, layer_bytes)
            outputs = forward(model, cfg, size)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        del outputs
    return saved.total, max(layer_bytes), parameters


def measure(layer, saved: SavedBytes, layer_bytes: list[int]) -> None:
    """Let the layer append to `layer_bytes` what it saves, whenever it runs."""
    original = layer.forward

    def measured(*args):
        before = saved.total
        result = original(*args)
        layer_bytes.append(saved.total - before)
        return result

    layer.forward = measured


def keep_inputs(layer, saved: SavedBytes) -> None:
    """Let the layer, which is recomputed, add its inputs to `saved`: they stay in memory."""
    original = layer.forward

    def kept(*args):
        for x in tree_leaves(args):
            if isinstance(x, torch.Tensor):
                saved.add(x)
        return original(*args)

    layer.forward = kept


def forward(model, cfg, size):
    """One image through everything that is computed in training."""
    images = torch.rand(1, 3, *size)                                     # (1, 3, H, W)
    padding = torch.zeros(1, *size, dtype=torch.bool)                    # (1, H, W)
    boxes = torch.rand(OBJECTS, 4)
    targets = [{"labels": torch.zeros(OBJECTS, dtype=torch.int64), "boxes": boxes}]
    if not hasattr(model, "collaborate"):
        return model(images, padding, targets)

    # Co-DETR: which anchors are positive depends on values, which are not there. The shapes of
    # what its parts save do not depend on them, with few exceptions.
    outputs = model.detector(images, padding, targets)
    memory = outputs["memory"]
    maps = model.pyramid(memory).maps
    heads = []
    for name in model.heads:
        module = model.rpn if name == "rcnn" else getattr(model, name)
        heads.append(module(maps))
    M = cfg.aux_queries
    rows = SimpleNamespace(boxes=torch.rand(1, M, 4), features=torch.rand(1, M, cfg.dim),
                           weights=torch.ones(1, M))
    chosen = [rows for _ in model.heads]
    return outputs, heads, model.decode_customized(memory, chosen)


def largest_size(recipe) -> tuple[int, int]:
    """Height and width of the largest training image."""
    if recipe.augment == "lsj":
        return recipe.lsj_size, recipe.lsj_size
    limit = recipe.train_max_size or recipe.max_size
    return max(recipe.train_sizes), limit


def recipes(words: list[str]) -> list[tuple]:
    """The paper files and variants that are asked for: (module, name, variant).

    words: a paper file and its variants; without variants all of them, without a file all files"""
    chosen = []
    for name in words[:1] or PAPERS:
        if name not in PAPERS:
            raise UserError(f"expected one of {', '.join(PAPERS)}, got {name!r}")
        paper = load_paper(name)
        for variant in words[1:] or ["", *paper.VARIANTS]:
            if variant and variant not in paper.VARIANTS:
                raise UserError(f"expected a variant of {name} ({', '.join(paper.VARIANTS)}), got "
                                f"{variant!r}")
            chosen.append((paper, name, variant))
    return chosen


@dataclass
class Options:
    """Predict the GPU memory that training needs, without a GPU."""
    # one of the paper files and some of its variants; none: all recipes
    recipe: Annotated[tyro.conf.Positional[list[str]],
                      tyro.conf.arg(metavar="[PAPER [VARIANT ...]]")] = field(default_factory=list)


def print_predictions(words: list[str]) -> None:
    """Print a line for each of the `recipes` that differs from those before it."""
    printed = []
    for paper, name, variant in recipes(words):
        overrides = paper.VARIANTS[variant] if variant else {}
        cfg, recipe = configure(paper, overrides)
        size = largest_size(recipe)
        shape = {**vars(cfg), "model": name, "size": size, "ema": bool(recipe.ema),
                 "classes": num_classes(recipe)}
        if shape in printed:     # differs from an earlier one in its schedule only
            continue
        printed.append(shape)
        result = predict(paper, cfg, recipe, size)
        print(f"{name:16} {variant or 'default':26} {size[0]:4} x {size[1]:4}"
              f"  model {result.model / GIB:5.1f} GiB  image {result.image / GIB:5.1f} GiB"
              f"  with --recompute {result.recomputed / GIB:5.1f} GiB", flush=True)


def main(argv: list[str] | None = None) -> None:
    with user_errors("tools.predict_memory"):
        options = parse(Options, "python -m tools.predict_memory", __doc__, argv)
        print_predictions(options.recipe)


if __name__ == "__main__":
    main()
