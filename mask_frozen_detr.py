"""Mask Frozen-DETR: High Quality Instance Segmentation with One GPU (Liang and Yuan 2023,
arXiv 2308.03747).

The idea: a trained detector already knows where every object is and what it is. Freeze it, and
train only a small network for the masks. It cuts a region out of a feature map for every predicted
box, refines the region, and compares each of its cells with the object's query: their dot product
is the mask's logit. The boxes and their AP stay the same, and training is short.

Neither code nor weights of the authors are public. We know the equations and the recipe from a
published reading note only.

    paper                                               here
    the frozen detector                                 FrozenDetector (frozen_detector.py)
    fine-tuning the detector instead, an ablation       train_detector, TrainedDetector
    F = C1 + interp(F_e(E))                             feature_map
    baseline, image level: M_i = sigma(q_i F^T)         image_masks
    baseline, box level: M_i = sigma(q_i R_i^T)         box_masks, region_masks
    R_i = RoIAlign(F, b_i)                              region_masks, regions.roi_align
    image encoder F_e, box encoder F_b                  build_blocks, encode
    their blocks: deformable, Swin, ConvNeXt            DeformableBlock, SwinMapBlock, ConvNeXtBlock
    channel mapper                                      channel_mapper, query_mapper
    neck: C1 <- GN(PWConv(C1))                          Neck
    query encoder: object to object, box to object      among_objects, from_region
    mask scoring: s_i = c_i iou_i                       ScoreHead, mask_iou
    point-sampled loss                                  uncertain_points, Criterion
    the best queries, pasting the masks                 detected_regions, detect, paste

    symbol         here
    C1             Memory.features[0]: the backbone's map of stride 4, (B, channels, H/4, W/4)
    E, e_l         the tokens of the detector's encoder (B, S, dim), and one level of them
                   (B, H_l W_l, dim). F is made of the level of stride 8: stride_eight
    q_i, b_i, c_i  outputs["queries"], outputs["pred_boxes"], sigmoid of outputs["pred_logits"]
    R_i            a region (r, r, C), with r = roi_size: the map F within the box b_i
    M_i            sigmoid of outputs["mask_logits"] (n, r, r)
    s_i            "mask_scores" of `detect`. The baselines have no mask scoring: there
                   s_i = c_i (sum of M_i where M_i > 0.5) / (number of cells where M_i > 0.5)
    N, k, beta     loss_points, oversample_points, importance of `Config`: of k N random points the
                   beta N least certain ones enter the loss, and (1 - beta) N other random points

B images, n regions of all images together, P points. C = channel_dim is the width of the mask
network, dim that of the detector. Boxes named xyxy are corners in [0, 1] of the unpadded image.

Differences from the paper. We do not know what the paper does on these points:
 1. Sizes: channel_dim 128, two blocks in each encoder, hidden width 1024, GroupNorm(32), Swin
    windows of 8 cells; of the query encoder, box-to-object attention only.
 2. Training: each object is learned by the query that Hungarian matching (costs 2, 5, 2) assigns,
    within its predicted box, as in evaluation; at most `train_regions` random objects per image.
 3. Points: those with the logit nearest to 0, as in PointRend. The note says that they are chosen
    at random, but then k would have no effect. N = 12544, k = 3, beta = 0.75.
 4. Loss weights: binary cross-entropy 5, dice 5, squared error of the predicted IoU 1.
 5. The IoU to predict is that with the complete object, including the part outside the box. The
    scoring head ends in a sigmoid, its layers are those of the only other implementation that we
    found, and its gradient also trains masks and regions.
 6. RoIAlign and pasting are inverse to each other, and neither rounds coordinates. Logits are
    pasted and compared with 0. The paper takes the sigmoid first, which smooths edges within a cell
    (0.02 AP less with regions of 16 cells).
 7. The baselines keep the neck and the mappers; they would have nothing to train otherwise.
 8. With five feature levels F uses the second one, which has stride 8; with one level, this one.
    DINO's query is the normalized state that its class head reads.
 9. C1 of a Swin detector that does not use this map has no trained LayerNorm. The backbone applies
    one without parameters.
10. Six complete epochs instead of 88,500 steps. The learning rate is multiplied by 0.1 after 90 %
    and again after 95 % of them, and the gradient norm is clipped at 0.1.
11. Masks are made for the detector's own detections, after its soft-NMS if it has one.
12. Fine-tuning (`train_detector`): a copy of the detector learns from the gradient of the masks
    and from its own losses, at a tenth of the learning rates of its own recipe.
"""
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matcher
from backbones.swin import SwinBlock, shift_mask
from boxes import at_least_float32, box_cxcywh_to_xyxy
from deformable_detr import (MLP, EncoderLayer, Memory, Projection, SelfAttention,
                             encoder_references, sine_positions)
