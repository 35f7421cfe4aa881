"""H-DETR: DETRs with Hybrid Matching (Jia et al., CVPR 2023, arXiv 2207.13080), on an improved
two-stage Deformable DETR.

The idea: one-to-one matching makes NMS unnecessary but gives every object a single positive query.
So, in training only, a second group of queries is matched to the objects repeated K times. All
weights are shared; at test time the group is gone. 48.7 AP in 12 epochs, where the same detector
without the group reaches 47.0.

    paper                                             here
    section 3.2.1 hybrid branch: two query groups     HDETR.propose, group_mask, HDETR.forward
    section 3.2.1 one-to-many matching, Eq. 1-2       Criterion.groups, matcher.Group.copies
    section 4.2, Table 8 mixed query selection        HDETR.propose (from DINO)
    section 4.2, Table 8 look forward twice           HDETR.decode (from DINO)
    Tables 1, 8 and 14 recipe                         Config, RECIPE

    symbol     here
    n, T       num_queries, num_queries_one2many
    K, lambda  k_one2many, lambda_one2many
    Q, Q^      queries of the proposals of rank 0..n-1 and n..n+T-1

B images, S tokens, Nq queries (n, in training n + T), C channels. `num_queries_one2many=0` is the
baseline without the branch. Boxes and `padding` are those of deformable_detr.py.

Differences from the paper
 1. The one-to-many losses are divided by the number of repeated objects: they are a mean over
    positives, not K times the sum (code).
 2. The encoder's proposals are supervised once, with the one-to-one group (code).
 3. Half of the position network's output is never used; its first half is the query position
    (code).
 4. There are at most as many proposals as tokens, so that images of any size work; the one-to-many
    group shrinks first. Proposals with nearly equal scores may trade ranks, see dino.py.
 5. In a batch without any object, in the training loop, the one-to-many background loss is divided
    by K, not by 1.
 6. Hybrid epoch and hybrid layer, the paper's other two schemes, are left out. After 12, 24 and 36
    epochs (Table 6) the branch reaches 45.9, 47.6 and 48.0 AP, hybrid epoch 45.5, 47.0 and 47.9,
    hybrid layer 45.6, 47.9 and 48.0; both take longer to train.
 7. Mixed query selection (DINO, Zhang et al. 2023) as this code has it: proposals are ranked by
    class 0, and the position of a query is made once; DINO ranks by the best class and makes the
    position anew in every layer.
 8. Precision, classes and skipped steps: as in deformable_detr.py, 10 to 12. TF32: as in dino.py.
"""
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import deformable_detr
from backbones import build_backbone
from deformable_detr import (  # noqa: F401  (train.py looks for detect and param_groups here)
    DecoderLayer, DeformableDETR, EncoderLayer, Memory, Queries, box_head, class_head, detect,
    encoder_proposals, gather_rows, in_float32, init_transformer, input_projections, named_layers,
    num_maps, offset_boxes, param_groups, sine_embedding, slice_queries)
from engine.recipe import SMALL_DETECTOR, SMALL_RECIPE, Recipe
from matcher import Group


@dataclass
class Config:
    """The R50 row of Table 1: hybrid branch, 12 epochs, 48.7 AP on COCO val2017."""
    backbone: str = "resnet50"           # name of a network in backbones/
    backbone_weights: str = "imagenet"   # imagenet, a file, or none: random weights
    backbone_norm: str = "batch"         # batch or group norm without backbone_weights; else frozen
    drop_path: float = 0.0               # maximum stochastic-depth rate, linear over blocks
    num_feature_levels: int = 4          # feature maps: C3 to C5 and one coarser
    num_queries: int = 300               # n, one-to-one; the only queries at test time
    num_queries_one2many: int = 1500     # T, in training; 0: no hybrid branch
    k_one2many: int = 6                  # K copies of every object; below 3 it hurts (Table 9)
    lambda_one2many: float = 1.0         # weight of the one-to-many losses
    dim: int = 256                       # C: channels of tokens and queries
    num_heads: int = 8                   # attention heads
    num_points: int = 4                  # sampling points per attention head and feature level
    encoder_layers: int = 6              # encoder layers
    decoder_layers: int = 6              # decoder layers
    ffn_dim: int = 2048                  # hidden units of the feed-forward networks
    dropout: float = 0.0                 # dropout rate
    top_k: int = 100                     # detections per image
    cost_class: float = 2.0              # matching: weight of the class cost
    cost_l1: float = 5.0                 # matching: weight of the L1 cost of boxes
    cost_giou: float = 2.0               # matching: weight of the GIoU cost of boxes
    loss_class: float = 2.0              # weight of the class loss
    loss_l1: float = 5.0                 # weight of the L1 loss of boxes
    loss_giou: float = 2.0               # weight of the GIoU loss of boxes
    size_divisor: int = 1                # batches are padded to a multiple of this


