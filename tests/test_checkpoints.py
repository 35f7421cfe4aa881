"""Files that are whole or absent, never run code, and carry the authors' names back and forth."""
import argparse
import collections
import contextlib
import functools
import importlib
import itertools
import json
import multiprocessing
import operator
import os
import pickle
import random
import re
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.recipe import configure
from engine.errors import UserError
from engine import checkpoints
from engine import class_rows
from engine import models
from engine import released
from backbones.swin import relative_position_index

LISTS = {   # key list -> family, Config overrides that names and shapes show
    "deformable_detr_r50": ("deformable_detr", dict(num_feature_levels=4, num_queries=300, ffn_dim=1024)),
    "deformable_detr_r50_single_scale": ("deformable_detr", dict(num_feature_levels=1, num_queries=300)),
    "deformable_detr_r50_refine": ("deformable_detr_refine", dict(with_box_refine=True)),
    "deformable_detr_r50_refine_two_stage": ("deformable_detr_two_stage", dict(with_box_refine=True, two_stage=True)),
    "h_deformable_detr_r50": ("h_detr", dict(num_queries=300, num_queries_one2many=1500, ffn_dim=2048)),
    "dino_r50_4scale": ("dino", dict(num_feature_levels=4, num_queries=900, ffn_dim=2048)),
    "dino_r50_5scale": ("dino", dict(num_feature_levels=5, backbone="resnet50")),
    "co_detr/co_deformable_detr_r50": ("co_deformable", dict(num_queries=300, backbone="resnet50")),
    "co_detr/co_deformable_detr_swin_t": ("co_deformable", dict(num_queries=300, backbone="swin_t", top_k=100)),
    "co_detr/co_deformable_detr_swin_l_900q": ("co_deformable", dict(num_queries=900, backbone="swin_l", top_k=300)),
    "co_detr/co_dino_5scale_r50": ("co_dino", dict(num_feature_levels=5, num_queries=900, roi_convs=0)),
    "co_detr/co_dino_5scale_swin_l": ("co_dino", dict(num_feature_levels=5, backbone="swin_l")),
    "co_detr/co_dino_5scale_vit_l": ("co_dino", dict(num_queries=1500, backbone="vit_l", roi_convs=4, top_k=1000,
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
    name = name.removeprefix("transformer.decoder.") if "_embed." in name else name
    head = name.split(".")
    return ".".join([head[0], "0", *head[2:]]) if tied and head[0] in ("class_embed", "bbox_embed") else name


def numbered(keys, tied):
    """A state dict whose tensors are all different, except where the authors save one tensor under several names."""
    return {name: torch.tensor(float(zlib.crc32(one_name(name, tied).encode()) % 2 ** 24)).expand(shape)
            for name, shape in keys}


@pytest.fixture(params=LISTS)
def listed(request, shared):
    folder, _, name = request.param.rpartition("/")
    return read_keys(shared / "golden" / folder / f"keys_{name}.txt"), *LISTS[request.param]


def derived(key):
    """Tables that follow from shapes, and counters."""
    return key.endswith(("relative_position_index", "freqs_cos", "freqs_sin", "num_batches_tracked"))


# ---- released weights

def test_every_released_tensor_has_one_place(listed):
    """Names and shapes of the built model equal those of the renamed checkpoint: nothing missing, nothing left over."""
    keys, family, expected = listed
    theirs = {name: torch.empty(shape, device="meta") for name, shape in keys}
    found_family, found = released.recognise(theirs)
    assert found_family == family and expected.items() <= found.items()
    paper = importlib.import_module(released.FAMILIES[family].model_name)
    with torch.device("meta"):
        model, _ = paper.build(configure(paper, found)[0], 80 if paper.__name__ == "co_detr" else 91)
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in released.from_authors(theirs, family).items()}


def test_round_trip_is_bit_equal(listed):
    keys, family, _ = listed
    theirs = numbered([(key, shape) for key, shape in keys if not derived(key)], released.FAMILIES[family].tied)
    back = released.to_authors(released.from_authors(theirs, family), family)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


# Built from the descriptions of the authors' files, without a list of their names: backbone's place, tensors, parameters
UNVERIFIED = {("dino", "swin_l"): ("backbone.0.", 716, 217_230_066),
              ("dino", "swin_l_5scale"): ("backbone.0.", 722, 217_576_690),
              ("dino", "focalnet_l"): ("backbone.0.", None, None), ("dino", "focalnet_l_o365"): ("backbone.0.", None, None),
              ("h_detr", "swin_t"): ("backbone.0.body.", None, None), ("h_detr", "swin_l"): ("backbone.0.body.", None, None)}


@pytest.mark.parametrize("model_name, variant", UNVERIFIED)
def test_backbones_without_a_list_go_forth_and_back_and_are_recognised(model_name, variant):
    paper = importlib.import_module(model_name)
    place, tensors, parameters = UNVERIFIED[model_name, variant]
    with torch.device("meta"):
        model, _ = paper.build(configure(paper, paper.VARIANTS[variant])[0], 91)
    ours = model.state_dict()
    theirs = released.to_authors(ours, model_name)
    assert f"{place}patch_embed.proj.weight" in theirs and f"{place}norm3.weight" in theirs
    assert released.from_authors(theirs, model_name).keys() == ours.keys()
    family, found = released.recognise(theirs)
    expected = {k: v for k, v in paper.VARIANTS[variant].items() if k in ("backbone", "num_feature_levels", "num_queries")}
    assert family == model_name and expected.items() <= found.items()
    if parameters:   # the authors save one table of window indices per block beside what is learned
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert len(theirs) + sum(key.endswith("bias_table") for key in theirs) == tensors


def test_tables_that_follow_from_shapes_are_compared_and_left_out(shared):
    keys = read_keys(shared / "golden" / "co_detr" / "keys_co_deformable_detr_swin_t.txt")
    theirs = {name: torch.empty(shape, device="meta") for name, shape in keys}
    name = "backbone.layers.1.blocks.0.attn.relative_position_index"
    theirs[name] = relative_position_index(7)
    assert not [key for key in released.from_authors(theirs, "co_deformable") if derived(key)]
    theirs[name] = theirs[name].T.contiguous()
    with pytest.raises(ValueError, match=f"expected {name} .* changed model"):
        released.from_authors(theirs, "co_deformable")


def test_a_backbone_that_is_none_of_ours_is_named(shared):
    keys = read_keys(shared / "golden" / "co_detr" / "keys_co_deformable_detr_swin_t.txt")
    theirs = {name: torch.empty(shape, device="meta") for name, shape in keys if "layers.2.blocks.5" not in name}
    with pytest.raises(ValueError, match="expected a backbone among resnet18.*patch_embed.proj.weight"):
        released.recognise(theirs)


def test_copies_that_differ_are_refused(shared):
    keys = read_keys(shared / "golden" / "keys_dino_r50_4scale.txt")
    for name in ("transformer.decoder.class_embed.3.weight", "bbox_embed.4.layers.1.bias", "class_embed.2.bias"):
        theirs = numbered(keys, True)
        theirs[name] = theirs[name] + 1
        with pytest.raises(ValueError, match="one tensor under two names"):
            released.from_authors(theirs, "dino")


def test_unknown_weights_are_refused_with_the_known_families():
    with pytest.raises(ValueError, match="deformable_detr_two_stage, dino.*fc.weight"):
        released.recognise({"fc.weight": torch.zeros(1)})


def test_profiler_counters_are_dropped():
    assert released.strip_profiler({"a.total_ops": 1, "a.weight": 2, "total_params": 3}) == {"a.weight": 2}


def released_file(path, monkeypatch):
    """A small DINO in the authors' layout, with their pickled options beside it."""
    paper = importlib.import_module("dino")
    cfg = paper.Config(backbone="resnet18", dim=32, ffn_dim=16, encoder_layers=1, decoder_layers=2, num_queries=5)
    model, _ = paper.build(cfg, 91)
    weights = released.to_authors(model.state_dict(), "dino")
    torch.save({"model": weights, "args": argparse.Namespace(lr=1e-4), "epoch": 11}, path)
    monkeypatch.setattr(released, "recognise", lambda state, real=released.recognise:
                        (real(state)[0], {**real(state)[1], "backbone": "resnet18"}))
    return model


def test_released_files_load_with_their_options_pickled_beside_them(tmp_path, monkeypatch):
    source = released_file(tmp_path / "released.pth", monkeypatch)
    model, _, cfg, _, meta, _ = models.load_model(tmp_path / "released.pth")
    assert cfg.num_queries == 5 and cfg.encoder_layers == 1 and meta["class_names"][18] == "dog"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values()))


