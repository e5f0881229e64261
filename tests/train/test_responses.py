"""Of texts, only the answers are learnt: beside the labels that the turns themselves would get."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.train.conftest import ROWS, small_llama

from gazelle import SFTConfig, SFTTrainer, standardize_sharegpt, train_on_responses_only
from gazelle.base.errors import DataError, OptionError
from gazelle.train.strategies.incremental import HoldOn, Replay

CHATS = [{"conversations": [
    {"from": "human", "value": row["instruction"]}, {"from": "gpt", "value": row["output"]},
    {"from": "human", "value": f"Say <|im_start|>assistant\n{number}!"}, {"from": "gpt", "value": f"No {number}."}]}
    for number, row in enumerate(ROWS)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make(bytes_tokenizer: Any, tmp_path: Path) -> Callable[..., SFTTrainer]:
    def trainer(rows: Any, evaluation: Any = None, **options: Any) -> SFTTrainer:
        args = SFTConfig(output_dir=str(tmp_path), max_steps=1, report=False, disable_tqdm=True, **options)
        return SFTTrainer(small_llama(bytes_tokenizer), args, rows, evaluation, bytes_tokenizer)

    return trainer


def labels(trainer: SFTTrainer, name: str = "train_dataset") -> list[list[int]]:
    return [list(entry["labels"]) for entry in getattr(trainer, name)]


def rendered(tokenizer: Any, *, keep: bool) -> Any:
    rows = standardize_sharegpt(CHATS)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in rows["conversations"]]
    made = rows.add_column("text", texts)
    return made if keep else made.select_columns(["text"])


def test_texts_beside_their_turns_get_the_labels_of_the_turns(make: Any, bytes_tokenizer: Any) -> None:
    want = make(CHATS, CHATS[:2])
    rows = rendered(bytes_tokenizer, keep=True)
    trainer = make(rows, rows.select(range(2)), dataset_text_field="text")
    assert labels(trainer) != labels(want)  # all of a text is learnt
    assert train_on_responses_only(trainer, "<|im_start|>user\n", "<|im_start|>assistant\n") is trainer
    assert [entry["input_ids"] for entry in trainer.train_dataset] == [
        [*entry["input_ids"]] for entry in want.train_dataset]
    assert labels(trainer) == labels(want)
    assert labels(trainer, "eval_dataset") == labels(want, "eval_dataset")
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(want.evaluate()["eval_loss"], rel=1e-6)
    assert trainer.evaluate(rows.select(range(2)))["eval_loss"] == pytest.approx(loss, rel=1e-6)  # rows that come later
    trainer.train()


def test_texts_alone_are_told_by_headers(make: Any, bytes_tokenizer: Any) -> None:
    honest = [{"conversations": chat["conversations"][:2]} for chat in CHATS]
    texts = [{"text": bytes_tokenizer.apply_chat_template(chat, tokenize=False)}
             for chat in standardize_sharegpt(honest)["conversations"]]
    trainer = train_on_responses_only(make(texts))
    assert labels(trainer) == labels(make(honest))
    split = make(texts, max_length=24)
    whole = [label for row in labels(trainer) for label in row if label != -100]
    pieces = [label for row in labels(train_on_responses_only(split)) for label in row if label != -100]
    assert 0 < len(whole) - len(pieces) <= len(split.train_dataset)  # a piece's first token has nothing before it


def test_rows_with_turns_are_as_they_were(make: Any) -> None:
    trainer = make(CHATS, train_on="all")
    assert labels(train_on_responses_only(trainer)) == labels(make(CHATS))


def test_rows_of_earlier_runs_stay(make: Any, bytes_tokenizer: Any) -> None:
    texts = rendered(bytes_tokenizer, keep=False)
    trainer = make(texts)
    earlier = Replay(2)
    earlier.remember(list(trainer.prepared.train.examples), 0)
    trainer.model.get_base_model().gazelle_replay = earlier
    again = SFTTrainer(trainer.model, trainer.args, texts, None, bytes_tokenizer)
    train_on_responses_only(again)
    assert len(again.train_dataset) == len(texts) + 2
    (watching,) = [callback for callback in again.callback_handler.callbacks if isinstance(callback, HoldOn)]
    assert len(watching.own) == len(texts) and -100 in list(watching.own[0].labels)[1:]
    plain = make(texts)
    plain.enable_dynamic_batching(4)
    with pytest.raises(OptionError, match="made of these rows already"):
        train_on_responses_only(plain)


def test_mistakes(make: Any, bytes_tokenizer: Any) -> None:
    texts = rendered(bytes_tokenizer, keep=False)
    with pytest.raises(OptionError, match="no row has this header"):
        train_on_responses_only(make(texts), "### Q", "### A")
    with pytest.raises(OptionError, match="one header without the other"):
        train_on_responses_only(make(texts), response_part="### A")
    with pytest.raises(OptionError, match="no function to return"):
        train_on_responses_only(make(texts), return_function=True)
    with pytest.raises(DataError, match="came tokenised"):
        train_on_responses_only(make([{"input_ids": [1, 2, 3]}]))
