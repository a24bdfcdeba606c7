"""Communication runs beside computation: shown by the order in which things are begun and waited for, not by the clock."""

from __future__ import annotations

import pytest

from tests.ranks import Ranks


def test_gradients_travel_while_backward_goes_on(ranks: Ranks) -> None:
    """A unit's reduction is begun before the backward of the unit below it, and waited for only after that."""
    events = ranks.run(2, "tests.overlap_cases:zero_events", "dp=2,zero=2")[0]
    for layer in (3, 2, 1):
        begun = events.index(f"reduce blocks.{layer}")
        below = events.index(f"backward blocks.{layer - 1}")
        assert begun < below < events.index(f"collect blocks.{layer}"), (layer, events)


def test_step_reduction_starts_in_the_last_backward_only(ranks: Ranks) -> None:
    """With reduce=step a unit is reduced once a step, during the last micro-batch's backward."""
    events = ranks.run(2, "tests.overlap_cases:zero_events", "dp=2,zero=1")[0]
    assert events.count("reduce blocks.3") == 1 and events.count("backward blocks.3") > 1
    last = len(events) - 1 - events[::-1].index("backward blocks.3")
    assert last < events.index("reduce blocks.3") < len(events) - 1 - events[::-1].index("backward blocks.2")


def test_a_reduction_travels_beside_the_next_forward(ranks: Ranks) -> None:
    """reduce=micro_batch: what the last unit of a backward sends is waited for when the next backward begins, not where it ends."""
    events = ranks.run(2, "tests.overlap_cases:zero_events", "dp=2,zero=2")[0]
    again = events.index("forward blocks.3", events.index("reduce embedding"))
    assert again < events.index("collect embedding") < [at for at, event in enumerate(events) if event == "backward head"][1]


def test_a_stage_s_reduction_travels_beside_other_stages(ranks: Ranks) -> None:
    """reduce=step with two stages on a rank: the last unit of the later stage is on its way while the earlier one computes."""
    events = ranks.run(4, "tests.overlap_cases:zero_events", "dp=2,pp=2,zero=1,schedule=interleaved")[0]
    last = max(at for at, event in enumerate(events) if event == "backward embedding")
    assert events.index("reduce blocks.2") < events.index("backward embedding") <= last < events.index("collect blocks.2"), events


def test_shards_travel_between_replicas_while_backward_goes_on(ranks: Ranks) -> None:
    """A unit's sum over replicas is begun as soon as its shard is complete; only the last unit's is left for the end."""
    events = ranks.run(2, "tests.overlap_cases:zero_events", "dp=2,zero=1,shard=1")[0]
    last = len(events) - 1 - events[::-1].index("backward blocks.0")
    for unit in ("head", "blocks.3", "blocks.2"):
        assert events.count(f"cross {unit}") == 1 and events.index(f"cross {unit}") > events.index(f"reduce {unit}")
    early, late = [events.index(f"cross {unit}") for unit in ("head", "blocks.3", "blocks.2")], events.index("cross embedding")
    assert early == sorted(early) and early[-1] < last < late


@pytest.mark.parametrize("model", ["llama", "tied"])
def test_sums_go_to_all_ranks_while_backward_goes_on(ranks: Ranks, model: str) -> None:
    """zero=0: a unit's gradient is gathered as soon as its shards are summed; only the last unit's is left for the end."""
    events = ranks.run(2, "tests.overlap_cases:zero_events", "dp=2,zero=0", model)[0]
    last = len(events) - 1 - events[::-1].index("backward blocks.0")
    spread = [events.index(f"spread {unit}") for unit in ("blocks.3", "blocks.2")]
    assert spread == sorted(spread) and events.index("reduce blocks.1") < spread[-1] < last, events
    assert all(events.count(f"spread blocks.{layer}") == 1 for layer in range(4))


@pytest.mark.parametrize("zero", [1, 2])
def test_updated_weights_travel_beside_the_next_forward(ranks: Ranks, zero: int) -> None:
    """Each unit's are waited for where they are first read, once."""
    events = ranks.run(2, "tests.overlap_cases:arrivals", f"dp=2,zero={zero},recompute=full")[0]
    order = ["embedding", "blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    assert events[: 2 * len(order)] == [f"{what} {unit}" for unit in order for what in ("arrive", "forward")]
    assert sum(event.startswith("arrive") for event in events) == len(order) + 1, events  # and the head


def test_weights_are_prefetched(ranks: Ranks) -> None:
    """Stage 3 asks for the next unit's weights before the unit before it computes, forward and backward."""
    events = ranks.run(2, "tests.overlap_cases:zero_events", "dp=2,zero=3")[0]
    for layer in (1, 2, 3):
        assert events.index(f"gather blocks.{layer}") < events.index(f"forward blocks.{layer - 1}"), events
    backward = events[events.index("backward head") :]
    for layer in (1, 2):  # the last two units keep their weights; the embedding's backward reads none
        assert backward.index(f"gather blocks.{layer - 1}") < backward.index(f"backward blocks.{layer}"), backward


@pytest.mark.parametrize("sp", [False, True])
def test_input_gradient_travels_while_weight_gradients_are_computed(ranks: Ranks, sp: bool) -> None:
    """One reduction for three projections of an input, begun before the three weight gradients and waited for after them."""
    events = ranks.run(2, "tests.overlap_cases:column_events", sp)[0]
    assert events == ["product"] * 3 + ["start"] + ["product"] * 3 + ["finish"]
