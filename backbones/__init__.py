"""Backbones of the detectors: one file for each paper, building by name, and published weights.

    resnet.py     ResNet-18, -34, -50, -101 (He et al. 2016), and `tiny` for images of 128 pixels
    swin.py       Swin-T, -S, -B, -L (Liu et al. 2021)
    vit.py        ViT-L of EVA-02 with a simple feature pyramid, as in Co-DETR
    focalnet.py   FocalNet-L with 3 or 4 focal levels (Yang et al. 2022)
    layers.py     what the last three share

A backbone maps images (B, 3, H, W) to [C2, C3, C4, C5] at strides 4, 8, 16, 32 and lists their
widths in `channels`; the ViT adds a fifth map at stride 64. Its parameters have the names of the
published weights, so that these load by name.

    backbone = build_backbone("swin_t", "imagenet")
    print(load_backbone_weights(backbone, "swin_t", "imagenet"))
    c2, c3, c4, c5 = backbone(images)
"""
import math
import re
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.focalnet import FOCALNETS, FocalNet
from backbones.resnet import RESNETS, ResNet
from backbones.swin import SWINS, Swin, relative_position_index
from backbones.vit import VITS, ViT, resize_positions, rotary_table
from engine.errors import UserError

PUBLISHED = (ResNet, Swin, ViT, FocalNet)
BACKBONES = (*RESNETS, *SWINS, *VITS, *FOCALNETS)

PYTORCH = "https://download.pytorch.org/models/"
SWIN = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
FOCALNET = "https://github.com/microsoft/FocalNet/releases/download/v1.0.0/"
WEIGHT_FILES = {   # ImageNet-1k; "_22k" and FocalNet: ImageNet-22k
    "resnet18": PYTORCH + "resnet18-f37072fd.pth",
    "resnet34": PYTORCH + "resnet34-b627a593.pth",
    "resnet50": PYTORCH + "resnet50-0676ba61.pth",
    "resnet101": PYTORCH + "resnet101-63fe2227.pth",
    "swin_t": SWIN + "swin_tiny_patch4_window7_224.pth",
    "swin_s": SWIN + "swin_small_patch4_window7_224.pth",
    "swin_b": SWIN + "swin_base_patch4_window12_384_22k.pth",
    "swin_b_window7": SWIN + "swin_base_patch4_window7_224_22k.pth",
    "swin_l": SWIN + "swin_large_patch4_window12_384_22k.pth",
    "swin_l_window7": SWIN + "swin_large_patch4_window7_224_22k.pth",
    "focalnet_l_3level": FOCALNET + "focalnet_large_lrf_384.pth",
    "focalnet_l_4level": FOCALNET + "focalnet_large_lrf_384_fl4.pth",
    "focalnet_l_4level_sum": FOCALNET + "focalnet_large_lrf_384_fl4.pth",
}
# Where a file keeps its state dict: the first of these names that it has (Co-DETR's order).
WRAPPERS = ("model_ema", "state_dict", "model", "module")
# Parts of published files that a backbone does not have: classifiers, pretraining, rotary tables
# of the pretraining's size.
UNUSED = re.compile(r"fc\.|fc_norm\.|head\.|norm\.|lm_head\.|cls_token|mask_token|(.*\.)?rope\.")
# Parts of a backbone that classifiers do not have: they start from their initial values.
INITIALIZED_FRESH = re.compile(r"norm\d\.|out_norm\.|neck\.|.*num_batches_tracked")


def build_backbone(name: str, weights: str, norm: str = "batch", dilation: bool = False,
                   maps: int = 4, drop_path: float = 0.0) -> nn.Module:
    """Build a backbone with random weights. `load_backbone_weights` reads published ones.

    name: one of BACKBONES.
    weights: "none" for training from scratch, "imagenet" or a file. It changes ResNets only: with
        "none" they have trainable norms of the kind `norm` ("batch" or "group"). Otherwise their
        BatchNorm is constant, and stem and first stage are frozen (DETR, appendix A.4 and code).
    dilation: the last stage of a ResNet keeps stride 16 (DC5).
    maps: how many maps, from the coarsest on, the detector reads.
    drop_path: maximum stochastic-depth rate of a Swin, ViT or FocalNet, linear over the blocks.

    Raises UserError for an unknown name and for options that do not fit the backbone.
    """
    if name not in BACKBONES:
        choices = ", ".join(BACKBONES)
        raise UserError(f"unknown backbone {name!r}: choose one of {choices}")
    if norm not in ("batch", "group"):
        raise UserError(f"unknown backbone_norm {norm!r}: choose batch or group")
    if name in RESNETS and drop_path:
        raise UserError(f"expected drop_path 0 with a ResNet, got {drop_path:g} with {name}: leave "
                        "out --drop_path, or choose a Swin, ViT or FocalNet")
    if name not in RESNETS and dilation:
        raise UserError(f"expected dilation with a ResNet only, got {name}: leave out --dilation")
    if name in VITS and maps < 4:
        raise UserError(f"expected five feature levels with {name}, whose pyramid has five maps: "
                        "--num_feature_levels 5")

    if name in SWINS:
        return Swin(*SWINS[name], maps=maps, drop_path=drop_path)
    if name in VITS:
        return ViT(*VITS[name], drop_path=drop_path)
    if name in FOCALNETS:
        return FocalNet(*FOCALNETS[name], maps=maps, drop_path=drop_path)
    if weights == "none":
        return RESNETS[name](norm=norm, dilation=dilation)
    backbone = RESNETS[name](norm="frozen", dilation=dilation)
    backbone.conv1.requires_grad_(False)
    backbone.layer1.requires_grad_(False)
    return backbone


