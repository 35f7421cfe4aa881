"""Materials and damages for test_faults.py.

A damage is a function (rng, folder) -> short text. It changes something in a folder of materials;
everything that it draws comes from `rng`. fault_cases.py says which commands meet it.
"""
import gzip
import importlib
import json
import os
import re
import shutil
from argparse import Namespace
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

import eval as evaluation
import hashed
import train
import visualize
from coco_folders import POLYGON
from engine import authors_names
from engine import checkpoints
from label_folders import coco_export, csv_folder, voc_folder, yolo_folder
from small_runs import coco_folder
from tiny_checkpoint import write_checkpoint

PAPERS = ("deformable_detr", "detr", "dino", "h_detr", "co_detr")
CLASSES = ("cat", "dog")
IMAGES = ("photo.png", "photo.jpg", "gray.tif", "palette.gif", "deep.png", "photo.webp")
TINY = ("--preset=small", "--dim=64", "--num_heads=2", "--ffn_dim=32", "--num_queries=8",
        "--encoder_layers=1", "--decoder_layers=1", "--train_sizes=64", "--eval_size=64",
        "--batch_size=2", "--epochs=1")
HERE = ("--device=cpu", "--workers=0", "--threads=1", "--amp=false")
MASKS = ("--model=mask_frozen_detr", "--data=data", "--preset=small", "--roi_size=8",
         "--channel_dim=32", "--image_ffn_dim=32", "--box_ffn_dim=32", "--score_dim=8",
         "--score_ffn_dim=16", "--num_heads=2", "--batch_size=2", "--epochs=1", *HERE)
CPU = ("--device=cpu", "--workers=0")
RELEASED_SIZES = {"dim": 64, "ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 2,
                  "num_queries": 5}
HUGE = "huge integer"   # more digits than Python makes of a number
TABLE = "file,xmin,ymin,xmax,ymax,class\n0.png,4,6,14,15,dog\n1.png,4,6,14,15,cat\n"
RECTANGLE = [[10, 10, 40, 10, 40, 30, 10, 30]]


# ---- materials -----------------------------------------------------------------------------------

def make_materials(folder):
    """Write a folder of intact files: data/, photos/, labels/, runs/, weights/, results/. A run
    folder of two epochs comes from train.py itself."""
    coco_folder(folder / "data", images=2, names=CLASSES, ids=(7, 3))
    for split in ("train", "val"):
        edit_json(folder / f"data/annotations/instances_{split}2017.json", add_segmentations)
    make_photos(folder / "photos")
    yolo_folder(folder / "labels/yolo", images=1)
    voc_folder(folder / "labels/voc")
    csv_folder(folder / "labels/csv", TABLE)
    coco_export(folder / "labels/coco")

    (folder / "weights").mkdir()
    for name in PAPERS:
        write_checkpoint(folder / f"weights/{name}.pt", name, CLASSES, data="data")
    for family in ("detr", "deformable_detr_two_stage", "dino", "h_detr"):
        write_released(folder / f"weights/released_{family}.pth", family)
    train.main(["--model", "deformable_detr", "--data", "data", "--out", "runs/small", *TINY,
                *HERE, "--epochs=2"])
    train.main([*MASKS, "--out=runs/masks", "--detector=runs/small/best.pt"])

    evaluation.main(["--checkpoint=runs/small", *CPU])
    visualize.main(["curves", "--run_dir=runs/small"])
    (folder / "results").mkdir()
    conflict = {"heads": ["a", "b"], "S": [[0, 1], [1, 0]], "average": {"a": 1, "b": 1}}
    area = {"IoB": [0, 1], "IoF": [1, 0], "area": 0.5}
    analysis = {"run": {"checkpoint": "weights/dino.pt", "ATD": 0.1, "k": 100, "encoder": area,
                        "decoder": area, "conflict": conflict}}
    (folder / "results/analysis.json").write_text(json.dumps(analysis))


def add_segmentations(content):
    rle = {"size": [64, 64], "counts": [64 * 10, 20 * 64, 64 * 34]}
    for row, segmentation in zip(content["annotations"], (RECTANGLE, rle)):
        row["segmentation"] = segmentation


def make_photos(folder):
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (48, 40, 3)).astype(np.uint8)
    photo = Image.fromarray(pixels)
    for name in ("photo.png", "photo.jpg", "photo.webp"):
        photo.save(folder / name)
    photo.convert("L").save(folder / "gray.tif")
    photo.convert("P").save(folder / "palette.gif")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(folder / "deep.png")


