"""Every format from every kind of source gives the same ids, and the details of each format."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tests.data.conftest import load_data

from gazelle.base.errors import DataError, OptionError
from gazelle.data.encode import encode
from gazelle.data.formats import detect_format, to_conversations
from gazelle.data.load import load_conversations
from gazelle.data.read import Rows

SYSTEM, ASK, ANSWER = "Be brief.", 'Zażółć "gęślą", jaźń;\nwhat is\u2028that?', "A pangram,\n\nin Polish: 7 words. 🦌"
ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {"system": SYSTEM, "instruction": ASK, "input": "", "output": ANSWER},
    "sharegpt": {"conversations": [{"from": "system", "value": SYSTEM}, {"from": "human", "value": ASK},
                                   {"from": "gpt", "value": ANSWER}]},
    "messages": {"messages": [{"role": "developer", "content": SYSTEM}, {"role": "user", "content": ASK},
                              {"role": "assistant", "content": ANSWER}]},
    "prompt-completion": {"system": SYSTEM, "prompt": ASK, "completion": ANSWER},
    "question-answer": {"system": SYSTEM, "question": ASK, "answer": ANSWER},
}


def as_json(rows: list[dict], folder: Path) -> Path:
    (folder / "data.json").write_text(json.dumps({"version": 1, "data": rows}), encoding="utf-8-sig")
    return folder / "data.json"


def as_jsonl(rows: list[dict], folder: Path) -> Path:
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "data.jsonl").write_text(text, encoding="utf-8")
    return folder / "data.jsonl"


def as_csv(rows: list[dict], folder: Path, delimiter: str = ",", suffix: str = ".csv") -> Path:
    path = folder / f"data{suffix}"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: cell if isinstance(cell, str) else json.dumps(cell) for key, cell in row.items()})
    return path


def as_parquet(rows: list[dict], folder: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet")
    return folder / "data.parquet"


def as_folder(rows: list[dict], folder: Path) -> Path:
    """The first row as JSONL, the second as Parquet, a test split that must stay out."""
    as_jsonl(rows[:1], folder).rename(folder / "train-a.jsonl")
    as_parquet(rows[1:], folder).rename(folder / "train-b.parquet")
    (folder / "test.jsonl").write_text('{"text": "held out"}')
    return folder


SOURCES = {
    "json": as_json, "jsonl": as_jsonl, "csv": as_csv, "parquet": as_parquet, "folder": as_folder,
    "semicolons": lambda rows, folder: as_csv(rows, folder, ";"),
    "tsv": lambda rows, folder: as_csv(rows, folder, "\t", ".tsv"),
    "list": lambda rows, folder: rows,
    "Dataset": lambda rows, folder: datasets.Dataset.from_list(rows),
    "DatasetDict": lambda rows, folder: datasets.DatasetDict(train=datasets.Dataset.from_list(rows)),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ROWS)
def test_same_ids_whatever_the_source(name: str, source: str, chatml: Any, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ASK},
             {"role": "assistant", "content": ANSWER}]
    expected = chatml(chatml.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    encoded = load_data(SOURCES[source]([ROWS[name]] * 2, tmp_path), chatml, max_length=500)
    assert encoded.format == name
    assert [example.input_ids.tolist() for example in encoded.examples] == [expected, expected]
    assert [label for label in encoded.examples[0].labels if label >= 0] == chatml(ANSWER + "<|im_end|>")["input_ids"]


@pytest.mark.parametrize("source", SOURCES)
def test_texts_from_every_source(source: str, chatml: Any, tmp_path: Path) -> None:
    encoded = load_data(SOURCES[source]([{"text": ASK}, {"text": ANSWER}], tmp_path), chatml, max_length=500)
    expected = [[*chatml(text)["input_ids"], chatml.eos_token_id] for text in (ASK, ANSWER)]
    assert [example.input_ids.tolist() for example in encoded.examples] == expected


def test_a_text_file_is_one_row(chatml: Any, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("Once.\n\nTwice.", encoding="utf-8")
    (example,) = load_data(tmp_path / "story.txt", chatml, max_length=500).examples
    assert chatml.decode(example.input_ids) == "Once.\n\nTwice.<|im_end|>"


def roles(row: dict[str, Any], **options: Any) -> list[tuple[str, str]]:
    (conversation,) = to_conversations([(row, "row 1")], **options)
    return [(turn.role, turn.content) for turn in conversation.turns]


def test_alpaca_input_and_history() -> None:
    row = {"instruction": "Add.", "input": "1 + 1", "output": "2", "history": [["Hi", "Hello"]]}
    assert roles(row) == [("user", "Hi"), ("assistant", "Hello"), ("user", "Add.\n\n1 + 1"), ("assistant", "2")]
    assert roles({"instruction": "Add.", "context": None, "response": "2"}) == [("user", "Add."), ("assistant", "2")]


def test_columns_name_the_users_columns() -> None:
    row = {"frage": "Wo?", "antwort": "Hier.", "text": "already rendered"}
    expected = [("user", "Wo?"), ("assistant", "Hier.")]
    assert roles(row, columns={"instruction": "frage", "output": "antwort"}) == expected
    assert roles(row, columns={"question": "frage", "answer": "antwort"}) == expected
    (conversation,) = to_conversations([(row, "row 1")], columns={"text": "antwort"})
    assert conversation.text == "Hier."


def test_every_sharegpt_role() -> None:
    names = ["系统", "人类", "助手", "human", "function_call", "observation", "gpt"]
    call = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    row = {"conversation": [{"from": name, "value": call if name == "function_call" else name} for name in names]}
    (conversation,) = to_conversations([(row, "row 1")])
    assert [turn.role for turn in conversation.turns] == ["system", "user", "assistant", "user", "assistant", "tool",
                                                          "assistant"]
    assert conversation.messages()[4]["tool_calls"] == [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]


def test_openai_messages() -> None:
    row = {"tools": json.dumps([{"type": "function", "function": {"name": "add"}}]), "messages": [
        {"role": "user", "content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "7", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"role": "function", "content": "2", "tool_call_id": "7", "name": None},
        {"role": "assistant", "content": "Two?", "weight": 0}, {"role": "assistant", "content": "Two.", "weight": 1}]}
    (conversation,) = to_conversations([(row, "row 1")])
    assert conversation.tools == ({"type": "function", "function": {"name": "add"}},)
    user, call, tool, wrong, right = conversation.turns
    assert user.content == "1 + 1?"
    assert call.extra["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert tool.role == "tool"
    assert dict(tool.extra) == {"tool_call_id": "7"}
    assert (wrong.labelled, right.labelled) == (False, True)


def test_answers_inside_a_prompt_are_not_labelled() -> None:
    row = {"prompt": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "one"},
                      {"role": "user", "content": "2?"}], "completion": [{"role": "assistant", "content": "two"}]}
    (conversation,) = to_conversations([(row, "row 1")])
    assert [turn.labelled for turn in conversation.turns] == [False, False, False, True]
    written = {key: json.dumps(cell) for key, cell in row.items()}
    assert to_conversations([(written, "row 1")]) == [conversation]


def test_system_option_fills_only_gaps() -> None:
    own = {"system": "Mine.", "question": "a", "answer": "b"}
    assert roles(own, system="Yours.")[0] == ("system", "Mine.")
    assert roles({"question": "a", "answer": "b"}, system="Yours.")[0] == ("system", "Yours.")


def test_extra_and_missing_optional_columns_do_not_matter() -> None:
    rows = [({"instruction": "a", "output": "b", "id": 7}, "row 1"),
            ({"instruction": "a", "output": "b", "input": "c"}, "row 2")]
    assert detect_format(rows) == "alpaca"
    assert detect_format([({"messages": [], "text": "", "prompt": ""}, "row 1")]) == "messages"


@pytest.mark.parametrize("function", [
    lambda row: f"Q: {row['q'].strip()}",
    lambda row: [f"Q: {row['q']}"],
    lambda rows: [f"Q: {q}" for q in rows["q"]],
], ids=["one text", "a list of one text", "batched"])
@pytest.mark.parametrize("count", [1, 2, 1001])
def test_formatting_func_of_either_style(function: Any, count: int) -> None:
    rows = Rows([({"q": str(number)}, f"row {number}") for number in range(count)], "list")
    conversations = to_conversations(rows, formatting_func=function)
    assert [row.text for row in conversations] == [f"Q: {number}" for number in range(count)]
    assert conversations[-1].where == f"row {count - 1}"


def test_formatting_func_must_return_texts() -> None:
    for function in (lambda row: 7, lambda row: ["a", "b", "c"], lambda row: ""):
        with pytest.raises(DataError, match="formatting_func"):
            to_conversations([({"q": "a"}, "row 1")], formatting_func=function)


@pytest.mark.parametrize("function", [lambda row: f"Q: {row['q'].strip()}",
                                      lambda rows: ["Q: " + q.strip() for q in rows["q"]]], ids=["rows", "batches"])
def test_formatting_func_that_fails_names_the_row(function: Any) -> None:
    rows: list[Any] = [({"q": "a"}, f"row {number}") for number in range(1, 5)]
    rows[2][0]["q"] = None
    with pytest.raises(DataError, match="formatting_func fails") as caught:
        to_conversations(rows, formatting_func=function)
    assert caught.value.where == "row 3"
    assert "AttributeError" in caught.value.found
    assert isinstance(caught.value.__cause__, AttributeError)


CALLS = [{"messages": [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": name, "arguments": arguments}}]}], "tools": [
        {"type": "function", "function": {"name": name, "parameters": {
            "type": "object", "properties": {key: {"type": "string"} for key in arguments}}}}]}
         for name, arguments in (("town", {"city": "Oslo"}), ("point", {"lat": 1.5, "near": {"km": "2"}}))]


@pytest.mark.parametrize("source", ["Dataset", "parquet"])
def test_fields_that_arrow_fills_in_are_left_out(source: str, tokenizers: dict[str, Any], tmp_path: Path) -> None:
    expected, filled = (load_data(rows, tokenizers["qwen"], max_length=2000)
                        for rows in (CALLS, SOURCES[source](CALLS, tmp_path)))
    assert filled.examples[0].input_ids == expected.examples[0].input_ids
    assert filled.examples[1].input_ids == expected.examples[1].input_ids
    explicit = [{**CALLS[0], "tools": [{"default": None}]}]  # a list means what it says
    assert to_conversations([(explicit[0], "row 1")])[0].tools == ({"default": None},)


def test_tables_that_pandas_read_from_parquet(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    records = pandas.read_parquet(as_parquet(CALLS, tmp_path)).to_dict("records")
    assert not isinstance(records[0]["messages"], list)
    expected, read = (load_data(rows, tokenizers["qwen"], max_length=2000) for rows in (CALLS, records))
    assert [row.input_ids for row in read.examples] == [row.input_ids for row in expected.examples]


@pytest.mark.parametrize("text", ['[{"name":"Bob"}]', '[{"from": "Oslo", "to": "Rome"}]', '[{"a"', "[1]", "[ok]",
                                  '[{"a":' * 100_000])
def test_json_arrays_that_are_ordinary_texts(text: str) -> None:
    assert roles({"prompt": text, "completion": text}) == [("user", text), ("assistant", text)]


def test_context_and_system_prompt_columns() -> None:
    row = {"question": "Who?", "context": "Bob was here.", "answer": "Bob", "system_prompt": "Be brief."}
    assert roles(row) == [("system", "Be brief."), ("user", "Who?\n\nBob was here."), ("assistant", "Bob")]
    assert roles({**row, "context": None, "system_prompt": ""}) == [("user", "Who?"), ("assistant", "Bob")]


def test_columns_not_used() -> None:
    rows = [{"id": 1, "question": "a", "answer": "b", "system": "c"},
            {"id": 2, "question": "a", "answer": "b", "system": "c", "system_prompt": "d", "fact": "e"}]
    assert load_conversations(rows).unused == ("id", "system_prompt", "fact")
    assert load_conversations([{"text": "a", "system": "b"}]).unused == ("system",)
    assert load_conversations([{"a": "x"}], columns={"text": "a"}).unused == ()
    assert load_conversations(rows, formatting_func=lambda row: "x").unused == ()


def test_a_system_prompt_for_texts_is_refused() -> None:
    for options in ({}, {"formatting_func": lambda row: "x"}):
        with pytest.raises(OptionError, match="no system prompt") as caught:
            load_conversations([{"text": "a"}], system="Be brief.", **options)
        assert caught.value.where == "system"
        assert caught.value.fix


def test_conversations_and_texts_in_one_list(chatml: Any) -> None:
    chat = to_conversations([({"question": "a", "answer": "b"}, "row 1")])
    text = to_conversations([({"text": "plain"}, "row 2")])
    assert [example.where for example in encode(chat + text + chat, chatml, max_length=50).examples] == [
        "row 1", "row 2", "row 1"]
