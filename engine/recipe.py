"""How a model is trained: the settings that all papers share, with one meaning everywhere."""
from dataclasses import dataclass, fields, replace

from engine.errors import UserError


@dataclass
class Recipe:
    """Optimizer, schedule, image sizes and augmentation of one training run."""
    lr: float = 1e-4                # learning rate, for steps of `batch_size` images
    lr_backbone: float = 1e-5       # learning rate of the backbone
    lr_offsets: float = 2e-5        # learning rate of sampling offsets and reference points
    layer_decay: float = 0.0        # factor of lr from block to block of a ViT; 0: off
    muon: float = 0.0               # > 0: Muon trains hidden matrices at this many times lr
    weight_decay: float = 1e-4      # weight decay of AdamW and of Muon
    clip: float = 0.1               # maximum norm of the gradient; 0: no limit
    batch_size: int = 16            # images per step, over all processes and micro-batches
    epochs: int = 12                # passes over the training set
    schedule: str = "step"          # learning-rate schedule: step, drops, cosine or flat
    lr_drop: int = 11               # schedule step: lr x 0.1 after this epoch
    # schedule drops: lr x 0.1 after each of these fractions of the run
    lr_drops: tuple[float, ...] = (0.9, 0.95)
    warmup: float = 0.0             # fraction of the run in which lr rises from 0
    ema: float = 0.0                # decay of the EMA of the weights, which is evaluated; 0: off
    ema_warmup: int = 0             # steps over which the decay rises to `ema`; 0: a short rise
    # shorter side in training, chosen at random for each image, px
    train_sizes: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    max_size: int = 1333            # maximum longer side, px
    train_max_size: int = 0         # maximum longer side in training, px; 0: max_size
    # change training images: none, flip, paper (these fields) or lsj (large-scale jitter)
    augment: str = "paper"
    # repeat images with rare classes: those in a smaller fraction of the images than this; 0: off
    oversample: float = 0.0
    crop: bool = True               # crop a random part of half of the training images
    color_jitter: bool = False      # change the colors of training images at random
    # also flip training images vertically: for views from above and through a microscope
    vertical_flip: bool = False
    eval_size: int = 800            # shorter side at evaluation, px
    lsj_size: int = 1024            # augment lsj: side of the squares that images fill, px
    # augment lsj: lowest and highest longer side of a training image, in lsj_size
    lsj_ratios: tuple[float, ...] = (0.1, 2.0)


# Shared by every paper file's SMALL, which trains in minutes on two CPU cores.
SMALL_RECIPE = dict(
    lr=6e-4, lr_backbone=6e-4, lr_offsets=2e-4, muon=8.0, weight_decay=1e-2, clip=1.0, batch_size=8,
    epochs=6, schedule="cosine", warmup=0.04, ema=0.995, train_sizes=(128,), max_size=213,
    crop=False, color_jitter=True, eval_size=128, lsj_size=128)
SMALL_DETECTOR = dict(
    backbone="tiny", backbone_weights="none", num_feature_levels=3, dim=128, num_heads=4,
    encoder_layers=1, decoder_layers=3, ffn_dim=384, num_queries=40, size_divisor=32)


def override(defaults, values: dict):
    """Copy a dataclass instance with those of `values` that are fields of it."""
    names = {field.name for field in fields(defaults)}
    return replace(defaults, **{name: x for name, x in values.items() if name in names})


def configure(paper, *overrides: dict) -> tuple:
    """Make the Config and the Recipe of a paper file; later overrides win. A name that is a field
    of neither is a UserError."""
    cfg = paper.Config()
    values = {name: x for changes in overrides for name, x in changes.items()}
    known = {field.name for part in (cfg, paper.RECIPE) for field in fields(part)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(f"expected fields of {paper.__name__}.Config or of Recipe, got "
                        f"{', '.join(unknown)}: they belong to another version of the file")
    return override(cfg, values), override(paper.RECIPE, values)


def preset_values(paper, preset: str, variant: str) -> dict:
    """What a preset, paper or small, and a variant change in a paper file's Config and RECIPE."""
    variants = getattr(paper, "VARIANTS", {})
    if preset not in ("paper", "small"):
        raise UserError(f"expected --preset paper or small, got {preset!r}")
    if variant not in ("", *variants):
        choices = " or ".join(variants) or "left out: this file has none"
        raise UserError(f"expected --variant {choices}, got {variant!r}")
    small = getattr(paper, "SMALL", {}) if preset == "small" else {}
    return {**small, **variants.get(variant, {})}
