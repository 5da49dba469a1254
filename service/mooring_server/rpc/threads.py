"""Threads for what blocks in calls: many for what is short, a few of their own for what is long.

`asyncio.to_thread` uses the event loop's pool, which every call needs to ask the database. By default it has
four threads more than the machine has processors: a few uploads of pictures that are slow to decode, or a few
large batch files, would fill it, and every call of every tenant would wait for them. So what may take seconds
(decoding, checking batch files, converting and reading adapters, reading stored files) runs here instead, and
of these threads one tenant gets at most half.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

CALL_THREADS = 32
"""Of the event loop's pool: they wait for the database more than they compute."""

LONG_THREADS = 8

P = ParamSpec("P")
T = TypeVar("T")


def for_calls() -> ThreadPoolExecutor:
    """The event loop's pool."""
    return ThreadPoolExecutor(CALL_THREADS, thread_name_prefix="mooring-call")


class LongWork:
    """Runs what takes long; use it on one event loop.

    Args:
        threads: at most so many pieces of work at a time; the others wait in the order in which they came.
    """

    def __init__(self, threads: int = LONG_THREADS) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mooring-long")
        self._share = max(1, threads // 2)
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def run(
        self, tenant: str, function: Callable[P, T], /, *arguments: P.args, **options: P.kwargs
    ) -> T:
        """As `asyncio.to_thread`, in the tenant's turn."""
        turn = self._turns.setdefault(tenant, asyncio.Semaphore(self._share))
        context = contextvars.copy_context()
        async with turn:
            return await asyncio.get_running_loop().run_in_executor(
                self._pool, partial(context.run, function, *arguments, **options)
            )

    def close(self) -> None:
        """Begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
