"""..."""
import sys
import torch

import data


def predict(model, dataset, indices, device, batch_size=1, amp=False, workers=0):
    """Yields (outputs, targets) for batches of the images at `indices`, in evaluation mode and without gradients."""
    loader = data.batches(dataset, [list(indices[k:k + batch_size]) for k in range(0, len(indices), batch_size)], workers)
    device, training, done = torch.device(device), model.training, 0
    model.eval()
    try:
        for images, padding, targets in loader:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
                outputs = model(images.to(device), padding.to(device), targets)   # read by none but `--roi_box gt`
            yield outputs, targets
            done += len(targets)
            if sys.stderr.isatty():
                print(f"\revaluated {done}/{len(indices)} images\x1b[K", end="", file=sys.stderr, flush=True)
    finally:
        model.train(training)
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@torch.no_grad()
def infer(model, image, recipe, device, amp=False):
    """One PIL image through a model in evaluation mode -> outputs of a batch of one."""
    images, padding, _ = data.collate([data.eval_transform(recipe)(image)])                         # (1, 3, h, w)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
        return model(images.to(device), padding.to(device))


def detect_image(model, detect, image, cfg, recipe, device, amp=False):
    """The top-k detections of one PIL image, in its pixels."""
    size = torch.tensor([image.size[::-1]], device=device)                                       # (1, 2), h and w
    return detect(infer(model, image, recipe, device, amp), size, cfg)[0]


def above(detection, threshold):
    """The detections with at least this score."""
    kept = detection["scores"] >= threshold
    return {key: value[kept] for key, value in detection.items()}
