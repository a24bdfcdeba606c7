"""A layout as text, and made concrete for a number of ranks: `dp=2,tp=2,zero=1` on 4 ranks. Torch-free.

Rank order: tp fastest, then cp, dp, pp. world = dp x cp x tp x pp.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

from dist_llm.config.schema import LARGEST, EngineName, LayoutConfig, Offload, ScheduleName, When
from dist_llm.errors import UsageError

KEYS = tuple(LayoutConfig.model_fields)
_CHOICES: dict[str, tuple[str, ...]] = {
    "cp_kind": ("ring", "ulysses"),
    "schedule": get_args(ScheduleName),
    "reduce": get_args(When),
    "unshard": get_args(When),
    "recompute": ("none", "full", "selective"),
    "offload": get_args(Offload),
    "engine": get_args(EngineName),
}
_SWITCHES = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
LONGEST = 1000  # characters of a layout text; all keys with their largest numbers are fewer
_TWO_CHUNKS = ("interleaved", "zb-v", "dualpipe-v")


@dataclass(frozen=True)
class Layout:
    """A layout with every field concrete. `shard` ranks of dp x cp (0: all) share one copy of what ZeRO splits. chunks: stages per rank."""

    dp: int = 1
    tp: int = 1
    sp: bool = False
    cp: int = 1
    cp_kind: Literal["ring", "ulysses"] = "ring"
    pp: int = 1
    ep: int = 1
    zero: int = 0
    shard: int = 0
    schedule: ScheduleName = "1f1b"
    chunks: int = 1
    reduce: When = "step"
    unshard: When = "step"
    recompute: Literal["none", "full", "selective"] = "none"
    offload: Offload = "none"
    engine: EngineName = "native"

    def __post_init__(self) -> None:
        if self.shard == 0:
            object.__setattr__(self, "shard", self.dp * self.cp)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.dp * self.cp * self.tp * self.pp

    @property
    def stages(self) -> int:
        """Number of pipeline stages over all pp ranks."""
        return self.pp * self.chunks

    def __str__(self) -> str:
        return canonical(self)


def parse_layout(text: str) -> LayoutConfig:
    """Read `dp=2,tp=2,sp=off,zero=1,schedule=1f1b`. Raises UsageError with every fault at once."""
    values, faults = read_layout(text)
    if faults:
        raise UsageError("this layout cannot be read", found=text, details=faults, expected=f"key=value,... with keys {' '.join(KEYS)}")
    return LayoutConfig(**values)


def read_layout(text: str) -> tuple[dict[str, Any], list[str]]:
    """The pairs of a layout text and every fault in it, as sentences. An empty text is the empty layout."""
    if len(text) > LONGEST:
        return {}, [f"a layout of more than {LONGEST} characters"]
    values: dict[str, Any] = {}
    faults: list[str] = []
    for pair in text.split(",") if text.strip() else ():
        key, equals, word = (part.strip() for part in pair.partition("="))
        if key not in KEYS:
            faults.append(f"unknown key {key!r}{did_you_mean(key, KEYS)}" if equals else f"{pair.strip()!r} is not key=value")
        elif key in values:
            faults.append(f"{key} is given twice: {shown(values[key])} and {word}")
        else:
            values[key], fault = _value(key, word)
            faults += fault
    return values, faults


def _value(key: str, word: str) -> tuple[Any, list[str]]:
    """The value of one pair and its faults (none or one)."""
    if key in _CHOICES:
        choices = _CHOICES[key]
        return word, [] if word in choices else [f"{key}={word}: expected one of {', '.join(choices)}{did_you_mean(word, choices)}"]
    if key == "sp":
        return _SWITCHES.get(word), [] if word in _SWITCHES else [f"sp={word}: expected on or off"]
    least, most = (0, 3) if key == "zero" else (1, LARGEST)
    if re.fullmatch(r"[0-9]{1,13}", word) and least <= int(word) <= most:
        return int(word), []
    return 1, [f"{key}={word}: expected a whole number {'from 0 to 3' if key == 'zero' else 'from 1'}"]


def shown(value: Any) -> str:
    """A value as a layout text writes it."""
    return ("off", "on")[value] if isinstance(value, bool) else str(value)


def did_you_mean(word: str, known: tuple[str, ...] | list[str]) -> str:
    """`; did you mean 'x'?` for the nearest known name, or nothing."""
    near = nearest(word, known)
    return f"; did you mean {near!r}?" if near else ""


def nearest(word: str, known: tuple[str, ...] | list[str]) -> str | None:
    """The known name that `word` is nearly, or a part of."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5) or [name for name in known if len(word) > 1 and word in name]
    return near[0] if near else None


