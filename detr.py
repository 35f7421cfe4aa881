"""DETR: End-to-End Object Detection with Transformers (Carion et al., ECCV 2020, arXiv 2005.12872).

The idea: predict all objects of an image at once, as a set. A transformer turns N learned queries
into N boxes, the Hungarian algorithm assigns one query to each object, and all other queries learn
to answer "no object". No anchors, no proposals, no NMS. But it needs 500 epochs, and it is weak on
small objects: attention between all pairs of pixels is affordable on one coarse map only.

    paper                                    here
    section 3.1, Eq. 1 matching              Criterion.match, SoftmaxSetLoss (in matcher.py)
    section 3.1, A.2, Eq. 2 Hungarian loss   Criterion, SoftmaxSetLoss
    section 3.2 backbone and encoder         DETR.encode, EncoderLayer, sine_positions
    section 3.2 decoder, auxiliary losses    DETR.decode, DecoderLayer, named_layers
    section 3.2 prediction heads (FFNs)      class_embed, bbox_embed, MLP
    A.1 multi-head attention                 attend
    section 4 detections                     detect

B images, S = H W tokens, Nq queries (N in the paper), C channels, K classes.
Boxes are (cx, cy, w, h) in [0, 1] of the unpadded image; `padding` is True on padding. Column K,
the last one of the class logits, means "no object".

Differences from the paper
 1. The class loss is a weighted mean over queries (code); the paper divides by the number of
    objects. Over ranks and micro-batches it is the mean of their means (code: over GPUs).
 2. The first self-attention of the decoder runs, though its input is zero (code; A.3 may skip it).
 3. Detections are sorted by score; the authors list them in the order of the queries.
 4. Classes are 0..K-1 of the data, not the 91 columns of COCO's ids.
 5. `train.py` computes in bfloat16 autocast where the hardware supports it (`--amp false` does not;
    the authors use float32) and multiplies float32 matrices in TF32 on a GPU, where `eval.py` is
    exact; it skips a step whose loss is not finite, where the authors stop.
 6. Not built: learned positions, positions at the input only (Table 3), panoptic segmentation.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import MultiheadAttention

from backbones import build_backbone
from boxes import at_least_float32, box_cxcywh_to_xyxy
from engine.recipe import SMALL_RECIPE, Recipe
from matcher import Group, Matches, SoftmaxSetLoss, Weights, count_boxes, named_layers


@dataclass
class Config:
    """The R50 row of Table 1: 500 epochs, 42.0 AP on COCO val2017."""
    backbone: str = "resnet50"          # name of a network in backbones/
    backbone_weights: str = "imagenet"  # imagenet, a file, or none: random weights
    backbone_norm: str = "batch"        # batch or group norm without backbone_weights; else frozen
    dilation: bool = False              # DC5: the last stage keeps stride 16 (43.3 AP)
    dim: int = 256                      # C: channels of tokens and queries
    num_heads: int = 8                  # attention heads
    encoder_layers: int = 6             # encoder layers; Table 2 varies them from 0 to 12
    decoder_layers: int = 6             # decoder layers
    ffn_dim: int = 2048                 # hidden units of the feed-forward networks
    dropout: float = 0.1                # dropout rate
    num_queries: int = 100              # N: object queries
    top_k: int = 100                    # detections per image, at most one for each query
    cost_class: float = 1.0             # matching: weight of the class cost
    cost_l1: float = 5.0                # matching: weight of the L1 cost of boxes
    cost_giou: float = 2.0              # matching: weight of the GIoU cost of boxes
    loss_class: float = 1.0             # weight of the class loss
    loss_l1: float = 5.0                # weight of the L1 loss of boxes; 0 for Table 4
    loss_giou: float = 2.0              # weight of the GIoU loss of boxes; 0 for Table 4
    no_object: float = 0.1              # weight of the class "no object" in the class loss
    size_divisor: int = 1               # batches are padded to a multiple of this


RECIPE = Recipe(lr=1e-4, lr_backbone=1e-5, batch_size=64, epochs=500, lr_drop=400)

# For two CPU cores and ten minutes: sizes and optimization change, the method does not.
SMALL = dict(SMALL_RECIPE, lr=3e-4, lr_backbone=3e-4, epochs=12, backbone="tiny",
             backbone_weights="none", dilation=True, dim=128, num_heads=4, encoder_layers=1,
             decoder_layers=3, ffn_dim=384, dropout=0.0, num_queries=16, size_divisor=32)
VARIANTS = {   # all fit on 8 GPUs of 24 GiB (counted by tools/predict_memory.py)
    "dc5": dict(dilation=True),                             # 43.3 AP
    "r101": dict(backbone="resnet101"),                     # 43.5 AP
    "r101_dc5": dict(backbone="resnet101", dilation=True),  # 44.9 AP
    "300_epochs": dict(epochs=300, lr_drop=200),            # 40.6 AP; schedule of Tables 2 to 4
}


class Memory(NamedTuple):
    """One map as a sequence, row by row: the encoder's input and, with other tokens, its output."""
    tokens: Tensor               # (B, S, C)
    positions: Tensor            # (B, S, C) sine embeddings
    padding: Tensor              # (B, S) True on padding
    shapes: list                 # [(H, W)]


