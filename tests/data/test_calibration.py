"""Rows to calibrate with are those of training, and no more of them than asked for."""

import json

import pytest
import torch

from gazelle.base.errors import DataError, OptionError
from gazelle.data.calibration import calibration_ids, source_name
from gazelle.data.load import load_conversations

CHATS = [{"messages": [{"role": "user", "content": f"question {number}"},
                       {"role": "assistant", "content": f"answer {number}"}]} for number in range(10)]


def test_conversations_are_rendered_with_the_template(chatml, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    for data in (path, str(path), CHATS):
        ids = calibration_ids(data, chatml, rows=5)
        want = [chatml.apply_chat_template(CHATS[number]["messages"], return_dict=True)["input_ids"]
                for number in (0, 2, 4, 6, 8)]
        assert [row.tolist() for row in ids] == want
        assert all(row.dtype == torch.int64 for row in ids)
    assert [len(row) for row in calibration_ids(CHATS, chatml, length=7)] == [7] * 10


def test_a_long_text_gives_many_rows(chatml):
    text = "all work and no play " * 200
    whole = chatml(text)["input_ids"] + [chatml.eos_token_id]
    ids = calibration_ids([{"text": text}], chatml, length=100)
    assert torch.cat(ids).tolist() == whole
    assert max(map(len, ids)) <= 100
    fewer = calibration_ids([{"text": text}], chatml, length=100, rows=3)
    assert len(fewer) == 3 and torch.equal(fewer[0], ids[0]) and torch.equal(fewer[2], ids[2 * len(ids) // 3])


def test_what_cannot_be_calibrated_with(chatml):
    with pytest.raises(OptionError, match="nothing to calibrate with"):
        calibration_ids(None, chatml)
    with pytest.raises(OptionError, match="out of range"):
        calibration_ids(CHATS, chatml, rows=0)
    with pytest.raises(OptionError, match="out of range"):
        calibration_ids(CHATS, chatml, length=1)
    with pytest.raises(DataError):
        calibration_ids([], chatml)


def test_the_name_of_a_source_has_no_folders(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    path = str(tmp_path / "rows.jsonl")
    assert source_name(path) == source_name(tmp_path / "rows.jsonl") == "rows.jsonl"
    assert source_name(load_conversations(path)) == "rows.jsonl"
    assert source_name("org/rows") == "org/rows"
    assert source_name([{"text": "a"}]) == "list"
