"""Two-stage Deformable DETR beside the one of the package `transformers`: the same weights, images
and losses."""
import importlib.util
from functools import partial

import torch

import deformable_detr
from engine import authors_names
from engine.errors import UserError
from engine.machine import prepare_cpu
from tools.bench_models import TrainingStep, logit_difference, random_batch
from tools.timing import DEVICE, Device, alternating, show_progress, write_table

CLASSES = 91


def transformers(device: Device = DEVICE, repeats: int = 5,
                 batch: int = 2 if DEVICE == "cuda" else 1,
                 types: tuple[str, ...] = ("float32", "bfloat16"),
                 size: tuple[int, int] = (800, 1199), as_it_comes: bool = True):
    """Time our Deformable DETR beside the one of the package transformers.

    Args:
        device: Where to run.
        repeats: Calls of each kind, in turns; the median is reported.
        batch: Images of a training step.
        types: float32, bfloat16 (autocast), or both.
        size: Height and width of the images in pixels.
        as_it_comes: On a CPU, time the package without our settings of a CPU too.
    """
    require_installed()
    theirs, ours = make_models()
    inputs = random_batch(size, batch)
    difference = compare_logits(theirs, ours, inputs)
    passes = {
        "transformers": their_passes(theirs, inputs, device),
        "ours": our_passes(ours, inputs, device)}
    rounds = [("", list(passes))]
    if device == "cpu":
        # our settings hold for the whole process, from then on
        rounds = [("no", ["transformers"] if as_it_comes else []), ("yes", list(passes))]
    rows = []
    first = {}     # (what, dtype) -> ms of the first row, for the ratios
    for settings, names in rounds:
        if settings == "yes":
            prepare_cpu()
        for dtype in types:
            for what in passes["ours"]:
                calls = {name: partial(passes[name][what], dtype == "bfloat16") for name in names}
                for name, cells in time_calls(calls, repeats, first, (what, dtype)).items():
                    rows.append([what, dtype, name, settings, *cells])
                    show_progress(rows[-1])
    rows.sort(key=lambda row: row[:2])
    columns = (f"{size[0]}x{size[1]}", "autocast", "implementation", "CPU settings", "ms",
               "all calls", "ratio")
    notes = [f"Largest difference of the logits: {difference:.1e}. Ratio: how many times as fast "
             "as the first row of its kind. CPU settings: those of `engine.machine.prepare_cpu`, "
             "for the whole process. Calls of both implementations take turns."]
    write_table("transformers", device, columns, rows, notes)


def installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def require_installed() -> None:
    if not installed():
        raise UserError("expected the package transformers, got none: "
                        "pip install -r tests/requirements.txt")


def time_calls(calls, repeats, first, kind) -> dict[str, list[str]]:
    """Time calls in turns -> {name: cells: median, range, how many times as fast as the first one}

    first: medians by kind, to which the first one of a new kind is added"""
    try:
        times = alternating(calls, repeats, warm_up=1)
    except RuntimeError as error:   # the package, with half precision on a CPU
        return {name: [f"failed: {str(error)[:60]}", "", ""] for name in calls}
    cells = {}
    for name, (ms, low, high) in times.items():
        first.setdefault(kind, ms)
        cells[name] = [f"{ms:.0f}", f"{low:.0f} to {high:.0f}", f"{first[kind] / ms:.2f}"]
    return cells


# ---- models --------------------------------------------------------------------------------------

def make_models() -> tuple:
    """Their model with random weights; our model with the same, and its criterion."""
    import transformers as package
    stages = package.ResNetConfig(
        embedding_size=64, hidden_sizes=[256, 512, 1024, 2048], depths=[3, 4, 6, 3],
        out_features=["stage2", "stage3", "stage4"])
    torch.manual_seed(0)
    theirs = package.DeformableDetrForObjectDetection(package.DeformableDetrConfig(
        use_timm_backbone=False, backbone_config=stages, num_labels=CLASSES, with_box_refine=True,
        two_stage=True, auxiliary_loss=True, disable_custom_kernels=True))
    cfg = deformable_detr.Config(**deformable_detr.VARIANTS["two_stage"])
    model, criterion = deformable_detr.build(cfg, CLASSES)
    weights = authors_names.from_transformers(theirs.state_dict())
    weights = authors_names.from_authors(weights, "deformable_detr_two_stage")
    model.load_state_dict(weights)
    return theirs, (model, criterion)


@torch.no_grad()
def compare_logits(theirs, ours, inputs) -> float:
    """Largest difference of the logits for the first image, see logit_difference."""
    images, padding, _ = inputs
    their_logits = theirs.eval()(images[:1], ~padding[:1]).logits
    our_logits = ours[0].eval()(images[:1], padding[:1])["pred_logits"]
    return logit_difference(our_logits[0], their_logits[0])


# ---- passes --------------------------------------------------------------------------------------

def trainable(model) -> list:
    return [p for p in model.parameters() if p.requires_grad]


@torch.inference_mode()
def detect(model, images, mask, amp):
    """mask (B, H, W): padding for our model, its inverse for theirs."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        model.eval()(images, mask)


def their_passes(model, inputs, device) -> dict:
    """The passes that are timed: {name: function of amp}"""
    images, padding, targets = inputs
    model.to(device)
    images = images.to(device)
    valid = ~padding.to(device)
    labels = []
    for target in targets:
        labels.append({"class_labels": target["labels"].to(device),
                       "boxes": target["boxes"].to(device)})
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-5, fused=True)

    def training_step(amp):
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            loss = model.train()(images, valid, labels=labels).loss
        loss.backward()
        parameters = [p for p in model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(parameters, deformable_detr.RECIPE.clip, foreach=True)
        optimizer.step()

    return {"inference, 1 image": partial(detect, model, images[:1], valid[:1]),
            f"training step, {len(images)}": training_step}


def our_passes(ours, inputs, device) -> dict:
    """The same passes of our model: {name: function of amp}"""
    model, criterion = ours
    images, padding, _ = inputs
    training = TrainingStep(deformable_detr, model, criterion, deformable_detr.RECIPE, device)
    one_image = (images[:1].to(device), padding[:1].to(device))

    def training_step(amp):
        model.train()
        training(inputs, amp)

    return {"inference, 1 image": partial(detect, model, *one_image),
            f"training step, {len(images)}": training_step}
