"""What the command lines of eval.py, analysis.py and visualize.py share."""
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

import data
from engine.assets import is_name
from engine.class_rows import fit_classes, without_unused
from engine.cli import registry
from engine.coco_json import read_json
from engine.datasets import read_once, validation_set
from engine.download import cache_path, is_url, split_address
from engine.errors import UserError
from engine.flags import one_line_usage
from engine.machine import choose_device, cores, node_processes
from engine.models import load_model
from engine.processes import own_place


def parse(options, program, doc, argv):
    """Read a command line into a dataclass of options.

    program: its name for --help; doc: the docstring of its file"""
    with one_line_usage(program, argv):
        return tyro.cli(options, args=argv, prog=program, use_underscores=True,
                        description=summary(doc), registry=registry,
                        config=(tyro.conf.FlagCreatePairsOff,))


def check_measuring(options):
    """UserError unless `checkpoint`, `batch_size` and `workers` can be used."""
    require(options.checkpoint, "--checkpoint FILE", "none")
    require(options.batch_size >= 1, "--batch_size of at least 1", options.batch_size)
    require(0 <= options.workers <= 256, "--workers in 0..256", options.workers)


def open_detector(checkpoint, device="cpu", variant="", detector=""):
    """Load a checkpoint -> Loaded.

    checkpoint: a file, a run folder (its best.pt), the name of weights in assets/weights, or an
    address on the web"""
    require(str(checkpoint).strip(), "--checkpoint FILE", "no path")   # "" is the current folder
    device = choose_device(str(device))
    path = Path(checkpoint)
    if path.is_dir():
        path = path / "best.pt"
        if not path.is_file():
            raise UserError(f"--checkpoint: expected a run folder with best.pt, got {checkpoint} "
                            "without one; a run writes it at its first evaluation")
        checkpoint = path
    return load_model(checkpoint, device, variant, detector)


def results_folder(checkpoint):
    """Where the results of a checkpoint go: its run folder, or runs/NAME for what is none of ours.

    checkpoint: as for `open_detector`"""
    if is_url(checkpoint):
        return Path("runs") / cache_path(split_address(checkpoint)[0]).stem
    path = Path(checkpoint)
    if path.is_dir():
        return path
    if is_name(checkpoint) and not path.exists():
        return Path("runs") / checkpoint
    return path.parent


def in_used_classes(detector):
    """The detector without the unused ones of the 91 columns of released COCO heads."""
    names = detector.meta["class_names"]
    model, used = without_unused(detector.model, detector.paper, detector.cfg, names)
    ids = dict(zip(names, detector.meta["category_ids"]))
    meta = {**detector.meta, "class_names": used, "category_ids": [ids[name] for name in used]}
    return detector._replace(model=model, meta=meta)


def with_data(detector, folder="", json=""):
    """A detector and the data to evaluate it on.

    folder: a COCO-layout folder; default: the data of the detector's own run. json: a COCO json in
    place of the folder's own; it may lack annotations, as those of a test server do.
    -> the detector with the classes of the data (released heads have unused columns), the data set,
    of the split "test" where the json lacks annotations"""
    if json:
        dataset = read_once(lambda: open_json(json, folder, detector))
    else:
        dataset = validation_set(folder, detector)
    model = fit_classes(detector.model, detector.paper, detector.cfg, detector.meta, dataset)
    meta = {**detector.meta, "class_names": list(dataset.class_names)}
    return detector._replace(model=model, meta=meta), dataset


def open_json(json, folder, detector):
    """The CocoFolder of a json, see `with_data`."""
    content = read_json(json)
    labeled = "annotations" in content
    folder = folder or Path(json).parent.parent
    masks = getattr(detector.paper, "NEEDS_MASKS", False)
    return data.CocoFolder(folder, "val" if labeled else "test", annotations=json, content=content,
                           transform=data.eval_transform(detector.recipe),
                           load_masks=labeled and masks)


def join_processes(device):
    """Join the process group that torchrun prepared -> (device of this process, rank, world size).

    device: as for `choose_device`"""
    name = choose_device(device)
    # products and convolutions in float32, which training may compute in TF32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    rank, world, local_rank, _ = own_place()
    if world > 1:
        if name == "cuda":
            name = f"cuda:{local_rank}"
            torch.cuda.set_device(name)
        if not dist.is_initialized():
            dist.init_process_group("gloo")     # only results travel: counts, matches, figures
    return name, rank, world


def default_workers():
    """Processes that read images for each process of this node: at most 4, a core each."""
    return min(4, cores() // node_processes())


def summary(doc):
    """The first two paragraphs of a program's docstring, what it does and examples, for --help."""
    return "\n\n".join(doc.split("\n\n")[:2])


def require(condition, expectation, value):
    """UserError "expected ..., got ..." unless the condition holds."""
    if not condition:
        raise UserError(f"expected {expectation}, got {value!r}")
