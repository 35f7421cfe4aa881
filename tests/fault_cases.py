"""The cases of test_faults.py: which commands meet which damage, and wrong command lines.

A command is a function (rng) -> program, its words. `CASES` lists them with their damages.
"""
import json
import random

from faults import (CPU, HERE, IMAGES, MASKS, TINY, choose_any_checkpoint, damage_annotations,
                    damage_images_of_data, damage_labels, damage_layout, damage_log,
                    damage_own_checkpoint, damage_photo, damage_released, damage_results,
                    damage_run, nothing, occupy_run_folder, rename_to_safetensors)

# ---- commands ------------------------------------------------------------------------------------

TRAIN = ("--model=deformable_detr", "--data=data", "--out=runs/new", *TINY, *HERE)


def train_command(rng):
    return "train.py", [*TRAIN]


def train_masks_command(rng):
    return "train.py", [*MASKS, "--out=runs/new", "--detector=runs/small/best.pt"]


def overfit_command(rng):
    return "train.py", [*TRAIN, "--overfit=1", "--epochs=1"]


def check_command(rng):
    if rng.random() < 0.5:
        return "train.py", ["--check_data=data"]
    return "tools.check_data", ["data"]


def eval_data_command(rng):
    more = rng.choice(([], ["--save_detections"], ["--tile", "32"], ["--workers", "1"]))
    return "eval.py", ["--checkpoint=runs/small", "--data=data", "--out=out", *CPU, *more]


def eval_json_command(rng):
    path = f"data/annotations/instances_{rng.choice(('train', 'val'))}2017.json"
    more = rng.choice(([], ["--images", "data/val2017"]))
    return "eval.py", ["--checkpoint=runs/small", "--json", path, "--data=data", "--out=out", *CPU,
                       *more]


def eval_masks_command(rng):
    return "eval.py", ["--checkpoint=runs/masks", "--data=data", "--out=out", *CPU]


def eval_photos_command(rng):
    more = rng.choice(([], ["--tile=32"]))
    return "eval.py", ["--checkpoint=runs/small", "--images", "photos", "--out=out", *CPU, *more]


def detections_command(rng):
    name = rng.choice(("detections", "sampling_points", "anchors"))
    return "visualize.py", [name, "--checkpoint=runs/small", "--image",
                            f"photos/{rng.choice(IMAGES)}", "--out=out/picture.png"]


def explore_command(rng):
    checkpoint = rng.choice(("runs/small", "runs/small", "runs/masks"))
    images = rng.sample((f"photos/{rng.choice(IMAGES)}", "scene", "val", "val:1"), 2)
    return "visualize.py", ["explore", "--checkpoint", checkpoint, "--data=data",
                            "--out=out/page.html", "--images", *images]


EXPORT = ("--checkpoint=runs/small", "--out=model.pt2")


def export_command(rng):
    more = rng.choice(([], ["--size", "64", "96"], ["--batch=2"], ["--raw"]))
    return "tools.export", [*EXPORT, *more, "--images", f"photos/{rng.choice(IMAGES)}"]


def convert_command(rng):
    name = rng.choice(("yolo", "voc", "csv", "coco"))
    more = rng.choice(([], [], ["--skip_faulty"]))
    return "tools.convert", ["--from", name, f"labels/{name}", "out", *more]


def chosen_command(rng):
    """Any command that reads a checkpoint, on weights/chosen.pt."""
    path = "weights/chosen.pt"
    photo = "photos/photo.jpg"
    out = "--out=out/picture.png"
    commands = (
        ("eval.py", ["--checkpoint", path, "--images", photo, "--out=out", *CPU]),
        ("eval.py", ["--checkpoint", path, "--out=out", *CPU]),
        ("eval.py", ["--checkpoint", path, "--data=data", "--out=out", *CPU]),
        ("analysis.py", ["--checkpoint", path, "--data=data", "--out=out", *CPU]),
        ("visualize.py", ["detections", "--checkpoint", path, "--image", photo, out]),
        ("visualize.py", ["anchors", "--checkpoint", path, "--image", photo, out]),
        ("visualize.py", ["sampling_points", "--checkpoint", path, "--image", photo, out]),
        ("visualize.py", ["noised_boxes", "--checkpoint", path, "--data=data", out]),
        ("visualize.py", ["mistakes", "--checkpoint", path, "--data=data", out]),
        ("visualize.py", ["explore", "--checkpoint", path, "--out=out/page.html", "--images",
                          photo, "scene"]),
        ("tools.export", ["--checkpoint", path, "--out=model.onnx"]),
        ("train.py", [*TRAIN, "--init", path]),
        ("train.py", [*MASKS, "--out=runs/new", "--detector", path]),
        ("train.py", [*TRAIN, "--backbone_weights", path]),
    )
    return rng.choice(commands)


def safetensors_command(rng):
    return "eval.py", ["--checkpoint=weights/chosen.safetensors", "--images=photos/photo.jpg",
                       "--out=out", *CPU]