# ---- class rows

def test_coco_has_eighty_names_on_ninety_one_columns():
    names = class_rows.coco_columns()
    assert len(class_rows.COCO_IDS) == len(class_rows.COCO_NAMES) == 80 and len(set(names)) == 91
    assert (names[1], names[13], names[90], names[12]) == ("person", "stop sign", "toothbrush", "unused 12")


def heads(two_stage):
    """Class heads and label table with row i filled with i (label table: 100 + i, one extra row)."""
    rows = torch.arange(91.0)
    state = {f"class_embed.{h}.weight": rows[:, None].repeat(1, 3) + 1000 * h for h in range(7)}
    state |= {f"class_embed.{h}.bias": rows.clone() + 1000 * h for h in range(7)}
    state |= {"label_enc.weight": 100 + torch.arange(92.0)[:, None], "level_embed": torch.ones(4, 3)}
    return state | ({"pos_trans.weight": torch.zeros(1)} if two_stage else {"enc_out_class_embed.bias": rows.clone()})


def test_selecting_classes_keeps_rows_in_order_and_the_extra_label_last():
    state = class_rows.select_classes(heads(False), class_rows.COCO_IDS)
    expected = torch.tensor(class_rows.COCO_IDS, dtype=torch.float32)
    assert torch.equal(state["class_embed.6.bias"], expected + 6000)
    assert torch.equal(state["enc_out_class_embed.bias"], expected)
    assert torch.equal(state["label_enc.weight"][:, 0], torch.cat([100 + expected, torch.tensor([191.0])]))
    assert torch.equal(state["level_embed"], torch.ones(4, 3))


