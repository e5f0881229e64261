"""What a pass computes of one request."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass
class Row:
    """What a request has computed in a pass.

    Attributes:
        owner: the request, for runners that keep a cache for each.
        ids: C tokens.
        start: where the first of them stands.
        pages: of the request, enough for all its tokens.
        adapter: as in `Request`.
        wanted: whether the logits after its last token are.
    """

    owner: Hashable
    ids: Sequence[int]
    start: int
    pages: Sequence[int]
    adapter: str | None
    wanted: bool

    @property
    def stop(self) -> int:
        """Tokens of the request after the pass."""
        return self.start + len(self.ids)
