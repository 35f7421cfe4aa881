"""Released weights: which model a file holds, its settings, and the file as a checkpoint of ours.

    recognize      state dict in the authors' names -> family and the Config fields its shapes show
    convert        what was read from a released file -> a checkpoint of ours

What no tensor shows comes from the options that authors save beside the weights, or from the
config.json beside `transformers`' weights. A file that is not one of the known models is refused
by name; it is never loaded as something similar.
"""
import dataclasses
import functools
import importlib
import json
import math
import re
from pathlib import Path

import torch

from backbones import BACKBONES, build_backbone, drop_derived_buffers
from engine.authors_names import (
    CO_DETR_HEAD, FAMILIES, count_layers, from_authors, from_transformers)
from engine.checkpoints import FORMAT
from engine.class_rows import (
    COCO_IDS, COCO_NAMES, coco_columns, count_classes, numbered_names)
from engine.errors import UserError
from engine.notices import one_line
from engine.ranges import check_ranges
from engine.recipe import configure

# H-DETR's table of queries holds both groups; every released one has this many one-to-many rows.
ONE_TO_MANY_QUERIES = 1500
LVIS_CLASSES = 1203
# Options saved beside the weights, in `args` or in transformers' config.json: theirs -> Config.
OPTIONS = {
    "nheads": "num_heads", "encoder_attention_heads": "num_heads",
    "enc_n_points": "num_points", "encoder_n_points": "num_points",
    "dilation": "dilation",
    "num_select": "top_k", "topk": "top_k",
    "num_queries_one2one": "num_queries", "num_queries_one2many": "num_queries_one2many",
}
# Two-stage Deformable DETR has no table of queries that would show their number.
TWO_STAGE_OPTIONS = {"num_queries": "num_queries", "two_stage_num_proposals": "num_queries"}
# Options with a single value that our models can represent.
REQUIRED_OPTIONS = {"activation_function": "relu", "position_embedding_type": "sine",
                    "position_embedding": "sine"}
# Backbones that differ from another one in no shape: FocalNet-L with 4 levels divides the sum of
# its modulators (FocalNet-DINO, whose names are DINO's) or does not (detrex): --variant decides.
AMBIGUOUS_BACKBONES = ("focalnet_l_4level",)
# Pairs of options that have one Config field.
EQUAL_OPTIONS = (
    ("enc_n_points", "dec_n_points"), ("encoder_n_points", "decoder_n_points"),
    ("encoder_attention_heads", "decoder_attention_heads"),
    ("encoder_ffn_dim", "decoder_ffn_dim"))


# ---- recognizing --------------------------------------------------------------------------------

def recognize(state: dict) -> tuple[str, dict]:
    """Find the family of a state dict in the authors' names and the Config fields its shapes show.

    Returns (key of FAMILIES, {"num_queries": 900, ...}). Raises UserError when it is none of them.
    Two-stage Deformable DETR does not show its number of queries, and no family shows dilation or
    the number of heads and points.
    """
    if CO_DETR_HEAD + "level_embeds" in state:
        return recognize_co_detr(state)
    family = detr_family(state)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    found = FAMILIES[family].overrides | recognize_backbone(state)
    if family == "detr":
        found["dim"] = shapes["input_proj.weight"][0]
    else:
        found["num_feature_levels"], found["dim"] = shapes["transformer.level_embed"]
    found["ffn_dim"] = shapes["transformer.decoder.layers.0.linear1.weight"][0]
    for part in ("encoder", "decoder"):
        found[f"{part}_layers"] = count_layers(state, f"transformer.{part}")
    for key in ("query_embed.weight", "transformer.tgt_embed.weight"):
        if key in shapes:
            found["num_queries"] = shapes[key][0]
    if family == "h_detr":
        hybrid = found["num_queries"] > ONE_TO_MANY_QUERIES
        found["num_queries_one2many"] = ONE_TO_MANY_QUERIES if hybrid else 0
        found["num_queries"] -= found["num_queries_one2many"]
    return family, found


def detr_family(state: dict) -> str:
    """The family of a file in the names of DETR's code base. UserError when it is none of them."""
    attention = "transformer.decoder.layers.0.multihead_attn.in_proj_weight"
    if attention in state and "class_embed.weight" in state:
        return "detr"
    if "transformer.level_embed" not in state or "class_embed.0.weight" not in state:
        raise UserError(f"expected weights of one of {', '.join(FAMILIES)}, or of transformers' "
                        f"DETR or Deformable DETR; got names such as {', '.join(list(state)[:3])}: "
                        "give a checkpoint of these models")
    if "label_enc.weight" in state:
        return "dino"
    if "transformer.enc_output.weight" in state:
        return "h_detr" if "query_embed.weight" in state else "deformable_detr_two_stage"
    if "transformer.decoder.bbox_embed.0.layers.0.weight" in state:
        return "deformable_detr_refine"
    return "deformable_detr"