def test_row_zero_of_the_objectness_head_stays_row_zero():
    state = class_rows.select_classes(heads(True), class_rows.COCO_IDS)
    assert state["class_embed.6.bias"][0] == 6000 and state["class_embed.5.bias"][0] == 5001
    fresh = {key: torch.full((2, *value.shape[1:]), -1.0) if class_rows.class_rows(key) else value
             for key, value in heads(True).items()}
    fresh["label_enc.weight"] = torch.full((3, 1), -1.0)
    fitted, skipped = class_rows.fit(heads(True), class_rows.coco_columns(), fresh, ["cat", "unicorn"])
    cat = class_rows.coco_columns().index("cat")
    assert fitted["class_embed.6.bias"].tolist() == [6000, -1] and fitted["class_embed.0.bias"].tolist() == [cat, -1]
    assert fitted["label_enc.weight"][:, 0].tolist() == [100 + cat, -1, 191] and "1 of 2 classes" in skipped[-1]


def test_rows_of_the_region_head_follow_their_classes():
    """Co-DETR: background is the last row of the region head's classes, and every class has four rows of box offsets."""
    def rows(count, start=0):
        return {"detector.level_embed": torch.ones(1), "detector.class_embed.0.weight": start + torch.arange(count),
                "roi.cls.bias": start + torch.arange(count + 1), "roi.reg.bias": start + torch.arange(4 * count),
                "atss.cls.bias": start + torch.arange(count), "atss.reg.bias": start + torch.arange(4)}
    fitted, _ = class_rows.fit(rows(3), ["a", "b", "c"], rows(2, -100), ["c", "new"])
    assert fitted["detector.class_embed.0.weight"].tolist() == fitted["atss.cls.bias"].tolist() == [2, -99]
    assert fitted["roi.cls.bias"].tolist() == [2, -99, 3] and fitted["atss.reg.bias"].tolist() == [0, 1, 2, 3]
    assert fitted["roi.reg.bias"].tolist() == [8, 9, 10, 11, -96, -95, -94, -93]
    kept = class_rows.select_classes(rows(3), [2, 0])
    assert kept["roi.cls.bias"].tolist() == [2, 0, 3] and kept["roi.reg.bias"].tolist() == [8, 9, 10, 11, 0, 1, 2, 3]


