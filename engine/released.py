"""..."""
import dataclasses
import functools
import importlib
import json
import re
from pathlib import Path
from typing import NamedTuple
import torch
from torch import Tensor
from engine.errors import UserError
from backbones import BACKBONES, build_backbone, drop_derived_buffers
from engine.checkpoints import FORMAT
from engine.class_rows import COCO_IDS, COCO_NAMES, coco_columns, wrapped

class Family(NamedTuple):
    """One kind of released checkpoint: our paper file and Config overrides; whether all decoder layers share one class
    head and one box head; which heads the authors save a second time under `transformer.decoder.`"""
    model_name: str
    overrides: dict
    tied: bool
    duplicated: tuple = ()
FAMILIES = {   # no list of released names was seen of DINO on Swin and FocalNet and of H-DETR on Swin: unverified
    "deformable_detr": Family("deformable_detr", {}, True),   # single-scale too; DC5 has the same names: --dilation
    "deformable_detr_refine": Family("deformable_detr", {"with_box_refine": True}, False, ("bbox_embed",)),
    "deformable_detr_two_stage": Family("deformable_detr", {"with_box_refine": True, "two_stage": True}, False,
                                        ("bbox_embed", "class_embed")),
    "dino": Family("dino", {}, True, ("bbox_embed", "class_embed")),   # 4-scale and 5-scale
    "h_detr": Family("h_detr", {}, False, ("bbox_embed", "class_embed")),
    "co_dino": Family("co_detr", {}, False),
    "co_deformable": Family("co_detr", {"base": "h_detr", "quality_focal": False, "soft_nms": 0.0, "loss_class": 2.0,
                                        "top_k": 100}, False),
}
RENAMED = {"backbone.0.body.": "backbone.", "backbone.0.": "backbone.",   # prefix: theirs -> ours
           "transformer.encoder.layers.": "encoder.",
           "transformer.decoder.layers.": "decoder.", "transformer.decoder.norm.": "decoder_norm.",
           "transformer.decoder.ref_point_head.": "ref_point_head.", "transformer.": ""}