def write_released(path, family):
    """A narrow detector with hashed weights for 91 classes, as the authors save theirs."""
    kind = authors_names.FAMILIES[family]
    paper = importlib.import_module(kind.model_name)
    with torch.device("meta"):
        cfg = replace(paper.Config(), **RELEASED_SIZES, **kind.overrides)
        model, _ = paper.build(cfg, 91)
    names = authors_names.to_authors(model.state_dict(), family)
    weights = {name: hashed.weight(name, x.shape, 5, kind.tied) for name, x in names.items()}
    options = Namespace(num_queries=5, nheads=8, dilation=False)
    torch.save({"model": weights, "args": options, "epoch": 11}, path)


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ---- values --------------------------------------------------------------------------------------

def any_value(rng, deepest=100_000):
    """A value that json can hold and that hardly any field expects."""
    values = (None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e-300, 1e300, float("nan"),
              float("inf"), 10 ** 9, 2 ** 31, 2 ** 63, 2 ** 64, 10 ** 300, HUGE, "", " ",
              "1", "nan", "../../x", "/dev/zero", "\ud800", "\x1b[2J\x07", "a\nb", "x" * 5000,
              "\u202e\u0000", [], [[]], [None], {}, {"a": 1}, [1] * 4, [0.1] * 4, [[1, 2]],
              {"counts": "a", "size": [1, 1]}, {"counts": [1], "size": [10 ** 9, 10 ** 9]},
              [[float("nan")] * 6], POLYGON, list(range(1000)), "AAAA", b"\x00")
    if rng.random() < 0.02:
        return nested_list(rng.choice((5, 200, deepest)))
    return rng.choice(values)


def nested_list(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def json_value(rng):
    value = any_value(rng)
    return "bytes" if isinstance(value, bytes) else value


def tensor_value(rng):
    """A value that a checkpoint can hold."""
    shape = rng.choice(((), (0,), (1,), (3, 5), (2, 8, 32), (32, 32, 1, 1)))
    tensors = (torch.zeros(shape), torch.full(shape, float("nan")), torch.full(shape, 3e38),
               torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool),
               torch.zeros(shape, dtype=torch.complex64), torch.zeros(shape, dtype=torch.float16),
               torch.zeros((), dtype=torch.float64).expand(10 ** 6, 10 ** 6),
               torch.sparse_coo_tensor(size=(4, 4), check_invariants=True),
               torch.zeros(shape, device="meta"))
    return rng.choice(tensors)


# ---- damaged bytes -------------------------------------------------------------------------------

def cut(rng, content):
    return content[:rng.randrange(len(content) + 1)]


def flip_bits(rng, content):
    content = bytearray(content)
    for _ in range(rng.choice((1, 3, 30))):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def overwrite_part(rng, content):
    start = rng.randrange(len(content) + 1)
    size = rng.choice((1, 16, 512))
    return content[:start] + rng.randbytes(size) + content[start + size:]


def zero_part(rng, content):
    start = rng.randrange(len(content) + 1)
    size = rng.choice((16, 512, 10 ** 6))
    length = len(content[start:start + size])
    return content[:start] + bytes(length) + content[start + size:]


def remove_part(rng, content):
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start + rng.choice((1, 16, 512)):]


def append_bytes(rng, content):
    return content + rng.randbytes(rng.choice((1, 100)))


def exchange_halves(rng, content):
    middle = len(content) // 2
    return content[middle:] + content[:middle]


def compress(rng, content):
    return gzip.compress(content, 1)


def another_text(rng, content):
    texts = (b"", b"\n", b"{", b"[]", b"null", b"<!DOCTYPE html><html>404</html>", b"PK\x03\x04",
             b"\x80\x02.", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
             b"\xef\xbb\xbf{}", b"\xff\xfe{\x00", b"#!/bin/sh\nrm -r x\n", b"\x89PNG\r\n\x1a\n")
    return rng.choice(texts)


BYTE_DAMAGES = (cut, flip_bits, overwrite_part, zero_part, remove_part, append_bytes,
                exchange_halves, compress, another_text)


