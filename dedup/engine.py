"""Run one function over many tasks, in this process or in several. Correctness never depends on which.

Tasks are pure functions of their arguments and write their own output; results come back in the order of the tasks.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


def available_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run[T](function: Callable[..., T], tasks: Iterable[tuple], *, jobs: int) -> Iterator[T]:
    """`function(*task)` for every task, results in order; `jobs` processes with one thread each, or this one alone."""
    if jobs <= 1:
        for task in tasks:
            yield function(*task)
        return
    context = multiprocessing.get_context("spawn")  # fork deadlocks under the threads of polars and BLAS
    with _one_thread_each(), ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(function, *task) for task in tasks]
        try:
            for future in futures:
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Children started here read these variables when they import numpy, cv2 and polars.

    Several processes with several threads each make every one of them slower.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
