"""Progress bars of commands."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(
    description: str, total: int, *, unit: str, initial: int = 0, enabled: bool = True
) -> Iterator[Callable[[int], object]]:
    """Show a progress bar while the body runs; yield the function that advances it by n units.

    The bar is shown on stderr, and only if stderr is a terminal. tqdm is imported only then.
    description: text in front of the bar.
    total: number of units of the finished work.
    unit: name of a unit.
    initial: units that were done before.
    enabled: False = show nothing.
    """
    if not enabled or not sys.stderr.isatty():
        yield lambda n: None
        return
    from tqdm import tqdm

    with tqdm(desc=description, total=total, initial=initial, unit=unit) as bar:
        yield bar.update
