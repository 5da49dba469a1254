"""Encoded prompts of recent requests: campaigns repeat their prompts, and every guided request its negative.

The key holds everything the encoding depends on, the digest of text-encoder adapters and learned tokens
included: an encoding made with one adapter must never serve another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from mooring_server.engine.model import PromptEmbeds


class PromptCache:
    """Least recently used encodings, up to a number of bytes. The engine thread owns it.

    Args:
        max_bytes: of all tensors kept; 0 keeps none.

    Attributes:
        queries: look-ups so far.
        hits: look-ups that found something.
        bytes: kept now.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.queries = self.hits = self.bytes = 0
        self._kept: OrderedDict[Hashable, PromptEmbeds] = OrderedDict()

    def find(self, key: Hashable) -> PromptEmbeds | None:
        """The encoding, or None."""
        self.queries += 1
        found = self._kept.get(key)
        if found is not None:
            self.hits += 1
            self._kept.move_to_end(key)
        return found

    def put(self, key: Hashable, embeds: PromptEmbeds) -> None:
        """Keep an encoding that `find` did not find; the least recently used go where there is no room."""
        self._kept[key] = embeds
        self.bytes += _size(embeds)
        while self.bytes > self.max_bytes:
            self.bytes -= _size(self._kept.popitem(last=False)[1])


def _size(embeds: PromptEmbeds) -> int:
    return sum(tensor.nbytes for tensor in (embeds.hidden, embeds.pooled) if tensor is not None)
