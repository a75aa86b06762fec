"""A progress bar on a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    total: int | None, name: str, unit: str, *, initial: int = 0, quiet: bool = False
) -> Iterator[Callable[[int], object]]:
    """Show a bar on stderr and yield the function that advances it by a number of units.

    total: number of units; None = unknown.
    name: text before the bar.
    unit: name of a unit.
    initial: number of units that are done already.
    quiet: show nothing.

    Nothing is shown, and tqdm is not needed, if stderr is not a terminal.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=initial, desc=name, unit=unit) as bar:
        yield bar.update
