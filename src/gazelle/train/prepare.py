"""From what was passed as data to encoded rows and the data report."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gazelle.base.errors import DataError, OptionError, UserError
from gazelle.base.log import logger, say_once
from gazelle.data.conversation import Conversation
from gazelle.data.encode import Encoded, Example, encode
from gazelle.data.headers import Headers, ResponseSpans
from gazelle.data.holdout import HeldOut, hold_out, hold_out_encoded
from gazelle.data.load import Loaded, load_conversations
from gazelle.data.read import read_rows
from gazelle.data.report import DataReport, data_report
from gazelle.data.templates import ensure_template
from gazelle.models.context import fit_context
from gazelle.train.config import SFTConfig


@dataclass
class Prepared:
    """What the trainer needs of the data.

    Attributes:
        conversations: the evaluation rows if there are any, else training's.
        eval_conversations: those of each evaluation set, "" for one without a name; nothing of tokenised rows.
        sources: training data, evaluation data and formatting function, as they were passed.
        headers: what answers in texts were told by; None where texts are learnt throughout.
    """

    train: Encoded | None
    eval: Encoded | dict[str, Encoded] | None
    report: DataReport | None
    max_length: int
    conversations: list[Conversation] = field(default_factory=list)
    sources: tuple[Any, Any, Any] = (None, None, None)
    headers: Headers | None = None
    eval_conversations: dict[str, list[Conversation]] = field(default_factory=dict)


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
    headers: Headers | None = None,
) -> Prepared:
    """`prepare` without a model: its tokenizer and `config.max_length` (which must be set) are all it takes.

    With `headers`, of rows that are texts only what stands behind an answer's header is learnt.
    """
    max_length = config.max_length
    if max_length is None:
        raise ValueError("encode_rows needs config.max_length")
    conversations: list[Conversation] = []
    eval_conversations: dict[str, list[Conversation]] = {}

    def encoded(source: Any, split: str, name: str = "", origin: Any = None) -> Encoded:
        if isinstance(source, Encoded):
            return source
        if rows := encoded_already(source, max_length):
            return rows
        loaded = load_conversations(
            source, format=config.data_format, columns=_columns(config), split=split, system=config.system,
            formatting_func=formatting_func, text_column=config.dataset_text_field, token=config.hub_token,
        )
        if config.dataset_text_field and loaded.format not in ("text", "formatting_func"):
            say_once(f"no column is called {config.dataset_text_field!r}; the rows are taken as {loaded.format}")
        if config.chat_template or any(chat.text is None for chat in loaded.conversations):
            ensure_template(tokenizer, model_type, config.chat_template)  # raw text needs none, base models have none
        conversations[:] = loaded.conversations
        if split == "eval":
            eval_conversations[name] = loaded.conversations
        answers = None
        if headers is not None and all(chat.text is not None for chat in loaded.conversations):
            beside = _turns_beside(source if origin is None else origin, loaded, split, config)
            answers = ResponseSpans(headers, tokenizer, beside)
        return encode(loaded.conversations, tokenizer, max_length=max_length, train_on=config.train_on,
                      source=loaded.source, format=loaded.format, unused=loaded.unused, answers=answers)

    sources = (train_dataset, eval_dataset, formatting_func)
    origin = held_out = None
    if config.eval_split and train_dataset is not None and eval_dataset is None:
        origin = train_dataset
        train_dataset, eval_dataset, held_out = _split(origin, max_length, config, formatting_func)
    elif isinstance(train_dataset, Loaded):
        held_out = train_dataset.held_out
    train = None if train_dataset is None else encoded(train_dataset, "train", origin=origin)
    evaluation: Encoded | dict[str, Encoded] | None = None
    if isinstance(eval_dataset, Mapping):
        evaluation = {name: encoded(source, "eval", name) for name, source in eval_dataset.items()}
    elif eval_dataset is not None:
        evaluation = encoded(eval_dataset, "eval", origin=origin)
    first_eval = next(iter(evaluation.values())) if isinstance(evaluation, dict) else evaluation
    report = data_report(train, first_eval, held_out) if train is not None else None
    return Prepared(train, evaluation, report, max_length, conversations, sources, headers, eval_conversations)


def _split(source: Any, max_length: int, config: SFTConfig,
           formatting_func: Callable[[Any], Any] | None) -> tuple[Any, Any, HeldOut | None]:
    """Training and evaluation rows of one source, and how they were parted."""
    if tokenised := encoded_already(source, max_length):
        if config.eval_group_column:
            raise OptionError("rows that came tokenised have no columns to group by", where="eval_group_column",
                              found=config.eval_group_column, expected="texts or conversations",
                              fix="leave eval_group_column out")
        return hold_out_encoded(tokenised, config.eval_split, seed=config.seed)
    rows = source if isinstance(source, Loaded) else read_rows(source, split="train", token=config.hub_token)
    loaded = load_conversations(rows, format=config.data_format, columns=_columns(config), system=config.system,
                                formatting_func=formatting_func, text_column=config.dataset_text_field)
    train, evaluation = hold_out(loaded, config.eval_split, seed=config.seed, column=config.eval_group_column,
                                 rows=None if isinstance(rows, Loaded) else rows)
    return train, evaluation, train.held_out


def _turns_beside(source: Any, loaded: Loaded, split: str, config: SFTConfig) -> dict[str, Conversation]:
    """The turns that lie in columns beside a text, by where the row was read; nothing where there are none."""
    if not loaded.unused:
        return {}
    try:
        beside = load_conversations(source, columns=_columns(config), split=split, system=config.system,
                                    token=config.hub_token)
    except UserError as error:
        logger.debug("no turns beside the texts: %s", error)
        return {}
    return {chat.where: chat for chat in beside.conversations if chat.text is None}


def row_limit(model: PreTrainedModel, config: SFTConfig) -> int:
    """Longest row in tokens: the config's, else what the model was loaded for, else its limit but at most 2048."""
    return config.max_length or getattr(model, "max_seq_length", None) or fit_context(model.config, None)


