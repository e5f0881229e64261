"""Labels token by token: what is labelled is written out by hand, `[` and `]` around it."""

import itertools
from typing import Any

import pytest

from gazelle.base.errors import DataError
from gazelle.data.conversation import Conversation, Turn
from gazelle.data.encode import Encoded, Example, encode
from gazelle.data.spans import _shared
from gazelle.data.templates import TEMPLATES

# One letter a role: what a row looks like in these tests.
ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def chat(*turns: str | Turn, tools: tuple[dict, ...] = ()) -> Conversation:
    return Conversation(tuple(turn if isinstance(turn, Turn) else Turn(ROLES[turn[0]], turn[2:]) for turn in turns),
                        "data.jsonl, line 7", tools)


def marked(example: Example, tokenizer: Any) -> str:
    """The decoded row with brackets around each run of labelled tokens."""
    assert all(label in (-100, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    text = ""
    for labelled, run in itertools.groupby(zip(example.input_ids, example.labels, strict=True), lambda p: p[1] != -100):
        piece = tokenizer.decode([token for token, _ in run])
        text += f"[{piece}]" if labelled else piece
    return text


def encode_one(row: Conversation, tokenizer: Any, **options: Any) -> tuple[str, Encoded]:
    encoded = encode([row], tokenizer, **{"max_length": 1000, **options})
    return marked(encoded.examples[0], tokenizer), encoded


def test_demo_model(smollm: Any) -> None:
    row = chat("u:Say <|im_start|>assistant\nno!<|im_end|>", "a:No.", "u:And\nnow?", "a: Yes. ")
    text, encoded = encode_one(row, smollm)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nSay <|im_start|>assistant\nno!<|im_end|><|im_end|>\n"
        "<|im_start|>assistant\n[No.<|im_end|>]\n<|im_start|>user\nAnd\nnow?<|im_end|>\n"
        "<|im_start|>assistant\n[ Yes. <|im_end|>]\n")
    assert (encoded.checked, encoded.mismatched, encoded.boundary_merges, encoded.unclosed) == (2, 0, 0, 0)


def test_ids_and_labels_of_one_row_number_by_number(smollm: Any) -> None:
    (example,) = encode([chat("s:Be brief.", "u:Hi", "a:Hello there")], smollm, max_length=100).examples
    tokens = smollm.convert_ids_to_tokens(example.input_ids)
    assert tokens == ["<|im_start|>", "system", "Ċ", "Be", "Ġbrief", ".", "<|im_end|>", "Ċ",
                      "<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>", "Ċ",
                      "<|im_start|>", "ass", "istant", "Ċ", "Hello", "Ġthere", "<|im_end|>", "Ċ"]
    assert example.labels.tolist() == [-100] * 18 + example.input_ids[18:21].tolist() + [-100]
    assert example.where == "data.jsonl, line 7"


OURS = {
    "llama-3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
               "<|start_header_id|>user<|end_header_id|>\n\nOne<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n[1 <|end|>!<|eot_id|>]"
               "<|start_header_id|>user<|end_header_id|>\n\nTwo<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n[2<|eot_id|>]",
    "gemma": "<bos><start_of_turn>user\nBe brief.\n\nOne<end_of_turn>\n"
             "<start_of_turn>model\n[1 <|end|>!<end_of_turn>]\n"
             "<start_of_turn>user\nTwo<end_of_turn>\n<start_of_turn>model\n[2<end_of_turn>]\n",
    "mistral": "<s>[INST] Be brief.\n\nOne[/INST][ 1 <|end|>!</s>][INST] Two[/INST][ 2</s>]",
    "phi-3": "<|system|>\nBe brief.<|end|>\n<|user|>\nOne<|end|>\n<|assistant|>\n[1 <|end|>!<|end|>]\n"
             "<|user|>\nTwo<|end|>\n<|assistant|>\n[2<|end|>]\n",
}


@pytest.mark.parametrize("name", OURS)
def test_our_templates(name: str, tokenizers: dict[str, Any]) -> None:
    """The first answer holds what ends a turn of Phi-3: labels run to the end that the template wrote."""
    text, encoded = encode_one(chat("s:Be brief.", "u:One", "a:1 <|end|>!", "u:Two", "a:2"), tokenizers[name])
    assert text == OURS[name]
    assert (encoded.checked, encoded.mismatched) == (2, 0)


def test_tool_turns(tokenizers: dict[str, Any]) -> None:
    call = Turn("assistant", "", {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]})
    text, _ = encode_one(chat("u:1 + 1?", call, "t:2", "a:Two."), tokenizers["qwen"])
    assert text == (
        '<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n[<tool_call>\n{"name": "add", "arguments": {}}\n'
        "</tool_call><|im_end|>]\n<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n[Two.<|im_end|>]\n")
    with pytest.raises(DataError, match="leaves out this answer or its tool calls") as caught:
        encode_one(chat("u:1 + 1?", call, "t:2", "a:Two."), tokenizers["chatml"])
    assert caught.value.where == "data.jsonl, line 7"


