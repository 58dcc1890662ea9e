"""Aspect-ratio buckets: the few shapes that pictures of all shapes are trained in (NovelAI 2022)."""

import math

import numpy as np

Shape = tuple[int, int]  # (width, height) px


def bucket_shapes(size: int, step: int, max_aspect: float) -> list[Shape]:
    """The shapes of at most size^2 pixels, sides multiples of `step`, that no other one contains; from tall to wide.

    No side is more than `max_aspect` times the other. Raises ValueError unless size is a multiple of step, which
    makes the square one of them.
    """
    if step < 1 or size < step or size % step:
        raise ValueError(f"buckets: size={size} must be a multiple of bucket_step={step}")
    if not 1 <= max_aspect <= 16:
        raise ValueError(f"max_aspect={max_aspect}: allowed are 1 to 16")
    shapes = set()
    for width in range(step, math.isqrt(size * size) + 1, step):  # the narrow half; the wide one is its mirror image
        height = min(size * size // width, int(max_aspect * width)) // step * step
        if height:
            shapes |= {(width, height), (height, width)}
    whole = [(w, h) for w, h in shapes if not any(a >= w and b >= h for a, b in shapes - {(w, h)})]
    return sorted(whole, key=lambda shape: shape[0] / shape[1])


def assign(sizes: np.ndarray, shapes: list[Shape]) -> np.ndarray:
    """sizes [N, 2] (width, height) -> [N] int64: which of the shapes has the nearest aspect ratio, by their quotient.

    Only products of whole numbers and one division, so that every machine answers the same.
    """
    width, height = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    best, chosen = np.full(len(sizes), np.inf), np.zeros(len(sizes), np.int64)
    for i, (w, h) in enumerate(shapes):
        ours, theirs = width * h, height * w
        off = np.maximum(ours, theirs) / np.minimum(ours, theirs)
        chosen[off < best] = i
        best = np.minimum(best, off)
    return chosen
