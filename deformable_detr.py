"""Deformable DETR: Deformable Transformers for End-to-End Object Detection (Zhu et al., ICLR 2021, arXiv 2010.04159).

The idea: attention over a feature map costs the square of its pixels, so let every query look at K learned points per
head and level instead. The encoder becomes linear in the pixels, several feature levels become affordable without an
FPN, small objects are found, and 50 epochs are enough where DETR needs 500. No anchors to tune, no NMS.

    paper                                          here
    section 4.1, Eq. 2-3 deformable attention      deformable_attn.MSDeformAttn
    section 4.1, Appendix A.2 multi-scale maps     input_projections, project, flatten_pyramid
    section 4.1 encoder                            DeformableDETR.encode, EncoderLayer, encoder_references
    section 4.1, A.3 decoder, boxes from offsets   DeformableDETR.decode, DecoderLayer, offset_boxes
    section 4.2, A.4 iterative box refinement      `with_box_refine` in DeformableDETR.decode, offset_boxes
    section 4.2, A.4 two-stage                     DeformableDETR.propose_two_stage, encoder_proposals
    A.4 initialisation                             init_transformer, prediction_heads
    section 5 set loss with focal classification   Criterion, matcher.SetLoss
    detections (DETR, code)                        detect

    symbol     here
    x_l        one level of the pyramid, (B, C, H_l, W_l); all of them flattened: the first Memory.tokens (B, S, C)
    p_q        Queries.reference, a point (B, Nq, 2) or a box (B, Nq, 4); b_q the boxes that refinement makes of it
    z_q        Queries.content (B, Nq, C); its position embedding: Queries.position (B, Nq, C)

B images, S = sum of H_l W_l tokens, Nq queries, C channels, M heads, L levels, K points. Boxes are cx, cy, w, h in [0, 1]
of the unpadded image; `padding` is True on padding.

Departs
 1. Optimiser AdamW, as the authors' code (the paper says Adam).
 2. Without refinement all decoder layers share one class and one box head (code; the paper does not say).
 3. Refinement: offsets are divided by K and scaled by half the box, rather than initialised 2K times smaller (code).
 4. Refinement starts from a point, not from a box of size 0.1; the first box head's bias of -2 sets its size (code).
 5. Two-stage: objectness is column 0 of the class logits, trained with all labels set to 0 (code; paper: binary layer).
 6. The box head runs once a layer; the authors evaluate it twice on the same input.
 7. In two-stage there are at most as many queries as tokens, so that images of any size work.
 8. Two-stage: content and position of a query both come from its box's sine embedding (code; the paper speaks of
    positional embeddings only).
 9. Classes are 0..n-1 of the data, not the 91 columns of COCO's ids; `checkpoints.py` maps released weights.
10. `train.py` computes in bfloat16 autocast where the hardware has it (`--amp false` does not; the authors use float32),
    and skips a step whose loss is not finite, where the authors stop.
"""
import math
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import UserError
from backbones import build_backbone
from boxes import box_cxcywh_to_xyxy, inverse_sigmoid
from deformable_attn import MSDeformAttn
from engine.recipe import SMALL_DETECTOR, SMALL_RECIPE, Recipe
from matcher import Group, Matches, SetLoss, Weights, at_least_float32, count_boxes


@dataclass
class Config:
    """The multi-scale row of the official table: ResNet-50, 50 epochs, 44.5 AP on COCO val2017."""
    backbone: str = "resnet50"
    backbone_weights: str = "imagenet"     # imagenet, a file, or none: trained from scratch with live normalisation
    backbone_norm: str = "batch"           # batch or group; published weights come with their own frozen statistics
    dilation: bool = False                 # DC5: the last stage keeps stride 16 (41.5 AP, with num_feature_levels 1)
    num_feature_levels: int = 4            # 1: C5 alone (39.4 AP)
    with_box_refine: bool = False          # iterative bounding box refinement (46.2 AP)
    two_stage: bool = False                # queries from encoder proposals (46.9 AP, with with_box_refine)
    dim: int = 256
    num_heads: int = 8
    num_points: int = 4
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn_dim: int = 1024
    dropout: float = 0.1
    num_queries: int = 300
    top_k: int = 100                       # detections kept per image
    cost_class: float = 2.0
    cost_l1: float = 5.0
    cost_giou: float = 2.0
    loss_class: float = 2.0
    loss_l1: float = 5.0
    loss_giou: float = 2.0
    size_divisor: int = 1                  # batches are padded to a multiple of this