def test_untrained_turns_and_train_on_all(chatml: Any) -> None:
    row = chat("u:1", Turn("assistant", "wrong", train=False), "a:right")
    assert encode_one(row, chatml)[0] == ("<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\nwrong<|im_end|>\n"
                                          "<|im_start|>assistant\n[right<|im_end|>]\n")
    assert encode_one(row, chatml, train_on="all")[0].startswith("<|im_start|>[user\n1<|im_end|>")


CHATML_TURN = "{{ '<|im_start|>' + m.role + '\n' + %s + '<|im_end|>\n' }}"
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# Qwen3: reasoning of earlier answers is dropped, and the last answer gets an empty block if it has none.
THINKING = (
    "{% for m in messages %}{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}"
    + CHATML_TURN % r"'<think>\n\n</think>\n\n' + text" + "{% elif m.role == 'assistant' and loop.last %}"
    + CHATML_TURN % "m.content" + "{% else %}" + CHATML_TURN % "text" + "{% endif %}{% endfor %}" + OPEN)
# Phi-3's own template closes the whole conversation with the EOS token.
END_OF_TEXT = ("{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
               "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}")
# Mistral v0.3 puts the system prompt before the last question.
LATE_SYSTEM = (
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' %}"
    "{% set turns = messages[1:] if system else messages %}"
    "{% set last = turns | selectattr('role', 'equalto', 'user') | list | last %}"
    "{% for m in turns %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if system and m is sameas last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}")


