"""Co-DETR: DETRs with Collaborative Hybrid Assignments Training (Zong et al., ICCV 2023, arXiv 2211.12860).

The idea: one-to-one matching gives the encoder few positives to learn from. So in training, classic one-to-many heads
(ATSS, Faster R-CNN) read the encoder's output and teach it, and the positives they find become extra decoder queries
whose objects are known. At test time all of it is gone and the detector alone remains. 52.1 AP in 12 epochs.

    paper                                             here
    Figure 4, section 3.2 the heads read the encoder  CoDETR.collaborate, CoDETR.pyramid
    section 3.2 Eq. 1, Table 1 ATSS, RetinaNet        DenseHead, atss_assign, retinanet_assign
    section 3.2 Eq. 1, Table 1 Faster R-CNN           RPNHead, RoIHead, max_iou_assign, sample, CoDETR.sample_rois
    section 3.2 Eq. 2-3 losses of the heads           Criterion.rpn, Criterion.rcnn, Criterion.dense
    section 3.3 Eq. 4 customised positive queries     choose_rows, CustomisedQueries
    section 3.3 Eq. 5-6 losses                        Criterion.queries, Criterion.__call__
    section 4.3 Co-DINO: quality focal loss, NMS      quality_focal_loss, detect
    section 3.4 discriminability, IoF-IoB, conflict   CoDETR.confidences, and `eval.py --analyze`
    Table 11 each head alone                          CoDETR.head_detections
    Table 4 recipes                                   Config, VARIANTS

    symbol                here
    K heads A_i           aux_heads: "atss" is K = 1, "atss,rcnn" K = 2, "atss,rcnn,retinanet" K = 3
    F_1..J, F_J+1         CoDETR.pyramid: the encoder's levels and one coarser, as maps
    B_i^pos, P_i^pos      boxes and labels of `choose_rows`
    lambda_1, lambda_2    lambda_queries, lambda_heads

B images, C channels, N classes, L decoder layers, A anchors (or sampled regions) of an image, n objects of an image, M
customised queries. Boxes inside the heads are corners in pixels of the network input.

Departs
 1. Images whose head found fewer positives than the fullest get random negatives as queries (code; the paper: positives
    only, `aux_negatives=False`). Where these run out too, rows without weight fill up, hidden from the others: the
    authors' code drops the loss of the whole batch there. Anchors in padding, and those that RetinaNet ignores, are among
    these negatives, as boxes of size 0 (ATSS: code).
 2. Customised queries carry the encoder's feature, as in Eq. 4, in Co-Deformable-DETR; in Co-DINO coordinates only (code).
 3. The embedding that tells the heads apart is one number per head, added to all channels: a slip of the authors' code
    that the released weights need.
 4. lambda_2 counts once for every decoder layer, as Eq. 6 puts it in the sum over layers: 6 x 2 = the code's factor 12.
 5. Anchors are centred on the corners of cells, without half a cell's shift (code). Queries of anchors keep their raw,
    unclipped coordinates; the customised regions include the ground truth itself (code).
 6. The heads' normalisers are counts of their own batch; over ranks and micro-batches they are weighed by its objects.
 7. One decoder pass for the queries of all heads, hidden from each other; the code makes a pass for each. The numbers are
    the same, and the memory, most of the cost, is projected once.
 8. RetinaNet (in the paper, not in its code) has ATSS's convolutions, box coder and weights, and its own anchors and rule.
 9. GIoU and IoU carry no epsilon; denoising and the cap of proposals at the number of tokens follow dino.py. Coordinates
    are embedded after a clamp at 1e-5 in both forms, although Co-DINO's other inverse sigmoids have 1e-3 (code).
10. DINO as this paper's code has it differs from dino.py: see `make_detector`.
11. ViT-L: the rate rises from 0 (code: from 1 %) and falls after epoch 7 (code; paper: 8), the average follows
    `train.Average`, the longest training image has 2048 pixels, as at test time (code: 2400).
12. A head alone keeps as many boxes as the detector, `top_k` (code: 100).
13. Left out: large-scale jitter and copy-paste (54.8 and 60.7 AP), mask heads, test-time augmentation.
"""
import re
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deformable_detr
import dino
import h_detr
from backbones import build_backbone
from boxes import (box_cxcywh_to_xyxy, box_iou, box_xyxy_to_cxcywh, clip_boxes, decode_deltas, encode_deltas,
                   inverse_sigmoid, nms, paired_giou, paired_iou, roi_align, soft_nms)
from deformable_detr import Memory, Queries, class_head, sine_embedding, take
from engine.errors import UserError
from engine.recipe import SMALL_DETECTOR, SMALL_RECIPE, Recipe
from matcher import SetLoss, Weights, at_least_float32, count_boxes, focal_loss, stack_layers

IGNORED, BACKGROUND = -2, -1        # assignments; from 0 on: the object's index
SPREAD = (0.1, 0.1, 0.2, 0.2)       # of the box deltas of ATSS and RoI head; the RPN's have 1
HEADS = ("rcnn", "atss", "retinanet")   # in the order of head_embed's rows, however aux_heads lists them
ATSS_SIDES = ((8.0, 8.0),)          # width and height of anchors, in strides
NINE_SIDES = tuple((4 * 2 ** (i / 3) / ratio ** 0.5, 4 * 2 ** (i / 3) * ratio ** 0.5)   # of the RPN and of RetinaNet
                   for ratio in (0.5, 1, 2) for i in range(3))
LEAST_QUERIES = 9                   # customised queries of a head, however few positives it found
TEST_PRE_NMS = 1000                 # proposals and ATSS boxes per level that reach NMS when a head is evaluated


@dataclass
class Config:
    """Co-DINO-Deformable-DETR of Table 4: 5 scales, ResNet-50, 12 epochs, 52.1 AP on COCO val2017."""
    backbone: str = "resnet50"
    backbone_weights: str = "imagenet"     # imagenet, a file, or none: trained from scratch with live normalisation
    backbone_norm: str = "batch"           # batch or group; published weights come with their own frozen statistics
    drop_path: float = 0.0                 # of the last block of a Swin, ViT or FocalNet, rising to it from 0
    base: str = "dino"                     # dino, or h_detr: Deformable DETR++ (without one-to-many queries)
    aux_heads: str = "atss,rcnn"           # none, or any of atss, rcnn, retinanet, separated by commas
    aux_queries: int = 300                 # most customised queries per head and image
    aux_negatives: bool = True             # fill them up with negatives of the head
    lambda_queries: float = 1.0            # of the customised queries' losses
    lambda_heads: float = 2.0              # of the heads' losses, once per decoder layer
    eval_head: str = "detr"                # detr or one of aux_heads: which head detects at test time
    rpn_pre_nms: int = 4000                # proposals per level that reach NMS
    rpn_proposals: int = 1000              # proposals per image
    rpn_samples: int = 256                 # anchors per image that the RPN learns from, half of them positive at most
    roi_samples: int = 512                 # regions per image, a quarter of them positive at most
    roi_dim: int = 1024
    roi_convs: int = 0                     # convolutions of the RoI head; with them one hidden layer, one box for all classes
    quality_focal: bool = True             # the class loss of Co-DINO; false: focal (Table 3, 51.2 AP without NMS)
    soft_nms: float = 0.8                  # IoU from which soft-NMS lowers scores; 0: no NMS
    dn_number: int = 100
    dn_label_noise: float = 0.5
    dn_box_noise: float = 1.0
    num_feature_levels: int = 5            # 5: C2..C5 and one coarser
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


