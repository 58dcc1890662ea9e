"""The names people type."""

import pytest

from ldm.diffusion.noise import SPACINGS
from ldm.diffusion.samplers import ALIASES, SAMPLERS, canonical, sampler
from ldm.diffusion.samplers.names import SPACING_NAMES

TYPED = {
    "DPM++ 2M Karras": ("dpmpp_2m", "karras"),
    "DPM++ 2M": ("dpmpp_2m", None),
    "dpmpp_2m": ("dpmpp_2m", None),
    "k_dpmpp_2m_ka": ("dpmpp_2m", "karras"),
    "Euler a": ("euler_a", None),
    "Euler": ("euler", None),
    "k_euler_a": ("euler_a", None),
    "k_euler_ancestral": ("euler_a", None),
    "sample_euler": ("euler", None),
    "Heun": ("heun", None),
    "DPM2": ("dpm2", None),
    "k_dpm_2": ("dpm2", None),
    "DPM2 a Karras": ("dpm2_a", "karras"),
    "DPM++ 2S a": ("dpmpp_2s_a", None),
    "DPM++ SDE Karras": ("dpmpp_sde", "karras"),
    "DPM++ 2M SDE": ("dpmpp_2m_sde", None),
    "DPM++ 2M SDE Heun Exponential": ("dpmpp_2m_sde_heun", "exponential"),
    "DPM++ 3M SDE Exponential": ("dpmpp_3m_sde", "exponential"),
    "DPM++ 3M SDE Polyexponential": ("dpmpp_3m_sde", "polyexponential"),
    "UniPC": ("unipc", None),
    "LMS Karras": ("lms", "karras"),
    "DDIM": ("ddim", None),
    "DDIM Uniform": ("ddim", None),
    "Euler DDIM": ("euler", "leading"),
    "PLMS": ("plms", None),
    "PNDMScheduler": ("plms", None),
    "LCM": ("lcm", None),
    "LCM SGM Uniform": ("lcm", "sgm_uniform"),
    "Euler Simple": ("euler", "trailing"),
    "Euler KL Optimal": ("euler", "kl_optimal"),
    "DPM++ 2M Align Your Steps": ("dpmpp_2m", "ays"),
    "Euler Beta": ("euler", "beta"),
    "Euler a Automatic": ("euler_a", None),
    "TCD": ("tcd", None),
    "DPM fast": ("dpm_fast", None),
    "DPM adaptive": ("dpm_adaptive", None),
    "k_dpm_ad": ("dpm_adaptive", None),
    "k_dpm_adaptive": ("dpm_adaptive", None),
    "sample_dpm_adaptive": ("dpm_adaptive", None),
    "DPM adaptive Karras": ("dpm_adaptive", "karras"),
    "Restart": ("restart", None),
    "SASolverScheduler": ("sa_solver", None),
    "EulerAncestralDiscreteScheduler": ("euler_a", None),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", None),
    "UniPCMultistepScheduler": ("unipc", None),
    "FlowMatchEulerDiscreteScheduler": ("euler", None),
}


@pytest.mark.parametrize("name", TYPED)
def test_names_as_people_type_them(name):
    assert canonical(name) == TYPED[name]
    assert canonical(name.upper()) == canonical(name.replace(" ", "_")) == TYPED[name]
    assert sampler(name) is SAMPLERS[TYPED[name][0]]


def test_every_sampler_has_its_own_name_and_every_alias_a_sampler():
    assert all(canonical(name) == (name, None) for name in SAMPLERS)
    assert set(ALIASES.values()) == set(SAMPLERS)
    assert {spacing for spacing in SPACING_NAMES.values() if spacing} <= set(SPACINGS)


def test_eta_goes_by_every_name_of_ddim_and_variance_by_those_of_ddpm():
    assert sampler("DDIM", eta=0.5).keywords == {"eta": 0.5}
    assert sampler("DDPMScheduler", variance="large").keywords == {"variance": "large"}


@pytest.mark.parametrize(
    ("name", "near"),
    [("DPM++ 2N", "dpmpp_2"), ("Eular a", "euler_a"), ("dimm", "ddim"), ("plsm", "plms"), ("unipcc", "unipc")],
)
def test_an_unknown_name_gets_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"unknown sampler '.*', did you mean '{near}"):
        canonical(name)


@pytest.mark.parametrize("name", ["", "Karras", "zzz", "DPM++ 2M Caras"])
def test_no_name_is_guessed(name):
    with pytest.raises(ValueError, match="unknown sampler"):
        sampler(name)
