"""DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection (Zhang et al.,
ICLR 2023, arXiv 2203.03605).

The idea: three additions to two-stage Deformable DETR with refined boxes. Noised copies of the
objects are decoded beside the queries; near ones must be recovered, slightly farther ones rejected
(contrastive denoising). The encoder's best boxes place the queries, but their content stays learned
(mixed query selection). The box of a layer is also trained through the next layer's (look forward
twice). 49.0 AP in 12 epochs.

    paper                                                here
    section 3.3 contrastive denoising                    denoising_queries, noised_boxes
    section 3.3 denoising loss                           Criterion.denoising
    section 3.3, D.1 dynamic groups                      denoising_groups
    section 3.4 mixed query selection                    DINO.propose
    section 3.5, Eq. 2 look forward twice                DINO.decode
    section 3.1 queries are boxes (DAB-DETR, Eq. 1-2)    DINO.query_position
    section 4.1, D.3, D.4 recipe and sizes (Table 8)     Config, RECIPE

    symbol       here
    b_i          reference of layer i, detached                 reference
    b'_i         the same box with its graph                    updated; in the next layer: previous
    b_i^(pred)   the box that is predicted and supervised       pred_boxes
    lambda_1,2   noise of positives < scale, of negatives in [scale, 2 scale)   dn_box_noise
    ATD(k)       mean of the k largest L1 distances between an object and the initial anchor of the
                 query that is matched to it                    analysis.atd, outputs["anchors"]

B images, Nq queries, C channels, T objects in the batch, N in the image with the most objects,
G groups, R copies of the objects (2 G, or G without negatives), P = R N denoising queries.

Differences from the paper
 1. The box noise scale is 1.0, as in D.3 and every published run; Table 8 and the authors'
    configuration file say 0.4.
 2. Noise moves each corner coordinate on its own, so negative boxes may become degenerate (code;
    the paper draws nested squares).
 3. The number of groups follows the image with the most objects, and denoising queries without an
    object are supervised as background (code; D.1: per image).
 4. The box head runs on the state for the next reference and on its LayerNorm for the prediction
    (code).
 5. There are at most MAX_DENOISING_QUERIES (2 dn_number if that is more): first groups are left
    out, then random objects; the authors have no limit. A dn_number below 50 means 2 dn_number
    groups whatever the number of objects (code).
 6. There are at most as many proposals as tokens, so that images of any size work.
 7. Coordinates are embedded in the order y, x, w, h (code; DAB-DETR, Eq. 2: x, y, w, h), and the
    MLP after them ends without DAB-DETR's last ReLU (code).
 8. The encoder's loss covers the selected proposals only, with their classes (code).
 9. Proposals whose scores differ by less than a rounding error may trade ranks between devices and
    implementations, and learned contents meet other boxes: float32 and float64 place 0 and 6 of
    900 differently in two images (random weights); one such pair changes the gradient by 1e-3.
10. "static" and "pure" query selection rebuild rows of Table 4; how they start is our choice.
11. `denoising="plain"` keeps the corner noise (DN-DETR moves centers and sizes).
12. Precision, classes and skipped steps: as in deformable_detr.py, 10 to 12. The authors trained in
    float32 with TF32 matrix products.
"""
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import deformable_detr
from backbones import build_backbone
from boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, inverse_sigmoid
from deformable_detr import (  # noqa: F401  (train.py looks for detect here)
    MLP, DecoderLayer, DeformableDETR, EncoderLayer, Memory, Queries, box_head, class_head, detect,
    encoder_proposals, gather_rows, in_float32, init_transformer, input_projections, named_layers,
    offset_boxes, sine_embedding, slice_queries)
from engine.errors import UserError
from engine.recipe import SMALL_DETECTOR, SMALL_RECIPE, Recipe
from matcher import Group, Matches, copy_to_device, count_boxes

EPS = 1e-3         # of every inverse sigmoid; 1e-5 in Deformable DETR
GIOU_EPS = 1e-6    # added to union and enclosing area; 0 in Deformable DETR
MAX_DENOISING_QUERIES = 400    # per image
CHOICES = {"denoising": ("none", "plain", "contrastive"),
           "query_selection": ("static", "pure", "mixed")}


