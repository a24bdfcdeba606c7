"""What a user sees while a run trains: a live bar on a terminal, short lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import unicodedata
from collections import deque
from typing import TYPE_CHECKING, Any

from dist_llm.errors import plain

if TYPE_CHECKING:
    from rich.progress import TaskID

LINES = 15  # of progress in a run, where there is no terminal
QUIET_SECONDS = 10.0  # and never longer without one
REDRAW_SECONDS = 0.1
LONGEST_SAMPLE = 240


class Console:
    """Takes what a run tells and shows it. A context: on leaving, the terminal is as it was."""

    def __init__(self, *, steps: int) -> None:
        self.steps, self.seconds = steps, deque[float](maxlen=20)
        self.told, self.told_at, self.stage = -math.inf, time.monotonic(), ""
        self.marks: dict[str, Any] = {}  # of the last questions
        self.live = _LiveBar(steps) if sys.stdout.isatty() else None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar away; lines can still be shown."""
        if self.live is not None:
            self.live.close()
            self.live = None

    def line(self, text: str, *, style: str = "") -> None:
        """Shows one line for good. A reader that has gone does not stop the run."""
        if self.live is not None:
            self.live.line(text, style)
            return
        with contextlib.suppress(BrokenPipeError):
            print(text, flush=True)

    def take(self, message: dict[str, Any]) -> None:
        """Shows one message of the run: {kind: value}."""
        for kind, value in message.items():
            getattr(self, f"_{kind}")(value)

    def _progress(self, value: tuple[str, float]) -> None:
        text, fraction = plain(value[0]), value[1]
        if self.live is not None:
            self.live.preparing(text, fraction)
        elif time.monotonic() - self.told_at > 2.0:
            self.told_at = time.monotonic()
            self.line(f"preparing the data: {fraction:4.0%}  {text}")

    def _note(self, text: str) -> None:
        self.line(f"note: {plain(text)}")

    def _stage(self, text: str) -> None:
        if self.live is not None:
            self.live.preparing(text, 1.0)

    def _data(self, ready: dict[str, Any]) -> None:
        held_out = f", {ready['held_out']:,} held out" if ready["held_out"] else ""
        self.line(f"data: {ready['tokens']:,} tokens to train on{held_out}; vocabulary {ready['vocab']:,}")
        self.line(f"device: {plain(ready['device'])}, {ready['dtype']}, {ready['backend']}")

    def _base(self, value: dict[str, Any]) -> None:
        most = max(value["bytes"])
        self.line(f"base: {plain(value['path'])}; a rank read at most {most:,} bytes of it")

    def _resumed(self, value: dict[str, Any]) -> None:
        self.line(f"going on from step {value['step']}: {plain(value['path'])}")

    def _sample(self, sample: dict[str, Any]) -> None:
        self.line(f"sample at step {sample['step']}: {one_line(sample['prompt'])} -> {one_line(sample['text'])}", style="cyan")

    def _answers(self, value: dict[str, Any]) -> None:
        """A line for each task: right answers, and what they were before."""
        marks, before = value["marks"], self.marks
        self.line(f"right answers at step {value['step']}, of questions held out" + (" (before)" if before else ""))
        for task, one in marks.items():
            was = f"  ({before[task]['right']})" if task in before else ""
            share = f"{one['share']:6.1%}, 95 %: {one['low']:.0%} to {one['high']:.0%}" if one["count"] else "none left to ask"
            self.line(f"  {task:<10}{one['right']:>4} of {one['count']:<4} {share}{was}")
        self.marks = marks

    def _before(self, record: dict[str, Any]) -> None:
        self._validation(record)

    def _checkpoint(self, path: str) -> None:
        self.line(f"saved {plain(path)}")

    def _step(self, record: dict[str, Any]) -> None:
        step = record["step"]
        self.seconds.append(record["step_seconds"])
        left = (self.steps - step) * sorted(self.seconds)[len(self.seconds) // 2]
        text = "not finite, left out  " if record.get("skipped") else f"loss {record['loss']:.4f}  norm {record['grad_norm']:.2f}  "
        text += f"margin {record['reward_margin']:.3f}  right {record['accuracy']:.0%}  " if "reward_margin" in record else ""
        text += f"lr {record['learning_rate']:.1e}  "
        text += f"{record['tokens_per_second']:,.0f} tokens/s" if record["tokens_per_second"] is not None else "memory watched"
        text += f"  mfu {record['mfu']:.1%}" if record["mfu"] is not None else ""
        if self.live is not None:
            self.live.step(step, text, left)
        elif self._due(step):
            self.told, self.told_at = step, time.monotonic()
            self.line(f"step {step:>{len(str(self.steps))}}/{self.steps}  {text}  {duration(left)} left")
        self._validation(record)

    def _validation(self, record: dict[str, Any]) -> None:
        if (loss := record.get("validation_loss")) is not None and "validation_reward_margin" in record:
            lead = f"margin {record['validation_reward_margin']:.3f}, {record['validation_accuracy']:.1%} of the pairs right"
            self.line(f"validation at step {record['step']}: loss {loss:.4f}, {lead}")
        elif loss is not None:
            bits = record["validation_bits_per_byte"]
            more = f", {bits:.3f} bits per byte" if bits is not None else ""
            self.line(f"validation at step {record['step']}: loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}{more}")

    def _due(self, step: int) -> bool:
        enough = step - self.told >= max(1, self.steps / LINES)
        return enough or step == self.steps or time.monotonic() - self.told_at > QUIET_SECONDS


class _LiveBar:
    """A bar at the bottom of a terminal; drawn only when there is something new, without a thread (ranks are forked beside it)."""

    def __init__(self, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        parts = TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn()
        self.bar = Progress(*parts, TextColumn("{task.fields[text]}", markup=False), auto_refresh=False)
        self.steps, self.drawn_at = steps, -math.inf
        self.task: TaskID | None = None
        self.preparation: TaskID | None = None

    def preparing(self, text: str, fraction: float) -> None:
        self.bar.start()
        if self.preparation is None:
            self.preparation = self.bar.add_task("data", total=100, text="")
        self.bar.update(self.preparation, completed=int(100 * fraction), text=text, refresh=True)

    def step(self, step: int, text: str, left: float) -> None:
        self.bar.start()
        if self.preparation is not None:
            self.bar.remove_task(self.preparation)
            self.preparation = None
        if self.task is None:
            self.task = self.bar.add_task("step", total=self.steps, text="")
        due = step == self.steps or time.monotonic() - self.drawn_at > REDRAW_SECONDS
        self.drawn_at = time.monotonic() if due else self.drawn_at
        self.bar.update(self.task, completed=step, text=f"{text}  {duration(left)} left", refresh=due)

    def line(self, text: str, style: str) -> None:
        from rich.text import Text

        self.bar.console.print(Text(text, style=style), soft_wrap=True)

    def close(self) -> None:
        self.bar.stop()


def printable(text: str) -> str:
    """`text` without what could command a terminal; line breaks and tabs stay."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co") else "?" for c in text)


def one_line(text: str) -> str:
    """`text` on one line, safe for a terminal, cut to a readable length."""
    shown = plain(text.replace("\n", "⏎").replace("\t", " "))
    return shown if len(shown) <= LONGEST_SAMPLE else shown[: LONGEST_SAMPLE - 1] + "…"


def duration(seconds: float) -> str:
    """`1h02m`, `3m20s`, `45s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