HEAD = "query_head.transformer."
CO_DETR = {   # theirs -> ours; * is a number that stays, LAST the coarsest level, ENC the number of decoder layers
    "neck.p": "detector.backbone.neck.p", "backbone.": "detector.backbone.",
    "neck.extra_convs.0.conv.": "detector.input_proj.LAST.0.", "neck.extra_convs.0.gn.": "detector.input_proj.LAST.1.",
    "neck.convs.*.conv.": "detector.input_proj.*.0.", "neck.convs.*.gn.": "detector.input_proj.*.1.",
    HEAD + "encoder.layers.*.attentions.0.": "detector.encoder.*.self_attn.",
    HEAD + "decoder.layers.*.attentions.0.attn.": "detector.decoder.*.self_attn.",
    HEAD + "decoder.layers.*.attentions.1.": "detector.decoder.*.cross_attn.",
    **{HEAD + f"{part}coder.layers.*.ffns.0.layers.{theirs}.": f"detector.{part}coder.*.{ours}."
       for part in ("en", "de") for theirs, ours in (("0.0", "linear1"), ("1", "linear2"))},
    **{HEAD + f"{part}coder.layers.*.norms.{i}.": f"detector.{part}coder.*.norm{norm}."
       for part, norms in (("en", (1, 2)), ("de", (2, 1, 3))) for i, norm in enumerate(norms)},
    HEAD + "decoder.ref_point_head.0.": "detector.ref_point_head.layers.0.",
    HEAD + "decoder.ref_point_head.2.": "detector.ref_point_head.layers.1.",
    HEAD + "decoder.norm.": "detector.decoder_norm.",
    HEAD + "level_embeds": "detector.level_embed",
    HEAD + "enc_output": "detector.enc_output", HEAD + "pos_trans": "detector.pos_trans",
    HEAD + "query_embed.": "detector.tgt_embed.", "query_head.query_embedding.": "detector.query_embed.",
    "query_head.label_embedding.": "detector.label_enc.",
    "query_head.cls_branches.ENC.": "detector.enc_out_class_embed.",   # of Co-DINO
    **{f"query_head.reg_branches.ENC.{2 * i}.": f"detector.enc_out_bbox_embed.layers.{i}." for i in range(3)},
    "query_head.cls_branches.*.": "detector.class_embed.*.",
    **{f"query_head.reg_branches.*.{2 * i}.": f"detector.bbox_embed.*.layers.{i}." for i in range(3)},
    **{HEAD + f"{theirs}.{i}.": f"aux_queries.{head}.{ours}." for i, head in enumerate(("rcnn", "atss")) for theirs, ours in
       (("aux_pos_trans", "pos_trans"), ("aux_pos_trans_norm", "pos_norm"), ("pos_feats_trans", "feat_trans"),
        ("pos_feats_norm", "feat_norm"))},
    HEAD + "head_pos_embed.": "head_embed.", "query_head.downsample.": "downsample.",
    **{f"rpn_head.rpn_{part}.": f"rpn.{part}." for part in ("conv", "cls", "reg")},
    "roi_head.0.bbox_head.shared_fcs.0.": "roi.fc1.", "roi_head.0.bbox_head.shared_fcs.1.": "roi.fc2.",
    "roi_head.0.bbox_head.shared_convs.*.conv.": "roi.convs.*.0.", "roi_head.0.bbox_head.shared_convs.*.gn.": "roi.convs.*.1.",
    "roi_head.0.bbox_head.fc_cls.": "roi.cls.", "roi_head.0.bbox_head.fc_reg.": "roi.reg.",
    **{f"bbox_head.0.{part}_convs.0.{theirs}.": f"atss.{part}_tower.{i}." for part in ("cls", "reg")
       for i, theirs in enumerate(("conv", "gn"))},
    **{f"bbox_head.0.atss_{part}.": f"atss.{part}." for part in ("cls", "reg", "centerness")},
    "bbox_head.0.scales.*.scale": "atss.scales.*",
}
SAME = ("input_proj.", "class_embed.", "bbox_embed.", "query_embed.", "label_enc.")   # prefixes that both use
ONE_TO_MANY = 1500   # H-DETR's table of queries holds both groups; every released one has this many one-to-many rows
OPTIONS = {   # options saved beside the weights, in `args` or in transformers' config.json: theirs -> Config field
    "nheads": "num_heads", "encoder_attention_heads": "num_heads", "enc_n_points": "num_points",
    "encoder_n_points": "num_points", "dilation": "dilation", "num_select": "top_k", "topk": "top_k",
    "num_queries_one2one": "num_queries", "num_queries_one2many": "num_queries_one2many"}
TWO_STAGE_OPTIONS = {"num_queries": "num_queries", "two_stage_num_proposals": "num_queries"}   # its weights have no query table
PROFILER = ("total_params", "total_ops")   # counters that a profiler left in some released files


def strip_profiler(state: dict) -> dict:
    return {key: value for key, value in state.items() if not key.endswith(PROFILER)}


def recognise(state: dict) -> tuple[str, dict]:
    """The family of a state dict in the authors' names and the Config overrides that its shapes show.

    -> (key of FAMILIES, {"num_queries": 900, ...}). ValueError when it is none of them. Two-stage Deformable DETR does
    not show its number of queries, and no family shows dilation or the number of heads and points.
    """
    if HEAD + "level_embeds" in state:
        return recognise_co_detr(state)
    if "transformer.level_embed" not in state or "class_embed.0.weight" not in state:
        raise UserError("expected weights of one of " + ", ".join(FAMILIES) + ", or of transformers' Deformable DETR; got "
                        "names such as " + ", ".join(list(state)[:3]) + ": give a checkpoint of these models")
    if "label_enc.weight" in state:
        family = "dino"
    elif "transformer.enc_output.weight" in state:
        family = "h_detr" if "query_embed.weight" in state else "deformable_detr_two_stage"
    else:
        refine = "transformer.decoder.bbox_embed.0.layers.0.weight" in state
        family = "deformable_detr_refine" if refine else "deformable_detr"
    shape = {key: tuple(value.shape) for key, value in state.items()}
    found = FAMILIES[family].overrides | recognise_backbone(state)
    found["num_feature_levels"], found["dim"] = shape["transformer.level_embed"]
    found["ffn_dim"] = shape["transformer.encoder.layers.0.linear1.weight"][0]
    for part in ("encoder", "decoder"):
        found[f"{part}_layers"] = sum(bool(re.fullmatch(rf"transformer\.{part}\.layers\.\d+\.norm1\.weight", key))
                                      for key in state)
    for key in ("query_embed.weight", "transformer.tgt_embed.weight"):
        if key in shape:
            found["num_queries"] = shape[key][0]
    if family == "h_detr":
        found["num_queries_one2many"] = ONE_TO_MANY if found["num_queries"] > ONE_TO_MANY else 0
        found["num_queries"] -= found["num_queries_one2many"]
    return family, found