from engine.errors import UserError
from engine.recipe import SMALL_RECIPE, Recipe
from frozen_detector import FrozenDetector, TrainedDetector
from heads.regions import roi_align
from masks import (dice_loss, grid_points, mask_iou, paste, sample_maps, sample_true_masks,
                   select_masks, uncertain_points)
from matcher import Matches, Weights, count_boxes

STRIDE = 4         # pixels per cell of C1 and F
WINDOW = 8         # cells per side of a Swin block's window
CHUNK = 25         # regions computed at a time in evaluation; bounds the memory
NEEDS_MASKS = True
NEEDS_DETECTOR = True


@dataclass
class Config:
    """The system of the paper, on top of any detector of this project."""
    level: str = "box"                   # where masks are made: box, or image (a baseline)
    roi_size: int = 32                   # cells per side of a region
    roi_box: str = "pred"                # boxes: pred, or gt for the upper bound with true boxes
    enc_layer: int = 0                   # encoder layer whose tokens are E: 1 the first, 0 the last
    neck: bool = True                    # 1x1 convolution and GroupNorm on C1
    image_encoder: str = "deformable"    # image encoder: none, deformable, swin or convnext
    image_layers: int = 2                # layers of the image encoder
    image_ffn_dim: int = 1024            # hidden units of the image encoder's feed-forward networks
    channel_dim: int = 128               # channels after the channel mapper
    box_encoder: str = "deformable"      # box encoder: none, deformable, swin or convnext
    box_layers: int = 2                  # layers of the box encoder
    box_ffn_dim: int = 1024              # hidden units of the box encoder's feed-forward networks
    query_encoder: str = "box2obj"       # query encoder: none, obj2obj, box2obj or both
    query_ffn: bool = False              # feed-forward network after the query encoder
    mask_scoring: bool = True            # rank masks by class score times predicted IoU
    score_dim: int = 128                 # channels of the scoring head
    score_ffn_dim: int = 1024            # hidden units of the scoring head
    num_heads: int = 8                   # attention heads
    num_points: int = 4                  # sampling points per attention head and feature level
    point_loss: bool = True              # loss at sampled points; else at every cell of the region
    loss_points: int = 12544             # N: points per object at which the loss is computed
    oversample_points: float = 3.0       # k: candidate points per point that is used
    importance: float = 0.75             # beta: fraction of points chosen by uncertainty
    train_regions: int = 100             # objects per image in a training step
    train_detector: bool = False         # train a copy of the detector too; else it is frozen
    detector_lr: float = 0.1             # its learning rates, as a fraction of its own recipe's
    expected_detector: str = ""          # model and backbone that it must be of; none: any
    top_k: int = 100                     # detections per image
    cost_class: float = 2.0              # matching: weight of the class cost
    cost_l1: float = 5.0                 # matching: weight of the L1 cost of boxes
    cost_giou: float = 2.0               # matching: weight of the GIoU cost of boxes
    loss_bce: float = 5.0                # weight of the binary cross-entropy of masks
    loss_dice: float = 5.0               # weight of the Dice loss of masks
    loss_iou: float = 1.0                # weight of the loss of the predicted IoU


RECIPE = Recipe(
    lr=1.5e-4, weight_decay=5e-5, batch_size=8, epochs=6, schedule="drops", lr_drops=(0.9, 0.95))

# For SMALL detectors, minutes on two CPU cores: other sizes and optimization, the same method.
SMALL = SMALL_RECIPE | dict(
    lr=4e-3, muon=0.0,
    epochs=2, roi_size=16, image_layers=1, image_ffn_dim=256, channel_dim=64, box_layers=2,
    box_ffn_dim=128, score_dim=16, score_ffn_dim=64, num_heads=4, loss_points=392)
BASELINE = dict(
    image_encoder="none", box_encoder="none", query_encoder="none", mask_scoring=False)
VARIANTS = {
    "image_baseline": dict(level="image", **BASELINE),
    "box_baseline": BASELINE,
    # the systems of the main comparison: 55.3 mask AP on test-dev is the better one of them
    "h_detr_swin_l": dict(expected_detector="h_detr swin_l_window7"),
    "dino_focalnet_l": dict(expected_detector="dino focalnet_l_4level"),
}
ENCODERS = ("none", "deformable", "swin", "convnext")
CHOICES = {"level": ("box", "image"), "roi_box": ("pred", "gt"),
           "image_encoder": ENCODERS, "box_encoder": ENCODERS,
           "query_encoder": ("none", "obj2obj", "box2obj", "both")}


