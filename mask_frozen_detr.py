"""Mask Frozen-DETR: High Quality Instance Segmentation with One GPU (Liang and Yuan 2023, arXiv 2308.03747).

The idea: a trained detector already knows where every object is and what it is. Freeze all of it and train a small network
on top that cuts each predicted box out of a feature map, looks closer, and asks the object's query which cells belong to
it. Boxes and their AP stay as they were; masks cost minutes or hours beside what the detector cost. Neither code nor weights
of the authors are public, and we know the equations and the recipe from a published reading note only: see Departs.

    paper                                            here
    the frozen detector                              Frozen
    baseline, F = C1 + interp(F_e(E))                MaskFrozenDETR.feature_map
    image-level mask  sigma(q_i F^T)                 whole_image
    box-level mask  R_i = RoIAlign(F, b_i)           MaskFrozenDETR.look_closer, boxes.roi_align
    image feature encoder F_e, box encoder F_b       DeformableBlock, SwinMapBlock, ConvNeXtBlock, encode
    channel mapper                                   channel_mapper, query_mapper
    neck on the backbone map                         Neck
    query feature encoder                            QueryEncoder
    mask scoring  s_i = c_i iou_i                    ScoreHead, mask_iou
    point-sampled loss (PointRend)                   uncertain_points, Criterion
    selection by class score, pasting                MaskFrozenDETR.best_regions, detect, paste

    symbol         here
    C1, E          Memory.features[0], the detector's backbone map of stride 4; Memory.tokens, its encoder's maps
    q_i, b_i, c_i  outputs["queries"], ["pred_boxes"], sigmoid of ["pred_logits"]
    R_i            region (n, r, r, C): n boxes of the whole batch, r = roi_size
    M_i            sigmoid of outputs["mask_logits"] (n, r, r)

B images, C = channel_dim, n regions, P points. Boxes named xyxy are corners in [0, 1] of the unpadded image.

Departs. What the paper says is not known to us on these points; each is our choice.
 1. Sizes: channel_dim 128, two blocks each, hidden width 1024, GroupNorm(32), Swin windows of 8, box-to-object attention alone.
 2. Training: each object is learned by the query that matching with costs 2, 5, 2 gives it, within the box that the
    query predicts, as at test time; in a crowd a random `train_regions` objects of an image stand for all.
 3. The points that are kept are the least certain ones, as in PointRend (read as "random", oversampling would do nothing);
    binary cross-entropy and dice 5 each, squared error of the IoU 1; 12544 points, 3 times oversampled, 75 % kept.
 4. The IoU to predict is that with the whole object, not with its part inside the box, and the head ends in a sigmoid.
 5. RoIAlign and pasting count from the middle of a cell and undo each other; coordinates are never rounded. Logits are
    pasted, which is what the sampled points of the loss read, and compared with 0; the paper takes the sigmoid first, which
    flattens edges within a cell (0.02 AP at regions of 16).
 6. The baselines keep neck and mappers: nothing else in them could learn.
 7. Of five feature levels the one of stride 8 is E, of a single one that one. DINO's query is the normalised state that its
    class head reads.
 8. Six whole epochs instead of 88,500 steps; the learning rate falls to a tenth after 90 % and again after 95 %; the
    gradient's norm is cut at 0.1.
 9. The scoring head's layers are those of the one other implementation that could be found, and its gradient runs on into
    mask and region. Regions are the detector's own detections, after its soft-NMS if it has one.
"""
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.swin import SwinBlock, shift_mask
from boxes import box_cxcywh_to_xyxy, roi_align
from deformable_detr import MLP, EncoderLayer, Memory, SelfAttention, encoder_references, sine_positions, take
from engine.errors import UserError
from engine.recipe import SMALL_RECIPE, Recipe
import matcher
from matcher import Weights, at_least_float32, count_boxes

STRIDE = 4         # pixels per cell of the map that regions are cut from
WINDOW = 8         # of Swin blocks, cells
IOU_GRID = 64      # points per side on which a mask is compared with its object
CHUNK = 25         # regions at a time outside training, to bound memory
NEEDS_MASKS = True
NEEDS_DETECTOR = True


