"""Co-DETR: DETRs with Collaborative Hybrid Assignments Training (Zong et al., ICCV 2023, arXiv
2211.12860).

The idea: one-to-one matching gives the encoder few positive examples. So in training, classic
one-to-many heads (ATSS, Faster R-CNN) read the encoder's output and teach it, and their positive
boxes become extra decoder queries whose objects are known. At test time the detector alone remains:
Co-DINO reaches 52.1 AP in 12 epochs, and Co-Deformable-DETR 49.5 (both with ResNet-50).

    paper                                              here
    Figure 4, section 3.2 heads read the encoder       CoDETR.collaborate, CoDETR.pyramid
    section 3.2 one map becomes five                   multi_scale_adapter
    Table 1 the heads (heads/, one file per paper)     RPN, RoIHead, ATSS, RetinaNet, FCOS, GFL
    section 3.2, Eq. 1-3 assignment and losses         CoDETR.run_head, Criterion
    section 3.3, Eq. 4 customized positive queries     choose_rows, CustomizedQueries
    section 3.3, Eq. 5-6 their losses, all losses      Criterion.query_losses, Criterion.__call__
    section 4.3 Co-DINO: quality focal loss, NMS       quality_focal_loss, detect
    Table 11 each head alone                           CoDETR.head_detections
    section 4.4, appendix A, Eq. 9-12 conflict         CoDETR.confidences, and analysis.conflict
    Tables 4-6 detectors and recipes                   Config, RECIPE, VARIANTS
    appendix federated loss for LVIS                   FederatedLoss

    symbol                here
    Co-DINO               base "dino", with the changes of `make_detector`
    Co-Deformable-DETR    base "h_detr" without its one-to-many queries: Deformable-DETR++ (Table 3)
    Deformable-DETR       base "deformable_detr", plain (Tables 2, 8, 9, 10, 12 and 13)
    K heads A_i           aux_heads: "atss" is K = 1, "atss,rcnn" K = 2, "atss,atss" two equal heads
    F_1..J, F_J+1         CoDETR.pyramid: the encoder's levels and a coarser one, as maps
    B_i^pos, P_i^pos      Chosen.boxes; Chosen.labels and Chosen.targets
    Q_i                   CustomizedQueries
    lambda_1, lambda_2    lambda_queries, lambda_heads

B images, C channels, N classes, L decoder layers, A anchors (or sampled regions) of an image, n
objects of an image, M customized queries of a head, P positive ones of a batch. Boxes of the heads
are corners in pixels of the network's input; those of queries are cx, cy, w, h in [0, 1].

Differences from the paper
 1. Images with fewer positives than the image with the most get random negatives as queries (code;
    paper: positives only, `aux_negatives=False`), and where these run out, padding queries: zero
    loss weight, masked in self-attention (the code drops the loss of such a batch). Anchors in the
    padding (code) and those that RetinaNet ignores are among the negatives, as boxes of size 0.
 2. Customized queries contain the encoder's feature, as in Eq. 4, in Co-Deformable-DETR; in Co-DINO
    the coordinates only (code).
 3. The embedding that distinguishes the heads is one number per head, added to all channels: a
    mistake of the authors' code that the released weights need.
 4. Eq. 6 has lambda_2 inside the sum over the L decoder layers. The losses of the heads are the
    same for each l, so they have the factor lambda_2 L = 2 x 6 = 12, as in the code.
 5. Queries made of anchors keep raw, unclipped coordinates. The sampled regions include the true
    boxes of the objects (code).
 6. With several micro-batches in a step (`--accum`), the numbers of `Criterion.counts`, known only
    after a forward pass, are averaged over the ranks' current micro-batches, not over the step.
 7. One decoder pass for the queries of all heads, masked from each other; the code makes one pass
    for each head. The result is the same.
 8. RetinaNet, FCOS and GFL (in the paper, not in its code) have ATSS's convolutions and loss
    weights, and GFL 12 x 0.25 for its distributions.
 9. GIoU and IoU have no epsilon. Denoising queries, and images with fewer tokens than queries, are
    handled as in dino.py. The coordinates of customized queries are clamped at 1e-5 before they are
    embedded, also in Co-DINO, whose other inverse sigmoids clamp at 1e-3 (code).
10. DINO as this paper's code has it differs from dino.py: see `make_detector`.
11. ViT-L: the learning rate rises from 0 (code: from 1 %) and drops after epoch 7 (code; paper: 8).
12. Proposals whose scores nearly tie change ranks between implementations. So other regions are
    sampled, 1 to 5 of 1024, which changes gradients by 1e-3 to 1e-2 of their size.
13. The authors' sampler puts images of one orientation together on a GPU; ours mixes them.
14. Precision, classes and skipped steps: as in deformable_detr.py, 10 to 12.
15. The paper does not say how the adapter's convolutions are connected. Here each makes its map
    from the neighboring one and is followed by a group normalization.
16. With K > 3 heads the losses of each are multiplied by 2 / K, those of GFL by 1 / K, as in
    configurations of the authors; the paper does not say so.
17. Federated loss: the authors' code has it for the focal loss only. OUR CHOICE for quality focal
    loss: that of a class which was not chosen is multiplied by 0. It reaches decoder, proposals,
    denoising, customized queries and ATSS, and the second stage without background (`roi_sigmoid`).
18. Not built: the heads PAA and Mask R-CNN, Conditional- and DAB-DETR as detectors (Table 2), the
    mask branch of the largest model, training on Objects365, test-time augmentation.
"""
from copy import deepcopy
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deformable_detr
import dino
import h_detr
from backbones import build_backbone
from boxes import box_cxcywh_to_xyxy, paired_giou
from co_detr_queries import (Candidates, Chosen, CustomizedQueries, choose_rows, customized_mask,
                             join)
