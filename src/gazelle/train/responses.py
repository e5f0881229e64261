"""`train_on_responses_only`: of rows that a script rendered to texts, only the answers are learnt."""

from typing import TYPE_CHECKING, Any

from gazelle.base.errors import DataError, OptionError
from gazelle.base.log import logger
from gazelle.data.headers import Headers, template_headers
from gazelle.train.dataset import Bins
from gazelle.train.prepare import encode_rows
from gazelle.train.strategies.incremental import with_replay

if TYPE_CHECKING:
    from gazelle.train.trainer import SFTTrainer


def train_on_responses_only(
    trainer: "SFTTrainer",
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,  # noqa: ARG001
    tokenizer: Any = None,  # noqa: ARG001
    return_function: bool = False,
    num_proc: int | None = None,  # noqa: ARG001
) -> "SFTTrainer":
    """Label what the assistant says, with the token that ends it, and nothing else; returns the trainer.

    Rows with turns are labelled so from the start. This is for texts: of a row that holds its turns beside the text
    and renders to it, answers are found by rendering, as everywhere; of any other, by the headers.

    Args:
        trainer: made, and not yet run. Its rows are encoded again.
        instruction_part: what stands before each question; left out, what the chat template writes there.
        response_part: what stands before each answer.
        force_match: taken because scripts pass it: headers are looked for as text, so they match whole.
        tokenizer: the trainer's own is used.
        return_function: cannot be had.
        num_proc: the tokenizer's own threads are used.

    Raises:
        OptionError: one part without the other, or a text that has no such headers.
        DataError: no row has a labelled token, or rows that came tokenised.
    """
    if return_function:
        raise OptionError("there is no function to return", where="train_on_responses_only(return_function=True)",
                          found="True", expected="the trainer", fix="leave return_function out")
    if (instruction_part is None) != (response_part is None):
        raise OptionError("one header without the other", where="train_on_responses_only",
                          found="instruction_part" if response_part is None else "response_part",
                          expected="both, or neither to take the chat template's", fix="pass both")
    prepared, data = trainer.prepared, trainer.train_dataset
    if isinstance(data, Bins) and not trainer.args.packing and any(len(rows) > 1 for rows in data.bins):
        raise OptionError("batches were made of these rows already", where="train_on_responses_only",
                          found="after enable_dynamic_batching", expected="before it", fix="exchange the two calls")
    train, evaluation, formatting_func = prepared.sources
    own = trainer.processing_class
    if instruction_part is None or response_part is None:
        headers = template_headers(own)
    else:
        headers = Headers(instruction_part, response_part)
    if not headers.response:
        raise OptionError("the header of an answer is empty", where="response_part", found="''",
                          expected="what stands before every answer", fix="leave both parts out, or pass both")
    _check_texts(prepared, headers, own)
    trainer.args.train_on = "responses"
    again = encode_rows(own, trainer.model.config.model_type, trainer.args, train, evaluation, formatting_func, headers)
    with_replay(trainer.model, again.train, trainer.callback_handler.callbacks)
    trainer.prepared = again
    trainer.train_dataset, trainer.eval_dataset = trainer._dataset(again.train), trainer._dataset(again.eval)
    if trainer._progress is not None and again.report is not None:
        trainer._progress.report = again.report
    return trainer


def _check_texts(prepared: Any, headers: Headers, tokenizer: Any) -> None:
    """Raise if the rows came tokenised, or if not one text has a header of an answer."""
    encoded = prepared.train
    if encoded is not None and not encoded.format:
        raise DataError("rows that came tokenised have no text to find answers in", where="train_on_responses_only",
                        found="input_ids", expected="texts or conversations", fix="pass labels with the ids")
    texts = [row.text for row in prepared.conversations if row.text is not None]
    if not texts:
        logger.info("Answers alone are learnt already: the rows have turns.")
    elif not any(headers.response in text for text in texts):
        raise OptionError("no row has this header of an answer", where="response_part", found=repr(headers.response),
                          expected=f"a part of such a text: {texts[0][:100]!r}",
                          fix=f"the chat template would write {template_headers(tokenizer).response!r}"
                          if tokenizer.chat_template else "take it from the text")
