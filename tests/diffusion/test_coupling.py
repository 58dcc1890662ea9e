"""Dealing noise to pictures: the least distance, nothing lost, nothing of others where it is promised."""

import itertools

import pytest
import torch

from ldm.diffusion.coupling import nearest, optimal_transport
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.types import Conditioning


def drawn(seed, *shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_optimal_transport_is_the_best_of_all_permutations():
    x0, noise = drawn(0, 5, 2, 2, 2), drawn(1, 5, 2, 2, 2)

    def cost(rows):
        return (x0 - noise[list(rows)]).square().sum().item()

    dealt = optimal_transport(x0, noise)
    assert sorted(map(tuple, dealt.flatten(1).tolist())) == sorted(map(tuple, noise.flatten(1).tolist()))
    best = min(map(cost, itertools.permutations(range(5))))
    assert (x0 - dealt).square().sum().item() == pytest.approx(best)
    assert best < cost(range(5))


def test_nearest_takes_the_nearest_of_each():
    x0, draws = drawn(0, 6, 1, 3, 3), drawn(1, 4, 6, 1, 3, 3)
    chosen = nearest(x0, lambda k: draws[k], 4)
    for row in range(6):
        distances = (draws[:, row] - x0[row]).flatten(1).square().sum(1)
        assert torch.equal(chosen[row], draws[distances.argmin(), row])
    assert torch.equal(nearest(x0, lambda k: draws[k], 1), draws[0])


@pytest.mark.parametrize("coupling", ["optimal_transport", "nearest"])
def test_training_uses_the_noise_that_was_dealt(coupling):
    diffusion = Diffusion.from_config(DiffusionConfig(schedule="flow", prediction="flow", coupling=coupling))
    x0, noise, others = drawn(0, 5, 1, 2, 2), drawn(1, 5, 1, 2, 2), drawn(2, 9, 5, 1, 2, 2)
    seen = []

    def network(x, t, cond):
        seen.append((x, t))
        return torch.zeros_like(x)

    u = torch.full((5,), 0.5, dtype=torch.float64)
    names = {f"noise {k}": others[k] for k in range(1, 4)}
    loss = diffusion.loss(network, x0, Conditioning(), noise=noise, u=u, more=lambda name, shape: names[name])
    draws = [noise, *names.values()]
    dealt = optimal_transport(x0, noise) if coupling != "nearest" else nearest(x0, lambda k: draws[k], 4)
    assert torch.allclose(seen[0][0], (x0 + dealt) / 2)
    assert torch.allclose(loss, (dealt - x0).square().flatten(1).mean(1))


def test_unknown_couplings_are_refused():
    with pytest.raises(ValueError, match="unknown coupling 'nearst', did you mean 'nearest'"):
        Diffusion.from_config(DiffusionConfig(coupling="nearst"))
