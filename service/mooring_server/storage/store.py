"""The store: subjects, jobs, adapters and API keys of all tenants in one database.

Synchronous and thread-safe; an asyncio caller wraps calls in `asyncio.to_thread`. Every method names the
tenant first and sees only that tenant's rows: what belongs to another looks like what does not exist.
"""

from __future__ import annotations

from mooring_server.storage.aliases import Aliases
from mooring_server.storage.batches import Batches
from mooring_server.storage.garbage import Garbage
from mooring_server.storage.keys import Keys
from mooring_server.storage.subjects import Subjects


class Store(Subjects, Aliases, Batches, Keys, Garbage):
    """Everything that is kept in SQL; `Store(url)` opens it and creates missing tables."""
