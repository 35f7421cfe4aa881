"""The weights of assets/weights give the figures that were measured when they were made: a guard on
everything between a scene and its AP, float32, 100 scenes."""
import pytest
import torch

import eval as evaluation
from engine import assets
from engine.datasets import build_datasets
from engine.models import load_model

AP = {"detr_small": {"bbox": 0.524},
      "dino_small": {"bbox": 0.908},
      "mask_frozen_detr_small": {"bbox": 0.908, "segm": 0.839}}
TOLERANCE = 0.002


def test_every_shipped_file_is_tested():
    assert sorted(AP) == assets.names()


@pytest.mark.parametrize("name", sorted(AP))
def test_shipped_weights_have_their_ap(name):
    loaded = load_model(name)
    masks = getattr(loaded.paper, "NEEDS_MASKS", False)
    _, scenes = build_datasets("", loaded.recipe, 0, masks, num_train=1, num_val=100)
    scores = evaluation.evaluate(loaded.model, loaded.paper.detect, scenes, loaded.cfg,
                                 torch.device("cpu"), batch_size=8, amp=False, workers=0)
    for kind, expected in AP[name].items():
        assert scores[kind]["AP"] == pytest.approx(expected, abs=TOLERANCE), kind
