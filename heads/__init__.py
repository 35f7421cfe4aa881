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
"""