@dataclass
class Config:
    """The 4-scale row of Table 1: ResNet-50, 12 epochs, 49.0 AP on COCO val2017."""
    backbone: str = "resnet50"           # name of a network in backbones/
    backbone_weights: str = "imagenet"   # imagenet, a file, or none: random weights
    backbone_norm: str = "batch"         # batch or group norm without backbone_weights; else frozen
    drop_path: float = 0.0               # maximum stochastic-depth rate, linear over blocks
    num_feature_levels: int = 4          # feature maps; 4: C3 to C5 and one coarser; 5: C2 too
    denoising: str = "contrastive"       # denoising queries: none, plain or contrastive
    dn_number: int = 100                 # denoising pairs per image, in groups
    dn_label_noise: float = 0.5          # a label is resampled with half this probability
    dn_box_noise: float = 1.0            # noise of positives, in half box sides; negatives 1x to 2x
    query_selection: str = "mixed"       # queries: static (learned), pure (from encoder) or mixed
    look_forward_twice: bool = True      # train each layer's boxes by the next layer's loss too
    dim: int = 256                       # C: channels of tokens and queries
    num_heads: int = 8                   # attention heads
    num_points: int = 4                  # sampling points per attention head and feature level
    encoder_layers: int = 6              # encoder layers
    decoder_layers: int = 6              # decoder layers
    ffn_dim: int = 2048                  # hidden units of the feed-forward networks
    dropout: float = 0.0                 # dropout rate
    num_queries: int = 900               # object queries
    top_k: int = 300                     # detections per image
    cost_class: float = 2.0              # matching: weight of the class cost
    cost_l1: float = 5.0                 # matching: weight of the L1 cost of boxes
    cost_giou: float = 2.0               # matching: weight of the GIoU cost of boxes
    loss_class: float = 1.0              # weight of the class loss
    loss_l1: float = 5.0                 # weight of the L1 loss of boxes
    loss_giou: float = 2.0               # weight of the GIoU loss of boxes
    size_divisor: int = 1                # batches are padded to a multiple of this


RECIPE = Recipe(lr=1e-4, lr_backbone=1e-5, batch_size=16, epochs=12, lr_drop=11)

# Trains in minutes on two CPU cores: other sizes and optimization, the same method.
SMALL = dict(SMALL_RECIPE, **SMALL_DETECTOR, dn_number=50, top_k=100, loss_class=2.0)
# 8 GPUs of 24 GiB need --recompute for 5 scales and for large backbones, 8 of 40 GiB for both
# together, 8 of 80 GiB for none (counted by tools/predict_memory.py).
VARIANTS = {
    "5scale": dict(num_feature_levels=5),                           # 49.4 AP
    "24_epochs": dict(epochs=24, lr_drop=20),                       # 50.4 AP
    "36_epochs": dict(epochs=36, lr_drop=30),                       # 50.9 AP
    "swin_l": dict(backbone="swin_l", drop_path=0.2),               # 56.8 AP; 58.0 with 36 epochs
    # 57.3 AP; 58.5 with 36 epochs
    "swin_l_5scale": dict(backbone="swin_l", drop_path=0.2, num_feature_levels=5),
    "focalnet_l": dict(backbone="focalnet_l_3level", drop_path=0.3),     # 57.5 AP; 58.3 with 36
    # detrex's detectors, 58.0 AP and 58.5 AP: no normalized modulator
    "focalnet_l_4level": dict(backbone="focalnet_l_4level_sum", drop_path=0.3),
    "focalnet_l_5scale": dict(backbone="focalnet_l_4level_sum", drop_path=0.3,
                              num_feature_levels=5),
    # FocalNet-DINO's detector, 63.5 AP, trained on Objects365 first: normalized modulator
    "focalnet_l_o365": dict(backbone="focalnet_l_4level", drop_path=0.3, num_feature_levels=5),
}


