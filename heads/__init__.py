"""One-to-many detectors, one file a paper. They know nothing of DETR: each reads a feature pyramid.

    regions.py        box deltas, NMS, soft-NMS, RoIAlign
    anchors.py        anchors, assignment by IoU, sampling, detections after NMS
    faster_rcnn.py    Faster R-CNN (Ren et al., NeurIPS 2015): RPN and RoI head
    retinanet.py      RetinaNet (Lin et al., ICCV 2017): one stage, assignment by IoU
    fcos.py           FCOS (Tian et al., ICCV 2019): one stage, points, centerness
    atss.py           ATSS (Zhang et al., CVPR 2020): one stage, adaptive assignment, centerness
"""
