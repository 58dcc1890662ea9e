"""Samplers: generators that walk a trajectory of noise levels from noise to image, one step each `next`.

The caller owns the loop, and so progress, previews, streaming and cancelling. A sampler knows nothing of
networks: `denoise(x, level)` gives it the estimate of x0, whatever prediction and guidance are behind it.
"""

from dataclasses import dataclass
from functools import partial

from ldm.diffusion.samplers.adaptive import dpm_adaptive
from ldm.diffusion.samplers.base import At, Noise, Sampler, Step
from ldm.diffusion.samplers.multistep import (
    deis,
    dpm_fast,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2m_sde_heun,
    dpmpp_3m,
    dpmpp_3m_sde,
    ipndm,
    lms,
    plms,
)
from ldm.diffusion.samplers.names import ALIASES, canonical
from ldm.diffusion.samplers.onestep import (
    VARIANCES,
    ddim,
    ddpm,
    dpm2,
    dpm2_a,
    dpmpp_2s,
    dpmpp_2s_a,
    dpmpp_sde,
    euler,
    euler_a,
    flow_heun,
    heun,
    lcm,
    tcd,
)
from ldm.diffusion.samplers.restart import restart
from ldm.diffusion.samplers.sa import sa_solver
from ldm.diffusion.samplers.unipc import unipc, unipc_3
from ldm.names import known

__all__ = [
    "ALIASES",
    "SAMPLERS",
    "At",
    "Noise",
    "Sampler",
    "Step",
    "Traits",
    "canonical",
    "ddim",
    "ddpm",
    "euler",
    "heun",
    "plms",
    "sampler",
    "traits",
]

SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "plms": plms,
    "euler": euler,
    "euler_a": euler_a,
    "heun": heun,
    "flow_heun": flow_heun,
    "ipndm": ipndm,
    "lms": lms,
    "deis": deis,
    "dpm_fast": dpm_fast,
    "dpm_adaptive": dpm_adaptive,
    "dpm2": dpm2,
    "dpm2_a": dpm2_a,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_2s_a": dpmpp_2s_a,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_2m_sde_heun": dpmpp_2m_sde_heun,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "unipc": unipc,
    "unipc_3": unipc_3,
    "lcm": lcm,
    "tcd": tcd,
    "restart": restart,
    "sa_solver": sa_solver,
}

STOCHASTIC = (
    "ddpm", "euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde",
    "lcm", "tcd", "restart", "sa_solver",
)  # fmt: skip
BETWEEN = ("dpm_adaptive", "dpm2", "dpm2_a", "dpmpp_2s", "dpmpp_2s_a", "dpmpp_sde", "tcd", "restart")
TWICE = ("heun", "flow_heun", "dpm2", "dpm2_a", "dpmpp_2s", "dpmpp_2s_a", "dpmpp_sde", "restart")
ADAPTIVE = ("dpm_adaptive",)
ORDERS = {
    "plms": 2, "heun": 2, "flow_heun": 2, "ipndm": 2, "lms": 4, "deis": 3, "dpm2": 2, "dpmpp_2s": 2,
    "dpm_fast": 3, "dpm_adaptive": 3, "dpmpp_2m": 2, "dpmpp_3m": 3, "unipc": 3, "unipc_3": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Traits:
    """What a caller may want to know of a sampler beforehand.

    order: of its ODE method once started; 1 for those that draw noise, whose order is another matter.
    """

    order: int
    stochastic: bool  # needs `noise`
    between: bool  # needs `at`
    evaluations: int  # of the network in an inner step; 0 is as many as it takes


def traits(name: str) -> Traits:
    """The traits of a sampler, by any of its names. Raises ValueError for an unknown one."""
    name, _ = canonical(name)
    evaluations = 0 if name in ADAPTIVE else 2 if name in TWICE else 1
    return Traits(ORDERS.get(name, 1), name in STOCHASTIC, name in BETWEEN, evaluations)


def sampler(name: str, *, eta: float = 0.0, variance: str | None = None) -> Sampler:
    """The sampler of that name, as `canonical` knows it. Raises ValueError for an option that is not its own.

    eta: in [0, 1], for ddim.  variance: small | large | learned, for ddpm.
    """
    ours, _ = canonical(name)
    if variance is not None:
        known("variance of ddpm", variance, VARIANCES)
        if ours != "ddpm":
            raise ValueError(f"variance ({', '.join(VARIANCES)}) is for sampler 'ddpm' alone, not for {name!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in 0..1, got {eta}")
    if eta == 0:
        return SAMPLERS[ours] if variance is None else partial(ddpm, variance=variance)
    if ours != "ddim":
        raise ValueError(f"eta is for sampler 'ddim' alone; with {name!r} it must be 0, got {eta}")
    return partial(ddim, eta=eta)