def resume_command(rng):
    more = rng.choice(([], [], ["--epochs=2"], ["--accum=2"], ["--lr=1"]))
    target = rng.choice((["--resume", "--out=runs/small"], ["--resume", "runs/small"],
                         ["--resume", "runs/small/last.pt"]))
    return "train.py", [*target, *HERE, *more]


def read_run_command(rng):
    commands = (
        ("eval.py", ["--checkpoint=runs/small", "--out=out", *CPU]),
        ("visualize.py", ["curves", "--run_dir=runs/small"]),
        ("visualize.py", ["compare_curves", "--run_dirs", "runs/small", "--out=out/c.png"]),
    )
    return rng.choice(commands)


def results_command(rng):
    commands = (
        ("visualize.py", ["analysis", "--analysis=results/analysis.json", "--out=out/a.png"]),
        ("visualize.py", ["precision_recall", "--evaluation=runs/small/eval.json",
                          "--out=out/p.png"]),
    )
    return rng.choice(commands)


# ---- command lines -------------------------------------------------------------------------------

WORDS = ("", "-1", "0", "1", "2", "nan", "inf", "-inf", "1e9", "1e-400", "abc", "1,2", ",", "--",
         "-", "\u0669", "0x10", "1_0", "99999999999999999999", "None", "none", "true", "[1]", "{}",
         "\ud800", "\x1b[31m", "a b", "x" * 300, "*", "~", "/dev/null", "/proc/self/mem", "data",
         "photos/photo.jpg", "weights/dino.pt", "runs/small", "nothing/there", "\u00e9", "%s",
         "$HOME")
# A correct large number would only take long.
FLAGS_OF_TRAIN = (
    "model", "data", "preset", "variant", "out", "resume", "overfit", "init", "detector",
    "check_data", "num_train", "num_val", "seed", "device", "amp", "accum", "recompute",
    "deterministic", "workers", "threads", "eval_every", "save_every", "lr", "lr_backbone",
    "weight_decay", "clip", "batch_size", "epochs", "schedule", "lr_drop", "warmup", "ema",
    "train_sizes", "max_size", "eval_size", "crop", "backbone", "backbone_weights", "dim",
    "num_feature_levels", "num_heads", "num_points", "encoder_layers", "decoder_layers", "ffn_dim",
    "num_queries", "dropout", "top_k", "with_box_refine", "two_stage", "lr_drops", "typo",
    "lr-drop")
FLAGS_OF_EVAL = (
    "checkpoint", "data", "json", "images", "score_threshold", "max_dets", "save_detections",
    "boxes_only", "tile", "overlap", "eval_size", "out", "batch_size", "workers", "device", "amp",
    "variant", "detector", "typo")
FLAGS_OF_ANALYSIS = ("checkpoint", "data", "k", "out", "batch_size", "workers", "device", "amp",
                     "variant", "typo")
FLAGS_OF_EXPORT = ("checkpoint", "out", "size", "batch", "raw", "images", "variant", "detector",
                   "typo")
FLAGS_OF_CONVERT = ("from", "val_share", "skip_faulty", "typo")
ON_IMAGE = ("--checkpoint=runs/small", "--image=photos/photo.jpg")
ON_DATA = ("--checkpoint", "runs/small")
PICTURES = {   # command: what it needs, its flags
    "detections": (ON_IMAGE, ("checkpoint", "image", "score_threshold", "device")),
    "anchors": (ON_IMAGE, ("checkpoint", "image", "score_threshold", "device")),
    "sampling_points": (ON_IMAGE, ("checkpoint", "image", "rank", "device")),
    "explore": ((*ON_DATA, "--images", "photos/photo.jpg"),
                ("checkpoint", "images", "data", "seed", "device")),
    "predictions": (ON_DATA, ("checkpoint", "data", "n", "score_threshold", "device")),
    "strip": (ON_DATA, ("checkpoint", "data", "n", "side", "score_threshold", "device")),
    "mistakes": (ON_DATA, ("checkpoint", "data", "n", "score_threshold", "device")),
    "noised_boxes": (("--checkpoint=weights/dino.pt",), ("checkpoint", "data", "n")),
    "analysis": (("--analysis=results/analysis.json",), ("analysis", "data", "n", "device")),
    "scenes": (("--n=1",), ("n",)),
    "curves": (("--run_dir=runs/small",), ("run_dir",)),
    "compare_curves": (("--run_dirs", "runs/small"), ("run_dirs", "kind", "labels")),
    "precision_recall": (("--evaluation=runs/small/eval.json",), ("evaluation", "kind")),
    "nothing": ((), ("n",)),
}


def wrong_flags(rng, names):
    """One to three flags with words that hardly fit, some without a value, some twice."""
    words = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        flag = f"--{rng.choice(names)}"
        value = rng.choice(WORDS)
        form = rng.randrange(5)
        if form == 0:
            words.append(flag)
        elif form == 1:
            words.append(f"{flag}={value}")
        elif form == 2:
            words += [flag, value, rng.choice(WORDS)]
        else:
            words += [flag, value]
    return words


