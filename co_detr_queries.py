"""Customized positive queries of Co-DETR (Zong et al., ICCV 2023, section 3.3).

    paper                                              here
    section 3.3, Eq. 4 customized positive queries     choose_rows, CustomizedQueries
    section 3.3 one group of queries for each head     join, customized_mask

Letters and boxes as in co_detr.py, and so are the differences from the paper (1 to 5, 7 and 9).
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxes import box_xyxy_to_cxcywh, inverse_sigmoid
from deformable_detr import Queries, sine_embedding
from heads.anchors import pick
from matcher import copy_to_device, copy_to_host

LEAST_QUERIES = 9       # a head has at least so many customized queries, even without positives


class Candidates(NamedTuple):
    """Boxes that a head learns from in one image: customized queries are chosen among them."""
    boxes: Tensor        # (A, 4) corners, pixels: anchors or sampled regions
    labels: Tensor       # (A,) N for background
    targets: Tensor      # (A, 4) corners, pixels, of the assigned objects; zeros for background
    features: Tensor     # (A / k, C) of the encoder; the k anchors of a cell share them


class Chosen(NamedTuple):
    """Candidates that become a head's customized queries, with boxes cx, cy, w, h in [0, 1]."""
    boxes: Tensor        # (B, M, 4)
    labels: Tensor       # (B, M) N for background and padding queries
    targets: Tensor      # (B, M, 4)
    features: Tensor     # (B, M, C)
    weights: Tensor      # (B, M) of the class loss: 0 for padding queries, which are zeros, else 1


def choose_rows(candidates: list[Candidates], image_sizes: Tensor, num_classes: int,
                cfg) -> Chosen:
    """Section 3.3: choose at random M candidates of a head in each image, positives first.

    M is the number of positives of the image with the most, but LEAST_QUERIES at least and
    `aux_queries` at most. Images with fewer get negatives (if `aux_negatives`), then padding
    queries (Difference 1).
    candidates: one for each image; image_sizes (B, 2): heights and widths, pixels."""
    labels = copy_to_host([each.labels for each in candidates])
    positives = [each < num_classes for each in labels]                            # (A,) an image
    M = max(LEAST_QUERIES, min(cfg.aux_queries, max(int(mask.sum()) for mask in positives)))
    chosen = []
    for each, positive, size in zip(candidates, positives, image_sizes):
        rows = pick(positive, M)
        if cfg.aux_negatives:
            rows = torch.cat((rows, pick(~positive, M - len(rows))))
        rows = copy_to_device(rows, each.boxes.device)
        scale = size.flip(0).repeat(2)                                             # (4,) w, h, w, h
        boxes = box_xyxy_to_cxcywh(each.boxes[rows]) / scale
        targets = box_xyxy_to_cxcywh(each.targets[rows]) / scale
        anchors_of_a_cell = max(1, len(each.labels) // max(1, len(each.features)))
        features = each.features[rows // anchors_of_a_cell]

        missing = M - len(rows)
        chosen.append(Chosen(F.pad(boxes, (0, 0, 0, missing)),
                             F.pad(each.labels[rows], (0, missing), value=num_classes),
                             F.pad(targets, (0, 0, 0, missing)),
                             F.pad(features, (0, 0, 0, missing)),
                             F.pad(boxes.new_ones(len(rows)), (0, missing))))
    return Chosen(*(torch.stack(parts) for parts in zip(*chosen)))


def customized_mask(weights: list[Tensor]) -> Tensor:
    """Attention mask (B, 1, M, M), row = query, column = key, True = blocked; M: sum over heads.

    weights: per head (B, M_i), 0 for padding queries. A query attends to all queries of its own
    head except padding queries. A padding query also attends to itself: no row is all blocked."""
    head = torch.cat([torch.full_like(weight[0], i) for i, weight in enumerate(weights)])    # (M,)
    padding = torch.cat(weights, 1)[:, None] == 0                                  # (B, 1, M)
    others = ~torch.eye(len(head), dtype=torch.bool, device=head.device)
    blocked = (head[:, None] != head) | (padding & others)                         # (B, M, M)
    return blocked[:, None]


def join(queries: list[Queries]) -> Queries:
    """Concatenate the queries of several heads. Positions are None if the decoder makes them."""
    positions = [each.position for each in queries]
    return Queries(torch.cat([each.content for each in queries], 1),
                   None if positions[0] is None else torch.cat(positions, 1),
                   torch.cat([each.reference for each in queries], 1))


class CustomizedQueries(nn.Module):
    """Eq. 4: decoder queries from positive boxes and the encoder's features there.

    Without features (Co-DINO) the box's embedding is the content; the decoder makes positions."""

    def __init__(self, dim: int, with_features: bool):
        super().__init__()
        self.with_features = with_features
        width = 2 * dim if with_features else dim
        self.pos_trans = nn.Linear(2 * dim, width)
        self.pos_norm = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.pos_trans.weight)
        if with_features:
            self.feat_trans = nn.Linear(dim, dim)
            self.feat_norm = nn.LayerNorm(dim)
            nn.init.xavier_uniform_(self.feat_trans.weight)

    def forward(self, boxes: Tensor, features: Tensor) -> Queries:
        """boxes (B, M, 4), which may reach outside the image, features (B, M, C) -> M queries."""
        C = features.shape[-1]
        inside = inverse_sigmoid(boxes).sigmoid()   # clamped to [1e-5, 1 - 1e-5]
        embedding = sine_embedding(inside, C // 2).flatten(2)                      # (B, M, 2 C)
        x = self.pos_norm(self.pos_trans(embedding.to(features.dtype)))
        if not self.with_features:
            return Queries(x, None, boxes)
        position, content = x.chunk(2, -1)                                         # (B, M, C) each
        return Queries(content + self.feat_norm(self.feat_trans(features)), position, boxes)
