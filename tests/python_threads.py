"""Calls from several Python threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable


def call_in_threads(call: Callable[[], None], count: int = 5) -> None:
    """Runs `call` in `count` threads and waits for all of them."""
    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
