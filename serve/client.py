"""Former home of the client, which is now `import pem` from the distribution pem-client. To be removed in 0.2."""

from __future__ import annotations

import warnings
from typing import Any

import pem.client

__all__ = list(pem.client.__all__)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'serve.client' has no attribute {name!r}")
    warnings.warn(f"serve.client is now the package pem: `import pem` and pem.{name}", DeprecationWarning, stacklevel=2)
    return getattr(pem.client, name)
