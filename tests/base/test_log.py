"""Messages to a terminal that is gone."""

import io
import logging

import pytest

from gazelle.base.log import _Terminal


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError("nobody reads")


def test_a_terminal_that_was_closed_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Closed())
    _Terminal().handle(logging.makeLogRecord({"msg": "said to nobody"}))
