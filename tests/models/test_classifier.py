"""The noisy classifier: its pooling, its gradient, and which class a caption names."""

import pytest
import torch

from ldm.models.classifier import AttentionPool, NoisyClassifier, NoisyClassifierConfig, find_class, log_prob
from ldm.nn.embeddings import position_embedding

SHAPES = ("circle", "square", "triangle")
CONFIG = NoisyClassifierConfig(
    classes=SHAPES, in_channels=2, channels=16, multipliers=(1, 2), blocks=1, depths=(0, 1), head_dim=8, norm_groups=4
)


def classifier() -> NoisyClassifier:
    torch.manual_seed(0)
    model = NoisyClassifier(CONFIG).eval().requires_grad_(False)
    for parameter in model.parameters():  # the zero-initialised layers would hide everything else
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double()


def test_default_is_the_classifier_of_guided_diffusion_for_64_px() -> None:
    """Dhariwal and Nichol 2021, table 12: 128 channels, 2 blocks, attention at 32, 16 and 8 px, heads of 64."""
    with torch.device("meta"):
        model = NoisyClassifier(NoisyClassifierConfig(classes=("a", "b"), in_channels=3))
    assert model.encoder.skip_widths[-1] == 512 and model.factor == 8
    attended = [[layer.attention is not None for layer in level.layers] for level in model.encoder.down]
    assert attended == [[False, False], [True, True], [True, True], [True, True]]
    assert {a.attention.heads for a in model.encoder.down[3].layers} == {8} and model.pool.attention.heads == 8


def test_pooling_against_its_formula() -> None:
    torch.manual_seed(0)
    pool, x = AttentionPool(8, heads=2).double(), torch.randn(3, 8, 2, 5, dtype=torch.float64)
    a, mean = pool.attention, x.flatten(2).mean(2)
    placed = (x + position_embedding(2, 5, 8)).flatten(2).transpose(1, 2)
    tokens = torch.cat([mean[:, None], placed], dim=1)  # the mean is asked too, and has no place
    parts = []
    for head in (slice(0, 4), slice(4, 8)):
        q, k, v = mean @ a.to_q.weight[head].T, tokens @ a.to_k.weight[head].T, tokens @ a.to_v.weight[head].T
        weights = (torch.einsum("bd,bsd->bs", q, k) / 2).exp()
        parts.append(torch.einsum("bs,bsd->bd", weights / weights.sum(1, keepdim=True), v))
    expected = torch.cat(parts, dim=1) @ a.to_out.weight.T + a.to_out.bias
    torch.testing.assert_close(pool(x), expected)


def test_it_sees_the_time_and_where_things_are() -> None:
    model, t = classifier(), torch.tensor([10.0, 900.0])
    x = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    x[:, :, 2:4, 2:4] = 1.0
    logits = model(x.expand(2, -1, -1, -1), t)
    assert logits.shape == (2, 3) and (logits[0] - logits[1]).abs().max() > 1e-3
    assert (model(x.transpose(2, 3).roll(4, 3), t[:1]) - logits[:1]).abs().max() > 1e-3
    assert model(torch.zeros(1, 2, 4, 12, dtype=torch.float64), t[:1]).shape == (1, 3)  # any size


def test_log_prob_is_a_probability_of_the_class_asked_for() -> None:
    model, x, t = classifier(), torch.randn(3, 2, 8, 8, dtype=torch.float64), torch.tensor([1.0, 500.0, 999.0])
    each = torch.stack([log_prob(model, [name])(x, t) for name in SHAPES], dim=1)  # one name for all images
    torch.testing.assert_close(each.exp().sum(1), torch.ones(3, dtype=torch.float64))
    logits = model(x, t)
    torch.testing.assert_close(each[:, 0] - each[:, 2], logits[:, 0] - logits[:, 2])
    asked = log_prob(model, ["square", "circle", "square"])(x, t)
    torch.testing.assert_close(asked, each[torch.arange(3), torch.tensor([1, 0, 1])])
    with pytest.raises(ValueError, match=r"unknown class 'squares', did you mean 'square'.*circle, square, triangle"):
        log_prob(model, ["squares"])
    with pytest.raises(IndexError):
        log_prob(model, ["square", "circle"])(x, t)


def test_gradient_by_finite_differences() -> None:
    model, t = classifier(), torch.tensor([30.0, 700.0])
    torch.manual_seed(1)
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():  # where a pipeline may make it
        score = log_prob(model, ["triangle", "circle"])
    (gradient,) = torch.autograd.grad(score(x, t).sum(), x)
    assert gradient.abs().amax((1, 2, 3)).min() > 1e-4
    for _ in range(5):
        direction, h = torch.randn_like(x), 1e-5
        with torch.no_grad():
            slope = (score(x + h * direction, t) - score(x - h * direction, t)) / (2 * h)
        torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("a small red circle", "circle"),
        ("a Square, above a circle", "square"),
        ("CIRCLE", "circle"),
        ("a triangle", "triangle"),
        ("circles and triangles", None),  # other words
        ("a semicircle, a circle_ and a circle2", None),
        ("a semi-circle", "circle"),  # a hyphen parts words
        ("", None),
        ("a photo", None),
        ("a black cat", "black cat"),
        ("a black  \n cat", "black cat"),
        ("a black dog", "black"),
        ("a cat, black", "cat"),
        ("a blackcat", None),
        ("vitamin c++!", "c++"),  # no pattern language
        ("vitamin ccc", None),
        ("un café noir", "café"),
        ("un CAFÉ noir", "café"),
        ("un cafés", None),
    ],
)
def test_class_that_a_caption_names(caption: str, name: str | None) -> None:
    classes = (*SHAPES, "black", "cat", "black cat", "c++", "café")
    for order in (classes, classes[::-1]):
        found = find_class(caption, order)
        assert (None if found is None else order[found]) == name


@pytest.mark.parametrize("classes", [(), ("circle",), ("circle", "Circle"), ("a b", "a  b"), ("circle", " ", "square")])
def test_classes_that_make_no_sense(classes: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="two or more different classes"):
        NoisyClassifier(NoisyClassifierConfig(classes=classes))
