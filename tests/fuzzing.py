"""The number of examples per property: few in every run, more in long runs (`make test-long`)."""

from __future__ import annotations

import os


def examples(count: int) -> int:
    """Return `count` times the variable PEM_TEST_EXAMPLES (1 where it is not set)."""
    return count * int(os.environ.get("PEM_TEST_EXAMPLES", "1"))