RECIPE = Recipe(lr=2e-4, lr_backbone=2e-5, lr_offsets=2e-5, batch_size=32, epochs=50, lr_drop=40)


# What learns in minutes on two CPU cores: sizes and optimisation change, the method does not.
SMALL = dict(SMALL_RECIPE, **SMALL_DETECTOR, dropout=0.0)
VARIANTS = {
    "single_scale": dict(num_feature_levels=1),
    "dc5": dict(num_feature_levels=1, dilation=True),
    "refine": dict(with_box_refine=True),
    "two_stage": dict(with_box_refine=True, two_stage=True),
}


class Queries(NamedTuple):
    """What the decoder starts from."""
    content: Tensor              # (B, Nq, C)
    position: Tensor | None      # (B, Nq, C), added to content wherever it attends
    reference: Tensor            # (B, Nq, 2 or 4) in [0, 1]: a point or a box


class Memory(NamedTuple):
    """All feature levels as one sequence, finest first, each row by row: what the encoder takes and, with other tokens,
    hands on. The last three fields are for heads and analyses that read the encoder's output elsewhere."""
    tokens: Tensor               # (B, S, C)
    positions: Tensor            # (B, S, C) sine and level embeddings
    padding: Tensor              # (B, S) True on padding
    shapes: list                 # [(H_l, W_l), ...]
    valid_ratios: Tensor         # (B, L, 2) share of width and height that is not padding
    features: list               # the backbone's [C2, C3, C4, C5]
    image_sizes: Tensor          # (B, 2) height and width without padding, pixels
    padded_size: tuple           # (H, W) pixels

    def by_level(self, x: Tensor) -> tuple[Tensor, ...]:
        """What belongs to tokens (B, S, ...) -> the same for each level, (B, H_l W_l, ...)."""
        return x.split([H * W for H, W in self.shapes], 1)


