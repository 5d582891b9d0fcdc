"""Run each contender in its own process, which works on request and sleeps otherwise."""

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
    """A contender in its own process, pinned to one core per thread, with its own compiler cache.

    It shares no memory, parameter store or torch settings with other contenders. Each compilation is its
    first.
    """

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self._here, there = _spawn.Pipe()
        self._process = _spawn.Process(target=_serve, args=(there, name, threads), daemon=True)
        self._process.start()
        there.close()

    def make(self, work: Work) -> float:
        """Make the contender, replacing an earlier one. Return the seconds that this took."""
        return self._ask("make", work)[1]

    def run(self, method: str, *args: Any) -> tuple[Any, float]:
        """Call a method of the contender. Return its result and the seconds that it took."""
        return self._ask(method, *args)

    def peak_memory(self) -> float:
        """Return the peak memory of the process so far, in MB."""
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
            raise RuntimeError(f"{self.name}: its process has ended.") from error
        if isinstance(value, Exception):
            raise RuntimeError(f"{self.name} failed.") from value
        return value, seconds


@contextmanager
def processes(names: list[str], threads: int) -> Iterator[dict[str, Process]]:
    """Start a process for each contender, and end all of them afterwards."""
    with ExitStack() as stack:
        started = {}
        for name in names:
            started[name] = Process(name, threads)
            stack.callback(started[name].stop)
        yield started


def cores() -> list[int]:
    """Return the cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def _serve(connection: Connection, name: str, threads: int) -> None:
    # Before torch or JAX is imported: both read these settings when they start.
    os.sched_setaffinity(0, cores()[:threads])
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several contenders share one GPU
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "float32"  # on a GPU, JAX would round the factors
    entry = CONTENDERS[name]
    contender: Contender | None = None
    value: Any
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        os.environ["TMPDIR"] = tempfile.tempdir = cache  # torch keeps its compiled headers there
        while True:
            try:
                method, args = connection.recv()
            except EOFError:
                return
            try:
                make = entry.load()  # the import is not timed
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
    """Return the peak memory of this process so far, in MB."""
    # Not getrusage: its peak starts from that of the parent process.
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e3