from co_detr_variants import VARIANTS  # noqa: F401  (train.py looks for it here)
from deformable_detr import Memory
from engine.errors import UserError
from engine.recipe import SMALL_DETECTOR, SMALL_RECIPE, Recipe
from engine.schedules import layer_groups
from heads.adapter import adapter_step, multi_scale_adapter
from heads.anchors import LOWEST_SCORE, Objects, Pyramid
from heads.atss import ATSS, atss_counts, atss_losses
from heads.faster_rcnn import (RPN, RoIHead, class_probabilities, classify_proposals,
                               detect_regions, predict_both_stages, roi_losses, rpn_losses)
from heads.fcos import FCOS, fcos_counts, fcos_losses
from heads.federated import FederatedLoss
from heads.gfl import GFL, gfl_counts, gfl_losses, quality_focal_loss
from heads.regions import clip_boxes, soft_nms
from heads.retinanet import RetinaNet, retinanet_losses
from matcher import Matches, copy_to_device, copy_to_host, count_boxes, stack_layers

BASES = {"dino": dino, "h_detr": h_detr, "deformable_detr": deformable_detr}
HEADS = ("rcnn", "atss", "retinanet", "fcos", "gfl")   # in the order in which they run
ONE_STAGE = {"atss": ATSS, "retinanet": RetinaNet, "fcos": FCOS, "gfl": GFL}
HEAD_LOSSES = {"rpn": rpn_losses, "rcnn": roi_losses, "atss": atss_losses, "fcos": fcos_losses,
               "retinanet": retinanet_losses, "gfl": gfl_losses}
MOST_FULL_HEADS = 3     # with more heads than these, their losses have lower weights


