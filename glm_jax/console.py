"""What a person in front of a terminal sees while something takes long."""

import argparse
import contextlib
import re
import sys
import time


@contextlib.contextmanager
def progress(what: str, quiet: bool = False):
    """A bar on a terminal, if it takes more than a second; elsewhere a line every ten seconds."""
    begin = last = time.monotonic()
    before = 0
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():

        def line(done: int, total: int, more: str = ""):
            nonlocal last, before
            now = time.monotonic()
            if now - last > 10:
                rate = (done - before) / (now - last)
                left = f", {(total - done) / rate:.0f} s left" if rate else ""
                text = f"{what} {done / 2**30:.1f} of {total / 2**30:.1f} GiB, {rate / 1e6:,.0f} MB/s{left}"
                print(f"{text}, {more}" if more else text, file=sys.stderr)
                last, before = now, done

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    numbers = (DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    columns = (TextColumn(what), BarColumn(), *numbers, TextColumn("{task.fields[more]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, visible=False, more="")
        yield lambda done, total, more="": bar.update(
            task, completed=done, total=total, more=more, visible=time.monotonic() - begin > 1
        )


def size(text: str) -> int:
    """Bytes, as a person writes them: 512MiB, 2GB, 1.5GiB, or a bare number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B?|B)?", text.strip().upper())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, as 512MiB or 2GB")
    number, prefix, binary = found.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** (" KMGT".index(prefix) if prefix else 0))
