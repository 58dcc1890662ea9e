"""The noise schedule in diffusers' words."""

from collections.abc import Mapping
from typing import Any

SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
KARRAS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
FLOW = "FlowMatchEulerDiscreteScheduler"
DYNAMIC = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "time_shift_type": "exponential",
}
"""How a dynamic shift depends on the size, the only one that is known here."""


DEFAULT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def from_diffusers(words: Mapping[str, Any] | None, source: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(settings of the diffusion, notes) from a scheduler_config.json; None where there is no such file.

    Raises ValueError for an unknown schedule.
    """
    notes = []
    if words is None:
        words = DEFAULT | {"set_alpha_to_one": False}
        notes.append(f"there is no {source}: Stable Diffusion's noise schedule, predicting eps, is the rule")
    dynamic = {key: words.get(key, usual) for key, usual in DYNAMIC.items()}
    if {"sigma_data", "sigma_min"} & words.keys() or (words.get("use_dynamic_shifting") and dynamic != DYNAMIC):
        raise ValueError(f"{source}: the noise of {words.get('_class_name', 'this scheduler')} is not known here")
    if str(words.get("_class_name", "")).startswith("FlowMatch"):
        shift = {"shift": words.get("shift", 1.0), "dynamic_shift": bool(words.get("use_dynamic_shifting"))}
        return {"schedule": "flow", "prediction": "flow", "spacing": "trailing", **shift}, ()
    schedule, predicts = words.get("beta_schedule", "linear"), words.get("prediction_type", "epsilon")
    if schedule not in SCHEDULES or predicts not in PREDICTIONS or words.get("trained_betas") is not None:
        raise ValueError(f"{source}: beta_schedule {schedule!r} with prediction_type {predicts!r} is not known here")
    spacing = words.get("timestep_spacing", "leading")
    if spacing == "leading" and (words.get("steps_offset", 0) != 1 or words.get("set_alpha_to_one", True)):
        notes.append("sampling steps start at offset 1 and end at the first noise level, as Stable Diffusion's do")
    for key, ours in KARRAS.items():
        spacing = ours if words.get(key) else spacing
    if words.get("thresholding") or (words.get("clip_sample") and schedule == "linear"):
        notes.append("its own sampler clips the estimate of the picture; that is not done here")
    return {
        "schedule": SCHEDULES[schedule],
        "train_steps": words.get("num_train_timesteps", 1000),
        "beta_start": words.get("beta_start", 1e-4),
        "beta_end": words.get("beta_end", 0.02),
        "prediction": PREDICTIONS[predicts],
        "spacing": spacing,
        "zero_snr": words.get("rescale_betas_zero_snr", False),
    }, tuple(notes)


def class_of(diffusion: Mapping[str, Any]) -> str:
    """The library's class for this diffusion."""
    return FLOW if diffusion["schedule"] == "flow" else "DDIMScheduler"


def to_diffusers(diffusion: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler_config.json. Raises ValueError for a pair that diffusers has no words for."""
    schedules = {ours: theirs for theirs, ours in SCHEDULES.items()}
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if diffusion["schedule"] == "flow":
        if diffusion["prediction"] != "flow":
            raise ValueError(f"diffusers knows flow schedules with prediction flow, not {diffusion['prediction']}")
        dynamic = {"use_dynamic_shifting": True, **DYNAMIC} if diffusion.get("dynamic_shift") else {}
        return {"_class_name": FLOW, "num_train_timesteps": 1000, "shift": diffusion.get("shift", 1.0), **dynamic}
    if diffusion["schedule"] not in schedules:
        raise ValueError(
            f"diffusers knows noise schedules {', '.join(schedules)} and flow, not {diffusion['schedule']}"
        )
    if diffusion["prediction"] not in predictions:
        raise ValueError(f"diffusers knows predictions {', '.join(predictions)}, not {diffusion['prediction']}")
    spacing = diffusion.get("spacing", "trailing")
    return {
        "_class_name": class_of(diffusion),
        "num_train_timesteps": diffusion.get("train_steps", 1000),
        "beta_schedule": schedules[diffusion["schedule"]],
        "beta_start": diffusion.get("beta_start", 0.00085),
        "beta_end": diffusion.get("beta_end", 0.012),
        "prediction_type": predictions[diffusion["prediction"]],
        "timestep_spacing": spacing if spacing in ("leading", "trailing", "linspace") else "trailing",
        "steps_offset": 1 if spacing == "leading" else 0,
        "set_alpha_to_one": spacing != "leading",
        "clip_sample": False,
        "rescale_betas_zero_snr": diffusion.get("zero_snr", False),
    }
