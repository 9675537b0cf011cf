"""The names of objects: which object holds a name, and which waits for a name that another holds.

Each object's folder holds its names (posekit/store.py). A name moves by a single write, that of its new object. An
object that claims the name with a smaller revision has lost it, even while its file still lists the name.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import structlog

from posekit.errors import PoseError
from posekit.store import ObjectStore, StoredObject
from serve.objects.onboarding import Known

log = structlog.get_logger()


class Names:
    """The names of the known objects."""

    def __init__(self, store: ObjectStore, known: Mapping[str, Known]) -> None:
        self._store = store
        self._known = known
        self._holders: dict[str, str] = {}  # name -> the object that holds it
        self._waiting: dict[str, str] = {}  # name -> the object that takes it once it is ready
        self._outdated: dict[str, set[str]] = {}  # objects whose files still claim names that they have lost -> those
        self._revision = 0

    def holder(self, name: str) -> str | None:
        """Return the id of the object that holds a name; None if the name is free."""
        return self._holders.get(name)

    def kept_from(self, object_id: str, name: str) -> str | None:
        """Return the id of another object that holds a name or waits for it; None if `object_id` may have the name."""
        other = self._holders.get(name) or self._waiting.get(name)
        return None if other == object_id else other

    def next_revision(self) -> int:
        """Return a new revision, greater than all before, for the next write."""
        self._revision += 1
        return self._revision

    def reserve(self, name: str, object_id: str) -> None:
        """Keep a free name for an object that is about to be stored."""
        self._holders[name] = object_id

    def release(self, name: str, object_id: str) -> None:
        """Give up a reserved name if its object was never stored."""
        if self._holders.get(name) == object_id and object_id not in self._known:
            del self._holders[name]

    def learn(self, known: Known) -> None:
        """Record the names that an object claims. If two objects claim a name, the greater revision has it."""
        object_id, stored = known.stored.object_id, known.stored
        self._revision = max(self._revision, stored.revision)
        for claims, names in ((self._holders, stored.names), (self._waiting, stored.awaited)):
            for name in names:
                other = self._known.get(claims.get(name, object_id), known)
                if other.stored.revision > stored.revision:
                    self._lose(known, name)
                    continue
                claims[name] = object_id
                if other is not known:
                    self._lose(other, name)

    def settle_claims(self, known: Known) -> None:
        """Write the objects that lost a name to this one: without its file, theirs would claim the name again.

        Raises PoseError if that cannot be done now.
        """
        names = {*known.stored.names, *known.stored.awaited}
        for object_id, lost in tuple(self._outdated.items()):
            if not names.isdisjoint(lost):
                self._store.replace(self._known[object_id].stored)
                self._outdated.pop(object_id, None)

    def tidy(self) -> None:
        """Write the objects that lost a name. A failed write is logged and tried again by the next call."""
        for object_id in tuple(self._outdated):
            try:
                self._store.replace(self._known[object_id].stored)
            except PoseError as error:
                log.error("object_names_not_written", object_id=object_id, error=error.detail)
            else:
                self._outdated.pop(object_id, None)

    def change(self, known: Known, stored: StoredObject) -> None:
        """Write an object and its names, and take the names from other objects. PoseError: nothing has changed."""
        stored = msgspec.structs.replace(stored, revision=self.next_revision())
        self._store.replace(stored)
        self.forget(known)
        known.stored = stored
        self.learn(known)
        self.tidy()

    def wait_no_more(self, name: str, object_id: str) -> None:
        """Stop any object but `object_id` from waiting for a name, before that one takes it.

        Raises PoseError if the other object cannot be written: it waits on.
        """
        other = self._known.get(self._waiting.get(name, object_id))
        if other is not None and other.stored.object_id != object_id:
            awaited = [one for one in other.stored.awaited if one != name]
            self.change(other, msgspec.structs.replace(other.stored, awaited=awaited))

    def settle(self, known: Known, *, ready: bool) -> None:
        """Give an object the names that it waits for, in one step; if it is not `ready`, end the waiting instead."""
        names, object_id = known.stored.awaited, known.stored.object_id
        stored = msgspec.structs.replace(known.stored, awaited=[])
        if ready:
            stored = stored.named([*(name for name in stored.names if name not in names), *names])
        try:
            self.change(known, stored)
        except PoseError as error:
            log.error("object_names_not_written", object_id=object_id, error=error.detail)
            return
        known.missed = [] if ready else names
        log.info("object_names_moved" if ready else "object_names_kept", object_id=object_id, names=names)

    def forget(self, known: Known) -> None:
        """Free the names of an object that is gone."""
        object_id = known.stored.object_id
        self._outdated.pop(object_id, None)
        for claims, names in ((self._holders, known.stored.names), (self._waiting, known.stored.awaited)):
            for name in names:
                if claims.get(name) == object_id:
                    del claims[name]

    def _lose(self, known: Known, name: str) -> None:
        stored = known.stored.named([one for one in known.stored.names if one != name])
        known.stored = msgspec.structs.replace(stored, awaited=[one for one in stored.awaited if one != name])
        self._outdated.setdefault(stored.object_id, set()).add(name)
