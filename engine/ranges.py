"""The range of every setting, from the command line or a checkpoint: one range per field name."""
import math
import typing
from dataclasses import fields

from engine.errors import UserError

LAYERS = (1, 100)
FRACTION = (0, 1)
SIDE = (1, 10_000)         # of an image, pixels

INTEGER = (1, 1_000_000)   # of fields that RANGES does not list
NUMBER = (0, 1_000_000)
RANGES = {
    # visualize.py
    "n": (1, 1000), "side": (16, 10_000), "rank": (0, 1_000_000), "score_threshold": FRACTION,
    # Run
    "overfit": (0, 1_000_000), "seed": (0, 2**31 - 1), "accum": (1, 10_000),
    "workers": (-1, 256), "threads": (0, 1024), "keep_every": (0, 1_000_000),
    "max_steps": (0, 1_000_000_000),
    # Recipe
    "lr": (0, 1000), "lr_backbone": (0, 1000), "lr_offsets": (0, 1000), "layer_decay": FRACTION,
    "muon": (0, 1000), "weight_decay": (0, 1000), "lr_drops": FRACTION, "warmup": FRACTION,
    "ema": (0, 0.999999),
    "ema_warmup": (0, 1_000_000), "train_max_size": (0, 10_000),
    "train_sizes": SIDE, "max_size": SIDE, "eval_size": SIDE, "lsj_size": SIDE,
    "lsj_ratios": (0.01, 10), "lr_drop": (0, 1_000_000),
    # Config
    "num_feature_levels": (1, 5), "dim": (1, 8192), "num_heads": (1, 64), "num_points": (1, 64),
    "encoder_layers": (0, 100), "decoder_layers": LAYERS, "image_layers": LAYERS,
    "box_layers": LAYERS, "enc_layer": (0, 100), "ffn_dim": (1, 65_536), "channel_dim": (1, 8192),
    "dropout": (0, 0.99), "drop_path": (0, 0.99), "num_queries": (1, 100_000),
    "num_queries_one2many": (0, 100_000), "dn_number": (0, 100_000), "dn_label_noise": (0, 2),
    "roi_convs": (0, 100), "roi_dim": (1, 65_536), "roi_size": (1, 1024), "size_divisor": (1, 1024),
    "soft_nms": FRACTION, "rcnn_soft_nms": FRACTION, "dense_soft_nms": FRACTION,
    "test_proposal_nms": FRACTION, "importance": FRACTION, "oversample": FRACTION,
    "oversample_points": (1, 1000), "fed_loss": (0, 1_000_000),
}
CHOICES = {
    "augment": ("none", "flip", "paper", "lsj"), "freeze": ("", "backbone"),
    "preset": ("", "paper", "small"), "device": ("", "cpu", "cuda", "mps"),
    "impl": ("", "kernel", "torch"),
    "schedule": ("step", "drops", "cosine", "flat"),
}


def check_ranges(*settings) -> None:
    """UserError for the first field of these dataclass instances that holds another type than its
    annotation says, or a value outside its range."""
    for group in settings:
        hints = typing.get_type_hints(type(group))
        for field in fields(group):
            value = getattr(group, field.name)
            if value is None and type(None) in typing.get_args(hints[field.name]):
                continue
            default = getattr(type(group), field.name, value)
            check_type(field.name, value, default)
            check_value(field.name, value, default)
        check_heads(group)
        check_jitter(group)


def check_values(settings: dict, defaults: dict) -> None:
    """UserError for the first of these settings that has another type than its default, or a value
    outside its range. Settings may lack some."""
    for name, default in defaults.items():
        if name in settings:
            check_type(name, settings[name], default)
            check_value(name, settings[name], default)


def check_type(name: str, value, default) -> None:
    """UserError for a value of another type than the default; a float may be given as an int."""
    kind = type(default)
    if kind is float:
        fits = type(value) in (int, float)
    elif kind is tuple:
        fits = isinstance(value, (tuple, list)) and len(value) > 0
        fits = fits and all(type(part) in (int, type(default[0])) for part in value)
    else:
        fits = type(value) is kind or default is None
    if not fits:
        raise UserError(f"expected --{name} to be of type {kind.__name__}, as in {default!r}, got "
                        f"{value!r}")


def check_value(name: str, value, default) -> None:
    """UserError for a value, or an element of a tuple, that CHOICES or RANGES exclude."""
    if name in CHOICES:
        if value not in CHOICES[name]:
            choices = " or ".join(choice for choice in CHOICES[name] if choice)
            raise UserError(f"expected --{name} {choices}, got {value!r}")
        return
    usual = NUMBER if type(default) is float else INTEGER
    low, high = RANGES.get(name, usual)
    for number in value if isinstance(value, (tuple, list)) else [value]:
        if isinstance(number, (bool, str)):
            continue
        if not (math.isfinite(number) and low <= number <= high):
            raise UserError(f"expected --{name} from {low:g} to {high:g}, got {number!r}")


def check_heads(cfg) -> None:
    """UserError unless the attention heads and GroupNorm's groups divide every width evenly."""
    if hasattr(cfg, "num_feature_levels") and cfg.dim % 32:
        raise UserError(f"expected --dim divisible by 32, got {cfg.dim}: its maps are normalized "
                        "in 32 groups")
    if getattr(cfg, "aux_heads", "none") not in ("", "none") and cfg.dim < 64:
        raise UserError(f"expected --dim of at least 64 with --aux_heads, got {cfg.dim}: a group "
                        "of one channel cannot be normalized on a map of one token")
    for width in ("dim", "channel_dim"):
        size = getattr(cfg, width, 0)
        heads = getattr(cfg, "num_heads", 1)
        if size % heads:
            raise UserError(f"expected --{width} divisible by --num_heads, got {size} and {heads}")


def check_jitter(recipe) -> None:
    """UserError unless the ratios of large-scale jitter are two, the lower one first."""
    ratios = getattr(recipe, "lsj_ratios", (0, 1))
    if len(ratios) != 2 or ratios[0] > ratios[1]:
        raise UserError("expected --lsj_ratios LOWEST,HIGHEST, such as 0.1,2, got "
                        f"{','.join(map(str, ratios))}")
