"""Cutting, dropping, raw texts, and the settings `encode` refuses."""

from typing import Any

import pytest

from gazelle.base.errors import DataError, ModelError, OptionError
from gazelle.data.conversation import Conversation, Turn
from gazelle.data.encode import Encoded, Example, encode, prompt_text


def chat(question: str, answer: str, where: str = "row 1") -> Conversation:
    return Conversation((Turn("user", question), Turn("assistant", answer)), where)


def text(content: str, where: str = "row 1") -> Conversation:
    return Conversation((), where, text=content)


def test_conversations_are_cut_on_the_right_and_dropped_without_a_label(chatml: Any) -> None:
    rows = [chat("a", "b"), chat("a", "b " * 40, "row 2"), chat("a " * 40, "b", "row 3")]
    full = encode(rows, chatml, max_length=1000)
    cut = encode(rows, chatml, max_length=40)
    assert [example.where for example in cut.examples] == ["row 1", "row 2"]
    assert cut.examples[1].input_ids == full.examples[1].input_ids[:40]
    assert cut.examples[1].labels == full.examples[1].labels[:40]
    assert (cut.rows, cut.truncated, cut.dropped) == (3, 2, 1)
    assert cut.lengths == full.lengths == [len(example.input_ids) for example in full.examples]


def test_nothing_left_says_what_length_is_needed(chatml: Any) -> None:
    row = chat("a " * 40, "b")
    labels = encode([row], chatml, max_length=1000).examples[0].labels
    needed = next(number for number, label in enumerate(labels, 1) if label != -100)
    with pytest.raises(DataError, match="no row has a labelled token") as caught:
        encode([row], chatml, max_length=needed - 1)
    assert caught.value.fix == f"set max_length to at least {needed}"
    assert len(encode([row], chatml, max_length=needed).examples) == 1


def test_texts_are_cut_into_pieces_without_losing_a_token(chatml: Any) -> None:
    content = "the quick brown fox " * 5
    ids = [*chatml(content)["input_ids"], chatml.eos_token_id]
    encoded = encode([text(content)], chatml, max_length=7)
    assert [token for example in encoded.examples for token in example.input_ids] == ids
    assert all(example.labels.tolist() == [-100, *example.input_ids[1:]] for example in encoded.examples)
    assert (encoded.chunked, encoded.truncated, encoded.lengths) == (1, 0, [len(ids)])


def test_texts_get_one_bos_and_one_eos(make_tokenizer: Any) -> None:
    from tokenizers import processors

    tokenizer = make_tokenizer(None, (), "<s>", "</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    rows = [text("fox"), text("<s>fox</s>"), text("<s>fox</s>\n")]
    decoded = [tokenizer.decode(example.input_ids) for example in encode(rows, tokenizer, max_length=50).examples]
    assert decoded == ["<s>fox</s>", "<s>fox</s>", "<s>fox</s>\n"]


def test_settings_that_cannot_work(chatml: Any, make_tokenizer: Any) -> None:
    with pytest.raises(OptionError, match="max_length"):
        encode([chat("a", "b")], chatml, max_length=1)
    with pytest.raises(OptionError, match="train_on") as caught:
        encode([chat("a", "b")], chatml, max_length=9, train_on="response")
    assert "responses" in caught.value.fix
    with pytest.raises(ModelError, match="EOS"):
        encode([text("a")], make_tokenizer(None, ()), max_length=9)
    with pytest.raises(ModelError, match="chat template"):
        encode([chat("a", "b")], make_tokenizer(None, (), None, "</s>"), max_length=9)
    with pytest.raises(DataError, match="no row"):
        encode([], chatml, max_length=9)


def test_at_most_2000_rows_are_compared_with_inference(chatml: Any) -> None:
    encoded = encode([chat("a", "b")] * 2001, chatml, max_length=100)
    assert (len(encoded.examples), encoded.checked, encoded.mismatched) == (2001, 1001, 0)


def test_rows_that_came_tokenised() -> None:
    encoded = Encoded([Example([1, 2, 3], [-100, 2, 3], "row 1")])
    assert (encoded.rows, encoded.lengths, len(encoded.row_keys)) == (1, [3], 1)


def test_ids_are_kept_compactly() -> None:
    example = Example([1, 2, 70_000], [-100, 2, 70_000], "row 1")
    assert memoryview(example.input_ids).nbytes == memoryview(example.labels).nbytes == 12
    assert (example.input_ids.tolist(), example.labels.count(-100)) == ([1, 2, 70_000], 1)


def test_rows_that_hold_nothing_to_learn(make_tokenizer: Any) -> None:
    """A text of one token; and an answer that is one token with the end of its prompt, with nothing to close it."""
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}", (), None, "</s>")
    encoded = encode([text("</s>"), chat("t", "he"), text("fox", "row 3")], tokenizer, max_length=50)
    assert [example.where for example in encoded.examples] == ["row 3"]
    assert (encoded.rows, encoded.unlabelled, encoded.dropped, encoded.boundary_merges) == (3, 2, 0, 1)
    with pytest.raises(DataError, match="no row has a labelled token") as caught:
        encode([text("</s>")], tokenizer, max_length=50)
    assert "max_length" not in caught.value.fix
    pieces = encode([text("fox")], tokenizer, max_length=2)  # "fo", "x" and EOS
    assert [len(example.input_ids) for example in pieces.examples] == [2]


def test_rows_with_other_tools_are_no_duplicates(tokenizers: Any) -> None:
    rows = [Conversation(chat("a", "b").turns, "row", ({"name": name},)) for name in ("add", "sub", "add")]
    assert len(set(encode(rows, tokenizers["qwen"], max_length=1000).row_keys)) == 2


def test_prompt_text_stops_before_the_last_answer() -> None:
    row = Conversation((Turn("system", "s"), *chat("a", "b").turns, *chat("c", "d").turns), "row 1")
    assert prompt_text(row) == "a\nb\nc"
    assert prompt_text(text("all")) == "all"
