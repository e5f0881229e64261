"""Chat templates as scripts ask for them, and columns brought to conversations."""

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset
from tests.data.conftest import ENDS, small_tokenizer

from gazelle.base.errors import DataError, ModelError, OptionError
from gazelle.data.chat import apply_chat_template, get_chat_template
from gazelle.data.headers import Headers, ResponseSpans, template_headers
from gazelle.data.sharegpt import standardize_sharegpt, to_sharegpt
from gazelle.data.templates import TEMPLATES, get_template

CHAT = [{"role": "user", "content": "U1"}, {"role": "assistant", "content": "A1"}, {"role": "user", "content": "U2"}]
SHAREGPT = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}


@pytest.fixture
def fresh() -> Callable[..., Any]:
    return lambda name="chatml", template=None: small_tokenizer(template, TEMPLATES[name], *ENDS[name])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_mapping_takes_both_spellings(name: str, fresh: Callable[..., Any]) -> None:
    plain = fresh(name, get_template(name)).apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    mapped = get_chat_template(fresh(name), name, mapping=SHAREGPT)
    others = [{"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]} for turn in CHAT]
    for messages in (CHAT, others):
        assert mapped.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == plain


def test_eos_system_and_pairs(fresh: Callable[..., Any]) -> None:
    tokenizer = fresh()
    tokenizer.eos_token = "<s>"
    assert get_chat_template(tokenizer, "chatml", map_eos_token=False).eos_token == "<s>"
    assert get_chat_template(tokenizer, "chatml", system_message='Say "no" – {{ 1 }}.').eos_token == "<|im_end|>"
    render = tokenizer.apply_chat_template
    assert render(CHAT[:1], tokenize=False) == \
        '<|im_start|>system\nSay "no" – {{ 1 }}.<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n'
    own = [{"role": "system", "content": "S"}, *CHAT[:1]]
    assert render(own, tokenize=False) == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n"
    pair = ("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}", "<|im_start|>")
    assert get_chat_template(tokenizer, pair).apply_chat_template(CHAT[:2], tokenize=False) == \
        "U1<|im_start|>A1<|im_start|>"
    with pytest.raises(ModelError, match="does not fit this tokenizer"):
        get_chat_template(fresh(), "llama-3")
    with pytest.raises(OptionError, match="names other things"):
        get_chat_template(fresh(), "chatml", mapping={"from": "role"})


TEXT = "Intro. {SYSTEM}\n\n### Q:\n{INPUT}\n\n### A:\n{OUTPUT}\n\n### Q:\n{INPUT}\n\n### A:\n{OUTPUT}"


def test_a_template_written_as_a_text(fresh: Callable[..., Any]) -> None:
    tokenizer = fresh()
    rows = [{"conversations": [*CHAT, {"role": "assistant", "content": "A2"}]},
            {"conversations": [{"role": "system", "content": "Be brief."}, *CHAT[:2]]}]
    made = apply_chat_template(rows, tokenizer, TEXT, default_system_message='He said "hm".\n')
    assert made["text"] == [
        'Intro. He said "hm".\n\n\n### Q:\nU1\n\n### A:\nA1<|im_end|>\n\n### Q:\nU2\n\n### A:\nA2<|im_end|>',
        "Intro. Be brief.\n\n### Q:\nU1\n\n### A:\nA1<|im_end|>"]
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True).endswith(
        "\n\n### Q:\nU2\n\n### A:\n")
    for wrong in (TEXT.replace("{OUTPUT}", "{ANSWER}"), TEXT.partition("\n\n### Q:\n{INPUT}\n\n### A:\n{OUTPUT}")[0],
                  TEXT[: -len("A:\n{OUTPUT}")] + "B:\n{OUTPUT}"):
        with pytest.raises(OptionError, match="two turns"):
            apply_chat_template(rows, tokenizer, wrong)


def test_sharegpt_is_brought_to_roles() -> None:
    rows = Dataset.from_list([
        {"conversations": [{"from": "人类", "value": "U"}, {"from": "gpt", "value": "A"}], "id": 1},
        {"conversations": [{"from": "asker", "value": "U"}, {"from": "assistant", "value": "A"}], "id": 2}])
    made = standardize_sharegpt(rows, aliases_for_user=["asker"])
    assert made["conversations"] == [[{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]] * 2
    assert made["id"] == [1, 2]
    assert standardize_sharegpt(made)["conversations"] == made["conversations"]
    with pytest.raises(DataError, match="row 2, message 1"):
        standardize_sharegpt(rows)
    with pytest.raises(DataError, match="no column of conversations"):
        standardize_sharegpt([{"text": "a"}])


def test_columns_become_a_question_and_an_answer() -> None:
    rows = [{"instruction": f"Do {n}.", "input": "" if n % 2 else f"with {n}", "output": f"Done {n}."}
            for n in range(6)]
    made = to_sharegpt(rows, "{instruction}[[\nInput:\n{input}]]", conversation_extension=3)
    assert made.column_names == ["conversations"]
    for number, chat in enumerate(made["conversations"]):
        assert [turn["from"] for turn in chat] == ["human", "gpt"] * 3
        assert chat[0]["value"] == f"Do {number}." + ("" if number % 2 else f"\nInput:\nwith {number}")
        assert chat[1]["value"] == f"Done {number}."
        for asked, answered in zip(chat[::2], chat[1::2], strict=True):
            assert asked["value"].split(".")[0].split()[1] == answered["value"].strip(".").split()[1]
    seconds = [chat[2]["value"][:5] for chat in made["conversations"]]
    assert sorted(seconds) == [f"Do {n}."[:5] for n in range(6)]  # every row once more
    with pytest.raises(OptionError, match="no such column"):
        to_sharegpt(rows, "{instructon}")
    with pytest.raises(OptionError, match="do not match"):
        to_sharegpt(rows, "{instruction}[[{input}")


@pytest.mark.parametrize(("name", "instruction", "response"), [
    ("chatml", "<|im_start|>user\n", "<|im_start|>assistant\n"),
    ("llama-3", "<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("gemma", "<start_of_turn>user\n", "<start_of_turn>model\n"), ("phi-3", "<|user|>\n", "<|assistant|>\n"),
    ("phi-4", "<|im_start|>user<|im_sep|>", "<|im_start|>assistant<|im_sep|>"), ("mistral", "[INST] ", "[/INST] ")])
def test_headers_of_templates(name: str, instruction: str, response: str, tokenizers: dict[str, Any]) -> None:
    assert template_headers(tokenizers[name]) == Headers(instruction, response)


def test_spans_by_headers(chatml: Any) -> None:
    text = chatml.apply_chat_template([*CHAT, {"role": "assistant", "content": "A2"}], tokenize=False)
    from gazelle.data.conversation import Conversation

    spans = ResponseSpans(template_headers(chatml), chatml)(Conversation((), "row 1", text=text))
    assert [text[start:end] for start, end in spans] == ["A1<|im_end|>", "A2<|im_end|>"]
    plain = Conversation((), "row 2", text="### Q:\na\n### A:\nb \n### Q:\nc\n### A:\nd")
    spans = ResponseSpans(Headers("### Q:\n", "### A:\n"), chatml)(plain)
    assert [str(plain.text)[start:end] for start, end in spans] == ["b \n", "d"]
