"""Weights that come with the program: assets/weights/NAME.safetensors, known by NAME.

Wherever a checkpoint is expected, its name may be given instead of a path, or the address of a file
on the web (engine/download.py).
"""
from pathlib import Path

from engine import weight_files
from engine.class_rows import has_class_rows
from engine.download import fetch, is_url
from engine.errors import UserError

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "weights"
SUFFIX = ".safetensors"
# Tensors with a row for each query: another number of queries starts them afresh.
QUERY_TENSORS = ("tgt_embed.weight", "anchor_embed.weight", "query_embed.weight")
# Settings that give the same tensors another meaning.
SAME_SETTINGS = ("num_heads", "num_points", "dilation")


def names() -> list[str]:
    """Return the names of the weights that come with the program."""
    return sorted(path.stem for path in FOLDER.glob("*" + SUFFIX))


def is_name(text: str) -> bool:
    """Whether a text is a bare word, and no path: neither a folder nor a suffix in it."""
    return bool(text) and Path(text).name == text and not Path(text).suffix


def find_weights(checkpoint: str | Path) -> Path:
    """Return the file of a checkpoint given by path, by name or by address.

    A path that exists comes before a name. What is on the web is downloaded once. Raises UserError
    for a name that is not known, and for a download that fails.
    """
    text = str(checkpoint)
    if is_url(text):
        return fetch(text)
    path = Path(checkpoint)
    if path.exists() or not is_name(text):
        return path
    if text in names():
        return FOLDER / (text + SUFFIX)
    known = ", ".join(names()) or "none yet"
    raise UserError(f"expected a checkpoint file, an address or a name of assets/weights ({known}),"
                    f" got {text!r}, which is none of them")


def start_for(run, cfg, model) -> str:
    """Return the name of weights from which training should start by itself, "" if there are none.

    These are weights of the same model with the same shapes, except for classes and queries: for
    --preset small on a folder of images. Never with --resume or --overfit, and never for a mask
    network, whose weights belong to one frozen detector.
    """
    if run.resume or run.overfit or run.detector or not run.data or run.preset != "small":
        return ""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in names():
        fields, stored = weight_files.read_header(FOLDER / (name + SUFFIX))
        config = fields.get("config", {})
        same = all(config.get(field) == getattr(cfg, field, None) for field in SAME_SETTINGS)
        if fields.get("model_name") == run.model and same and same_shapes(shapes, stored):
            return name
    return ""


def same_shapes(wanted: dict[str, tuple], stored: dict[str, tuple]) -> bool:
    """Whether two models agree in everything but their classes and their number of queries."""
    if wanted.keys() != stored.keys():
        return False
    for name, shape in wanted.items():
        has_rows = has_class_rows(name) or name.endswith(QUERY_TENSORS)
        first = 1 if has_rows else 0
        if shape[first:] != stored[name][first:]:
            return False
    return True
