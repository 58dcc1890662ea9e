"""The measurements of samplers measure what they say."""

import pytest
import torch

from benchmarks import samplers
from ldm.diffusion.noise import discrete

SD = discrete("scaled_linear", 1000, 0.00085, 0.012)


def test_the_mixtures_denoiser_is_the_mean_of_what_it_may_have_been():
    """Against an average over samples of the data, weighted by how likely each makes x."""
    mixture = samplers.Mixture.ring()
    level = SD.at(400.0)
    data = mixture.sample(200_000)
    x = torch.tensor([[0.4, -0.3], [1.1, 0.2]], dtype=torch.float64)
    away = (x[:, None] - level.alpha * data[None]) / level.sigma
    share = (-away.square().sum(-1) / 2).softmax(1)
    expected = share @ data
    found = mixture.denoise(x.T[None, :, None], level)[0, :, 0].T
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_the_distance_knows_a_shift_and_a_good_sampler_comes_near():
    data = samplers.Mixture.ring().sample(4096)
    assert samplers.distance(data, data) == 0
    shift = torch.tensor([0.3, 0.0], dtype=torch.float64)
    assert samplers.distance(data, data + shift) == pytest.approx(0.3 / 2**0.5, rel=1e-6)  # the mean of cos^2 is 1/2
    near, far = (samplers.distance(samplers.run("dpmpp_2m", steps, "exponential"), data) for steps in (20, 3))
    assert near < 0.1 < far


def test_the_report_names_every_sampler_and_cost():
    found = {name: {b: {s: 0.1 for s in samplers.SPACINGS} for b in samplers.BUDGETS} for name in ("ddim", "heun")}
    text = samplers.report(found, {"ddim": {"ours": 1e-5, "diffusers": 3e-5, "ratio": 3.0}})
    assert "| heun | 0.100 trailing |" in text and "| ddim | 0.010 | 0.030 | 3.0 |" in text


def test_overhead_measures_both():
    for row in samplers.overhead(repeats=2, steps=3).values():
        assert row["ours"] > 0 and row["diffusers"] > 0 and row["ratio"] > 0
