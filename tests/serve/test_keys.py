"""API keys: nowhere but in their owner's hands."""

import hashlib
import json
from pathlib import Path

import pytest

from gazelle.__main__ import main
from gazelle.base.errors import OptionError
from gazelle.serve.keys import add_key, read_keys, revoke_key


def test_a_file_holds_hashes_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "keys.json"
    keys = {name: add_key(path, name) for name in ("alice", "bob")}
    text = path.read_text()
    assert not any(key in text or key[3:] in text for key in keys.values())
    assert json.loads(text)["keys"]["alice"] == hashlib.sha256(keys["alice"].encode()).hexdigest()
    assert path.stat().st_mode & 0o777 == 0o600
    held = read_keys(path)
    assert {name: held.name_of(key) for name, key in keys.items()} == {"alice": "alice", "bob": "bob"}
    digest = json.loads(text)["keys"]["bob"]
    for wrong in ("", "gz-", keys["alice"][:-1], keys["alice"] + "x", "ключ", "\udcff", digest):
        assert held.name_of(wrong) is None
    revoke_key(path, "alice")
    assert read_keys(path).names == ["bob"]


def test_mistakes_are_told(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with pytest.raises(OptionError, match="no such file"):
        read_keys(path)
    add_key(path, "alice")
    for name in ("alice", "", "a b", "../x", "x" * 65, "a\n"):
        with pytest.raises(OptionError):
            add_key(path, name)
    with pytest.raises(OptionError, match="no such key"):
        revoke_key(path, "bob")
    for content in ("", "[]", '{"keys": 3}', '{"keys": {"a": "00"}}', '{"keys": {"a/b": "' + "0" * 64 + '"}}',
                    '{"keys": {}}'):
        path.write_text(content)
        with pytest.raises(OptionError):
            read_keys(path)


def test_the_command_prints_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    assert main(["serve-key", "alice", "--file", str(path)]) == 0
    printed = capsys.readouterr()
    assert read_keys(path).name_of(printed.out.strip()) == "alice"
    assert printed.out.strip() not in printed.err
    assert main(["serve-key", "alice", "--file", str(path)]) == 2
    assert main(["serve-key", "alice", "--file", str(path), "--revoke"]) == 0
    assert main(["serve-key", "alice", "--file", str(path), "--revoke"]) == 2
