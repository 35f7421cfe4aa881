"""Deformable DETR: Deformable Transformers for End-to-End Object Detection (Zhu et al., ICLR 2021,
arXiv 2010.04159).

The idea: attention over a feature map costs the square of its number of cells. Here each query
samples only K learned points per head and level. The encoder becomes linear in the number of cells,
several feature levels become affordable without an FPN, small objects are found, and 50 epochs are
enough where DETR needs 500. There are no anchors to tune, and no NMS.

    paper                                          here
    section 4.1, Eq. 2-3 deformable attention      deformable_attn.MSDeformAttn
    section 4.1, Appendix A.2 multi-scale maps     input_projections, project, flatten_pyramid
    section 4.1 encoder                            encode, EncoderLayer, encoder_references
    section 4.1, A.3 decoder, boxes from offsets   decode, DecoderLayer, offset_boxes
    section 4.2, A.4 iterative box refinement      `with_box_refine` in decode, offset_boxes
    section 4.2, A.4 two-stage                     propose_two_stage, encoder_proposals
    A.4 initialization                             init_transformer, prediction_heads
    section 5 set loss with focal classification   Criterion, matcher.SetLoss

    symbol     here
    x_l        one level of the pyramid, (B, C, H_l, W_l); all of them flattened: Memory.tokens
    p_q        Queries.reference: a point (B, Nq, 2) or a box (B, Nq, 4)
    z_q        Queries.content (B, Nq, C); its position embedding: Queries.position (B, Nq, C)

B images, S = sum of H_l W_l tokens, Nq queries, C channels, M heads, D = C / M, L levels, K points.
Boxes are (cx, cy, w, h) in [0, 1] of the unpadded image; `padding` is True on padding.

Differences from the paper
 1. The optimizer is AdamW, as in the authors' code (the paper says Adam).
 2. Without refinement all decoder layers share one class head and one box head (code).
 3. With refinement, sampling offsets are divided by K and scaled by half the box (code); the paper
    initializes them 2K times smaller.
 4. Refinement starts from a point, not from a box of size 0.1; the bias -2 of the first box head
    sets the size (code).
 5. A.4 stops the gradient of every inverse sigmoid; here, as in the code, the loss of the first
    layer trains the reference point.
 6. Two-stage: objectness is column 0 of the class logits, all labels being 0 (code; paper: binary).
 7. Two-stage: content and position of a query both come from the sine embedding of its box (code;
    the paper speaks of positional embeddings only).
 8. Two-stage: proposals with nearly equal scores may trade ranks, see dino.py. There are at most
    as many queries as tokens, so that images of any size work.
 9. The box head runs once a layer; the authors evaluate it twice on the same input.
10. Classes are 0..n-1 of the data set (80 in COCO), not COCO's ids (91 columns).
11. Where the hardware supports it, train.py computes in bfloat16 autocast (not with `--amp false`),
    reference points and all class and box heads in float32; the authors compute in float32. What
    stays float32 there has TF32 matrix products on a GPU; eval.py multiplies exactly.
12. train.py skips a step whose loss is not finite; the authors stop.
"""
import math
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import build_backbone
from boxes import at_least_float32, box_cxcywh_to_xyxy, inverse_sigmoid
from deformable_attn import MSDeformAttn
from detr import MLP, pad_to_multiple, sine_embedding
from engine.errors import UserError
from engine.recipe import SMALL_DETECTOR, SMALL_RECIPE, Recipe
from matcher import Group, Matches, SetLoss, Weights, count_boxes, named_layers


