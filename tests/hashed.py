"""Weights, maps, images and objects that are the same on every machine.

They are an integer hash of seed, name and place, rounded to half precision. Recordings of the
authors' code were made with the same numbers, so figures recorded with it can stand in tests.
"""
import math
import re
import zlib

import numpy as np
import torch

# Boxes of the first three objects; of the second only width and height.
WHOLE = (0.5, 0.5, 1.0, 1.0)
SMALL = (1 / 64, 1 / 64)
CORNER = (0.875, 0.1875, 0.25, 0.375)

# Pattern of the name, number of dimensions (0: any), value from v in [-1, 1) and fan-in. The first
# row that fits a tensor is used.
RULES = (
    (r"running_var$", 0, lambda v, fan: 1 + 0.3 * v),
    (r"running_mean$", 0, lambda v, fan: 0.1 * v),
    (r"^backbone\.", 4, lambda v, fan: v * (6 / fan) ** 0.5),
    (r"(level_embed|(query_embed|tgt_embed|label_enc)\.weight)$", 0, lambda v, fan: v),
    (r"bbox_embed\.(\d+\.)?layers\.2\.weight$", 0, lambda v, fan: v * (3 / fan) ** 0.5 * 2.5),
    (r"class_embed\.(\d+\.)?weight$", 0, lambda v, fan: v * (3 / fan) ** 0.5 * 1.2),
    (r"", 4, lambda v, fan: v * (3 / fan) ** 0.5),
    (r"", 2, lambda v, fan: v * (3 / fan) ** 0.5),
    (r"\.bn3\..*weight$", 1, lambda v, fan: 0.3 + 0.1 * v),
    (r"\.weight$", 1, lambda v, fan: 1 + 0.2 * v),
    (r"sampling_offsets\.bias$", 1, lambda v, fan: 2 * v),
    (r"class_embed\.(\d+\.)?bias$", 1, lambda v, fan: -2 + 0.5 * v),
    (r"bbox_embed\.(\d+\.)?layers\.2\.bias$", 1, lambda v, fan: 0.4 * v),
    (r"", 0, lambda v, fan: 0.1 * v),
)


def signed(name, shape, seed):
    """float64 numbers in [-1, 1): splitmix64 of place and name, its upper 24 bits."""
    start = zlib.crc32(f"{seed}:{name}".encode()) * 0xD1B54A32D192ED03 + 1
    x = np.arange(math.prod(shape), dtype=np.uint64)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(start % 2 ** 64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    return (x >> np.uint64(40)).reshape(shape) / 2 ** 23 - 1


def half(values):
    return torch.from_numpy(np.asarray(values).astype(np.float16)).to(torch.get_default_dtype())


def weight(name, shape, seed, tied):
    """The tensor of one entry of an authors' checkpoint.

    Entries that are one tensor get the same numbers: the decoder's copies of the heads and, with
    `tied`, the heads of all layers.
    """
    name = re.sub(r"^transformer\.decoder\.(?=(class|bbox)_embed\.)", "", name)
    if tied:
        name = re.sub(r"^(class|bbox)_embed\.\d+\.", r"\1_embed.0.", name)
    rules = [rule for pattern, dims, rule in RULES
             if dims in (0, len(shape)) and re.search(pattern, name)]
    fan_in = math.prod(shape[1:])
    return half(rules[0](signed(name, shape, seed), fan_in))


def image(i, height, width, seed):
    """(3, height, width) in [-2, 2)."""
    return half(2 * signed(f"image{i}", (3, height, width), seed))


def feature(level, shape, seed):
    return half(1.5 * signed(f"feature{level}", shape, seed))


def objects(i, count, num_classes, seed):
    """Labels and boxes of image i.

    The first object fills the image, the second is tiny, the third touches the border.
    """
    u = (signed(f"boxes{i}", (count, 4), seed) + 1) / 2
    size = 0.05 + 0.6 * u[:, 2:] ** 2
    boxes = half(np.concatenate([size / 2 + u[:, :2] * (1 - size), size], 1)).view(count, 4)
    if count:
        boxes[0] = torch.tensor(WHOLE)
        boxes[1, 2:] = torch.tensor(SMALL)
        boxes[2] = torch.tensor(CORNER)
    labels = (signed(f"labels{i}", (count,), seed) + 1) / 2 * num_classes
    return {"labels": torch.from_numpy(labels.astype(np.int64)), "boxes": boxes}