def check_config(cfg: Config) -> None:
    """UserError for settings that do not exist or do not go together."""
    for field, choices in CHOICES.items():
        value = getattr(cfg, field)
        if value not in choices:
            raise UserError(f"expected {field} to be one of {', '.join(choices)}, got {value!r}")
    uses_regions = cfg.box_encoder != "none" or cfg.query_encoder != "none" or cfg.mask_scoring
    if cfg.level == "image" and uses_regions:
        raise UserError("expected no box encoder, query encoder or mask scoring with level image, "
                        "which has no regions: use --variant image_baseline")


class Regions(NamedTuple):
    """The n boxes of a batch for which masks are computed, image after image."""
    image: Tensor          # (n,) index of the image in the batch
    query: Tensor          # (n,) index of the query that is compared with the region
    xyxy: Tensor           # (n, 4)
    object: Tensor         # (n,) index of the object, in its image, whose mask is learned
    weight: Tensor         # (n,) weight in the losses
    counts: list[int]      # number of regions of each image


def image_regions(image: int, query: Tensor, xyxy: Tensor, objects: Tensor, weight=1.0) -> Regions:
    """Regions of one image: query (n,), xyxy (n, 4), objects (n,), one weight for all."""
    weights = torch.full_like(xyxy[:, 0], weight)                        # (n,)
    return Regions(torch.full_like(query, image), query, xyxy, objects, weights, [len(query)])


def concatenate(images: list[Regions]) -> Regions:
    """Regions of all images of a batch, given those of each image in order."""
    *columns, counts = zip(*images)
    return Regions(*[torch.cat(column) for column in columns], counts=sum(counts, []))