def test_the_same_classes_in_another_order_are_put_right():
    state = {"class_embed.0.bias": torch.tensor([1.0, 2.0]), "other": torch.ones(2)}
    fitted, _ = class_rows.fit(state, ["a", "b"], {"class_embed.0.bias": torch.zeros(2), "other": torch.zeros(2)}, ["b", "a"])
    assert fitted["class_embed.0.bias"].tolist() == [2, 1]


def test_weights_of_which_nothing_fits_are_refused_and_a_larger_model_is_not():
    with pytest.raises(ValueError, match="nothing that fits"):
        class_rows.fit({"a": torch.ones(1)}, [], {"b": torch.ones(1)}, [])
    fitted, skipped = class_rows.fit({"a": torch.ones(1), "more": torch.ones(1), "most": torch.ones(1)}, [],
                                      {"a": torch.zeros(1)}, [])
    assert fitted["a"] == 1 and len(skipped) == 2


def test_rows_of_every_anchor_of_retinanet_follow_their_classes():
    def state(count, start=0):
        return {"detector.level_embed": torch.zeros(1, 2), "detector.class_embed.0.weight": torch.zeros(count, 1),
                "retinanet.cls.bias": start + torch.arange(9 * count)}
    fitted, _ = class_rows.fit(state(2), ["a", "b"], state(2, -100), ["b", "a"])
    assert fitted["retinanet.cls.bias"].tolist() == [2 * anchor + i for anchor in range(9) for i in (1, 0)]


def test_one_box_for_all_classes_is_no_class_row():
    """ViT-L's region head has four rows of box deltas, as many as a head for a single class."""
    def state(count, value):
        return {"detector.level_embed": torch.zeros(1, 2), "detector.class_embed.0.weight": torch.full((count, 1), value),
                "roi.convs.0.0.weight": torch.full((1,), value), "roi.reg.bias": torch.full((4,), value)}
    fitted, _ = class_rows.fit(state(80, 1.0), class_rows.COCO_NAMES, state(1, 0.0), ["cell"])
    assert fitted["roi.reg.bias"].tolist() == [1, 1, 1, 1] and fitted["detector.class_embed.0.weight"].tolist() == [[0]]


# ---- files

class Calls:
    """Pickled as the order to call something when it is read."""
    def __init__(self, function, *arguments):
        self.order = function, arguments

    def __reduce__(self):
        return self.order


def test_pickle_refused(tmp_path):
    """A checkpoint that wants to run code is refused by name, in torch's format and as a bare pickle, and runs nothing."""
    trap = tmp_path / "trap"
    order = Calls(os.mkdir, str(trap))
    torch.save({"model": {}, "args": order}, tmp_path / "zip.pt")
    torch.save({"model": {}, "args": order}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"args": order}, protocol=2))
    for name in ("zip.pt", "old.pt", "bare.pt"):
        with pytest.raises(ValueError, match="tensors and plain types only.*mkdir"):
            checkpoints.load(tmp_path / name)
    (tmp_path / "new.pt").write_bytes(pickle.dumps({"args": order}, protocol=4))
    with pytest.raises(ValueError, match="protocol 3 or later"), pytest.warns(UserWarning, match="protocol 4"):
        checkpoints.load(tmp_path / "new.pt")
    assert not trap.exists()


@pytest.mark.parametrize("name, order", {
    "functools.partial": functools.partial(os.mkdir, "trap"), "eval": Calls(eval, "1"), "exec": Calls(exec, "1"),
    "__import__": Calls(__import__, "os"), "getattr": Calls(getattr, "os", "system"),
    "operator.attrgetter": operator.attrgetter("system"), "posix.mkdir": Calls(os.mkdir, "trap"),
    "numpy": Calls(np.load, "trap")}.items())
