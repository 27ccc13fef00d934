"""Call a function on many things from several threads, and stop them all cleanly."""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

Key, Item, Result = TypeVar("Key"), TypeVar("Item"), TypeVar("Result")


class Unasked(Exception):
    """Raised by a call that found `stop` set and did nothing; its item is left out."""


def in_threads(call: Callable[[Item], Result], items: Mapping[Key, Item], count: int,
               stop: threading.Event) -> Iterator[tuple[Key, Result]]:
    """Yield (key, result) as they come. Once `stop` is set, only what is under way is finished.

    An exception sets `stop`; it is raised when the others are through. The threads are daemons, so
    an interrupted program ends at once.

    >>> sorted(in_threads(str.upper, {1: "a", 2: "b"}, 2, threading.Event()))
    [(1, 'A'), (2, 'B')]
    """
    todo: queue.SimpleQueue = queue.SimpleQueue()
    done: queue.SimpleQueue = queue.SimpleQueue()
    for item in items.items():
        todo.put(item)
    running, first_error = min(count, len(items)), None
    for _ in range(running):
        threading.Thread(target=_work, args=(call, todo, done, stop), daemon=True).start()
    try:
        while running:
            ended, key, value = done.get()
            if ended:
                running -= 1
                first_error = first_error or value
            else:
                yield key, value
    finally:
        stop.set()
    if first_error:
        raise first_error


def _work(call: Callable, todo: queue.SimpleQueue, done: queue.SimpleQueue,
          stop: threading.Event) -> None:
    """Put (False, key, result) for each item, and at the end (True, None, error or None)."""
    error = None
    try:
        while not stop.is_set():
            key, item = todo.get_nowait()
            done.put((False, key, call(item)))
    except (queue.Empty, Unasked):
        pass
    except Exception as raised:  # whatever it is, for the caller's thread to raise
        error = raised
        stop.set()
    done.put((True, None, error))