@dataclass
class Config:
    """The multi-scale row of the official table: ResNet-50, 50 epochs, 44.5 AP on COCO val2017."""
    backbone: str = "resnet50"           # name of a network in backbones/
    backbone_weights: str = "imagenet"   # imagenet, a file, or none: random weights
    backbone_norm: str = "batch"         # batch or group norm without backbone_weights; else frozen
    dilation: bool = False               # DC5: the last stage keeps stride 16
    num_feature_levels: int = 4          # feature maps; 1: C5; 4: C3 to C5 and one coarser
    with_box_refine: bool = False        # iterative bounding box refinement
    two_stage: bool = False              # queries from encoder proposals; needs with_box_refine
    dim: int = 256                       # C: channels of tokens and queries
    num_heads: int = 8                   # attention heads
    num_points: int = 4                  # sampling points per attention head and feature level
    encoder_layers: int = 6              # encoder layers
    decoder_layers: int = 6              # decoder layers
    ffn_dim: int = 1024                  # hidden units of the feed-forward networks
    dropout: float = 0.1                 # dropout rate
    num_queries: int = 300               # object queries
    top_k: int = 100                     # detections per image
    cost_class: float = 2.0              # matching: weight of the class cost
    cost_l1: float = 5.0                 # matching: weight of the L1 cost of boxes
    cost_giou: float = 2.0               # matching: weight of the GIoU cost of boxes
    loss_class: float = 2.0              # weight of the class loss
    loss_l1: float = 5.0                 # weight of the L1 loss of boxes
    loss_giou: float = 2.0               # weight of the GIoU loss of boxes
    size_divisor: int = 1                # batches are padded to a multiple of this


RECIPE = Recipe(lr=2e-4, lr_backbone=2e-5, lr_offsets=2e-5, batch_size=32, epochs=50, lr_drop=40)

# Trains in minutes on two CPU cores: other sizes and optimization, the same method.
SMALL = dict(SMALL_RECIPE, **SMALL_DETECTOR, dropout=0.0)
# All fit on 8 GPUs of 24 GiB (counted by tools/predict_memory.py).
VARIANTS = {
    "single_scale": dict(num_feature_levels=1),                     # 39.4 AP
    "dc5": dict(num_feature_levels=1, dilation=True),               # 41.5 AP
    "refine": dict(with_box_refine=True),                           # 46.2 AP
    "two_stage": dict(with_box_refine=True, two_stage=True),        # 46.9 AP
}


class Queries(NamedTuple):
    """Input of the decoder."""
    content: Tensor              # (B, Nq, C)
    position: Tensor | None      # (B, Nq, C), added to content in attention
    reference: Tensor            # (B, Nq, 2 or 4) in [0, 1]: a point or a box


class Memory(NamedTuple):
    """The encoder's output ("memory" in DETR's code, not RAM); at first its input. All levels form
    one sequence, the finest first, each row by row. The last three fields serve other files."""
    tokens: Tensor               # (B, S, C)
    positions: Tensor            # (B, S, C) sine and level embeddings
    padding: Tensor              # (B, S) True on padding
    shapes: list                 # [(H_l, W_l), ...]
    valid_ratios: Tensor         # (B, L, 2) unpadded fraction of each level's width and height
    features: list               # the backbone's [C2, C3, C4, C5]
    image_sizes: Tensor          # (B, 2) height and width without padding, pixels
    padded_size: tuple           # (H, W) pixels

    def by_level(self, x: Tensor) -> tuple[Tensor, ...]:
        """Split x (B, S, ...), one row a token, into levels (B, H_l W_l, ...)."""
        return x.split([H * W for H, W in self.shapes], 1)