def jitter_of(meta: dict, path: str | Path, found: dict) -> dict:
    """Recipe fields of a detector for which padding is image (large-scale jitter), else {}.

    The saved config tells, or the name of the file. The side of its squares is in the config, else
    the published one. found: what `recognize` returned.
    """
    text = str(meta.get("config", ""))
    if not re.search(r"with_attn_mask\s*=\s*False", text) and "_lsj_" not in Path(path).name:
        return {}
    published = 1280 if found.get("backbone") == "swin_l" else 1024
    size = found.get("lsj_size", published)      # of the detectors on LVIS that shapes tell apart
    side = re.search(r"image_size\s*=\s*\(\s*(\d+)", text)
    if side:
        size = int(side.group(1))
    print(f"{path}: trained with large-scale jitter; images fill squares of {size} px")
    return {"augment": "lsj", "lsj_size": size}


def is_dc5(family: str, path: str | Path) -> bool:
    """Whether a file is a released DETR-DC5, which only its name shows."""
    return family == "detr" and "dc5" in Path(path).name.lower()


def recognize_co_detr(state: dict) -> tuple[str, dict]:
    """`recognize` for Co-DETR, which is written in mmdetection."""
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    has_labels = "query_head.label_embedding.weight" in state
    family = "co_dino" if has_labels else "co_deformable"
    found = recognize_backbone(state)
    found["num_feature_levels"], found["dim"] = shapes[CO_DETR_HEAD + "level_embeds"]
    found["ffn_dim"] = shapes[CO_DETR_HEAD + "encoder.layers.0.ffns.0.layers.0.0.weight"][0]
    for part in ("encoder", "decoder"):
        found[f"{part}_layers"] = count_layers(state, part)
    queries = "query_head.query_embedding.weight"
    if has_labels:
        queries = CO_DETR_HEAD + "query_embed.weight"
    found["num_queries"] = shapes[queries][0]
    classes = shapes["query_head.cls_branches.0.weight"][0]
    has_tables = any(key.endswith("rope.freqs_cos") for key in state)
    if found.get("backbone") == "vit_l" and classes == LVIS_CLASSES and not has_tables:
        found["backbone"] = "vit_l_window16"   # as in all released LVIS detectors
    if any(key.endswith("fed_loss_weight") for key in state):
        found["fed_loss"] = 50
    roi = "roi_head.0.bbox_head."
    if roi + "shared_fcs.0.weight" in shapes:
        found["roi_dim"] = shapes[roi + "shared_fcs.0.weight"][0]
        found["roi_sigmoid"] = shapes[roi + "fc_cls.weight"][0] == classes
        found["roi_convs"] = sum(bool(re.match(re.escape(roi) + r"shared_convs\.\d+\.conv\.", key))
                                 for key in shapes)
    else:
        found["aux_heads"] = "none"
    return family, FAMILIES[family].overrides | co_detr_variant(family, found) | found


def co_detr_variant(family: str, found: dict) -> dict:
    """Config fields that no shape shows: image sizes and the number of detections."""
    names = {("vit_l", 1500): "vit_l", ("vit_l_window16", 900): "lsj_vit_l_lvis"}
    name = names.get((found.get("backbone"), found["num_queries"]))
    if (family, found.get("backbone"), found["num_queries"]) == ("co_deformable", "swin_l", 900):
        name = "co_deformable_swin_l_900q"
    if found.get("backbone") == "swin_l" and found.get("roi_sigmoid"):
        name = "lsj_swin_l_o365_lvis"
    return importlib.import_module("co_detr").VARIANTS.get(name, {})


def without_training_heads(state: dict, path: str | Path) -> dict:
    """A Co-DETR file without the parts of its training that are not built here.

    A mask branch of the second stage is left out. Where the second stage itself is another one
    (a cascade, or missing), all auxiliary heads are: at test time the detector does not need them.
    """
    other_stage = "roi_head.0.bbox_head.shared_fcs.0.weight" not in state
    prefixes = ("roi_head.0.mask_", "roi_head.0.semantic_", "roi_head.0.glbctx_")
    if other_stage:
        prefixes = ("roi_head.", "rpn_head.", "bbox_head.", "query_head.downsample.",
                    CO_DETR_HEAD + "aux_pos_trans", CO_DETR_HEAD + "pos_feats",
                    CO_DETR_HEAD + "head_pos_embed")
    kept = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    if len(kept) < len(state):
        what = "auxiliary heads" if other_stage else "mask branch"
        print(f"{path}: its {what} ({len(state) - len(kept)} tensors) are left out, the detector "
              "does not need them")
    return kept


