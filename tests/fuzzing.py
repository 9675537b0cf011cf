"""How many examples a property is tried on: few in every run, more where somebody has hours (`make test-long`)."""

from __future__ import annotations

import os


def examples(count: int) -> int:
    """Return `count` times the variable PEM_TEST_EXAMPLES (1 where it is not set)."""
    return count * int(os.environ.get("PEM_TEST_EXAMPLES", "1"))