class DeformableDETR(nn.Module):
    """Figure 1. `backbone` maps images to [C2, C3, C4, C5] and has their widths in `channels`."""
    sine = dict(temperature=10000.0, shift=0.5)   # of `sine_positions`

    def __init__(self, backbone: nn.Module, cfg: Config, num_classes: int):
        super().__init__()
        if cfg.two_stage and not cfg.with_box_refine:
            raise UserError("expected with_box_refine beside two_stage (proposals are refined), "
                            "got two_stage alone: add --with_box_refine true")
        C = cfg.dim
        self.cfg = cfg
        self.backbone = backbone
        self.num_maps = num_maps(cfg.num_feature_levels)
        channels = backbone.channels[-self.num_maps:]
        self.input_proj = input_projections(channels, C, cfg.num_feature_levels)
        self.level_embed = nn.Parameter(torch.empty(cfg.num_feature_levels, C))
        self.encoder = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.decoder_layers))
        if cfg.two_stage:
            self.enc_output = nn.Linear(C, C)
            self.enc_output_norm = nn.LayerNorm(C)
            self.pos_trans = nn.Linear(2 * C, 2 * C)
            self.pos_trans_norm = nn.LayerNorm(2 * C)
        else:
            self.reference_points = nn.Linear(C, 2)
        init_transformer(self)
        if not cfg.two_stage:
            nn.init.zeros_(self.reference_points.bias)
            self.query_embed = nn.Embedding(cfg.num_queries, 2 * C)      # [position, content]
        self.class_embed, self.bbox_embed = prediction_heads(cfg, num_classes)

    def forward(self, images: Tensor, padding: Tensor, targets=None) -> dict:
        """Detect objects in images (B, 3, H, W) with padding (B, H, W); `targets` are not used.

        Returns `pred_logits` (B, Nq, num_classes) and `pred_boxes` (B, Nq, 4), the same of earlier
        layers in `aux_outputs` and of all tokens in `enc_outputs` (two-stage only), the last states
        `queries` (B, Nq, C), `anchors` (B, Nq, 2 or 4): the first references, and `memory`.
        """
        memory = self.encode(images, padding)
        queries, proposals = self.propose(memory)
        layers, states = self.decode(memory, queries)
        outputs = slice_queries(layers)
        outputs |= {"queries": states[-1], "anchors": queries.reference, "memory": memory}
        if proposals is not None:
            outputs["enc_outputs"] = proposals
        return outputs

    def encode(self, images: Tensor, padding: Tensor) -> Memory:
        """Section 4.1: backbone maps, L levels of C channels, tokens after encoder attention."""
        images, padding = pad_to_multiple(images, padding, self.cfg.size_divisor)
        features = self.backbone(images)
        pyramid = project(self.input_proj, features[-self.num_maps:])    # [(B, C, H_l, W_l)]
        memory = flatten_pyramid(pyramid, padding, self.level_embed, features, self.sine)
        references = encoder_references(memory)                          # (B, S, L, 2)
        for layer in self.encoder:
            memory = memory._replace(tokens=layer(memory, references))
        return memory

    def propose(self, memory: Memory) -> tuple[Queries, dict | None]:
        """Make the decoder's input: learned queries, whose positions give the reference points."""
        if self.cfg.two_stage:
            return self.propose_two_stage(memory)
        learned = self.query_embed.weight.expand(len(memory.tokens), -1, -1)     # (B, Nq, 2 C)
        position, content = learned.chunk(2, -1)                                 # (B, Nq, C)
        reference = in_float32(self.reference_points, position).sigmoid()        # (B, Nq, 2)
        return Queries(content, position, reference), None

    def propose_two_stage(self, memory: Memory) -> tuple[Queries, dict]:
        """Appendix A.4: every token proposes a box, and the best boxes become the references, their
        sine embeddings the queries. Also returns the predictions of all S tokens."""
        tokens, proposals = encoder_proposals(memory)                    # (B, S, C), (B, S, 4)
        tokens = self.enc_output_norm(self.enc_output(tokens))
        logits = in_float32(self.class_embed[-1], tokens)                # (B, S, num_classes)
        boxes = in_float32(self.bbox_embed[-1], tokens) + proposals      # (B, S, 4) before sigmoid
        count = min(self.cfg.num_queries, tokens.shape[1])
        best = logits[..., 0].topk(count).indices                        # (B, Nq)
        reference = gather_rows(boxes, best).detach().sigmoid()          # (B, Nq, 4)
        embedding = sine_embedding(reference, tokens.shape[-1] // 2).flatten(2)   # (B, Nq, 2 C)
        queries = self.pos_trans_norm(self.pos_trans(embedding.to(tokens.dtype)))
        position, content = queries.chunk(2, -1)                         # (B, Nq, C)
        predictions = {"pred_logits": logits, "pred_boxes": boxes.sigmoid()}
        return Queries(content, position, reference), predictions

    def decode(self, memory: Memory, queries: Queries, attn_mask: Tensor | None = None):
        """Sections 4.1 and 4.2: predictions of every layer and their states (B, Nq, C), two lists.

        A box is an offset from the reference: its center from a point (A.3), all of it from a box.
        With refinement the box of each layer, detached, is the reference of the next one:
        b_d = sigmoid(delta_d + logit(b_d-1)).
        """
        content, position, reference = queries
        layers, states = [], []
        for layer, class_embed, bbox_embed in zip(self.decoder, self.class_embed, self.bbox_embed):
            content = layer(content, position, reference, memory, attn_mask)     # (B, Nq, C)
            logits = in_float32(class_embed, content)                    # (B, Nq, num_classes)
            boxes = offset_boxes(in_float32(bbox_embed, content), reference)     # (B, Nq, 4)
            layers.append({"pred_logits": logits, "pred_boxes": boxes})
            states.append(content)
            if self.cfg.with_box_refine:
                reference = boxes.detach()
        return layers, states


def slice_queries(layers: list[dict], start: int = 0, stop: int | None = None) -> dict:
    """Take queries start..stop of all layers; the last layer, with the others as `aux_outputs`."""
    layers = [{name: x[:, start:stop] for name, x in layer.items()} for layer in layers]
    return {**layers[-1], "aux_outputs": layers[:-1]}


def num_maps(levels: int) -> int:
    """How many backbone maps become feature levels: C5, C4 and C3 before coarser maps are made."""
    return min(levels, 3)


def input_projections(channels: list[int], dim: int, levels: int) -> nn.ModuleList:
    """Appendix A.2: a 1x1 convolution for each backbone map of these `channels`, then convolutions
    of stride 2: the first of the last backbone map, the others of the level before."""
    convolutions = [nn.Conv2d(inputs, dim, 1) for inputs in channels]
    inputs = channels[-1]
    for _ in range(levels - len(channels)):
        convolutions.append(nn.Conv2d(inputs, dim, 3, stride=2, padding=1))
        inputs = dim
    for convolution in convolutions:
        nn.init.xavier_uniform_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    return nn.ModuleList(Projection(conv, nn.GroupNorm(32, dim)) for conv in convolutions)


class Projection(nn.Sequential):
    """Convolution, then GroupNorm in NCHW order: in NHWC order it loses two digits on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        convolution, norm = self
        return norm(convolution(x).contiguous())


def project(projections: nn.ModuleList, maps: list[Tensor]) -> list[Tensor]:
    """Make all levels (B, C, H_l, W_l) from backbone maps."""
    levels = [projection(x) for projection, x in zip(projections, maps)]
    x = maps[-1]
    for projection in projections[len(maps):]:
        x = projection(x)
        levels.append(x)
    return levels


def flatten_pyramid(pyramid: list[Tensor], padding: Tensor, level_embed: Tensor, features: list,
                    sine: dict) -> Memory:
    """Join levels [(B, C, H_l, W_l)] to the tokens that enter the encoder. padding (B, H, W) of the
    images, level_embed (L, C); sine: options of `sine_positions`."""
    dtype = level_embed.dtype
    tokens, positions, paddings, ratios = [], [], [], []
    for x, embed in zip(pyramid, level_embed):
        mask = F.interpolate(padding[:, None].float(), x.shape[-2:])[:, 0].bool()    # (B, H_l, W_l)
        position = sine_positions(mask, x.shape[1], dtype=dtype, **sine)  # (B, H_l W_l, C)
        tokens.append(x.flatten(2).transpose(1, 2))                      # (B, H_l W_l, C)
        positions.append(position + embed)                               # (B, H_l W_l, C)
        paddings.append(mask.flatten(1))                                 # (B, H_l W_l)
        width = (~mask[:, 0]).to(dtype).mean(1)                          # (B,)
        height = (~mask[:, :, 0]).to(dtype).mean(1)                      # (B,)
        ratios.append(torch.stack((width, height), -1))                  # (B, 2)
    heights = (~padding[:, :, 0]).sum(1)                                 # (B,)
    widths = (~padding[:, 0]).sum(1)                                     # (B,)
    image_sizes = torch.stack((heights, widths), -1)                     # (B, 2)
    shapes = [tuple(x.shape[-2:]) for x in pyramid]
    return Memory(torch.cat(tokens, 1), torch.cat(positions, 1), torch.cat(paddings, 1), shapes,
                  torch.stack(ratios, 1), features, image_sizes, tuple(padding.shape[-2:]))


def sine_positions(padding: Tensor, dim: int, temperature: float = 10000.0, shift: float = 0.5,
                   dtype: torch.dtype = torch.float32) -> Tensor:
    """Position embeddings (B, H W, dim) of the cells of a map with padding (B, H, W): first y, then
    x, counted over cells that are not padding and divided by their number. `shift` 0.5 measures at
    the center of a cell (Deformable DETR), 0 at its right and lower edge (DETR, DINO)."""
    valid = ~padding
    y = valid.cumsum(1).to(dtype)        # (B, H, W); a sum of integers, so its order is irrelevant
    x = valid.cumsum(2).to(dtype)
    y = (y - shift) / (y[:, -1:] + 1e-6)
    x = (x - shift) / (x[:, :, -1:] + 1e-6)
    embeddings = [sine_embedding(v, dim // 2, temperature) for v in (y, x)]
    return torch.cat(embeddings, -1).flatten(1, 2)                       # (B, H W, dim)


def cell_centers(memory: Memory) -> list[Tensor]:
    """For each level (H_l W_l, 2): x + 0.5 and y + 0.5 of every cell, row by row."""
    centers = []
    like = dict(dtype=memory.valid_ratios.dtype, device=memory.valid_ratios.device)
    for H, W in memory.shapes:
        y = torch.arange(H, **like) + 0.5
        x = torch.arange(W, **like) + 0.5
        centers.append(torch.cartesian_prod(y, x).flip(-1))
    return centers


def level_sizes(memory: Memory) -> Tensor:
    """Width and height of each level in cells, (L, 2), without a copy that the host waits for."""
    sizes = [memory.valid_ratios.new_full((), n) for H, W in memory.shapes for n in (W, H)]
    return torch.stack(sizes).view(-1, 2)


def encoder_references(memory: Memory) -> Tensor:
    """Section 4.1: the reference of a token in every level is its own place -> (B, S, L, 2).
    Dividing by its level's valid ratio gives its place in the image, multiplying by another level's
    ratio its place there; because of rounding the ratios of the levels differ slightly."""
    ratios = memory.valid_ratios                                         # (B, L, 2)
    places = []
    for centers, size, ratio in zip(cell_centers(memory), level_sizes(memory), ratios.unbind(1)):
        places.append(centers / size / ratio[:, None])                   # (B, H_l W_l, 2)
    return torch.cat(places, 1)[:, :, None] * ratios[:, None]            # (B, S, L, 2)


class EncoderLayer(nn.Module):
    """Deformable self-attention among all tokens, then a feed-forward network (post-norm)."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.dim
        self.self_attn = MSDeformAttn(C, cfg.num_heads, cfg.num_feature_levels, cfg.num_points)
        self.norm1 = nn.LayerNorm(C)
        self.linear1 = nn.Linear(C, cfg.ffn_dim)
        self.linear2 = nn.Linear(cfg.ffn_dim, C)
        self.norm2 = nn.LayerNorm(C)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, memory: Memory, references: Tensor) -> Tensor:
        """Tokens (B, S, C) of `memory`, references (B, S, L, 2) -> tokens (B, S, C)."""
        x = memory.tokens
        query = x + memory.positions                                     # (B, S, C)
        attended = self.self_attn(query, references, x, memory.shapes, memory.padding)  # (B, S, C)
        x = self.norm1(x + self.dropout(attended))                       # (B, S, C)
        hidden = self.dropout(F.relu(self.linear1(x), inplace=True))     # (B, S, ffn_dim)
        return self.norm2(x + self.dropout(self.linear2(hidden)))        # (B, S, C)


