"""What the demo shows: progress while it runs (plain lines where nobody watches), then tables and a list of checks."""

import time
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

SAY_EVERY_S = 2.0


class Display:
    """The demo's only way to the screen; it also remembers which checks held."""

    def __init__(self):
        self.console = Console(highlight=False, soft_wrap=True)
        self.checks = []

    def say(self, text, style=None):
        self.console.print(text, style=style, markup=False)

    def step(self, text):
        self.console.print()
        self.say(text, "bold")

    def check(self, what, held, detail=""):
        """Note whether something held, and show it."""
        self.checks.append((what, bool(held)))
        self.say(f"  {'✓' if held else '✗'} {what}{f': {detail}' if detail else ''}", "green" if held else "bold red")

    @contextmanager
    def progress(self, title, total):
        """Yield a function to be called for each thing done."""
        if self.console.is_terminal:
            columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            with Progress(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task(title, total=total)
                yield lambda: bar.advance(task)
        else:
            yield self._plain(title, total)

    def _plain(self, title, total):
        done, said = 0, time.monotonic()

        def advance():
            nonlocal done, said
            done += 1
            if done == total or time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                self.say(f"  {title}: {done} of {total}")

        return advance

    def table(self, title, columns, rows):
        table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_header=any(columns))
        for name in columns:
            table.add_column(name, overflow="fold", justify="right" if name == "ms" else "left")
        for row in rows:
            table.add_row(*map(str, row))
        self.console.print()
        self.console.print(table, soft_wrap=False, markup=False)

    def verdict(self):
        """Show every check once more; return whether all held."""
        self.step("What held")
        for what, held in self.checks:
            self.say(f"  {'✓' if held else '✗'} {what}", "green" if held else "bold red")
        failed = sum(not held for _, held in self.checks)
        held = bool(self.checks) and not failed
        self.say(
            f"{len(self.checks)} checks, all held" if held else f"{failed} of {len(self.checks)} checks FAILED", "bold"
        )
        return held
