"""DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection (Zhang et al., ICLR 2023, arXiv
2203.03605).

The idea: three additions to two-stage Deformable DETR with refined boxes. Noised copies of the ground truth are decoded
beside the queries, near ones to be recovered and slightly farther ones to be rejected (contrastive denoising). The
encoder's best boxes place the queries but their content stays learned (mixed query selection). A layer's box is also
trained through the next layer's (look forward twice). 49.0 AP in 12 epochs.

    paper                                                here
    section 3.3 contrastive denoising                    denoising_queries, noised_boxes, Criterion.denoising
    section 3.3, D.1 dynamic groups                      denoising_groups
    section 3.4 mixed query selection                    DINO.propose
    section 3.5, Eq. 2 look forward twice                DINO.decode
    section 3.1 queries are boxes (DAB-DETR, Eq. 1-2)    DINO.query_position
    section 4.1, D.3, D.4 recipe and sizes (Table 8)     Config

    symbol       here
    b_i          reference of layer i, detached                 reference
    b'_i         the same box with its graph                    updated; a layer on: forward_twice_reference
    b_i^(pred)   the box that is predicted and charged          pred_boxes
    lambda_1,2   noise of positives < scale, of negatives in [scale, 2 scale)   dn_box_noise

B images, Nq queries, C channels, T objects in the batch, N in its fullest image, G groups,
R copies of the objects (2 G, or G without negatives), P = R N slots.

Departs
 1. Box noise scale 1.0, as D.3 and every published run have it; Table 8 and the authors' configuration file say 0.4.
 2. Noise moves each corner coordinate on its own, so negatives may turn inside out and collapse (code; the paper draws
    nested squares).
 3. Groups follow the fullest image of the batch, and unused slots are charged as background (code; D.1: per image).
 4. The box head runs on the state for the next reference and on its LayerNorm for the prediction (code).
 5. At most MAX_SLOTS denoising slots (2 dn_number if that is more): first groups, then objects, a random choice per
    image, are left out; the authors have no cap. A dn_number below 50 means 2 dn_number groups whatever the crowd (code).
 6. Proposals are capped at the number of tokens, so that images of any size work.
 7. Coordinates are embedded in the order y, x, w, h (code; DAB-DETR, Eq. 1: x, y, w, h).
 8. The encoder's loss covers the selected proposals only, with their classes (code; the paper names the place, not more).
 9. "static" and "pure" query selection rebuild rows of Table 4: how they start is ours.
10. `denoising="plain"` leaves out the negatives and keeps the corner noise (DN-DETR moves centres and sizes).
"""
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.errors import UserError
from backbones import build_backbone
from boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, inverse_sigmoid
from deformable_detr import (MLP, DecoderLayer, EncoderLayer, Memory, Queries, box_head, class_head, detect,  # noqa: F401
                             encoder_proposals, encoder_references, flatten_pyramid, init_transformer,
                             input_projections, named_layers, num_maps, offset_boxes, pad_to_multiple, project,
                             sine_embedding, take)
from engine.recipe import SMALL_DETECTOR, SMALL_RECIPE, Recipe
from matcher import Group, Matches, SetLoss, Weights, count_boxes

EPS = 1e-3         # of every inverse sigmoid; 1e-5 in Deformable DETR
GIOU_EPS = 1e-6    # added to union and enclosing area; 0 in Deformable DETR
MAX_SLOTS = 400    # denoising slots per image


@dataclass
class Config:
    """The 4-scale row of Table 1: ResNet-50, 12 epochs, 49.0 AP on COCO val2017."""
    backbone: str = "resnet50"
    backbone_weights: str = "imagenet"     # imagenet, a file, or none: trained from scratch with live normalisation
    backbone_norm: str = "batch"           # batch or group; published weights come with their own frozen statistics
    drop_path: float = 0.0                 # of the last block of a Swin, ViT or FocalNet, rising to it from 0
    num_feature_levels: int = 4            # 4: C3..C5 and one coarser; 5: C2..C5 and one coarser
    denoising: str = "contrastive"         # none, plain or contrastive
    dn_number: int = 100                   # pairs per image, spread over groups; below 50 see denoising_groups
    dn_label_noise: float = 0.5            # twice the share of relabelled queries
    dn_box_noise: float = 1.0
    query_selection: str = "mixed"         # static, pure or mixed
    look_forward_twice: bool = True
    dim: int = 256
    num_heads: int = 8
    num_points: int = 4
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn_dim: int = 2048
    dropout: float = 0.0
    num_queries: int = 900
    top_k: int = 300                       # detections kept per image
    cost_class: float = 2.0
    cost_l1: float = 5.0
    cost_giou: float = 2.0
    loss_class: float = 1.0
    loss_l1: float = 5.0
    loss_giou: float = 2.0
    size_divisor: int = 1                  # batches are padded to a multiple of this