class DecoderLayer(nn.Module):
    """Self-attention among queries (norm2, as the released weights number it), deformable
    cross-attention to the memory (norm1), feed-forward network (norm3)."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.dim
        self.self_attn = SelfAttention(C, cfg.num_heads, cfg.dropout)
        self.norm2 = nn.LayerNorm(C)
        self.cross_attn = MSDeformAttn(C, cfg.num_heads, cfg.num_feature_levels, cfg.num_points)
        self.norm1 = nn.LayerNorm(C)
        self.linear1 = nn.Linear(C, cfg.ffn_dim)
        self.linear2 = nn.Linear(cfg.ffn_dim, C)
        self.norm3 = nn.LayerNorm(C)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, memory: Memory,
                attn_mask: Tensor | None = None) -> Tensor:
        """Queries x and position (B, Nq, C), reference (B, Nq, 2 or 4) of the unpadded image,
        attn_mask (Nq, Nq) True = blocked -> (B, Nq, C)."""
        x = self.norm2(x + self.dropout(self.self_attn(x, position, attn_mask)))     # (B, Nq, C)
        ratios = memory.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)      # (B, L, 2 or 4)
        references = reference[:, :, None] * ratios[:, None]             # (B, Nq, L, 2 or 4)
        attended = self.cross_attn(x + position, references, memory.tokens, memory.shapes,
                                   memory.padding)                       # (B, Nq, C)
        x = self.norm1(x + self.dropout(attended))                       # (B, Nq, C)
        hidden = self.dropout(F.relu(self.linear1(x), inplace=True))     # (B, Nq, ffn_dim)
        return self.norm3(x + self.dropout(self.linear2(hidden)))        # (B, Nq, C)


class SelfAttention(nn.Module):
    """Multi-head attention of queries among themselves, with the parameters of
    torch.nn.MultiheadAttention. On CPUs the fused attention is slow with a mask (backward)."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))    # rows: query, key, value
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, position: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """x (B, Nq, C), position (B, Nq, C), added to queries and keys but not to values, attn_mask
        (Nq, Nq), or (B, 1, Nq, Nq) for each image, True = blocked -> (B, Nq, C)."""
        C = x.shape[-1]
        qk = F.linear(x + position, self.in_proj_weight[:2 * C], self.in_proj_bias[:2 * C])
        v = F.linear(x, self.in_proj_weight[2 * C:], self.in_proj_bias[2 * C:])  # (B, Nq, C)
        q, k = qk.chunk(2, -1)                                           # (B, Nq, C) each
        heads = (self.num_heads, -1)
        q, k, v = [y.unflatten(-1, heads).transpose(1, 2) for y in (q, k, v)]    # (B, M, Nq, D)
        dropout = self.dropout if self.training else 0.0
        if x.is_cuda:
            allowed = None if attn_mask is None else ~attn_mask
            x = F.scaled_dot_product_attention(q, k, v, allowed, dropout)   # (B, M, Nq, D)
        else:
            scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-2, -1)    # (B, M, Nq, Nq)
            if attn_mask is not None:
                scores = scores.masked_fill(attn_mask, -math.inf)
            x = F.dropout(scores.softmax(-1), dropout) @ v               # (B, M, Nq, D)
        return self.out_proj(x.transpose(1, 2).flatten(2))               # (B, Nq, C)


