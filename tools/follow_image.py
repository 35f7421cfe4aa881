"""Follow one image through a detector: the shapes, proposals, boxes and losses of every step.

    python -m tools.follow_image                                  a small DINO with random weights
    python -m tools.follow_image --checkpoint runs/dino           a trained one, its validation data
    python -m tools.follow_image --model deformable_detr --index 3

It calls the methods that the model's `forward` calls, in the same order, and prints what each
returns. README has the same steps as a table and as a figure.
"""
from dataclasses import dataclass

import torch

import data
from boxes import box_cxcywh_to_xyxy, box_iou
from engine.commands import open_detector, parse, require, with_data
from engine.errors import UserError, user_errors
from engine.models import Loaded, build_model, load_paper
from engine.recipe import configure
from scenes import SCENE_CLASSES, Shapes

SHOWN = 5      # proposals and detections that are printed


def random_detector(name: str) -> tuple[Loaded, Shapes]:
    """A model of the small preset with random weights, and generated scenes."""
    torch.manual_seed(0)
    paper = load_paper(name)
    cfg, recipe = configure(paper, getattr(paper, "SMALL", {}))
    model, criterion = build_model(paper, cfg, len(SCENE_CLASSES), "")
    meta = {"class_names": list(SCENE_CLASSES), "model_name": name}
    scenes = Shapes("val", 50, transform=data.eval_transform(recipe))
    return Loaded(model.eval(), paper, cfg, recipe, meta, criterion), scenes


@torch.no_grad()
def follow(detector: Loaded, dataset, index: int) -> None:
    """Print every step of one image of a data set."""
    model = detector.model
    if not all(hasattr(model, name) for name in ("encode", "propose", "decode")):
        raise UserError("expected a model with encode, propose and decode, such as dino, "
                        f"deformable_detr or h_detr, got {detector.meta['model_name']}")
    require(0 <= index < len(dataset), f"--index in 0..{len(dataset) - 1}", index)
    images, padding, targets = follow_data(dataset, index)
    memory = follow_encoder(model, images, padding)
    queries, proposals = model.propose(memory)
    say("propose", "queries", queries.content, "reference", queries.reference)
    if proposals is not None:
        show_proposals(proposals, targets, dataset.class_names)

    # In training mode the model adds denoising queries; its layers stay as in evaluation.
    model.training = True
    outputs = model(images, padding, targets)
    model.training = False
    if "dn_outputs" in outputs:
        say("denoise", f"training only: {outputs['dn_outputs']['groups']} groups of noised objects",
            outputs["dn_outputs"]["pred_boxes"])
    layers = [*outputs["aux_outputs"], outputs]
    for number, layer in enumerate(layers, 1):
        say("decode", f"layer {number}: logits", layer["pred_logits"], "boxes",
            layer["pred_boxes"])
    follow_matches(detector, outputs, layers, queries, targets[0], dataset.class_names)
    losses = detector.criterion(outputs, targets)
    total = sum(losses.values())
    say("loss", f"sum {total:.2f} of {len(losses)} terms; of the last layer: "
        + ", ".join(f"{name} {losses[name]:.2f}" for name in ("cls", "l1", "giou")))
    show_detections(detector, outputs, targets, dataset.class_names)


def say(step: str, text: str, *rest) -> None:
    """Print a step: a tensor by its shape, text as it is."""
    words = [text]
    for part in rest:
        words.append(part if isinstance(part, str) else str(tuple(part.shape)))
    print(f"{step:10}{' '.join(words)}")


def follow_data(dataset, index: int) -> tuple:
    """Read, transform and batch an image -> images, padding, targets"""
    _, original = dataset.load_or_substitute(index)
    names = [dataset.class_names[label] for label in dataset.objects(index).labels]
    say("read", f"{dataset.file_name(index)}: {original.width} x {original.height} px, "
        f"{len(names)} objects: {', '.join(names) or 'none'}")
    image, target = dataset[index]
    say("transform", "image", image, "labels", target["labels"], "boxes", target["boxes"])
    images, padding, targets = data.collate([(image, target)])
    say("batch", "images", images, "padding", padding)
    return images, padding, targets


