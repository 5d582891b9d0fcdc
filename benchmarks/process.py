"""A contender in a process of its own, which works when it is told to and sleeps otherwise."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

from contenders import CONTENDERS, Contender, Work

_spawn = multiprocessing.get_context("spawn")


class Process:
    """A contender elsewhere: pinned to as many cores as it has threads, with a compiler cache of its own.

    Its memory, its parameter store and torch's switches are nobody else's, and what it compiles it
    compiles for the first time.
    """

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self._here, there = _spawn.Pipe()
        self._process = _spawn.Process(target=_serve, args=(there, name, threads), daemon=True)
        self._process.start()
        there.close()

    def make(self, work: Work) -> float:
        """Make the contender, in place of an earlier one; return the seconds."""
        return self._ask("make", work)[1]

    def run(self, method: str, *args: Any) -> tuple[Any, float]:
        """Return what a method of the contender returns, and its seconds."""
        return self._ask(method, *args)

    def peak_memory(self) -> float:
        """Return the most memory that the process has held so far, in MB."""
        return float(self._ask("peak_memory")[0])

    def stop(self) -> None:
        """End the process."""
        self._here.close()
        self._process.join()

    def _ask(self, method: str, *args: Any) -> tuple[Any, float]:
        try:
            self._here.send((method, args))
            value, seconds = self._here.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"{self.name}: its process has died.") from error
        if isinstance(value, Exception):
            raise RuntimeError(f"{self.name} failed.") from value
        return value, seconds


@contextmanager
def processes(names: list[str], threads: int) -> Iterator[dict[str, Process]]:
    """Start a process for each contender, and end them all afterwards."""
    with ExitStack() as stack:
        started = {}
        for name in names:
            started[name] = Process(name, threads)
            stack.callback(started[name].stop)
        yield started


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def _serve(connection: Connection, name: str, threads: int) -> None:
    # Before torch or JAX is imported: both look at this when they start.
    os.sched_setaffinity(0, cores()[:threads])
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    entry = CONTENDERS[name]
    contender: Contender | None = None
    value: Any
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        os.environ["TMPDIR"] = tempfile.tempdir = cache  # torch keeps the headers there that it has compiled
        while True:
            try:
                method, args = connection.recv()
            except EOFError:
                return
            try:
                make = entry.load()  # an import is not timed
                start = time.perf_counter()
                if method == "make":
                    contender, value = make(*args, **entry.options), None
                elif method == "peak_memory":
                    value = peak_memory()
                else:
                    value = getattr(contender, method)(*args)
                connection.send((value, time.perf_counter() - start))
            except Exception:
                connection.send((RuntimeError(traceback.format_exc()), 0.0))


def peak_memory() -> float:
    """Return the most memory that this process has held so far, in MB."""
    # Not getrusage: its peak begins with that of the process which started this one.
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e3
