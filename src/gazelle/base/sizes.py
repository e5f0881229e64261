"""Sizes of memory as people write them."""

import re

from gazelle.base.errors import OptionError

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)b?", re.IGNORECASE)


def parse_bytes(size: str | int, where: str) -> int:
    """Bytes of a size such as "12GB" (10^9), "12GiB" (2^30), or a whole number of bytes.

    Args:
        size: what the user wrote.
        where: the option's name, for the error.

    Raises:
        OptionError: it is no size, or not above zero.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 2**20:
        return size
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    bytes_ = 0 if found is None else int(float(found[1]) * _UNITS[found[2].lower()])
    if not bytes_:
        raise OptionError("this is no size of memory", where=where, found=repr(size),
                          expected='a size with its unit, such as "12GB" or "11.5GiB"', fix=f'write {where}="12GB"')
    return bytes_


def gigabytes(size: float) -> str:
    """Bytes as "12.3 GB"."""
    return f"{size / 1e9:.1f} GB"


def megabytes(size: float) -> str:
    """Bytes as "12.3 MB", from a gigabyte on as "12.3 GB", and below 100 kB as "12.3 kB"."""
    if size < 1e5:
        return f"{size / 1e3:.1f} kB"
    return gigabytes(size) if size >= 1e9 else f"{size / 1e6:.1f} MB"