def load_backbone_weights(backbone: nn.Module, name: str, weights: str) -> str:
    """Load `weights` into `backbone` in place and describe in one line what was loaded.

    weights: "imagenet" for the published file of `name`, a path, or "none".
    Raises UserError when the weights cannot be downloaded or read, or do not fit.
    """
    if weights == "none":
        return f"backbone {name}: random weights, trained from scratch"
    path = fetch_imagenet_weights(name) if weights == "imagenet" else Path(weights)
    own = backbone.state_dict()
    loaded = {}
    for key, value in drop_derived_buffers(read_state_dict(path)).items():
        if key in own:
            value = resize_to_model(key, value, own[key].shape)
        loaded[key] = value
    check_fit(loaded, own, name, path)
    backbone.load_state_dict(loaded, strict=False)
    return f"backbone {name}: {len(loaded)} tensors from {path.name}"


def fetch_imagenet_weights(name: str) -> Path:
    """Download the published weights of backbone `name`, unless they are cached: -> their file.

    The cache is PyTorch's (`torch.hub.get_dir()`). Where several processes share it, let one of
    them call this function before the others do.
    Raises UserError when there are no public weights or they cannot be downloaded.
    """
    if name not in WEIGHT_FILES:
        raise UserError(f"no public ImageNet weights for backbone {name!r} (they exist for "
                        f"{', '.join(WEIGHT_FILES)}): pass --backbone_weights FILE with weights "
                        "of your own, or --backbone_weights none to train from scratch")
    url = WEIGHT_FILES[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))   # renamed into place when complete
    except (OSError, HTTPException) as error:
        raise UserError(f"expected ImageNet weights at {url}, got: {error}. Pass "
                        "--backbone_weights FILE with a downloaded copy, or --backbone_weights "
                        "none to train from scratch") from error
    return path


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a weight file by name, without those that no backbone has.

    Raises UserError for a file that is missing, broken, or holds anything but tensors.
    """
    if not path.is_file():
        raise UserError(f"--backbone_weights expects imagenet, none or a file, got {path}, which "
                        "is no file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:   # a damaged file can raise nearly anything
        reason = str(error).partition("\n")[0]
        raise UserError(f"expected PyTorch weights in {path}, got a file that is broken or holds "
                        f"more than tensors ({reason}): copy it again, or save its tensors alone, "
                        "or use --backbone_weights none to train from scratch") from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    state = {}
    if isinstance(content, dict):
        for key, value in content.items():
            key = str(key).removeprefix("module.")
            if isinstance(value, Tensor) and not UNUSED.match(key):
                state[key] = value
    if not state:
        raise UserError(f"expected the weights of a backbone in {path}, got none: give a file "
                        "with its tensors by name, or --backbone_weights none to train from "
                        "scratch")
    return state


def drop_derived_buffers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove from a published state dict what is counted or follows from shapes.

    Removed are num_batches_tracked, attn_mask (of Swin's pretraining size), and, after a comparison
    with what this backbone computes, relative_position_index (Swin), freqs_cos and freqs_sin (ViT).
    Raises UserError when they differ.
    """
    result = {}
    for key, value in state.items():
        kind = key.rpartition(".")[2]
        if kind in ("relative_position_index", "freqs_cos", "freqs_sin"):
            check_derived_buffer(key, value)
        elif kind not in ("num_batches_tracked", "attn_mask"):
            result[key] = value
    return result


def check_derived_buffer(key: str, value: Tensor) -> None:
    """Compare a table of a file with the one that this backbone computes; UserError if unequal."""
    side = math.isqrt(len(value))
    if key.endswith("relative_position_index"):
        expected = relative_position_index(side)                                   # (N, N)
    else:
        cosine, sine = rotary_table(side, side, value.shape[1])                    # (N, dim) each
        expected = sine if key.endswith("freqs_sin") else cosine
    equal = value.shape == expected.shape
    if equal and not value.is_meta:
        equal = torch.allclose(value.float(), expected.float(), atol=1e-3)
    if not equal:
        raise UserError(f"expected {key} {tuple(value.shape)} to be the table that this backbone "
                        "computes, got another one: these weights come from a changed model that "
                        "cannot be represented here")


def resize_to_model(key: str, value: Tensor, shape: torch.Size) -> Tensor:
    """Interpolate EVA-02's position table and patches to the model's size (bicubic).

    Every other tensor stays as it is.
    """
    if value.shape == shape:
        return value
    if key == "pos_embed":
        side = math.isqrt(shape[1] - 1)
        grid = resize_positions(value.float(), side, side)                         # (1, side^2, C)
        return torch.cat((value[:, :1], grid), 1)
    if key == "patch_embed.proj.weight":
        return F.interpolate(value.float(), shape[2:], mode="bicubic")
    return value


def check_fit(loaded: dict[str, Tensor], own: dict[str, Tensor], name: str, path: Path) -> None:
    """Raise UserError unless the loaded tensors are exactly those that the backbone needs."""
    missing = []
    for key in own:
        if key not in loaded and not INITIALIZED_FRESH.match(key):
            missing.append(key)
    unexpected = [key for key in loaded if key not in own]
    misshapen = []
    for key in loaded:
        if key in own and loaded[key].shape != own[key].shape:
            misshapen.append(key)
    if missing or unexpected or misshapen:
        raise UserError(f"{path} does not fit backbone {name}: missing {shortened(missing)}, "
                        f"unexpected {shortened(unexpected)}, of another shape "
                        f"{shortened(misshapen)}; give the weights of {name}, or "
                        "--backbone_weights none to train from scratch")


def shortened(names: list[str]) -> str:
    """The first three names and how many there are."""
    return f"{names[:3]} ({len(names)} in all)"
