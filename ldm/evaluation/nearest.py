"""Whose name does a generated picture carry: that of the real picture nearest to it."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Features = Callable[[Tensor], Tensor]  # pictures [B, 3, H, W] in [-1, 1] -> [B, ...]

CHUNK = 64  # pictures at a time, for features and for distances


def pooled_pixels(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 3, 16, 16] by averaging: forgives shifts of a pixel or two and fine texture."""
    return F.adaptive_avg_pool2d(images.float(), 16)


@torch.no_grad()
def nearest_names(
    images: Tensor, bank: Tensor, names: Sequence[str], k: int = 5, features: Features = pooled_pixels
) -> list[list[str]]:
    """For each picture the k different names whose pictures in the bank are nearest, the nearest first.

    images [N, 3, H, W] and bank [M, 3, H, W] in [-1, 1], names M. The distance is plain L2 between
    `features`; of several pictures with one name the nearest counts. Raises ValueError if names and bank
    differ in length or the bank is empty.
    """
    if len(names) != len(bank) or not names:
        raise ValueError(f"a bank needs one name a picture, got {len(bank)} pictures and {len(names)} names")
    unique = list(dict.fromkeys(names))
    number = {name: i for i, name in enumerate(unique)}
    owner = torch.tensor([number[name] for name in names], device=bank.device)  # [M]
    known = torch.cat([features(part).flatten(1) for part in bank.split(CHUNK)])  # [M, D]
    result = []
    for part in images.split(CHUNK):
        distance = torch.cdist(features(part).flatten(1), known)  # [n, M]
        by_name = distance.new_full((len(part), len(unique)), torch.inf)
        by_name.scatter_reduce_(1, owner.expand(len(part), -1), distance, "amin")
        order = by_name.topk(min(k, len(unique)), largest=False).indices  # [n, k]
        result += [[unique[i] for i in row] for row in order.tolist()]
    return result


def name_recall(
    images: Tensor,
    wanted: Sequence[str],
    bank: Tensor,
    names: Sequence[str],
    features: Features = pooled_pixels,
) -> dict[str, float]:
    """How often the wanted name is the nearest, `top1`, or among the five nearest, `top5`: shares in [0, 1].

    images [N, 3, H, W] with one wanted name each; the rest as in `nearest_names`. Raises ValueError for a
    wanted name that the bank does not hold, since no picture could reach it.
    """
    if len(wanted) != len(images) or not wanted:
        raise ValueError(f"expected one name a picture, got {len(images)} pictures and {len(wanted)} names")
    if lost := sorted(set(wanted) - set(names)):
        raise ValueError(f"{len(lost)} wanted names are not in the bank, such as {lost[0]!r}")
    found = nearest_names(images, bank, names, 5, features)
    pairs = list(zip(wanted, found, strict=True))
    return {
        "top1": sum(name == near[0] for name, near in pairs) / len(pairs),
        "top5": sum(name in near for name, near in pairs) / len(pairs),
    }
