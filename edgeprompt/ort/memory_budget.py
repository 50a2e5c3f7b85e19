"""Bytes that the lanes of one engine share."""

from __future__ import annotations

import threading
from collections.abc import Hashable

from edgeprompt.errors import CapacityError


class MemoryBudget:
    """Bytes, and who holds how many of them. Nobody waits here: who finds none left asks again later."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._held: dict[Hashable, int] = {}
        self._lock = threading.Lock()

    def check(self, size: int) -> None:
        """Refuse what can never be held.

        Raises:
            CapacityError: more than there is in all.
        """
        if size > self.total:
            raise CapacityError(
                f"the request needs {size} bytes of keys and values, kv_budget is {self.total}; "
                "raise it, or lower max_new_tokens, num_beams or the text's length"
            )

    def resize(self, holder: Hashable, size: int) -> bool:
        """Let `holder` have `size` bytes in all; False, and nothing changed, where others hold too many."""
        with self._lock:
            others = sum(held for other, held in self._held.items() if other is not holder)
            if size and others + size > self.total:
                return False
            self._held[holder] = size
            return True

    @property
    def held(self) -> int:
        """Bytes that somebody holds."""
        return sum(self._held.values())
