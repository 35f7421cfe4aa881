"""H-DETR: DETRs with Hybrid Matching (Jia et al., CVPR 2023, arXiv 2207.13080), on an improved two-stage Deformable DETR.

The idea: one-to-one matching spares us NMS but gives every object a single positive query. So in training only, a second
group of queries is matched to the objects repeated K times. All weights are shared; at test time the group is gone.
48.7 AP in 12 epochs, where the same detector without the group reaches 47.0.

    paper                                             here
    section 3.2.1 hybrid branch: two query groups     HDETR.propose, group_mask, HDETR.forward
    section 3.2.1 one-to-many matching, Eq. 1-2       Criterion, matcher.Group.copies
    section 4.2, Table 8 mixed query selection        HDETR.propose (from DINO)
    section 4.2, Table 8 look forward twice           HDETR.decode (from DINO)
    Tables 1, 8 and 14 recipe                         Config

    symbol     here
    n, T       num_queries, num_queries_one2many
    K, lambda  k_one2many, lambda_one2many
    Q, Q^      queries of the proposals of rank 0..n-1 and n..n+T-1

B images, S tokens, Nq queries (n, in training n + T), C channels. `num_queries_one2many=0` is the baseline without the
branch. Boxes and `padding` are those of `deformable_detr`.

Departs
 1. The one-to-many losses are divided by the number of repeated objects: a mean over positives, not K times the sum (code).
 2. The encoder's proposals are charged once, with the one-to-one group (code).
 3. Half of the position network's output is never used, its first half is the query position (code).
 4. Proposals are capped at the number of tokens, so that images of any size work; the one-to-many group shrinks first.
 5. A batch without any object, in the training loop: the one-to-many background loss is divided by K, not by 1.
 6. Hybrid epoch and hybrid layer, the paper's other two schemes, are left out: in Table 6 they stay within 0.4 AP of the
    branch and take longer.
 7. Mixed query selection (DINO, Zhang et al. 2023) as this code has it: proposals are ranked by class 0, and a query's position
    is made once; DINO ranks by the best class and renews the position in every layer.
"""
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import deformable_detr
from backbones import build_backbone
from deformable_detr import (DecoderLayer, DeformableDETR, EncoderLayer, Memory, Queries, box_head, class_head,
                             detect, encoder_proposals, init_transformer, input_projections, named_layers,  # noqa: F401
                             num_maps, offset_boxes, param_groups, sine_embedding, take)
from engine.recipe import SMALL_DETECTOR, SMALL_RECIPE, Recipe
from matcher import Group


@dataclass
class Config:
    """The R50 row of Table 1: hybrid branch, 12 epochs, 48.7 AP on COCO val2017."""
    backbone: str = "resnet50"
    backbone_weights: str = "imagenet"     # imagenet, a file, or none: trained from scratch with live normalisation
    backbone_norm: str = "batch"           # batch or group; published weights come with their own frozen statistics
    drop_path: float = 0.0                 # of the last block of a Swin, ViT or FocalNet, rising to it from 0
    num_feature_levels: int = 4
    num_queries: int = 300                 # n, one-to-one; all there is at test time
    num_queries_one2many: int = 1500       # T, in training; 0: no hybrid branch (47.0 AP)
    k_one2many: int = 6                    # K copies of every object; below 3 it hurts (Table 9); copies beyond T find no query
    lambda_one2many: float = 1.0
    dim: int = 256
    num_heads: int = 8
    num_points: int = 4
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn_dim: int = 2048
    dropout: float = 0.0
    top_k: int = 100                       # detections kept per image
    cost_class: float = 2.0
    cost_l1: float = 5.0
    cost_giou: float = 2.0
    loss_class: float = 2.0
    loss_l1: float = 5.0
    loss_giou: float = 2.0
    size_divisor: int = 1                  # batches are padded to a multiple of this


RECIPE = Recipe(lr=2e-4, lr_backbone=2e-5, lr_offsets=2e-5, batch_size=16, epochs=12, lr_drop=11)


# What learns in minutes on two CPU cores: sizes and optimisation change, the method does not.
SMALL = dict(SMALL_RECIPE, **SMALL_DETECTOR, num_queries_one2many=120, k_one2many=4) | dict(epochs=10)
VARIANTS = {
    "baseline": dict(num_queries_one2many=0),
    "24_epochs": dict(epochs=24, lr_drop=20),
    "36_epochs": dict(epochs=36, lr_drop=30),
    "swin_t": dict(backbone="swin_t", drop_path=0.2, weight_decay=0.05),   # 51.2 AP; 36 epochs 53.7
    "swin_l": dict(backbone="swin_l_window7", drop_path=0.5, weight_decay=0.05, num_queries=900, epochs=36,   # 57.8 AP
                   lr_drop=30),
}


