"""Train RT-DETR of the package transformers on a folder, for a given time, from random weights.

    python -m tools.train_transformers --data DIR --out runs/rt_detr --minutes 5

This is what one would write with that package alone: its model, image processor and loss, AdamW,
and mirrored images. All images become one size. It stands beside our models in tools/real_data.py.
"""
import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from boxes import box_xyxy_to_cxcywh
from data import CocoFolder
from engine import commands
from engine.errors import user_errors
from engine.machine import prepare_cpu
from engine.scoring import score
from eval import coco_results
from tools.bench_transformers import require_installed


@dataclass
class Settings:
    """What to train, and for how long."""
    data: Path                           # COCO-layout folder
    out: Path                            # folder for log.jsonl and config.json
    minutes: float                       # training time, without reading images and evaluation
    size: tuple[int, int] = (192, 256)   # height and width of all images, px; multiples of 32
    num_queries: int = 100               # objects that the detector can find in an image
    batch_size: int = 8                  # images of a step
    lr: float = 4e-4                     # learning rate of AdamW; cosine after a warmup of 4 %
    seed: int = 0                        # of initial weights and the order of images
    threads: int = 1                     # CPU threads
    max_dets: int = 100                  # detections of an image and a class that count


def train(settings: Settings) -> dict:
    """Train and evaluate. -> the record that is written to log.jsonl"""
    prepare_cpu()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    shuffle = random.Random(settings.seed)
    train_set = CocoFolder(settings.data, "train")
    val_set = CocoFolder(settings.data, "val")
    processor, model = make_model(settings, len(train_set.class_names))
    images, labels = read(train_set, processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=1e-4, fused=True)

    model.train()
    order = []
    steps = 0
    seconds = 0.0
    while seconds < 60 * settings.minutes:
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * lr_factor(seconds / (60 * settings.minutes))
        if len(order) < settings.batch_size:
            order = list(range(len(images)))
            shuffle.shuffle(order)
        batch = [order.pop() for _ in range(min(settings.batch_size, len(order)))]
        step(model, optimizer, *mirror(images[batch], [labels[i] for i in batch], shuffle))
        seconds += time.perf_counter() - begin
        steps += 1

    scores = evaluate(model, processor, val_set, settings.max_dets)
    record = {"kind": "eval", "step": steps, "train_seconds": round(seconds, 1), "bbox": scores}
    settings.out.mkdir(parents=True, exist_ok=True)
    run = {**asdict(settings), "data": str(settings.data), "out": str(settings.out)}
    (settings.out / "config.json").write_text(json.dumps({"run": run}))
    (settings.out / "log.jsonl").write_text(json.dumps(record) + "\n")
    print(f"AP {scores['AP']:.3f} after {steps} steps in {seconds:.0f} s")
    return record


def make_model(settings: Settings, num_classes: int) -> tuple:
    """-> the image processor of the package, and its RT-DETR at about the size of our small DINO"""
    require_installed()
    import transformers
    height, width = settings.size
    processor = transformers.RTDetrImageProcessorPil(size={"height": height, "width": width})
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=48, hidden_sizes=[48, 96, 160, 224], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"])
    config = transformers.RTDetrConfig(
        backbone_config=backbone, freeze_backbone_batch_norms=False, num_labels=num_classes,
        encoder_in_channels=[96, 160, 224], encoder_hidden_dim=128, encoder_ffn_dim=384,
        encoder_attention_heads=4, hidden_expansion=0.5, d_model=128,
        decoder_in_channels=[128, 128, 128], decoder_ffn_dim=384, decoder_layers=3,
        decoder_attention_heads=4, num_queries=settings.num_queries)
    return processor, transformers.RTDetrForObjectDetection(config)


def read(dataset: CocoFolder, processor) -> tuple:
    """All images of a data set in one size (n, 3, h, w), and their labels as RT-DETR takes them."""
    pixels = []
    labels = []
    for i in range(len(dataset)):
        _, image, target = dataset.pixel_sample(i)
        pixels.append(processor(image, return_tensors="pt")["pixel_values"])       # (1, 3, h, w)
        corners = torch.from_numpy(target["boxes"]).float()                        # (n, 4) px
        boxes = box_xyxy_to_cxcywh(corners / torch.tensor([*image.size, *image.size]))
        labels.append({"class_labels": torch.from_numpy(target["labels"]).long(), "boxes": boxes})
    return torch.cat(pixels), labels


def mirror(images: torch.Tensor, labels: list[dict], generator: random.Random) -> tuple:
    """Mirror each image of a batch, with its boxes, or not."""
    images = images.clone()
    mirrored = []
    for i, label in enumerate(labels):
        if generator.random() < 0.5:
            images[i] = images[i].flip(-1)
            boxes = label["boxes"].clone()
            boxes[:, 0] = 1 - boxes[:, 0]
            label = {**label, "boxes": boxes}
        mirrored.append(label)
    return images, mirrored


def lr_factor(progress: float) -> float:
    """Factor of the learning rate at a fraction of the run: a linear warmup, then a cosine."""
    warmup = min(1.0, (progress + 1e-3) / 0.04)
    return warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def step(model, optimizer, images: torch.Tensor, labels: list[dict]) -> None:
    """One training step, in bfloat16 autocast."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(pixel_values=images, labels=labels)
    outputs.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=True)
    optimizer.step()


@torch.no_grad()
def evaluate(model, processor, dataset: CocoFolder, max_dets: int) -> dict:
    """COCO's figures of boxes, as in engine.scoring.score, without the curves."""
    model.eval()
    results = []
    for i in range(len(dataset)):
        _, image = dataset.load_or_substitute(i)
        outputs = model(**processor(image, return_tensors="pt"))
        detections = processor.post_process_object_detection(
            outputs, threshold=0.0, target_sizes=[(image.height, image.width)])
        results += coco_results(detections, [dataset.image_ids[i]], dataset.category_ids)
    figures = score(dataset.coco(), results, "bbox", max_dets)
    del figures["curves"]
    return figures


def main(argv=None) -> None:
    with user_errors("tools.train_transformers"):
        train(commands.parse(Settings, "python -m tools.train_transformers", __doc__, argv))


if __name__ == "__main__":
    main()
