"""Names of released weights: every tensor has one place, and the way back is bit-equal."""
import argparse
import importlib
import re
import zlib

import pytest
import torch

from engine.recipe import configure
from engine import models
from engine import authors_names
from engine import released
from backbones.swin import relative_position_index

LISTS = {   # key list -> family, Config overrides that names and shapes show
    "deformable_detr_r50": (
        "deformable_detr", dict(num_feature_levels=4, num_queries=300, ffn_dim=1024)),
    "deformable_detr_r50_single_scale": (
        "deformable_detr", dict(num_feature_levels=1, num_queries=300)),
    "deformable_detr_r50_refine": (
        "deformable_detr_refine", dict(with_box_refine=True)),
    "deformable_detr_r50_refine_two_stage": (
        "deformable_detr_two_stage", dict(with_box_refine=True, two_stage=True)),
    "h_deformable_detr_r50": (
        "h_detr", dict(num_queries=300, num_queries_one2many=1500, ffn_dim=2048)),
    "dino_r50_4scale": (
        "dino", dict(num_feature_levels=4, num_queries=900, ffn_dim=2048)),
    "dino_r50_5scale": (
        "dino", dict(num_feature_levels=5, backbone="resnet50")),
    "co_detr/co_deformable_detr_r50": (
        "co_deformable", dict(num_queries=300, backbone="resnet50")),
    "co_detr/co_deformable_detr_swin_t": (
        "co_deformable", dict(num_queries=300, backbone="swin_t", top_k=100)),
    "co_detr/co_deformable_detr_swin_l_900q": (
        "co_deformable", dict(num_queries=900, backbone="swin_l", top_k=300)),
    "co_detr/co_dino_5scale_r50": (
        "co_dino", dict(num_feature_levels=5, num_queries=900, roi_convs=0)),
    "co_detr/co_dino_5scale_swin_l": (
        "co_dino", dict(num_feature_levels=5, backbone="swin_l")),
    "co_detr/co_dino_5scale_vit_l": (
        "co_dino", dict(num_queries=1500, backbone="vit_l", roi_convs=4, top_k=1000,
                        eval_size=1280, size_divisor=32)),
}


def read_keys(path):
    """[(name, shape)] of a recorded key list."""
    rows = []
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            name, shape = line.split(" ", 1)
            rows.append((name, tuple(int(n) for n in re.findall(r"\d+", shape))))
    return rows


def one_name(name, tied):
    """Names of one tensor -> one of them, by the rules of the authors' code."""
    if "_embed." in name:
        name = name.removeprefix("transformer.decoder.")
    parts = name.split(".")
    if tied and parts[0] in ("class_embed", "bbox_embed"):
        parts[1] = "0"
    return ".".join(parts)


def numbered(keys, tied):
    """A state dict whose tensors are all different.

    Where the authors save one tensor under several names, the tensors are equal.
    """
    state = {}
    for name, shape in keys:
        number = zlib.crc32(one_name(name, tied).encode()) % 2 ** 24
        state[name] = torch.tensor(float(number)).expand(shape)
    return state


@pytest.fixture(params=LISTS)
def listed(request, shared):
    folder, _, name = request.param.rpartition("/")
    return read_keys(shared / "golden" / folder / f"keys_{name}.txt"), *LISTS[request.param]


def derived(key):
    """Tables that follow from shapes, and counters."""
    return key.endswith(("relative_position_index", "freqs_cos", "freqs_sin",
                         "num_batches_tracked"))


# ---- released weights

def test_every_released_tensor_has_one_place(listed):
    """Names and shapes of the built model equal those of the renamed checkpoint.

    Nothing is missing and nothing is left over.
    """
    keys, family, expected = listed
    theirs = {name: torch.empty(shape, device="meta") for name, shape in keys}
    found_family, found = released.recognize(theirs)
    assert found_family == family
    assert expected.items() <= found.items()
    paper = importlib.import_module(authors_names.FAMILIES[family].model_name)
    num_classes = 80 if paper.__name__ == "co_detr" else 91
    with torch.device("meta"):
        model, _ = paper.build(configure(paper, found)[0], num_classes)
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    renamed = authors_names.from_authors(theirs, family)
    assert ours == {name: tuple(tensor.shape) for name, tensor in renamed.items()}


def test_round_trip_is_bit_equal(listed):
    keys, family, _ = listed
    learned = [(key, shape) for key, shape in keys if not derived(key)]
    theirs = numbered(learned, authors_names.FAMILIES[family].tied)
    back = authors_names.to_authors(authors_names.from_authors(theirs, family), family)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