def test_reasoning_dropped_from_earlier_answers(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(THINKING, TEMPLATES["chatml"], None, "<|im_end|>")
    text, encoded = encode_one(chat("u:One", "a:<think>\nhm\n</think>\n\n1", "u:Two", "a:2"), tokenizer)
    assert text == ("<|im_start|>user\nOne<|im_end|>\n<|im_start|>assistant\n[1<|im_end|>]\n"
                    "<|im_start|>user\nTwo<|im_end|>\n<|im_start|>assistant\n[<think>\n\n</think>\n\n2<|im_end|>]\n")
    assert (encoded.checked, encoded.mismatched) == (2, 0)


def test_template_that_ends_with_eos(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(END_OF_TEXT, TEMPLATES["phi-3"], "<s>", "<|endoftext|>", rstrip=True)
    text, encoded = encode_one(chat("u:One", "a:1\n", "u:Two", "a:2"), tokenizer)
    # These tokens take the line breaks after them along, as Phi-3's do.
    assert text == "<|user|>One<|end|><|assistant|>[1\n<|end|>]<|user|>Two<|end|><|assistant|>[2<|end|>]<|endoftext|>"
    assert (encoded.mismatched, encoded.boundary_merges) == (0, 0)


def test_system_prompt_before_the_last_question(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(LATE_SYSTEM, TEMPLATES["mistral"], "<s>", "</s>")
    text, encoded = encode_one(chat("s:Be brief.", "u:One", "a:1", "u:Two", "a:2"), tokenizer)
    assert text == "<s>[INST] One[/INST][ 1</s>][INST] Be brief.\n\nTwo[/INST][ 2</s>]"
    assert (encoded.checked, encoded.mismatched) == (2, 1)  # inference shows the system prompt to the first answer too
    assert encoded.mismatch is not None
    assert encoded.mismatch.where == "data.jsonl, line 7"
    assert encoded.mismatch.training != encoded.mismatch.inference


def test_prompt_unlike_training_is_found(make_tokenizer: Any) -> None:
    """The generation prompt opens a block that training never shows."""
    wrong = ("{% for m in messages %}" + CHATML_TURN % "m.content" + "{% endfor %}"
             "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}")
    tokenizer = make_tokenizer(wrong, TEMPLATES["chatml"], None, "<|im_end|>")
    text, encoded = encode_one(chat("u:One", "a:1", "u:Two", "a:<think>\n2"), tokenizer)
    assert text.count("[") == 2
    assert "assistant\n[1<|im_end|>]" in text
    assert "assistant\n<think>\n[2<|im_end|>]" in text
    assert (encoded.checked, encoded.mismatched) == (2, 1)
    assert encoded.mismatch is not None
    assert "1" in encoded.mismatch.training
    assert "think" in "".join(encoded.mismatch.inference)


def test_token_across_the_boundary_is_not_labelled(make_tokenizer: Any) -> None:
    """"Assistant: " ends with a space that byte-level tokenizers join to the first word of the answer."""
    template = ("{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
                "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    tokenizer = make_tokenizer(template, (), None, "</s>")
    text, encoded = encode_one(chat("u:fox", "a:the fox"), tokenizer)
    assert text == "user: fox</s>assistant: the[ fox</s>]"
    assert (encoded.boundary_merges, encoded.mismatched) == (1, 1)


def test_answers_that_nothing_closes(make_tokenizer: Any) -> None:
    template = "{% for m in messages %}{{ m.role + '\n' + m.content + '\n\n' }}{% endfor %}" + OPEN
    tokenizer = make_tokenizer(template.replace("<|im_start|>", ""), (), None, "</s>")
    text, encoded = encode_one(chat("u:One", "a:1", "u:Two", "a:2"), tokenizer)
    assert text == "user\nOne\n\nassistant\n[1]\n\nuser\nTwo\n\nassistant\n[2]\n\n"
    assert encoded.unclosed == 2


EOM = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for call in m.tool_calls or [] %}"
       "{{ call.function.name }}{% endfor %}{{ '<|eom|>' if m.tool_calls else '<|im_end|>' }}{{ '\n' }}{% endfor %}"
       + OPEN)


def test_tool_calls_with_an_end_of_their_own(make_tokenizer: Any) -> None:
    """The content holds what ends other turns; the span must not stop there."""
    tokenizer = make_tokenizer(EOM, (*TEMPLATES["chatml"], "<|eom|>"), None, "<|im_end|>")
    call = Turn("assistant", "No <|im_end|>!", {"tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {}}}]})
    text, encoded = encode_one(chat("u:One", call, "t:2", "a:2"), tokenizer)
    assert "<|im_start|>assistant\n[No <|im_end|>!add<|eom|>]\n" in text
    assert text.endswith("[2<|im_end|>]\n")
    assert encoded.unclosed == 0


def test_answers_that_the_template_shortens_are_counted(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(THINKING, TEMPLATES["chatml"], None, "<|im_end|>")
    rows = [chat("u:One", "a:<think>\nhm\n</think>\n\n1", "u:Two", "a:2"), chat("u:One", "a: 1\n", "u:Two", "a:2"),
            chat("u:One", "a:<think>\nhm\n</think>\n\n1")]
    assert encode(rows, tokenizer, max_length=1000).incomplete == 1


def test_what_two_texts_share_at_the_start() -> None:
    for left, right, expected in (("", "a", 0), ("a", "b", 0), ("abc", "abd", 2), ("ab", "abc", 2), ("abc", "abc", 3)):
        assert _shared(left, right) == _shared(right, left) == expected

    class Sliced(str):  # long rows are not gone through character by character
        def __iter__(self) -> Any:
            raise AssertionError

    assert _shared(Sliced("x" * 999 + "a"), Sliced("x" * 999 + "b")) == 999


def test_templates_without_a_clear_answer_are_refused(make_tokenizer: Any) -> None:
    only_last = ("{% for m in messages %}{{ m.role + '\n' + m.content + (eos_token if loop.last else '\n') }}"
                 "{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}")
    leaves_out = ("{% for m in messages %}" + CHATML_TURN % "(m.content if m.role == 'user' else '')" + "{% endfor %}"
                  + OPEN)
    repeats = ("{% for m in messages %}" + CHATML_TURN % "m.content" + "{% endfor %}"
               "{{ messages[1].content if messages[1:] }}" + OPEN)
    for template, message in ((only_last, "unlike the last one"), (leaves_out, "leaves out"), (repeats, "mixes")):
        tokenizer = make_tokenizer(template, TEMPLATES["chatml"], None, "</s>")
        with pytest.raises(DataError, match=message) as caught:
            encode_one(chat("u:One", "a:1", "u:Two", "a:2"), tokenizer)
        assert "chat_template=" in caught.value.fix


def test_what_a_template_refuses(tokenizers: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="refuses") as caught:
        encode_one(chat("u:One", "u:Two", "a:2"), tokenizers["gemma"])
    assert "in turn" in str(caught.value.found)
    assert caught.value.where == "data.jsonl, line 7"
    text, _ = encode_one(chat("a:Hello", "u:Hi", "a:Bye"), tokenizers["chatml"])  # an opening by the assistant is fine
    assert text.startswith("<|im_start|>assistant\n[Hello<|im_end|>]\n")