def follow_encoder(model, images, padding):
    """Run backbone, projections and encoder -> Memory"""
    memory = model.encode(images, padding)
    for number, feature in enumerate(memory.features, 2):
        say("backbone", f"C{number}", feature)
    levels = " + ".join(f"{H} x {W}" for H, W in memory.shapes)
    say("encode", f"Memory: tokens of {levels} cells", memory.tokens)
    return memory


def show_proposals(proposals: dict, targets: list[dict], names: list[str]) -> None:
    """Print the best proposals: their scores, and their IoU with the nearest object."""
    scores = proposals["pred_logits"][0].sigmoid().amax(-1)              # (n,)
    best = scores.topk(min(SHOWN, len(scores))).indices
    boxes = proposals["pred_boxes"][0][best]                             # (SHOWN, 4)
    overlaps, nearest = nearest_objects(boxes, targets[0]["boxes"])
    for score, overlap, number in zip(scores[best], overlaps, nearest):
        name = names[targets[0]["labels"][number]] if len(targets[0]["labels"]) else "nothing"
        say("", f"proposal with score {score:.2f}: IoU {overlap:.2f} with the nearest object "
            f"({name})")


def nearest_objects(boxes, objects) -> tuple:
    """IoU of each box (n, 4) with its nearest object (n,), and the object's index (n,); zeros
    without objects."""
    if not len(objects):
        return torch.zeros(len(boxes)), torch.zeros(len(boxes), dtype=torch.int64)
    corners = box_cxcywh_to_xyxy(boxes)
    overlaps = box_iou(corners, box_cxcywh_to_xyxy(objects))[0]          # (n, objects)
    return overlaps.max(1)


def follow_matches(detector, outputs, layers, queries, target, names: list[str]) -> None:
    """Print which query is matched to each object, and the IoU of its box from layer to layer,
    beginning with its reference where that is a box."""
    query, number = detector.criterion.match(outputs, [target])[0]
    steps = [queries.reference[0]] if queries.reference.shape[-1] == 4 else []
    steps += [layer["pred_boxes"][0] for layer in layers]
    first = "reference, then " if len(steps) > len(layers) else ""
    say("match", f"{len(number)} objects to queries; IoU of {first}layers 1 to {len(layers)}:")
    for q, n in zip(query.tolist(), number.tolist()):
        object_box = target["boxes"][n:n + 1]
        overlaps = [nearest_objects(boxes[q:q + 1], object_box)[0].item() for boxes in steps]
        say("", f"{names[target['labels'][n]]:12} query {q:3}: "
            + "  ".join(f"{overlap:.2f}" for overlap in overlaps))


def show_detections(detector, outputs, targets, names: list[str]) -> None:
    """Print the best detections, boxes in pixels of the original image."""
    sizes = torch.stack([target["orig_size"] for target in targets])     # (1, 2)
    detection = detector.paper.detect(outputs, sizes, detector.cfg)[0]
    scores = detection["scores"].tolist()
    say("detect", f"{len(scores)} detections, the {SHOWN} best of them:")
    rows = zip(scores[:SHOWN], detection["labels"].tolist(), detection["boxes"].tolist())
    for score, label, box in rows:
        say("", f"{names[label]:12} {score:.2f}  {[round(value) for value in box]} px")


@dataclass
class Options:
    """Follow one image through a detector, step by step."""
    checkpoint: str = ""     # run folder, file or name of weights; none: random weights
    model: str = "dino"      # paper file of the model with random weights
    data: str = ""           # COCO-layout folder; none: the checkpoint's own data
    index: int = 0           # which image of the validation set


def main(argv: list[str] | None = None) -> None:
    with user_errors("tools.follow_image"):
        options = parse(Options, "python -m tools.follow_image", __doc__, argv)
        require(options.checkpoint or not options.data, "--checkpoint with --data", "none")
        if options.checkpoint:
            detector, dataset = with_data(open_detector(options.checkpoint), options.data)
        else:
            detector, dataset = random_detector(options.model)
        follow(detector, dataset, options.index)


if __name__ == "__main__":
    main()