def train_flags_command(rng):
    return "train.py", [*TRAIN, *wrong_flags(rng, FLAGS_OF_TRAIN)]


def eval_flags_command(rng):
    start = rng.choice((["--data=data"], ["--images", "photos/photo.jpg"]))
    return "eval.py", ["--checkpoint=runs/small", "--out=out", *CPU, *start,
                       *wrong_flags(rng, FLAGS_OF_EVAL)]


def analysis_flags_command(rng):
    return "analysis.py", ["--checkpoint=runs/small", "--data=data", "--out=out", *CPU,
                           *wrong_flags(rng, FLAGS_OF_ANALYSIS)]


def picture_flags_command(rng):
    name = rng.choice(list(PICTURES))
    start, flags = PICTURES[name]
    out = ["--out=out/p.html"] if name == "explore" else ["--out=out/p.png"]
    out = [] if name == "curves" else out
    return "visualize.py", [name, *start, *out, *wrong_flags(rng, (*flags, "out", "typo"))]


def scenes_flags_command(rng):
    return "scenes.py", ["--write=out/scenes", "--num_train=1", "--num_val=1",
                         *wrong_flags(rng, ("write", "num_train", "num_val", "seed", "typo"))]


def export_flags_command(rng):
    return "tools.export", [*EXPORT, *wrong_flags(rng, FLAGS_OF_EXPORT)]


def convert_flags_command(rng):
    start = rng.choice((["--from=yolo", "labels/yolo", "out"], ["--from=csv", "labels/csv", "out"],
                        ["labels/voc", "out"]))
    return "tools.convert", [*start, *wrong_flags(rng, FLAGS_OF_CONVERT)]


def check_flags_command(rng):
    return "tools.check_data", [rng.choice(WORDS) for _ in range(rng.choice((0, 1, 1, 1, 2)))]


def change_environment(rng, folder):
    """A variable that a scheduler or a shell may have set, for the child alone: see `run_case`."""
    name = rng.choice(("OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "COLUMNS",
                       "LOCAL_WORLD_SIZE"))
    values = ("", "0", "1", "-1", "abc", "1,2", "1.5", " 1 ", "99999999999999999999")
    value = rng.choice(values)
    (folder / "environment.json").write_text(json.dumps({name: value}))
    return f"{name}={value!r}"


def limit_file_size(rng, folder):
    """A disk that takes so many bytes of a file and no more."""
    limit = int(10 ** rng.uniform(0, 6.5))
    (folder / "environment.json").write_text(json.dumps({"file size": limit}))
    return f"files of at most {limit} bytes"


def lose_the_output_folder(rng, folder):
    """--out cannot be made: a file is in its way."""
    (folder / "out").write_text("a file")
    (folder / "runs/new").write_text("a file")
    return "a file at out"


def all_writers(rng):
    makers = (train_command, eval_data_command, eval_photos_command, detections_command,
              resume_command, read_run_command, scenes_flags_command, chosen_command,
              explore_command, export_command, convert_command)
    return rng.choice(makers)(rng)


def any_program(rng):
    makers = (train_command, eval_data_command, analysis_flags_command, read_run_command)
    return rng.choice(makers)(rng)


# damage, commands that meet it, share of the cases
CASES = (
    (damage_annotations, (check_command, train_command, train_masks_command, overfit_command,
                          eval_data_command, eval_json_command, eval_masks_command,
                          explore_command), 18),
    (damage_images_of_data, (check_command, train_command, eval_data_command,
                             eval_masks_command, explore_command), 6),
    (damage_layout, (check_command, train_command, eval_data_command), 3),
    (damage_photo, (eval_photos_command, detections_command, explore_command, export_command), 10),
    (damage_labels, (convert_command,), 6),
    (damage_own_checkpoint, (chosen_command,), 14),
    (damage_released, (chosen_command,), 8),
    (choose_any_checkpoint, (chosen_command,), 3),
    (rename_to_safetensors, (safetensors_command,), 2),
    (damage_run, (resume_command, resume_command, read_run_command), 10),
    (damage_log, (resume_command, read_run_command), 4),
    (damage_results, (results_command,), 3),
    (occupy_run_folder, (train_command,), 3),
    (lose_the_output_folder, (all_writers,), 2),
    (limit_file_size, (all_writers,), 5),
    (change_environment, (any_program,), 3),
    (nothing, (train_flags_command, train_flags_command, eval_flags_command,
               analysis_flags_command, picture_flags_command, scenes_flags_command,
               check_flags_command, export_flags_command, convert_flags_command), 20),
)


def draw_case(seed):
    """-> damage, its random generator, program, its words"""
    rng = random.Random(seed)
    damage, makers, _ = rng.choices(CASES, [share for *_, share in CASES])[0]
    program, words = rng.choice(makers)(rng)
    return damage, rng, program, words
