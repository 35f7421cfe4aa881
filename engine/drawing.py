"""Draw boxes, masks and labels on images, and put pictures together on a sheet.

Boxes are xyxy in pixels of the picture. A class has the same color in every picture; where the data
have one class only, each object has a color of its own.
"""
import colorsys
import math
from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from engine.files import complete_picture, picture_format

MIN_SIDE = 480   # px: smaller images are enlarged by an integer factor, so that labels are legible
MAX_LABELS = 40  # with more objects, boxes are thin and a legend replaces the labels
GAP = 8          # px around labels and pictures


def color(label: int) -> tuple[int, int, int]:
    """RGB of a class, 0..255: hues a golden section apart, so that successive classes differ most.
    """
    hue = (0.02 + label * 0.618034) % 1
    dark = label // 8 % 2
    rgb = colorsys.hsv_to_rgb(hue, 0.85, 0.7 if dark else 0.95)
    return tuple(round(255 * value) for value in rgb)


def draw_detections(image: Image.Image, detection: dict[str, Tensor], class_names: list[str],
                    side: int | None = None) -> Image.Image:
    """The image with its detections, the most confident on top -> a new PIL image.

    detection: labels (k,), boxes (k, 4) xyxy px, and optionally scores (k,) and masks (k, h, w)
    bool; without scores it is ground truth. side: length of the longer side in px; default: as it
    is, or enlarged by an integer factor to be at least MIN_SIDE. Labels stay inside the picture.
    With more than MAX_LABELS objects a legend of colors and counts below replaces the labels."""
    longest = max(image.size)
    factor = side / longest if side else max(1, math.ceil(MIN_SIDE / longest))
    size = [max(1, round(length * factor)) for length in image.size]
    resampling = Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS
    canvas = image.convert("RGB").resize(size, resampling)

    labels = detection["labels"].tolist()
    boxes = (detection["boxes"].float() * factor).tolist()
    one_class = len(class_names) == 1
    colors = [color(i if one_class else label) for i, label in enumerate(labels)]
    texts = [class_names[label] for label in labels]
    if "scores" in detection:
        scores = detection["scores"].tolist()
        texts = [f"{name} {score:.2f}" for name, score in zip(texts, scores, strict=True)]
    if "masks" in detection:
        canvas = blend_masks(canvas, detection["masks"].cpu(), colors)

    # in reverse order: the first detection is the best and lies on top
    draw = ImageDraw.Draw(canvas)
    crowded = len(labels) > MAX_LABELS
    width = 1 if crowded else max(2, round(max(size) / 320))
    for (x1, y1, x2, y2), rgb in zip(boxes[::-1], colors[::-1], strict=True):
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=rgb, width=width)
    font = get_font(max(11, round(max(size) / 45)))
    if crowded:
        return add_legend(canvas, labels, class_names, font)
    for text, box, rgb in zip(texts[::-1], boxes[::-1], colors[::-1]):
        draw_label(draw, box, text, rgb, font, size)
    return canvas


def get_font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def blend_masks(canvas, masks, colors):
    """Masks (k, h, w) as half-transparent color with a solid edge, the first one on top."""
    pixels = np.asarray(canvas, np.float32).copy()
    thickness = max(1, max(canvas.size) // 500)
    for mask, rgb in reversed(list(zip(masks, colors))):
        enlarged = Image.fromarray(mask.numpy().astype(np.uint8) * 255).resize(canvas.size)
        inside = np.asarray(enlarged) > 127
        edge = inside & ~eroded(inside, thickness)
        pixels[inside] = 0.55 * pixels[inside] + 0.45 * np.array(rgb)
        pixels[edge] = rgb
    return Image.fromarray(pixels.astype(np.uint8))


def eroded(mask: np.ndarray, steps: int) -> np.ndarray:
    """The mask without the pixels that are within `steps` of its border."""
    for _ in range(steps):
        padded = np.pad(mask, 1)
        vertical = padded[2:, 1:-1] & padded[:-2, 1:-1]
        horizontal = padded[1:-1, 2:] & padded[1:-1, :-2]
        mask = mask & vertical & horizontal
    return mask


def draw_label(draw, box, text, rgb, font, size):
    """A tag on the box's upper edge, above it where there is room, always inside the picture."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width = right - left + 6
    height = bottom - top + 4
    x = min(max(0, box[0]), max(0, size[0] - width))
    above = box[1] - height if box[1] >= height else max(0, box[1])
    y = min(above, max(0, size[1] - height))
    luminance = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    draw.rectangle((x, y, x + width, y + height), fill=rgb)
    fill = "black" if luminance > 150 else "white"
    draw.text((x + 3 - left, y + 2 - top), text, fill=fill, font=font)


def add_legend(picture, labels, class_names, font):
    """The picture with a legend of class colors and counts below it."""
    entries = []
    for label, count in sorted(Counter(labels).items()):
        entries.append((color(label), f"{class_names[label]}: {count}"))
    if len(class_names) == 1:
        entries = [(None, f"{class_names[0]}: {len(labels)}, each in a color of its own")]

    # entries from left to right, in as many lines as they need
    square = font.size
    places = []
    x = GAP
    y = GAP
    for rgb, text in entries:
        width = font.getlength(text) + (square + 4 if rgb else 0)
        if x > GAP and x + width > picture.width:
            x = GAP
            y += square + GAP
        places.append((x, y))
        x += width + 2 * GAP

    height = y + square + GAP
    sheet = Image.new("RGB", (picture.width, picture.height + height), "white")
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for (rgb, text), (x, y) in zip(entries, places):
        y += picture.height
        if rgb:
            draw.rectangle((x, y, x + square, y + square), fill=rgb)
            x += square + 4
        draw.text((x, y + square / 2), text, fill="black", font=font, anchor="lm")
    return sheet


def tile(pictures, path, columns, titles=None, gap=GAP, note=""):
    """Write pictures of similar size as one sheet of `columns`, each centered in its cell -> path

    titles: a line of text above each picture; note: a line below all of them"""
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    head = 20 if titles else 0
    foot = 20 if note else 0
    font = get_font(13)
    rows = math.ceil(len(pictures) / columns)
    size = (columns * (width + gap) + gap, rows * (height + head + gap) + gap + foot)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        x = gap + column * (width + gap)
        y = gap + row * (height + head + gap)
        if titles:
            draw.text((x + 2, y + 2), titles[number], fill="#333333", font=font)
        left = x + (width - picture.width) // 2
        upper = y + head + (height - picture.height) // 2
        sheet.paste(picture, (left, upper))
    draw.text((gap + 2, size[1] - foot), note, fill="#333333", font=font)
    return save_picture(sheet, path)


def save_picture(picture: Image.Image, path: str | Path) -> str | Path:
    """Write a picture; the file is complete or absent. -> path"""
    with complete_picture(path) as file:
        kind = picture_format(path)
        if kind == "PNG":
            picture = picture.quantize(256)   # a third of the size
        picture.save(file, kind, quality=88, optimize=True)
    return path