class MaskFrozenDETR(nn.Module):
    """The mask network. Its parameters and its state dict do not include a frozen detector. A
    trained one is the submodule `detector`, and `carried` describes it for checkpoints."""

    def __init__(self, base: FrozenDetector | TrainedDetector, cfg: Config):
        super().__init__()
        check_config(cfg)
        dim = base.dim
        C = cfg.channel_dim
        M = cfg.num_heads
        self.base = base
        self.cfg = cfg
        self.class_names = base.class_names
        self.top_k = cfg.top_k                            # detections of an image that get a mask
        self.carried = None
        if cfg.train_detector:
            self.detector = base.model
            self.carried = base.description()
        self.matching_costs = Weights(cfg.cost_class, cfg.cost_l1, cfg.cost_giou)

        # F = C1 + interp(F_e(E)). Only deformable attention reads all levels of E.
        if cfg.neck:
            self.neck = Neck(base.channels, dim)
        elif base.channels != dim:
            raise UserError(f"expected a backbone map of {dim} channels, as wide as the encoder, "
                            f"without a neck; got {base.channels}: use the neck")
        levels = base.num_levels if cfg.image_encoder == "deformable" else 1
        image_blocks = BlockConfig(dim, M, levels, cfg.num_points, cfg.image_ffn_dim)
        self.image_encoder = build_blocks(cfg.image_encoder, cfg.image_layers, image_blocks)

        # From here on C channels, for regions and queries alike.
        self.channel_mapper = nn.Linear(dim, C)
        self.query_mapper = nn.Linear(dim, C)
        box_blocks = BlockConfig(C, M, 1, cfg.num_points, cfg.box_ffn_dim)
        self.box_encoder = build_blocks(cfg.box_encoder, cfg.box_layers, box_blocks)
        self.query_encoder = QueryEncoder(cfg)
        if cfg.mask_scoring:
            self.score_head = ScoreHead(C, cfg.roi_size, cfg.score_dim, cfg.score_ffn_dim)

    def forward(self, images: Tensor, padding: Tensor, targets: list[dict] | None = None) -> dict:
        """Detect objects in images (B, 3, H, W) with padding (B, H, W), and compute their masks.

        targets: per image labels (n,), boxes (n, 4) and masks (n, h, w), for training and `roi_box`
        gt. Returns the detector's outputs and `regions`, `mask_logits` (n, r, r), `mask_ious` (n,)
        with mask scoring, and in evaluation `detections`: per image the scores, labels, boxes and
        queries of the detector, and `region`, the row of each one's mask in `mask_logits`.
        """
        # The detector, and the boxes that masks are computed for.
        outputs, tokens = self.base(images, padding, targets)
        memory = outputs["memory"]
        if self.training:
            regions = self.training_regions(outputs, targets)
        elif self.cfg.roi_box == "gt" and targets is not None:
            regions, outputs["detections"] = self.object_regions(outputs, targets)
        else:
            regions, outputs["detections"] = self.detected_regions(outputs)

        # The map F and the queries of the regions.
        features = self.feature_map(memory, tokens)                               # (B, H/4, W/4, C)
        queries = outputs["queries"][regions.image, regions.query]                # (n, dim)
        queries = self.query_mapper(queries)                                      # (n, C)
        queries = self.query_encoder.among_objects(queries, regions.image)        # (n, C)

        # Masks: dot products of queries and cells of the map or of the region.
        if self.cfg.level == "image":
            regions = cover_map(regions, features, memory)
            return outputs | self.image_masks(features, regions, queries)
        return outputs | self.box_masks(features, regions, queries, memory.image_sizes)

    def feature_map(self, memory: Memory, tokens: Tensor) -> Tensor:
        """F = C1 + interp(F_e(E)), after the channel mapper: (B, H/4, W/4, C). tokens (B, S, dim)
        are E. The mapper is linear and commutes with RoIAlign; before RoIAlign it is cheaper."""
        fine = memory.features[0]                                        # (B, channels, H/4, W/4)
        if self.cfg.neck:
            fine = self.neck(fine)                                       # (B, dim, H/4, W/4)
        memory = memory._replace(tokens=tokens.masked_fill(memory.padding[..., None], 0))
        if self.cfg.image_encoder != "deformable":
            memory = stride_eight(memory)                                # one level is enough
        memory = stride_eight(encode(self.image_encoder, memory))
        coarse = memory.tokens.transpose(1, 2).unflatten(2, memory.shapes[0])  # (B, dim, H/8, W/8)
        coarse = F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False)
        features = (fine + coarse).permute(0, 2, 3, 1)                   # (B, H/4, W/4, dim)
        return self.channel_mapper(features)

    def image_masks(self, features: Tensor, regions: Regions, queries: Tensor) -> dict:
        """Baseline: sigma(q_i F^T) over the map of the image. features (B, H/4, W/4, C), queries
        (n, C) -> `regions` and `mask_logits` (n, H/4, W/4) in float32."""
        logits = []
        for image_queries, image_map in zip(queries.split(regions.counts), features):
            logits.append(torch.einsum("nc,hwc->nhw", image_queries, image_map))
        return {"regions": regions, "mask_logits": torch.cat(logits).float()}

    def box_masks(self, features: Tensor, regions: Regions, queries: Tensor,
                  image_sizes: Tensor) -> dict:
        """Masks within the boxes. features (B, H/4, W/4, C), queries (n, C), image_sizes (B, 2) in
        pixels -> `regions`, `mask_logits` (n, r, r) and, with mask scoring, `mask_ious` (n,)."""
        pixels = regions.xyxy * image_sizes[regions.image][:, [1, 0, 1, 0]]      # (n, 4)
        chunk = len(queries) if self.training else CHUNK
        inputs = zip(pixels.split(chunk), regions.image.split(chunk), queries.split(chunk))
        chunks = [self.region_masks(features, *rows) for rows in inputs]
        masks = {name: torch.cat([x[name] for x in chunks]) for name in chunks[0]}
        return {"regions": regions} | masks

    def region_masks(self, features: Tensor, pixels: Tensor, image: Tensor, queries: Tensor):
        """R_i = F_b(RoIAlign(F, b_i)), then sigma(q_i R_i^T) and its IoU.

        features (B, H/4, W/4, C); of n regions pixels (n, 4), corners of the boxes in pixels, image
        (n,) and queries (n, C). Returns as `box_masks`; logits are summed over C in float32.
        """
        r = self.cfg.roi_size
        grid = features.shape[1:3]                                       # H/4, W/4
        cells = features.float().flatten(1, 2)                           # (B, H/4 W/4, C)
        level = torch.zeros_like(image)
        region = roi_align(cells, [grid], [STRIDE], pixels, image, level, r)     # (n, r, r, C)
        memory = encode(self.box_encoder, region_memory(region))
        tokens = memory.tokens                                           # (n, r r, C)
        queries = self.query_encoder.from_region(queries, memory)        # (n, C)
        logits = (queries.float()[:, None] * tokens.float()).sum(-1)     # (n, r r)
        logits = logits.unflatten(1, (r, r))                             # (n, r, r)
        if not self.cfg.mask_scoring:
            return {"mask_logits": logits}
        ious = self.score_head(logits.sigmoid(), tokens.unflatten(1, (r, r)))    # (n,)
        return {"mask_logits": logits, "mask_ious": ious}

    @torch.no_grad()
    def training_regions(self, outputs: dict, targets: list[dict]) -> Regions:
        """One region for each object: the box that its matched query predicts (with `roi_box` gt,
        its own box). At most `train_regions` random objects stand for all objects of an image."""
        predicted = clipped_corners(outputs["pred_boxes"])               # (B, Nq, 4)
        images = []
        for b, (query, index) in enumerate(matcher.match(outputs, targets, self.matching_costs)):
            sample = torch.randperm(len(query))[:self.cfg.train_regions]
            weight = len(query) / max(1, len(sample))
            query = query[sample].to(predicted.device)                   # (n,)
            index = index[sample].to(predicted.device)                   # (n,)
            xyxy = predicted[b, query]                                   # (n, 4)
            if self.cfg.roi_box == "gt":
                xyxy = clipped_corners(targets[b]["boxes"][index])       # (n, 4)
            images.append(image_regions(b, query, xyxy, index, weight))

        # Without any object, one region of weight 0 gives every parameter a gradient.
        if not any(len(regions.query) for regions in images):
            first = torch.zeros(1, dtype=torch.int64, device=predicted.device)
            images[0] = image_regions(0, first, predicted[0, first], first, weight=0.0)
        return concatenate(images)

    @torch.no_grad()
    def detected_regions(self, outputs: dict) -> tuple[Regions, list[dict]]:
        """The detector's `self.top_k` detections, with boxes in [0, 1], and their regions: one for
        each query, which may have detections of several classes."""
        predicted = clipped_corners(outputs["pred_boxes"])               # (B, Nq, 4)
        cfg = replace(self.base.model.cfg, top_k=self.top_k)
        detections = self.base.detect(outputs, predicted.new_ones(len(predicted), 2), cfg)
        images = []
        first = 0                                                        # first region of the image
        for b, detection in enumerate(detections):
            query, row = detection["query"].unique(return_inverse=True)
            detection["region"] = first + row
            first += len(query)
            images.append(image_regions(b, query, predicted[b, query], torch.zeros_like(query)))
        return concatenate(images), detections

    @torch.no_grad()
    def object_regions(self, outputs: dict, targets: list[dict]) -> tuple[Regions, list[dict]]:
        """An upper bound: every object is detected with its own label and box, with score 1."""
        device = outputs["pred_boxes"].device
        targets = [{name: t[name].to(device) for name in ("labels", "boxes")} for t in targets]
        images, detections = [], []
        first = 0                                                        # first region of the image
        for b, (query, index) in enumerate(matcher.match(outputs, targets, self.matching_costs)):
            query = query.to(device)                                     # (n,)
            index = index.to(device)                                     # (n,)
            xyxy = clipped_corners(targets[b]["boxes"][index])           # (n, 4)
            images.append(image_regions(b, query, xyxy, index))
            labels = targets[b]["labels"][index]                         # (n,)
            row = torch.arange(len(query), device=device)                # (n,)
            detections.append({"scores": torch.ones_like(xyxy[:, 0]), "labels": labels,
                               "boxes": xyxy, "query": query, "region": first + row})
            first += len(query)
        return concatenate(images), detections

    def get_extra_state(self) -> Tensor:
        """The frozen detector's hash, which PyTorch adds to every state dict of the network."""
        return self.base.hash

    def set_extra_state(self, state: Tensor) -> None:
        """Called when a state dict is loaded: its weights are useless with another detector. That
        of a trained detector has all weights itself."""
        expected = bytes(state.tolist()).hex()[:12]
        got = bytes(self.base.hash.tolist()).hex()[:12]
        if not self.cfg.train_detector and not torch.equal(state.cpu(), self.base.hash):
            raise UserError(f"expected the detector that these masks were trained on, weights "
                            f"{expected}, got {got}: give the right file with --detector")

    def _apply(self, fn, recurse: bool = True):
        """Called by to(), cuda(), double() and the like, which convert the detector as well."""
        if not self.cfg.train_detector:
            self.base.model._apply(fn)
        return super()._apply(fn, recurse)


