"""Tensor names of the authors' released weights and of `transformers`, translated to ours and back.

    from_authors, to_authors     names of the authors <-> ours, for every family of FAMILIES
    from_transformers            `transformers`' DETR, Deformable DETR -> names of DETR's code base

No value changes on the way: a round trip returns every tensor bit by bit.
"""
import re
from typing import NamedTuple

import torch
from torch import Tensor

from backbones import drop_derived_buffers
from engine.errors import UserError


class Family(NamedTuple):
    """One kind of released checkpoint."""
    model_name: str            # our paper file
    overrides: dict            # its Config fields that differ from the defaults
    tied: bool                 # all decoder layers share one class head and one box head
    duplicated: tuple = ()     # heads that are saved a second time under `transformer.decoder.`


# No list of names was seen for DINO on Swin and FocalNet and for H-DETR on Swin: unverified.
FAMILIES = {
    # R50 and R101. DC5 has the same names and shapes: see `released.is_dc5`.
    "detr": Family("detr", {}, tied=False),
    # Single-scale too. DC5 has the same names and shapes: --dilation.
    "deformable_detr": Family("deformable_detr", {}, tied=True),
    "deformable_detr_refine": Family(
        "deformable_detr", {"with_box_refine": True}, tied=False, duplicated=("bbox_embed",)),
    "deformable_detr_two_stage": Family(
        "deformable_detr", {"with_box_refine": True, "two_stage": True}, tied=False,
        duplicated=("bbox_embed", "class_embed")),
    # 4-scale and 5-scale.
    "dino": Family("dino", {}, tied=True, duplicated=("bbox_embed", "class_embed")),
    "h_detr": Family("h_detr", {}, tied=False, duplicated=("bbox_embed", "class_embed")),
    "co_dino": Family("co_detr", {}, tied=False),
    "co_deformable": Family(
        "co_detr",
        {"base": "h_detr", "quality_focal": False, "soft_nms": 0.0, "loss_class": 2.0,
         "top_k": 100},
        tied=False),
}


def from_authors(state: dict, family: str) -> dict:
    """Rename a state dict of the authors to our names.

    Second copies of a head are compared with the first and dropped. Counters and tables that follow
    from the shapes are dropped as well (`backbones.drop_derived_buffers`); `to_authors` does not
    restore them.
    Raises UserError when two copies that must be equal differ, or when tied heads differ.
    """
    state = drop_derived_buffers(drop_profiler_counters(state))
    kind = FAMILIES[family]
    if kind.model_name == "co_detr":
        return translate_co_detr(state)
    ours = {}
    for key, value in state.items():
        copy = re.fullmatch(r"transformer\.decoder\.((class_embed|bbox_embed)\..*)", key)
        if copy and copy.group(2) in kind.duplicated:
            check_equal(key, value, copy.group(1), state)
        else:
            renamed = replace_prefix(key, DETR_PREFIXES)
            ours[renamed.replace(".multihead_attn.", ".cross_attn.")] = value
        head = re.match(r"(class_embed|bbox_embed)\.\d+\.", key)
        if kind.tied and head:
            check_equal(key, value, f"{head.group(1)}.0.{key[head.end():]}", state)
    return ours


def to_authors(state: dict, family: str) -> dict:
    """Rename a state dict of ours to the authors' names, second copies included.

    The inverse of `from_authors`.
    """
    if FAMILIES[family].model_name == "co_detr":
        return translate_co_detr(state, back=True)
    prefixes = {ours: theirs for theirs, ours in DETR_PREFIXES.items()}
    # DINO's Swin and FocalNet lie directly under `backbone.0.`; every other backbone has a `body`.
    if family != "dino" or "backbone.patch_embed.proj.weight" not in state:
        prefixes["backbone."] = "backbone.0.body."
    duplicated = tuple(f"{head}." for head in FAMILIES[family].duplicated)
    authors = {}
    for key, value in state.items():
        theirs = key if key.startswith(SAME_PREFIXES) else replace_prefix(key, prefixes)
        if family == "detr":
            theirs = theirs.replace(".cross_attn.", ".multihead_attn.")
        authors[theirs] = value
        if key.startswith(duplicated):
            authors["transformer.decoder." + key] = value
    return authors


