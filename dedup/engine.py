"""Run one function over many tasks, in this process or in several; on several machines: `cluster`.

Correctness never depends on which. Tasks are pure functions of their arguments; results come back in their order.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Self

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"), "1")


def available_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall time of the block to `seconds[stage]`."""
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0) + time.perf_counter() - start


class WorkerError(OSError):
    """A worker process has died."""


class Workers:
    """`jobs` processes with one thread each, started with the first work for several and kept until the end."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs or available_cpus()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run[T](self, function: Callable[..., T], tasks: Iterable[tuple], *, gpu: bool = False) -> Iterator[T]:
        """`function(*task)` for every task, results in order.

        gpu: each task takes one if there are any; only on a cluster, the processes of one machine share theirs.
        """
        tasks = list(tasks)
        if self.jobs <= 1 or len(tasks) <= 1:
            for task in tasks:
                yield function(*task)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # fork deadlocks under the threads of polars and BLAS
            self._pool = ProcessPoolExecutor(self.jobs, mp_context=context, initializer=_end_with_parent)
        with one_thread_each():
            futures = [self._pool.submit(function, *task) for task in tasks]
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool as error:
            raise WorkerError("a worker process was killed: out of memory? Try fewer --jobs") from error


def run[T](function: Callable[..., T], tasks: Iterable[tuple], *, jobs: int) -> Iterator[T]:
    """As `Workers.run`, with workers for these tasks alone."""
    with Workers(jobs) as workers:
        yield from workers.run(function, tasks)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for ever, and might write beside the next run."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Processes that are started here read these variables when they import numpy, cv2 and polars.

    Several processes with several threads each make every one of them slower.
    """
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
