"""Whether what the rows name is there, and whether what is there is what was written.

For the moment after a restore, or after a disk or a bucket has failed. It reads every object once and changes
nothing; servers may run.

Not missed are a checkpoint (its job starts anew) and the results of ended jobs (they go after their time).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sqlalchemy import select

from mooring_server.errors import MooringError, Reason
from mooring_server.storage import schema
from mooring_server.storage.database import Database
from mooring_server.storage.objects import ObjectStore


@dataclass
class Verified:
    """What was found.

    Attributes:
        objects: read.
        size: their bytes.
        missing: keys that a photo's or an adapter's row names and that are not there.
        damaged: keys of objects that are not what was written.
    """

    objects: int = 0
    size: int = 0
    missing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def verify(store: Database, objects: ObjectStore) -> Verified:
    """Read every object, and look for those that rows name.

    Raises:
        MooringError: STORAGE_UNAVAILABLE.
    """
    found = Verified()
    for key in objects.list():
        try:
            found.size += len(objects.get(key))
        except KeyError:  # deleted since it was listed
            continue
        except MooringError as error:
            if error.reason is not Reason.OBJECT_DAMAGED:
                raise
            found.damaged.append(key)
        found.objects += 1
    with store.reading() as connection:
        photos, adapters = schema.photos.c, schema.adapters.c
        named = {*connection.scalars(select(photos.object_key))}
        named |= {*connection.scalars(select(adapters.object_key).where(adapters.delete_time.is_(None)))}
    # rows are read last, and each name looked up: what was written or deleted meanwhile is no loss
    found.missing = sorted(key for key in named if not objects.exists(key) and _still_named(store, key))
    return found


def _still_named(store: Database, key: str) -> bool:
    photos, adapters = schema.photos.c, schema.adapters.c
    with store.reading() as connection:
        rows = connection.scalars(
            select(photos.object_key)
            .where(photos.object_key == key)
            .union_all(
                select(adapters.object_key).where(adapters.object_key == key, adapters.delete_time.is_(None))
            )
        )
        return rows.first() is not None
