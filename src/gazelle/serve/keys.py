"""API keys: 256 random bits each, of which a file holds SHA-256 and name alone.

A hash without salt or delay is enough for keys of that size: there is no list of likely ones to try.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from gazelle.base.errors import OptionError, OutputError
from gazelle.base.files import staged_file

PREFIX = "gz-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_MOST = 1000  # names are labels of metrics


class Keys:
    """The keys of a file, to compare with.

    Args:
        hashes: hexadecimal SHA-256 of each key, by its name.
    """

    def __init__(self, hashes: Mapping[str, str]) -> None:
        self._hashes = [(name, bytes.fromhex(digest)) for name, digest in hashes.items()]

    def name_of(self, key: str) -> str | None:
        """The name of a key, or None. Takes equally long whichever it is, and if it is none."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for name, held in self._hashes:
            if hmac.compare_digest(digest, held):
                found = name
        return found

    @property
    def names(self) -> list[str]:
        """Of all keys."""
        return [name for name, _ in self._hashes]


def read_keys(path: Path) -> Keys:
    """The keys of a file that `add_key` wrote.

    Raises:
        OptionError: no such file, one that is damaged, or one without a key.
    """
    hashes = _read(path)
    if not hashes:
        raise OptionError("the file holds no key", where=str(path), found="nothing", expected="at least one",
                          fix=f"make one: gazelle serve-key NAME --file {path}")
    return Keys(hashes)


def add_key(path: Path, name: str) -> str:
    """Make a key, write its hash to the file, which is made if need be, and return the key: it is nowhere else.

    Raises:
        OptionError: a name that is taken or no name, or a file that is damaged.
        OutputError: the file cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise OptionError("this is no name for a key", where="NAME", found=name,
                          expected="at most 64 letters, digits, dots, dashes, underscores or @", fix="choose another")
    hashes = _read(path) if path.exists() else {}
    if name in hashes:
        raise OptionError("the name is taken", where=str(path), found=name, expected="a new name",
                          fix=f"choose another, or first: gazelle serve-key {name} --file {path} --revoke")
    if len(hashes) >= _MOST:
        raise OptionError("the file holds as many keys as it may", where=str(path), found=len(hashes),
                          expected=f"fewer than {_MOST}", fix="revoke some")
    key = PREFIX + secrets.token_urlsafe(32)
    _write(path, hashes | {name: hashlib.sha256(key.encode()).hexdigest()})
    return key


def revoke_key(path: Path, name: str) -> None:
    """Take a key out of the file. A server that runs knows it until it is started anew.

    Raises:
        OptionError: there is no such key.
    """
    hashes = _read(path)
    if name not in hashes:
        raise OptionError("there is no such key", where=str(path), found=name,
                          expected=", ".join(hashes) or "a name in the file", fix="check the name")
    _write(path, {held: digest for held, digest in hashes.items() if held != name})


def _read(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        hashes = {str(name): str(digest) for name, digest in content["keys"].items()}
    except FileNotFoundError as error:
        raise OptionError("no such file of keys", where=str(path), found="nothing", expected="a file of keys",
                          fix=f"make one: gazelle serve-key NAME --file {path}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OptionError("the file of keys cannot be read", where=str(path), found=str(error) or type(error).__name__,
                          expected='{"keys": {"NAME": "SHA-256 in hexadecimal digits"}}',
                          fix="make it anew with gazelle serve-key") from error
    for name, digest in hashes.items():
        if not _NAME.fullmatch(name) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise OptionError("an entry is no key", where=f"{path}, {name}", found="an entry of another form",
                              expected="a name, and SHA-256 in 64 hexadecimal digits",
                              fix="make it anew with gazelle serve-key")
    return hashes


def _write(path: Path, hashes: Mapping[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(path) as staging:
            staging.write_text(json.dumps({"keys": dict(hashes)}, indent=1) + "\n", encoding="utf-8")
        if os.name != "nt":
            path.chmod(0o600)
    except OSError as error:
        raise OutputError("the file of keys cannot be written", where=str(path), found=error.strerror or str(error),
                          expected="a place you may write to", fix="choose another file") from error