@dataclass
class Config:
    """The recipe: 6 epochs at batch 8 on one GPU, on top of any detector of this project."""
    level: str = "box"                     # box, or image: one mask over the whole image (the first baseline)
    roi_size: int = 32
    roi_box: str = "pred"                  # pred, or gt: regions from the ground truth, an upper bound
    enc_layer: int = 0                     # encoder layer whose maps are used, 1 the first; 0: the last
    neck: bool = True                      # 1x1 convolution and GroupNorm on the backbone's map
    image_encoder: str = "deformable"      # none, deformable, swin or convnext
    image_layers: int = 2
    image_ffn_dim: int = 1024
    channel_dim: int = 128                 # width from the channel mapper on
    box_encoder: str = "deformable"        # none, deformable, swin or convnext
    box_layers: int = 2
    box_ffn_dim: int = 1024
    query_encoder: str = "box2obj"         # none, obj2obj, box2obj or both
    query_ffn: bool = False                # a feed-forward network after it
    mask_scoring: bool = True              # a predicted IoU in the score; else the mean of the mask inside itself
    score_dim: int = 128                   # channels of the scoring head
    score_ffn_dim: int = 1024
    num_heads: int = 8
    num_points: int = 4
    point_loss: bool = True                # at sampled points; else at every cell of the region
    loss_points: int = 12544
    oversample: float = 3.0                # candidates for each point
    importance: float = 0.75               # share of the points that are the least certain candidates
    train_regions: int = 100               # objects an image that a step learns from
    top_k: int = 100                       # detections kept per image
    cost_class: float = 2.0
    cost_l1: float = 5.0
    cost_giou: float = 2.0
    loss_bce: float = 5.0
    loss_dice: float = 5.0
    loss_iou: float = 1.0


RECIPE = Recipe(lr=1.5e-4, weight_decay=5e-5, batch_size=8, epochs=6, schedule="drops", lr_drops=(0.9, 0.95))


# For SMALL detectors: minutes on two CPU cores. Sizes and optimisation change, the method does not.
SMALL = dict(SMALL_RECIPE, roi_size=16, image_layers=1, image_ffn_dim=256, channel_dim=64, box_layers=2, box_ffn_dim=128,
             score_dim=16, score_ffn_dim=64, num_heads=4, loss_points=392) | dict(lr=4e-3, epochs=2)
BASELINE = dict(image_encoder="none", box_encoder="none", query_encoder="none", mask_scoring=False)
VARIANTS = {
    "image_baseline": dict(level="image", **BASELINE),
    "box_baseline": BASELINE,
}
ENCODERS = ("none", "deformable", "swin", "convnext")
CHOICES = {"level": ("box", "image"), "roi_box": ("pred", "gt"), "image_encoder": ENCODERS, "box_encoder": ENCODERS,
           "query_encoder": ("none", "obj2obj", "box2obj", "both")}


class Regions(NamedTuple):
    """The boxes of a batch whose masks are wanted, image by image."""
    image: Tensor      # (n,) place in the batch
    query: Tensor      # (n,) the query that found it
    xyxy: Tensor       # (n, 4)
    object: Tensor     # (n,) the image's object it learns; in evaluation 0
    weight: Tensor     # (n,) in the losses
    counts: list       # regions of each image

    @classmethod
    def join(cls, images: list[tuple]) -> "Regions":
        """Per image (query, xyxy, object, weight), each with one row per region -> all of them."""
        query, xyxy, objects, weight = (torch.cat(part) for part in zip(*images))
        counts = [len(part[0]) for part in images]
        image = torch.arange(len(images), device=query.device).repeat_interleave(torch.tensor(counts, device=query.device))
        return cls(image, query, xyxy, objects, weight, counts)


