"""Progress bars for a demo or measurement, on standard error, so that standard output has only the result."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class ProgressBars:
    """One line for each step. Use as a context manager; draws nothing if standard error is not a terminal."""

    def __init__(self, title: str = "", console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._title = title
        self._task: TaskID | None = None
        self._total = 0.0
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: object, *_error: object) -> None:
        if kind is None:
            self._finish()
        self._progress.stop()

    def title(self, title: str) -> None:
        """Begin the steps of another part; `title` prefixes each of them."""
        self._title = title

    def step(self, text: str, total: float) -> None:
        """Finish the previous step and begin this one."""
        self._finish()
        description = f"{self._title}: {text}" if self._title else text
        self._total = total
        self._task = self._progress.add_task(description, total=total, note="")

    def at(self, value: float, text: str = "") -> None:
        """Show how far the step is, with `text` next to the bar."""
        if self._task is not None:
            self._progress.update(self._task, completed=value, note=text)

    def warn(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(f"watchmux: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    def _finish(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=self._total)
            self._task = None
