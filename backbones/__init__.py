"""Backbones of DETR detectors, each with the parameter names of its published weights, so that they load by name. No local
imports: copy it alone.

ResNet (He et al. 2016)       torchvision's, with the stride on the 3x3 convolution; `tiny`: four blocks for images of about
                              128 px that train from scratch in minutes on a CPU (OUR CHOICE): a 3x3 stem, no max pooling
Swin (Liu et al. 2021)        windows of 7 or 12 cells
ViT (Dosovitskiy et al. 2021) EVA-02's ViT-L with windows and a simple feature pyramid, as Co-DETR uses it
FocalNet (Yang et al. 2022)   the large model, with 3 or 4 focal levels

All map images (B, 3, H, W) to [C2, C3, C4, C5] at strides 4 to 32 and list their widths in `channels`; ViT adds stride 64.

    backbone = build_backbone("swin_t", "imagenet")
    print(load_backbone_weights(backbone, "swin_t", "imagenet"))
    c2, c3, c4, c5 = backbone(images)
"""
import math
import re
from pathlib import Path
from urllib.error import URLError
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from engine.errors import UserError
from backbones.focalnet import FOCALNETS, FocalNet
from backbones.resnet import RESNETS
from backbones.swin import SWINS, Swin, relative_position_index
from backbones.vit import VITS, ViT, resize_positions, rotary_table

SWIN_FILES, FOCALNET_FILES = (f"https://github.com/{place}/releases/download/v1.0.0/" for place in
                              ("SwinTransformer/storage", "microsoft/FocalNet"))
WEIGHT_FILES = {   # ImageNet-1k; _22k and FocalNet: ImageNet-22k
    **{name: "https://download.pytorch.org/models/" + file for name, file in (
        ("resnet18", "resnet18-f37072fd.pth"), ("resnet34", "resnet34-b627a593.pth"),
        ("resnet50", "resnet50-0676ba61.pth"), ("resnet101", "resnet101-63fe2227.pth"))},
    **{name: f"{SWIN_FILES}swin_{file}.pth" for name, file in (
        ("swin_t", "tiny_patch4_window7_224"), ("swin_s", "small_patch4_window7_224"),
        ("swin_b", "base_patch4_window12_384_22k"), ("swin_b_window7", "base_patch4_window7_224_22k"),
        ("swin_l", "large_patch4_window12_384_22k"), ("swin_l_window7", "large_patch4_window7_224_22k"))},
    "focalnet_l_3level": FOCALNET_FILES + "focalnet_large_lrf_384.pth",
    "focalnet_l_4level": FOCALNET_FILES + "focalnet_large_lrf_384_fl4.pth",
}
BACKBONES = (*RESNETS, *SWINS, *VITS, *FOCALNETS)
UNUSED = ("fc.", "head.", "norm.", "lm_head.", "cls_token", "mask_token")   # classifiers and pretraining


def build_backbone(name: str, weights: str, norm: str = "batch", dilation: bool = False, maps: int = 4,
                   drop_path: float = 0.0) -> nn.Module:
    """The backbone's structure, without reading a file (`load_backbone_weights` does that).

    `weights` "none": trained from scratch; of a ResNet with live `norm` ("batch" or "group"). Anything else: a ResNet has
    frozen batch normalisation and a frozen stem and first stage (Deformable DETR, section 5 and code); all of the others
    is trained. `maps`: how many maps, from the coarsest on, the detector reads. `drop_path`: of the last block.
    """
    if name not in BACKBONES:
        raise UserError(f"unknown backbone {name!r}: choose one of {', '.join(BACKBONES)}")
    if norm not in ("batch", "group"):
        raise UserError(f"unknown backbone_norm {norm!r}: choose batch or group")
    if dilation and name not in RESNETS or drop_path and name in RESNETS:
        raise UserError(f"expected dilation with a ResNet and drop_path with another backbone, got {name} with dilation "
                        f"{dilation} and drop_path {drop_path:g}: leave out the one that does not fit")
    if name in SWINS:
        return Swin(*SWINS[name], maps, drop_path)
    if name in VITS and maps < 4:
        raise UserError(f"expected five feature levels with {name}, whose pyramid has five maps: --num_feature_levels 5")
    if name in VITS:
        return ViT(*VITS[name], drop_path)
    if name in FOCALNETS:
        return FocalNet(*FOCALNETS[name], maps, drop_path)
    if weights == "none":
        return RESNETS[name](norm=norm, dilation=dilation)
    backbone = RESNETS[name](norm="frozen", dilation=dilation)
    for module in (backbone.conv1, backbone.layer1):
        module.requires_grad_(False)
    return backbone