def recognise_co_detr(state: dict) -> tuple[str, dict]:
    """`recognise` for Co-DETR, which was written in another framework."""
    shape = {key: tuple(value.shape) for key, value in state.items()}
    family = "co_dino" if "query_head.label_embedding.weight" in state else "co_deformable"
    found = recognise_backbone(state)
    found["num_feature_levels"], found["dim"] = shape[HEAD + "level_embeds"]
    found["ffn_dim"] = shape[HEAD + "encoder.layers.0.ffns.0.layers.0.0.weight"][0]
    for part in ("encoder", "decoder"):
        found[f"{part}_layers"] = count_layers(state, part)
    found["num_queries"] = shape[HEAD + "query_embed.weight" if family == "co_dino" else "query_head.query_embedding.weight"][0]
    if "roi_head.0.bbox_head.shared_fcs.0.weight" not in shape:
        raise UserError("expected a released Co-DETR file with its training heads, got one without roi_head.0: the detector "
                        "alone is not recognised; give the file as it was released")
    found["roi_dim"] = shape["roi_head.0.bbox_head.shared_fcs.0.weight"][0]
    found["roi_convs"] = sum(bool(re.match(r"roi_head\.0\.bbox_head\.shared_convs\.\d+\.conv\.", key)) for key in shape)
    variant = {("co_dino", "vit_l", 1500): "vit_l", ("co_deformable", "swin_l", 900): "co_deformable_swin_l_900q"}.get(
        (family, found.get("backbone"), found["num_queries"]))   # no shape shows the sizes of images and how many detections are kept
    variants = importlib.import_module("co_detr").VARIANTS
    return family, FAMILIES[family].overrides | variants.get(variant, {}) | found


def recognise_backbone(state: dict) -> dict:
    """{"backbone": name} of the backbone in a state dict, in DINO's, H-DETR's or Co-DETR's names; {} when it has none."""
    theirs = backbone_shapes({re.sub(r"^backbone\.(0\.)?(body\.)?", "", key): value
                              for key, value in drop_derived_buffers(state).items() if key.startswith("backbone.")})
    if not theirs:
        return {}
    for name in BACKBONES:
        if published_shapes(name) == theirs:
            return {"backbone": name}
    raise UserError(f"expected a backbone among {', '.join(BACKBONES)}, got another one, with tensors such as "
                    f"{', '.join(list(theirs)[:3])}: this file cannot represent it")


def backbone_shapes(state: dict) -> dict:
    """{name: shape} of what all detectors on the same backbone have in common: neither output norms nor pyramid."""
    return {key: tuple(value.shape) for key, value in state.items() if not re.match(r"norm\d\.|neck\.", key)}


@functools.cache
def published_shapes(name: str) -> dict:
    with torch.device("meta"):
        return backbone_shapes(build_backbone(name, "imagenet").state_dict())


def count_layers(state: dict, part: str) -> int:
    """Layers of the `encoder` or `decoder`, in Co-DETR's or our names."""
    return 1 + max(int(match.group(1)) for match in (re.search(rf"\b{part}\.(?:layers\.)?(\d+)\.", key) for key in state)
                   if match)


