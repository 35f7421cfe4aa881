"""One-to-many detectors, one file per paper. None of them knows about DETR: each reads a pyramid of
feature maps. Read anchors.py first, and retinanet.py before fcos.py before atss.py.

    regions.py        box deltas, NMS, soft-NMS, RoIAlign
    adapter.py        a pyramid from the maps of an encoder
    anchors.py        anchors, assignment by IoU, sampling, detections after NMS
    faster_rcnn.py    Faster R-CNN (Ren et al., NeurIPS 2015): RPN and RoI head
    retinanet.py      RetinaNet (Lin et al., ICCV 2017): one stage, assignment by IoU
    fcos.py           FCOS (Tian et al., ICCV 2019): RetinaNet with points, centerness
    atss.py           ATSS (Zhang et al., CVPR 2020): RetinaNet with adaptive assignment, centerness
    federated.py      FedLoss (Zhou et al. 2021): a class loss of some classes only, for LVIS
    gfl.py            GFL (Li et al., NeurIPS 2020): ATSS with quality focal loss, distributions

To use them elsewhere, copy this folder with boxes.py and matcher.py. A one-stage head in training
and at test time (other heads have their own `_counts` and `_losses`, RetinaNet no counts):

    maps = [torch.randn(1, 64, 32, 32), torch.randn(1, 64, 16, 16)]      # (B, C, H_l, W_l)
    sizes = torch.tensor([[256, 256]])                                   # height, width in pixels
    pyramid = Pyramid(maps, strides=[8, 16], image_sizes=sizes)
    boxes = torch.tensor([[10.0, 20.0, 90.0, 120.0]])                    # corners, pixels
    objects = [Objects(torch.tensor([1]), boxes, valid_size=sizes[0])]   # one for each image
    head = ATSS(dim=64, num_classes=3, levels=2)
    outputs = head(pyramid.maps) | head.targets(pyramid, objects)
    counts = atss_counts(outputs["labels"], outputs["boxes"], outputs["anchors"], num_classes=3)
    losses = atss_losses(**outputs, counts=counts)                       # {"cls", "giou", ...}
    detections = head.detect(pyramid, top_k=100)                         # scores, labels, boxes
"""