@dataclass
class Config:
    """Co-DINO of Table 4: 5 scales, ResNet-50, 12 epochs, 52.1 AP on COCO val2017."""
    backbone: str = "resnet50"          # name of a network in backbones/
    backbone_weights: str = "imagenet"  # imagenet, a file, or none: random weights
    backbone_norm: str = "batch"        # batch or group norm without backbone_weights; else frozen
    drop_path: float = 0.0              # maximum stochastic depth rate of a Swin, ViT or FocalNet
    # base detector: dino, deformable_detr, or h_detr without one-to-many queries
    base: str = "dino"
    aux_heads: str = "atss,rcnn"        # none, or rcnn, atss, retinanet, fcos, gfl, with commas
    adapter: str = "auto"               # pyramid: five maps for the heads from one; identity; auto
    aux_queries: int = 300              # maximum of customized queries per head and image
    aux_negatives: bool = True          # add negatives of the head up to aux_queries
    lambda_queries: float = 1.0         # lambda_1: weight of the customized queries' losses
    lambda_heads: float = 2.0           # lambda_2: weight of the heads' losses, per decoder layer
    eval_head: str = "detr"             # head that detects at test time: detr or one of aux_heads
    rpn_pre_nms: int = 4000             # proposals per level that reach NMS in training
    rpn_proposals: int = 1000           # proposals per image in training
    rpn_samples: int = 256              # anchors per image that train the RPN
    roi_samples: int = 512              # regions per image that train the second stage
    roi_dim: int = 1024                 # hidden units of the second stage
    roi_convs: int = 0                  # convolutions of the second stage; ViT-L: 4, class-agnostic
    roi_sigmoid: bool = False           # second stage: a sigmoid for each class, no background
    test_pre_nms: int = 1000            # eval_head rcnn: proposals per level that reach NMS
    test_proposals: int = 1000          # eval_head rcnn: proposals per image
    test_proposal_nms: float = 0.7      # eval_head rcnn: IoU threshold of the proposals' NMS
    rcnn_soft_nms: float = 0.0          # eval_head rcnn: IoU threshold of soft-NMS; 0: NMS at 0.5
    dense_soft_nms: float = 0.0         # one-stage eval_head: soft-NMS threshold; 0: NMS at 0.6
    quality_focal: bool = True          # class loss: quality focal loss; false: focal loss
    fed_loss: int = 0                   # classes in each class loss (FedLoss, for LVIS); 0: all
    soft_nms: float = 0.8               # IoU from which soft-NMS lowers scores; 0: no NMS
    dn_number: int = 100                # denoising pairs per image, over all groups
    dn_label_noise: float = 0.5         # a label is resampled with half this probability
    dn_box_noise: float = 1.0           # noise of positives, in half box sides; negatives 1x to 2x
    num_feature_levels: int = 5         # feature maps; 5: C2 to C5 and one coarser
    dim: int = 256                      # C: channels of tokens and queries
    num_heads: int = 8                  # attention heads
    num_points: int = 4                 # sampling points per attention head and feature level
    encoder_layers: int = 6             # encoder layers
    decoder_layers: int = 6             # decoder layers
    ffn_dim: int = 2048                 # hidden units of the feed-forward networks
    dropout: float = 0.0                # dropout rate
    num_queries: int = 900              # object queries
    top_k: int = 300                    # detections per image
    cost_class: float = 2.0             # matching: weight of the class cost
    cost_l1: float = 5.0                # matching: weight of the L1 cost of boxes
    cost_giou: float = 2.0              # matching: weight of the GIoU cost of boxes
    loss_class: float = 1.0             # weight of the class loss
    loss_l1: float = 5.0                # weight of the L1 loss of boxes
    loss_giou: float = 2.0              # weight of the GIoU loss of boxes
    size_divisor: int = 1               # batches are padded to a multiple of this


RECIPE = Recipe(lr=2e-4, lr_backbone=2e-5, lr_offsets=2e-5, batch_size=16, epochs=12, lr_drop=11)

# Trains in minutes on two CPU cores: other sizes and optimization, the same method.
SMALL = {**SMALL_RECIPE, **SMALL_DETECTOR, "dn_number": 50, "top_k": 100,
         "loss_class": 2.0, "aux_queries": 40, "rpn_pre_nms": 64, "rpn_proposals": 64,
         "rpn_samples": 64, "roi_samples": 32, "roi_dim": 128, "test_pre_nms": 64,
         "test_proposals": 64}


