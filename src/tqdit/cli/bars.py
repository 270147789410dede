"""Show progress on standard error: bars on a terminal, elsewhere a plain line now and then."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, Task, TaskID

Report = Callable[[str, float], None]  # (stage, finished fraction)
# Stages and their rough shares of the time: between the bundled model's and DiT-XL/2's, see docs/results.md.
QUANTIZE: Mapping[str, float] = {"trajectories": 0.4, "statistics": 0.2, "search": 0.4}
TOTAL = "total"
EVERY = 15.0  # least seconds between two plain lines of a stage
NO_STAGES: Mapping[str, float] = {}


@contextmanager
def progress(quiet: bool, stages: Mapping[str, float] = NO_STAGES) -> Iterator[Report]:
    """Yield a function that shows how far each stage is, and the time that is left.

    Nothing is shown before the function's first call: wrong input prints its one line and nothing else. `stages`: the
    names of all stages in their order with their shares of the time, where they are known beforehand; then a total is
    shown too.
    """
    if quiet:
        yield lambda stage, fraction: None
        return
    total = Total(stages)
    shown = Bars(total) if sys.stderr.isatty() else Lines(total)
    try:
        yield shown.report
    finally:
        shown.stop()


def remaining(elapsed: float, fraction: float) -> float | None:
    """Return the seconds that are left if the rest goes on as fast as before; None before anything is done."""
    return elapsed * (1 - fraction) / fraction if fraction > 0 else None


def clock(seconds: float | None) -> str:
    """Return a time as text, such as 0:42, 12:07 or 3:05:00; dashes for an unknown time."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Total:
    """The progress of all stages together. A stage that has begun ends those before it."""

    def __init__(self, stages: Mapping[str, float]) -> None:
        self.stages = stages
        self.done = 0.0  # share of the time of all stages
        self._rest = 0.0  # share of the stages that have not begun
        self._finished = dict.fromkeys(stages, 0.0)

    def tell(self, stage: str, fraction: float) -> None:
        """Note that `stage` has reached `fraction`."""
        if stage not in self.stages:
            return
        names, whole = list(self.stages), sum(self.stages.values())
        at = names.index(stage)
        self._finished |= dict.fromkeys(names[:at], 1.0)
        self._finished[stage] = fraction
        self.done = sum(share * self._finished[name] for name, share in self.stages.items()) / whole
        self._rest = sum(self.stages[name] for name in names[at + 1 :]) / whole

    def left(self, elapsed: float, of_stage: float | None) -> float | None:
        """Return the seconds that are left; None if they cannot be known.

        `elapsed`: seconds since the start. `of_stage`: seconds that are left of the present stage.
        """
        if of_stage is None or not self.done:
            return None
        return of_stage + elapsed * self._rest / self.done


class Lines:
    """A display of progress by plain lines: when a stage begins, when it ends, and every `EVERY` seconds between."""

    def __init__(self, total: Total, now: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self.now = now
        self.start = now()
        self.begun: dict[str, float] = {}
        self.ended: set[str] = set()
        self.last = 0.0

    def report(self, stage: str, fraction: float) -> None:
        """Print a line on how far `stage` is, if one is due."""
        now = self.now()
        self.total.tell(stage, fraction)
        new = stage not in self.begun
        ends = fraction >= 1 and stage not in self.ended
        self.begun.setdefault(stage, now)
        if not (new or ends) and now - self.last < EVERY:
            return
        self.last = now
        elapsed = now - self.begun[stage]
        left = remaining(elapsed, fraction)
        line = f"{stage}: {100 * fraction:.0f} % after {clock(elapsed)}"
        if ends:
            self.ended.add(stage)
        elif fraction > 0:
            line += f", {clock(left)} left"
        if self.total.stages:
            line += f"; {TOTAL}: {100 * self.total.done:.0f} % after {clock(now - self.start)}"
            if (of_all := self.total.left(now - self.start, left)) and self.total.done < 1:
                line += f", {clock(of_all)} left"
        print(line, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Do nothing: plain lines leave no display to close."""


class Bars:
    """A display of progress with a bar for each stage from its beginning, and one for all stages together."""

    def __init__(self, total: Total) -> None:
        self.total = total
        self.tasks: dict[str, TaskID] = {}
        self.last = ""
        self.bars = _rich_bars(self.left)

    def report(self, stage: str, fraction: float) -> None:
        """Draw how far `stage` is, and how far all stages are."""
        self.bars.start()
        self.last = stage
        if self.total.stages:
            self.total.tell(stage, fraction)
            self._show(TOTAL, self.total.done)
        self._show(stage, fraction)

    def left(self, task: "Task") -> float | None:
        """Return the seconds that a bar has left; None if they cannot be known.

        rich's own estimate is not used: it forgets a speed after 30 seconds without news.
        """
        if task.description != TOTAL:
            return remaining(task.elapsed or 0.0, task.percentage / 100)
        stage = next((other for other in self.bars.tasks if other.description == self.last), None)
        return self.total.left(task.elapsed or 0.0, self.left(stage) if stage else None)

    def _show(self, name: str, fraction: float) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=1.0)
        self.bars.update(self.tasks[name], completed=fraction)

    def stop(self) -> None:
        """Close the bars, and leave them on the screen as they are."""
        if self.tasks:
            self.bars.stop()


def _rich_bars(left: "Callable[[Task], float | None]") -> "Progress":
    """Return bars whose columns fit 80 characters."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn
    from rich.text import Text

    class Name(ProgressColumn):
        def render(self, task: "Task") -> Text:
            return Text(task.description, overflow="ellipsis", no_wrap=True)

    class Times(ProgressColumn):
        def render(self, task: "Task") -> Text:
            elapsed = (task.finished_time if task.finished else task.elapsed) or 0.0
            rest = "" if task.finished else f"{clock(left(task))} left"
            return Text(f"{clock(elapsed):>7} {rest:>12}")

    return Progress(
        SpinnerColumn(finished_text="✓"), Name(), BarColumn(20), "{task.percentage:>3.0f}%", Times(),
        console=Console(stderr=True),
    )  # fmt: skip