class DeformableDETR(nn.Module):
    """Figure 1 of the paper. `backbone` maps images to [C2, C3, C4, C5] and lists their widths in `backbone.channels`."""

    def __init__(self, backbone: nn.Module, cfg: Config, num_classes: int):
        super().__init__()
        if cfg.two_stage and not cfg.with_box_refine:
            raise UserError("expected with_box_refine beside two_stage (proposals are refined layer by layer), got "
                            "two_stage alone: add --with_box_refine true")
        self.cfg = cfg
        C = cfg.dim
        self.backbone = backbone
        self.num_maps = num_maps(cfg.num_feature_levels)
        self.input_proj = input_projections(backbone.channels[-self.num_maps:], C, cfg.num_feature_levels)
        self.level_embed = nn.Parameter(torch.empty(cfg.num_feature_levels, C))
        self.encoder = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.decoder_layers))
        if cfg.two_stage:
            self.enc_output, self.enc_output_norm = nn.Linear(C, C), nn.LayerNorm(C)
            self.pos_trans, self.pos_trans_norm = nn.Linear(2 * C, 2 * C), nn.LayerNorm(2 * C)
        else:
            self.reference_points = nn.Linear(C, 2)
        init_transformer(self)
        if not cfg.two_stage:
            nn.init.zeros_(self.reference_points.bias)
            self.query_embed = nn.Embedding(cfg.num_queries, 2 * C)   # [position, content]
        self.class_embed, self.bbox_embed = prediction_heads(cfg, num_classes)

    def forward(self, images: Tensor, padding: Tensor, targets=None) -> dict:
        """images (B, 3, H, W), padding (B, H, W) -> outputs: `pred_logits` (B, Nq, num_classes), `pred_boxes` (B, Nq, 4),
        the same of earlier layers in `aux_outputs` and of the encoder in `enc_outputs` (two-stage), the last decoder
        states `queries` (B, Nq, C), `anchors` (B, Nq, 2 or 4) they started from, and `memory`."""
        memory = self.encode(images, padding)
        queries, enc = self.propose(memory)
        layers, states = self.decode(memory, queries)
        outputs = {**layers[-1], "aux_outputs": layers[:-1], "queries": states[-1], "anchors": queries.reference,
                   "memory": memory}
        return outputs | ({"enc_outputs": enc} if enc else {})

    def encode(self, images: Tensor, padding: Tensor) -> Memory:
        """Section 4.1: backbone maps -> L levels of C channels -> tokens that have looked at each other."""
        images, padding = pad_to_multiple(images, padding, self.cfg.size_divisor)
        features = self.backbone(images)
        pyramid = project(self.input_proj, features[-self.num_maps:])              # [(B, C, H_l, W_l)]
        memory = flatten_pyramid(pyramid, padding, self.level_embed, features)
        references = encoder_references(memory)                                    # (B, S, L, 2)
        for layer in self.encoder:
            memory = memory._replace(tokens=layer(memory, references))
        return memory

    def propose(self, memory: Memory) -> tuple[Queries, dict | None]:
        """The decoder's start: learned queries whose reference points a linear layer reads off their position."""
        if self.cfg.two_stage:
            return self.propose_two_stage(memory)
        position, content = self.query_embed.weight.expand(len(memory.tokens), -1, -1).chunk(2, -1)   # (B, Nq, C)
        reference = at_least_float32(self.reference_points(position)).sigmoid()    # in bfloat16 boxes would be off by pixels
        return Queries(content, position, reference), None

    def propose_two_stage(self, memory: Memory) -> tuple[Queries, dict]:
        """Appendix A.4: every token proposes one box; the best become the references, and their coordinates, embedded,
        the queries. -> queries and the predictions of all S tokens."""
        tokens, proposals = encoder_proposals(memory)                              # (B, S, C), (B, S, 4)
        tokens = self.enc_output_norm(self.enc_output(tokens))
        logits = self.class_embed[-1](tokens)                                      # (B, S, num_classes)
        boxes = self.bbox_embed[-1](tokens) + proposals                            # (B, S, 4) before the sigmoid
        best = logits[..., 0].topk(min(self.cfg.num_queries, tokens.shape[1])).indices                # (B, Nq)
        reference = take(boxes, best).detach().sigmoid()                           # (B, Nq, 4)
        embedding = sine_embedding(reference, tokens.shape[-1] // 2).flatten(2)    # (B, Nq, 2 C), cx cy w h
        queries = self.pos_trans_norm(self.pos_trans(embedding.to(tokens.dtype)))
        position, content = queries.chunk(2, -1)
        return Queries(content, position, reference), {"pred_logits": logits, "pred_boxes": boxes.sigmoid()}

    def decode(self, memory: Memory, queries: Queries, attn_mask: Tensor | None = None) -> tuple[list, list]:
        """Sections 4.1 and 4.2: -> predictions of every layer and their states (B, Nq, C).

        A box is an offset from the reference: its centre relative to a point (A.3), all of it relative to a box. With
        refinement each layer's box, detached, is the next layer's reference: b_d = sigmoid(delta_d + logit(b_d-1))."""
        content, position, reference = queries
        layers, states = [], []
        for layer, class_head, box_head in zip(self.decoder, self.class_embed, self.bbox_embed):
            content = layer(content, position, reference, memory, attn_mask)       # (B, Nq, C)
            boxes = offset_boxes(box_head(content), reference)                     # (B, Nq, 4)
            layers.append({"pred_logits": class_head(content), "pred_boxes": boxes})
            states.append(content)
            if self.cfg.with_box_refine:
                reference = boxes.detach()
        return layers, states


def pad_to_multiple(images: Tensor, padding: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Fills up to the right and below until both sides are multiples of `divisor`. Otherwise the cells of a coarse level that
    count as valid vary with the other images of a batch: one in 25 at 800 pixels, one in 4 at 128."""
    fill = (0, -images.shape[3] % divisor, 0, -images.shape[2] % divisor)
    return (F.pad(images, fill), F.pad(padding, fill, value=True)) if any(fill) else (images, padding)   # F.pad always copies


def num_maps(levels: int) -> int:
    """How many of the backbone's maps become feature levels: C5 for a single one, C3..C5, from five levels on C2..C5."""
    return 1 if levels == 1 else 3 if levels < 5 else 4


def input_projections(channels: list[int], dim: int, levels: int) -> nn.ModuleList:
    """Appendix A.2: a 1x1 convolution for each backbone map, then 3x3 convolutions of stride 2, the first of them on the
    last backbone map itself, the others on the level before."""
    layers = [nn.Conv2d(c, dim, 1) for c in channels]
    layers += [nn.Conv2d(channels[-1] if i == 0 else dim, dim, 3, 2, 1) for i in range(levels - len(channels))]
    for conv in layers:
        nn.init.xavier_uniform_(conv.weight)
        nn.init.zeros_(conv.bias)
    return nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(32, dim)) for conv in layers)


