"""A teacher's k largest logits for every labelled token, on disk: it runs once, and need not fit beside the student.

Shapes: n labelled positions, k of V logits kept for each.

    teacher.json             what was asked, of which teacher
    teacher-0001.safetensors, …
        keys [rows, 32] uint8, digests of the rows' ids and labels; starts [rows + 1], where their positions begin
        ids [n, k] int32, largest first; below [n, k] float16, logits less the first; first [n] float32
        rest [n] float32, the logarithm of the probability that the k leave out (-inf if nothing)
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import DataError, ModelError, OptionError
from gazelle.base.files import staged_folder
from gazelle.data.encode import IGNORED, Example
from gazelle.models.packed import packed_attention_on, supports_packing
from gazelle.train.config import with_options
from gazelle.train.dataset import Collator, labelled_targets, make_bins, moved, padding_id
from gazelle.train.loss import labelled_logits
from gazelle.train.prepare import prepare

INDEX = "teacher.json"
PARTS = ("ids", "below", "first", "rest")
_SHARD = 2**28  # bytes


@dataclass(frozen=True)
class TopLogits:
    """A teacher's largest logits at n positions, as the head of this file describes them."""

    ids: Tensor
    below: Tensor
    first: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, top_k: int) -> "TopLogits":
        """What is kept of logits [n, V]."""
        logits = logits.float()
        values, ids = logits.topk(top_k, dim=-1)
        first = values[:, 0]
        below = (values - first[:, None]).clamp(min=torch.finfo(torch.half).min).half()
        return cls(ids.int(), below, first, left_out(logits, ids))


def left_out(logits: Tensor, ids: Tensor) -> Tensor:
    """[n]: the logarithm of the probability of all tokens but `ids` [n, k], of logits [n, V]."""
    return logits.scatter(1, ids, float("-inf")).logsumexp(-1) - logits.logsumexp(-1)


@dataclass(frozen=True)
class Settings:
    """What `teacher.json` says.

    Attributes:
        teacher: the name it was loaded by.
        vocabulary: V.
        positions: n of all rows.
    """

    teacher: str
    top_k: int
    vocabulary: int
    rows: int
    positions: int
    shards: int


def save_teacher_logits(teacher_model: Any, tokenizer: Any, train_dataset: Any, folder: str | Path, *, top_k: int = 64,
                        args: Any = None, **options: Any) -> Path:
    """Run a teacher over training rows once, and write its largest logits: `DistillationTrainer(teacher_model=folder)`.

    Args:
        teacher_model: a causal model on its device.
        tokenizer: the student's, which must be the teacher's.
        train_dataset: as the trainer takes it.
        folder: to write; an earlier one is replaced when all is there.
        top_k: logits a token, 6 bytes each.
        args, **options: the training's `SFTConfig`: what is labelled, cut and packed has to be the same.

    Raises:
        OptionError: no such `top_k`.
        DataError: rows that cannot be used.
    """
    base = unwrap(teacher_model)
    vocabulary = vocabulary_of(base)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= vocabulary:
        raise OptionError("so many logits cannot be kept", where="top_k", found=repr(top_k),
                          expected=f"a whole number from 1 to {vocabulary:,}", fix="64 is plenty")
    config = with_options(args, options)
    encoded = prepare(teacher_model, tokenizer, config, train_dataset, None, None).train
    if encoded is None:
        raise DataError("there are no rows", where="train_dataset", found="None", expected="training data",
                        fix="pass what the trainer will be passed")
    packed = supports_packing(teacher_model) is None
    collator = Collator(packed, padding_id(tokenizer))
    bins = make_bins(encoded, packing=config.packing, strategy=config.packing_strategy,
                     capacity=config.max_length or base.config.max_position_embeddings).bins
    rows = list({row_key(row): row for bin_ in bins for row in bin_}.values())
    rows.sort(key=lambda row: len(row.input_ids))  # those of like length together: little padding where rows are padded
    training = teacher_model.training
    teacher_model.eval()
    try:
        with staged_folder(Path(folder)) as staging, torch.no_grad():
            writer = _Shards(staging)
            for at in range(0, len(rows), config.per_device_train_batch_size):
                batch = rows[at : at + config.per_device_train_batch_size]
                writer.add(batch, _top_logits(teacher_model, batch, collator, top_k))
            writer.close()
            settings = Settings(base.config._name_or_path, top_k, vocabulary, len(rows), writer.positions,
                                writer.number)
            (staging / INDEX).write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
    finally:
        teacher_model.train(training)
    return Path(folder)


def vocabulary_of(model: Any) -> int:
    """Rows of a model's head."""
    return int(unwrap(model).get_output_embeddings().weight.shape[0])


def row_key(row: Example) -> bytes:
    """A digest of what a row asks of a teacher."""
    digest = hashlib.sha256(bytes(memoryview(row.input_ids)))  # type: ignore[arg-type]
    digest.update(bytes(memoryview(row.labels)))  # type: ignore[arg-type]
    return digest.digest()