class MaskFrozenDETR(nn.Module):
    """The mask network. The detector is no submodule: neither optimiser, average, state dict nor train() reaches it."""

    def __init__(self, frozen: "Frozen", cfg: Config):
        super().__init__()
        for field, choices in CHOICES.items():
            if getattr(cfg, field) not in choices:
                raise UserError(f"expected {field} to be one of {', '.join(choices)}, got {getattr(cfg, field)!r}")
        if cfg.level == "image" and (cfg.box_encoder, cfg.query_encoder, cfg.mask_scoring) != ("none", "none", False):
            raise UserError("expected nothing that looks at regions beside level image: use --variant image_baseline")
        self.frozen, self.cfg, self.class_names = frozen, cfg, frozen.class_names
        dim, C, M = frozen.dim, cfg.channel_dim, cfg.num_heads
        if cfg.neck:
            self.neck = Neck(frozen.channels, dim)
        elif frozen.channels != dim:
            raise UserError(f"expected a backbone map of {dim} channels to add as it is, got {frozen.channels}: use the neck")
        levels = frozen.num_levels if cfg.image_encoder == "deformable" else 1
        sizes = Sizes(dim, M, levels, cfg.num_points, cfg.image_ffn_dim)
        self.image_encoder = blocks(cfg.image_encoder, cfg.image_layers, sizes)
        self.channel_mapper, self.query_mapper = nn.Linear(dim, C), nn.Linear(dim, C)
        self.box_encoder = blocks(cfg.box_encoder, cfg.box_layers, Sizes(C, M, 1, cfg.num_points, cfg.box_ffn_dim))
        self.query_encoder = QueryEncoder(cfg)
        if cfg.mask_scoring:
            self.score_head = ScoreHead(C, cfg.roi_size, cfg.score_dim, cfg.score_ffn_dim)

    def forward(self, images: Tensor, padding: Tensor, targets: list[dict] | None = None) -> dict:
        """images (B, 3, H, W), padding (B, H, W); targets, needed in training and with `roi_box` gt: B dictionaries with
        labels (n,), boxes (n, 4) and masks (n, h, w) -> the detector's outputs and `mask_logits` (n, r, r), `mask_ious`
        (n,), their `regions`, and in evaluation `found`, which region belongs to which detection."""
        outputs, tokens = self.frozen(images, padding)
        if self.training:
            outputs["regions"] = self.matched_regions(outputs, targets)
        elif self.cfg.roi_box == "gt" and targets is not None:
            outputs["regions"], outputs["found"] = self.given_regions(outputs, targets)
        else:
            outputs["regions"], outputs["found"] = self.best_regions(outputs)
        features = self.feature_map(outputs["memory"], tokens)                     # (B, H/4, W/4, C)
        image, query, *_ = outputs["regions"]
        queries = self.query_encoder.among_objects(self.query_mapper(outputs["queries"][image, query]), image)   # (n, C)
        if self.cfg.level == "image":
            outputs["regions"] = whole_image(outputs["regions"], features, outputs["memory"])
            everywhere = torch.einsum("nc,bhwc->nbhw", queries, features).float()  # (n, B, H/4, W/4)
            outputs["mask_logits"] = everywhere[torch.arange(len(image)), image]
            return outputs
        rows = torch.arange(len(image), device=image.device).split(len(image) if self.training else CHUNK)
        parts = [self.look_closer(features, outputs["regions"], queries, some, outputs["memory"]) for some in rows]
        outputs["mask_logits"] = torch.cat([logits for logits, _ in parts])        # (n, r, r)
        if self.cfg.mask_scoring:
            outputs["mask_ious"] = torch.cat([iou for _, iou in parts])            # (n,)
        return outputs

    def get_extra_state(self) -> Tensor:
        """The detector's hash travels in every state dict: these weights mean nothing on another one."""
        return self.frozen.hash

    def set_extra_state(self, state: Tensor) -> None:
        if not torch.equal(state.cpu(), self.frozen.hash):
            ours, theirs = (bytes(x.tolist()).hex()[:12] for x in (self.frozen.hash, state))
            raise UserError(f"expected the detector that these masks were trained on, weights {theirs}, got {ours}: "
                            "give the right file with --detector")

    def _apply(self, fn, recurse: bool = True):
        self.frozen.model._apply(fn)   # .to(device) reaches the detector too
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def matched_regions(self, outputs: dict, targets: list[dict]) -> Regions:
        """Every object's query and the box it predicts. A batch without objects gets one region of weight 0, so that all
        parameters have a gradient."""
        predicted, parts = inside(outputs["pred_boxes"]), []
        for boxes, target, (query, index) in zip(predicted, targets, match(outputs, targets, self.cfg)):
            some = torch.randperm(len(query))[:self.cfg.train_regions]
            query, index, weight = query[some].to(boxes.device), index[some].to(boxes.device), len(query) / max(1, len(some))
            chosen = inside(target["boxes"][index]) if self.cfg.roi_box == "gt" else boxes[query]
            parts.append((query, chosen, index, boxes.new_full((len(query),), weight)))
        if not any(len(part[0]) for part in parts):
            zero = parts[0][0].new_zeros(1)
            parts[0] = (zero, predicted[0, :1], zero, predicted.new_zeros(1))
        return Regions.join(parts)

    @torch.no_grad()
    def best_regions(self, outputs: dict) -> tuple[Regions, list[dict]]:
        """The detector's own detections, boxes as shares of the image, and one region for every query among them."""
        sizes = torch.ones(len(outputs["pred_boxes"]), 2, device=outputs["pred_boxes"].device)
        found, parts, first = self.frozen.detect(outputs, sizes, replace(self.frozen.model.cfg, top_k=self.cfg.top_k)), [], 0
        for boxes, image in zip(inside(outputs["pred_boxes"]), found):
            query, row = image["query"].unique(return_inverse=True)
            image["region"], first = first + row, first + len(query)
            parts.append((query, boxes[query], torch.zeros_like(query), torch.ones_like(boxes[query, 0])))
        return Regions.join(parts), found

    @torch.no_grad()
    def given_regions(self, outputs: dict, targets: list[dict]) -> tuple[Regions, list[dict]]:
        """The upper bound: every object is found, with its own box and label."""
        found, parts, first, device = [], [], 0, outputs["pred_boxes"].device
        targets = [{name: t[name].to(device) for name in ("labels", "boxes")} for t in targets]
        for target, (query, index) in zip(targets, match(outputs, targets, self.cfg)):
            query, index = (x.to(device) for x in (query, index))
            xyxy = inside(target["boxes"][index])
            region, first = first + torch.arange(len(query), device=device), first + len(query)
            found.append({"scores": torch.ones_like(xyxy[:, 0]), "labels": target["labels"][index], "boxes": xyxy,
                          "query": query, "region": region})
            parts.append((query, xyxy, index, torch.ones_like(xyxy[:, 0])))
        return Regions.join(parts), found

    def feature_map(self, memory: Memory, tokens: Tensor) -> Tensor:
        """F = C1 + interp(F_e(E)) through the channel mapper: -> (B, H/4, W/4, C). The mapper is linear, so it may come
        before RoIAlign, where it is cheaper. `tokens` (B, S, dim): the encoder layer that E is taken from."""
        fine = self.neck(memory.features[0]) if self.cfg.neck else memory.features[0]              # (B, dim, H/4, W/4)
        memory = memory._replace(tokens=tokens.masked_fill(memory.padding[..., None], 0))
        if self.cfg.image_encoder != "deformable":
            memory = stride_eight(memory)                                          # only deformable attention sees all levels
        memory = stride_eight(encode(self.image_encoder, memory))
        coarse = memory.tokens.transpose(1, 2).unflatten(2, memory.shapes[0])      # (B, dim, H/8, W/8)
        coarse = F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.channel_mapper((fine + coarse).permute(0, 2, 3, 1))

    def look_closer(self, features: Tensor, regions: Regions, queries: Tensor, rows: Tensor, memory: Memory) -> tuple:
        """R_i = F_b(RoIAlign(F, b_i)), then sigma(q_i . R_i): features (B, H/4, W/4, C), queries (n, C), regions `rows` (k,)
        -> logits (k, r, r), summed over channels in float32, and IoUs (k,) or None."""
        image, r = regions.image[rows], self.cfg.roi_size
        pixels = regions.xyxy[rows] * memory.image_sizes[image][:, [1, 0, 1, 0]]
        region = roi_align(features.float().flatten(1, 2), [features.shape[1:3]], [STRIDE], pixels, image,
                           torch.zeros_like(image), r)                             # (k, r, r, C)
        region = encode(self.box_encoder, as_memory(region))
        query = self.query_encoder.from_region(queries[rows], region)              # (k, C)
        logits = (query.float()[:, None] * region.tokens.float()).sum(-1).unflatten(1, (r, r))
        iou = self.score_head(logits.sigmoid(), region.tokens.unflatten(1, (r, r))) if self.cfg.mask_scoring else None
        return logits, iou


