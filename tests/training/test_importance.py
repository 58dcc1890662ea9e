"""Importance sampling of noise levels: what is drawn, that the loss stays what it is, and that nothing else matters."""

import pytest
import torch

from ldm.training.importance import BUCKETS, WARM_UP, LossSecondMoment

QUANTILES = (torch.arange(BUCKETS, dtype=torch.float64) + 0.5) / BUCKETS


def loss_at(quantiles):
    return (1 + 20 * quantiles**3).float()


def learned(steps=WARM_UP):
    sampler = LossSecondMoment()
    for step in range(steps):
        sampler.draw(QUANTILES, step)
        sampler.learn(QUANTILES, loss_at(QUANTILES))
    return sampler


def test_uniform_until_every_level_is_known():
    sampler = learned(WARM_UP - 1)
    quantiles, weights = sampler.draw(QUANTILES, WARM_UP)
    assert torch.equal(quantiles, QUANTILES) and torch.equal(weights, torch.ones_like(weights))


def test_draws_in_proportion_to_the_loss_and_keeps_its_mean():
    """A fine grid of uniform numbers: shares of the buckets, and the weighted mean, without chance."""
    sampler = learned()
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    quantiles, weights = sampler.draw(grid, WARM_UP)
    drawn = torch.bincount((quantiles * BUCKETS).long(), minlength=BUCKETS) / len(grid)
    expected = 0.999 * loss_at(QUANTILES) / loss_at(QUANTILES).sum() + 0.001 / BUCKETS
    assert (drawn - expected).abs().max() < 1e-4
    assert (weights * loss_at(quantiles)).mean().item() == pytest.approx(loss_at(grid).mean().item(), rel=1e-4)
    assert (weights * loss_at(quantiles)).var() < 0.01 * loss_at(grid).var()


def test_micro_batches_make_no_difference():
    whole, split = learned(), learned()
    whole.draw(QUANTILES, WARM_UP), whole.learn(QUANTILES, 3 * loss_at(QUANTILES))
    for part in QUANTILES.chunk(4):
        drawn, _ = split.draw(part, WARM_UP)
        assert torch.equal(drawn, whole.draw(part, WARM_UP)[0])  # still by what was known before this step
        split.learn(part, 3 * loss_at(part))
    for a, b in zip(whole.draw(QUANTILES, WARM_UP + 1), split.draw(QUANTILES, WARM_UP + 1), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(whole.moment, learned().moment)


def test_new_losses_replace_old_ones_slowly():
    sampler = learned()
    for step in range(WARM_UP, WARM_UP + 60):
        sampler.draw(QUANTILES, step)
        sampler.learn(QUANTILES, torch.full((BUCKETS,), 2.0))
    sampler.draw(QUANTILES, WARM_UP + 60)
    # 0.9^60 = 0.002 of the old is left
    assert torch.allclose(sampler.moment, 4 + (loss_at(QUANTILES).double().square() - 4) * 0.9**60, rtol=0.05)


def test_its_buffers_are_all_its_state():
    sampler, copy = learned(), LossSecondMoment()
    copy.load_state_dict(sampler.state_dict())
    for a, b in zip(sampler.draw(QUANTILES, 99), copy.draw(QUANTILES, 99), strict=True):
        assert torch.equal(a, b)