class DINO(nn.Module):
    """Figure 2. `backbone` maps images to [C2, C3, C4, C5] and has their widths in `channels`."""
    sine = dict(temperature=20.0, shift=0.0)   # of position embeddings, as in DAB-DETR

    def __init__(self, backbone: nn.Module, cfg: Config, num_classes: int):
        super().__init__()
        for field, choices in CHOICES.items():
            if getattr(cfg, field) not in choices:
                raise UserError(f"expected {field} to be one of {', '.join(choices)}, "
                                f"got {getattr(cfg, field)!r}")
        C = cfg.dim
        self.cfg = cfg
        self.backbone = backbone
        self.num_maps = num_maps(cfg.num_feature_levels)
        channels = backbone.channels[-self.num_maps:]
        self.input_proj = input_projections(channels, C, cfg.num_feature_levels)
        self.level_embed = nn.Parameter(torch.empty(cfg.num_feature_levels, C))
        self.encoder = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.encoder_layers))
        if cfg.query_selection != "static":
            self.enc_output = nn.Linear(C, C)
            self.enc_output_norm = nn.LayerNorm(C)
        if cfg.query_selection != "pure":
            self.tgt_embed = nn.Embedding(cfg.num_queries, C)    # Xavier, as the authors initialize
        self.ref_point_head = MLP(2 * C, C, C)
        self.decoder = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.decoder_layers))
        self.decoder_norm = nn.LayerNorm(C)
        init_transformer(self)

        # All decoder layers share one pair of heads (D.3); the encoder has its own.
        classes = class_head(C, num_classes)
        boxes = box_head(C)
        self.class_embed = nn.ModuleList([classes] * cfg.decoder_layers)
        self.bbox_embed = nn.ModuleList([boxes] * cfg.decoder_layers)
        if cfg.query_selection == "static":
            # Learned boxes, before the sigmoid; uniform at the start (DAB-DETR).
            self.anchor_embed = nn.Embedding(cfg.num_queries, 4)
            self.anchor_embed.weight.data = inverse_sigmoid(torch.rand(cfg.num_queries, 4), EPS)
        else:
            self.enc_out_class_embed = deepcopy(classes)
            self.enc_out_bbox_embed = deepcopy(boxes)
        if cfg.denoising != "none":
            self.label_enc = nn.Embedding(num_classes + 1, C)    # the last row is never used

    def forward(self, images: Tensor, padding: Tensor, targets: list[dict] | None = None) -> dict:
        """Detect objects in images (B, 3, H, W) with padding (B, H, W).

        targets, needed in training: per image labels (n,) and boxes (n, 4). Returns what
        `deformable_detr.DeformableDETR.forward` does, and in training `dn_outputs`.
        """
        memory = self.encode(images, padding)
        queries, proposals = self.propose(memory)

        # In training, P denoising queries stand before the others.
        denoising = None
        attn_mask = None
        P = 0
        if self.training and self.cfg.denoising != "none":
            num_classes = self.class_embed[0].out_features
            Nq = queries.content.shape[1]
            denoising = denoising_queries(targets, self.label_enc, num_classes, self.cfg, Nq)
            attn_mask = denoising.attn_mask
            P = denoising.content.shape[1]
            content = torch.cat((denoising.content, queries.content), 1)         # (B, P + Nq, C)
            reference = torch.cat((denoising.reference, queries.reference), 1)   # (B, P + Nq, 4)
            queries = Queries(content, None, reference)
        layers, states = self.decode(memory, queries, attn_mask)

        outputs = slice_queries(layers, P)
        outputs |= {"queries": states[-1][:, P:], "anchors": queries.reference[:, P:],
                    "memory": memory}
        if proposals is not None:
            outputs["enc_outputs"] = proposals
        if denoising is not None:
            outputs["dn_outputs"] = slice_queries(layers, 0, P)
            outputs["dn_outputs"] |= {"matches": denoising.matches, "groups": denoising.groups}
        return outputs

    encode = DeformableDETR.encode   # backbone, projections and encoder are unchanged

    def propose(self, memory: Memory) -> tuple[Queries, dict | None]:
        """Section 3.4: make the decoder's input; also returns the predictions of the proposals.

        static: content and boxes are learned. pure: both come from the best tokens. mixed: boxes
        come from the best tokens, in order; row i of the learned content meets the i-th best box.
        """
        B, S, _ = memory.tokens.shape
        if self.cfg.query_selection == "static":
            content = self.tgt_embed.weight.expand(B, -1, -1)            # (B, Nq, C)
            anchors = self.anchor_embed.weight.sigmoid().expand(B, -1, -1)       # (B, Nq, 4)
            return Queries(content, None, anchors), None

        tokens, proposals = encoder_proposals(memory)                    # (B, S, C), (B, S, 4)
        tokens = self.enc_output_norm(self.enc_output(tokens))
        logits = in_float32(self.enc_out_class_embed, tokens)            # (B, S, num_classes)
        count = min(self.cfg.num_queries, S)
        best = logits.amax(-1).topk(count).indices                       # (B, Nq)
        tokens = gather_rows(tokens, best)                               # (B, Nq, C)
        offsets = in_float32(self.enc_out_bbox_embed, tokens)            # (B, Nq, 4)
        boxes = (offsets + gather_rows(proposals, best)).sigmoid()
        if self.cfg.query_selection == "pure":
            content = tokens.detach()
        else:
            content = self.tgt_embed.weight[:count].expand(B, -1, -1)    # (B, Nq, C)
        predictions = {"pred_logits": gather_rows(logits, best), "pred_boxes": boxes}
        return Queries(content, None, boxes.detach()), predictions

    def decode(self, memory: Memory, queries: Queries, attn_mask: Tensor | None = None):
        """Section 3.5: predictions of every layer, and their normalized states (B, Nq, C).

        b'_i = b_{i-1} + delta_i, b_i = detach(b'_i), b_i^(pred) = b'_{i-1} + delta_i, sums before
        the sigmoid: the loss of layer i also trains the offsets of layer i - 1. Looking forward
        once, b_i^(pred) starts from b_{i-1}.
        """
        content, _, reference = queries
        previous = reference                                             # b'_{i-1}
        layers, states = [], []
        for layer, class_embed, bbox_embed in zip(self.decoder, self.class_embed, self.bbox_embed):
            position = self.query_position(reference, memory)            # (B, Nq, C)
            content = layer(content, position, reference, memory, attn_mask)     # (B, Nq, C)
            state = self.decoder_norm(content)                           # (B, Nq, C)
            logits = in_float32(class_embed, state)                      # (B, Nq, num_classes)
            boxes = offset_boxes(in_float32(bbox_embed, state), previous, EPS)   # (B, Nq, 4)
            layers.append({"pred_logits": logits, "pred_boxes": boxes})
            states.append(state)
            updated = offset_boxes(in_float32(bbox_embed, content), reference, EPS)   # (B, Nq, 4)
            reference = updated.detach()
            previous = updated if self.cfg.look_forward_twice else reference
        return layers, states

    def query_position(self, reference: Tensor, memory: Memory) -> Tensor:
        """Embed boxes (B, Nq, 4) as positions (B, Nq, C), in every layer anew (DAB-DETR, Eq. 1-2).
        Boxes are relative to the finest padded level."""
        boxes = reference * memory.valid_ratios[:, None, 0].repeat(1, 1, 2)      # (B, Nq, 4)
        x, y, w, h = boxes.unbind(-1)
        boxes = torch.stack((y, x, w, h), -1)
        embedding = sine_embedding(boxes, memory.tokens.shape[-1] // 2).flatten(2)   # (B, Nq, 2 C)
        return self.ref_point_head(embedding.to(memory.tokens.dtype))    # (B, Nq, C)


def num_maps(levels: int) -> int:
    """How many backbone maps become feature levels: at most C3 to C5, with five levels also C2."""
    return 4 if levels >= 5 else min(levels, 3)


class Denoising(NamedTuple):
    """Noised objects as extra queries."""
    content: Tensor      # (B, P, C)
    reference: Tensor    # (B, P, 4) in [0, 1]
    attn_mask: Tensor    # (P + Nq, P + Nq), True = blocked
    matches: Matches     # per image: positive queries and the objects they must recover
    groups: int          # G


class Noise(NamedTuple):
    """Random numbers for R copies of T objects."""
    relabel: Tensor      # (R, T) uniform in [0, 1); below half the label noise: change the label
    labels: Tensor       # (R, T) new labels
    sign: Tensor         # (R, T, 4) -1 or 1
    amount: Tensor       # (R, T, 4) uniform in [0, 1)


def draw_noise(copies: int, objects: int, num_classes: int, device) -> Noise:
    """Draw the random numbers of one batch."""
    relabel = torch.rand(copies, objects, device=device)
    labels = torch.randint(num_classes, (copies, objects), device=device)
    sign = torch.randint(2, (copies, objects, 4), device=device) * 2.0 - 1
    amount = torch.rand(copies, objects, 4, device=device)
    return Noise(relabel, labels, sign, amount)


def denoising_groups(number: int, most: int, per_object: int) -> int:
    """Appendix D.1: as many groups as fit `number` pairs into the image with the `most` objects, at
    least 1. If `number` is below 50: 2 `number` groups (code). Never more than
    MAX_DENOISING_QUERIES allows. per_object: queries of an object in each group."""
    if most == 0:
        return 1
    groups = number // most if number >= 50 else 2 * number
    limit = max(MAX_DENOISING_QUERIES, 2 * number) // (per_object * most)
    return max(1, min(groups, limit))


def denoising_queries(targets: list[dict], label_enc: nn.Embedding, num_classes: int, cfg,
                      num_queries: int) -> Denoising:
    """Section 3.3: copy every object into G groups, as a positive query (noise below the scale)
    and, if contrastive, as a negative query (noise of one to two scales).

    Copy e of object j of an image is its denoising query e N + j, so a group is [N positives |
    N negatives]. Where an image has fewer than N objects, queries have zeros for content and the
    box (0.5, 0.5, 0.5, 0.5). To use it elsewhere, in training: put content and reference before
    your own queries, give attn_mask to self-attention, split off the first P outputs of every layer
    and compute their loss with `Criterion.denoising`. Of cfg it reads `denoising` and dn_*.
    """
    device = label_enc.weight.device
    per_object = 2 if cfg.denoising == "contrastive" else 1
    limit = MAX_DENOISING_QUERIES // per_object
    chosen = [choose_objects(len(t["labels"]), limit) for t in targets]
    B = len(targets)
    N = max(len(c) for c in chosen)
    G = denoising_groups(cfg.dn_number, N, per_object)
    R = G * per_object
    P = R * N

    # For each chosen object: its image b, its number j there, its row among all objects.
    first = 0
    columns = []
    for b, (target, c) in enumerate(zip(targets, chosen)):
        columns.append(torch.stack((torch.full_like(c, b), torch.arange(len(c)), first + c)))
        first += len(target["labels"])
    image, j, row = copy_to_device(torch.cat(columns, 1), device)        # (T,) each
    labels = torch.cat([t["labels"] for t in targets])[row]              # (T,)
    boxes = torch.cat([t["boxes"] for t in targets])[row]                # (T, 4)

    # Labels and boxes of all copies, with noise.
    noise = draw_noise(R, len(labels), num_classes, device)
    copies = torch.arange(R, device=device)
    negative = copies % per_object == 1                                  # (R,)
    labels = torch.where(noise.relabel < cfg.dn_label_noise / 2, noise.labels, labels)   # (R, T)
    noised = noised_boxes(boxes, noise, negative, cfg.dn_box_noise)      # (R, T, 4)
    noised = inverse_sigmoid(noised, EPS).sigmoid()                      # away from 0 and 1

    # Copies as queries.
    query = copies[:, None] * N + j                                      # (R, T)
    where = (image.expand_as(query), query)
    content = label_enc.weight.new_zeros(B, P, label_enc.embedding_dim)
    content = content.index_put(where, label_enc(labels))                # (B, P, C)
    reference = boxes.new_full((B, P, 4), 0.5).index_put(where, noised)  # (B, P, 4)
    attn_mask = denoising_mask(P, per_object * N, num_queries, device)

    # Matches, on the host: every positive of a group recovers its object.
    matches = []
    for c in chosen:
        positives = torch.arange(G)[:, None] * per_object * N + torch.arange(len(c))     # (G, n)
        matches.append((positives.flatten(), c.repeat(G)))
    return Denoising(content, reference, attn_mask, matches, G)


def choose_objects(count: int, most: int) -> Tensor:
    """Indices of the objects of an image, at most `most` of them at random."""
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count)[:most].sort().values


