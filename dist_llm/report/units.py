"""Numbers and text as people read them: bytes, seconds, rates, differences, and data made safe to show.

Every reader here takes what a JSON file may hold (null, a wrong type, NaN) and answers None or an empty container for it.
"""

from __future__ import annotations

import math
from typing import Any

from dist_llm.errors import plain

MISSING = "–"
BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
COUNT_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: Any) -> float | None:
    """`value` as a float, NaN and infinities included; None where it is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def finite(value: Any) -> float | None:
    """`value` as a finite float, otherwise None."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def mapping(value: Any) -> dict[str, Any]:
    """`value` if it is an object, otherwise an empty one."""
    return value if isinstance(value, dict) else {}


def sequence(value: Any) -> list[Any]:
    """`value` if it is a list, otherwise an empty one."""
    return value if isinstance(value, list) else []


def finite_numbers(value: Any) -> list[float]:
    """The finite numbers of a list, or the one number given instead of a list."""
    return [found for item in (value if isinstance(value, list) else [value]) if (found := finite(item)) is not None]


def shown(value: Any) -> str:
    """Any value as text with control and format characters replaced; line breaks stay, words are never glued or dropped."""
    return "\n".join(" ".join(plain(word) for word in line.split(" ")) for line in str(value).splitlines())


def described(value: Any, *, levels: int = 4) -> str:
    """A string as it is; an object as `key value, key value`; a list joined by commas, `levels` deep; None as the missing mark."""
    if value is None or (isinstance(value, dict | list) and levels == 0):
        return MISSING
    if isinstance(value, dict):
        return ", ".join(f"{shown(key)} {described(item, levels=levels - 1)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(described(item, levels=levels - 1) for item in value)
    return shown(value)


def show_bytes(value: Any) -> str:
    """Bytes in powers of 1024: `1.50 MiB`."""
    size = finite(value)
    if size is None:
        return MISSING
    power = 0
    while abs(size) >= 1024 and power < len(BYTE_UNITS) - 1:
        size, power = size / 1024, power + 1
    return f"{size:.0f} B" if power == 0 else f"{three_digits(size)} {BYTE_UNITS[power]}"


def show_seconds(value: Any) -> str:
    """A duration: `12.3 ms`; from two minutes on `3 min 20 s`, from two hours on `2 h 05 min`."""
    seconds = finite(value)
    if seconds is None:
        return MISSING
    if seconds >= 7200:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    if seconds >= 120:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    for scale, unit in TIME_UNITS:
        if abs(seconds) >= scale:
            return f"{three_digits(seconds / scale)} {unit}"
    return "0 s" if seconds == 0 else f"{seconds:.1e} s"


def show_count(value: Any, unit: str = "") -> str:
    """A count in powers of 1000: `5,210`, `1.23 M`; with `unit` behind it."""
    count = finite(value)
    if count is None:
        return MISSING
    tail = f" {unit}" if unit else ""
    for scale, prefix in COUNT_UNITS:
        if abs(count) >= max(scale, 1e5):
            return f"{three_digits(count / scale)} {prefix}{tail}"
    return f"{count:,.0f}{tail}" if abs(count) >= 100 or count == int(count) else f"{three_digits(count)}{tail}"


def show_difference(value: Any) -> str:
    """A relative difference or tolerance: `0`, `3.1e-14`, `nan`."""
    found = number(value)
    if found is None:
        return MISSING
    if found == 0 or not math.isfinite(found):
        return "0" if found == 0 else str(found)
    mantissa, _, exponent = f"{found:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def show_fraction(value: Any) -> str:
    """A fraction as per cent: `12.5 %`."""
    found = finite(value)
    return MISSING if found is None else f"{100 * found:.1f} %"


def show_number(value: Any) -> str:
    """A plain number with four significant digits."""
    found = finite(value)
    return MISSING if found is None else f"{found:.4g}"


def three_digits(value: float) -> str:
    """Three significant digits without an exponent: `1.50`, `15.0`, `150`, `1500`."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if 0 < abs(value) < 1e5 else f"{value:.3g}"


def byte_ticks(largest: float, most: int = 6) -> tuple[list[float], list[str]]:
    """Round axis ticks in binary units from 0 to past `largest`: (positions in bytes, texts)."""
    power = min(int(math.log2(largest) // 10), len(BYTE_UNITS) - 1) if largest >= 1 else 0
    unit = 1024.0**power
    step = next(step for scale in range(-1, 40) for nice in (1, 2, 5) if (step := nice * 10.0**scale) * most >= largest / unit)
    count = max(1, math.ceil(largest / unit / step))
    return [index * step * unit for index in range(count + 1)], [f"{index * step:.6g} {BYTE_UNITS[power]}" for index in range(count + 1)]