RECIPE = Recipe(lr=2e-4, lr_backbone=2e-5, lr_offsets=2e-5, batch_size=16, epochs=12, lr_drop=11)


# What learns in minutes on two CPU cores: sizes and optimisation change, the method does not.
SMALL = dict(SMALL_RECIPE, **SMALL_DETECTOR, dn_number=50, top_k=100, loss_class=2.0, aux_queries=40, rpn_pre_nms=64,
             rpn_proposals=64, rpn_samples=64, roi_samples=32, roi_dim=128) | dict(epochs=10)
DEFORMABLE = dict(base="h_detr", quality_focal=False, soft_nms=0.0, loss_class=2.0, top_k=100)
CO_DEFORMABLE = {**DEFORMABLE, "num_feature_levels": 4, "num_queries": 300}
CO_DEFORMABLE_SWIN = {**CO_DEFORMABLE, "weight_decay": 0.05}
VARIANTS = {
    "co_deformable": CO_DEFORMABLE,                                                           # 49.5 AP in 12 epochs (Table 4)
    "co_deformable_small": DEFORMABLE,                                                        # beside SMALL
    "co_deformable_swin_t": {**CO_DEFORMABLE_SWIN, "backbone": "swin_t", "drop_path": 0.2},   # 51.7 AP
    "co_deformable_swin_s": {**CO_DEFORMABLE_SWIN, "backbone": "swin_s", "drop_path": 0.2},   # 53.4 AP
    "co_deformable_swin_b": {**CO_DEFORMABLE_SWIN, "backbone": "swin_b", "drop_path": 0.2},   # 55.5 AP
    "co_deformable_swin_l": {**CO_DEFORMABLE_SWIN, "backbone": "swin_l", "drop_path": 0.3},   # 56.9 AP
    "co_deformable_swin_l_900q": {**CO_DEFORMABLE_SWIN, "backbone": "swin_l", "drop_path": 0.6, "num_queries": 900,
                                  "top_k": 300, "epochs": 36, "lr_drop": 30},                 # 58.5 AP
    "swin_l": dict(backbone="swin_l", drop_path=0.3),                                         # 58.9 AP
    # 64.1 AP when it starts from weights trained on Objects365; on how many images a step is not known
    "swin_l_o365": dict(backbone="swin_l", drop_path=0.3, dn_box_noise=0.4, lr=1e-4, lr_backbone=1e-5, epochs=16, lr_drop=8,
                        train_sizes=tuple(range(480, 1537, 32)), max_size=2048, eval_size=1280, size_divisor=32),
    # 65.4 AP when it starts from weights trained on Objects365; see Departs 11
    "vit_l": dict(backbone="vit_l", drop_path=0.4, num_queries=1500, dn_number=300, dn_box_noise=0.4, roi_convs=4, top_k=1000,
                  lr=5e-5, layer_decay=0.8, weight_decay=0.01, batch_size=64, lr_drop=7, warmup=0.0225, ema=0.9999,
                  train_sizes=tuple(range(480, 1537, 32)), max_size=2048, eval_size=1280, size_divisor=32),
    "24_epochs": dict(epochs=24, lr_drop=20),
    "36_epochs": dict(epochs=36, lr_drop=30),
}


class Objects(NamedTuple):
    """Ground truth of one image as the heads see it."""
    labels: Tensor       # (n,)
    boxes: Tensor        # (n, 4) corners, pixels
    size: Tensor         # (2,) height and width of the part where anchors are valid, pixels


class Pyramid(NamedTuple):
    """What the heads read, finest level first."""
    maps: list           # [(B, C, H_l, W_l)]
    shapes: list         # [(H_l, W_l)]
    strides: list        # pixels per cell


class Candidates(NamedTuple):
    """What a head assigned in one image: rows to make customised queries of."""
    boxes: Tensor        # (A, 4) corners, pixels: anchors or sampled regions
    labels: Tensor       # (A,) N = background
    targets: Tensor      # (A, 4) corners, pixels, of the assigned object; zero for background
    features: Tensor     # (A / k, C) of the encoder: k anchors share a cell