def noised_boxes(boxes: Tensor, noise: Noise, negative: Tensor, scale: float) -> Tensor:
    """Move each corner coordinate of boxes (T, 4) to either side, within the image -> (R, T, 4): by
    [0, 1), for `negative` copies (R,) [1, 2), times `scale` times half the width or height."""
    amount = (noise.amount + negative[:, None, None]) * noise.sign       # (R, T, 4)
    half = boxes[:, 2:].repeat(1, 2) / 2                                 # (T, 4)
    corners = box_cxcywh_to_xyxy(boxes) + amount * half * scale          # (R, T, 4)
    return box_xyxy_to_cxcywh(corners.clamp(0, 1))


def denoising_mask(count: int, group_size: int, num_queries: int, device) -> Tensor:
    """Attention mask (P + Nq, P + Nq), row = query, column = key, True = blocked (DN-DETR, Eq. 7):
    the P = `count` denoising queries are hidden from other groups and from matching queries."""
    group = torch.full((count + num_queries,), -1, device=device)        # -1: matching queries
    group[:count] = torch.arange(count, device=device) // max(1, group_size)
    return (group >= 0) & (group[:, None] != group)


class Criterion(deformable_detr.Criterion):
    """The set loss of every decoder layer and of the selected proposals, and the denoising loss."""

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.set_loss.eps = GIOU_EPS

    def __call__(self, outputs: dict, targets: list[dict], num_boxes=None) -> dict[str, Tensor]:
        """Compute the weighted losses {"cls", "l1", "giou", "aux0.cls", ..., "enc.cls", ...,
        "dn.cls", "dn.aux0.cls", ...}. Arguments as in `deformable_detr.Criterion`."""
        if num_boxes is None:
            num_boxes = count_boxes(targets)
        losses = super().__call__(outputs, targets, num_boxes)
        if "dn_outputs" in outputs:
            losses |= self.denoising(outputs["dn_outputs"], targets, num_boxes)
        return losses

    def groups(self, outputs: dict, targets: list[dict]) -> list[Group]:
        """List what is to be matched: the decoder layers and the selected proposals."""
        layers = named_layers(outputs)
        if "enc_outputs" in outputs:
            layers["enc"] = outputs["enc_outputs"]
        return [Group(layers, targets)]

    def denoising(self, outputs: dict, targets: list[dict], num_boxes) -> dict[str, Tensor]:
        """Section 3.3: positives recover their object, all others are background. No matching."""
        layers = named_layers(outputs, "dn")
        matches = [outputs["matches"]] * len(layers)
        divisor = num_boxes * outputs["groups"]
        return self.set_loss.compute_losses(layers, targets, matches, divisor)


def build(cfg: Config, num_classes: int) -> tuple[DINO, Criterion]:
    """Make the model, with random weights, and its criterion."""
    maps = num_maps(cfg.num_feature_levels)
    backbone = build_backbone(cfg.backbone, cfg.backbone_weights, cfg.backbone_norm, maps=maps,
                              drop_path=cfg.drop_path)
    if len(backbone.channels) != 4:
        raise UserError(f"expected a backbone of four maps, got {cfg.backbone} with "
                        f"{len(backbone.channels)}: choose a ResNet, Swin or FocalNet")
    return DINO(backbone, cfg, num_classes), Criterion(cfg)


def param_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Group trainable parameters by learning rate: backbone and the rest (Table 8)."""
    backbone, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = backbone if name.startswith("backbone.") else rest
            group.append(parameter)
    return [{"params": rest, "lr": recipe.lr}, {"params": backbone, "lr": recipe.lr_backbone}]
