"""Which images an epoch shows, and how often: once each, or rare classes more often.

Repeat-factor sampling (LVIS: Gupta et al., CVPR 2019, arXiv 1908.03195, appendix B): a class c in a
fraction f(c) of the images has the factor r(c) = max(1, sqrt(t / f(c))), and an image that of its
rarest class. Its copies in an epoch are the two whole numbers next to its factor, at random and
with the factor as their mean.
"""
import numpy as np

from engine.errors import UserError


def image_counts(dataset) -> np.ndarray:
    """Count the images that contain each class, crowds excluded: (N,) int64."""
    annotations = dataset.annotations
    images = np.repeat(np.arange(len(dataset)), np.diff(annotations.start))            # (A,)
    pairs = np.stack([images, annotations.labels], 1)[~annotations.crowd]
    labels = np.unique(pairs, axis=0)[:, 1]
    return np.bincount(labels, minlength=len(dataset.class_names))


def repeat_factors(dataset, threshold: float) -> np.ndarray:
    """The factor of every image: (images,) float64.

    threshold: t, the fraction of the images below which a class is rare
    Raises UserError if no class is rare.
    """
    counts = image_counts(dataset)
    fraction = counts / len(dataset)                                                   # (N,)
    factors = np.sqrt(threshold / np.maximum(fraction, 1e-12)).clip(1)
    factors[counts == 0] = 1
    if factors.max() == 1:
        least = fraction[counts > 0].min(initial=1)
        raise UserError(
            f"--oversample {threshold:g}: expected a class in a smaller fraction of the images of "
            f"{dataset.name} than this, got {least:.3g} for the rarest: give a larger one, or 0")
    annotations = dataset.annotations
    result = np.ones(len(dataset))
    for index in range(len(dataset)):
        rows = slice(*annotations.start[index:index + 2])
        labels = annotations.labels[rows][~annotations.crowd[rows]]
        result[index] = factors[labels].max(initial=1)
    return result


def epoch_length(dataset) -> int:
    """Number of images of an epoch."""
    factors = getattr(dataset, "repeat_factors", None)
    return len(dataset) if factors is None else int(factors.sum())


def epoch_order(dataset, rng: np.random.Generator) -> np.ndarray:
    """Draw the order of an epoch: (epoch_length,) int64, indices of images."""
    order = rng.permutation(len(dataset))
    factors = getattr(dataset, "repeat_factors", None)
    if factors is None:
        return order
    # Points at equal distances on a line of the factors, one image after the other: an image gets
    # one or the other whole number of points, and their sum is the same in every epoch.
    length = epoch_length(dataset)
    ends = np.cumsum(factors[order]) * (length / factors.sum())
    points = np.arange(length) + rng.random()
    places = np.searchsorted(ends, points, side="right").clip(max=len(order) - 1)
    return rng.permutation(order[places])