def project(projections: nn.ModuleList, maps: list[Tensor]) -> list[Tensor]:
    """Backbone maps -> all levels, each (B, C, H_l, W_l)."""
    levels = [p(x) for p, x in zip(projections, maps)]
    x = maps[-1]
    for p in projections[len(maps):]:
        x = p(x)
        levels.append(x)
    return levels


def flatten_pyramid(pyramid: list[Tensor], padding: Tensor, level_embed: Tensor, features: list, **sine) -> Memory:
    """Levels [(B, C, H_l, W_l)] -> Memory whose tokens have not attended yet. `sine`: options of `sine_positions`."""
    tokens, positions, paddings, ratios = [], [], [], []
    for x, embed in zip(pyramid, level_embed):
        mask = F.interpolate(padding[:, None].float(), x.shape[-2:])[:, 0].bool()                  # (B, H_l, W_l)
        position = sine_positions(mask, x.shape[1], **sine).to(level_embed.dtype)                 # (B, H_l W_l, C)
        tokens.append(x.flatten(2).transpose(1, 2))                                                # (B, H_l W_l, C)
        positions.append(position + embed)
        paddings.append(mask.flatten(1))                                                           # (B, H_l W_l)
        ratios.append(torch.stack(((~mask[:, 0]).float().mean(1), (~mask[:, :, 0]).float().mean(1)), -1))   # (B, 2)
    sizes = torch.stack(((~padding[:, :, 0]).sum(1), (~padding[:, 0]).sum(1)), -1)                 # (B, 2)
    return Memory(torch.cat(tokens, 1), torch.cat(positions, 1), torch.cat(paddings, 1),
                  [tuple(x.shape[-2:]) for x in pyramid], torch.stack(ratios, 1), features, sizes,
                  tuple(padding.shape[-2:]))


