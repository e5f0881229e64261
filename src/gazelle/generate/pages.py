"""Which page of the cache holds what: pages are given out, shared between requests that begin alike, and taken back.

A page holds the keys and values of `size` tokens. What a page holds is known by its tokens and by what comes before
them, exactly and not by a hash, so that no two prompts are ever taken for one another. A page that nobody uses keeps
its content until its room is needed.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence


class Pages:
    """Pages 0 … count - 1.

    Args:
        count: pages there are.
        size: tokens a page holds.
        share: whether requests that begin alike use the same pages.
    """

    def __init__(self, count: int, size: int, *, share: bool = True) -> None:
        self.count, self.size, self.share = count, size, share
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count
        self._idle: OrderedDict[int, None] = OrderedDict()  # known content and no user, longest unused first
        self._known: dict[Hashable, tuple[int, int]] = {}  # (what comes before, tokens) -> page, serial number
        self._key: dict[int, Hashable] = {}
        self._serial = 0

    @property
    def available(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that a request uses."""
        return self.count - self.available

    def match(self, ids: Sequence[int], root: Hashable) -> tuple[list[int], Hashable]:
        """Pages that hold the beginning of `ids`, now used once more, and what the next page comes after.

        At least one token is left over, because a request's last token has to be computed to go on from it.
        """
        found, before = [], root
        if self.share:
            for start in range(0, len(ids) - self.size, self.size):
                entry = self._known.get((before, tuple(ids[start:start + self.size])))
                if entry is None:
                    break
                page, before = entry
                self._idle.pop(page, None)
                self._users[page] += 1
                found.append(page)
        return found, before

    def take(self, number: int) -> list[int] | None:
        """`number` pages, or None if there are fewer."""
        if number > self.available:
            return None
        taken = []
        for _ in range(number):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._known[self._key.pop(page)]
            self._users[page] = 1
            taken.append(page)
        return taken

    def register(self, page: int, tokens: Sequence[int], before: Hashable) -> Hashable:
        """Say what a full page holds. Returns what the next page of the same request comes after."""
        if not self.share:
            return None
        key = (before, tuple(tokens))
        entry = self._known.get(key)
        if entry is None:
            self._serial += 1
            entry = self._known[key] = (page, self._serial)
            self._key[page] = key
        return entry[1]

    def release(self, pages: Sequence[int]) -> None:
        """Take pages back; the last of a request go first when room is needed."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._key:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def alone(self, pages: Sequence[int]) -> list[int]:
        """Those of `pages` that have one user."""
        return [page for page in pages if self._users[page] == 1]

    def forget(self) -> None:
        """Forget what pages hold, because it may be wrong."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._known.clear()
        self._key.clear()