def clipped_corners(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) cxcywh in [0, 1] -> corners (..., 4), clipped to the image."""
    return box_cxcywh_to_xyxy(at_least_float32(boxes)).clamp(0, 1)


def cover_map(regions: Regions, features: Tensor, memory: Memory) -> Regions:
    """Replace every box by that of the complete map features (B, H/4, W/4, C), with its padding:
    image-level masks are then learned and pasted like those of boxes."""
    height, width = features.shape[1:3]
    extent = torch.tensor([STRIDE * width, STRIDE * height], device=features.device)     # (2,) px
    corner = extent / memory.image_sizes[regions.image].flip(-1)         # (n, 2), at least 1
    return regions._replace(xyxy=torch.cat((torch.zeros_like(corner), corner), -1))


def stride_eight(memory: Memory) -> Memory:
    """Reduce a memory to its level of stride 8: the first one, or the second one if the first has
    the size of C1 (five-scale detectors)."""
    finest = tuple(memory.features[0].shape[-2:])
    level = 1 if len(memory.shapes) > 1 and tuple(memory.shapes[0]) == finest else 0
    ratios = memory.valid_ratios[:, level:level + 1]                     # (B, 1, 2)
    parts = (memory.tokens, memory.positions, memory.padding)
    tokens, positions, padding = [memory.by_level(x)[level] for x in parts]      # (B, H/8 W/8, ..)
    return memory._replace(tokens=tokens, positions=positions, padding=padding,
                           shapes=[memory.shapes[level]], valid_ratios=ratios)


def region_memory(region: Tensor) -> Memory:
    """Regions (n, r, r, C) as n images of one level: the same blocks encode images and boxes."""
    n, r, _, C = region.shape
    no_padding = torch.zeros(1, r, r, dtype=torch.bool, device=region.device)
    positions = sine_positions(no_padding, C).expand(n, -1, -1)          # (n, r r, C)
    ratios = region.new_ones(n, 1, 2)
    return Memory(region.flatten(1, 2), positions, padding=None, shapes=[(r, r)],
                  valid_ratios=ratios, features=[], image_sizes=None, padded_size=(r, r))


class Neck(Projection):
    """C1 <- GN(PWConv(C1)): (B, channels, H, W) -> (B, dim, H, W)."""

    def __init__(self, channels: int, dim: int):
        super().__init__(nn.Conv2d(channels, dim, 1, bias=False), nn.GroupNorm(32, dim))


class BlockConfig(NamedTuple):
    """Sizes of a block, with the names that `EncoderLayer` reads."""
    dim: int
    num_heads: int
    num_feature_levels: int
    num_points: int
    ffn_dim: int
    dropout: float = 0.0


class DeformableBlock(EncoderLayer):
    """The encoder layer of Deformable DETR with GELU in place of ReLU."""

    def __init__(self, cfg: BlockConfig):
        super().__init__(cfg)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, memory: Memory, references: Tensor) -> Tensor:
        """Tokens (B, S, dim) of `memory`, references (B, S, L, 2) -> tokens (B, S, dim)."""
        x = memory.tokens
        query = x + memory.positions
        x = self.norm1(x + self.self_attn(query, references, x, memory.shapes, memory.padding))
        return self.norm2(x + self.linear2(F.gelu(self.linear1(x))))     # <- GELU


class ConvNeXtBlock(nn.Module):
    """7x7 depth-wise convolution, LayerNorm, and two linear layers with GELU between them (Liu et
    al. 2022, A ConvNet for the 2020s); without layer scale."""

    def __init__(self, cfg: BlockConfig):
        super().__init__()
        self.depthwise = nn.Conv2d(cfg.dim, cfg.dim, 7, padding=3, groups=cfg.dim)
        self.norm = nn.LayerNorm(cfg.dim)
        self.linear1 = nn.Linear(cfg.dim, cfg.ffn_dim)
        self.linear2 = nn.Linear(cfg.ffn_dim, cfg.dim)

    def forward(self, memory: Memory, references: Tensor) -> Tensor:
        """Tokens (B, H W, dim) of one level -> tokens (B, H W, dim); references are not used."""
        x = memory.tokens.transpose(1, 2)                                # (B, dim, H W)
        x = self.depthwise(x.unflatten(2, memory.shapes[0]))             # (B, dim, H, W)
        x = self.norm(x.flatten(2).transpose(1, 2))                      # (B, H W, dim)
        return memory.tokens + self.linear2(F.gelu(self.linear1(x)))


class SwinMapBlock(SwinBlock):
    """Attention within windows of 8 x 8 cells, which are shifted by 4 cells in every second block
    (Liu et al. 2021, Swin Transformer). Its hidden units are a multiple of dim, ffn_dim at most."""

    def __init__(self, cfg: BlockConfig, shift: bool):
        mlp_ratio = cfg.ffn_dim // cfg.dim
        super().__init__(cfg.dim, cfg.num_heads, WINDOW, shift, mlp_ratio, drop_path=0.0)

    def forward(self, memory: Memory, references: Tensor) -> Tensor:
        """Tokens (B, H W, dim) of one level -> tokens (B, H W, dim); references are not used."""
        x = memory.tokens.unflatten(1, memory.shapes[0])                 # (B, H, W, dim)
        mask = shift_mask(*memory.shapes[0], WINDOW, x.device)
        return super().forward(x, mask).flatten(1, 2)


def build_blocks(kind: str, depth: int, cfg: BlockConfig) -> nn.ModuleList:
    """F_e or F_b: `depth` blocks of one of the ENCODERS, none for kind "none"."""
    blocks = nn.ModuleList()
    if kind == "none":
        return blocks
    for i in range(depth):
        if kind == "deformable":
            blocks.append(DeformableBlock(cfg))
        elif kind == "swin":
            blocks.append(SwinMapBlock(cfg, shift=i % 2 == 1))
        else:
            blocks.append(ConvNeXtBlock(cfg))
    return blocks


def encode(blocks: nn.ModuleList, memory: Memory) -> Memory:
    """Apply F_e to images or F_b to regions: the memory with the tokens after all blocks."""
    references = encoder_references(memory)                              # (B, S, L, 2)
    for block in blocks:
        memory = memory._replace(tokens=block(memory, references))
    return memory


class QueryEncoder(nn.Module):
    """The detector's queries were trained on features of complete images; adapt them with
    self-attention among objects, cross-attention to their region, and an FFN (all optional)."""

    def __init__(self, cfg: Config):
        super().__init__()
        C = cfg.channel_dim
        M = cfg.num_heads
        self.object_to_object = cfg.query_encoder in ("obj2obj", "both")
        self.box_to_object = cfg.query_encoder in ("box2obj", "both")
        self.feed_forward = cfg.query_ffn
        if self.object_to_object:
            self.self_attn = SelfAttention(C, M, 0.0)
            self.self_norm = nn.LayerNorm(C)
        if self.box_to_object:
            self.attn = nn.MultiheadAttention(C, M, batch_first=True)
            self.norm = nn.LayerNorm(C)
        if self.feed_forward:
            hidden = cfg.box_ffn_dim
            self.ffn = nn.Sequential(nn.Linear(C, hidden), nn.GELU(), nn.Linear(hidden, C))
            self.ffn_norm = nn.LayerNorm(C)

    def among_objects(self, queries: Tensor, image: Tensor) -> Tensor:
        """Object to object: self-attention among queries (n, C) with equal image (n,) -> (n, C)."""
        if not self.object_to_object:
            return queries
        other_image = image[:, None] != image                            # (n, n)
        no_positions = torch.zeros_like(queries)
        attended = self.self_attn(queries[None], no_positions, other_image)[0]     # (n, C)
        return self.self_norm(queries + attended)

    def from_region(self, queries: Tensor, region: Memory) -> Tensor:
        """Box to object: cross-attention of each query (n, C) to its own region, then the
        feed-forward network -> (n, C)."""
        if self.box_to_object:
            values = region.tokens                                       # (n, r r, C)
            keys = values + region.positions                             # (n, r r, C)
            attended, _ = self.attn(queries[:, None], keys, values, need_weights=False)
            queries = self.norm(queries + attended[:, 0])                # (n, C)
        if self.feed_forward:
            queries = self.ffn_norm(queries + self.ffn(queries))
        return queries


class ScoreHead(nn.Module):
    """iou_i = MLP(Flatten(Conv(Cat(M_i, R_i)))): predict the IoU of a mask with its object, the
    same for all classes. `width`: channels of the convolutions; `hidden`: of the MLP."""

    def __init__(self, dim: int, roi_size: int, width: int, hidden: int):
        super().__init__()
        inputs = (dim + 1, width, width, width)
        strides = (1, 1, 2, 2)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, width, 3, stride, padding=1) for i, stride in zip(inputs, strides))
        side = (roi_size + 3) // 4                # after two convolutions of stride 2
        self.mlp = MLP(side * side * width, hidden, hidden, 1)

    def forward(self, masks: Tensor, regions: Tensor) -> Tensor:
        """Mask probabilities (n, r, r), regions (n, r, r, C) -> IoUs (n,) in (0, 1)."""
        x = torch.cat((masks[..., None], regions.float()), -1)           # (n, r, r, 1 + C)
        x = x.permute(0, 3, 1, 2)                                        # (n, 1 + C, r, r)
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.mlp(x.flatten(1))[:, 0].float().sigmoid()


class Criterion:
    """Binary cross-entropy and dice loss at points, and the squared error of the predicted IoU;
    with the criterion of a detector that is trained too, its own losses as well."""

    def __init__(self, cfg: Config, detector=None):
        self.cfg = cfg
        self.detector = detector
        if hasattr(detector, "set_image_counts"):         # see train.py
            self.set_image_counts = detector.set_image_counts
        self.matching_costs = Weights(cfg.cost_class, cfg.cost_l1, cfg.cost_giou)

    def __call__(self, outputs: dict, targets: list[dict], num_boxes=None) -> dict[str, Tensor]:
        """Compute the weighted losses {"bce", "dice", "iou", and for a trained detector
        "detector.cls", ...}, whose sum is the training loss.

        targets: per image labels (n,) and masks (n, h, w). num_boxes: the divisor of all losses,
        which are sums over objects; by default the number of objects in `targets`.
        """
        cfg = self.cfg
        logits = outputs["mask_logits"]                                  # (n, r, r)
        regions = outputs["regions"]
        masks = select_masks(targets, regions.object.split(regions.counts))
        if num_boxes is None:
            num_boxes = count_boxes(targets)

        # Predicted and true values at P points of every region.
        if cfg.point_loss:
            points = uncertain_points(
                logits, cfg.loss_points, cfg.oversample_points, cfg.importance)   # (n, P, 2)
            values = sample_maps(logits, points)                         # (n, P)
        else:
            points = grid_points(*logits.shape, logits.device)           # (n, r r, 2)
            values = logits.flatten(1)                                   # (n, r r)
        truth = sample_true_masks(masks, regions.xyxy, points)           # (n, P)

        # The losses of every region, then their weighted sums.
        cross_entropy = F.binary_cross_entropy_with_logits(values, truth, reduction="none")
        terms = {"bce": cfg.loss_bce * cross_entropy.mean(1),            # (n,)
                 "dice": cfg.loss_dice * dice_loss(values.sigmoid(), truth)}
        if "mask_ious" in outputs:
            true_ious = mask_iou(logits.detach(), masks, regions.xyxy)   # (n,)
            terms["iou"] = cfg.loss_iou * (outputs["mask_ious"] - true_ious) ** 2
        losses = {}
        for name, term in terms.items():
            losses[name] = (regions.weight * term).sum() / num_boxes
        if self.detector is not None:
            for name, loss in self.detector(outputs, targets, num_boxes).items():
                losses[f"detector.{name}"] = loss
        return losses

    def match(self, outputs: dict, targets: list[dict]) -> Matches:
        """Match the detector's queries: per image query and object indices, on the host."""
        return matcher.match(outputs, targets, self.matching_costs)


