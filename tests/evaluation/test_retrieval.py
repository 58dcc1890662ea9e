"""Recall of captions and pictures against sorting by hand, chance, and models that are perfect or broken."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

from data_pipeline.loader import DataConfig, fixed_batch, open_data
from ldm.checkpoints.load import load_model
from ldm.cli.evaluate import app
from ldm.evaluation import retrieval
from ldm.evaluation.retrieval import captioned, evaluate_retrieval, number, recall
from ldm.models.clip import CLIP


def unit(rows: int, width: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def by_hand(image: Tensor, text: Tensor, labels: list[int], k: int) -> tuple[float, float]:
    """Both recalls by sorting every row, one pair at a time."""
    scores = [[sum(a * b for a, b in zip(i, t, strict=True)) for t in text.tolist()] for i in image.tolist()]
    to_text = [labels[i] in sorted(range(len(text)), key=lambda t: -row[t])[:k] for i, row in enumerate(scores)]
    to_image = [
        any(labels[i] == t for i in sorted(range(len(image)), key=lambda i: -scores[i][t])[:k])
        for t in range(len(text))
    ]
    return sum(to_text) / len(to_text), sum(to_image) / len(to_image)


def test_recall_is_what_sorting_by_hand_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "ROWS", 7)  # several parts, the last one shorter
    labels = [(i * i * i) % 31 for i in range(60)]  # some captions have several pictures
    different, labels = number([str(label) for label in labels])
    text = unit(len(different), 6, 1)
    image = F.normalize(text[labels] + 2 * unit(60, 6, 2), dim=1)
    found = recall(image, text, torch.tensor(labels), ks=(1, 2, 4))
    for k in (1, 2, 4):
        to_text, to_image = by_hand(image, text, labels, k)
        assert found[f"image_to_text_recall@{k}"].item() == pytest.approx(to_text)
        assert found[f"text_to_image_recall@{k}"].item() == pytest.approx(to_image)
        assert 0.05 < to_text < 1 and 0.05 < to_image < 1  # so that the comparison says something


def test_equal_captions_are_one_and_any_of_their_pictures_is_right() -> None:
    different, labels = number(["a", "b", "a", "c"])
    assert different == ["a", "b", "c"] and labels == [0, 1, 0, 2]
    text = torch.eye(3)
    image = torch.stack([text[0], text[1], text[2], text[2]])  # the second picture of "a" looks like a "c"
    found = recall(image, text, torch.tensor(labels), ks=(1,))
    assert found["image_to_text_recall@1"].item() == pytest.approx(3 / 4)
    # "a" and "b" find their pictures; for "c" a wrong one is as near as its own, which then counts as the second
    assert found["text_to_image_recall@1"].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_collapsed_or_broken_model_finds_nothing(value: float) -> None:
    same = torch.full((20, 4), value)
    assert not any(recall(same, same, torch.arange(20)).values())


def test_a_perfect_model_finds_all_and_no_k_is_reported_that_any_order_would_reach() -> None:
    x = unit(10, 16, 0)
    found = recall(x, x, torch.arange(10))
    assert set(found) == {f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)}
    assert all(value == 1 for value in found.values())


def test_chance() -> None:
    """Random features: k of M captions hold the one right, and k of N pictures miss all m right with C(N-m,k)/C(N,k).

    1000 and 200 queries: six standard deviations of a mean of independent draws, false alarms below 1e-7 for 4 numbers
    (queries share candidates, which are many, so they are nearly independent).
    """
    count, captions, k = 1000, 200, 5
    labels = torch.arange(count) % captions
    found = recall(unit(count, 256, 3), unit(captions, 256, 4), labels, ks=(1, k))
    each = count // captions
    for n in (1, k):
        expected = {
            "image_to_text": (n / captions, count),
            "text_to_image": (1 - math.comb(count - each, n) / math.comb(count, n), captions),
        }
        for way, (p, queries) in expected.items():
            assert abs(found[f"{way}_recall@{n}"].item() - p) < 6 * math.sqrt(p * (1 - p) / queries)


class Planted(torch.nn.Module):
    """A CLIP that knows a picture by its mean and a caption by its number; `wrong` captions are known by another's."""

    def __init__(self, wrong: int) -> None:
        super().__init__()
        self.wrong, self.text, self.anchor = wrong, self, torch.nn.Parameter(torch.zeros(1))

    def image(self, pictures: Tensor) -> Tensor:
        return F.one_hot((pictures.mean((1, 2, 3)) * 200).round().long(), 200).float()

    def tokenize(self, captions: list[str]) -> Tensor:
        return torch.tensor([int(caption) for caption in captions])

    def features(self, ids: Tensor) -> Tensor:
        return F.one_hot(torch.where(ids < self.wrong, ids + 100, ids), 200).float()


@pytest.mark.parametrize("wrong", [0, 30])
def test_over_the_whole_set_however_it_comes(wrong: int) -> None:
    parts = [torch.arange(start, min(start + 13, 100)) for start in range(0, 100, 13)]
    samples = [((part / 200).view(-1, 1, 1, 1).expand(-1, 3, 4, 4), [str(int(i)) for i in part]) for part in parts]
    scores = evaluate_retrieval(Planted(wrong), samples)
    assert scores["pictures"] == scores["captions"] == 100
    for name, value in scores.items():
        if "recall" in name:
            assert value == pytest.approx(1 - wrong / 100)


def test_command(models: dict[str, Path], shards: Path) -> None:
    """Prints what the parts give when they are put together by hand; and refuses more pictures than there are."""
    words = ["retrieval", str(models["contrastive"]), str(shards)]
    result = CliRunner().invoke(app, [*words, "--count", "20", "--json"])
    scores = json.loads(result.output)
    clip = CLIP(*load_model(models["contrastive"]).require("text", "image"))
    config = DataConfig(path=str(shards), size=16)
    batch = fixed_batch(open_data(config), config, 20)
    different, labels = number(batch.captions)
    with torch.no_grad():
        text = clip.text.features(clip.text.tokenize(different))
        expected = recall(clip.image(batch.image), text, torch.tensor(labels))
    assert scores == {"pictures": 20, "captions": len(different)} | {k: float(v) for k, v in expected.items()}
    whole = CliRunner().invoke(app, words)
    assert f"{'pictures':<26}48" in whole.output and "text_to_image_recall@10" in whole.output
    assert [len(words) for _, words in captioned(str(shards), 16)] == [48]
    with pytest.raises(ValueError, match="has 48 samples"):
        captioned(str(shards), 16, 49)
