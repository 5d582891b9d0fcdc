"""Ctrl-C and SIGTERM that wait for the end of an operation that they must not split."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopRequest:
    """A signal that has to wait, and its former handler.

    Attributes:
        number: the number of the signal; None before it comes.
    """

    def __init__(self, urgent: bool) -> None:
        self.number: int | None = None
        self._urgent = urgent
        self._before: dict[int, Any] = {}

    def obey(self) -> None:
        """Do now what the signal would have done, if one came.

        Raises:
            KeyboardInterrupt: for Ctrl-C.
            SystemExit: for SIGTERM, with status 143.
        """
        if self.number is None:
            return
        handler = self._before[self.number]
        if not callable(handler):
            raise SystemExit(128 + self.number)
        handler(self.number, sys._getframe())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._urgent and self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


@contextmanager
def deferred(*numbers: int, urgent: bool = False) -> Iterator[StopRequest]:
    """Let signals wait for :meth:`StopRequest.obey`.

    Args:
        numbers: the numbers of the signals.
        urgent: whether a second Ctrl-C does not wait.
    """
    request = StopRequest(urgent)
    if threading.current_thread() is threading.main_thread():  # Python runs handlers there
        for number in numbers:
            handler = signal.getsignal(number)
            if callable(handler) or handler is signal.SIG_DFL:  # not one that is ignored
                request._before[number] = signal.signal(number, request._receive)
    try:
        yield request
    finally:
        for number, handler in request._before.items():
            signal.signal(number, handler)