def check_equal(key: str, value: Tensor, other: str, state: dict) -> None:
    """Raise UserError unless `state[other]` exists and equals `value`."""
    same = other in state and state[other].shape == value.shape
    if same and not value.is_meta:
        same = torch.equal(value, state[other])
    if not same:
        raise UserError(f"expected {key} to equal {other} (one tensor under two names), got "
                        "different values: these weights come from a changed model that this file "
                        "cannot represent")


def drop_profiler_counters(state: dict) -> dict:
    """Leave out the counters that a profiler left in some released files."""
    return {key: value for key, value in state.items()
            if not key.endswith(("total_params", "total_ops"))}


# ---- DETR's code base ---------------------------------------------------------------------------

DETR_PREFIXES = {   # theirs -> ours; the first prefix that fits is replaced
    "backbone.0.body.": "backbone.",
    "backbone.0.": "backbone.",
    "transformer.encoder.layers.": "encoder.",
    "transformer.decoder.layers.": "decoder.",
    "transformer.decoder.norm.": "decoder_norm.",
    "transformer.decoder.ref_point_head.": "ref_point_head.",
    "transformer.": "",
}
SAME_PREFIXES = ("input_proj.", "class_embed.", "bbox_embed.", "query_embed.", "label_enc.")


def replace_prefix(key: str, prefixes: dict) -> str:
    """Replace the first prefix of the table that `key` starts with."""
    for old, new in prefixes.items():
        if key.startswith(old):
            return new + key[len(old):]
    return key


# ---- Co-DETR's code base (mmdetection) ----------------------------------------------------------

CO_DETR_HEAD = "query_head.transformer."


def box_head_prefixes(theirs: str, ours: str) -> dict[str, str]:
    """The three linear layers of a box head; between theirs lie activations, which count too."""
    return {f"{theirs}{2 * i}.": f"{ours}layers.{i}." for i in range(3)}


def co_detr_prefixes() -> dict[str, str]:
    """Prefixes of Co-DETR's names -> ours.

    `*` stands for a number that stays, LAST for the coarsest level, ENC for the number of decoder
    layers.
    """
    table = {
        # Backbone and the projections to tokens.
        "neck.p": "detector.backbone.neck.p",
        "backbone.": "detector.backbone.",
        "neck.extra_convs.0.conv.": "detector.input_proj.LAST.0.",
        "neck.extra_convs.0.gn.": "detector.input_proj.LAST.1.",
        "neck.convs.*.conv.": "detector.input_proj.*.0.",
        "neck.convs.*.gn.": "detector.input_proj.*.1.",
        # Encoder and decoder.
        CO_DETR_HEAD + "encoder.layers.*.attentions.0.": "detector.encoder.*.self_attn.",
        CO_DETR_HEAD + "decoder.layers.*.attentions.0.attn.": "detector.decoder.*.self_attn.",
        CO_DETR_HEAD + "decoder.layers.*.attentions.1.": "detector.decoder.*.cross_attn.",
    }
    for part, norms in (("encoder", (1, 2)), ("decoder", (2, 1, 3))):
        theirs, ours = f"{CO_DETR_HEAD}{part}.layers.*.", f"detector.{part}.*."
        table[theirs + "ffns.0.layers.0.0."] = ours + "linear1."
        table[theirs + "ffns.0.layers.1."] = ours + "linear2."
        for i, norm in enumerate(norms):
            table[theirs + f"norms.{i}."] = ours + f"norm{norm}."
    table |= {
        CO_DETR_HEAD + "decoder.ref_point_head.0.": "detector.ref_point_head.layers.0.",
        CO_DETR_HEAD + "decoder.ref_point_head.2.": "detector.ref_point_head.layers.1.",
        CO_DETR_HEAD + "decoder.norm.": "detector.decoder_norm.",
        CO_DETR_HEAD + "level_embeds": "detector.level_embed",
        # Two-stage proposals and queries.
        CO_DETR_HEAD + "enc_output": "detector.enc_output",
        CO_DETR_HEAD + "pos_trans": "detector.pos_trans",
        CO_DETR_HEAD + "query_embed.": "detector.tgt_embed.",
        "query_head.query_embedding.": "detector.query_embed.",
        "query_head.label_embedding.": "detector.label_enc.",
        # Prediction heads; the encoder's have the number ENC in Co-DINO.
        "query_head.cls_branches.ENC.": "detector.enc_out_class_embed.",
    }
    table |= box_head_prefixes("query_head.reg_branches.ENC.", "detector.enc_out_bbox_embed.")
    table["query_head.cls_branches.*."] = "detector.class_embed.*."
    table |= box_head_prefixes("query_head.reg_branches.*.", "detector.bbox_embed.*.")
    # Customized positive queries.
    for i, head in enumerate(("rcnn", "atss")):
        for theirs, ours in (("aux_pos_trans", "pos_trans"), ("aux_pos_trans_norm", "pos_norm"),
                             ("pos_feats_trans", "feat_trans"), ("pos_feats_norm", "feat_norm")):
            table[f"{CO_DETR_HEAD}{theirs}.{i}."] = f"aux_queries.{head}.{ours}."
    table[CO_DETR_HEAD + "head_pos_embed."] = "head_embed."
    table["query_head.downsample."] = "downsample."
    # Auxiliary heads.
    for part in ("conv", "cls", "reg"):
        table[f"rpn_head.rpn_{part}."] = f"rpn.{part}."
    roi = "roi_head.0.bbox_head."
    table |= {
        roi + "shared_fcs.0.": "roi.fc1.",
        roi + "shared_fcs.1.": "roi.fc2.",
        roi + "shared_convs.*.conv.": "roi.convs.*.0.",
        roi + "shared_convs.*.gn.": "roi.convs.*.1.",
        roi + "fc_cls.": "roi.cls.",
        roi + "fc_reg.": "roi.reg.",
    }
    for part in ("cls", "reg"):
        table[f"bbox_head.0.{part}_convs.0.conv."] = f"atss.{part}_tower.0."
        table[f"bbox_head.0.{part}_convs.0.gn."] = f"atss.{part}_tower.1."
    for part in ("cls", "reg", "centerness"):
        table[f"bbox_head.0.atss_{part}."] = f"atss.{part}."
    table["bbox_head.0.scales.*.scale"] = "atss.scales.*"
    return table