# --------------------------------------------------------------------------------------------- the frozen detector

class Frozen:
    """A trained detector that never changes. No module, so that nothing that walks over modules finds it; copies of the mask
    network share it."""

    def __init__(self, model: nn.Module, detect, enc_layer: int = 0, class_names: list[str] | None = None):
        self.model, self.detect, self.class_names = model.eval().requires_grad_(False), detect, class_names
        self.tapped = []
        inner = getattr(model, "detector", model)                                  # Co-DETR keeps its detector inside
        self.channels, (self.num_levels, self.dim) = inner.backbone.channels[0], inner.level_embed.shape
        if not 0 <= enc_layer <= len(inner.encoder):
            raise UserError(f"expected enc_layer from 0 to {len(inner.encoder)}, the layers of the detector, got {enc_layer}")
        if enc_layer:
            inner.encoder[enc_layer - 1].register_forward_hook(lambda module, inputs, tokens: self.tapped.append(tokens))
        self.hash = weight_hash(model)

    @torch.no_grad()
    def __call__(self, images: Tensor, padding: Tensor) -> tuple[dict, Tensor]:
        """-> the detector's outputs and E, the tokens (B, S, dim) of the encoder layer that was asked for."""
        outputs = self.model(images, padding)
        return dict(outputs), self.tapped.pop() if self.tapped else outputs["memory"].tokens

    def __deepcopy__(self, memo) -> "Frozen":
        return self


