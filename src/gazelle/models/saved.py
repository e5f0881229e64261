"""The tensors of a merged checkpoint on their way to disk, and how far each is from what was merged."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gazelle.base.errors import ModelError
from gazelle.base.progress import tell
from gazelle.models.checkpoint import check_finite
from gazelle.models.shards import ShardWriter

REPORT = "save_report.json"
_CHUNK = 2**24  # numbers compared at a time


@dataclass
class SaveReport:
    """What was written, and how far it is from the merged model in float32.

    Attributes:
        folder: where it is.
        method: as in `save_method`.
        dtype: of the weights that are not quantised, and of the steps of those that are.
        errors: by tensor, ||written - merged|| / ||merged||.
        output_errors: by linear layer, the same of its outputs on the calibration data, where there was some.
        settings: of the quantiser.
        bytes: of the weights.
        seconds: that saving took.
    """

    folder: Path
    method: str
    dtype: str
    errors: dict[str, float] = field(default_factory=dict)
    output_errors: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    bytes: int = 0
    seconds: float = 0.0

    @property
    def worst(self) -> tuple[str, float]:
        """The tensor that is farthest from the merged one, and how far."""
        return max(self.errors.items(), key=lambda item: item[1], default=("", 0.0))

    def as_json(self) -> str:
        """All of it but the folder."""
        name, error = self.worst
        return json.dumps({
            "method": self.method, "dtype": self.dtype, "settings": self.settings, "bytes": self.bytes,
            "seconds": round(self.seconds, 1), "worst": {"tensor": name, "relative_error": error},
            "relative_errors": self.errors, "relative_output_errors": self.output_errors,
        }, indent=1) + "\n"


class CheckpointOutput:
    """Takes the tensors of a checkpoint in any order; `save.saved_checkpoint` opens and closes it."""

    def __init__(self, base: Any, dtype: torch.dtype, writer: ShardWriter, report: SaveReport) -> None:
        self.base, self.dtype, self.writer, self.report = base, dtype, writer, report

    def add(self, name: str, tensor: Tensor) -> Tensor:
        """Write a merged tensor in the checkpoint's type, in which it is returned.

        Raises:
            ModelError: it holds NaN or infinity, or does in that type.
        """
        from transformers.core_model_loading import revert_weight_conversion

        tell(name)
        kept = self.rounded(name, tensor)
        self.report.errors[name] = relative_error(kept, tensor)
        for hub_name, part in revert_weight_conversion(self.base, {name: kept}).items():
            self.writer.add(hub_name, part.to("cpu"))
        return kept

    def rounded(self, name: str, tensor: Tensor) -> Tensor:
        """A merged tensor in the checkpoint's type, looked at for NaN and infinity before and after."""
        check_finite([(name, tensor)], "the merged model")
        if not tensor.is_floating_point():
            return tensor
        kept = tensor.to(self.dtype)
        if self.dtype == torch.float16 and not kept.isfinite().all():
            raise ModelError("a weight is too large for float16", where=name,
                             found=f"{float(tensor.abs().max()):.3g}", expected="at most 65504",
                             fix='save with dtype="bfloat16"')
        return kept

    def add_quantised(self, name: str, merged: Tensor, kept: Tensor, parts: dict[str, Tensor]) -> None:
        """Write a weight that is kept as several tensors.

        Args:
            name: of the weight.
            merged: what it was, finite.
            kept: what is read back.
            parts: by what stands behind the name of its layer, such as "weight_packed".
        """
        from transformers.core_model_loading import revert_weight_conversion

        tell(name)
        self.report.errors[name] = relative_error(kept, merged)
        hub_name, = revert_weight_conversion(self.base, {name: kept})
        stem = hub_name.removesuffix("weight")
        for suffix, part in parts.items():
            self.writer.add(stem + suffix, part.to("cpu"))


def relative_error(kept: Tensor, wanted: Tensor) -> float:
    """||kept - wanted|| / ||wanted||, 0 for what is equal."""
    if kept.dtype == wanted.dtype and kept.data_ptr() == wanted.data_ptr():
        return 0.0
    off = total = 0.0
    for left, right in zip(kept.flatten().split(_CHUNK), wanted.flatten().split(_CHUNK), strict=True):
        right = right.float()
        off += float((left.float() - right).square().sum(dtype=torch.float64))
        total += float(right.square().sum(dtype=torch.float64))
    return (off / total) ** 0.5 if total else off**0.5