def recognize_backbone(state: dict) -> dict:
    """{"backbone": name} of the backbone in a released state dict; {} when it has none."""
    theirs = {re.sub(r"^backbone\.(0\.)?(body\.)?", "", key): value
              for key, value in state.items() if key.startswith("backbone.")}
    shapes = backbone_shapes(drop_derived_buffers(theirs))
    if not shapes:
        return {}
    fitting = [name for name in BACKBONES if published_shapes(name) == shapes]
    for name in fitting:
        if has_windows(name, theirs):
            return {"backbone": name}
    if fitting:
        ours = " or ".join(describe_windows(windows_of(name)) for name in fitting)
        got = describe_windows(saved_windows(theirs))
        raise UserError(f"expected a {fitting[0]} with windows of {ours}, as in Co-DETR's COCO and "
                        f"LVIS detectors, got windows of {got}: this detector is not built here")
    raise UserError(f"expected a backbone among {', '.join(BACKBONES)}, got another one, with "
                    f"tensors such as {', '.join(list(shapes)[:3])}: this file cannot represent it")


def backbone_shapes(state: dict) -> dict:
    """{name: shape} of what all detectors on one backbone share: no output norms, no pyramid."""
    return {key: tuple(value.shape) for key, value in state.items()
            if not re.match(r"norm\d\.|neck\.", key)}


@functools.cache
def published_shapes(name: str) -> dict:
    with torch.device("meta"):
        return backbone_shapes(build_backbone(name, "imagenet").state_dict())


def saved_windows(state: dict) -> dict:
    """{block: window size} of a released ViT, from the rotary tables that its window blocks save.

    Window size and the choice of global blocks are in no learned tensor. A table is (window^2, head
    width).
    """
    pattern = re.compile(r"blocks\.(\d+)\.attn\.rope\.freqs_cos")
    return {int(match.group(1)): math.isqrt(len(state[match.group()]))
            for match in map(pattern.fullmatch, state) if match}


@functools.cache
def windows_of(name: str) -> dict:
    """{block: window size} of our ViT of that name."""
    with torch.device("meta"):
        blocks = build_backbone(name, "imagenet").blocks
    return {i: block.window for i, block in enumerate(blocks) if block.window}


def has_windows(name: str, state: dict) -> bool:
    """Whether a backbone is no ViT, or one with the windows that the file shows, if it shows any.
    """
    saved = saved_windows(state)
    return not name.startswith("vit") or not saved or saved == windows_of(name)


def describe_windows(windows: dict) -> str:
    sizes = "/".join(map(str, sorted(set(windows.values()))))
    return f"{sizes} in blocks {','.join(map(str, sorted(windows)[:4]))},..."


# ---- converting ---------------------------------------------------------------------------------

def convert(state: dict, path: str | Path, variant: str = "") -> dict:
    """Turn what was read from a released file into a checkpoint of ours.

    Args:
        state: the file's dictionary: weights under `model` or `state_dict`, or a bare state dict.
        path: where it was read; `config.json` beside it is read for `transformers`' weights.
        variant: one of the paper file's VARIANTS, for what neither weights nor options tell.

    The DETR family has 91 COCO columns, Co-DETR 80 classes, unless the file names other classes.
    Raises UserError for weights of a model that is not built here.
    """
    weights, options, meta = parts_of_file(state, path)
    source = "released"
    if "model.level_embed" in weights or "class_labels_classifier.weight" in weights:
        source = "transformers'"
        weights = from_transformers(weights)
        options = transformers_options(path)
    check_options(options, path)

    try:
        family, found = recognize(weights)
        if FAMILIES[family].model_name == "co_detr":
            weights = without_training_heads(weights, path)
            found |= jitter_of(meta, path, found)
        weights = from_authors(weights, family)
    except (KeyError, IndexError) as error:   # names and shapes of tensors
        raise UserError(f"{path}: expected all tensors of a released model, got none or another "
                        f"shape for {error}: give the file as it was released") from error
    paper = importlib.import_module(FAMILIES[family].model_name)
    if variant not in ("", *paper.VARIANTS):
        raise UserError(f"expected --variant to be one of {', '.join(paper.VARIANTS)}, "
                        f"got {variant!r}")
    config = complete_config(found, options, paper, variant)
    if is_dc5(family, path) and not variant and "dilation" not in config:
        config["dilation"] = True
        print(f"{path}: its name says DC5, so the last stage keeps stride 16")

    columns = count_classes(weights)
    labels = options.get("id2label", dict(enumerate(meta.get("CLASSES", ()))))
    names = name_columns(columns, labels)
    check_shapes(weights, paper, config, columns, path)
    print(f"{path}: recognized as {source} {family}, {len(weights)} tensors, "
          f"{columns} class columns")
    return {
        "format": FORMAT, "model_name": paper.__name__, "variant": "", "config": config,
        "class_names": names,
        "category_ids": COCO_IDS if names == COCO_NAMES else list(range(columns)),
        "model": weights, "epoch": 0, "step": 0}