def in_float32(head: nn.Module, x: Tensor) -> Tensor:
    """Apply a head in float32 (float64 where x is), even under autocast. In bfloat16 a coordinate
    near 1 is a multiple of 1/256 (5 pixels of 1333), and the scores of 900 proposals have only 50
    to 80 different values."""
    with torch.autocast(x.device.type, enabled=False):
        return head(at_least_float32(x))


def offset_boxes(offsets: Tensor, reference: Tensor, eps: float = 1e-5) -> Tensor:
    """A.3 and A.4: add offsets (..., 4) to a reference (..., 2 or 4) in [0, 1], before the sigmoid
    -> boxes (..., 4). With a point as reference, width and height are predicted directly."""
    base = inverse_sigmoid(reference, eps)
    if base.shape[-1] == 2:
        base = F.pad(base, (0, 2))                                       # (..., 4)
    return (offsets + base).sigmoid()


@torch.no_grad()
def proposal_boxes(memory: Memory) -> tuple[Tensor, Tensor]:
    """A.4: the box that each token proposes, (B, S, 4) in [0, 1], and whether it is usable, (B, S):
    the cell's center, and sides 0.05 * 2^level, 0 being the finest level; usable if the cell is not
    padding and all coordinates lie strictly within (0.01, 0.99)."""
    valid_sizes = (memory.valid_ratios * level_sizes(memory)).round()    # (B, L, 2) cells
    boxes = []
    for level, centers in enumerate(cell_centers(memory)):
        centers = centers / valid_sizes[:, None, level]                  # (B, H_l W_l, 2)
        boxes.append(F.pad(centers, (0, 2), value=0.05 * 2 ** level))    # (B, H_l W_l, 4)
    boxes = torch.cat(boxes, 1)                                          # (B, S, 4)
    return boxes, ((boxes > 0.01) & (boxes < 0.99)).all(-1) & ~memory.padding


