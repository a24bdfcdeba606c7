"""What devices can reach at most, and how much of it a step used.

Peaks are the makers' figures for dense matrix products (no sparsity, boost clock): NVIDIA's data sheets of V100, T4,
A10, A40, A100, L4, L40S, H100, H200, B200 and GB200, the Ampere, Ada and Blackwell architecture white papers for RTX
cards (with float32 accumulation), and AMD's data sheets of MI250X and MI300X. float32 is without TF32, torch's default.

MFU is the model's floating-point operations over the peak's (arXiv:2204.02311, appendix B): recomputation is no model work.
"""

from __future__ import annotations

# A part of the device's name -> dense TFLOP/s in (bfloat16, float32, float64); the first match counts.
PEAKS: dict[str, tuple[float, float, float]] = {
    "GB200": (2500.0, 80.0, 40.0),
    "B200": (2250.0, 75.0, 37.0),
    "GH200": (989.4, 66.9, 33.5),
    "H200 NVL": (835.5, 60.0, 30.0),
    "H200": (989.4, 66.9, 33.5),
    "H100 NVL": (835.5, 60.0, 30.0),
    "H100 PCIe": (756.0, 51.2, 25.6),
    "H100": (989.4, 66.9, 33.5),
    "H800": (989.4, 66.9, 1.0),
    "A100": (312.0, 19.5, 9.7),
    "A800": (312.0, 19.5, 9.7),
    "L40S": (362.0, 91.6, 1.4),
    "L40": (181.0, 90.5, 1.4),
    "L4": (121.0, 30.3, 0.5),
    "A40": (149.7, 37.4, 0.6),
    "A10G": (70.0, 35.0, 0.5),
    "A10": (125.0, 31.2, 0.5),
    "RTX A6000": (154.8, 38.7, 0.6),
    "RTX 5090": (209.5, 104.8, 1.6),
    "RTX 4090": (165.2, 82.6, 1.3),
    "RTX 3090": (71.2, 35.6, 0.6),
    "MI300X": (1307.4, 163.4, 81.7),
    "MI250X": (191.5, 23.9, 23.9),  # one of its two dies, as torch counts devices
}
COLUMNS = {"bfloat16": 0, "float32": 1, "float64": 2}


def peak_flops(device: str, dtype: str) -> float | None:
    """FLOP/s that a device of this name can reach in `dtype` (bfloat16, float32, float64); None when it is not known."""
    for name, peaks in PEAKS.items():
        if name.lower() in device.lower():
            return peaks[COLUMNS[dtype]] * 1e12
    return None


def mfu(tokens_per_second: float | None, *, flops_per_token: float, peak: float | None, devices: int) -> float | None:
    """The part of the devices' peak that the model's operations take; None where rate or peak are not known."""
    return None if peak is None or tokens_per_second is None else tokens_per_second * flops_per_token / (peak * devices)