CO_DETR_PREFIXES = co_detr_prefixes()


def count_layers(state: dict, part: str) -> int:
    """Number of layers of the `encoder` or `decoder`, in Co-DETR's or our names."""
    matches = (re.search(rf"\b{part}\.(?:layers\.)?(\d+)\.", key) for key in state)
    return 1 + max((int(match.group(1)) for match in matches if match), default=-1)


def co_detr_patterns(state: dict, back: bool) -> list[tuple[re.Pattern, str]]:
    """(pattern, replacement) for each prefix, with the numbers of levels and layers filled in."""
    levels = next(len(value) for key, value in state.items()
                  if key.endswith(("level_embeds", "level_embed")))
    has_labels = any(key.endswith(("label_embedding.weight", "label_enc.weight")) for key in state)
    numbers = {"LAST": str(levels - 1), "ENC": str(count_layers(state, "decoder"))}
    patterns = []
    for theirs, ours in CO_DETR_PREFIXES.items():
        # Co-Deformable-DETR's last head has a number in both code bases.
        if "ENC" in theirs and not has_labels:
            continue
        for word, number in numbers.items():
            theirs = theirs.replace(word, number)
            ours = ours.replace(word, number)
        old, new = (ours, theirs) if back else (theirs, ours)
        pattern = re.compile(re.escape(old).replace(r"\*", r"(\d+)"))
        patterns.append((pattern, new.replace("*", r"\1")))
    return patterns


def translate_co_detr(state: dict, back: bool = False) -> dict:
    """Rename Co-DETR's tensors to our names, or with `back` ours to theirs.

    Left out are raw weights that are saved beside averaged ones (`ema_...`) and class frequencies
    of the federated loss: nothing reads them.
    Raises UserError for a name without a place in our model.
    """
    patterns = co_detr_patterns(state, back)
    result = {}
    for key, value in state.items():
        if key.startswith("ema_") or key.endswith("fed_loss_weight"):
            continue
        for pattern, new in patterns:
            if pattern.match(key):
                result[pattern.sub(new, key, count=1)] = value
                break
        else:
            raise UserError(f"expected the names of Co-DETR, got {key}, which has no place in our "
                            "model: give a file as the authors released it")
    return result


# ---- transformers -------------------------------------------------------------------------------

