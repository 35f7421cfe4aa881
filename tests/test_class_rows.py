"""Class rows of heads and label tables: selected, reordered and copied by class name."""
from types import SimpleNamespace

import pytest
import torch

from engine import class_rows


def test_coco_has_eighty_names_on_ninety_one_columns():
    names = class_rows.coco_columns()
    assert len(class_rows.COCO_IDS) == len(class_rows.COCO_NAMES) == 80
    assert len(set(names)) == 91
    assert names[1] == "person"
    assert names[12] == "unused 12"
    assert names[13] == "stop sign"
    assert names[90] == "toothbrush"


def heads(two_stage):
    """Class heads and label table with row i filled with i.

    Layer h of the heads adds 1000 h. The label table adds 100 and has one extra row.
    """
    rows = torch.arange(91.0)
    state = {f"class_embed.{h}.weight": rows[:, None].repeat(1, 3) + 1000 * h for h in range(7)}
    state |= {f"class_embed.{h}.bias": rows.clone() + 1000 * h for h in range(7)}
    state["label_enc.weight"] = 100 + torch.arange(92.0)[:, None]
    state["level_embed"] = torch.ones(4, 3)
    if two_stage:
        state["pos_trans.weight"] = torch.zeros(1)
    else:
        state["enc_out_class_embed.bias"] = rows.clone()
    return state


def test_selecting_classes_keeps_rows_in_order_and_the_extra_label_last():
    state = class_rows.select_classes(heads(False), class_rows.COCO_IDS)
    expected = torch.tensor(class_rows.COCO_IDS, dtype=torch.float32)
    assert torch.equal(state["class_embed.6.bias"], expected + 6000)
    assert torch.equal(state["enc_out_class_embed.bias"], expected)
    labels = torch.cat([100 + expected, torch.tensor([191.0])])
    assert torch.equal(state["label_enc.weight"][:, 0], labels)
    assert torch.equal(state["level_embed"], torch.ones(4, 3))


def test_row_zero_of_the_objectness_head_stays_row_zero():
    state = class_rows.select_classes(heads(True), class_rows.COCO_IDS)
    assert state["class_embed.6.bias"][0] == 6000
    assert state["class_embed.5.bias"][0] == 5001
    fresh = heads(True)
    for key, value in fresh.items():
        if class_rows.has_class_rows(key):
            fresh[key] = torch.full((2, *value.shape[1:]), -1.0)
    fresh["label_enc.weight"] = torch.full((3, 1), -1.0)
    columns = class_rows.coco_columns()
    fitted, skipped = class_rows.fit(heads(True), columns, fresh, ["cat", "unicorn"])
    cat = columns.index("cat")
    assert fitted["class_embed.6.bias"].tolist() == [6000, -1]
    assert fitted["class_embed.0.bias"].tolist() == [cat, -1]
    assert fitted["label_enc.weight"][:, 0].tolist() == [100 + cat, -1, 191]
    assert "1 of 2 classes" in skipped[-1]


def test_rows_of_the_region_head_follow_their_classes():
    """Co-DETR: the last row of the region head's classes is the background.

    Every class has four rows of box offsets.
    """
    def rows(count, start=0):
        return {"detector.level_embed": torch.ones(1),
                "detector.class_embed.0.weight": start + torch.arange(count),
                "roi.cls.bias": start + torch.arange(count + 1),
                "roi.reg.bias": start + torch.arange(4 * count),
                "atss.cls.bias": start + torch.arange(count),
                "atss.reg.bias": start + torch.arange(4)}
    fitted, _ = class_rows.fit(rows(3), ["a", "b", "c"], rows(2, -100), ["c", "new"])
    assert fitted["detector.class_embed.0.weight"].tolist() == [2, -99]
    assert fitted["atss.cls.bias"].tolist() == [2, -99]
    assert fitted["atss.reg.bias"].tolist() == [0, 1, 2, 3]
    assert fitted["roi.cls.bias"].tolist() == [2, -99, 3]
    assert fitted["roi.reg.bias"].tolist() == [8, 9, 10, 11, -96, -95, -94, -93]
    selected = class_rows.select_classes(rows(3), [2, 0])
    assert selected["roi.cls.bias"].tolist() == [2, 0, 3]
    assert selected["roi.reg.bias"].tolist() == [8, 9, 10, 11, 0, 1, 2, 3]