@torch.no_grad()
def detect(outputs: dict, sizes: Tensor, cfg: Config) -> list[dict]:
    """The detector's `cfg.top_k` best detections of each image, with masks.

    sizes (B, 2): height and width, in pixels, of the images that they are wanted for. Returns what
    the detector's own `detect` returns, with masks (top_k, height, width) bool and mask_scores
    (top_k,), by which masks are ranked. The score of a mask whose logits are not finite is NaN.
    """
    results = []
    for detections, size in zip(outputs["detections"], sizes.to(outputs["pred_boxes"].device)):
        result = {name: x[:cfg.top_k] for name, x in detections.items()}
        scale = size[[1, 0, 1, 0]]                                       # (4,) w, h, w, h
        result["boxes"] = result["boxes"] * scale

        # Detections of several classes may share a region: paste it once.
        region, row = result.pop("region").unique(return_inverse=True)
        logits = outputs["mask_logits"][region]                          # (n, r, r)
        masks, quality = paste(logits, outputs["regions"].xyxy[region] * scale, *size.tolist())
        if "mask_ious" in outputs:
            quality = outputs["mask_ious"][region]                       # (n,)
        finite = logits.flatten(1).isfinite().all(1)                     # (n,)
        quality = quality.masked_fill(~finite, torch.nan)
        result["masks"] = masks[row]
        result["mask_scores"] = result["scores"] * quality[row]
        results.append(result)
    return results


