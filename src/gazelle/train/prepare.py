"""From what was passed as data to encoded rows and the data report."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gazelle.base.errors import DataError
from gazelle.data.conversation import Conversation
from gazelle.data.encode import Encoded, Example, encode
from gazelle.data.load import load_conversations
from gazelle.data.report import DataReport, data_report
from gazelle.data.templates import ensure_template
from gazelle.train.config import SFTConfig

DEFAULT_LENGTH = 2048  # tokens; a model's own limit can be a hundred times what anyone trains on


@dataclass
class Prepared:
    """What the trainer needs of the data. `conversations` are the evaluation rows if there are any, else training's."""

    train: Encoded | None
    eval: Encoded | dict[str, Encoded] | None
    report: DataReport | None
    max_length: int
    conversations: list[Conversation] = field(default_factory=list)


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SFTConfig,
    train_dataset: Any,
    eval_dataset: Any,
    formatting_func: Callable[[Any], Any] | None,
) -> Prepared:
    """Read, check, render and tokenise both data sets.

    Raises:
        DataError: naming file and row, for data that cannot be used.
    """
    config.max_length = row_limit(model, config)
    return encode_rows(tokenizer, model.config.model_type, config, train_dataset, eval_dataset, formatting_func)


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    model_type: str,
    config: SFTConfig,
    train_dataset: Any,
    eval_dataset: Any,
    formatting_func: Callable[[Any], Any] | None = None,
) -> Prepared:
    """`prepare` without a model: its tokenizer and `config.max_length` (which must be set) are all it takes."""
    max_length = config.max_length or DEFAULT_LENGTH
    ensure_template(tokenizer, model_type, config.chat_template)
    conversations: list[Conversation] = []

    def encoded(source: Any, split: str) -> Encoded:
        if rows := encoded_already(source, max_length):
            return rows
        loaded = load_conversations(
            source, format=config.data_format, columns=_columns(config), split=split, system=config.system,
            formatting_func=formatting_func, text_column=config.dataset_text_field, token=config.hub_token,
        )
        conversations[:] = loaded.conversations
        return encode(loaded.conversations, tokenizer, max_length=max_length, train_on=config.train_on,
                      source=loaded.source, format=loaded.format)

    train = None if train_dataset is None else encoded(train_dataset, "train")
    evaluation: Encoded | dict[str, Encoded] | None = None
    if isinstance(eval_dataset, Mapping):
        evaluation = {name: encoded(source, "eval") for name, source in eval_dataset.items()}
    elif eval_dataset is not None:
        evaluation = encoded(eval_dataset, "eval")
    first_eval = next(iter(evaluation.values())) if isinstance(evaluation, dict) else evaluation
    report = data_report(train, first_eval) if train is not None else None
    return Prepared(train, evaluation, report, max_length, conversations)


def row_limit(model: PreTrainedModel, config: SFTConfig) -> int:
    """Longest row in tokens: the config's, else what the model was loaded for, else its limit but at most 2048."""
    if config.max_length:
        return config.max_length
    loaded_for = getattr(model, "max_seq_length", None)
    return loaded_for or min(getattr(model.config, "max_position_embeddings", DEFAULT_LENGTH), DEFAULT_LENGTH)


def encoded_already(source: Any, max_length: int) -> Encoded | None:
    """Rows that hold `input_ids` are taken as they are (and cut at `max_length`); None for any other kind of data."""
    columns = getattr(source, "column_names", None)
    if columns is None and isinstance(source, list) and source and isinstance(source[0], dict):
        columns = list(source[0])
    if not isinstance(columns, list) or "input_ids" not in columns:
        return None
    examples = []
    for number, row in enumerate(source, start=1):
        ids = list(row["input_ids"])[:max_length]
        labels = list(row["labels"] if row.get("labels") is not None else row["input_ids"])[:max_length]
        if len(ids) != len(labels):
            raise DataError("ids and labels differ in length", where=f"row {number}",
                            found=f"{len(ids)} ids, {len(labels)} labels", expected="one label a token",
                            fix="use -100 as the label of a token that is not learnt")
        examples.append(Example(ids, [-100, *labels[1:]], f"row {number}"))
    return Encoded(examples)


def _columns(config: SFTConfig) -> dict[str, str] | None:
    return config.columns if isinstance(config.columns, dict) else None