def weight_hash(model: nn.Module) -> Tensor:
    """SHA-256 of every name and weight: 32 bytes as a tensor."""
    digest = sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def inside(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) cxcywh -> corners (..., 4), clipped to the image."""
    return box_cxcywh_to_xyxy(at_least_float32(boxes)).clamp(0, 1)


def whole_image(regions: Regions, features: Tensor, memory: Memory) -> Regions:
    """The same with the whole map as the box of each, padding included."""
    extent = STRIDE * torch.tensor(features.shape[2:0:-1], device=features.device)               # (2,) width, height
    corner = extent / memory.image_sizes[regions.image].flip(-1)                   # (n, 2)
    return regions._replace(xyxy=torch.cat((torch.zeros_like(corner), corner), -1))


def stride_eight(memory: Memory) -> Memory:
    """Only E, the level of stride 8: the first, or the second where the first is as fine as C1 (five-scale
    detectors), or all there is."""
    level = int(len(memory.shapes) > 1 and tuple(memory.shapes[0]) == tuple(memory.features[0].shape[-2:]))
    tokens, positions, padding = (memory.by_level(x)[level] for x in (memory.tokens, memory.positions, memory.padding))
    return memory._replace(tokens=tokens, positions=positions, padding=padding, shapes=[memory.shapes[level]],
                           valid_ratios=memory.valid_ratios[:, level:level + 1])


def as_memory(region: Tensor) -> Memory:
    """Regions (k, r, r, C) as k images of one level each, so that the same blocks serve as image and as box encoder."""
    k, r, _, C = region.shape
    positions = sine_positions(torch.zeros(1, r, r, dtype=torch.bool, device=region.device), C).expand(k, -1, -1)
    return Memory(region.flatten(1, 2), positions, None, [(r, r)], region.new_ones(k, 1, 2), [], None, (r, r))


# ------------------------------------------------------------------------------------------------------ the network

class Neck(nn.Sequential):
    """C1 <- GN(PWConv(C1)), (B, channels, H, W) -> (B, dim, H, W)."""

    def __init__(self, channels: int, dim: int):
        super().__init__(nn.Conv2d(channels, dim, 1, bias=False), nn.GroupNorm(32, dim))


class Sizes(NamedTuple):
    """What a block is built from; the names are those that `EncoderLayer` reads."""
    dim: int
    num_heads: int
    num_feature_levels: int
    num_points: int
    ffn_dim: int
    dropout: float = 0.0


class DeformableBlock(EncoderLayer):
    """The detector's encoder layer with GELU instead of ReLU."""

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, memory: Memory, references: Tensor) -> Tensor:
        x = memory.tokens
        x = self.norm1(x + self.self_attn(x + memory.positions, references, x, memory.shapes, memory.padding))
        return self.norm2(x + self.linear2(F.gelu(self.linear1(x))))               # <-


