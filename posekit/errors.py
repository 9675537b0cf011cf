"""All errors of posekit, as one small tree. Each has a `code`, the word that names it everywhere else.

PoseError
  BadData             the bytes do not parse: a broken PNG, a mesh file that is no mesh
  TooLarge            a small file that decodes to something over its limit
  InvalidInput        it parses but is wrong: sizes that differ, a mesh without faces
    UnitsImplausible  lengths that only make sense in another unit
  StoreError          an object's folder on disk cannot be read or written
    StoreFull         no room left on the disk that holds the objects
  BrokenCheckpoint    a file of weights that is damaged, unsafe to read, or made for another network
"""

from __future__ import annotations

from typing import ClassVar


class PoseError(Exception):
    """Base of all errors that posekit raises on purpose.

    `detail` is a sentence for the client: what is wrong and, where it helps, what to do.
    `field` is the request field at fault (`"rgb_image"`, `"detections.masks[3]"`), or None.
    `code` is one of the codes in serve/errors.py, which maps it to a status. "internal" marks errors that no change of
    the request can avoid.
    """

    code: ClassVar[str] = "internal"

    def __init__(self, detail: str, field: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field


class BadData(PoseError):
    """The bytes cannot be parsed."""

    code = "bad_data"


class TooLarge(PoseError):
    """The decoded size would exceed a limit; raised before anything is decoded."""

    code = "too_large"


class InvalidInput(PoseError):
    """The input parses but is wrong."""

    code = "invalid"


class UnitsImplausible(InvalidInput):
    """Depth, mask and model fit each other only after a change of unit; `detail` says which."""

    code = "units"


class StoreError(PoseError):
    """An object's folder on disk cannot be read or written."""


class StoreFull(StoreError):
    """No room left on the disk that holds the objects."""

    code = "storage_full"


class BrokenCheckpoint(PoseError):
    """A file of weights that cannot be used: missing, damaged, unsafe to read, or made for another network."""