def test_orders_inside_options_are_refused_by_name(tmp_path, name, order):
    """The classes that options may hold open no way for others: not in a namespace, nor as an argument of an allowed one."""
    for options in (argparse.Namespace(lr=[{"drop": order}]), Calls(argparse.Namespace, order),
                    collections.OrderedDict(a=Calls(np.dtype, order))):
        torch.save({"model": {}, "args": options}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=f"asks for {name}"):
            checkpoints.load(tmp_path / "a.pt")


def test_options_with_numbers_of_numpy_and_paths_are_read(tmp_path):
    options = argparse.Namespace(lr=np.float64(1e-4), epochs=np.int64(50), amp=np.bool_(True), output_dir=Path("a/b"))
    torch.save({"model": {}, "args": options}, tmp_path / "a.pt")
    read = checkpoints.load(tmp_path / "a.pt")["args"]
    assert (read.lr, read.epochs, read.amp, str(read.output_dir)) == (1e-4, 50, True, "a/b")


def safetensors(path, **tensors):
    """Writes the format by its description: length of the header, header, numbers."""
    header, numbers = {"__metadata__": {"format": "pt"}}, b""
    for name, (kind, tensor) in tensors.items():
        data = tensor.view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(numbers), len(numbers) + len(data)]}
        numbers += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)


def test_safetensors_are_read_without_their_package(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"a": ("F16", torch.rand(3, dtype=torch.float16)), "b": ("F32", torch.rand(2, 5)),
               "c": ("I64", torch.arange(6).view(2, 3)), "d": ("BF16", torch.rand(1, 1, dtype=torch.bfloat16))}
    safetensors(path, **tensors)
    read = checkpoints.load(path)
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensor) for name, (_, tensor) in tensors.items())
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:20], b"", whole[:8] + b"[1]" + whole[11:], whole.replace(b"BF16", b"F8_4")):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="broken or cut short"):
            checkpoints.load(path)


def test_broken_missing_and_foreign_files_are_told_apart(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(UserError, match="found no file"):
        checkpoints.load(path)
    checkpoints.save(path, {"a": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="cut short"):
        checkpoints.load(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="expected a dictionary, got list"):
        checkpoints.load(path)
    for other in (b"", b"# a text\n"):
        path.write_bytes(other)
        with pytest.raises(ValueError, match="another kind"):
            checkpoints.load(path)


def test_an_error_while_saving_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    checkpoints.save(path, {"step": 1})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoints.save(path, {"step": lambda: 2})
    assert checkpoints.load(path) == {"step": 1}


def test_newest_falls_back_and_says_so(tmp_path, capsys):
    with pytest.raises(UserError, match="nothing to resume.*without --resume"):
        checkpoints.newest(tmp_path)
    last = tmp_path / "last.pt"
    for step in (1, 2):
        checkpoints.save(last, {"step": step}, keep_previous=True)
    assert checkpoints.newest(tmp_path) == last and checkpoints.load(last)["step"] == 2
    last.write_bytes(b"not whole")
    found = checkpoints.newest(tmp_path)
    assert found.name == "last.pt.prev" and checkpoints.load(found)["step"] == 1
    assert "last.pt.prev, for" in capsys.readouterr().out


def test_a_config_of_another_version_is_refused_by_field():
    with pytest.raises(ValueError, match="dino.Config.*wings"):
        checkpoints.settings(importlib.import_module("dino"), {"config": {"wings": 2}})


def save_for_ever(path, reports):
    torch.set_num_threads(1)   # those of the process it was forked from are not here
    for step in itertools.count(1):
        checkpoints.save(path, {"step": step, "weights": torch.full((300_000,), float(step))}, keep_previous=True)
        reports.send(step)


@pytest.mark.parametrize("kills", (3, pytest.param(200, marks=pytest.mark.slow)))
def test_kill_during_save(tmp_path, kills):
    """A process that only saves, killed at random moments: what it reported as saved, or newer, loads whole."""
    rng = random.Random(0)
    for attempt in range(kills):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        receive, send = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(folder / "last.pt", send))
        process.start()
        send.close()
        reported = receive.recv()
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                reported = receive.recv()
        state = checkpoints.load(checkpoints.newest(folder))
        assert state["step"] >= reported - 1 and (state["weights"] == state["step"]).all()
