"""Sizes of memory as people write them."""

from typing import Any

import pytest

from gazelle.base.errors import OptionError
from gazelle.base.sizes import gigabytes, megabytes, parse_bytes


@pytest.mark.parametrize(("written", "size"), [
    ("12GB", 12 * 10**9), ("12GiB", 12 * 2**30), ("11.5GiB", 23 * 2**29), ("1.5 GB", 1_500_000_000),
    ("12 gb", 12 * 10**9), ("12gib", 12 * 2**30), ("12Gb", 12 * 10**9), ("  12GB\n", 12 * 10**9),
    ("12   GB", 12 * 10**9),
    ("12g", 12 * 10**9), ("12Gi", 12 * 2**30), ("512MB", 512 * 10**6), ("512MiB", 2**29), ("900000kB", 9 * 10**8),
    ("900000KiB", 900_000 * 2**10), ("2TB", 2 * 10**12), ("2TiB", 2**41), ("0.5GB", 5 * 10**8), ("007GB", 7 * 10**9),
])
def test_sizes_with_units(written: str, size: int) -> None:
    assert parse_bytes(written, "memory_budget") == size


@pytest.mark.parametrize("size", [2**20, 12 * 10**9, 2**40])
def test_whole_numbers_are_bytes(size: int) -> None:
    assert parse_bytes(size, "memory_budget") == size


@pytest.mark.parametrize("written", [
    12, 0, -1, 2**20 - 1, "12", "12.5", "0GB", "0.0 GiB", "0.0000001kB", "-5GB", "", "GB", "twelve", "12XB", "12GBB",
    "12G B", "1e3GB", "1,5GB", ".5GB", "12.GB", "12GB 3", "nan", "infGB", True, False, None, 12.5, [12], b"12GB",
], ids=repr)
def test_what_is_no_size_is_refused(written: Any) -> None:
    with pytest.raises(OptionError) as caught:
        parse_bytes(written, "memory_budget")
    assert caught.value.where == "memory_budget"
    assert str(caught.value).startswith("memory_budget: this is no size of memory")
    assert caught.value.found == repr(written)
    assert "GiB" in caught.value.expected
    assert caught.value.fix == 'write memory_budget="12GB"'


def test_the_option_is_named_as_the_user_wrote_it() -> None:
    with pytest.raises(OptionError, match=r'^--budget: (?s:.)*write --budget="12GB"'):
        parse_bytes("12", "--budget")


def test_sizes_of_files() -> None:
    assert [megabytes(size) for size in (0, 368, 99_999, 100_000, 269_060_552, 1_200_000_000)] == [
        "0.0 kB", "0.4 kB", "100.0 kB", "0.1 MB", "269.1 MB", "1.2 GB"]


def test_gigabytes() -> None:
    assert [gigabytes(size) for size in (0, 49_999_999, 12_345_678_901, 10**12)] == [
        "0.0 GB", "0.0 GB", "12.3 GB", "1000.0 GB"]
