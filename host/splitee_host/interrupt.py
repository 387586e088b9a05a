"""Ctrl-C while a fleet trains: the first ends the round, the second ends at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType


class Interrupt:
    """Takes Ctrl-C (SIGINT) while it is entered, in the main thread.

    The first sets ``asked``; each further one raises KeyboardInterrupt. Where a shell started us to
    ignore Ctrl-C, that stays so.
    """

    def __init__(self, on_ask: Callable[[], None], on_abort: Callable[[], None]) -> None:
        """on_ask and on_abort: called in the signal's handler, and so must print nothing."""
        self.asked = False
        self._on_ask = on_ask
        self._on_abort = on_abort

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            self._on_abort()
            raise KeyboardInterrupt
        self.asked = True
        self._on_ask()

    def __enter__(self) -> Interrupt:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)