# Built from the descriptions of the authors' files, without a list of their names:
# the place of the backbone, number of tensors, number of parameters.
UNVERIFIED = {
    ("dino", "swin_l"): ("backbone.0.", 716, 217_230_066),
    ("dino", "swin_l_5scale"): ("backbone.0.", 722, 217_576_690),
    ("dino", "focalnet_l"): ("backbone.0.", None, None),
    ("dino", "focalnet_l_o365"): ("backbone.0.", None, None),
    ("h_detr", "swin_t"): ("backbone.0.body.", None, None),
    ("h_detr", "swin_l"): ("backbone.0.body.", None, None),
}


@pytest.mark.parametrize("model_name, variant", UNVERIFIED)
def test_backbones_without_a_list_go_forth_and_back_and_are_recognized(model_name, variant):
    paper = importlib.import_module(model_name)
    place, tensors, parameters = UNVERIFIED[model_name, variant]
    with torch.device("meta"):
        model, _ = paper.build(configure(paper, paper.VARIANTS[variant])[0], 91)
    ours = model.state_dict()
    theirs = authors_names.to_authors(ours, model_name)
    assert f"{place}patch_embed.proj.weight" in theirs
    assert f"{place}norm3.weight" in theirs
    assert authors_names.from_authors(theirs, model_name).keys() == ours.keys()
    family, found = released.recognize(theirs)
    shown = ("backbone", "num_feature_levels", "num_queries")
    expected = {k: v for k, v in paper.VARIANTS[variant].items() if k in shown}
    assert family == model_name
    assert expected.items() <= found.items()
    if parameters:   # the authors save one table of window indices per block beside what is learned
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert len(theirs) + sum(key.endswith("bias_table") for key in theirs) == tensors


def test_tables_that_follow_from_shapes_are_compared_and_left_out(shared):
    keys = read_keys(shared / "golden" / "co_detr" / "keys_co_deformable_detr_swin_t.txt")
    theirs = {name: torch.empty(shape, device="meta") for name, shape in keys}
    name = "backbone.layers.1.blocks.0.attn.relative_position_index"
    theirs[name] = relative_position_index(7)
    assert not [key for key in authors_names.from_authors(theirs, "co_deformable") if derived(key)]
    theirs[name] = theirs[name].T.contiguous()
    with pytest.raises(ValueError, match=f"expected {name} .* changed model"):
        authors_names.from_authors(theirs, "co_deformable")


def test_a_backbone_that_is_none_of_ours_is_named(shared):
    keys = read_keys(shared / "golden" / "co_detr" / "keys_co_deformable_detr_swin_t.txt")
    theirs = {name: torch.empty(shape, device="meta") for name, shape in keys
              if "layers.2.blocks.5" not in name}
    message = "expected a backbone among resnet18.*patch_embed.proj.weight"
    with pytest.raises(ValueError, match=message):
        released.recognize(theirs)


def test_copies_that_differ_are_refused(shared):
    keys = read_keys(shared / "golden" / "keys_dino_r50_4scale.txt")
    for name in ("transformer.decoder.class_embed.3.weight", "bbox_embed.4.layers.1.bias",
                 "class_embed.2.bias"):
        theirs = numbered(keys, True)
        theirs[name] = theirs[name] + 1
        with pytest.raises(ValueError, match="one tensor under two names"):
            authors_names.from_authors(theirs, "dino")


def test_unknown_weights_are_refused_with_the_known_families():
    with pytest.raises(ValueError, match="deformable_detr_two_stage, dino.*fc.weight"):
        released.recognize({"fc.weight": torch.zeros(1)})


def test_profiler_counters_are_dropped():
    state = {"a.total_ops": 1, "a.weight": 2, "total_params": 3}
    assert authors_names.drop_profiler_counters(state) == {"a.weight": 2}


def released_file(path, monkeypatch):
    """A small DINO in the authors' layout, with their pickled options beside it."""
    paper = importlib.import_module("dino")
    cfg = paper.Config(backbone="resnet18", dim=32, ffn_dim=16, encoder_layers=1,
                       decoder_layers=2, num_queries=5)
    model, _ = paper.build(cfg, 91)
    weights = authors_names.to_authors(model.state_dict(), "dino")
    torch.save({"model": weights, "args": argparse.Namespace(lr=1e-4), "epoch": 11}, path)
    recognize = released.recognize

    def recognize_with_resnet18(state):
        family, found = recognize(state)
        return family, {**found, "backbone": "resnet18"}

    monkeypatch.setattr(released, "recognize", recognize_with_resnet18)
    return model


def test_released_files_load_with_their_options_pickled_beside_them(tmp_path, monkeypatch):
    source = released_file(tmp_path / "released.pth", monkeypatch)
    model, _, cfg, _, meta, _ = models.load_model(tmp_path / "released.pth")
    assert cfg.num_queries == 5
    assert cfg.encoder_layers == 1
    assert meta["class_names"][18] == "dog"
    loaded = model.state_dict().values()
    saved = source.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(loaded, saved))