RECIPE = Recipe(lr=1e-4, lr_backbone=1e-5, batch_size=16, epochs=12, lr_drop=11)


# What learns in minutes on two CPU cores: sizes and optimisation change, the method does not.
SMALL = dict(SMALL_RECIPE, **SMALL_DETECTOR, dn_number=50, top_k=100, loss_class=2.0)
VARIANTS = {
    "5scale": dict(num_feature_levels=5),
    "24_epochs": dict(epochs=24, lr_drop=20),
    "36_epochs": dict(epochs=36, lr_drop=30),
    "swin_l": dict(backbone="swin_l", drop_path=0.2),                                  # 56.8 AP; 36 epochs 58.0
    "swin_l_5scale": dict(backbone="swin_l", drop_path=0.2, num_feature_levels=5),     # 57.3 AP; 36 epochs 58.5
    "focalnet_l": dict(backbone="focalnet_l_3level", drop_path=0.3),                   # 57.5 AP; 36 epochs 58.3
    "focalnet_l_4level": dict(backbone="focalnet_l_4level", drop_path=0.3),            # 58.0 AP
    "focalnet_l_5scale": dict(backbone="focalnet_l_4level", drop_path=0.3, num_feature_levels=5),   # 58.5 AP
}


class DINO(nn.Module):
    """Figure 2 of the paper. `backbone` maps images to [C2, C3, C4, C5] and lists their widths in `backbone.channels`."""

    def __init__(self, backbone: nn.Module, cfg: Config, num_classes: int):
        super().__init__()
        for field, choices in (("denoising", ("none", "plain", "contrastive")),
                               ("query_selection", ("static", "pure", "mixed"))):
            if getattr(cfg, field) not in choices:
                raise UserError(f"expected {field} to be one of {', '.join(choices)}, got {getattr(cfg, field)!r}")
        self.cfg = cfg
        C = cfg.dim
        self.backbone = backbone
        self.num_maps = num_maps(cfg.num_feature_levels)
        self.input_proj = input_projections(backbone.channels[-self.num_maps:], C, cfg.num_feature_levels)
        self.level_embed = nn.Parameter(torch.empty(cfg.num_feature_levels, C))
        self.encoder = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.encoder_layers))
        if cfg.query_selection != "static":
            self.enc_output, self.enc_output_norm = nn.Linear(C, C), nn.LayerNorm(C)
        if cfg.query_selection != "pure":
            self.tgt_embed = nn.Embedding(cfg.num_queries, C)              # before init_transformer: Xavier, as the authors'
        self.ref_point_head = MLP(2 * C, C, C)
        self.decoder = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.decoder_layers))
        self.decoder_norm = nn.LayerNorm(C)
        init_transformer(self)
        classes, boxes = class_head(C, num_classes), box_head(C)
        self.class_embed = nn.ModuleList([classes] * cfg.decoder_layers)   # one pair of heads for all layers (D.3)
        self.bbox_embed = nn.ModuleList([boxes] * cfg.decoder_layers)
        if cfg.query_selection == "static":
            self.anchor_embed = nn.Embedding(cfg.num_queries, 4)           # before the sigmoid; uniform boxes (DAB-DETR)
            self.anchor_embed.weight.data = inverse_sigmoid(torch.rand(cfg.num_queries, 4), EPS)
        else:
            self.enc_out_class_embed, self.enc_out_bbox_embed = deepcopy(classes), deepcopy(boxes)
        if cfg.denoising != "none":
            self.label_enc = nn.Embedding(num_classes + 1, C)              # the last row is never used

    def forward(self, images: Tensor, padding: Tensor, targets: list[dict] | None = None) -> dict:
        """images (B, 3, H, W), padding (B, H, W); targets, needed in training: B dictionaries with labels (n,) and
        boxes (n, 4) -> outputs as in `deformable_detr.DeformableDETR.forward`, and in training `dn_outputs`."""
        memory = self.encode(images, padding)
        queries, enc = self.propose(memory)
        denoising, attn_mask, P = None, None, 0
        if self.training and self.cfg.denoising != "none":
            denoising = denoising_queries(targets, self.label_enc, self.class_embed[0].out_features, self.cfg,
                                          queries.content.shape[1])
            attn_mask, P = denoising.attn_mask, denoising.content.shape[1]
            queries = Queries(torch.cat((denoising.content, queries.content), 1), None,
                              torch.cat((denoising.reference, queries.reference), 1))
        layers, states = self.decode(memory, queries, attn_mask)
        matching = [{name: x[:, P:] for name, x in layer.items()} for layer in layers]
        outputs = {**matching[-1], "aux_outputs": matching[:-1], "queries": states[-1][:, P:],
                   "anchors": queries.reference[:, P:], "memory": memory}
        if denoising is not None:
            dn_layers = [{name: x[:, :P] for name, x in layer.items()} for layer in layers]
            outputs["dn_outputs"] = {**dn_layers[-1], "aux_outputs": dn_layers[:-1], "matches": denoising.matches,
                                     "groups": denoising.groups}
        return outputs | ({"enc_outputs": enc} if enc else {})

    def encode(self, images: Tensor, padding: Tensor) -> Memory:
        """As Deformable DETR, with sine positions of temperature 20 counted from the far side of a cell (DAB-DETR)."""
        images, padding = pad_to_multiple(images, padding, self.cfg.size_divisor)
        features = self.backbone(images)
        pyramid = project(self.input_proj, features[-self.num_maps:])              # [(B, C, H_l, W_l)]
        memory = flatten_pyramid(pyramid, padding, self.level_embed, features, temperature=20.0, shift=0.0)  # <-
        references = encoder_references(memory)                                    # (B, S, L, 2)
        for layer in self.encoder:
            memory = memory._replace(tokens=layer(memory, references))
        return memory

    def propose(self, memory: Memory) -> tuple[Queries, dict | None]:
        """Section 3.4: where queries start and with what content.

        static: both learned. pure: both from the best encoder tokens. mixed: boxes from the best tokens, content
        learned; tokens are sorted, so row i always meets the i-th best box."""
        B, S, _ = memory.tokens.shape
        if self.cfg.query_selection == "static":
            content, anchors = self.tgt_embed.weight, self.anchor_embed.weight.sigmoid()
            return Queries(content.expand(B, -1, -1), None, anchors.expand(B, -1, -1)), None
        tokens, proposals = encoder_proposals(memory)                              # (B, S, C), (B, S, 4)
        tokens = self.enc_output_norm(self.enc_output(tokens))
        logits = self.enc_out_class_embed(tokens)                                  # (B, S, num_classes)
        k = min(self.cfg.num_queries, S)
        best = logits.amax(-1).topk(k).indices                                     # (B, Nq)
        tokens = take(tokens, best)                                                # (B, Nq, C)
        boxes = (self.enc_out_bbox_embed(tokens) + take(proposals, best)).sigmoid()   # (B, Nq, 4)
        content = tokens.detach() if self.cfg.query_selection == "pure" else self.tgt_embed.weight[:k].expand(B, -1, -1)
        return Queries(content, None, boxes.detach()), {"pred_logits": take(logits, best), "pred_boxes": boxes}

    def decode(self, memory: Memory, queries: Queries, attn_mask: Tensor | None = None) -> tuple[list, list]:
        """Section 3.5: -> predictions of every layer and their normalised states (B, Nq, C).

        b'_i = b_{i-1} + delta_i, b_i = detach(b'_i), b_i^(pred) = b'_{i-1} + delta_i, sums before the sigmoid: the loss of
        layer i also trains the offsets of layer i - 1. Looking forward once, b_i^(pred) starts from b_{i-1}."""
        content, _, reference = queries
        forward_twice_reference = reference
        layers, states = [], []
        for layer, class_head, box_head in zip(self.decoder, self.class_embed, self.bbox_embed):
            content = layer(content, self.query_position(reference, memory), reference, memory, attn_mask)
            state = self.decoder_norm(content)                                     # (B, Nq, C)
            boxes = offset_boxes(box_head(state), forward_twice_reference, EPS)    # (B, Nq, 4)
            layers.append({"pred_logits": class_head(state), "pred_boxes": boxes})
            states.append(state)
            updated = offset_boxes(box_head(content), reference, EPS)
            reference = updated.detach()
            forward_twice_reference = updated if self.cfg.look_forward_twice else reference
        return layers, states

    def query_position(self, reference: Tensor, memory: Memory) -> Tensor:
        """The position embedding a box stands for (DAB-DETR, Eq. 1-2), renewed in every layer: (B, Nq, 4) -> (B, Nq, C).
        Boxes are taken on the finest padded level, coordinates in the order y, x, w, h."""
        boxes = reference * memory.valid_ratios[:, None, 0].repeat(1, 1, 2)        # (B, Nq, 4)
        boxes = boxes[..., [1, 0, 2, 3]]
        embedding = sine_embedding(boxes, memory.tokens.shape[-1] // 2).flatten(2)      # (B, Nq, 2 C)
        return self.ref_point_head(embedding.to(memory.tokens.dtype))


class Denoising(NamedTuple):
    """Noised ground truth as extra queries."""
    content: Tensor      # (B, P, C)
    reference: Tensor    # (B, P, 4) in [0, 1]
    attn_mask: Tensor    # (P + Nq, P + Nq), True = blocked
    matches: list        # per image: positive slots and the objects they must recover
    groups: int


class Noise(NamedTuple):
    """Random numbers for R copies of T objects."""
    relabel: Tensor      # (R, T) uniform in [0, 1): compared with half the label noise
    labels: Tensor       # (R, T) the label to take then
    sign: Tensor         # (R, T, 4) -1 or 1
    amount: Tensor       # (R, T, 4) uniform in [0, 1)


def draw_noise(copies: int, objects: int, num_classes: int, device) -> Noise:
    return Noise(torch.rand(copies, objects, device=device),
                 torch.randint(num_classes, (copies, objects), device=device),
                 torch.randint(2, (copies, objects, 4), device=device) * 2.0 - 1,
                 torch.rand(copies, objects, 4, device=device))


def denoising_groups(number: int, fullest: int, copies: int) -> int:
    """Appendix D.1: as many groups as fit `number` pairs into the fullest image, at least 1; below 50 pairs the authors
    make 2 `number` groups whatever the crowd. Never more than fit MAX_SLOTS, or 2 `number` slots if that is more.
    `copies`: slots per object and group."""
    if fullest == 0:
        return 1
    groups = number // fullest if number >= 50 else 2 * number
    return max(1, min(groups, max(MAX_SLOTS, 2 * number) // (copies * fullest)))


def denoising_queries(targets: list[dict], label_enc: nn.Embedding, num_classes: int, cfg: Config, num_queries: int,
                      draw=None) -> Denoising:
    """Section 3.3: every object is copied into G groups, as a positive (noise below the scale) and, if contrastive, a
    negative (between one and two scales) query. Object j of an image in copy e has slot e N + j, so a group is
    [N positives | N negatives]; unused slots hold zeros and the box (0.5, 0.5, 0.5, 0.5).

    To use it elsewhere: put content and reference (boxes, not their logits) in front of your own queries, give attn_mask to
    the self-attention, cut the first P outputs off every layer and charge them with `Criterion.denoising`; in training
    only. Of cfg it reads denoising and dn_*; a batch without objects has P = 0."""
    per_object = 2 if cfg.denoising == "contrastive" else 1
    chosen = [choose_objects(len(t["labels"]), MAX_SLOTS // per_object) for t in targets]
    labels = torch.cat([t["labels"][c] for t, c in zip(targets, chosen)])          # (T,)
    boxes = torch.cat([t["boxes"][c] for t, c in zip(targets, chosen)])            # (T, 4)
    N = max(len(c) for c in chosen)
    G = denoising_groups(cfg.dn_number, N, per_object)
    R, P, B, device = G * per_object, G * per_object * N, len(targets), boxes.device
    noise = (draw or draw_noise)(R, len(labels), num_classes, device)
    negative = torch.arange(R, device=device) % per_object == 1                    # (R,)
    noised_labels = torch.where(noise.relabel < cfg.dn_label_noise / 2, noise.labels, labels)   # (R, T)
    reference = inverse_sigmoid(noised_boxes(boxes, noise, negative, cfg.dn_box_noise), EPS).sigmoid()   # (R, T, 4)

    image = torch.cat([torch.full((len(c),), b) for b, c in enumerate(chosen)])    # (T,)
    place = torch.cat([torch.arange(len(c)) for c in chosen])                      # (T,) j of every object
    slot = torch.arange(R)[:, None] * N + place                                    # (R, T)
    where = (image.expand_as(slot).to(device), slot.to(device))
    content = label_enc.weight.new_zeros(B, P, label_enc.embedding_dim).index_put(where, label_enc(noised_labels))
    reference = boxes.new_full((B, P, 4), 0.5).index_put(where, reference)
    positives = torch.arange(G)[:, None] * per_object * N                          # (G, 1) first slot of each group
    matches = [((positives + torch.arange(len(c))).flatten(), c.repeat(G)) for c in chosen]
    return Denoising(content, reference, denoising_mask(P, per_object * N, num_queries, device), matches, G)


def choose_objects(count: int, most: int) -> Tensor:
    """Indices of an image's objects, `most` of them at random in a crowd."""
    return torch.arange(count) if count <= most else torch.randperm(count)[:most].sort().values


def noised_boxes(boxes: Tensor, noise: Noise, negative: Tensor, scale: float) -> Tensor:
    """Boxes (T, 4), negative (R,) -> (R, T, 4): each corner coordinate moves by [0, 1) or, of negatives, [1, 2) times
    `scale` times half the width or height, to either side, and is clipped to the image."""
    amount = (noise.amount + negative[:, None, None]) * noise.sign                 # (R, T, 4)
    half = boxes[:, 2:].repeat(1, 2) / 2                                           # (T, 4)
    return box_xyxy_to_cxcywh((box_cxcywh_to_xyxy(boxes) + amount * half * scale).clamp(0, 1))


def denoising_mask(slots: int, group_size: int, num_queries: int, device) -> Tensor:
    """Who may not look at whom, (P + Nq, P + Nq): nobody sees another group's slots, and matching queries see none; all
    see the matching queries (DN-DETR, Eq. 7)."""
    group = torch.full((slots + num_queries,), -1, device=device)
    group[:slots] = torch.arange(slots, device=device) // max(1, group_size)
    return (group >= 0) & (group[:, None] != group)


class Criterion:
    """The set loss of every decoder layer and of the selected encoder proposals, and the denoising loss of every layer."""

    def __init__(self, cfg: Config):
        self.set_loss = SetLoss(Weights(cfg.cost_class, cfg.cost_l1, cfg.cost_giou),
                                Weights(cfg.loss_class, cfg.loss_l1, cfg.loss_giou), GIOU_EPS)

    def __call__(self, outputs: dict, targets: list[dict], num_boxes: float | None = None) -> dict:
        """-> weighted losses {"cls", "l1", "giou", "aux0.cls", ..., "enc.cls", ..., "dn.cls", "dn.aux0.cls", ...}.
        `num_boxes`: what to divide by, when the batch is spread over ranks or micro-batches."""
        num_boxes = count_boxes(targets) if num_boxes is None else num_boxes
        layers = named_layers(outputs)
        if "enc_outputs" in outputs:
            layers["enc"] = outputs["enc_outputs"]
        matches, = self.set_loss.match_groups([Group(layers, targets)])
        losses = self.set_loss.compute_losses(layers, targets, matches, num_boxes)
        return losses | (self.denoising(outputs["dn_outputs"], targets, num_boxes) if "dn_outputs" in outputs else {})

    def denoising(self, outputs: dict, targets: list[dict], num_boxes: float) -> dict:
        """Section 3.3: positives must recover their object, everything else is background; no matching is needed."""
        layers = {f"dn.{name}".rstrip("."): layer for name, layer in named_layers(outputs).items()}
        matches = [outputs["matches"]] * len(layers)
        return self.set_loss.compute_losses(layers, targets, matches, num_boxes * outputs["groups"])

    def match(self, outputs: dict, targets: list[dict]) -> Matches:
        """The last layer's matching: per image query and object indices, on the host."""
        return self.set_loss.match(outputs, targets)


def build(cfg: Config, num_classes: int) -> tuple[DINO, Criterion]:
    """Model with random weights, and its criterion."""
    backbone = build_backbone(cfg.backbone, cfg.backbone_weights, cfg.backbone_norm, maps=num_maps(cfg.num_feature_levels),
                              drop_path=cfg.drop_path)
    if len(backbone.channels) != 4:
        raise UserError(f"expected a backbone of four maps, got {cfg.backbone} with {len(backbone.channels)}: choose a ResNet, "
                        "Swin or FocalNet")
    return DINO(backbone, cfg, num_classes), Criterion(cfg)


def param_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Trainable parameters in two groups with their learning rates: backbone and the rest (Table 8)."""
    named = [(name.startswith("backbone."), p) for name, p in model.named_parameters() if p.requires_grad]
    return [{"params": [p for backbone, p in named if not backbone], "lr": recipe.lr},
            {"params": [p for backbone, p in named if backbone], "lr": recipe.lr_backbone}]
