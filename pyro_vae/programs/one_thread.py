"""One thread at a time: Pyro's handlers, its store and its settings belong to the whole process."""

import threading
from contextlib import ContextDecorator
from typing import Any


class _OneThread(ContextDecorator):
    """A context, or a decorator, in which another thread may not run a pair. It can be entered again inside.

    Raises:
        RuntimeError: if another thread is inside. Nothing has changed then.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "Model and guide: expected one thread at a time, got a second one that runs a pair while "
                "another does. Pyro has one stack of handlers for each process, so their sites would mix. To "
                "fix: use processes, or run one thread after the other."
            )

    def __exit__(self, *_: Any) -> None:
        self._lock.release()


one_thread = _OneThread()