class ConvNeXtBlock(nn.Module):
    """7x7 depth-wise convolution, then LayerNorm and two point-wise layers with GELU between them (Liu et al. 2022); the
    layer scale is left out."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.depthwise = nn.Conv2d(sizes.dim, sizes.dim, 7, padding=3, groups=sizes.dim)
        self.norm = nn.LayerNorm(sizes.dim)
        self.linear1, self.linear2 = nn.Linear(sizes.dim, sizes.ffn_dim), nn.Linear(sizes.ffn_dim, sizes.dim)

    def forward(self, memory: Memory, references: Tensor) -> Tensor:
        x = memory.tokens.transpose(1, 2).unflatten(2, memory.shapes[0])           # (B, C, H, W)
        x = self.norm(self.depthwise(x).flatten(2).transpose(1, 2))                # (B, H W, C)
        return memory.tokens + self.linear2(F.gelu(self.linear1(x)))


class SwinMapBlock(SwinBlock):
    """Attention within windows of 8 x 8 cells, shifted by half a window if asked (Liu et al. 2021)."""

    def __init__(self, sizes: Sizes, shift: bool):
        super().__init__(sizes.dim, sizes.num_heads, WINDOW, shift, sizes.ffn_dim // sizes.dim, 0.0)

    def forward(self, memory: Memory, references: Tensor) -> Tensor:
        x = memory.tokens.unflatten(1, memory.shapes[0])                           # (B, H, W, C)
        return super().forward(x, shift_mask(*memory.shapes[0], WINDOW, x.device)).flatten(1, 2)


def blocks(kind: str, depth: int, sizes: Sizes) -> nn.ModuleList:
    """F_e or F_b: `depth` blocks of one family."""
    make = {"none": lambda shift: None, "deformable": lambda shift: DeformableBlock(sizes),
            "swin": lambda shift: SwinMapBlock(sizes, shift), "convnext": lambda shift: ConvNeXtBlock(sizes)}[kind]
    return nn.ModuleList(make(i % 2 == 1) for i in range(depth if kind != "none" else 0))


def encode(layers: nn.ModuleList, memory: Memory) -> Memory:
    """Images or regions through their encoder, whatever its kind."""
    references = encoder_references(memory) if layers else None                    # (B, S, L, 2)
    for layer in layers:
        memory = memory._replace(tokens=layer(memory, references))
    return memory


class QueryEncoder(nn.Module):
    """Queries were trained to read a whole image: let them look at each other, at their own region, and think."""

    def __init__(self, cfg: Config):
        super().__init__()
        C, M = cfg.channel_dim, cfg.num_heads
        if cfg.query_encoder in ("obj2obj", "both"):
            self.self_attn, self.self_norm = SelfAttention(C, M, 0.0), nn.LayerNorm(C)
        if cfg.query_encoder in ("box2obj", "both"):
            self.attn, self.norm = nn.MultiheadAttention(C, M, batch_first=True), nn.LayerNorm(C)
        if cfg.query_ffn:
            self.ffn = nn.Sequential(nn.Linear(C, cfg.box_ffn_dim), nn.GELU(), nn.Linear(cfg.box_ffn_dim, C))
            self.ffn_norm = nn.LayerNorm(C)

    def among_objects(self, queries: Tensor, image: Tensor) -> Tensor:
        """Object to object: [q_1 .. q_n] <- SelfAttention([q_1 .. q_n]) within each image: (n, C), image (n,) -> (n, C)."""
        if not hasattr(self, "self_attn"):
            return queries
        blocked = image[:, None] != image                                          # (n, n)
        return self.self_norm(queries + self.self_attn(queries[None], torch.zeros_like(queries), blocked)[0])

    def from_region(self, queries: Tensor, region: Memory) -> Tensor:
        """Box to object: q_i <- CrossAttention(q_i, R_i), then the feed-forward network: (k, C), k regions -> (k, C)."""
        if hasattr(self, "attn"):
            tokens = region.tokens
            looked, _ = self.attn(queries[:, None], tokens + region.positions, tokens, need_weights=False)       # (k, 1, C)
            queries = self.norm(queries + looked[:, 0])
        return self.ffn_norm(queries + self.ffn(queries)) if hasattr(self, "ffn") else queries


class ScoreHead(nn.Module):
    """iou_i = MLP(Flatten(Conv(Cat(M_i, R_i)))): the overlap that a mask will have with its object, whatever its class."""

    def __init__(self, dim: int, roi_size: int, width: int, hidden: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(dim + 1 if i == 0 else width, width, 3, 1 + (i > 1), 1) for i in range(4))
        self.mlp = MLP((-(-roi_size // 4)) ** 2 * width, hidden, hidden, 1)

    def forward(self, masks: Tensor, region: Tensor) -> Tensor:
        """Probabilities (k, r, r), regions (k, r, r, C) -> (k,) in (0, 1)."""
        x = torch.cat((masks[..., None], region.float()), -1).permute(0, 3, 1, 2)  # (k, 1 + C, r, r)
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.mlp(x.flatten(1))[:, 0].float().sigmoid()


# ------------------------------------------------------------------------------------------------------------ losses

def match(outputs: dict, targets: list[dict], cfg: Config) -> list[tuple[Tensor, Tensor]]:
    """Hungarian matching of the detector's queries: per image query and object indices, on the host."""
    return matcher.match(outputs, targets, Weights(cfg.cost_class, cfg.cost_l1, cfg.cost_giou))