def resolve(layout: LayoutConfig, world: int) -> Layout:
    """Make `layout` concrete on exactly `world` ranks; dp fills what the other axes leave.

    Raises UsageError when the product of the axes is not `world`.
    """
    rest = layout.cp * layout.tp * layout.pp
    others = f"cp {layout.cp} x tp {layout.tp} x pp {layout.pp}"
    if layout.dp is None and world % rest:
        expected, found = f"a multiple of {others} = {rest}", f"{world} ranks: {world} over {rest} leaves {world % rest}"
        raise UsageError("the layout does not fit this number of ranks", where="layout", expected=expected, found=found)
    dp = layout.dp if layout.dp is not None else world // rest
    if dp * rest != world:
        expected, found = f"dp {dp} x {others} = {dp * rest} ranks", f"{world} ranks"
        raise UsageError("the layout does not fit this number of ranks", where="layout", expected=expected, found=found)
    return concrete(layout, dp)


def concrete(layout: LayoutConfig, dp: int) -> Layout:
    """`layout` with `dp` and every default filled in, whatever the number of ranks."""
    given = {key: value for key, value in layout.model_dump().items() if value is not None}
    given["sp"] = layout.tp > 1 and layout.sp is not False
    # ZeRO 2 and 3 exist to hold a shard between micro-batches; a pipeline has many micro-batches in flight and would send each again.
    early: When = "micro_batch" if layout.zero >= 2 and layout.pp == 1 else "step"
    defaults = {"dp": dp, "shard": dp * layout.cp, "chunks": 2 if layout.schedule in _TWO_CHUNKS else 1, "reduce": early, "unshard": early}
    given = {**defaults, **given}
    if layout.zero < 3:
        given["unshard"] = "step"  # weights are never sharded, so the key has nothing to say
    return Layout(**given)


def world_of(layout: LayoutConfig, nproc: int | None = None) -> int:
    """How many ranks `compare` gives a layout: its own product when it names dp, otherwise `nproc` (without it, dp = 1)."""
    rest = layout.cp * layout.tp * layout.pp
    if layout.dp is not None:
        return layout.dp * rest
    return rest if nproc is None else nproc


def canonical(layout: Layout | LayoutConfig) -> str:
    """The one text of a layout: keys in fixed order, only those that differ from their default, dp always (where it is known).

    >>> canonical(Layout())
    'dp=1'
    """
    full = layout if isinstance(layout, Layout) else concrete(layout, layout.dp or 1)
    # The defaults of the other keys follow from these.
    leading = {key: getattr(full, key) for key in ("dp", "tp", "cp", "pp", "zero", "schedule")}
    defaults = {**vars(concrete(LayoutConfig(**leading), full.dp)), **{key: getattr(Layout(), key) for key in leading}}
    values = dict(vars(full))
    if isinstance(layout, LayoutConfig) and layout.dp is None:
        values |= {"dp": 1, "shard": layout.shard}
        defaults["shard"] = None  # dp x cp, which is not known here
    else:
        defaults["dp"] = None
    return ",".join(f"{key}={shown(values[key])}" for key in KEYS if values[key] != defaults[key])


def equation(layout: Layout) -> str:
    """`64 ranks = dp 4 x pp 4 x cp 1 x tp 4`."""
    assert layout.world == prod((layout.dp, layout.pp, layout.cp, layout.tp))
    ranks = "1 rank" if layout.world == 1 else f"{layout.world} ranks"
    return f"{ranks} = dp {layout.dp} x pp {layout.pp} x cp {layout.cp} x tp {layout.tp}"