def parts_of_file(state: dict, path: str | Path) -> tuple[dict, dict, dict]:
    """Weights, options and `meta` of a released file. UserError for parts of another type."""
    weights = state.get("model", state.get("state_dict", state))
    check_types(weights, path)
    options = state.get("args", {})
    options = getattr(options, "__dict__", options)     # of a Namespace
    meta = state.get("meta", {})
    for name, part in (("args", options), ("meta", meta)):
        if not isinstance(part, dict):
            raise UserError(f"{path}: expected {name} to be a dictionary, got "
                            f"{type(part).__name__}: give the file as it was released")
    return weights, options, meta


def complete_config(found: dict, options: dict, paper, variant: str) -> dict:
    """Config fields of a released file: those of the variant, replaced by what its tensors show
    (`found`), replaced by the options saved beside them."""
    known = OPTIONS | (TWO_STAGE_OPTIONS if found.get("two_stage") else {})
    fields = {field.name for field in dataclasses.fields(paper.Config)}
    saved = {ours: options[theirs] for theirs, ours in known.items()
             if theirs in options and ours in fields}
    chosen = paper.VARIANTS.get(variant, {})
    config = {**chosen, **found, **saved, "backbone_weights": "imagenet"}
    if config.get("backbone") in AMBIGUOUS_BACKBONES and "backbone" in chosen:
        config["backbone"] = chosen["backbone"]
    return config


def check_types(weights, path: str | Path) -> None:
    """UserError unless this is a dictionary of tensors."""
    if not isinstance(weights, dict):
        raise UserError(f"{path}: expected weights under 'model', got {type(weights).__name__}: "
                        "give the file as it was released")
    for name, value in weights.items():
        if not isinstance(name, str) or not torch.is_tensor(value):
            raise UserError(f"{path}: expected tensors by name, got {type(value).__name__} as "
                            f"{one_line(name, 80)}: give the file as it was released")


def transformers_options(path: str | Path) -> dict:
    """Options of the config.json beside `transformers`' weights; {} where there is none."""
    beside = Path(path).with_name("config.json")
    if not beside.is_file():
        return {}
    try:
        options = json.loads(beside.read_bytes())
    except ValueError as error:
        raise UserError(f"expected {beside} to be a json file, got {error}: copy it "
                        "again") from error
    if not isinstance(options, dict):
        raise UserError(f"expected {beside} to hold a dictionary, got {type(options).__name__}: "
                        "copy it again")
    # Without timm, transformers ignores the option.
    if not options.get("use_timm_backbone", True):
        options.pop("dilation", None)
    return options


def check_options(options: dict, path: str | Path) -> None:
    """Raise UserError for options that change the model in a way that `Config` cannot express."""
    for name, value in REQUIRED_OPTIONS.items():
        if options.get(name, value) != value:
            raise UserError(f"{path}: expected {name} {value!r}, got {options[name]!r}: this model "
                            "is not built here")
    for first, second in EQUAL_OPTIONS:
        if first in options and options.get(second, options[first]) != options[first]:
            raise UserError(f"{path}: expected {first} equal to {second}, got {options[first]} and "
                            f"{options[second]}: this model is not built here")


def check_shapes(weights: dict, paper, config: dict, num_classes: int, path: str | Path) -> None:
    """Raise UserError unless the model of `config` has exactly these names and shapes."""
    cfg, _ = configure(paper, config)
    check_ranges(cfg)
    with torch.device("meta"):
        model, _ = paper.build(cfg, num_classes)
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in weights.items()}
    wrong = [key for key in [*ours, *theirs] if ours.get(key) != theirs.get(key)]
    if not wrong:
        return
    key = wrong[0]
    hint = "give the file as it was released"
    if "sampling_offsets" in key or "attention_weights" in key:
        hint = ("the number of heads and points is not in the weights: put the config.json of the "
                "model beside the file, or give a file with its options")
    raise UserError(f"{path}: expected {key} {ours.get(key, 'not to be there')}, got "
                    f"{theirs.get(key, 'nothing')} ({len(set(wrong))} tensors do not fit): {hint}")


def name_columns(columns: int, labels: dict) -> list[str]:
    """Class names of a released head: `labels` {column: name} where the file has them, else COCO's.
    """
    if columns == 91 and (not labels or set(COCO_NAMES) <= set(labels.values())):
        return coco_columns()
    names = dict(enumerate(COCO_NAMES)) if columns == 80 else {}
    names |= {int(column): name for column, name in labels.items()}
    return [names.get(i, name) for i, name in enumerate(numbered_names(columns))]