def sine_positions(padding: Tensor, dim: int, temperature: float = 10000.0, shift: float = 0.5) -> Tensor:
    """Position embedding (B, H W, dim) of the cells of a map, from padding (B, H, W): first half y, second half x.

    Rows and columns are counted over the cells that are not padding and divided by their number; `shift` 0.5 counts
    from the middle of a cell (Deformable DETR), 0 from its far side (DETR, DINO)."""
    y, x = ((~padding).cumsum(axis).float() for axis in (1, 2))                    # (B, H, W); sums of integers: one order
    y = (y - shift) / (y[:, -1:] + 1e-6)
    x = (x - shift) / (x[:, :, -1:] + 1e-6)
    return torch.cat([sine_embedding(v, dim // 2, temperature) for v in (y, x)], -1).flatten(1, 2)   # (B, H W, dim)


def sine_embedding(x: Tensor, features: int, temperature: float = 10000.0) -> Tensor:
    """(...) in [0, 1] -> (..., features): sin and cos in turn, of 2 pi x / temperature^(2 i / features)."""
    i = torch.arange(features // 2, dtype=x.dtype, device=x.device)
    angle = 2 * math.pi * x[..., None] / temperature ** (2 * i / features)         # (..., features / 2)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)                 # (..., features)


def cell_centers(shapes: list, device) -> list[Tensor]:
    """Per level (H W, 2): x + 0.5 and y + 0.5 of every cell, row by row."""
    return [torch.cartesian_prod(torch.arange(H, device=device) + 0.5,
                                 torch.arange(W, device=device) + 0.5).flip(-1) for H, W in shapes]


def encoder_references(memory: Memory) -> Tensor:
    """Section 4.1: a token's reference point in every level is its own place: (B, S, L, 2) in [0, 1] of padded levels.

    Dividing by its own level's valid ratio makes the place relative to the image; multiplying by another level's ratio
    finds it there, where rounding has left a slightly different share of padding."""
    own = [centers / torch.tensor([W, H], device=centers.device) / ratio[:, None]
           for centers, (H, W), ratio in zip(cell_centers(memory.shapes, memory.tokens.device), memory.shapes,
                                             memory.valid_ratios.unbind(1))]       # [(B, H_l W_l, 2)]
    return torch.cat(own, 1)[:, :, None] * memory.valid_ratios[:, None]            # (B, S, L, 2)


class EncoderLayer(nn.Module):
    """Deformable self-attention of all tokens and a feed-forward network, each with a residual, normalised after."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.dim
        self.self_attn = MSDeformAttn(C, cfg.num_heads, cfg.num_feature_levels, cfg.num_points)
        self.norm1 = nn.LayerNorm(C)
        self.linear1, self.linear2 = nn.Linear(C, cfg.ffn_dim), nn.Linear(cfg.ffn_dim, C)
        self.norm2 = nn.LayerNorm(C)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, memory: Memory, references: Tensor) -> Tensor:
        """tokens (B, S, C) and references (B, S, L, 2) -> tokens (B, S, C)."""
        x = memory.tokens
        looked = self.self_attn(x + memory.positions, references, x, memory.shapes, memory.padding)
        x = self.norm1(x + self.dropout(looked))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class DecoderLayer(nn.Module):
    """Queries attend to each other, then deformably to the memory, then a feed-forward network. The numbers of the norms
    are those of the released weights: norm2 follows self-attention, norm1 cross-attention."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.dim
        self.self_attn = SelfAttention(C, cfg.num_heads, cfg.dropout)
        self.norm2 = nn.LayerNorm(C)
        self.cross_attn = MSDeformAttn(C, cfg.num_heads, cfg.num_feature_levels, cfg.num_points)
        self.norm1 = nn.LayerNorm(C)
        self.linear1, self.linear2 = nn.Linear(C, cfg.ffn_dim), nn.Linear(cfg.ffn_dim, C)
        self.norm3 = nn.LayerNorm(C)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, memory: Memory, attn_mask=None) -> Tensor:
        """x and position (B, Nq, C), reference (B, Nq, 2 or 4) of the unpadded image, attn_mask (Nq, Nq) True = blocked
        -> (B, Nq, C)."""
        x = self.norm2(x + self.dropout(self.self_attn(x, position, attn_mask)))
        references = per_level(reference, memory.valid_ratios)                     # (B, Nq, L, 2 or 4)
        looked = self.cross_attn(x + position, references, memory.tokens, memory.shapes, memory.padding)
        x = self.norm1(x + self.dropout(looked))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


def per_level(reference: Tensor, valid_ratios: Tensor) -> Tensor:
    """Points or boxes (B, Nq, 2 or 4) of the unpadded image -> (B, Nq, L, 2 or 4) of each padded level."""
    return reference[:, :, None] * valid_ratios[:, None].repeat(1, 1, 1, reference.shape[-1] // 2)


class SelfAttention(nn.Module):
    """Multi-head attention of queries among themselves; parameters named and shaped as in torch.nn.MultiheadAttention,
    written out because a CPU's fused attention has a slow backward pass with a mask."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))              # rows: query, key, value
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, position: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """x (B, Nq, C) with position (B, Nq, C) added to queries and keys but not to values -> (B, Nq, C)."""
        C = x.shape[-1]
        qk = F.linear(x + position, self.in_proj_weight[:2 * C], self.in_proj_bias[:2 * C])
        v = F.linear(x, self.in_proj_weight[2 * C:], self.in_proj_bias[2 * C:])
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (*qk.chunk(2, -1), v))  # (B, M, Nq, D)
        dropout = self.dropout if self.training else 0.0
        if x.is_cuda:
            mask = None if attn_mask is None else ~attn_mask
            x = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        else:   # the fused form has a slow backward on CPUs once there is a mask
            scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-2, -1)              # (B, M, Nq, Nq)
            if attn_mask is not None:
                scores = scores.masked_fill(attn_mask, -math.inf)
            x = F.dropout(scores.softmax(-1), dropout) @ v                         # (B, M, Nq, D)
        return self.out_proj(x.transpose(1, 2).flatten(2))                         # (B, Nq, C)


class MLP(nn.Module):
    """Linear layers with ReLU between them; `widths` from input to output."""

    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def offset_boxes(offsets: Tensor, reference: Tensor, eps: float = 1e-5) -> Tensor:
    """A.3 and A.4: box offsets (..., 4) and their reference (..., 2 or 4) in [0, 1] -> boxes (..., 4) in [0, 1].
    Beside a point, width and height are absolute."""
    base = inverse_sigmoid(reference, eps)
    if base.shape[-1] == 2:
        base = F.pad(base, (0, 2))                                                 # (..., 4)
    return (offsets + base).sigmoid()


@torch.no_grad()
def proposal_boxes(memory: Memory) -> tuple[Tensor, Tensor]:
    """A.4: the box each token proposes, (B, S, 4) in [0, 1], and whether it is usable, (B, S): its centre is the cell's,
    its size 0.05 * 2^level, 0 being the finest; usable if the cell is not padding and every coordinate lies strictly within
    (0.01, 0.99)."""
    boxes = []
    for level, (centers, (H, W)) in enumerate(zip(cell_centers(memory.shapes, memory.tokens.device), memory.shapes)):
        valid = (memory.valid_ratios[:, None, level] * torch.tensor([W, H], device=centers.device)).round()   # (B, 1, 2)
        boxes.append(F.pad(centers / valid, (0, 2), value=0.05 * 2 ** level))      # (B, H_l W_l, 4)
    boxes = torch.cat(boxes, 1)
    return boxes, ((boxes > 0.01) & (boxes < 0.99)).all(-1) & ~memory.padding


def encoder_proposals(memory: Memory) -> tuple[Tensor, Tensor]:
    """-> tokens (B, S, C), zero where the proposal is not usable, and proposals (B, S, 4) before the sigmoid, infinite
    there: whatever a head adds, the box is (1, 1, 1, 1) and passes no gradient."""
    boxes, usable = proposal_boxes(memory)
    safe = boxes.where(usable[..., None], torch.full_like(boxes, 0.5))
    logits = (safe / (1 - safe)).log().masked_fill(~usable[..., None], math.inf)
    return memory.tokens.masked_fill(~usable[..., None], 0), logits


def take(x: Tensor, index: Tensor) -> Tensor:
    """x (B, S, C) at index (B, k) -> (B, k, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def init_transformer(model: nn.Module):
    """Xavier for every matrix outside backbone and input projections, then the deformable attention's own start, then
    N(0, 1) level embeddings. Call it before the prediction heads exist: they keep torch.nn.Linear's initialisation."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.startswith(("backbone.", "input_proj.")):
            nn.init.xavier_uniform_(parameter)
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            module.reset_parameters()
    nn.init.normal_(model.level_embed)


def prediction_heads(cfg: Config, num_classes: int) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Class and box heads, one pair per decoder layer: the same pair without refinement, copies of it with refinement,
    and one more for the encoder's proposals in two-stage. Initially every class has probability 0.01 and every box is
    its reference; beside a point, width and height start at sigmoid(-2) = 0.119."""
    classes, boxes = class_head(cfg.dim, num_classes), box_head(cfg.dim)
    if not cfg.two_stage:
        nn.init.constant_(boxes.layers[-1].bias[2:], -2.0)
    if not cfg.with_box_refine:
        return nn.ModuleList([classes] * cfg.decoder_layers), nn.ModuleList([boxes] * cfg.decoder_layers)
    count = cfg.decoder_layers + cfg.two_stage
    classes, boxes = (nn.ModuleList(deepcopy(head) for _ in range(count)) for head in (classes, boxes))
    for head in boxes[1:]:
        nn.init.zeros_(head.layers[-1].bias)
    return classes, boxes


def class_head(dim: int, num_classes: int) -> nn.Linear:
    """Logits whose bias makes every class's first probability 0.01 (focal loss, Lin et al. 2017, section 4.1)."""
    head = nn.Linear(dim, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))
    return head


def box_head(dim: int) -> MLP:
    """Box offsets, zero at first."""
    head = MLP(dim, dim, dim, 4)
    nn.init.zeros_(head.layers[-1].weight)
    nn.init.zeros_(head.layers[-1].bias)
    return head


class Criterion:
    """Section 5: the set loss of every decoder layer and, in two-stage, of the encoder's proposals with all labels 0."""

    def __init__(self, cfg: Config):
        self.set_loss = SetLoss(Weights(cfg.cost_class, cfg.cost_l1, cfg.cost_giou),
                                Weights(cfg.loss_class, cfg.loss_l1, cfg.loss_giou))

    def __call__(self, outputs: dict, targets: list[dict], num_boxes: float | None = None) -> dict:
        """-> weighted losses {"cls", "l1", "giou", "aux0.cls", ..., "enc.cls", ...}; their sum is the training loss.
        `num_boxes`: what to divide by, when the batch is spread over ranks or micro-batches: their objects, averaged over
        ranks."""
        groups = self.groups(outputs, targets)
        losses = {}
        for group, matches in zip(groups, self.set_loss.match_groups(groups)):
            divisor = count_boxes(targets, group.copies) if num_boxes is None else num_boxes * group.copies
            losses |= self.set_loss.compute_losses(group.layers, group.targets, matches, divisor)
        return losses

    def groups(self, outputs: dict, targets: list[dict]) -> list[Group]:
        """The decoder layers and, in two-stage, the encoder's proposals, for which every object has label 0."""
        groups = [Group(named_layers(outputs), targets)]
        if "enc_outputs" in outputs:
            binary = [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]
            groups.append(Group({"enc": outputs["enc_outputs"]}, binary))
        return groups

    def match(self, outputs: dict, targets: list[dict]) -> Matches:
        """Match the last layer: per image query and object indices, on the host."""
        return self.set_loss.match(outputs, targets)


def named_layers(outputs: dict) -> dict[str, dict]:
    """{"": last layer, "aux0": first layer, ...}: the names under which losses are logged."""
    return {"": outputs} | {f"aux{i}": layer for i, layer in enumerate(outputs["aux_outputs"])}


def build(cfg: Config, num_classes: int) -> tuple[DeformableDETR, Criterion]:
    """Model with random weights, and its criterion."""
    backbone = build_backbone(cfg.backbone, cfg.backbone_weights, cfg.backbone_norm, cfg.dilation,
                              num_maps(cfg.num_feature_levels))
    return DeformableDETR(backbone, cfg, num_classes), Criterion(cfg)


def param_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Trainable parameters in three groups with their learning rates: backbone, offsets and reference points, the rest."""
    groups = {lr: {"params": [], "lr": getattr(recipe, lr)} for lr in ("lr", "lr_backbone", "lr_offsets")}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            slow = "sampling_offsets" in name or "reference_points" in name
            groups["lr_backbone" if name.startswith("backbone.") else "lr_offsets" if slow else "lr"]["params"].append(
                parameter)
    return list(groups.values())


@torch.no_grad()
def detect(outputs: dict, sizes: Tensor, cfg: Config) -> list[dict]:
    """The `cfg.top_k` best (query, class) pairs of each image by score, best first; no threshold, no NMS.

    sizes (B, 2): height and width, pixels, of the images the boxes are wanted in
    -> B dictionaries: scores (k,), labels (k,), boxes (k, 4) xyxy pixels, query (k,)."""
    scores = at_least_float32(outputs["pred_logits"]).sigmoid()                    # (B, Nq, num_classes)
    num_classes = scores.shape[-1]
    scores, best = scores.flatten(1).topk(min(cfg.top_k, scores[0].numel()))       # (B, k)
    query, labels = best // num_classes, best % num_classes
    boxes = take(box_cxcywh_to_xyxy(at_least_float32(outputs["pred_boxes"])), query)                 # (B, k, 4)
    boxes = boxes * sizes.to(boxes)[:, None, [1, 0, 1, 0]]
    return [dict(zip(("scores", "labels", "boxes", "query"), image)) for image in zip(scores, labels, boxes, query)]