def encoder_proposals(memory: Memory) -> tuple[Tensor, Tensor]:
    """Prepare tokens (B, S, C) and proposals (B, S, 4), before the sigmoid, for the heads. Where a
    proposal is not usable, the token is zero and the proposal infinite: whatever a head adds, the
    box is (1, 1, 1, 1) and has no gradient."""
    boxes, usable = proposal_boxes(memory)
    unusable = ~usable[..., None]                                        # (B, S, 1)
    boxes = boxes.masked_fill(unusable, 0.5)                  # keeps the logarithm finite
    proposals = (boxes / (1 - boxes)).log().masked_fill(unusable, math.inf)
    return memory.tokens.masked_fill(unusable, 0), proposals


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, S, C) at index (B, k) -> (B, k, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def init_transformer(model: nn.Module):
    """Initialize matrices outside backbone and input projections by Xavier, deformable attention
    its own way, level embeddings by N(0, 1). Call it before the prediction heads exist: they keep
    the initialization of torch.nn.Linear."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.startswith(("backbone.", "input_proj.")):
            nn.init.xavier_uniform_(parameter)
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            module.reset_parameters()
    nn.init.normal_(model.level_embed)


def prediction_heads(cfg: Config, num_classes: int) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Make the class heads and box heads of the layers: one pair for all without refinement, else
    one pair each, and in two-stage one more for the tokens. At the start every box is its
    reference; with a point as reference, its sides are sigmoid(-2) = 0.119."""
    classes = class_head(cfg.dim, num_classes)
    boxes = box_head(cfg.dim)
    if not cfg.two_stage:
        nn.init.constant_(boxes.layers[-1].bias[2:], -2.0)
    if not cfg.with_box_refine:
        count = cfg.decoder_layers
        return nn.ModuleList([classes] * count), nn.ModuleList([boxes] * count)
    count = cfg.decoder_layers + cfg.two_stage
    class_heads = nn.ModuleList(deepcopy(classes) for _ in range(count))
    box_heads = nn.ModuleList(deepcopy(boxes) for _ in range(count))
    for head in box_heads[1:]:   # their references are boxes: no bias of -2
        nn.init.zeros_(head.layers[-1].bias)
    return class_heads, box_heads


def class_head(dim: int, num_classes: int) -> nn.Linear:
    """Linear layer, every probability 0.01 at the start (focal loss, Lin et al. 2017, 4.1)."""
    head = nn.Linear(dim, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))
    return head