def translate(state: dict, back: bool = False) -> dict:
    """Co-DETR's names -> ours, or back. Raw weights beside averaged ones (`ema_`) are left out: nothing here reads them."""
    levels = next(len(value) for key, value in state.items() if key.endswith(("level_embeds", "level_embed")))
    numbers = {"LAST": str(levels - 1), "ENC": str(count_layers(state, "decoder"))}
    table = []
    for theirs, ours in CO_DETR.items():
        if "ENC" in theirs and not any(key.endswith(("label_embedding.weight", "label_enc.weight")) for key in state):
            continue   # Co-Deformable-DETR's last head has a number in both
        for word, number in numbers.items():
            theirs, ours = theirs.replace(word, number), ours.replace(word, number)
        old, new = (ours, theirs) if back else (theirs, ours)
        table.append((re.compile(re.escape(old).replace(r"\*", r"(\d+)")), new.replace("*", r"\1")))
    result = {}
    for key, value in state.items():
        if key.startswith("ema_"):
            continue
        pattern, new = next((row for row in table if row[0].match(key)), (None, None))
        if pattern is None:
            raise UserError(f"expected the names of Co-DETR, got {key}, which has no place in our model")
        result[pattern.sub(new, key, count=1)] = value
    return result


def from_authors(state: dict, family: str) -> dict:
    """Authors' names -> ours; second copies of the heads are compared and dropped. ValueError when copies that must be
    equal are not, or tied heads differ. What `backbones.drop_derived_buffers` drops is not in the result, nor does `to_authors` make it."""
    state, kind = drop_derived_buffers(strip_profiler(state)), FAMILIES[family]
    if kind.model_name == "co_detr":
        return translate(state)
    ours = {}
    for key, value in state.items():
        copy = re.fullmatch(r"transformer\.decoder\.((class_embed|bbox_embed)\..*)", key)
        if copy and copy.group(2) in kind.duplicated:
            check_equal(key, value, copy.group(1), state)
        else:
            ours[rename(key, RENAMED)] = value
        head = re.match(r"(class_embed|bbox_embed)\.\d+\.", key)
        if kind.tied and head:
            check_equal(key, value, f"{head.group(1)}.0.{key[head.end():]}", state)
    return ours


def check_equal(key: str, value: Tensor, other: str, state: dict) -> None:
    if other not in state or state[other].shape != value.shape or not (value.is_meta or torch.equal(value, state[other])):
        raise UserError(f"expected {key} to equal {other} (one tensor under two names), got different ones: these "
                        "weights come from a changed model that this file cannot represent")


def rename(key: str, prefixes: dict) -> str:
    """Replaces the first prefix of the table that `key` starts with."""
    for old, new in prefixes.items():
        if key.startswith(old):
            return new + key[len(old):]
    return key


def to_authors(state: dict, family: str) -> dict:
    """Our names -> the authors', with every second copy they save: the inverse of `from_authors`."""
    if FAMILIES[family].model_name == "co_detr":
        return translate(state, back=True)
    theirs = {ours: old for old, ours in RENAMED.items()}
    if family != "dino" or "backbone.patch_embed.proj.weight" not in state:
        theirs["backbone."] = "backbone.0.body."
    authors = {}
    for key, value in state.items():
        authors[key if key.startswith(SAME) else rename(key, theirs)] = value
        if key.startswith(tuple(f"{head}." for head in FAMILIES[family].duplicated)):
            authors["transformer.decoder." + key] = value
    return authors
TRANSFORMERS = (   # pattern: replacement, applied in this order to the names that `transformers` uses, old and new
    (r"^model\.", ""), (r"^backbone\.(conv_encoder\.)?model\.", "backbone."),
    (r"embedder\.embedder\.convolution", "conv1"), (r"embedder\.embedder\.normalization", "bn1"),
    (r"encoder\.stages\.(\d)\.layers\.", lambda m: f"layer{int(m[1]) + 1}."),
    (r"shortcut\.convolution", "downsample.0"), (r"shortcut\.normalization", "downsample.1"),
    (r"layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}"),
    (r"layer\.(\d)\.normalization", lambda m: f"bn{int(m[1]) + 1}"),
    (r"^(encoder|decoder)\.layers\.", r"\1."),
    (r"^(encoder\.\d+)\.self_attn_layer_norm", r"\1.norm1"), (r"^(encoder\.\d+)\.final_layer_norm", r"\1.norm2"),
    (r"^(decoder\.\d+)\.self_attn_layer_norm", r"\1.norm2"), (r"encoder_attn_layer_norm", "norm1"),
    (r"^(decoder\.\d+)\.final_layer_norm", r"\1.norm3"), (r"encoder_attn", "cross_attn"),
    (r"(mlp\.)?fc([12])\.", r"linear\2."), (r"self_attn\.o_proj", "self_attn.out_proj"),
    (r"^query_position_embeddings", "query_embed"), (r"^decoder\.((class|bbox)_embed\.)", r"\1"),
)


