"""The most arithmetic that a GPU can do, by its name."""

import re

import torch

PEAKS: tuple[tuple[str, float, float, float], ...] = (
    ("B200", 2250, 1125, 75),
    ("(GH200|H200|H100)( 80GB HBM3| [0-9]+GB)?", 989, 494, 67),
    ("(H100|H200) NVL", 835, 417, 60),
    ("H100 PCIe", 756, 378, 51),
    ("A100[- ].*", 312, 156, 19.5),
    ("A40", 149.7, 74.8, 37.4),
    ("A30", 165, 82, 10.3),
    ("A10", 125, 62.5, 31.2),
    ("L40S", 362, 183, 91.6),
    ("L40", 181, 90.5, 90.5),
    ("L4", 121, 60, 30.3),
    ("GeForce RTX 5090", 209.5, 104.8, 104.8),
    ("GeForce RTX 4090", 165.2, 82.6, 82.6),
    ("GeForce RTX 3090", 71, 35.6, 35.6),
    ("RTX A6000", 154.8, 77.4, 38.7),
    ("V100-SXM2-.*", 125, 15.7, 15.7),
    ("T4", 65, 8.1, 8.1),
)
"""Device names, after "NVIDIA" or "Tesla" -> TFLOP/s of dense matrix products in 16-bit types with float32 sums, in
TF32 and in float32, from NVIDIA's data sheets and architecture white papers. Slices of a GPU (MIG) are none."""


def peak_flops(device: torch.device, precision: str, *, tf32: bool) -> float | None:
    """The most FLOP/s that a device can do in a run's arithmetic, from its name; None if that is not known.

    tf32: whether matrix products of float32 are done in TF32; convolutions are, unless torch was told otherwise.
    """
    if device.type != "cuda":
        return None
    name = re.sub("^(NVIDIA|Tesla) ", "", torch.cuda.get_device_name(device))
    for pattern, half, tensor_float, single in PEAKS:
        if re.fullmatch(pattern, name):
            full = tensor_float if tf32 or torch.backends.cudnn.allow_tf32 else single
            return 1e12 * (full if precision == "no" else half)
    return None
