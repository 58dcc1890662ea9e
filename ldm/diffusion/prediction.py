"""What a network predicts. A prediction type IS a pair (a, b): the network's output is a * x0 + b * eps.

    eps  (0, 1)           Ho et al. 2020, eq. 14
    x0   (1, 0)
    v    (-sigma, alpha)  Salimans & Ho 2022, section 4
    flow (-1, 1)          Liu et al. 2023, eq. 1: the slope of the straight line from data to noise

With x = alpha * x0 + sigma * eps that makes two equations for two unknowns, solved once here for every type.
Their determinant, alpha * b - sigma * a, is 1 for v (and for flow on a flow schedule): those two work at both
ends, alpha = 0 and sigma = 0.
"""

from torch import Tensor

from ldm.diffusion.noise import NoiseLevel
from ldm.names import known

PREDICTIONS = ("eps", "x0", "v", "flow")


def coefficients(prediction: str, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """The pair (a, b), each with the shape of `level`. Raises ValueError for an unknown prediction."""
    known("prediction", prediction, PREDICTIONS)
    zero, one = level.alpha.new_zeros(()), level.alpha.new_ones(())
    return {
        "eps": (zero, one),
        "x0": (one, zero),
        "v": (-level.sigma, level.alpha),
        "flow": (-one, one),
    }[prediction]


def determinant(prediction: str, level: NoiseLevel) -> Tensor:
    """alpha * b - sigma * a: an error of the output moves x0 by sigma / det and eps by alpha / det."""
    a, b = coefficients(prediction, level)
    return level.alpha * b - level.sigma * a


def target(prediction: str, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """What the network should have said: x0, eps [B, C, H, W], level scalar or [B] -> [B, C, H, W]."""
    a, b = coefficients(prediction, level.like(x0))
    return a * x0 + b * eps


def to_x0(prediction: str, output: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """The clean signal that `output` means at x; all [B, C, H, W], level scalar or [B].

    Not finite where the type does not determine it: eps at alpha = 0.
    """
    if prediction == "x0":  # already solved, also where the system is singular (sigma = 0)
        return output
    level = level.like(x)
    _, b = coefficients(prediction, level)
    return (b * x - level.sigma * output) / determinant(prediction, level)


def to_eps(prediction: str, output: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """The noise that `output` means at x; all [B, C, H, W], level scalar or [B].

    Not finite where the type does not determine it: x0 at sigma = 0.
    """
    if prediction == "eps":  # already solved, also where the system is singular (alpha = 0)
        return output
    level = level.like(x)
    a, _ = coefficients(prediction, level)
    return (level.alpha * output - a * x) / determinant(prediction, level)