def build(cfg: Config, num_classes: int, detector) -> tuple[MaskFrozenDETR, Criterion]:
    """Make the mask network, with random weights, and its criterion. detector: what
    `engine.models.load_model` returned; it is frozen from now on, or copied and trained."""
    names = detector.meta["class_names"]
    if len(names) != num_classes:
        raise UserError(f"expected a detector with as many classes as the data, {num_classes}, "
                        f"got one with {len(names)}: train it on this data first (train.py "
                        "--init copies class rows by name)")
    kind = f"{detector.paper.__name__} {detector.cfg.backbone}"
    if cfg.expected_detector not in ("", kind):
        raise UserError(f"expected a detector of the kind {cfg.expected_detector}, got {kind}: "
                        "give another one with --detector, or leave out --variant")
    if cfg.train_detector:
        trained = TrainedDetector(detector, cfg.enc_layer)
        return MaskFrozenDETR(trained, cfg), Criterion(cfg, detector.criterion)
    frozen = FrozenDetector(detector.model, detector.paper.detect, cfg.enc_layer, names)
    return MaskFrozenDETR(frozen, cfg), Criterion(cfg)


def param_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Parameters of the mask network, with one learning rate, and groups of a trained detector."""
    named = model.named_parameters()
    masks = [parameter for name, parameter in named if not name.startswith("detector.")]
    groups = [{"params": masks, "lr": recipe.lr}]
    if model.cfg.train_detector:
        groups += model.base.param_groups(recipe, model.cfg.detector_lr)
    return groups