class CoDETR(nn.Module):
    """Figure 4 of the paper: `detector` as it is, and everything that exists only in training."""

    def __init__(self, backbone: nn.Module, cfg: Config, num_classes: int):
        super().__init__()
        self.cfg, self.num_classes = cfg, num_classes
        self.detector = make_detector(backbone, cfg, num_classes)
        self.heads = [head for head in HEADS if head in cfg.aux_heads.split(",")]
        check_choices(cfg, self.heads)
        C, levels = cfg.dim, cfg.num_feature_levels + 1
        finest = 2 ** (6 - deformable_detr.num_maps(cfg.num_feature_levels))   # stride of C2 is 4, of C3 8
        self.strides = [finest * 2 ** level for level in range(levels)]
        if self.heads:
            self.downsample = nn.Sequential(nn.Conv2d(C, C, 3, 2, 1), nn.GroupNorm(32, C))
            self.aux_queries = nn.ModuleDict({head: CustomisedQueries(C, cfg.base == "h_detr") for head in self.heads})
        if "rcnn" in self.heads:
            self.rpn, self.roi = RPNHead(C), RoIHead(C, cfg.roi_dim, num_classes, cfg.roi_convs)
        if "atss" in self.heads:
            self.atss = DenseHead(C, num_classes, levels, ATSS_SIDES, atss_assign, has_centerness=True)
        if "retinanet" in self.heads:
            self.retinanet = DenseHead(C, num_classes, levels, NINE_SIDES, retinanet_assign, has_centerness=False)
        if self.heads and cfg.base == "h_detr":
            self.head_embed = nn.Embedding(len(self.heads), 1)

    def forward(self, images: Tensor, padding: Tensor, targets: list[dict] | None = None) -> dict:
        """images (B, 3, H, W), padding (B, H, W) -> the detector's outputs. In training, with targets, also
        `co_outputs`: predictions of heads and customised queries beside what they should be."""
        outputs = self.detector(images, padding, targets)
        if self.training and self.heads:
            outputs["co_outputs"] = self.collaborate(outputs["memory"], targets)
        elif not self.training and self.cfg.eval_head != "detr":
            outputs["head_detections"] = self.head_detections(outputs["memory"])
        return outputs

    def collaborate(self, memory: Memory, targets: list[dict]) -> dict:
        """Sections 3.2 and 3.3: every head predicts and is assigned objects, then the positives of all pass the decoder,
        hidden from each other. -> {"rpn": {...}, "rcnn": {...}, "atss": {...}, "rcnn.queries": {...}, ...}"""
        pyramid, objects = self.pyramid(memory), pixel_objects(targets, memory)
        co, candidates = {}, {}
        for head in self.heads:
            if head == "rcnn":
                co["rpn"], proposals = self.region_proposals(pyramid, memory, objects)
                co["rcnn"], candidates["rcnn"] = self.regions(memory, self.sample_rois(proposals, objects))
            else:
                co[head], candidates[head] = getattr(self, head).learn(pyramid, objects)
        scales = memory.image_sizes[:, [1, 0, 1, 0]]                               # (B, 4)
        chosen, weights = zip(*(choose_rows(candidates[head], scales, self.num_classes, self.cfg) for head in self.heads))
        queries = [self.customise(i, rows) for i, rows in enumerate(chosen)]
        joined = Queries(*(None if parts[0] is None else torch.cat(parts, 1) for parts in zip(*queries)))   # (B, sum of M, C)
        layers, _ = self.detector.decode(memory, joined, keep_apart(weights))
        counts = [w.shape[1] for w in weights]
        layers = [{name: x.split(counts, 1) for name, x in layer.items()} for layer in layers]
        for i, head in enumerate(self.heads):
            co[f"{head}.queries"] = {"layers": [{name: x[i] for name, x in layer.items()} for layer in layers],
                                     "labels": chosen[i].labels, "boxes": chosen[i].targets, "weights": weights[i]}
        return co

    def customise(self, i: int, rows: Candidates) -> Queries:
        """Eq. 4 for head i, whose own number is added to all positions."""
        queries = self.aux_queries[self.heads[i]](rows.boxes, rows.features)
        return queries if queries.position is None else queries._replace(
            position=queries.position + self.head_embed.weight[i])

    def pyramid(self, memory: Memory) -> Pyramid:
        """The encoder's levels as maps, padding included, and one more of twice the last stride."""
        maps = [x.transpose(1, 2).unflatten(2, shape)                              # [(B, C, H_l, W_l)]
                for x, shape in zip(memory.by_level(memory.tokens), memory.shapes)]
        maps.append(self.downsample(maps[-1]).to(maps[-1].dtype))
        return Pyramid(maps, [tuple(x.shape[-2:]) for x in maps], self.strides)

    def region_proposals(self, pyramid: Pyramid, memory: Memory, objects: list[Objects]) -> tuple[dict, list[Tensor]]:
        """The RPN's predictions with targets, and its proposals, [(P, 4)] without gradient."""
        logits, deltas = self.rpn(pyramid.maps)                                    # (B, A), (B, A, 4)
        anchors = grid_anchors(pyramid, NINE_SIDES, logits.device)                 # [(A_l, 4)]
        proposals = best_proposals(logits, deltas, anchors, memory.image_sizes, self.cfg.rpn_pre_nms,
                                   self.cfg.rpn_proposals)
        return {"logits": logits, "deltas": deltas, **rpn_targets(pyramid, anchors, objects, self.cfg.rpn_samples)}, proposals

    def sample_rois(self, proposals: list[Tensor], objects: list[Objects]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Regions to learn from: the ground truth itself and proposals, a quarter positive (IoU of 0.5 or more) at most.
        -> per image boxes (R, 4), labels (R,) and boxes of their objects (R, 4); positives first."""
        samples = []
        for boxes, image in zip(proposals, objects):
            own = torch.arange(len(image.boxes), device=boxes.device)
            assigned = torch.cat((own, max_iou_assign(boxes, image.boxes, 0.5, 0.5)))
            rows = torch.cat(sample(assigned, self.cfg.roi_samples, 0.25))
            labels, targets = look_up(assigned[rows], image, self.num_classes)
            samples.append((torch.cat((image.boxes, boxes))[rows], labels, targets))
        return samples

    def regions(self, memory: Memory, samples: list[tuple]) -> tuple[dict, list[Candidates]]:
        """The RoI head's predictions for sampled regions, and the regions as candidates."""
        counts = [len(boxes) for boxes, _, _ in samples]
        rois, labels, targets = (torch.cat(parts) for parts in zip(*samples))      # (R, 4), (R,), (R, 4)
        pooled = self.pool(memory, rois, counts)                                   # (R, 7, 7, C)
        logits, deltas = self.roi(pooled)                                          # (R, N + 1), (R, N, 4)
        fewest = min(counts)   # the code cuts all images to the shortest list
        rows = zip(rois.split(counts), labels.split(counts), targets.split(counts), pooled.mean((1, 2)).split(counts))
        return ({"logits": logits, "deltas": deltas, "rois": rois, "labels": labels, "boxes": targets},
                [Candidates(*(part[:fewest] for part in row)) for row in rows])

    def pool(self, memory: Memory, rois: Tensor, counts: list[int]) -> Tensor:
        """RoIAlign from the encoder's level that fits a region's size: (R, 4) -> (R, 7, 7, C). FPN's rule (Lin et al.
        2017, Eq. 1), with regions of 14 to 28 cells a side on the finest level."""
        L = len(memory.shapes)
        side = ((rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1])).sqrt()      # (R,)
        level = (side / (14 * self.strides[0]) + 1e-6).log2().floor().clamp(0, L - 1).long()
        image = torch.arange(len(counts), device=rois.device).repeat_interleave(torch.tensor(counts, device=rois.device))
        return roi_align(at_least_float32(memory.tokens), memory.shapes, self.strides[:L], rois, image, level)

    @torch.no_grad()
    def head_detections(self, memory: Memory) -> list[dict]:
        """Table 11: what `eval_head` alone detects: per image scores (k,), labels (k,), boxes (k, 4) corners in pixels of
        the network input, best first, after NMS."""
        pyramid, sizes, k = self.pyramid(memory), memory.image_sizes, self.cfg.top_k
        if self.cfg.eval_head != "rcnn":
            return getattr(self, self.cfg.eval_head).detect(pyramid, sizes, k)
        return [region_detections(*part, k) for part in zip(*self.all_regions(memory, pyramid), sizes)]

    def all_regions(self, memory: Memory, pyramid: Pyramid) -> tuple:
        """The two-stage head on all proposals: per image logits (P, N + 1), deltas (P, N, 4) and proposals (P, 4)."""
        logits, deltas = self.rpn(pyramid.maps)
        pre = min(self.cfg.rpn_pre_nms, TEST_PRE_NMS)
        proposals = best_proposals(logits, deltas, grid_anchors(pyramid, NINE_SIDES, logits.device), memory.image_sizes, pre,
                                   self.cfg.rpn_proposals)
        counts = [len(p) for p in proposals]
        logits, deltas = self.roi(self.pool(memory, torch.cat(proposals), counts))
        return logits.split(counts), deltas.split(counts), proposals

    def confidences(self, memory: Memory) -> dict[str, Tensor]:
        """Section 3.4, Eq. 9: the sum over all predictions and classes of each head's probabilities, the detector's first:
        what a head is sure of, as a function of the encoder's tokens."""
        layers, _ = self.detector.decode(memory, self.detector.propose(memory)[0])
        found = {"detr": layers[-1]["pred_logits"].sigmoid().sum()}
        pyramid = self.pyramid(memory) if self.heads else None
        for head in self.heads:
            if head == "rcnn":
                found[head] = sum(logits.softmax(-1)[:, :-1].sum() for logits in self.all_regions(memory, pyramid)[0])
            else:
                found[head] = getattr(self, head)(pyramid.maps)[0].sigmoid().sum()
        return found


