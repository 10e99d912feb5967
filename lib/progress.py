"""
What takes more than two seconds says how far it is, and how much longer it takes: with a bar on a terminal, else with
one line. Neither goes to standard output, which belongs to results.
"""
import sys
import time

from tqdm import tqdm

PATIENCE = 2.0  # seconds


class Bar:
    """Counts what is done of a `total`. what: its plural, with what is done to it: "scenes drawn"."""

    def __init__(self, what, total, shown=True):
        self.what = what
        self.total = total
        self.done = 0
        self.began = time.monotonic()
        self.has_told = not shown
        self.bar = None

    def update(self, n=1):
        """So many more are done."""
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        seconds = time.monotonic() - self.began
        if self.has_told or seconds < PATIENCE or self.done >= self.total:
            return
        self.has_told = True
        if sys.stderr.isatty():
            self.bar = tqdm(desc=self.what, total=self.total, initial=self.done, leave=False, dynamic_ncols=True)
        else:
            rest = seconds / self.done * (self.total - self.done)
            print(f"{self.what}: {self.done:,} of {self.total:,} after {seconds:.0f} s, about {rest:.0f} s to go",
                  file=sys.stderr, flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()


def progress(items, what, total=None, shown=True):
    """Go through items, which a Bar counts. shown: False where another rank tells."""
    bar = Bar(what, len(items) if total is None else total, shown)
    try:
        for item in items:
            yield item
            bar.update()
    finally:
        bar.close()