class CoDETR(nn.Module):
    """Figure 4 of the paper: `detector`, unchanged, and everything that exists only in training."""

    def __init__(self, backbone: nn.Module, cfg: Config, num_classes: int):
        super().__init__()
        self.cfg = cfg
        self.num_classes = num_classes
        self.detector = make_detector(backbone, cfg, num_classes)
        self.heads = head_names(cfg.aux_heads)
        if not self.heads:
            return
        C = cfg.dim
        levels = cfg.num_feature_levels
        finest = 2 ** (6 - BASES[cfg.base].num_maps(levels))   # 4 with maps C2 to C5, 32 with C5
        self.strides = [finest * 2 ** level for level in range(levels + 1)]
        self.downsample = adapter_step(C, stride=2)
        self.upsample = nn.ModuleList()
        if levels == 1 and cfg.adapter != "identity":
            self.strides = [finest // 4, finest // 2, finest, 2 * finest, 4 * finest]
            self.upsample = nn.ModuleList(adapter_step(C, stride=1) for _ in range(2))
            self.downsample_again = adapter_step(C, stride=2)
        with_features = cfg.base != "dino"
        self.aux_queries = nn.ModuleDict()
        for head in self.heads:
            self.aux_queries[head] = CustomizedQueries(C, with_features)
            if head != "rcnn":
                setattr(self, head, ONE_STAGE[kind_of(head)](C, num_classes, len(self.strides)))
        if "rcnn" in self.heads:
            self.rpn = RPN(C)
            self.roi = RoIHead(C, cfg.roi_dim, num_classes, cfg.roi_convs, cfg.roi_sigmoid)
        if with_features:
            self.head_embed = nn.Embedding(len(self.heads), 1)   # Difference 3

    def forward(self, images: Tensor, padding: Tensor, targets: list[dict] | None = None) -> dict:
        """images (B, 3, H, W), padding (B, H, W) -> the detector's outputs.

        In training also `co_outputs`: predictions of heads and customized queries with their
        targets. At test time with `eval_head`, also `head_detections`."""
        outputs = self.detector(images, padding, targets)
        if self.training and self.heads:
            outputs["co_outputs"] = self.collaborate(outputs["memory"], targets)
        if not self.training and self.cfg.eval_head != "detr":
            outputs["head_detections"] = self.head_detections(self.pyramid(outputs["memory"]))
        return outputs

    def pyramid(self, memory: Memory) -> Pyramid:
        """Section 3.2: the encoder's output as maps, with those that the adapter adds."""
        maps = []
        for tokens, shape in zip(memory.by_level(memory.tokens), memory.shapes):
            maps.append(tokens.transpose(1, 2).unflatten(2, shape))        # (B, C, H_l, W_l)
        coarser = [self.downsample]
        if len(self.upsample):
            coarser.append(self.downsample_again)
        maps = multi_scale_adapter(maps, self.upsample, coarser, self.strides, memory.padded_size)
        return Pyramid(maps, self.strides, memory.image_sizes)

    def collaborate(self, memory: Memory, targets: list[dict]) -> dict:
        """Sections 3.2 and 3.3: the heads predict, objects are assigned to their anchors, and the
        decoder runs once more on queries made of the positive anchors -> arguments of the losses:
        {"rpn": {...}, "rcnn": {...}, "atss": {...}, "rcnn.queries": {...}, ...}."""
        pyramid = self.pyramid(memory)
        objects = pixel_objects(targets, pyramid.image_sizes)
        co_outputs = {}
        candidates = []
        for head in self.heads:
            outputs, head_candidates = self.run_head(head, pyramid, objects)
            co_outputs |= outputs
            candidates.append(head_candidates)
        chosen = [choose_rows(each, pyramid.image_sizes, self.num_classes, self.cfg)
                  for each in candidates]
        layers = self.decode_customized(memory, chosen)
        for head, rows, head_layers in zip(self.heads, chosen, layers):
            co_outputs[f"{head}.queries"] = {"layers": head_layers, "labels": rows.labels,
                                             "boxes": rows.targets, "weights": rows.weights}
        return co_outputs

    def run_head(self, head: str, pyramid: Pyramid, objects: list[Objects]) -> tuple[dict, list]:
        """Eq. 1: predictions of one head with their targets, and per image its `Candidates`."""
        if head == "rcnn":
            return self.run_rcnn(pyramid, objects)
        module = getattr(self, head)
        outputs = module(pyramid.maps) | module.targets(pyramid, objects)
        candidates = []
        for b, features in enumerate(pyramid.tokens()):                    # (S, C) of each image
            candidates.append(Candidates(outputs["anchors"][b], outputs["labels"][b],
                                         outputs["boxes"][b], features))
        return {head: outputs}, candidates

    def run_rcnn(self, pyramid: Pyramid, objects: list[Objects]) -> tuple[dict, list]:
        """`run_head` for the two stages of Faster R-CNN."""
        cfg = self.cfg
        rpn, rcnn, pooled, counts = predict_both_stages(
            self.rpn, self.roi, pyramid, objects, cfg.rpn_samples, cfg.rpn_pre_nms,
            cfg.rpn_proposals, cfg.roi_samples)
        fewest = min(counts)   # the code cuts every image's list to the shortest
        candidates = []
        start = 0
        for count in counts:
            rows = slice(start, start + fewest)
            features = pooled[rows].mean((1, 2))                           # (A, C)
            candidates.append(Candidates(rcnn["rois"][rows], rcnn["labels"][rows],
                                         rcnn["boxes"][rows], features))
            start += count
        return {"rpn": rpn, "rcnn": rcnn}, candidates

    def decode_customized(self, memory: Memory, chosen: list[Chosen]) -> list[list[dict]]:
        """Section 3.3: decode the queries of all heads, masked from each other; chosen: one per
        head -> per head the predictions of every layer."""
        queries = []
        for i, (head, rows) in enumerate(zip(self.heads, chosen)):
            made = self.aux_queries[head](rows.boxes, rows.features)
            if made.position is not None:
                made = made._replace(position=made.position + self.head_embed.weight[i])
            queries.append(made)
        weights = [rows.weights for rows in chosen]
        layers, _ = self.detector.decode(memory, join(queries), customized_mask(weights))
        layers_of_heads = []
        start = 0
        for weight in weights:
            end = start + weight.shape[1]
            layers_of_heads.append([{name: x[:, start:end] for name, x in layer.items()}
                                    for layer in layers])
            start = end
        return layers_of_heads

    @torch.no_grad()
    def head_detections(self, pyramid: Pyramid) -> list[dict]:
        """Table 11: what `eval_head` alone detects; result as in `RetinaNet.detect`."""
        cfg = self.cfg
        if cfg.eval_head != "rcnn":
            head = getattr(self, cfg.eval_head)
            return head.detect(pyramid, cfg.top_k, cfg.dense_soft_nms)
        logits, deltas, proposals = self.classify_regions(pyramid)
        detections = []
        for b, size in enumerate(pyramid.image_sizes):
            detections.append(detect_regions(logits[b], deltas[b], proposals[b], size, cfg.top_k,
                                             cfg.rcnn_soft_nms))
        return detections

    def classify_regions(self, pyramid: Pyramid) -> tuple:
        """Faster R-CNN at test time, before NMS; results as in `classify_proposals`."""
        cfg = self.cfg
        return classify_proposals(self.rpn, self.roi, pyramid, cfg.test_pre_nms, cfg.test_proposals,
                                  cfg.test_proposal_nms)

    def confidences(self, memory: Memory) -> dict[str, Tensor]:
        """Section 4.4: what Grad-CAM differentiates, a number per head, the detector's first.

        OUR CHOICE (the paper does not say): the sum of all predictions' class probabilities."""
        layers, _ = self.detector.decode(memory, self.detector.propose(memory)[0])
        sums = {"detr": layers[-1]["pred_logits"].sigmoid().sum()}
        pyramid = self.pyramid(memory) if self.heads else None
        for head in self.heads:
            if head == "rcnn":
                logits = torch.cat(self.classify_regions(pyramid)[0])      # (proposals, N + 1)
                sums[head] = class_probabilities(logits, self.num_classes).sum()
            else:
                sums[head] = getattr(self, head)(pyramid.maps)["logits"].sigmoid().sum()
        return sums


def check_choices(cfg: Config) -> None:
    """Raise UserError for a base, a head or an adapter that does not exist or does not fit."""
    if cfg.base not in BASES:
        raise UserError(f"expected base {', '.join(BASES)}, got {cfg.base!r}")
    if cfg.adapter not in ("auto", "identity", "pyramid"):
        raise UserError(f"expected adapter auto, identity or pyramid, got {cfg.adapter!r}")
    if cfg.adapter == "pyramid" and cfg.num_feature_levels > 1:
        raise UserError("expected adapter pyramid with a single feature level, of which it makes "
                        f"five, got {cfg.num_feature_levels}: leave it auto, or give "
                        "--num_feature_levels 1")
    if cfg.fed_loss and cfg.base == "h_detr":
        raise UserError("expected fed_loss with base dino or deformable_detr, got h_detr, whose "
                        "proposals only tell objects from background: leave it 0")
    heads = cfg.aux_heads.split(",")
    if cfg.aux_heads != "none" and not set(heads) <= set(HEADS):
        raise UserError(f"expected aux_heads none or some of {', '.join(HEADS)}, with commas "
                        f"between, got {cfg.aux_heads!r}")
    if heads.count("rcnn") > 1:
        raise UserError("expected rcnn once in aux_heads (its two stages exist once; one-stage "
                        f"heads may be repeated), got {cfg.aux_heads!r}")
    if cfg.eval_head not in ("detr", *head_names(cfg.aux_heads)):
        raise UserError(f"expected eval_head detr or one of aux_heads ({cfg.aux_heads}), "
                        f"got {cfg.eval_head!r}")


def head_names(aux_heads: str) -> list[str]:
    """Names of the heads, in the order of HEADS: "atss,atss,rcnn" -> ["rcnn", "atss", "atss2"]."""
    given = aux_heads.split(",")
    names = []
    for kind in HEADS:
        for i in range(given.count(kind)):
            names.append(f"{kind}{i + 1}" if i else kind)
    return names


def kind_of(head: str) -> str:
    """Which of HEADS a head of this name is: "atss2" -> "atss"."""
    return head.rstrip("0123456789")


def loss_share(head: str, heads: list[str]) -> float:
    """Factor of the losses of `head`, one of K `heads`: 1; if K > 3, 2 / K, and 1 / K for GFL
    (Difference 16)."""
    if len(heads) <= MOST_FULL_HEADS:
        return 1.0
    return (1 if kind_of(head) == "gfl" else 2) / len(heads)


def make_detector(backbone: nn.Module, cfg: Config, num_classes: int) -> nn.Module:
    """The detector as this paper's code has it.

    Convolutions before a normalization have no bias. DINO has a class and a box head for each layer
    and no unused row in its label table. A backbone with a pyramid of its own (ViT) needs no
    projections."""
    if cfg.base == "h_detr":
        one_to_one = shared_fields(cfg, h_detr.Config, num_queries_one2many=0)
        detector = h_detr.HDETR(backbone, one_to_one, num_classes)
    elif cfg.base == "deformable_detr":
        plain = shared_fields(cfg, deformable_detr.Config)
        detector = deformable_detr.DeformableDETR(backbone, plain, num_classes)
    else:
        detector = dino.DINO(backbone, shared_fields(cfg, dino.Config), num_classes)
        detector.class_embed = nn.ModuleList(deepcopy(head) for head in detector.class_embed)
        detector.bbox_embed = nn.ModuleList(deepcopy(head) for head in detector.bbox_embed)
        detector.label_enc = nn.Embedding(num_classes, cfg.dim)
        nn.init.normal_(detector.tgt_embed.weight)
    for projection in detector.input_proj:
        projection[0].bias = None
    if hasattr(backbone, "neck"):
        levels = len(backbone.channels)
        if backbone.channels != [cfg.dim] * cfg.num_feature_levels:
            raise UserError(f"expected dim {backbone.channels[0]} and {levels} feature levels, as "
                            f"{cfg.backbone} makes them, got dim {cfg.dim} and "
                            f"{cfg.num_feature_levels}")
        detector.input_proj = nn.ModuleList(nn.Identity() for _ in backbone.channels)
        detector.num_maps = levels
    return detector


def shared_fields(cfg: Config, other: type, **fixed):
    """Make a Config of class `other`: fields that cfg has too, and `fixed`, which comes first."""
    values = {field.name: getattr(cfg, field.name) for field in fields(other)
              if hasattr(cfg, field.name)}
    return other(**(values | fixed))


def pixel_objects(targets: list[dict], image_sizes: Tensor) -> list[Objects]:
    """Objects with boxes in pixels; image_sizes (B, 2): heights and widths without padding, which
    limit the valid anchors unless there is a `target["size"]`."""
    valid = [target.get("size", size) for target, size in zip(targets, image_sizes)]
    objects = []
    for target, size, valid_size in zip(targets, image_sizes, copy_to_host(valid)):
        boxes = box_cxcywh_to_xyxy(target["boxes"]) * size.flip(0).repeat(2)
        objects.append(Objects(target["labels"], boxes, valid_size))
    return objects


# ---- losses

class Criterion:
    """Eq. 6: the losses of the detector, of the heads, and of the customized queries.

    Every loss is a sum divided by a count. On several GPUs the authors average the gradients with
    equal weights. Some counts are those of the GPU itself ("own"), others are averaged over the
    GPUs and at least 1 ("mean"). A micro-batch of a rank counts as one GPU here.

        loss                                   divided by                              count
        RPN                                    sampled anchors                         own
        RoI head                               sampled regions                         own
        RetinaNet                              positive anchors                        own
        ATSS, FCOS and GFL: class, centerness  positive anchors                        mean
        ATSS and FCOS: boxes                   sum of the positives' centerness        mean
        GFL: boxes                             sum of the positives' probabilities     mean
        detector: layers and proposals         objects                                 mean
        Co-DINO: denoising                     objects x denoising groups              mean
        customized queries of a head           positive queries of that head           mean

    Where the count is a mean, two ranks compute the loss of one large batch. Not so for denoising
    and customized queries, whose number depends on the micro-batch. Two micro-batches of one rank
    do so for the detector's layers and proposals only (Difference 6)."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.heads = head_names(cfg.aux_heads)
        base = BASES[cfg.base]
        self.base = base.Criterion(shared_fields(cfg, base.Config))
        self.base.set_loss.eps = 0.0   # Difference 9
        if cfg.quality_focal:
            self.base.set_loss.class_loss = quality_focal_loss
        self.federated = None
        if cfg.fed_loss:
            self.federated = FederatedLoss(self.base.set_loss.class_loss, cfg.fed_loss)
            self.base.set_loss.class_loss = self.federated
            self.federated_heads = ("atss", "rcnn") if cfg.roi_sigmoid else ("atss",)

    def set_image_counts(self, counts: Tensor) -> None:
        """counts (N,): training images with each class, for `fed_loss`."""
        if self.federated:
            self.federated.set_image_counts(counts)

    def match(self, outputs: dict, targets: list[dict]) -> Matches:
        """The last layer's matching: per image indices of queries and of their objects."""
        return self.base.match(outputs, targets)

    def __call__(self, outputs: dict, targets: list[dict], num_boxes: float | None = None) -> dict:
        """Weighted losses of one micro-batch.

        num_boxes: objects of a micro-batch, averaged over all micro-batches and ranks of the step
        (default: those of this one) -> {"cls", "aux0.cls", ..., "dn.cls", ..., "rpn.cls", "rpn.l1",
        "rcnn.cls", "rcnn.giou", "atss.cls", "atss.giou", "atss.centerness", "rcnn.queries.cls",
        "rcnn.queries.aux0.cls", ...}."""
        co_outputs = outputs.get("co_outputs", {})
        counts = average_over_ranks(self.counts(outputs, targets))
        losses = self.detector_losses(outputs, targets, num_boxes, counts)
        for name, part in co_outputs.items():
            if name.endswith(".queries"):
                factor = self.cfg.lambda_queries
                terms = self.query_losses(**part, count=counts[name])
            else:
                factor = self.cfg.lambda_heads * self.cfg.decoder_layers
                factor *= loss_share(name, self.heads)
                arguments = dict(part)
                if name in counts:
                    arguments["counts"] = counts[name]
                if self.federated and kind_of(name) in self.federated_heads:
                    N = part["logits"].shape[-1]
                    classes = self.federated.chosen_classes(part["labels"][None], N)   # (1, N)
                    arguments["classes"] = classes[0]
                terms = HEAD_LOSSES[kind_of(name)](**arguments)
            for term, value in terms.items():
                losses[f"{name}.{term}"] = factor * value
        return losses

    def counts(self, outputs: dict, targets: list[dict]) -> dict[str, Tensor]:
        """The counts of this micro-batch that are averaged over GPUs, except `num_boxes`."""
        counts = {}
        if "dn_outputs" in outputs:
            objects = sum(len(target["labels"]) for target in targets)
            count = torch.tensor(objects * outputs["dn_outputs"]["groups"])
            counts["dn"] = copy_to_device(count, outputs["pred_logits"].device)
        for name, part in outputs.get("co_outputs", {}).items():
            if name.endswith(".queries"):
                N = part["layers"][-1]["pred_logits"].shape[-1]
                counts[name] = (part["labels"] < N).sum()
            elif kind_of(name) in ("atss", "fcos"):
                N = part["logits"].shape[-1]
                head_counts = atss_counts if kind_of(name) == "atss" else fcos_counts
                counts[name] = head_counts(part["labels"], part["boxes"], part["anchors"], N)
            elif kind_of(name) == "gfl":
                counts[name] = gfl_counts(part["logits"], part["labels"])
        return {name: count.double() for name, count in counts.items()}

    def detector_losses(self, outputs: dict, targets: list[dict], num_boxes: float | None,
                        counts: dict) -> dict:
        """The detector's own losses; its denoising is divided by a count of its own."""
        objects = count_boxes(targets) if num_boxes is None else num_boxes
        objects = torch.as_tensor(objects, dtype=torch.float64).clamp(min=1)
        matched = {name: x for name, x in outputs.items() if name != "dn_outputs"}
        losses = self.base(matched, targets, objects)
        if "dn_outputs" in outputs:
            # divide by the groups of this micro-batch, with which `denoising` multiplies
            denoising = outputs["dn_outputs"]
            per_group = counts["dn"].clamp(min=1) / denoising["groups"]
            losses |= self.base.denoising(denoising, targets, per_group)
        return losses

    def query_losses(self, layers: list[dict], labels: Tensor, boxes: Tensor, weights: Tensor,
                     count: Tensor) -> dict:
        """Eq. 5: the set loss of every decoder layer, without matching: the objects are known.

        labels (B, M), boxes (B, M, 4), weights (B, M): of `Chosen` (boxes: targets); count: P
        -> {"aux0.cls": first layer, ..., "cls", "l1", "giou": last layer}."""
        logits, predicted = stack_layers(layers)                                   # (L, B, M, ...)
        set_loss = self.base.set_loss
        targets = boxes.expand_as(predicted)                                       # (L, B, M, 4)
        cls = set_loss.class_loss(logits, labels.expand(logits.shape[:-1]), predicted, targets)
        cls = (cls * weights[..., None]).flatten(1).sum(1)                         # (L,)

        image, row = (labels < logits.shape[-1]).nonzero(as_tuple=True)            # (P,) each
        predicted = predicted[:, image, row]                                       # (L, P, 4)
        targets = boxes[image, row]                                                # (P, 4)
        l1 = (predicted - targets).abs().flatten(1).sum(1)                         # (L,)
        overlap = paired_giou(box_cxcywh_to_xyxy(predicted), box_cxcywh_to_xyxy(targets))
        giou = (1 - overlap).sum(1)                                                # (L,)

        losses = {}
        count = count.clamp(min=1)
        for i in range(len(layers)):
            layer = "" if i + 1 == len(layers) else f"aux{i}."
            losses[f"{layer}cls"] = set_loss.loss.cls * cls[i] / count
            losses[f"{layer}l1"] = set_loss.loss.l1 * l1[i] / count
            losses[f"{layer}giou"] = set_loss.loss.giou * giou[i] / count
        return losses


def average_over_ranks(counts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean of each count over the ranks' current micro-batches, with one all-reduce."""
    if not counts:
        return counts
    mean = torch.cat([count.flatten() for count in counts.values()])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean)
        mean = mean / dist.get_world_size()
    parts = mean.split([count.numel() for count in counts.values()])
    return {name: part.view_as(count) for (name, count), part in zip(counts.items(), parts)}


# ---- detections

@torch.no_grad()
def detect(outputs: dict, sizes: Tensor, cfg: Config) -> list[dict]:
    """Detections of each image as `deformable_detr.detect` gives them, boxes clipped to the image.

    With `soft_nms` (section 4.3) the best pairs (query, class), as many as there are queries, go
    through soft-NMS within each class. An `eval_head` other than detr has detections of its own."""
    if "head_detections" in outputs:
        return scale_detections(outputs["head_detections"], outputs["memory"].image_sizes, sizes)
    pairs = outputs["pred_logits"].shape[1] if cfg.soft_nms else cfg.top_k
    detections = deformable_detr.detect(outputs, sizes, replace(cfg, top_k=pairs))
    for image, size in zip(detections, sizes.to(outputs["pred_boxes"].device)):
        image["boxes"] = clip_boxes(image["boxes"], size)
        if cfg.soft_nms:
            rows, scores = soft_nms(image["boxes"], image["scores"], image["labels"], cfg.soft_nms,
                                    LOWEST_SCORE, cfg.top_k)
            for name in image:
                image[name] = image[name][rows]
            image["scores"] = scores   # those that soft-NMS lowered
    return detections


def scale_detections(detections: list[dict], input_sizes: Tensor, sizes: Tensor) -> list[dict]:
    """Scale boxes from images of input_sizes (B, 2), as the network gets them, to sizes (B, 2)."""
    ratio = (sizes.to(input_sizes.device) / input_sizes).flip(1).repeat(1, 2)      # (B, 4)
    return [{**image, "boxes": image["boxes"] * scale.to(image["boxes"])}
            for image, scale in zip(detections, ratio)]


# ---- what train.py and eval.py ask for

def build(cfg: Config, num_classes: int) -> tuple[CoDETR, Criterion]:
    """Model with random weights, and its criterion."""
    check_choices(cfg)
    maps = BASES[cfg.base].num_maps(cfg.num_feature_levels)
    backbone = build_backbone(cfg.backbone, cfg.backbone_weights, cfg.backbone_norm,
                              drop_path=cfg.drop_path, maps=maps)
    return CoDETR(backbone, cfg, num_classes), Criterion(cfg)


def param_groups(model: CoDETR, recipe: Recipe) -> list[dict]:
    """The detector's groups, the heads at the full rate; with `layer_decay`, see `layer_groups`."""
    if recipe.layer_decay:
        if not model.cfg.backbone.startswith("vit"):
            raise UserError(f"expected layer_decay with a ViT, got {recipe.layer_decay:g} with "
                            f"{model.cfg.backbone}: leave it 0")
        return layer_groups(model, "detector.backbone.", recipe)
    groups = BASES[model.cfg.base].param_groups(model.detector, recipe)
    for name, parameter in model.named_parameters():
        if not name.startswith("detector."):
            groups[0]["params"].append(parameter)   # the group with the full rate
    return groups