def draw_points(n: int, count: int, device) -> Tensor:
    """(n, count, 2), x and y in [0, 1) of a box."""
    return torch.rand(n, count, 2, device=device)


def grid_points(n: int, height: int, width: int, device) -> Tensor:
    """The middles of height x width cells of a box, row by row: (n, height width, 2)."""
    y, x = ((torch.arange(count, device=device) + 0.5) / count for count in (height, width))
    return torch.cartesian_prod(y, x).flip(-1).expand(n, -1, -1)


def read(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (n, h, w) at points (n, P, 2) in [0, 1], zero beyond the border: (n, P)."""
    return F.grid_sample(maps[:, None], 2 * points[:, None] - 1, align_corners=False)[:, 0, 0]


@torch.no_grad()
def uncertain_points(logits: Tensor, cfg: Config) -> Tensor:
    """PointRend (Kirillov et al. 2020, section 3.1), points in box coordinates, (n, P, 2): of `oversample` P candidates the
    `importance` P whose logit is nearest to 0; the rest anywhere."""
    n, P = len(logits), cfg.loss_points
    kept = round(cfg.importance * P)
    candidates = draw_points(n, round(cfg.oversample * P), logits.device)
    best = read(logits, candidates).abs().topk(kept, largest=False).indices        # (n, kept)
    return torch.cat((take(candidates, best), draw_points(n, P - kept, logits.device)), 1)


@torch.no_grad()
def read_objects(regions: Regions, points: Tensor, targets: list[dict]) -> Tensor:
    """What the true masks are at points (n, P, 2) of the regions: (n, P) in [0, 1]. Each object's mask (h, w) covers its
    unpadded image."""
    places = regions.xyxy[:, None, :2] + points * (regions.xyxy[:, None, 2:] - regions.xyxy[:, None, :2])      # (n, P, 2)
    return torch.cat([read(object_masks(t, index), place) for t, index, place in
                      zip(targets, regions.object.split(regions.counts), places.split(regions.counts))])


def object_masks(target: dict, index: Tensor) -> Tensor:
    """(k, h, w) float masks of some objects; empty ones in an image without objects."""
    masks = target["masks"]
    return masks[index].float() if len(masks) else torch.zeros(len(index), *masks.shape[1:], device=masks.device)


@torch.no_grad()
def mask_iou(logits: Tensor, regions: Regions, targets: list[dict]) -> Tensor:
    """IoU (n,) of each binary mask, pasted, with the whole of its object, whose part outside the box counts against it."""
    points = grid_points(len(logits), IOU_GRID, IOU_GRID, logits.device)
    predicted = (read(logits, points) > 0).float()                                 # (n, 64^2)
    box = (regions.xyxy[:, 2:] - regions.xyxy[:, :2]).prod(-1)                     # (n,) as shares of the image
    area = torch.cat([object_masks(t, index).mean((1, 2)) for t, index in zip(targets, regions.object.split(regions.counts))])
    overlap = (predicted * read_objects(regions, points, targets)).mean(1) * box
    return overlap / (predicted.mean(1) * box + area - overlap).clamp(min=1e-9)


class Criterion:
    """Binary cross-entropy and dice at sampled points, and the squared error of the predicted IoU."""

    def __init__(self, cfg: Config):
        self.cfg = cfg

    def __call__(self, outputs: dict, targets: list[dict], num_boxes: float | None = None) -> dict:
        """-> weighted losses {"bce", "dice", "iou"}, each a sum over objects divided by their number, `num_boxes` where the
        batch is spread over ranks or micro-batches."""
        cfg, logits, regions = self.cfg, outputs["mask_logits"], outputs["regions"]
        if cfg.point_loss:
            points = uncertain_points(logits, cfg)                                 # (n, P, 2)
            values = read(logits, points)                                          # (n, P)
        else:
            points, values = grid_points(len(logits), *logits.shape[1:], logits.device), logits.flatten(1)
        truth = read_objects(regions, points, targets)                             # (n, P)
        probability = values.sigmoid()
        terms = {"bce": cfg.loss_bce * F.binary_cross_entropy_with_logits(values, truth, reduction="none").mean(1),
                 "dice": cfg.loss_dice * (1 - (2 * (probability * truth).sum(1) + 1) / (probability.sum(1) + truth.sum(1) + 1))}
        if "mask_ious" in outputs:
            terms["iou"] = cfg.loss_iou * (outputs["mask_ious"] - mask_iou(logits.detach(), regions, targets)) ** 2
        return {name: (regions.weight * term).sum() / (num_boxes or count_boxes(targets)) for name, term in terms.items()}

    def match(self, outputs: dict, targets: list[dict]) -> list[tuple[Tensor, Tensor]]:
        """Of the frozen detector: per image query and object indices, on the host."""
        return match(outputs, targets, self.cfg)


# -------------------------------------------------------------------------------------------------------- detections

@torch.no_grad()
def detect(outputs: dict, sizes: Tensor, cfg: Config) -> list[dict]:
    """The detector's `cfg.top_k` best detections, as it gives them, with their masks.

    sizes (B, 2): height and width, pixels, of the images they are wanted in -> B dictionaries as in
    `deformable_detr.detect`, with masks (k, h, w) bool, and mask_scores (k,): what the masks are to be ranked by."""
    result = []
    for found, size in zip(outputs["found"], sizes.to(outputs["pred_boxes"].device)):
        image = {name: x[:cfg.top_k] for name, x in found.items()}
        used, row = image.pop("region").unique(return_inverse=True)
        scale = size[[1, 0, 1, 0]]
        image["boxes"] = image["boxes"] * scale
        masks, certainty = paste(outputs["mask_logits"][used], outputs["regions"].xyxy[used] * scale, *size.tolist())
        quality = outputs["mask_ious"][used] if "mask_ious" in outputs else certainty
        result.append({**image, "masks": masks[row], "mask_scores": image["scores"] * quality[row]})
    return result


def paste(logits: Tensor, xyxy: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Maps (k, r, r) in their boxes (k, 4), pixels, which need not be whole -> masks (k, height, width) bool, true where the
    logit at the middle of a pixel is above 0, and the mean probability there (k,), 0 for an empty mask.

    Bilinear interpolation is one matrix for the rows and one for the columns."""
    rows = interpolation(xyxy[:, 1::2], logits.shape[1], height)                   # (k, height, r)
    columns = interpolation(xyxy[:, 0::2], logits.shape[2], width)                 # (k, width, r)
    masks, certainty = [], []
    for some in zip(rows.split(CHUNK), logits.split(CHUNK), columns.split(CHUNK)):
        values = some[0] @ some[1] @ some[2].transpose(1, 2)                       # (CHUNK, height, width)
        mask = values > 0
        masks.append(mask)
        certainty.append((values.sigmoid() * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1))
    return torch.cat(masks), torch.cat(certainty)


def interpolation(limits: Tensor, bins: int, pixels: int) -> Tensor:
    """Boxes from limits[:, 0] to limits[:, 1] along one axis, cut into `bins` -> (k, pixels, bins): what each bin counts at
    the middle of each pixel. Beyond the outermost bins' middles values fade towards 0, outside the box they are 0."""
    low, high = limits[:, :1], limits[:, 1:]
    share = (torch.arange(pixels, device=limits.device) + 0.5 - low) / (high - low).clamp(min=1e-6)            # (k, pixels)
    distance = (share * bins - 0.5)[..., None] - torch.arange(bins, device=limits.device)
    return (1 - distance.abs()).clamp(min=0) * ((share >= 0) & (share <= 1))[..., None]


def build(cfg: Config, num_classes: int, detector) -> tuple[MaskFrozenDETR, Criterion]:
    """The mask network with random weights on `detector` (what engine.models.load_model returned), and its criterion."""
    names = detector.meta["class_names"]
    if len(names) != num_classes:
        raise UserError(f"expected a detector of {num_classes} classes, as the data has, got one with {len(names)}: train it "
                        "on this data first (train.py --init copies class rows by name)")
    return MaskFrozenDETR(Frozen(detector.model, detector.paper.detect, cfg.enc_layer, names), cfg), Criterion(cfg)


def param_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Everything learns alike."""
    return [{"params": list(model.parameters()), "lr": recipe.lr}]