def test_the_same_classes_in_another_order_are_put_right():
    state = {"class_embed.0.bias": torch.tensor([1.0, 2.0]), "other": torch.ones(2)}
    fresh = {"class_embed.0.bias": torch.zeros(2), "other": torch.zeros(2)}
    fitted, _ = class_rows.fit(state, ["a", "b"], fresh, ["b", "a"])
    assert fitted["class_embed.0.bias"].tolist() == [2, 1]


def test_weights_of_which_nothing_fits_are_refused_and_a_larger_model_is_not():
    with pytest.raises(ValueError, match="nothing that fits"):
        class_rows.fit({"a": torch.ones(1)}, [], {"b": torch.ones(1)}, [])
    larger = {"a": torch.ones(1), "more": torch.ones(1), "most": torch.ones(1)}
    fitted, skipped = class_rows.fit(larger, [], {"a": torch.zeros(1)}, [])
    assert fitted["a"] == 1
    assert len(skipped) == 2


def test_rows_of_every_anchor_of_retinanet_follow_their_classes():
    def state(count, start=0):
        return {"detector.level_embed": torch.zeros(1, 2),
                "detector.class_embed.0.weight": torch.zeros(count, 1),
                "retinanet.cls.bias": start + torch.arange(9 * count)}
    fitted, _ = class_rows.fit(state(2), ["a", "b"], state(2, -100), ["b", "a"])
    expected = [2 * anchor + i for anchor in range(9) for i in (1, 0)]
    assert fitted["retinanet.cls.bias"].tolist() == expected


def test_one_box_for_all_classes_is_no_class_row():
    """ViT-L's region head has four rows of box deltas, as many as a head for a single class."""
    def state(count, value):
        return {"detector.level_embed": torch.zeros(1, 2),
                "detector.class_embed.0.weight": torch.full((count, 1), value),
                "roi.convs.0.0.weight": torch.full((1,), value),
                "roi.reg.bias": torch.full((4,), value)}
    fitted, _ = class_rows.fit(state(80, 1.0), class_rows.COCO_NAMES, state(1, 0.0), ["cell"])
    assert fitted["roi.reg.bias"].tolist() == [1, 1, 1, 1]
    assert fitted["detector.class_embed.0.weight"].tolist() == [[0]]


def test_rows_of_every_one_stage_head_follow_their_classes():
    """Of the second of two equal heads, too."""
    def rows(count, start=0):
        return {"detector.level_embed": torch.ones(1),
                "detector.class_embed.0.weight": start + torch.arange(count),
                "atss2.cls.bias": start + torch.arange(count),
                "fcos.cls.bias": start + torch.arange(count),
                "gfl.cls.bias": start + torch.arange(count),
                "gfl.reg.bias": torch.arange(68)}
    fitted, _ = class_rows.fit(rows(3), ["a", "b", "c"], rows(2, -100), ["c", "new"])
    for name in ("atss2", "fcos", "gfl"):
        assert fitted[f"{name}.cls.bias"].tolist() == [2, -99]
    assert fitted["gfl.reg.bias"].tolist() == list(range(68))


def test_a_checkpoint_without_names_takes_those_of_the_data_and_says_so(capsys):
    data = SimpleNamespace(name="birds", class_names=["owl", "wren"])
    meta = {"class_names": ["class 0", "class 1"]}
    assert class_rows.fit_classes("model", None, None, meta, data) == "model"
    assert "taken to be those of birds, in order" in capsys.readouterr().out