def check_choices(cfg: Config, heads: list[str]):
    if cfg.aux_heads != "none" and set(cfg.aux_heads.split(",")) != set(heads):
        raise UserError(f"expected aux_heads none or some of {', '.join(HEADS)}, with commas between, got {cfg.aux_heads!r}")
    if cfg.eval_head != "detr" and cfg.eval_head not in heads:
        raise UserError(f"expected eval_head detr or one of aux_heads ({cfg.aux_heads}), got {cfg.eval_head!r}")


def make_detector(backbone: nn.Module, cfg: Config, num_classes: int) -> nn.Module:
    """The wrapped detector as this paper's code has it: convolutions before a normalisation have no bias; DINO has one
    class and one box head per layer and no spare row in its label table. A backbone with a pyramid of its own (ViT) needs no
    projections."""
    if cfg.base == "h_detr":
        detector = h_detr.HDETR(backbone, shared_fields(cfg, h_detr.Config, num_queries_one2many=0), num_classes)
    elif cfg.base == "dino":
        detector = dino.DINO(backbone, shared_fields(cfg, dino.Config), num_classes)
        for heads in ("class_embed", "bbox_embed"):
            setattr(detector, heads, nn.ModuleList(deepcopy(head) for head in getattr(detector, heads)))
        detector.label_enc = nn.Embedding(num_classes, cfg.dim)
        nn.init.normal_(detector.tgt_embed.weight)
    else:
        raise UserError(f"expected base dino or h_detr, got {cfg.base!r}")
    for projection in detector.input_proj:
        projection[0].bias = None
    if hasattr(backbone, "neck"):
        if backbone.channels != [cfg.dim] * cfg.num_feature_levels:
            raise UserError(f"expected dim {backbone.channels[0]} and {len(backbone.channels)} feature levels, as "
                            f"{cfg.backbone} makes them, got dim {cfg.dim} and {cfg.num_feature_levels}")
        detector.input_proj = nn.ModuleList(nn.Identity() for _ in backbone.channels)
        detector.num_maps = len(backbone.channels)
    return detector


def shared_fields(cfg: Config, other, **fixed):
    """A parent's Config: what it has in common with ours, `fixed`, and its own defaults."""
    return other(**{f.name: getattr(cfg, f.name) for f in fields(other) if hasattr(cfg, f.name)}, **fixed)


# ------------------------------------------------------------------------------------------- anchors and assignments

def draw(n: int, k: int) -> Tensor:
    """k of n, at random and in order; all of them if there are no more. The only random choice in this file."""
    return torch.randperm(n)[:k].sort().values


def pixel_objects(targets: list[dict], memory: Memory) -> list[Objects]:
    """Boxes are relative to the unpadded size that `padding` shows; anchors are valid where the image itself is, which
    differs when padding is passed off as image (large-scale jitter)."""
    return [Objects(t["labels"], box_cxcywh_to_xyxy(t["boxes"]) * size[[1, 0, 1, 0]], t.get("size", size))
            for t, size in zip(targets, memory.image_sizes)]


def grid_anchors(pyramid: Pyramid, sides: tuple, device) -> list[Tensor]:
    """Per level the corners (H W k, 4), pixels, of k anchors of `sides` strides per cell, row by row, centred on the top
    left corners of the cells."""
    anchors, sides = [], torch.tensor(sides, device=device)                        # (k, 2)
    for (H, W), stride in zip(pyramid.shapes, pyramid.strides):
        cells = torch.cartesian_prod(torch.arange(H, device=device), torch.arange(W, device=device)).flip(-1)   # (H W, 2)
        center, half = stride * cells[:, None].to(sides), stride * sides / 2
        anchors.append(torch.cat((center - half, center + half), -1).flatten(0, 1))
    return anchors


def valid_anchors(pyramid: Pyramid, sizes: Tensor, per_cell: int) -> list[Tensor]:
    """Per level (B, H W k): whether the anchor's cell begins inside images of `sizes` (B, 2), height and width in pixels."""
    masks = []
    for (H, W), stride in zip(pyramid.shapes, pyramid.strides):
        rows, columns = (torch.arange(count, device=sizes.device) * stride < extent[:, None]
                         for count, extent in zip((H, W), sizes.unbind(1)))        # (B, H), (B, W)
        masks.append((rows[:, :, None] & columns[:, None]).flatten(1).repeat_interleave(per_cell, 1))
    return masks