def box_head(dim: int) -> MLP:
    """MLP whose box offsets are zero at the start."""
    head = MLP(dim, dim, dim, 4)
    nn.init.zeros_(head.layers[-1].weight)
    nn.init.zeros_(head.layers[-1].bias)
    return head


class Criterion:
    """Section 5: the set loss of every decoder layer and, in two-stage, of all tokens."""

    def __init__(self, cfg: Config):
        cost = Weights(cfg.cost_class, cfg.cost_l1, cfg.cost_giou)
        loss = Weights(cfg.loss_class, cfg.loss_l1, cfg.loss_giou)
        self.set_loss = SetLoss(cost, loss)

    def __call__(self, outputs: dict, targets: list[dict], num_boxes=None) -> dict[str, Tensor]:
        """Compute the weighted losses {"cls", "l1", "giou", "aux0.cls", ..., "enc.cls", ...}, whose
        sum is the training loss. targets: per image labels (n,) and boxes (n, 4). num_boxes: the
        divisor of all losses; by default the number of objects in `targets`."""
        losses = {}
        groups = self.groups(outputs, targets)
        for group, matches in zip(groups, self.set_loss.match_groups(groups)):
            if num_boxes is None:
                divisor = count_boxes(targets, group.copies)
            else:
                divisor = num_boxes * group.copies
            losses |= self.set_loss.compute_losses(group.layers, group.targets, matches, divisor)
        return losses

    def groups(self, outputs: dict, targets: list[dict]) -> list[Group]:
        """List what is to be matched: the decoder layers and, in two-stage, all tokens, which tell
        objects from background (every object has label 0)."""
        groups = [Group(named_layers(outputs), targets)]
        if "enc_outputs" in outputs:
            binary = [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]
            groups.append(Group({"enc": outputs["enc_outputs"]}, binary))
        return groups

    def match(self, outputs: dict, targets: list[dict]) -> Matches:
        """Match the last layer: per image query indices and object indices, on the host."""
        return self.set_loss.match(outputs, targets)


