# SPDX-License-Identifier: Apache-2.0
"""Jobs in worker processes: results as they come, Ctrl-C for the main process alone, one line for a dead worker."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from facelab.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int,
    initializer: Callable[..., object] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Generator[Result, None, None]:
    """Results of ``work(job)`` in the order they are finished; closing the generator cancels what has not begun.

    Args:
        work: a function that can be pickled.
        jobs: its arguments.
        workers: processes; 1 works in this one, in the order of the jobs.
        initializer, initargs: called once in each worker process.

    Raises:
        UserError: a worker died.
    """
    if workers <= 1 or len(jobs) < 2:
        yield from map(work, jobs)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=initializer, initargs=initargs)
    try:
        with deaf_to_interrupts():  # workers start here and inherit it: Ctrl-C is for this process alone
            waiting: list[Future[Result]] = [pool.submit(work, job) for job in jobs]
        for done in as_completed(waiting):
            yield done.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died (out of memory?); give the same command again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes that start now ignore Ctrl-C, until they say otherwise, instead of telling of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
