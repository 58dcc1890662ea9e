"""The nearest name: against a plain loop, with duplicates, and with features of one's own."""

import pytest
import torch
from torch import Tensor

from ldm.evaluation.nearest import name_recall, nearest_names, pooled_pixels


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_agrees_with_a_plain_loop_over_chunks() -> None:
    images, bank = pictures(70), pictures(150, seed=1)
    names = [f"name {i % 40}" for i in range(150)]
    expected = []
    for image in images:
        distance = (pooled_pixels(bank) - pooled_pixels(image[None])).flatten(1).norm(dim=1)
        order = [names[i] for i in distance.argsort()]
        expected.append(list(dict.fromkeys(order))[:5])
    assert nearest_names(images, bank, names) == expected


def test_a_slightly_changed_picture_keeps_its_name() -> None:
    bank = pictures(300)
    names = [str(i) for i in range(300)]
    worn = (bank + 0.1 * pictures(300, seed=2)).roll(1, -1)[:50]
    assert name_recall(worn, names[:50], bank, names)["top5"] >= 0.9
    assert name_recall(bank, names, bank, names) == {"top1": 1.0, "top5": 1.0}


def test_duplicates_count_once() -> None:
    bank = torch.stack([torch.full((3, 16, 16), v) for v in (0.0, 0.01, 0.02, 0.03, 0.5, 0.9)])
    names = ["a", "a", "a", "a", "b", "c"]
    assert nearest_names(bank[:1], bank, names, k=2) == [["a", "b"]]
    assert nearest_names(bank[:1], bank, names) == [["a", "b", "c"]]
    assert name_recall(bank[:1], ["c"], bank, names) == {"top1": 0.0, "top5": 1.0}


def test_features_decide() -> None:
    bank = torch.stack([torch.full((3, 16, 16), 0.9), torch.full((3, 16, 16), -0.1)])
    image = torch.full((1, 3, 16, 16), 0.1)
    assert nearest_names(image, bank, ["same sign", "near"], k=1) == [["near"]]
    assert nearest_names(image, bank, ["same sign", "near"], k=1, features=torch.sign) == [["same sign"]]


def test_wrong_lengths_and_unknown_names_are_refused() -> None:
    bank = pictures(3)
    with pytest.raises(ValueError, match="one name a picture"):
        nearest_names(bank, bank, ["a", "b"])
    with pytest.raises(ValueError, match="one name a picture"):
        name_recall(bank, ["a"], bank, ["a", "b", "c"])
    with pytest.raises(ValueError, match="not in the bank, such as 'z'"):
        name_recall(bank[:1], ["z"], bank, ["a", "b", "c"])
