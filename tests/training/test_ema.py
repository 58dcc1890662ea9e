"""Every average follows its profile, several at once, and resumes with the run."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.checkpoints.files import newest_valid, read_tensors
from ldm.training.ema import EMA, decay_prefix, gamma, sigma_prefix
from ldm.training.run import run
from tests.conftest import tiny_config

VALUES = [3.0, -1.0, 5.0, 2.5, 0.5, -4.0]


def followed(values: list[float], **kinds: tuple[float, ...]) -> EMA:
    """The averages of one weight that starts at 2 and takes those values."""
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(2.0)
    ema = EMA(module, 0.15, **kinds)  # type: ignore[arg-type]
    for n, value in enumerate(values):
        module.weight.data.fill_(value)
        ema.update(n)
    return ema


def test_several_decays_at_once_are_each_its_own() -> None:
    ema = followed(VALUES, decays=(0.0, 0.9))
    for prefix, limit in (("", 0.15), (decay_prefix(0.0), 0.0), (decay_prefix(0.9), 0.9)):
        expected = 2.0
        for n, value in enumerate(VALUES):
            decay = min(limit, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * value
        assert ema.under(prefix)["weight"].item() == pytest.approx(expected, rel=1e-5)
    assert list(ema.average) == ["weight", "decay=0.0/weight", "decay=0.9/weight"]


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.25])
def test_a_power_function_weighs_what_its_integral_says(sigma: float) -> None:
    """tau^g over step k, from k - 1 to k of t: (k^(g+1) - (k-1)^(g+1)) / t^(g+1); where it started counts nothing."""
    ema, exponent, t = followed(VALUES, sigmas=(sigma,)), gamma(sigma), len(VALUES)
    weights = [((k + 1) ** (exponent + 1) - k ** (exponent + 1)) / t ** (exponent + 1) for k in range(t)]
    expected = sum(w * v for w, v in zip(weights, VALUES, strict=True))
    assert ema.under(sigma_prefix(sigma))["weight"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.1, 0.25, 0.2886])
def test_gamma_gives_the_width_it_is_named_by(sigma: float) -> None:
    """The standard deviation of the density (g + 1) tau^g on [0, 1], from its moments; 0.05 and 0.1 as in the paper."""
    g = gamma(sigma)
    mean, square = (g + 1) / (g + 2), (g + 1) / (g + 3)
    assert (square - mean**2) ** 0.5 == pytest.approx(sigma, rel=1e-6)
    assert [gamma(0.05), gamma(0.1)] == pytest.approx([16.97, 6.94], abs=0.005)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(decay=1.0), r"in \[0, 1\), not 1.0"),
        (dict(decay=0.9, decays=(0.5, -0.1)), "not -0.1"),
        (dict(decay=0.9, sigmas=(0.3,)), "below 0.2887, not 0.3"),
        (dict(decay=0.9, sigmas=(0.0,)), "above 0"),
    ],
)
def test_what_no_average_can_be_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMA(nn.Linear(1, 1), **arguments)  # type: ignore[arg-type]


def test_half_precision_weights_are_averaged_in_float32() -> None:
    module = nn.Linear(1, 1, bias=False).bfloat16()
    module.weight.data.fill_(1.0)
    ema = EMA(module, 0.9999)
    for n in range(3):
        module.weight.data.fill_(1.0078125)  # the next bfloat16, of which an average in it would see nothing
        ema.update(100_000 + n)
    assert ema.average["weight"].dtype == torch.float32
    assert ema.average["weight"].item() == pytest.approx(1 + 0.0078125 * (1 - 0.9999**3), abs=3e-7)
    with ema.applied():
        assert module.weight.dtype == torch.bfloat16
    assert module.weight.item() == 1.0078125


def test_a_checkpoint_keeps_them_all(shards: Path, tmp_path: Path) -> None:
    run(tiny_config("autoencoder", tmp_path / "out", shards, "ema_decays=[0.1]", "snapshot_steps=3"))
    folder = newest_valid(tmp_path / "out" / "checkpoints")
    assert folder is not None
    kept, _ = read_tensors(folder / "train" / "averages.safetensors")
    model, _ = read_tensors(folder / "autoencoder.safetensors")
    for prefix in ("", "decay=0.1/", "sigma=0.05/", "sigma=0.1/"):
        average = kept[f"autoencoder.{prefix}encoder.conv_in.weight"]
        assert torch.equal(average, model["encoder.conv_in.weight"]) == (not prefix)
    assert sorted(p.name for p in (tmp_path / "out" / "snapshots").iterdir()) == ["step-00000003", "step-00000004"]


def test_without_asking_there_is_one(shards: Path, tmp_path: Path) -> None:
    state = run(tiny_config("autoencoder", tmp_path / "out", shards))
    names = [n for n, p in state.task.autoencoder.named_parameters() if p.requires_grad]
    assert list(state.emas["autoencoder"].average) == names
    assert not (tmp_path / "out" / "snapshots").exists()
