"""The published detectors of Co-DETR: what each changes in the Config and the RECIPE of co_detr.py.

    python train.py --model co_detr --variant NAME --data DIR

The figure beside a variant is its AP on COCO val2017. "<variant>_<epochs>_epochs" is the same
detector trained longer, with a drop_path of its own. RESULTS.md has the same list as a table, with
what is published of each.
"""
EPOCHS_24 = dict(epochs=24, lr_drop=20)
EPOCHS_36 = dict(epochs=36, lr_drop=30)
DEFORMABLE = dict(base="h_detr", quality_focal=False, soft_nms=0.0, loss_class=2.0, top_k=100)
# Deformable DETR without refinement and two-stage, as in Tables 2, 8 to 10, 12 and 13
PLAIN = dict(DEFORMABLE, base="deformable_detr")
CO_DEFORMABLE = dict(DEFORMABLE, num_feature_levels=4, num_queries=300)   # at its published size
PLAIN_DEFORMABLE = dict(PLAIN, num_feature_levels=4, num_queries=300, ffn_dim=1024, dropout=0.1,
                        batch_size=32)
LSJ = dict(augment="lsj", lsj_size=1024)
LSJ_SWIN_L = dict(augment="lsj", lsj_size=1280, backbone="swin_l")
LVIS = dict(oversample=0.001)
LARGE_IMAGES = dict(train_sizes=tuple(range(480, 1537, 32)), max_size=2048, eval_size=1280,
                    size_divisor=32)


def co_swin(backbone: str, drop_path: float, **more) -> dict:
    """Co-Deformable-DETR with a Swin backbone."""
    return dict(CO_DEFORMABLE, weight_decay=0.05, backbone=backbone, drop_path=drop_path, **more)


# Flags for 8 GPUs, counted by tools/predict_memory.py (GUIDE.md, "Clusters"):
#   24 GiB   --recompute for Co-DINO and for a Swin-L; with swin_l_o365 and lsj_swin_l_o365_lvis
#            also --accum 2, with lsj_vit_l_lvis also --accum 8; no vit_l
#   40 GiB   --recompute for Co-DINO with Swin-L or 9 encoder layers; with vit_l also --accum 8,
#            with lsj_vit_l_lvis also --accum 4
#   80 GiB   --recompute for swin_l_o365, lsj_swin_l_o365_lvis and lsj_swin_l_lvis; with --accum 4
#            for vit_l, with --accum 2 for lsj_vit_l_lvis
VARIANTS = {
    "24_epochs": EPOCHS_24,
    "36_epochs": EPOCHS_36,
    "swin_l": dict(backbone="swin_l", drop_path=0.3),                                       # 58.9
    "swin_l_24_epochs": dict(EPOCHS_24, backbone="swin_l", drop_path=0.5),                  # 59.8
    "swin_l_36_epochs": dict(EPOCHS_36, backbone="swin_l", drop_path=0.6),                  # 60.0
    # 64.1, starting from weights trained on Objects365
    "swin_l_o365": dict(LARGE_IMAGES, backbone="swin_l", drop_path=0.3, dn_number=500,
                        dn_box_noise=0.4, lr=1e-4, lr_backbone=1e-5, batch_size=16, epochs=16,
                        lr_drop=8),
    # 65.4, starting from weights trained on Objects365; 500 steps of warmup; see Difference 11 of
    # co_detr.py
    "vit_l": dict(LARGE_IMAGES, train_max_size=2400, backbone="vit_l", drop_path=0.4,
                  num_queries=1500, dn_number=300, dn_box_noise=0.4, roi_convs=4, top_k=1000,
                  test_pre_nms=8000, test_proposals=2000, test_proposal_nms=0.9, rcnn_soft_nms=0.5,
                  dense_soft_nms=0.6, lr=5e-5, layer_decay=0.8, weight_decay=0.01, batch_size=64,
                  lr_drop=7, warmup=0.0225, ema=0.9999, ema_warmup=2000),
    # large-scale jitter with copy-paste
    "lsj": LSJ,                                                                             # 52.1
    "lsj_36_epochs": dict(LSJ, **EPOCHS_36),                                                # 54.8
    "lsj_9_encoder_layers": dict(LSJ, encoder_layers=9),                                    # 52.6
    "lsj_9_encoder_layers_36_epochs": dict(LSJ, encoder_layers=9, **EPOCHS_36),             # 55.4
    "lsj_swin_l": dict(LSJ_SWIN_L, drop_path=0.3),                                          # 59.3
    "lsj_swin_l_24_epochs": dict(LSJ_SWIN_L, drop_path=0.5, **EPOCHS_24),                   # 60.4
    "lsj_swin_l_36_epochs": dict(LSJ_SWIN_L, drop_path=0.5, **EPOCHS_36),                   # 60.7
    # LVIS; its figures are AP on LVIS v1 val with 1000 detections an image
    "lvis": LVIS,
    "lsj_lvis": dict(LSJ, **LVIS),
    "lsj_swin_l_lvis": dict(LSJ_SWIN_L, **LVIS, **EPOCHS_36, drop_path=0.3),                # 56.9
    # 64.5, starting from weights trained on Objects365
    "lsj_swin_l_o365_lvis": dict(LVIS, augment="lsj", lsj_size=1536, backbone="swin_l",
                                 drop_path=0.3, dn_number=500,
                                 dn_box_noise=0.4, lr=1e-4, lr_backbone=1e-5, epochs=16, lr_drop=8,
                                 top_k=1000, fed_loss=50, roi_sigmoid=True),
    # 68.0, starting from weights trained on Objects365; about 500 steps of warmup
    "lsj_vit_l_lvis": dict(LVIS, augment="lsj", lsj_size=1536, backbone="vit_l_window16",
                           drop_path=0.3, dn_number=300, dn_box_noise=0.4, top_k=1000, fed_loss=50,
                           test_pre_nms=8000, test_proposals=2000, test_proposal_nms=0.9,
                           rcnn_soft_nms=0.5, dense_soft_nms=0.6, lr=5e-5, lr_backbone=5e-6,
                           weight_decay=0.05, clip=0.0, batch_size=64, epochs=16,
                           schedule="drops", lr_drops=(9 / 16, 15 / 16), warmup=0.02),
    "plain_deformable": PLAIN_DEFORMABLE,                                                   # 42.9
    "plain_deformable_36_epochs": dict(PLAIN_DEFORMABLE, **EPOCHS_36),                      # 46.5
    "plain_deformable_small": PLAIN,     # for the preset small, whose sizes it leaves alone
    "co_deformable": CO_DEFORMABLE,                                                         # 49.5
    "co_deformable_small": DEFORMABLE,   # for the preset small, whose sizes it leaves alone
    "co_deformable_swin_t": co_swin("swin_t", 0.2),                                   # 51.7
    "co_deformable_swin_t_36_epochs": co_swin("swin_t", 0.3, **EPOCHS_36),            # 54.1
    "co_deformable_swin_s": co_swin("swin_s", 0.2),                                   # 53.4
    "co_deformable_swin_s_36_epochs": co_swin("swin_s", 0.4, **EPOCHS_36),            # 55.3
    "co_deformable_swin_b": co_swin("swin_b", 0.2),                                   # 55.5
    "co_deformable_swin_b_36_epochs": co_swin("swin_b", 0.4, **EPOCHS_36),            # 57.5
    "co_deformable_swin_l": co_swin("swin_l", 0.3),                                   # 56.9
    "co_deformable_swin_l_900q": co_swin("swin_l", 0.6, num_queries=900, top_k=300,
                                         **EPOCHS_36),                                # 58.5
}