def build(cfg: Config, num_classes: int) -> tuple[DeformableDETR, Criterion]:
    """Make the model, with random weights, and its criterion."""
    maps = num_maps(cfg.num_feature_levels)
    backbone = build_backbone(
        cfg.backbone, cfg.backbone_weights, cfg.backbone_norm, cfg.dilation, maps)
    return DeformableDETR(backbone, cfg, num_classes), Criterion(cfg)


def param_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Group trainable parameters by learning rate: backbone, offsets and reference points, rest."""
    backbone, slow, rest = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("backbone."):
            backbone.append(parameter)
        elif "sampling_offsets" in name or "reference_points" in name:
            slow.append(parameter)
        else:
            rest.append(parameter)
    return [{"params": rest, "lr": recipe.lr}, {"params": backbone, "lr": recipe.lr_backbone},
            {"params": slow, "lr": recipe.lr_offsets}]


@torch.no_grad()
def detect(outputs: dict, sizes: Tensor, cfg: Config) -> list[dict]:
    """Select the `cfg.top_k` best (query, class) pairs of each image; no threshold, no NMS. sizes
    (B, 2): height and width of the images that the boxes are wanted for. Returns, per image and
    best first, scores, labels, query (k,) and boxes (k, 4) xyxy in pixels."""
    scores = at_least_float32(outputs["pred_logits"]).sigmoid()          # (B, Nq, num_classes)
    num_classes = scores.shape[-1]
    k = min(cfg.top_k, scores[0].numel())
    scores, pairs = scores.flatten(1).topk(k)                            # (B, k)
    query = pairs // num_classes
    labels = pairs % num_classes
    boxes = box_cxcywh_to_xyxy(at_least_float32(outputs["pred_boxes"]))  # (B, Nq, 4)
    boxes = gather_rows(boxes, query) * sizes.flip(-1).repeat(1, 2).to(boxes)[:, None]
    return [{"scores": scores[b], "labels": labels[b], "boxes": boxes[b], "query": query[b]}
            for b in range(len(boxes))]