# (pattern, replacement), applied in this order to the names that `transformers` uses, old and new.
TRANSFORMERS_PATTERNS = (
    (r"^model\.", ""),
    # Backbone: its stages count from 0, ours from 1, and so do its convolutions.
    (r"^backbone\.(conv_encoder\.)?model\.", "backbone."),
    (r"embedder\.embedder\.convolution", "conv1"),
    (r"embedder\.embedder\.normalization", "bn1"),
    (r"encoder\.stages\.(\d)\.layers\.", lambda match: f"layer{int(match[1]) + 1}."),
    (r"shortcut\.convolution", "downsample.0"),
    (r"shortcut\.normalization", "downsample.1"),
    (r"layer\.(\d)\.convolution", lambda match: f"conv{int(match[1]) + 1}"),
    (r"layer\.(\d)\.normalization", lambda match: f"bn{int(match[1]) + 1}"),
    # Encoder and decoder layers.
    (r"^(encoder|decoder)\.layers\.", r"\1."),
    (r"^(encoder\.\d+)\.self_attn_layer_norm", r"\1.norm1"),
    (r"^(encoder\.\d+)\.final_layer_norm", r"\1.norm2"),
    (r"^(decoder\.\d+)\.self_attn_layer_norm", r"\1.norm2"),
    (r"encoder_attn_layer_norm", "norm1"),
    (r"^(decoder\.\d+)\.final_layer_norm", r"\1.norm3"),
    (r"encoder_attn", "cross_attn"),
    (r"(mlp\.)?fc([12])\.", r"linear\2."),
    (r"_attn\.o_proj", "_attn.out_proj"),
    # Queries and heads.
    (r"^query_position_embeddings", "query_embed"),
    (r"^decoder\.((class|bbox)_embed\.)", r"\1"),
)
# Of its DETR, before the others.
TRANSFORMERS_DETR_PATTERNS = (
    (r"(decoder\.layers\.\d+)\.self_attn_layer_norm", r"\1.norm1"),
    (r"encoder_attn_layer_norm", "norm2"),
    (r"decoder\.layernorm", "decoder_norm"),
    (r"input_projection", "input_proj"),
    (r"class_labels_classifier", "class_embed"),
    (r"bbox_predictor", "bbox_embed"),
)


def from_transformers(state: dict) -> dict:
    """Rename `transformers`' DetrForObjectDetection or DeformableDetrForObjectDetection to the
    names of DETR's code base.

    It keeps query, key and value projections apart: they become one matrix. Of heads that are one
    tensor it saves only the first. Raises UserError when two copies differ, or when the weights
    belong to another model of `transformers`.
    """
    ours = {}
    is_detr = "class_labels_classifier.weight" in state
    patterns = TRANSFORMERS_PATTERNS
    if is_detr:
        patterns = TRANSFORMERS_DETR_PATTERNS + patterns
    for key, value in state.items():
        for pattern, replacement in patterns:
            key = re.sub(pattern, replacement, key)
        if key in ours:
            check_equal(key, value, key, ours)
        ours[key] = value
    layers = count_layers(ours, "decoder")
    if is_detr:
        for i in range(count_layers(ours, "encoder")):
            merge_projections(ours, f"encoder.{i}.self_attn")
        for i in range(layers):
            merge_projections(ours, f"decoder.{i}.cross_attn")
    for i in range(layers):
        merge_projections(ours, f"decoder.{i}.self_attn")
    if is_detr:
        return to_authors(ours, "detr")
    two_stage = "enc_output.weight" in ours
    refine = any("decoder.bbox_embed." in key for key in state)
    for key in [key for key in ours if re.match(r"(class|bbox)_embed\.0\.", key)]:
        for i in range(1, layers + two_stage):
            ours.setdefault(key.replace(".0.", f".{i}.", 1), ours[key])
    if two_stage:
        return to_authors(ours, "deformable_detr_two_stage")
    return to_authors(ours, "deformable_detr_refine" if refine else "deformable_detr")


def merge_projections(state: dict, attention: str) -> None:
    """Join the query, key and value projections of one attention, in place."""
    for kind in ("weight", "bias"):
        names = [f"{attention}.{name}_proj.{kind}" for name in "qkv"]
        if not all(name in state for name in names):
            raise UserError("expected weights of transformers' DetrForObjectDetection or "
                            f"DeformableDetrForObjectDetection, got a file without {names[0]}: "
                            "other models of transformers are not read")
        parts = [state.pop(name) for name in names]
        state[f"{attention}.in_proj_{kind}"] = torch.cat(parts)