RECIPE = Recipe(lr=2e-4, lr_backbone=2e-5, lr_offsets=2e-5, batch_size=16, epochs=12, lr_drop=11)

# Trains in minutes on two CPU cores: other sizes and optimization, the same method.
SMALL = dict(SMALL_RECIPE, **SMALL_DETECTOR, num_queries_one2many=120, k_one2many=4)
# 8 GPUs of 24 GiB need --recompute for swin_l only (counted by tools/predict_memory.py).
VARIANTS = {
    "baseline": dict(num_queries_one2many=0),                       # 47.0 AP
    "24_epochs": dict(epochs=24, lr_drop=20),
    "36_epochs": dict(epochs=36, lr_drop=30),                       # 50.0 AP
    # 51.2 AP; 53.7 with 36 epochs
    "swin_t": dict(backbone="swin_t", drop_path=0.2, weight_decay=0.05),
    # 57.8 AP
    "swin_l": dict(backbone="swin_l_window7", drop_path=0.5, weight_decay=0.05, num_queries=900,
                   epochs=36, lr_drop=30),
}


class HDETR(nn.Module):
    """Figure 3, left. `backbone` maps images to [C2, C3, C4, C5], widths in `channels`."""

    def __init__(self, backbone: nn.Module, cfg: Config, num_classes: int):
        super().__init__()
        C = cfg.dim
        self.cfg = cfg
        self.backbone = backbone
        self.num_maps = num_maps(cfg.num_feature_levels)
        channels = backbone.channels[-self.num_maps:]
        self.input_proj = input_projections(channels, C, cfg.num_feature_levels)
        self.level_embed = nn.Parameter(torch.empty(cfg.num_feature_levels, C))
        self.encoder = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.decoder_layers))
        self.enc_output = nn.Linear(C, C)
        self.enc_output_norm = nn.LayerNorm(C)
        self.pos_trans = nn.Linear(2 * C, 2 * C)
        self.pos_trans_norm = nn.LayerNorm(2 * C)
        init_transformer(self)
        self.query_embed = nn.Embedding(cfg.num_queries + cfg.num_queries_one2many, C)

        # A class head and a box head for each decoder layer, and one of each for the proposals.
        classes = class_head(C, num_classes)
        boxes = box_head(C)
        count = cfg.decoder_layers + 1
        self.class_embed = nn.ModuleList(deepcopy(classes) for _ in range(count))
        self.bbox_embed = nn.ModuleList(deepcopy(boxes) for _ in range(count))

    sine = DeformableDETR.sine
    encode = DeformableDETR.encode   # backbone, projections and encoder are unchanged

    def forward(self, images: Tensor, padding: Tensor, targets=None) -> dict:
        """Detect objects in images (B, 3, H, W) with padding (B, H, W); `targets` are not used.

        Returns what `deformable_detr.DeformableDETR.forward` does, for the n one-to-one queries; in
        training also `many_outputs`, the same predictions of the T one-to-many queries.
        """
        n = self.cfg.num_queries
        memory = self.encode(images, padding)
        queries, proposals = self.propose(memory)
        attn_mask = group_mask(n, queries.content)
        layers, states = self.decode(memory, queries, attn_mask)

        outputs = slice_queries(layers, 0, n)
        outputs |= {"queries": states[-1][:, :n], "anchors": queries.reference[:, :n],
                    "memory": memory, "enc_outputs": proposals}
        if queries.content.shape[1] > n:
            outputs["many_outputs"] = slice_queries(layers, n)
        return outputs

    def propose(self, memory: Memory) -> tuple[Queries, dict]:
        """Mixed query selection: boxes of the best tokens, in order, and learned content.

        There are n queries, in training n + T. Also returns the predictions of all S tokens.
        """
        tokens, proposals = encoder_proposals(memory)                    # (B, S, C), (B, S, 4)
        tokens = self.enc_output_norm(self.enc_output(tokens))
        logits = in_float32(self.class_embed[-1], tokens)                # (B, S, num_classes)
        boxes = in_float32(self.bbox_embed[-1], tokens) + proposals      # (B, S, 4) before sigmoid
        count = self.cfg.num_queries
        if self.training:
            count += self.cfg.num_queries_one2many
        count = min(count, tokens.shape[1])
        best = logits[..., 0].topk(count).indices                        # (B, Nq)
        reference = gather_rows(boxes, best).detach().sigmoid()          # (B, Nq, 4)
        embedding = sine_embedding(reference, tokens.shape[-1] // 2).flatten(2)   # (B, Nq, 2 C)
        position = self.pos_trans_norm(self.pos_trans(embedding.to(tokens.dtype)))
        position, _ = position.chunk(2, -1)              # (B, Nq, C), see Difference 3
        content = self.query_embed.weight[:count].expand(len(tokens), -1, -1)     # (B, Nq, C)
        predictions = {"pred_logits": logits, "pred_boxes": boxes.sigmoid()}
        return Queries(content, position, reference), predictions

    def decode(self, memory: Memory, queries: Queries, attn_mask: Tensor | None = None):
        """Look forward twice: predictions of every layer and their states (B, Nq, C), two lists.

        The box of a layer is its offset from the box of the layer before, with its graph, so that
        the loss trains both layers' heads; the reference that attention uses is detached.
        """
        content, position, reference = queries
        previous = reference
        layers, states = [], []
        for layer, class_embed, bbox_embed in zip(self.decoder, self.class_embed, self.bbox_embed):
            content = layer(content, position, reference, memory, attn_mask)     # (B, Nq, C)
            logits = in_float32(class_embed, content)                    # (B, Nq, num_classes)
            offsets = in_float32(bbox_embed, content)                    # (B, Nq, 4)
            boxes = offset_boxes(offsets, previous)                      # (B, Nq, 4)
            layers.append({"pred_logits": logits, "pred_boxes": boxes})
            states.append(content)
            previous = offset_boxes(offsets, reference)
            reference = previous.detach()
        return layers, states


def group_mask(n: int, content: Tensor) -> Tensor | None:
    """Section 3.2.1: block attention between the first n of all queries (B, Nq, C) and the others.

    Returns (Nq, Nq), True = blocked; None when there are no others.
    """
    if content.shape[1] <= n:
        return None
    many = torch.arange(content.shape[1], device=content.device) >= n    # (Nq,)
    return many[:, None] != many


class Criterion(deformable_detr.Criterion):
    """Section 3.2.1: the two-stage set loss of the one-to-one group (Eq. 1) plus lambda times that
    of the one-to-many group (Eq. 2)."""

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.copies = cfg.k_one2many
        self.factor = cfg.lambda_one2many

    def __call__(self, outputs: dict, targets: list[dict], num_boxes=None) -> dict[str, Tensor]:
        """Compute the weighted losses {"cls", "aux0.cls", ..., "enc.cls", ..., "many.cls",
        "many.aux0.cls", ...}. Arguments as in `deformable_detr.Criterion`."""
        losses = super().__call__(outputs, targets, num_boxes)
        for name in losses:
            if name.startswith("many."):
                losses[name] = self.factor * losses[name]
        return losses

    def groups(self, outputs: dict, targets: list[dict]) -> list[Group]:
        """Eq. 2: every object counts K times, so that it is matched to K queries."""
        groups = super().groups(outputs, targets)
        if "many_outputs" in outputs:
            layers = named_layers(outputs["many_outputs"], "many")
            groups.append(Group(layers, targets, self.copies))
        return groups


def build(cfg: Config, num_classes: int) -> tuple[HDETR, Criterion]:
    """Make the model, with random weights, and its criterion."""
    maps = num_maps(cfg.num_feature_levels)
    backbone = build_backbone(cfg.backbone, cfg.backbone_weights, cfg.backbone_norm, maps=maps,
                              drop_path=cfg.drop_path)
    return HDETR(backbone, cfg, num_classes), Criterion(cfg)
