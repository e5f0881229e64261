"""Logging: one logger for the library, silent as a library and plain sentences on the command line."""

import logging
import sys

logger = logging.getLogger("gazelle")
logger.addHandler(logging.NullHandler())

_said: set[str] = set()


def say_once(message: str, level: int = logging.WARNING) -> None:
    """Log `message` the first time it comes up in this process, and not again."""
    if message not in _said:
        _said.add(message)
        logger.log(level, message)


def log_to_terminal(level: int = logging.INFO) -> None:
    """Send gazelle's messages to standard error, as the command line does. Calling it twice is harmless."""
    if any(isinstance(handler, logging.StreamHandler) for handler in logger.handlers):
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