def damage_bytes(rng, path):
    damage = rng.choice(BYTE_DAMAGES)
    path.write_bytes(damage(rng, path.read_bytes()))
    return f"{damage.__name__} {path.name}"


# ---- something else in place of a file -----------------------------------------------------------

def remove(path):
    path.unlink()


def make_folder(path):
    path.unlink()
    path.mkdir()


def make_pipe(path):
    path.unlink()
    os.mkfifo(path)


def link_to_itself(path):
    path.unlink()
    path.symlink_to(path.name)


def link_to_nothing(path):
    path.unlink()
    path.symlink_to("nothing")


def link_to_endless_zeros(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def make_huge(path):
    with open(path, "r+b") as file:
        file.truncate(20 * 2 ** 30)   # sparse


PLACE_DAMAGES = (remove, make_folder, make_pipe, link_to_itself, link_to_nothing,
                 link_to_endless_zeros, make_huge)


def damage_place(rng, path):
    damage = rng.choice(PLACE_DAMAGES)
    damage(path)
    return f"{damage.__name__} {path.name}"


# ---- nested values -------------------------------------------------------------------------------

def containers(value):
    """All lists and dictionaries inside a value."""
    found = []
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (dict, list)) and value:
            found.append(value)
            waiting += value.values() if isinstance(value, dict) else value
    return found


def change_entry(rng, content, new_value):
    """Replace, remove, double or rename an entry somewhere inside lists and dictionaries."""
    places = containers(content)
    if not places:
        return "nothing left"
    place = rng.choice(places)
    key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    action = rng.choice(("replace", "replace", "replace", "remove", "double", "empty"))
    if action == "replace":
        place[key] = new_value(rng)
    elif action == "remove":
        del place[key]
    elif action == "double" and isinstance(place, list):
        place.append(place[key])
    elif action == "double":
        place[f"{key}x"] = place.pop(key)
    else:
        place.clear()
    return f"{action} {str(key)[:40]}"


def damage_json_values(rng, path):
    content = json.loads(path.read_text())
    texts = [change_entry(rng, content, json_value) for _ in range(rng.choice((1, 1, 2, 3)))]
    try:
        path.write_text(json.dumps(content).replace(f'"{HUGE}"', "1" * 5000))
    except RecursionError:      # json writes less depth than it reads
        path.write_text("[" * 100_000 + "]" * 100_000)
    return f"{', '.join(texts)} in {path.name}"


def damage_json(rng, path):
    kind = rng.choice((damage_json_values,) * 6 + (damage_bytes, damage_place))
    return kind(rng, path)


# ---- data sets and images ------------------------------------------------------------------------

def damage_annotations(rng, folder):
    split = rng.choice(("train", "val"))
    return damage_json(rng, folder / f"data/annotations/instances_{split}2017.json")


def damage_images_of_data(rng, folder):
    split = rng.choice(("train", "val"))
    path = folder / f"data/{split}2017/{rng.randrange(2)}.png"
    return rng.choice((damage_bytes, damage_bytes, damage_place))(rng, path)


def damage_photo(rng, folder):
    path = folder / "photos" / rng.choice(IMAGES)
    return rng.choice((damage_bytes, damage_bytes, damage_bytes, damage_place))(rng, path)


def damage_layout(rng, folder):
    """Exchange, rename or remove parts of a data folder."""
    data = folder / "data"
    parts = ("annotations", "train2017", "val2017", "annotations/instances_train2017.json",
             "annotations/instances_val2017.json")
    first, second = rng.sample(parts, 2)
    action = rng.choice(("exchange", "remove", "nest"))
    if action == "exchange" and "/" not in first + second:
        os.rename(data / first, data / "x")
        os.rename(data / second, data / first)
        os.rename(data / "x", data / second)
    elif action == "nest":
        os.rename(data, folder / "outer")
        data.mkdir()
        os.rename(folder / "outer", data / "inner")
    elif (data / first).is_dir():
        shutil.rmtree(data / first)
    else:
        (data / first).unlink()
    return f"{action} {first} {second}"


# ---- labels in other formats ---------------------------------------------------------------------

def damage_words(rng, path):
    """Replace, remove or double words of a text: what stands between blanks, commas and brackets.
    """
    words = re.split(r"([\s,:<>/\[\]]+)", path.read_text())
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.randrange(len(words))
        action = rng.choice(("replace", "replace", "remove", "double"))
        if action == "replace":
            words[place] = str(any_value(rng, deepest=200)).replace(HUGE, "1" * 5000)
        elif action == "remove":
            words[place] = ""
        else:
            words[place] *= 2
    path.write_text("".join(words), encoding="utf-8", errors="surrogatepass")
    return f"words of {path.name}"


