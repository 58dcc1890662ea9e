"""The names people type for samplers, in the words of k-diffusion, AUTOMATIC1111, ComfyUI and diffusers."""

import re
from difflib import get_close_matches

ALIASES: dict[str, str] = {
    "ddim": "ddim",
    "ddimuniform": "ddim",
    "ddpm": "ddpm",
    "plms": "plms",
    "pndm": "plms",
    "euler": "euler",
    "eulerdiscrete": "euler",
    "floweuler": "euler",
    "flowmatcheuler": "euler",
    "flowmatcheulerdiscrete": "euler",
    "eulera": "euler_a",
    "eulerancestral": "euler_a",
    "eulerancestraldiscrete": "euler_a",
    "heun": "heun",
    "heundiscrete": "heun",
    "flowheun": "flow_heun",
    "flowmatchheun": "flow_heun",
    "flowmatchheundiscrete": "flow_heun",
    "ipndm": "ipndm",
    "lms": "lms",
    "lmsdiscrete": "lms",
    "deis": "deis",
    "deismultistep": "deis",
    "dpmfast": "dpm_fast",
    "dpmad": "dpm_adaptive",
    "dpmadaptive": "dpm_adaptive",
    "dpm2": "dpm2",
    "kdpm2discrete": "dpm2",
    "dpm2a": "dpm2_a",
    "dpm2ancestral": "dpm2_a",
    "kdpm2ancestraldiscrete": "dpm2_a",
    "dpmpp2s": "dpmpp_2s",
    "dpmsolversinglestep": "dpmpp_2s",
    "dpmpp2sa": "dpmpp_2s_a",
    "dpmpp2sancestral": "dpmpp_2s_a",
    "dpmpp2m": "dpmpp_2m",
    "dpmsolvermultistep": "dpmpp_2m",
    "dpmpp3m": "dpmpp_3m",
    "dpmppsde": "dpmpp_sde",
    "dpmsolversde": "dpmpp_sde",
    "dpmpp2msde": "dpmpp_2m_sde",
    "dpmpp2msdeheun": "dpmpp_2m_sde_heun",
    "dpmpp3msde": "dpmpp_3m_sde",
    "unipc": "unipc",
    "unipcbh2": "unipc",
    "unipcmultistep": "unipc",
    "unipc2": "unipc",
    "unipc3": "unipc_3",
    "lcm": "lcm",
    "tcd": "tcd",
    "restart": "restart",
    "sasolver": "sa_solver",
}
"""What is typed, small letters and digits alone, "++" as "pp" -> our name."""

SPACING_NAMES: dict[str, str | None] = {
    "automatic": None,
    "karras": "karras",
    "ka": "karras",
    "exponential": "exponential",
    "exp": "exponential",
    "polyexponential": "polyexponential",
    "sgmuniform": "sgm_uniform",
    "kloptimal": "kl_optimal",
    "alignyoursteps": "ays",
    "ays": "ays",
    "beta": "beta",
    "uniform": "linspace",
    "normal": "linspace",
    "simple": "trailing",
    "ddim": "leading",
    "ddimuniform": "leading",
    "trailing": "trailing",
    "leading": "leading",
    "linspace": "linspace",
}
"""What may follow a sampler's name ("DPM++ 2M Karras") -> our spacing, None for the model's own."""


PLUS_PLUS = "cfgpp"


def canonical(name: str) -> tuple[str, str | None]:
    """(our name of the sampler, our name of the spacing or None) of a name as people type it.

    Case, spaces and punctuation do not count; a leading "k_" or "sample_" and a trailing "Scheduler" are dropped.
    Raises ValueError with the nearest name for one that is unknown.
    """
    key = _key(name).removesuffix(PLUS_PLUS)
    if key in ALIASES:
        return ALIASES[key], None
    for words in sorted(SPACING_NAMES, key=len, reverse=True):
        rest = key.removesuffix(words)
        if rest != key and rest in ALIASES:
            return ALIASES[rest], SPACING_NAMES[words]
    near = get_close_matches(key, ALIASES, n=1)
    hint = f", did you mean {ALIASES[near[0]]!r}?" if near else ";"
    raise ValueError(f"unknown sampler {name!r}{hint} known: {', '.join(sorted(set(ALIASES.values())))}")


def says_plus_plus(name: str) -> bool:
    """Whether a name ends as in "DDIM CFG++": the sampler with the guidance of CFG++, which is the caller's affair."""
    return _key(name).endswith(PLUS_PLUS)


def _key(name: str) -> str:
    key = name.lower().replace("++", "pp").strip()
    key = re.sub(r"^(k|sample)[_ -]", "", key)
    return re.sub(r"[^a-z0-9]", "", key).removesuffix("scheduler")
