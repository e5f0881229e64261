"""What is in the data, before the first step: counts, lengths, duplicates, and what to do about them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gazelle.data.encode import IGNORED, Encoded, Mismatch
from gazelle.data.holdout import HeldOut

if TYPE_CHECKING:
    from rich.table import Table

QUANTILES = {"min": 0.0, "50 %": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}


@dataclass(frozen=True)
class SplitReport:
    """Figures of one split. Those that `Encoded` has too mean the same here.

    Attributes:
        examples: rows to train on, after dropping and chunking.
        quantiles: tokens a row has before cutting.
        tokens, labelled_tokens: of all examples, after cutting.
        duplicates: rows that are the same as an earlier one.
    """

    source: str
    format: str
    rows: int
    examples: int
    max_length: int
    quantiles: dict[str, int]
    tokens: int
    labelled_tokens: int
    truncated: int
    dropped: int
    unlabelled: int
    chunked: int
    duplicates: int
    boundary_merges: int
    unclosed: int
    incomplete: int
    checked: int
    mismatched: int
    mismatch: Mismatch | None
    sample: list[tuple[str, bool]]
    unused: list[str]


@dataclass(frozen=True)
class DataReport:
    """The train split, the test split if there is one, and what they share.

    Attributes:
        overlap_rows: test rows that are in the train split word for word.
        overlap_prompts: test rows whose prompt is in the train split, up to case, spacing and punctuation.
        warnings: sentences for people, each with its remedy.
        held_out: how the test rows were drawn, if they come from the same source.
    """

    train: SplitReport
    test: SplitReport | None
    overlap_rows: int
    overlap_prompts: int
    warnings: list[str]
    held_out: HeldOut | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, numbers and strings."""
        return asdict(self)

    def lines(self, *, warnings: bool = True) -> list[str]:
        """The report as lines of text; labelled text of the sample stands in ⟦ ⟧."""
        cells = [[name, *values] for name, *values in self._rows()]
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        sample = "".join(f"⟦{text}⟧" if labelled else text for text, labelled in self.train.sample).splitlines()
        return [*("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                  for row in cells),
                *([f"eval_split {self.held_out.line()}"] if self.held_out else []),
                *(["first row, labelled text in ⟦ ⟧:"] if sample else []), *("  " + line for line in sample),
                *("warning: " + warning for warning in self.warnings if warnings)]

    def table(self) -> "Table":
        """The figures as a table for the terminal."""
        from rich.table import Table

        head, *body = self._rows()
        table = Table()
        for name in head:
            table.add_column(name, justify="left" if name == head[0] else "right", overflow="fold")
        for row in body:
            table.add_row(*row)
        return table

    def _rows(self) -> Iterator[list[str]]:
        splits = [self.train, *([self.test] if self.test else [])]
        yield ["data", *["train", "test"][: len(splits)]]
        yield ["source", *(split.source or "-" for split in splits)]
        yield ["format", *(split.format or "-" for split in splits)]
        if any(split.unused for split in splits):
            yield ["columns not used", *(", ".join(split.unused) or "-" for split in splits)]
        yield ["rows", *(f"{split.rows:,}" for split in splits)]
        yield ["examples", *(f"{split.examples:,}" for split in splits)]
        for name in QUANTILES:
            yield [f"tokens a row, {name}", *(f"{split.quantiles[name]:,}" for split in splits)]
        yield ["tokens", *(f"{split.tokens:,}" for split in splits)]
        yield ["labelled", *(f"{split.labelled_tokens:,} ({split.labelled_tokens / split.tokens:.0%})"
                             for split in splits)]
        for title, name in (("truncated rows", "truncated"), ("rows cut before any label", "dropped"),
                            ("rows without a label", "unlabelled"), ("texts in several pieces", "chunked"),
                            ("duplicates", "duplicates")):
            yield [title, *(f"{getattr(split, name):,}" for split in splits)]
        yield ["unlike inference", *(f"{split.mismatched:,} of {split.checked:,} answers" for split in splits)]
        if self.test:
            yield ["also in train: rows / prompts", "", f"{self.overlap_rows:,} / {self.overlap_prompts:,}"]
        if self.held_out:
            yield ["held out", f"{self.held_out.train:,} rows left", f"{self.held_out.evaluation:,} rows"]


def data_report(train: Encoded, test: Encoded | None = None, held_out: HeldOut | None = None) -> DataReport:
    """Sum up what `encode` saw in the train split and, if given, the test split, and how that was drawn."""
    rows = prompts = 0
    if test is not None:
        rows = _shared(test.row_keys, train.row_keys)
        prompts = _shared(test.prompt_keys, train.prompt_keys)
    reports = [_split(encoded) for encoded in (train, test) if encoded is not None]
    warnings = [f"{name}: {warning}" if test is not None else warning
                for name, report in zip(("train", "test"), reports, strict=False) for warning in _warnings(report)]
    if prompts:
        warnings.append(f"{prompts} of {reports[-1].rows} test prompts are in the train split too, {rows} with the same"
                        " answer: the test shows what was memorised; take them out of one of the two.")
    return DataReport(reports[0], reports[1] if test is not None else None, rows, prompts, warnings, held_out)


def _shared(keys: list[bytes], others: list[bytes]) -> int:
    known = set(others)
    return sum(key in known for key in keys)


def _split(encoded: Encoded) -> SplitReport:
    values = np.quantile(encoded.lengths, list(QUANTILES.values()), method="higher")
    return SplitReport(
        source=encoded.source, format=encoded.format, rows=encoded.rows, examples=len(encoded.examples),
        max_length=encoded.max_length, quantiles=dict(zip(QUANTILES, map(int, values), strict=True)),
        tokens=sum(len(example.input_ids) for example in encoded.examples),
        labelled_tokens=sum(len(example.labels) - example.labels.count(IGNORED) for example in encoded.examples),
        truncated=encoded.truncated, dropped=encoded.dropped, unlabelled=encoded.unlabelled, chunked=encoded.chunked,
        duplicates=len(encoded.row_keys) - len(set(encoded.row_keys)), boundary_merges=encoded.boundary_merges,
        unclosed=encoded.unclosed, incomplete=encoded.incomplete, checked=encoded.checked,
        mismatched=encoded.mismatched, mismatch=encoded.mismatch, sample=encoded.sample, unused=list(encoded.unused))


def _warnings(split: SplitReport) -> Iterator[str]:
    if split.truncated:
        yield (f"{split.truncated} of {split.rows} rows are longer than max_length={split.max_length} and lose their "
               f"end; max_length={split.quantiles['max']} keeps all of them.")
    if split.dropped:
        yield (f"{split.dropped} of {split.rows} rows are left out because max_length={split.max_length} cuts them "
               "before their first answer; raise max_length.")
    if split.unlabelled:
        yield (f"{split.unlabelled} of {split.rows} rows are left out because they hold no token to learn: a text of "
               "one token, or an answer that shares its tokens with the prompt; remove them, or choose a template that "
               "ends the prompt with a special token.")
    if split.duplicates:
        yield f"{split.duplicates} rows are exact copies of others and count twice; remove them if that is not meant."
    if split.mismatch:
        yield (f"{split.mismatched} of {split.checked} answers follow other tokens in training than in inference, "
               f"first {split.mismatch.where}: {split.mismatch.training} against {split.mismatch.inference}; the chat "
               "template renders them differently, choose another with chat_template= or train on one answer a row.")
    if split.incomplete:
        yield (f"{split.incomplete} of {split.rows} rows have an answer that the chat template does not write whole, "
               "such as reasoning in <think>…</think>; what it leaves out is not learnt; choose another "
               "template with chat_template=, or split these rows so that each ends with one answer.")
    if split.boundary_merges:
        yield (f"{split.boundary_merges} tokens hold the end of a prompt and the start of its answer, and are not "
               "labelled; use a chat template that ends the prompt with a special token or a line break.")
    if split.unclosed:
        yield (f"{split.unclosed} answers end without a special token, so the model does not learn to stop; choose a "
               "template that closes every answer with chat_template=.")