def damage_labels(rng, folder):
    """Damage a file or two of each format."""
    texts = []
    for name in ("yolo", "voc", "csv", "coco"):
        files = sorted(path for path in (folder / "labels" / name).rglob("*") if path.is_file())
        for path in rng.sample(files, rng.choice((1, 1, 2))):
            kinds = (damage_bytes, damage_place)
            if path.suffix != ".png":
                kinds += (damage_words,) * 4
            if path.suffix == ".json":
                kinds += (damage_json_values,) * 4
            texts.append(f"{name}: {rng.choice(kinds)(rng, path)}")
    return "; ".join(texts)


# ---- checkpoints ---------------------------------------------------------------------------------

class Payload:
    """Pickled, it asks for a folder to be made: whoever makes it has run foreign code."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def checkpoint_value(rng):
    """Mostly values of other types, and now and then a number near the limits of a setting."""
    numbers = (0, -1, 3, 0.5, 10 ** 7, 10 ** 9, 2 ** 63)   # none that only takes long
    modules = ("os", "this", "antigravity", "train", "tests.faults", "../dino", "dino.py", "DINO")
    kind = rng.randrange(6)
    if kind == 0:
        return tensor_value(rng)
    if kind == 1:
        return rng.choice(modules)
    return rng.choice(numbers) if kind < 4 else any_value(rng, deepest=200)


def read_state(path):
    with torch.serialization.safe_globals(checkpoints.ALLOWED):
        return torch.load(path, weights_only=True)


def damage_checkpoint_values(rng, path):
    """Change entries of a checkpoint and save it again, so that its checksums are right."""
    state = read_state(path)
    texts = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        # Parts are drawn first: tensors by far outnumber settings.
        parts = [part for part in state.values() if isinstance(part, (dict, list)) and part]
        target = rng.choice((state, *parts))
        texts.append(change_entry(rng, target, checkpoint_value))
    torch.save(state, path)
    return f"{', '.join(texts)} in {path.name}"


def damage_one_setting(rng, path):
    """Give one field of the saved Config, Recipe or Run another value."""
    state = read_state(path)
    settings = state.get(rng.choice(("config", "recipe", "run"))) or {}
    if not settings:
        return "nothing changed"
    name = rng.choice(list(settings))
    settings[name] = checkpoint_value(rng)
    if "config" in state and settings is state["config"] and rng.random() < 0.3:
        settings[name] = rng.choice((100, 8192, 65_536))   # more than fits into memory
    torch.save(state, path)
    return f"{name} = {str(settings[name])[:60]} in {path.name}"


def damage_weights(rng, path):
    """Change one tensor: not finite, other shape, other type, missing."""
    state = read_state(path)
    weights = state["model"]
    name = rng.choice(list(weights))
    action = rng.choice(("replace", "remove", "transpose", "largest", "half", "rename"))
    value = weights.pop(name)
    if action == "replace":
        weights[name] = tensor_value(rng)
    elif action == "transpose":
        weights[name] = value.T if value.ndim == 2 else value[None]
    elif action == "largest":
        weights[name] = torch.full_like(value, 3e38 if value.is_floating_point() else 10 ** 9)
    elif action == "half":
        weights[name] = value.to(torch.float16)
    elif action == "rename":
        weights[name + ".x"] = value
    torch.save(state, path)
    return f"{action} {name} in {path.name}"


def hide_code(rng, path):
    """Put a pickled call into a checkpoint."""
    state = read_state(path)
    key = rng.choice(list(state))
    state[key] = Payload()
    torch.save(state, path, _use_new_zipfile_serialization=rng.random() < 0.5)
    return f"code in {key} of {path.name}"


CHECKPOINT_DAMAGES = (damage_checkpoint_values,) * 3 + (damage_one_setting,) * 4 + (
    damage_weights, damage_weights, hide_code, damage_bytes, damage_bytes, damage_place)


def damage_checkpoint(rng, path):
    return rng.choice(CHECKPOINT_DAMAGES)(rng, path)


def damage_own_checkpoint(rng, folder):
    """Damages one of ours; weights/chosen.pt is then the damaged one."""
    path = folder / "weights/chosen.pt"
    name = rng.choice(PAPERS)
    shutil.copy(folder / f"weights/{name}.pt", path)
    return f"{name}: " + damage_checkpoint(rng, path)


def damage_released(rng, folder):
    path = folder / "weights/chosen.pt"
    name = rng.choice(("detr", "deformable_detr_two_stage", "dino", "h_detr"))
    shutil.copy(folder / f"weights/released_{name}.pth", path)
    return f"released {name}: " + damage_checkpoint(rng, path)


def choose_any_checkpoint(rng, folder):
    """No damage: any checkpoint for any command."""
    names = [*PAPERS, "released_detr", "released_dino"]
    name = rng.choice(names)
    suffix = ".pth" if name.startswith("released") else ".pt"
    shutil.copy(folder / f"weights/{name}{suffix}", folder / "weights/chosen.pt")
    return f"{name}, intact"


def rename_to_safetensors(rng, folder):
    """A .safetensors file that is another kind of file, or has a damaged header."""
    from safetensors.torch import save_file
    path = folder / "weights/chosen.safetensors"
    if rng.random() < 0.3:
        shutil.copy(folder / "weights/dino.pt", path)
        return "a .pt under another name"
    save_file({"a": torch.zeros(3, 4), "model.level_embed": torch.zeros(4, 32)}, path)
    return damage_bytes(rng, path) if rng.random() < 0.8 else "safetensors of another model"


# ---- run folders ---------------------------------------------------------------------------------

RUN_FILES = ("last.pt", "last.pt", "last.pt.prev", "best.pt", "log.jsonl", "log.jsonl",
             "config.json")


def damage_run(rng, folder):
    """Damage one or two files of a run folder."""
    texts = []
    for name in sorted({rng.choice(RUN_FILES) for _ in range(rng.choice((1, 1, 2)))}):
        path = folder / "runs/small" / name
        if path.suffix == ".jsonl" and rng.random() < 0.5:
            texts.append(damage_log_lines(rng, path))
        elif path.suffix == ".json":
            texts.append(damage_json(rng, path))
        elif path.suffix == ".jsonl":
            texts.append(rng.choice((damage_bytes, damage_bytes, damage_place))(rng, path))
        else:
            texts.append(damage_checkpoint(rng, path))
    return "; ".join(texts)


def damage_log(rng, folder):
    path = folder / "runs/small/log.jsonl"
    kind = rng.choice((damage_log_lines, damage_log_lines, damage_bytes, damage_place))
    return kind(rng, path)


def damage_log_lines(rng, path):
    """Change values in a line of a log, or replace, double, or exchange lines."""
    lines = path.read_text().splitlines()
    place = rng.randrange(len(lines))
    action = rng.choice(("values", "values", "values", "text", "double", "exchange"))
    if action == "values":
        record = json.loads(lines[place])
        change_entry(rng, record, json_value)
        try:
            lines[place] = json.dumps(record)
        except RecursionError:
            lines[place] = "[" * 10_000
    elif action == "text":
        lines[place] = json.dumps(json_value(rng)) if rng.random() < 0.5 else "\x00\x1b{"
    elif action == "double":
        lines.append(lines[place])
    else:
        lines.reverse()
    path.write_text("\n".join(lines) + rng.choice(("", "\n")), encoding="utf-8",
                    errors="surrogatepass")
    return f"{action} in line {place} of {path.name}"


def occupy_run_folder(rng, folder):
    """Put something else where a run wants to write."""
    name = rng.choice(("last.pt", "best.pt", "log.jsonl", "config.json", "curves.png",
                       "predictions.png", ".lock", "last.pt.prev", "nan_report.jsonl"))
    path = folder / "runs/new" / name
    path.parent.mkdir()
    kind = rng.choice(("folder", "link to itself", "pipe", "full device"))
    if kind == "folder":
        path.mkdir()
        (path / "file").write_text("x")
    elif kind == "link to itself":
        path.symlink_to(name)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/full")
    return f"{kind} at {name}"


def damage_results(rng, folder):
    """Damage a json that visualize.py reads."""
    name = rng.choice(("runs/small/eval.json", "results/analysis.json"))
    return damage_json(rng, folder / name)


def nothing(rng, folder):
    return "intact"