def load_backbone_weights(backbone: nn.Module, name: str, weights: str) -> str:
    """Fills `backbone` in place from `weights` ("imagenet", a path, or "none"); returns a line that says what was done.

    Raises RuntimeError when the public weights cannot be fetched, or do not fit, and names the remedy.
    """
    if weights == "none":
        return f"backbone {name}: random weights, trained from scratch"
    if weights == "imagenet":
        if name not in WEIGHT_FILES:
            raise UserError(f"no public ImageNet weights for backbone {name!r} (they exist for "
                            f"{', '.join(WEIGHT_FILES)}): pass --backbone_weights FILE with weights of your own, or none "
                            "to train it from scratch")
        url = WEIGHT_FILES[name]
        try:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        except (URLError, OSError) as error:
            raise UserError(f"expected ImageNet weights at {url}, got: {error}. Pass --backbone_weights FILE with a "
                            "downloaded copy, or --backbone_weights none to train from scratch") from error
    else:
        if not Path(weights).is_file():
            raise UserError(f"--backbone_weights expects imagenet, none or a file; there is no file {weights}")
        state = torch.load(weights, map_location="cpu", weights_only=True)
    own = backbone.state_dict()
    known = {key: resized(key, value, own) for key, value in learned(state.get("model", state)).items()
             if not key.startswith(UNUSED)}
    new = re.compile(r"norm\d\.|neck\.|.*num_batches_tracked")   # begins with the detector, as the files have none
    misfits = {"missing": [key for key in own if key not in known and not new.match(key)],
               "unexpected": [key for key in known if key not in own],
               "of another shape": [key for key in known if key in own and known[key].shape != own[key].shape]}
    if any(misfits.values()):
        found = ", ".join(f"{kind} {keys[:3]} ({len(keys)} in all)" for kind, keys in misfits.items())
        raise UserError(f"{weights} does not fit backbone {name}: {found}; give the weights of {name}")
    backbone.load_state_dict(known, strict=False)
    return f"backbone {name}: {len(known)} tensors from {weights}"


def learned(state: dict) -> dict:
    """A published state dict without counters and without tables that follow from its shapes.

    Dropped: num_batches_tracked; attn_mask (Swin's, of its pretraining size); relative_position_index (Swin) and freqs_cos
    and freqs_sin (ViT), after a comparison with ours. ValueError when they differ."""
    result = {}
    for key, value in state.items():
        kind = key.rsplit(".", 1)[-1]
        if kind in ("relative_position_index", "freqs_cos", "freqs_sin"):
            side = math.isqrt(len(value))
            ours = relative_position_index(side) if kind == "relative_position_index" else (
                rotary_table(side, side, value.shape[1])[int(kind == "freqs_sin")])
            if ours.shape != value.shape or not (value.is_meta or torch.allclose(value.float(), ours.float(), atol=1e-3)):
                raise UserError(f"expected {key} {tuple(value.shape)} to be the table that this backbone computes, got "
                                "another one: these weights come from a changed model that this file cannot represent")
        elif kind not in ("num_batches_tracked", "attn_mask"):
            result[key] = value
    return result


def resized(key: str, value: Tensor, own: dict) -> Tensor:
    """EVA-02's position table and patches, bicubic, in the model's size; everything else as it is."""
    if key not in own or value.shape == own[key].shape:
        return value
    if key == "pos_embed":
        n = math.isqrt(own[key].shape[1] - 1)
        return torch.cat((value[:, :1], resize_positions(value, n, n)), 1)
    if key == "patch_embed.proj.weight":
        return F.interpolate(value, own[key].shape[2:], mode="bicubic")
    return value