def _top_logits(model: Any, rows: list[Example], collator: Collator, top_k: int) -> TopLogits:
    entry: dict[str, Any] = {"rows": rows}
    inputs = moved(collator([entry]), unwrap(model).device)
    positions, _ = labelled_targets(inputs["labels"])
    with packed_attention_on(model) if collator.packed else nullcontext():
        return TopLogits.of(labelled_logits(model, inputs, positions), top_k)


def positions_of(row: Example) -> int:
    """Tokens of a row that are learnt."""
    return sum(label != IGNORED for label in row.labels[1:])


class _Shards:
    """Writes files of about `_SHARD` bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number, self.positions = folder, 0, 0
        self._clear()

    def _clear(self) -> None:
        self.keys: list[bytes] = []
        self.starts = [0]
        self.parts: list[TopLogits] = []

    def add(self, rows: list[Example], found: TopLogits) -> None:
        self.keys += [row_key(row) for row in rows]
        for row in rows:
            self.starts.append(self.starts[-1] + positions_of(row))
        self.parts.append(TopLogits(*(getattr(found, name).cpu() for name in PARTS)))
        if self.starts[-1] * found.ids.shape[1] * 6 >= _SHARD:
            self._write()

    def _write(self) -> None:
        self.number += 1
        self.positions += self.starts[-1]
        tensors = {name: torch.cat([getattr(part, name) for part in self.parts]) for name in PARTS}
        tensors["keys"] = torch.frombuffer(bytearray(b"".join(self.keys)), dtype=torch.uint8).view(-1, 32)
        tensors["starts"] = torch.tensor(self.starts)
        save_file(tensors, self.folder / f"teacher-{self.number:04}.safetensors")
        self._clear()

    def close(self) -> None:
        """Write what is left."""
        if self.keys:
            self._write()


class TeacherLogits:
    """Reads what `save_teacher_logits` wrote, row by row, from mapped files.

    Raises:
        ModelError: no such folder, or one that is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.settings = Settings(**json.loads((self.folder / INDEX).read_text(encoding="utf-8")))
            self.files = [safe_open(self.folder / f"teacher-{number + 1:04}.safetensors", "pt")
                          for number in range(self.settings.shards)]
            self.places: dict[bytes, tuple[int, int, int]] = {}
            for number, file in enumerate(self.files):
                keys, starts = file.get_tensor("keys").numpy(), file.get_tensor("starts").tolist()
                self.places |= {key.tobytes(): (number, *starts[at : at + 2]) for at, key in enumerate(keys)}
        except Exception as error:
            if not isinstance(error, OSError | ValueError | TypeError) and "safetensors" not in type(error).__module__:
                raise
            raise ModelError("a teacher's logits cannot be read", where=str(folder), found=str(error),
                             expected="a folder that save_teacher_logits wrote", fix="write it again") from error

    def check(self, rows: Sequence[Example], vocabulary: int) -> None:
        """Raise `OptionError` if the student or its rows are others than the teacher was run for."""
        settings = self.settings
        if settings.vocabulary != vocabulary:
            raise OptionError("teacher and student have different vocabularies", where=str(self.folder),
                              found=f"{settings.vocabulary:,} and {vocabulary:,} tokens",
                              expected="the same tokens in both", fix="choose a teacher of the student's family")
        missing = [row for row in rows if row_key(row) not in self.places]
        if missing:
            raise OptionError("the teacher has not seen these rows", where=missing[0].where or "train_dataset",
                              found=f"{len(missing):,} of {len(rows):,} rows are not in {self.folder}",
                              expected="the rows, template, max_length and packing of save_teacher_logits",
                              fix="run save_teacher_logits with the settings of this training")

    def of(self, rows: Sequence[Example]) -> TopLogits | None:
        """[n, …] of rows end to end; None if one of them is not there (of an evaluation set, say)."""
        places = [self.places.get(row_key(row)) for row in rows]
        found = [(self.files[place[0]], place[1], place[2]) for place in places if place is not None]
        if len(found) < len(rows):
            return None
        return TopLogits(*(torch.cat([file.get_slice(name)[start:stop] for file, start, stop in found])
                           for name in PARTS))


class TaughtCollator(Collator):
    """Batches with the teacher's logits in them, as `teacher`: a tuple, which is moved to the device with the rest."""

    def __init__(self, packed: bool, pad_token_id: int, teacher: TeacherLogits) -> None:
        super().__init__(packed, pad_token_id)
        self.teacher = teacher

    def __call__(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        found = self.teacher.of([row for entry in entries for row in entry["rows"]])
        batch = super().__call__(entries)
        return batch if found is None else batch | {"teacher": tuple(getattr(found, name) for name in PARTS)}