@torch.no_grad()
def assign_anchors(assign, pyramid: Pyramid, anchors: list[Tensor], objects: list[Objects]) -> Tensor:
    """`assign` for every image, among the anchors [(A_l, 4)] that are valid there -> (B, A), IGNORED for the others."""
    (H, W), all_anchors = pyramid.shapes[0], torch.cat(anchors)
    valid = valid_anchors(pyramid, torch.stack([image.size for image in objects]), len(anchors[0]) // (H * W))
    counts = torch.stack([level.sum(1) for level in valid], 1).tolist()            # per image and level
    valid = torch.cat(valid, 1)
    assigned = torch.full(valid.shape, IGNORED, device=valid.device)
    for row, mask, count, image in zip(assigned, valid, counts, objects):
        row[mask] = assign(all_anchors[mask], count, image.boxes)
    return assigned


@torch.no_grad()
def atss_assign(anchors: Tensor, counts: list[int], boxes: Tensor) -> Tensor:
    """ATSS (Zhang et al. 2020, Algorithm 1): anchors (A, 4) of levels of `counts` anchors, object boxes (n, 4), corners
    -> (A,) object or BACKGROUND.

    An object's candidates are the 9 anchors of each level nearest to its centre; positive are those whose IoU reaches the
    candidates' mean plus standard deviation and whose centre lies in the object. Several objects: the highest IoU."""
    if not len(boxes):
        return torch.full(anchors.shape[:1], BACKGROUND, device=anchors.device)
    iou = box_iou(anchors, boxes)[0]                                               # (A, n)
    centers, middles = ((b[:, :2] + b[:, 2:]) / 2 for b in (anchors, boxes))
    distance = (centers[:, None] - middles).square().sum(-1).sqrt()                # (A, n)
    candidates, start = [], 0
    for level in distance.split(counts):
        candidates.append(level.topk(min(9, len(level)), 0, largest=False).indices + start)
        start += len(level)
    candidates = torch.cat(candidates)                                             # (k, n)
    overlap = iou.gather(0, candidates)
    center = centers[candidates]                                                   # (k, n, 2)
    inside = torch.cat((center - boxes[:, :2], boxes[:, 2:] - center), -1).amin(-1) > 0.01
    positive = (overlap >= overlap.mean(0) + overlap.std(0)) & inside
    claim = torch.full_like(iou, -1.0).scatter(0, candidates, torch.where(positive, overlap, -1.0))
    best, index = claim.max(1)
    return torch.where(best >= 0, index, BACKGROUND)


def retinanet_assign(anchors: Tensor, counts: list[int], boxes: Tensor) -> Tensor:
    """RetinaNet (Lin et al. 2017, section 4): as `atss_assign`, by an IoU of 0.5; the rows between 0.4 and 0.5 are IGNORED,
    and no object goes without its best anchors."""
    return max_iou_assign(anchors, boxes, 0.5, 0.4, 1e-3)


@torch.no_grad()
def max_iou_assign(boxes: Tensor, objects: Tensor, positive: float, negative: float, rescue: float = torch.inf) -> Tensor:
    """Faster R-CNN's rule (Ren et al. 2015, section 3.1.2): boxes (A, 4), objects (n, 4), corners -> (A,) object from an
    IoU of `positive` on, BACKGROUND below `negative`, else IGNORED. The best boxes of an object become its positives from
    an IoU of `rescue` on, if it is given; a later object wins."""
    assigned = torch.full(boxes.shape[:1], BACKGROUND, device=boxes.device)
    if not len(objects) or not len(boxes):
        return assigned
    iou = box_iou(boxes, objects)[0]                                               # (A, n)
    best, index = iou.max(1)
    assigned[best >= negative] = IGNORED
    assigned = torch.where(best >= positive, index, assigned)
    top = iou.amax(0)                                                              # (n,)
    rescued = ((iou == top) & (top >= rescue)) * torch.arange(1, len(objects) + 1, device=boxes.device)
    last = rescued.amax(1)                                                         # (A,) 1 + the last object that claims it
    return torch.where(last > 0, last - 1, assigned)


def sample(assigned: Tensor, number: int, share: float) -> tuple[Tensor, Tensor]:
    """Indices of at most number x share positives and of negatives that fill up to `number`."""
    positives = (assigned >= 0).nonzero()[:, 0]
    positives = positives[draw(len(positives), int(number * share)).to(assigned.device)]
    negatives = (assigned == BACKGROUND).nonzero()[:, 0]
    return positives, negatives[draw(len(negatives), number - len(positives)).to(assigned.device)]


def look_up(assigned: Tensor, image: Objects, num_classes: int) -> tuple[Tensor, Tensor]:
    """Labels (A,) and boxes (A, 4) of the assigned objects; num_classes and zeros for all else."""
    labels = torch.cat((image.labels, image.labels.new_tensor([num_classes])))
    boxes = torch.cat((image.boxes, image.boxes.new_zeros(1, 4)))
    rows = assigned.clamp(min=-1)                                                  # -1 is the last row
    return labels[rows], boxes[rows]


# ----------------------------------------------------------------------------------------------- the one-stage heads

class DenseHead(nn.Module):
    """ATSS or RetinaNet: of k anchors per cell, of `sides`, their classes, boxes and (ATSS) centerness, from one 3x3
    convolution for the classes and one for the others (Table 12: one is enough). `assign` names each anchor's object."""

    def __init__(self, dim: int, num_classes: int, levels: int, sides: tuple, assign, has_centerness: bool):
        super().__init__()
        self.num_classes, self.sides, self.assign = num_classes, sides, assign
        self.cls_tower, self.reg_tower = (nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False),
                                                        nn.GroupNorm(32, dim), nn.ReLU()) for _ in range(2))
        self.cls, self.reg = (nn.Conv2d(dim, len(sides) * values, 3, padding=1) for values in (num_classes, 4))
        self.centerness = nn.Conv2d(dim, 1, 3, padding=1) if has_centerness else None
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in range(levels))
        init_convolutions(self)
        self.cls.bias = class_head(dim, len(sides) * num_classes).bias

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """[(B, C, H_l, W_l)] -> logits (B, A, N), deltas (B, A, 4), centerness logits (B, A), at least float32."""
        logits, deltas, centerness = [], [], []
        for x, scale in zip(maps, self.scales):
            y = self.reg_tower(x)
            logits.append(by_anchor(self.cls(self.cls_tower(x)), self.num_classes))
            deltas.append(by_anchor(self.reg(y), 4) * scale)
            if self.centerness:
                centerness.append(by_anchor(self.centerness(y), 1)[..., 0])
        return torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(centerness, 1) if centerness else None

    def learn(self, pyramid: Pyramid, objects: list[Objects]) -> tuple[dict, list[Candidates]]:
        """Predictions with targets, and the anchors as candidates with the encoder's features."""
        logits, deltas, centerness = self(pyramid.maps)                            # (B, A, N), (B, A, 4), (B, A)
        targets = self.targets(pyramid, grid_anchors(pyramid, self.sides, logits.device), objects)
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in pyramid.maps], 1)              # (B, A / k, C)
        rows = zip(targets["anchors"], targets["labels"], targets["boxes"], tokens)
        return ({"logits": logits, "deltas": deltas, "centerness": centerness, **targets},
                [Candidates(*row) for row in rows])

    def targets(self, pyramid: Pyramid, anchors: list[Tensor], objects: list[Objects]) -> dict:
        """Per image and anchor (B, A): `labels`, `boxes` of the assigned object, `weights` 0 where the anchor is not valid
        or ignored; `anchors` (B, A, 4) are zero there, and stay background."""
        assigned = assign_anchors(self.assign, pyramid, anchors, objects)          # (B, A)
        labels, boxes = zip(*(look_up(rows, image, self.num_classes) for rows, image in zip(assigned, objects)))
        weights = assigned != IGNORED
        return {"labels": torch.stack(labels), "boxes": torch.stack(boxes), "weights": weights,
                "anchors": torch.cat(anchors) * weights[..., None]}

    def detect(self, pyramid: Pyramid, sizes: Tensor, top_k: int) -> list[dict]:
        """The head alone: score = class (x centerness); the TEST_PRE_NMS best pairs of a level by class, NMS at 0.6."""
        logits, deltas, centerness = self(pyramid.maps)
        anchors = grid_anchors(pyramid, self.sides, logits.device)
        scores = logits.sigmoid()                                                  # (B, A, N)
        N, counts = scores.shape[-1], [len(a) * self.num_classes for a in anchors]
        boxes = clip_boxes(decode_deltas(deltas, torch.cat(anchors), deltas.new_tensor(SPREAD)), sizes[:, None])
        found = []
        for b in range(len(scores)):
            pairs, start = [], 0
            for level in scores[b].flatten().split(counts):
                pairs.append(level.topk(min(TEST_PRE_NMS, len(level))).indices + start)
                start += len(level)
            pairs = torch.cat(pairs)
            final = scores[b].flatten()[pairs]
            if centerness is not None:
                final = final * centerness[b].sigmoid()[pairs // N]
            found.append(after_nms(boxes[b][pairs // N], final, pairs % N, 0.6, top_k))
        return found


def centerness_targets(anchors: Tensor, boxes: Tensor) -> Tensor:
    """FCOS (Tian et al. 2019, Eq. 3) at the anchors' centres, all inside their object: (P, 4), (P, 4) -> (P,)."""
    center = (anchors[:, :2] + anchors[:, 2:]) / 2
    before, after = center - boxes[:, :2], boxes[:, 2:] - center                   # (P, 2)
    return (torch.minimum(before, after) / torch.maximum(before, after)).prod(1).sqrt()


def by_anchor(x: Tensor, values: int) -> Tensor:
    """A head's map (B, k values, H, W) -> (B, H W k, values), at least float32."""
    return at_least_float32(x).permute(0, 2, 3, 1).reshape(len(x), -1, values)


def init_convolutions(head: nn.Module):
    """N(0, 0.01) for every convolution, no bias."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------ the two-stage head

class RPNHead(nn.Module):
    """Nine anchors per cell: object or not, and its box."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.cls, self.reg = nn.Conv2d(dim, len(NINE_SIDES), 1), nn.Conv2d(dim, 4 * len(NINE_SIDES), 1)
        init_convolutions(self)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """[(B, C, H_l, W_l)] -> logits (B, A) and deltas (B, A, 4), at least float32."""
        hidden = torch.cat([F.relu(self.conv(x)).flatten(2) for x in maps], 2).transpose(1, 2)   # (B, A / 9, C)
        logits, deltas = (F.linear(hidden, layer.weight.flatten(1), layer.bias) for layer in (self.cls, self.reg))
        return at_least_float32(logits).flatten(1), at_least_float32(deltas).unflatten(-1, (-1, 4)).flatten(1, 2)


@torch.no_grad()
def rpn_targets(pyramid: Pyramid, anchors: list[Tensor], objects: list[Objects], number: int) -> dict:
    """What anchors [(A_l, 4)] learn: `sampled` (B, A), `positive` (B, A) among them, and deltas `to_object` (B, A, 4)."""
    assigned = assign_anchors(lambda boxes, counts, gt: max_iou_assign(boxes, gt, 0.7, 0.3, 0.3), pyramid, anchors, objects)
    anchors, (sampled, positive) = torch.cat(anchors), torch.zeros(2, *assigned.shape, dtype=torch.bool, device=assigned.device)
    to_object = anchors.new_zeros(*assigned.shape, 4)
    for b, image in enumerate(objects):
        rows = sample(assigned[b], number, 0.5)
        positive[b, rows[0]] = sampled[b, torch.cat(rows)] = True
        to_object[b, rows[0]] = encode_deltas(image.boxes[assigned[b, rows[0]]], anchors[rows[0]])
    return {"sampled": sampled, "positive": positive, "to_object": to_object}


@torch.no_grad()
def best_proposals(logits: Tensor, deltas: Tensor, anchors: list[Tensor], sizes: Tensor, pre: int, most: int) -> list:
    """logits (B, A), deltas (B, A, 4), anchors [(A_l, 4)], image sizes (B, 2) -> per image at most `most` boxes (P, 4),
    best first: the `pre` best of each level, clipped, after NMS at 0.7 among those of their level."""
    counts = [len(a) for a in anchors]
    scores, boxes = [], []
    for score, delta, anchor in zip(logits.split(counts, 1), deltas.split(counts, 1), anchors):
        score, best = score.topk(min(pre, len(anchor)))                            # (B, k)
        box = clip_boxes(decode_deltas(take(delta, best), anchor[best]), sizes[:, None])         # (B, k, 4)
        keep = nms(box, 0.7, usable=(box[..., 2:] > box[..., :2]).all(-1))
        scores.append(score.masked_fill(~keep, -torch.inf))
        boxes.append(box)
    scores, best = torch.cat(scores, 1).topk(min(most, sum(s.shape[1] for s in scores)))
    boxes = take(torch.cat(boxes, 1), best)
    return [b[s > -torch.inf] for b, s in zip(boxes, scores)]


class RoIHead(nn.Module):
    """Two hidden layers on 7x7 features of a region, then classes with background last and one box per class; or `convs`
    convolutions, one hidden layer, and one box whatever the class, with half the spread (ViT-L)."""

    def __init__(self, dim: int, hidden: int, num_classes: int, convs: int = 0):
        super().__init__()
        self.convs = nn.Sequential(*(nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(32, dim),
                                                   nn.ReLU()) for _ in range(convs)))
        self.fc1 = nn.Linear(49 * dim, hidden)
        self.fc2 = nn.Identity() if convs else nn.Linear(hidden, hidden)
        self.cls, self.reg = nn.Linear(hidden, num_classes + 1), nn.Linear(hidden, 4 if convs else 4 * num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls.weight, std=0.01)
        nn.init.normal_(self.reg.weight, std=0.001)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """(R, 7, 7, C) -> logits (R, N + 1) and deltas (R, N, 4), at least float32."""
        x = self.convs(pooled.permute(0, 3, 1, 2)).flatten(1)                      # (R, C 49)
        x = F.relu(self.fc2(F.relu(self.fc1(x))))
        logits, deltas = at_least_float32(self.cls(x)), at_least_float32(self.reg(x)).unflatten(1, (-1, 4))
        return logits, (deltas / 2).expand(-1, logits.shape[1] - 1, -1) if len(self.convs) else deltas


def region_detections(logits: Tensor, deltas: Tensor, proposals: Tensor, size: Tensor, top_k: int) -> dict:
    """One image of the RoI head alone: every class's box of every proposal, NMS at 0.5."""
    scores = logits.softmax(-1)[:, :-1]                                            # (R, N)
    boxes = clip_boxes(decode_deltas(deltas, proposals[:, None], deltas.new_tensor(SPREAD)), size)   # (R, N, 4)
    labels = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    return after_nms(boxes.flatten(0, 1), scores.flatten(), labels.flatten(), 0.5, top_k)


def after_nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, top_k: int) -> dict:
    """Class by class NMS of pairs (n, 4), (n,), (n,) -> the `top_k` best left. Only as many pairs are compared as it takes
    to find them: a pair is judged by better ones alone."""
    order, k = scores.argsort(descending=True), 2048
    while True:
        rows = order[:k]
        rows = rows[nms(boxes[rows], threshold, labels[rows])][:top_k]
        if len(rows) == top_k or k >= len(order):
            return {"scores": scores[rows], "labels": labels[rows], "boxes": boxes[rows], "query": rows}
        k *= 2


# ------------------------------------------------------------------------------------- customised positive queries

def choose_rows(candidates: list[Candidates], scales: Tensor, num_classes: int, cfg: Config) -> tuple[Candidates, Tensor]:
    """Section 3.3: each image's positives, at most `cfg.aux_queries`, then negatives up to the same number M for all.
    -> boxes (B, M, 4) and targets (B, M, 4) cxcywh relative to the image, labels (B, M), features (B, M, C), and weights
    (B, M): 0 for rows that are neither, all zero. scales (B, 4): image width, height, width, height."""
    positives = [(c.labels < num_classes).nonzero()[:, 0] for c in candidates]
    M = max(LEAST_QUERIES, min(cfg.aux_queries, max(len(p) for p in positives)))
    chosen, weights = [], []
    for c, positive, scale in zip(candidates, positives, scales):
        negative = (c.labels == num_classes).nonzero()[:, 0] if cfg.aux_negatives else positive[:0]
        rows = positive[draw(len(positive), M).to(positive.device)]
        rows = torch.cat((rows, negative[draw(len(negative), M - len(rows)).to(rows.device)]))
        fill = (0, 0, 0, M - len(rows))
        per_cell = max(1, len(c.labels) // max(1, len(c.features)))                # anchors that share a feature
        chosen.append((F.pad(box_xyxy_to_cxcywh(c.boxes[rows]) / scale, fill),
                       F.pad(c.labels[rows], fill[2:], value=num_classes),
                       F.pad(box_xyxy_to_cxcywh(c.targets[rows]) / scale, fill),
                       F.pad(c.features[rows // per_cell], fill)))
        weights.append(F.pad(torch.ones_like(rows, dtype=c.boxes.dtype), fill[2:]))
    return Candidates(*(torch.stack(part) for part in zip(*chosen))), torch.stack(weights)


def keep_apart(weights: list[Tensor]) -> Tensor | None:
    """Weights (B, M_i) of each head's rows -> (B, 1, M, M) True = blocked, M the sum of M_i: nobody sees another head's rows,
    nor rows without weight, except themselves (a row that sees nothing has no softmax). None where nothing is blocked."""
    head = torch.cat([torch.full_like(w[0], i) for i, w in enumerate(weights)])    # (M,)
    hidden = torch.cat(weights, 1)[:, None] == 0                                   # (B, 1, M)
    blocked = (head[:, None] != head) | hidden & ~torch.eye(len(head), dtype=torch.bool, device=head.device)   # (B, M, M)
    return blocked[:, None] if blocked.any() else None


class CustomisedQueries(nn.Module):
    """Eq. 4: boxes that a head called positive, embedded, and what the encoder knows there -> decoder queries. Without
    features (Co-DINO) the embedding is the content, and the decoder makes the position."""

    def __init__(self, dim: int, with_features: bool):
        super().__init__()
        width = 2 * dim if with_features else dim
        self.pos_trans, self.pos_norm = nn.Linear(2 * dim, width), nn.LayerNorm(width)
        if with_features:
            self.feat_trans, self.feat_norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        for layer in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, boxes: Tensor, features: Tensor) -> Queries:
        """boxes (B, M, 4), of which some reach outside the image, features (B, M, C) -> M queries."""
        C = features.shape[-1]
        inside = inverse_sigmoid(boxes).sigmoid()
        x = self.pos_norm(self.pos_trans(sine_embedding(inside, C // 2).flatten(2).to(features.dtype)))
        if x.shape[-1] == C:
            return Queries(x, None, boxes)
        position, content = x.chunk(2, -1)
        return Queries(content + self.feat_norm(self.feat_trans(features)), position, boxes)


# ------------------------------------------------------------------------------------------------------------ losses

def quality_focal_loss(logits: Tensor, labels: Tensor, boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """Quality focal loss (Li et al. 2020, Eq. 2) per query and class: the target of a positive is the IoU of its box.
    logits (..., K), labels (...) K = background, boxes and target_boxes (..., 4) cxcywh -> (..., K)."""
    one_hot = F.one_hot(labels, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)
    iou, _ = paired_iou(box_cxcywh_to_xyxy(boxes.detach()), box_cxcywh_to_xyxy(target_boxes))
    quality = one_hot * iou.nan_to_num()[..., None]
    return (quality - logits.sigmoid()) ** 2 * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")


class Criterion:
    """Eq. 6: the detector's losses, those of the heads, and those of the customised queries."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        parent = {"dino": dino, "h_detr": h_detr}[cfg.base]
        self.base = parent.Criterion(shared_fields(cfg, parent.Config))
        self.base.set_loss = SetLoss(Weights(cfg.cost_class, cfg.cost_l1, cfg.cost_giou),
                                     Weights(cfg.loss_class, cfg.loss_l1, cfg.loss_giou),
                                     class_loss=quality_focal_loss if cfg.quality_focal else focal_loss)

    def match(self, outputs: dict, targets: list[dict]) -> list[tuple[Tensor, Tensor]]:
        """The last layer's matching: per image query and object indices, on the host."""
        return self.base.match(outputs, targets)

    def __call__(self, outputs: dict, targets: list[dict], num_boxes: float | None = None) -> dict:
        """-> weighted losses: the detector's own, "rpn.cls", "rpn.l1", "rcnn.cls", "rcnn.giou", "atss.cls", "atss.giou",
        "atss.centerness", and per head "rcnn.queries.cls", "rcnn.queries.aux0.cls", ..."""
        losses = self.base(outputs, targets, num_boxes)
        share = count_boxes(targets) / num_boxes if num_boxes else 1.0
        for name, part in outputs.get("co_outputs", {}).items():
            if name.endswith(".queries"):
                terms, factor = self.queries(**part), self.cfg.lambda_queries
            else:
                price = {"rpn": self.rpn, "rcnn": self.rcnn}.get(name, self.dense)
                terms, factor = price(**part), self.cfg.lambda_heads * self.cfg.decoder_layers
            losses |= {f"{name}.{term}": share * factor * value for term, value in terms.items()}
        return losses

    def rpn(self, logits, deltas, sampled, positive, to_object) -> dict:
        """Eq. 2-3 for the RPN, over sampled anchors; shapes as in `rpn_targets`."""
        count = sum((mask.sum(1).clamp(min=1)).sum() for mask in (positive, sampled & ~positive))
        cls = F.binary_cross_entropy_with_logits(logits[sampled], positive[sampled].to(logits), reduction="sum")
        return {"cls": cls / count, "l1": (deltas[positive] - to_object[positive]).abs().sum() / count}

    def rcnn(self, logits, deltas, rois, labels, boxes) -> dict:
        """The RoI head over sampled regions (R, ...): cross-entropy, and GIoU of the true class's box times 10."""
        count = max(1, len(labels))
        positive = (labels < deltas.shape[1]).nonzero()[:, 0]
        predicted = decode_deltas(deltas[positive, labels[positive]], rois[positive], deltas.new_tensor(SPREAD))
        giou = (1 - paired_giou(predicted, boxes[positive])).sum()
        return {"cls": F.cross_entropy(logits, labels, reduction="sum") / count, "giou": 10 * giou / count}

    def dense(self, logits, deltas, centerness, labels, boxes, weights, anchors) -> dict:
        """A one-stage head over all anchors (B, A, ...): focal loss and GIoU times 2; of ATSS also centerness, which weighs
        the boxes."""
        positive = labels < logits.shape[-1]
        count = positive.sum(1).clamp(min=1).sum()
        terms = {"cls": (focal_loss(logits, labels) * weights[..., None]).sum() / count}
        near = torch.ones_like(deltas[positive][:, 0])                             # (P,)
        if centerness is not None:
            near = centerness_targets(anchors[positive], boxes[positive])
            terms["centerness"] = F.binary_cross_entropy_with_logits(centerness[positive], near, reduction="sum") / count
        predicted = decode_deltas(deltas[positive], anchors[positive], deltas.new_tensor(SPREAD))
        giou = ((1 - paired_giou(predicted, boxes[positive])) * near).sum() / near.sum().clamp(min=1)
        return terms | {"giou": 2 * giou}

    def queries(self, layers, labels, boxes, weights) -> dict:
        """Eq. 5: the set loss of every decoder layer, the objects being known: labels (B, M), boxes (B, M, 4), weights
        (B, M) of the class loss; divided by the number of positives."""
        predicted_logits, predicted = stack_layers(layers)                                # (L, B, M, N), (L, B, M, 4)
        positive = labels < predicted_logits.shape[-1]
        count = positive.sum().clamp(min=1)
        aim, loss = boxes.expand_as(predicted), self.base.set_loss
        cls = loss.class_loss(predicted_logits, labels.expand(len(layers), -1, -1), predicted, aim) * weights[..., None]
        l1 = (predicted - aim)[:, positive].abs()                                  # (L, P, 4)
        giou = 1 - paired_giou(*(box_cxcywh_to_xyxy(b[:, positive]) for b in (predicted, aim)))  # (L, P)
        terms = {}
        for i, name in enumerate([f"aux{i}." for i in range(len(layers) - 1)] + [""]):
            for term, value in (("cls", cls), ("l1", l1), ("giou", giou)):
                terms[name + term] = getattr(loss.loss, term) * value[i].sum() / count
        return terms


# ------------------------------------------------------------------------------------------------------- detections

@torch.no_grad()
def detect(outputs: dict, sizes: Tensor, cfg: Config) -> list[dict]:
    """As `deformable_detr.detect`, boxes clipped to the image. With soft-NMS (section 4.3) the best pairs, as many as
    there are queries, are thinned class by class; with `eval_head`, they are another head's."""
    if "head_detections" in outputs:
        fed = outputs["memory"].image_sizes                                        # (B, 2)
        scales = (sizes.to(fed.device) / fed)[:, None, [1, 0, 1, 0]].to(outputs["pred_boxes"])   # (B, 1, 4)
        return [{name: x[:cfg.top_k] * scale if name == "boxes" else x[:cfg.top_k] for name, x in found.items()}
                for found, scale in zip(outputs["head_detections"], scales)]
    pairs = outputs["pred_logits"].shape[1] if cfg.soft_nms else cfg.top_k
    found = deformable_detr.detect(outputs, sizes, replace(cfg, top_k=pairs))
    for image, size in zip(found, sizes.to(outputs["pred_boxes"].device)):
        image["boxes"] = clip_boxes(image["boxes"], size)
        if cfg.soft_nms:
            rows, scores = soft_nms(image["boxes"], image["scores"], image["labels"], cfg.soft_nms, 1e-3, cfg.top_k)
            image.update({name: x[rows] for name, x in image.items()}, scores=scores)
    return found


def build(cfg: Config, num_classes: int) -> tuple[CoDETR, Criterion]:
    """Model with random weights, and its criterion."""
    backbone = build_backbone(cfg.backbone, cfg.backbone_weights, cfg.backbone_norm, drop_path=cfg.drop_path,
                              maps=deformable_detr.num_maps(cfg.num_feature_levels))
    return CoDETR(backbone, cfg, num_classes), Criterion(cfg)


def param_groups(model: CoDETR, recipe: Recipe) -> list[dict]:
    """The detector's groups; the heads learn at the full rate. With `layer_decay`, a group for every block."""
    if recipe.layer_decay:
        return layer_groups(model, recipe)
    groups = {"dino": dino, "h_detr": h_detr}[model.cfg.base].param_groups(model.detector, recipe)
    groups[0]["params"] += [p for name, p in model.named_parameters() if not name.startswith("detector.")]
    return groups


def layer_groups(model: CoDETR, recipe: Recipe) -> list[dict]:
    """The rate falls from block to block of a ViT towards the image, patches and positions last; vectors (biases,
    normalisations) have no weight decay."""
    if not model.cfg.backbone.startswith("vit"):
        raise UserError(f"expected layer_decay beside a ViT, got {recipe.layer_decay:g} beside {model.cfg.backbone}: leave it 0")
    depth, groups = len(model.detector.backbone.blocks), {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        block = re.match(r"detector\.backbone\.(?:blocks\.(\d+)|pos_embed|patch_embed)", name)
        below = 0 if not block else depth + 1 if block[1] is None else depth - int(block[1])   # times the rate has fallen
        group = groups.setdefault((below, parameter.dim() > 1), {
            "params": [], "lr": recipe.lr * recipe.layer_decay ** below, "weight_decay": recipe.weight_decay * (parameter.dim() > 1)})
        group["params"].append(parameter)
    return list(groups.values())
