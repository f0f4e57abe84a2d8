"""What the command line shows: consoles, progress, log lines.

Results go to stdout, progress and everything else to stderr.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from folklora.backbones.metric import ACCURACY, metric_of
from folklora.errors import one_line

# Into a file or a pipe a table is as wide as it needs to be, not as a terminal of 80 columns. No markup and no codes
# of emoji: names of clients, classes and folders may hold brackets and colons, and so may what a model says.
out = Console(width=None if sys.stdout.isatty() else 150, markup=False, highlight=False, emoji=False)
err = Console(stderr=True, markup=False, highlight=False, emoji=False)


def still(text: str) -> str:
    """A text that moves no terminal: what is not printable is spelt out, but for line breaks and tabs."""
    return "".join(c if c in "\n\t" else one_line(c) for c in text)


class Shown:
    """Progress on a terminal: a bar for the phase in hand, a line for each round."""

    def __init__(self, title: str = "") -> None:
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=err,
            transient=True,
        )
        self.title = title
        self.task: Any = None

    def __enter__(self) -> Shown:
        if err.is_interactive:  # elsewhere Rich would still leave an empty line behind
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if err.is_interactive:
            self.bars.stop()

    def run(self, name: str) -> None:
        self.title = name
        err.print(name, style="bold")

    def phase(self, name: str, total: int) -> None:
        if self.task is not None:
            self.bars.remove_task(self.task)
        self.task = self.bars.add_task(f"{self.title} {name}".strip(), total=total)
        if not err.is_terminal and not name.startswith("round"):
            err.print(f"  {self.title} {name} ...".rstrip())

    def advance(self) -> None:
        self.bars.advance(self.task)

    def line(self, metrics: Mapping[str, Any]) -> None:
        parts = [f"  round {metrics['round']:>3}"]
        if metrics["train_loss"] is not None:
            parts.append(f"loss {metrics['train_loss']:.3f}")
        if metrics["validation"]:
            parts.append(f"validation {_score(metrics['validation'])}")
        if privacy := metrics.get("privacy"):
            parts.append(f"epsilon {privacy['epsilon']:.3g} (delta {privacy['delta']:g})")
        parts.append(f"{(metrics['bytes_up'] + metrics['bytes_down']) / 1000:,.1f} kB moved")
        if drift := metrics.get("drift"):
            parts.append(f"other data: {len(drift)} client{'s' if len(drift) > 1 else ''}")
        if metrics["failed"]:
            parts.append(f"failed: {', '.join(metrics['failed'])}")
        err.print(" · ".join(parts), style="yellow" if metrics["failed"] else None, soft_wrap=True)


def _score(validation: Mapping[str, Any]) -> str:
    """``71.3 %`` of accuracy, else with the name: ``loss 2.345 (perplexity 10.4)``."""
    metric = metric_of(validation)
    others = [metric_of({"metric": name}).named(value) for name, value in validation.get("beside", {}).items()]
    beside = f" ({', '.join(others)})" if others else ""
    return (metric.show if metric == ACCURACY else metric.named)(validation["mean"]) + beside


class LogLines(logging.Handler):
    """What the library logs, on stderr with the time of day."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        # A peer's words may be among them: they forge no second line and send the terminal nothing.
        lines = [one_line(record.getMessage())]
        if record.exc_info:
            lines += map(one_line, logging.Formatter().formatException(record.exc_info).splitlines())
        err.print(f"{datetime.now():%H:%M:%S} " + "\n".join(lines), style=style, soft_wrap=True)


@contextmanager
def at_work(afterwards: str) -> Iterator[None]:
    """Show what goes on; Ctrl-C ends it with one line that says how to go on, and exit code 130."""
    log, lines = logging.getLogger("folklora"), LogLines()
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    try:
        yield
    except KeyboardInterrupt:
        err.print(f"stopped; {afterwards}", soft_wrap=True)
        raise typer.Exit(130) from None
    finally:
        log.removeHandler(lines)


def print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=1, allow_nan=False) + "\n")