class DETR(nn.Module):
    """Figure 2 of the paper. `backbone` maps images to [C2, C3, C4, C5] and lists their widths in
    `backbone.channels`; only C5 is used."""

    def __init__(self, backbone: nn.Module, cfg: Config, num_classes: int):
        super().__init__()
        self.cfg = cfg
        self.backbone = backbone
        self.input_proj = nn.Conv2d(backbone.channels[-1], cfg.dim, 1)
        self.encoder = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.decoder_layers))
        self.decoder_norm = nn.LayerNorm(cfg.dim)
        self.query_embed = nn.Embedding(cfg.num_queries, cfg.dim)
        self.class_embed = nn.Linear(cfg.dim, num_classes + 1)   # the last one: no object
        self.bbox_embed = MLP(cfg.dim, cfg.dim, cfg.dim, 4)
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, images: Tensor, padding: Tensor, targets=None) -> dict:
        """Detect objects in images (B, 3, H, W) with padding (B, H, W); `targets` are not used.

        Returns `pred_logits` (B, Nq, K + 1), `pred_boxes` (B, Nq, 4) and `queries` (B, Nq, C), the
        states that the heads read, of the last decoder layer; the same of earlier layers in
        `aux_outputs`; and `memory`.
        """
        memory = self.encode(images, padding)
        *earlier, last = self.decode(memory)
        return {**last, "aux_outputs": earlier, "memory": memory}

    def encode(self, images: Tensor, padding: Tensor) -> Memory:
        """Section 3.2: backbone map -> C channels -> tokens after self-attention."""
        images, padding = pad_to_multiple(images, padding, self.cfg.size_divisor)
        x = self.input_proj(self.backbone(images)[-1])                             # (B, C, H, W)
        H, W = x.shape[-2:]
        padding = F.interpolate(padding[:, None].float(), (H, W))[:, 0].bool()     # (B, H, W)
        dtype = self.query_embed.weight.dtype
        positions = sine_positions(padding, self.cfg.dim, dtype=dtype)             # (B, S, C)
        memory = Memory(x.flatten(2).transpose(1, 2), positions, padding.flatten(1), [(H, W)])
        for layer in self.encoder:
            memory = memory._replace(tokens=layer(memory))
        return memory

    def decode(self, memory: Memory) -> list[dict]:
        """Section 3.2: predictions of every layer.

        The learned queries are position embeddings; the content starts at zero. All layers share
        one pair of heads. These read the content after `decoder_norm`, the next layer reads it
        before.
        """
        position = self.query_embed.weight.expand(len(memory.tokens), -1, -1)      # (B, Nq, C)
        content = torch.zeros_like(position)                                       # (B, Nq, C)
        layers = []
        for layer in self.decoder:
            content = layer(content, position, memory)                             # (B, Nq, C)
            states = at_least_float32(self.decoder_norm(content))                  # (B, Nq, C)
            with torch.autocast(states.device.type, enabled=False):   # bfloat16 errs by 5 pixels
                logits = self.class_embed(states)                                  # (B, Nq, K + 1)
                boxes = self.bbox_embed(states).sigmoid()                          # (B, Nq, 4)
            layers.append({"pred_logits": logits, "pred_boxes": boxes, "queries": states})
        return layers


