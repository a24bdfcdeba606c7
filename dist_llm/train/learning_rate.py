"""The learning rate as a pure function of the step."""

from __future__ import annotations

from math import cos, pi, sqrt

from dist_llm.config.schema import ScheduleConfig


def learning_rate(step: int, schedule: ScheduleConfig, *, peak: float) -> float:
    """The rate of update `step` (0-based): linear warmup to `peak`, then the kind's curve down to `final` x peak.

    constant; linear; cosine (arXiv:1608.03983); wsd: warmup, stable, then a linear decay over the last `decay` part of the steps
    (arXiv:2404.06395); inverse_sqrt: peak x sqrt(warmup / step) (arXiv:1706.03762), not below `final` x peak.
    """
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    floor = schedule.final * peak
    length = max(1, schedule.steps - schedule.warmup)
    progress = min(1.0, (step - schedule.warmup + 1) / length)  # the last step reaches the floor
    match schedule.kind:
        case "constant":
            return peak
        case "linear":
            return peak + (floor - peak) * progress
        case "cosine":
            return floor + (peak - floor) * 0.5 * (1.0 + cos(pi * progress))
        case "wsd":
            decay = min(length, max(1, round(schedule.decay * schedule.steps)))  # steps of the last phase
            fading = min(1.0, max(0.0, (step + 1 - (schedule.steps - decay)) / decay)) if schedule.decay else 0.0
            return peak * (1.0 - fading) + floor * fading
        case "inverse_sqrt":
            return max(floor, peak * sqrt(max(1, schedule.warmup) / (step + 1)))