class HDETR(nn.Module):
    """Figure 3 of the paper, left. `backbone` maps images to [C2, C3, C4, C5] and lists their widths in `backbone.channels`."""

    def __init__(self, backbone: nn.Module, cfg: Config, num_classes: int):
        super().__init__()
        self.cfg = cfg
        C = cfg.dim
        self.backbone, self.num_maps = backbone, num_maps(cfg.num_feature_levels)
        self.input_proj = input_projections(backbone.channels[-self.num_maps:], C, cfg.num_feature_levels)
        self.level_embed = nn.Parameter(torch.empty(cfg.num_feature_levels, C))
        self.encoder = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.decoder_layers))
        self.enc_output, self.enc_output_norm = nn.Linear(C, C), nn.LayerNorm(C)
        self.pos_trans, self.pos_trans_norm = nn.Linear(2 * C, 2 * C), nn.LayerNorm(2 * C)
        init_transformer(self)
        self.query_embed = nn.Embedding(cfg.num_queries + cfg.num_queries_one2many, C)
        classes, boxes = class_head(C, num_classes), box_head(C)   # one of each per decoder layer, one for proposals
        self.class_embed, self.bbox_embed = (nn.ModuleList(deepcopy(head) for _ in range(cfg.decoder_layers + 1))
                                             for head in (classes, boxes))

    encode = DeformableDETR.encode   # backbone, projections and encoder are unchanged

    def forward(self, images: Tensor, padding: Tensor, targets=None) -> dict:
        """images (B, 3, H, W), padding (B, H, W) -> outputs as in `deformable_detr.DeformableDETR.forward`, of the n
        one-to-one queries; in training also `many_outputs`, the same predictions of the T one-to-many queries."""
        n = self.cfg.num_queries
        memory = self.encode(images, padding)
        queries, enc = self.propose(memory)
        layers, states = self.decode(memory, queries, group_mask(n, queries.content))
        one, many = ([{name: x[:, part] for name, x in layer.items()} for layer in layers]
                     for part in (slice(n), slice(n, None)))
        outputs = {**one[-1], "aux_outputs": one[:-1], "queries": states[-1][:, :n],
                   "anchors": queries.reference[:, :n], "memory": memory, "enc_outputs": enc}
        if queries.content.shape[1] > n:
            outputs["many_outputs"] = {**many[-1], "aux_outputs": many[:-1]}
        return outputs

    def propose(self, memory: Memory) -> tuple[Queries, dict]:
        """Mixed query selection: places from the best encoder tokens, in order, content from a learned table. In training
        n + T of them. -> queries and the predictions of all S tokens."""
        tokens, proposals = encoder_proposals(memory)                              # (B, S, C), (B, S, 4)
        tokens = self.enc_output_norm(self.enc_output(tokens))
        logits = self.class_embed[-1](tokens)                                      # (B, S, num_classes)
        boxes = self.bbox_embed[-1](tokens) + proposals                            # (B, S, 4) before the sigmoid
        wanted = self.cfg.num_queries + (self.cfg.num_queries_one2many if self.training else 0)
        best = logits[..., 0].topk(min(wanted, tokens.shape[1])).indices           # (B, Nq)
        reference = take(boxes, best).detach().sigmoid()                           # (B, Nq, 4)
        embedding = sine_embedding(reference, tokens.shape[-1] // 2).flatten(2)    # (B, Nq, 2 C), cx cy w h
        position = self.pos_trans_norm(self.pos_trans(embedding.to(tokens.dtype))).chunk(2, -1)[0]   # (B, Nq, C)
        content = self.query_embed.weight[:best.shape[1]].expand(len(tokens), -1, -1)                # (B, Nq, C)
        return Queries(content, position, reference), {"pred_logits": logits, "pred_boxes": boxes.sigmoid()}

    def decode(self, memory: Memory, queries: Queries, attn_mask: Tensor | None = None) -> tuple[list, list]:
        """Look forward twice: -> predictions of every layer and their states (B, Nq, C).

        A layer's box is its offset from the box of the layer before, with its graph, so that the loss trains both
        layers' heads; what attention sees as reference is detached."""
        content, position, reference = queries
        forward_twice_reference = reference
        layers, states = [], []
        for layer, class_head, box_head in zip(self.decoder, self.class_embed, self.bbox_embed):
            content = layer(content, position, reference, memory, attn_mask)       # (B, Nq, C)
            offsets = box_head(content)                                            # (B, Nq, 4)
            layers.append({"pred_logits": class_head(content),
                           "pred_boxes": offset_boxes(offsets, forward_twice_reference)})
            states.append(content)
            forward_twice_reference = offset_boxes(offsets, reference)
            reference = forward_twice_reference.detach()
        return layers, states


def group_mask(n: int, content: Tensor) -> Tensor | None:
    """Section 3.2.1: the first n of all queries (B, Nq, C) and the rest never see each other: (Nq, Nq) True = blocked; None
    when there is no rest."""
    many = torch.arange(content.shape[1], device=content.device) >= n              # (Nq,)
    return many[:, None] != many if content.shape[1] > n else None


class Criterion(deformable_detr.Criterion):
    """Section 3.2.1: the one-to-one group's two-stage set loss (Eq. 1) plus lambda times the one-to-many group's (Eq. 2)."""

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.copies, self.factor = cfg.k_one2many, cfg.lambda_one2many

    def __call__(self, outputs: dict, targets: list[dict], num_boxes: float | None = None) -> dict:
        """-> weighted losses {"cls", "aux0.cls", ..., "enc.cls", ..., "many.cls", "many.aux0.cls", ...}."""
        losses = super().__call__(outputs, targets, num_boxes)
        return {name: self.factor * x if name.startswith("many.") else x for name, x in losses.items()}

    def groups(self, outputs: dict, targets: list[dict]) -> list[Group]:
        """Eq. 2: every object counts K times, so that the one-to-one matching finds K queries for it."""
        groups = super().groups(outputs, targets)
        if "many_outputs" in outputs:
            layers = {f"many.{name}".rstrip("."): x for name, x in named_layers(outputs["many_outputs"]).items()}
            groups.append(Group(layers, targets, self.copies))
        return groups


def build(cfg: Config, num_classes: int) -> tuple[HDETR, Criterion]:
    """Model with random weights, and its criterion."""
    backbone = build_backbone(cfg.backbone, cfg.backbone_weights, cfg.backbone_norm, maps=num_maps(cfg.num_feature_levels),
                              drop_path=cfg.drop_path)
    return HDETR(backbone, cfg, num_classes), Criterion(cfg)