class EncoderLayer(nn.Module):
    """Self-attention of all tokens and a feed-forward network, each followed by a normalization."""

    def __init__(self, cfg):
        super().__init__()
        self.self_attn = MultiheadAttention(cfg.dim, cfg.num_heads, cfg.dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(cfg.dim)
        self.linear1 = nn.Linear(cfg.dim, cfg.ffn_dim)
        self.linear2 = nn.Linear(cfg.ffn_dim, cfg.dim)
        self.norm2 = nn.LayerNorm(cfg.dim)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, memory: Memory) -> Tensor:
        """-> tokens (B, S, C). Positions are added to queries and keys, never to values."""
        x = memory.tokens
        q = x + memory.positions                                                   # (B, S, C)
        attended = attend(self.self_attn, q, q, x, memory.padding)                 # (B, S, C)
        x = self.norm1(x + self.dropout(attended))                                 # (B, S, C)
        hidden = self.dropout(F.relu(self.linear1(x), inplace=True))         # (B, S, ffn_dim)
        return self.norm2(x + self.dropout(self.linear2(hidden)))                  # (B, S, C)


class DecoderLayer(nn.Module):
    """Self-attention of the queries, attention to the memory, and a feed-forward network."""

    def __init__(self, cfg):
        super().__init__()
        self.self_attn = MultiheadAttention(cfg.dim, cfg.num_heads, cfg.dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(cfg.dim)
        self.cross_attn = MultiheadAttention(cfg.dim, cfg.num_heads, cfg.dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(cfg.dim)
        self.linear1 = nn.Linear(cfg.dim, cfg.ffn_dim)
        self.linear2 = nn.Linear(cfg.ffn_dim, cfg.dim)
        self.norm3 = nn.LayerNorm(cfg.dim)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, position: Tensor, memory: Memory) -> Tensor:
        """x and position (B, Nq, C) -> (B, Nq, C)."""
        q = x + position                                                           # (B, Nq, C)
        attended = attend(self.self_attn, q, q, x)                                 # (B, Nq, C)
        x = self.norm1(x + self.dropout(attended))                                 # (B, Nq, C)
        q = x + position                                                           # (B, Nq, C)
        k = memory.tokens + memory.positions                                       # (B, S, C)
        attended = attend(self.cross_attn, q, k, memory.tokens, memory.padding)    # (B, Nq, C)
        x = self.norm2(x + self.dropout(attended))                                 # (B, Nq, C)
        hidden = self.dropout(F.relu(self.linear1(x), inplace=True))         # (B, Nq, ffn_dim)
        return self.norm3(x + self.dropout(self.linear2(hidden)))                  # (B, Nq, C)


def attend(attention, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None) -> Tensor:
    """A.1: multi-head attention of queries (B, Nq, C) to keys and values (B, S, C) -> (B, Nq, C).

    Keys on padding (B, S) are ignored.
    """
    # PyTorch's fused attention gives no weights. On a CPU it is slow for few keys: asking for the
    # weights, which are not used, avoids it.
    need_weights = k.shape[1] <= 256 and not k.is_cuda
    attended, _ = attention(q, k, v, padding, need_weights=need_weights)
    return attended


class MLP(nn.Module):
    """Linear layers with ReLU between them; `widths` from input to output."""

    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def pad_to_multiple(images: Tensor, padding: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Pad right and bottom until both sides are multiples of `divisor`. Otherwise the number of
    valid cells of a small image would depend on the other images of its batch."""
    if divisor == 1:
        return images, padding
    # -n % divisor is what n lacks: left and right, then top and bottom
    fill = (0, -images.shape[3] % divisor, 0, -images.shape[2] % divisor)
    return F.pad(images, fill), F.pad(padding, fill, value=True)


def sine_positions(padding: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Position embedding of every cell of a map: padding (B, H, W) -> (B, H W, dim), y before x.
    Rows and columns count from 1 over the cells that are not padding, divided by their number."""
    valid = ~padding
    y = valid.cumsum(1).to(dtype)                                                  # (B, H, W)
    x = valid.cumsum(2).to(dtype)                                                  # (B, H, W)
    y = y / (y[:, -1:] + 1e-6)
    x = x / (x[:, :, -1:] + 1e-6)
    embedded = [sine_embedding(v, dim // 2) for v in (y, x)]
    return torch.cat(embedded, -1).flatten(1, 2)                                   # (B, H W, dim)


def sine_embedding(x: Tensor, features: int, temperature: float = 10000.0) -> Tensor:
    """(...) in [0, 1] -> (..., features): alternating sin and cos of
    2 pi x / temperature^(2 i / features)."""
    i = torch.arange(features // 2, dtype=x.dtype, device=x.device)
    angle = 2 * math.pi * x[..., None] / temperature ** (2 * i / features)   # (..., features / 2)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)                 # (..., features)


class Criterion:
    """Section 3.1: the Hungarian loss of every decoder layer, each matched on its own."""

    def __init__(self, cfg: Config):
        cost = Weights(cfg.cost_class, cfg.cost_l1, cfg.cost_giou)
        loss = Weights(cfg.loss_class, cfg.loss_l1, cfg.loss_giou)
        self.set_loss = SoftmaxSetLoss(cost, loss, cfg.no_object)

    def __call__(self, outputs: dict, targets: list[dict], num_boxes=None) -> dict:
        """Compute the weighted losses {"cls", "l1", "giou", "aux0.cls", ...}, whose sum is the
        training loss. num_boxes: the divisor of the box losses; by default the number of objects in
        `targets`."""
        layers = named_layers(outputs)
        [matches] = self.set_loss.match_groups([Group(layers, targets)])
        divisor = count_boxes(targets) if num_boxes is None else num_boxes
        return self.set_loss.compute_losses(layers, targets, matches, divisor)

    def match(self, outputs: dict, targets: list[dict]) -> Matches:
        """Match the last layer: query and object indices of each image, on the host."""
        return self.set_loss.match(outputs, targets)


def build(cfg: Config, num_classes: int) -> tuple[DETR, Criterion]:
    """Model with random weights, and its criterion."""
    backbone = build_backbone(cfg.backbone, cfg.backbone_weights, cfg.backbone_norm, cfg.dilation,
                              maps=1)
    return DETR(backbone, cfg, num_classes), Criterion(cfg)


def param_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Trainable parameters in two groups with their learning rates: the backbone, and the rest."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    backbone = [p for name, p in named if name.startswith("backbone.")]
    rest = [p for name, p in named if not name.startswith("backbone.")]
    return [{"params": rest, "lr": recipe.lr}, {"params": backbone, "lr": recipe.lr_backbone}]


@torch.no_grad()
def detect(outputs: dict, sizes: Tensor, cfg: Config) -> list[dict]:
    """Select the `cfg.top_k` best queries of each image, each with its best class other than "no
    object"; no threshold, no NMS.

    sizes (B, 2): height and width of the images that the boxes are wanted for. Returns, per image
    and best first, scores, labels, query (k,) and boxes (k, 4) xyxy in pixels.
    """
    probabilities = at_least_float32(outputs["pred_logits"]).softmax(-1)           # (B, Nq, K + 1)
    scores, labels = probabilities[..., :-1].max(-1)                               # (B, Nq)
    scores, query = scores.topk(min(cfg.top_k, scores.shape[1]))                   # (B, k)
    labels = labels.gather(1, query)                                               # (B, k)
    boxes = box_cxcywh_to_xyxy(at_least_float32(outputs["pred_boxes"]))            # (B, Nq, 4)
    boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))                    # (B, k, 4)
    boxes = boxes * sizes.to(boxes)[:, None, [1, 0, 1, 0]]
    return [{"scores": scores[b], "labels": labels[b], "boxes": boxes[b], "query": query[b]}
            for b in range(len(boxes))]