def encoded_already(source: Any, max_length: int) -> Encoded | None:
    """Rows that hold `input_ids` are taken as they are, cut at `max_length`; None for any other kind of data.

    Positions that `attention_mask` leaves out are padding and are dropped. Without `labels` every token is learnt.

    Raises:
        DataError: no rows, a row without tokens, or columns of different lengths.
    """
    columns = getattr(source, "column_names", None)
    if columns is None and isinstance(source, list) and source and isinstance(source[0], dict):
        columns = list(source[0])
    if not isinstance(columns, list) or "input_ids" not in columns:
        return None
    examples = [_tokenised(row, f"row {number}", max_length) for number, row in enumerate(source, start=1)]
    if not examples:
        raise DataError("there are no rows", where="data", found="0 rows", expected="at least one row",
                        fix="check the source")
    return Encoded(examples)


def _tokenised(row: Mapping[str, Any], where: str, max_length: int) -> Example:
    ids = list(row["input_ids"])
    labels = ids if row.get("labels") is None else list(row["labels"])
    mask = [1] * len(ids) if row.get("attention_mask") is None else list(row["attention_mask"])
    if not len(ids) == len(labels) == len(mask):
        raise DataError("ids, labels and attention mask differ in length", where=where,
                        found=f"{len(ids)} ids, {len(labels)} labels, {len(mask)} mask entries",
                        expected="one of each a token", fix="use -100 as the label of a token that is not learnt")
    kept = [position for position, real in enumerate(mask) if real][:max_length]
    if not kept:
        raise DataError("a row has no tokens", where=where, found="no input_ids outside the padding",
                        expected="at least one token", fix="remove the row")
    return Example([ids[at] for at in kept], [-100, *(labels[at] for at in kept[1:])], where)


def _columns(config: SFTConfig) -> dict[str, str] | None:
    return config.columns if isinstance(config.columns, dict) else None
