"""Show the bytes of downloads: `downloading owner/name  1.2 GiB of 4.9 GiB  (24%)  34.1 MiB/s`.

    with shown_by(display.progress):
        download(...)                  downloads in the block are shown

huggingface_hub reports to progress bars: of a snapshot to one for all bytes, of a single file to one of its own. A bar
class of ours takes these reports, from several threads, and draws nothing itself.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partialmethod
from typing import Any

from solotune.units import format_bytes

Progress = Callable[[int, int, str], None]  # RunObserver.progress
REFRESH_SECONDS = 0.25
FROM_NETWORK = "Downloading bytes"  # huggingface_hub's bar beside that of the bytes on the disk, with the same total

_progress: ContextVar[Progress | None] = ContextVar("progress", default=None)


@contextlib.contextmanager
def shown_by(progress: Progress) -> Iterator[None]:
    """Show the downloads of this block."""
    token = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(token)


def bars(name: str) -> type[Any] | None:
    """The class of progress bars for `tqdm_class` that shows a download of `name`; None outside of `shown_by`."""
    progress = _progress.get()
    if progress is None:
        return None
    from tqdm import tqdm

    transfer = _Transfer(name, progress)

    class Bar(tqdm):
        """Passes its bytes on; disabled, so that tqdm itself draws nothing and starts no thread."""

        def __init__(self, *args: Any, **keys: Any) -> None:
            super().__init__(*args, **{**keys, "disable": True})
            self.counts = keys.get("unit") == "B" and keys.get("desc") != FROM_NETWORK
            if self.counts:
                transfer.add(self)

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self.counts:
                transfer.show()

    return Bar


@contextlib.contextmanager
def of_single_files(name: str) -> Iterator[None]:
    """Show the files that a library downloads one by one in this block, as `datasets` does: it takes no bar class."""
    from huggingface_hub import HfApi

    original, bar = HfApi.hf_hub_download, bars(name)
    if bar is None:
        yield
        return
    HfApi.hf_hub_download = partialmethod(original, tqdm_class=bar)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        HfApi.hf_hub_download = original


class _Transfer:
    """Sums up the bars of one download."""

    def __init__(self, name: str, progress: Progress) -> None:
        self._name, self._progress = name, progress
        self._bars: list[Any] = []
        self._lock = threading.Lock()
        self._began = self._shown = time.monotonic()

    def add(self, bar: Any) -> None:
        with self._lock:
            self._bars.append(bar)

    def show(self) -> None:
        """Show the bytes, unless they were shown just now."""
        with self._lock:
            now = time.monotonic()
            if now - self._shown < REFRESH_SECONDS:
                return
            self._shown = now
            self._progress(0, 0, self._text(now - self._began))

    def _text(self, seconds: float) -> str:
        done, total = (int(sum(getattr(bar, key) or 0 for bar in self._bars)) for key in ("n", "total"))
        of_total = f" of {format_bytes(total)}  ({done / total:.0%})" if total >= done > 0 else ""
        return f"downloading {self._name}  {format_bytes(done)}{of_total}  {format_bytes(int(done / seconds))}/s"