def from_transformers(state: dict) -> dict:
    """Names of `transformers`' DeformableDetrForObjectDetection -> the authors'. Query, key and value projections, which it
    keeps apart, become one matrix; of heads that are one tensor it saves the first. ValueError when two copies differ."""
    ours = {}
    refine = any("decoder.bbox_embed." in key for key in state)
    for key, value in state.items():
        for pattern, replacement in TRANSFORMERS:
            key = re.sub(pattern, replacement, key)
        if key in ours:
            check_equal(key, value, key, ours)
        ours[key] = value
    layers = count_layers(ours, "decoder")
    for i in range(layers):
        for kind in ("weight", "bias"):
            parts = [ours.pop(f"decoder.{i}.self_attn.{name}_proj.{kind}") for name in "qkv"]
            ours[f"decoder.{i}.self_attn.in_proj_{kind}"] = torch.cat(parts)
    two_stage = "enc_output.weight" in ours
    for key in [key for key in ours if re.match(r"(class|bbox)_embed\.0\.", key)]:
        for i in range(1, layers + two_stage):
            ours.setdefault(key.replace(".0.", f".{i}.", 1), ours[key])
    return to_authors(ours, "deformable_detr" + ("_two_stage" if two_stage else "_refine" if refine else ""))


def released(state: dict, path: str | Path, variant: str = "") -> dict:
    """A released file (its `model` or `state_dict` entry, or a bare state dict) as a checkpoint of ours, with the 91 COCO
    columns of the DETR family or the 80 classes of Co-DETR, unless the file names other classes. What no tensor shows
    comes from the options in the file, or in the config.json beside `transformers`' weights."""
    weights, options, source = state.get("model", state.get("state_dict", state)), state.get("args", {}), "released"
    if not isinstance(weights, dict):
        raise UserError(f"{path}: expected weights under 'model', got {type(weights).__name__}")
    if "model.level_embed" in weights:
        weights, source, beside = from_transformers(weights), "transformers'", Path(path).with_name("config.json")
        options = json.loads(beside.read_text()) if beside.is_file() else {}
    options = getattr(options, "__dict__", options)
    family, overrides = recognise(weights)
    weights = from_authors(weights, family)
    paper = importlib.import_module(FAMILIES[family].model_name)
    if variant not in ("", *paper.VARIANTS):
        raise UserError(f"expected --variant to be one of {', '.join(paper.VARIANTS)}, got {variant!r}")
    known = OPTIONS | (TWO_STAGE_OPTIONS if overrides.get("two_stage") else {})
    fields = {field.name for field in dataclasses.fields(paper.Config)}
    overrides |= {ours: options[theirs] for theirs, ours in known.items() if theirs in options and ours in fields}
    columns = len(weights[wrapped(weights) + "class_embed.0.weight"])
    names = name_columns(columns, options.get("id2label", dict(enumerate(state.get("meta", {}).get("CLASSES", ())))))
    print(f"{path}: recognised as {source} {family}, {len(weights)} tensors, {columns} class columns")
    return {"format": FORMAT, "model_name": paper.__name__, "variant": "",
            "config": {**paper.VARIANTS.get(variant, {}), **overrides, "backbone_weights": "imagenet"}, "class_names": names,
            "category_ids": COCO_IDS if names == COCO_NAMES else list(range(columns)), "model": weights, "epoch": 0, "step": 0}


def name_columns(columns: int, labels: dict) -> list[str]:
    """Class names of a released head: `labels` {column: name}, as far as the file has them, else COCO's."""
    if columns == 91 and (not labels or set(COCO_NAMES) <= set(labels.values())):
        return coco_columns()
    known = dict(enumerate(COCO_NAMES)) if columns == 80 else {}
    known |= {int(column): name for column, name in labels.items()}
    return [known.get(i, f"class {i}") for i in range(columns)]
