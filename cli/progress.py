"""A bar on the terminal while weights are uploaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ..runtime.gpu.upload import Progress as Callback


@contextmanager
def loading(out: Console) -> Iterator[Callback | None]:
    """What to give `load_method`; None where `out` is no terminal: then nothing is shown."""
    if not out.is_terminal:
        yield None
        return
    columns = (TextColumn("loading weights"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("", total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield report
