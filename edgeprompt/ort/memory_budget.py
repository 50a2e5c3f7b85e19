"""Bytes that running batches of several threads share."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from edgeprompt.errors import CapacityError


class MemoryBudget:
    """Bytes that running batches share; who finds none left waits."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = total
        self._changed = threading.Condition()

    def taken(self, size: int) -> Share:
        """A context in which `size` bytes are this batch's.

        Raises:
            CapacityError: more than there is in all.
        """
        if size > self.total:
            raise CapacityError(
                f"the request needs {size} bytes of keys and values, kv_budget is {self.total}; "
                "raise it, or lower max_new_tokens, num_beams or the text's length"
            )
        return Share(self, size)

    def move(self, size: int) -> None:
        """Take `size` bytes (waits), or give them back where it is negative."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
            self._changed.notify_all()


@dataclass(frozen=True)
class Share:
    """Bytes taken for as long as the context lasts."""

    budget: MemoryBudget
    size: int

    def __enter__(self) -> None:
        self.budget.move(self.size)

    def __exit__(self, *_: object) -> None:
        self.budget.move(-self.size)
