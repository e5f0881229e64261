"""Logging: one logger for the library, silent as a library and plain sentences on the command line."""

import logging
import sys

logger = logging.getLogger("gazelle")
logger.addHandler(logging.NullHandler())

# On a CPU, each import of bitsandbytes advises to install a package that we do without.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_said: set[str] = set()


def say_once(message: str, level: int = logging.WARNING) -> None:
    """Log `message` the first time it comes up in this process, and not again."""
    if message not in _said:
        _said.add(message)
        logger.log(level, message)


class _Terminal(logging.Handler):
    """Writes to whatever standard error is at the time, which a notebook or a test may exchange."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
        except OSError:  # a terminal that was closed ends no run, and no server
            self.handleError(record)


def log_to_terminal(level: int = logging.INFO) -> None:
    """Send gazelle's messages to standard error, unless the program has set up logging itself."""
    own = [handler for handler in logger.handlers if not isinstance(handler, logging.NullHandler)]
    if own or logging.getLogger().handlers:
        return
    logger.addHandler(_Terminal())
    logger.setLevel(level)
