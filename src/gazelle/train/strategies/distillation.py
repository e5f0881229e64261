"""A small model learns from a large one: from its probabilities for every token, not from the right token alone."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 — the field's name for it
from torch import Tensor

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import OptionError
from gazelle.base.log import say_once
from gazelle.data.encode import Example
from gazelle.models.packed import packed_attention_on, supports_packing
from gazelle.models.swap import accelerate
from gazelle.train.dataset import Bins, Collator, labelled_targets, padding_id
from gazelle.train.loss import labelled_logits
from gazelle.train.strategies.teacher_logits import (
    TaughtCollator,
    TeacherLogits,
    TopLogits,
    left_out,
    vocabulary_of,
)
from gazelle.train.trainer import SFTTrainer


def distillation_loss(student: Tensor, teacher: Tensor, targets: Tensor, *, temperature: float, alpha_ce: float,
                      alpha_mse: float) -> Tensor:
    """Sum over positions of α_ce·T²·KL(teacher ‖ student) + α_mse·MSE + (1 − α_ce − α_mse)·CE.

    KL is between the softmaxes of logits / T (https://arxiv.org/abs/1503.02531), MSE the mean square of the logits'
    difference over the vocabulary, CE the cross entropy with the targets.

    Args:
        student, teacher: logits [n, V].
        targets: [n].
        temperature, alpha_ce, alpha_mse: T and α above.
    """
    student, teacher = student.float(), teacher.float()
    loss = (1 - alpha_ce - alpha_mse) * F.cross_entropy(student, targets, reduction="sum")
    if alpha_ce:
        theirs = F.log_softmax(teacher / temperature, dim=-1)
        ours = F.log_softmax(student / temperature, dim=-1)
        loss = loss + alpha_ce * temperature**2 * F.kl_div(ours, theirs, reduction="sum", log_target=True)
    if alpha_mse:
        loss = loss + alpha_mse * (student - teacher).square().mean(-1).sum()
    return loss


def kept_distillation_loss(student: Tensor, teacher: TopLogits, targets: Tensor, *, temperature: float,
                           alpha_ce: float, alpha_mse: float) -> Tensor:
    """`distillation_loss` of the k logits that were kept of the teacher, and the same where k is all of them.

    KL is between the softmaxes of the k logits / T, and, where k leaves tokens out, between the probabilities of these
    as a whole, at T = 1: at a higher T the many that are left out weigh too much, and what the student then puts on
    the wrong ones of them it keeps (docs/log.md). MSE is over the k.

    Args:
        student: logits [n, V].
        teacher: of the same positions.
        targets, temperature, alpha_ce, alpha_mse: as there.
    """
    student, ids, theirs = student.float(), teacher.ids.long(), teacher.below.float()
    ours = student.gather(1, ids)
    loss = (1 - alpha_ce - alpha_mse) * F.cross_entropy(student, targets, reduction="sum")
    if alpha_ce:
        soft = F.kl_div(F.log_softmax(ours / temperature, -1), F.log_softmax(theirs / temperature, -1),
                        reduction="sum", log_target=True)
        loss = loss + alpha_ce * temperature**2 * soft
        if ids.shape[1] < student.shape[1]:
            rest, share = left_out(student, ids), ours.logsumexp(-1) - student.logsumexp(-1)
            for log_p, log_q in ((teacher.rest, rest), (torch.log1p(-teacher.rest.exp()), share)):
                loss = loss + alpha_ce * F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    if alpha_mse:
        loss = loss + alpha_mse * (ours - theirs - teacher.first[:, None]).square().mean(-1).sum()
    return loss


class DistillationTrainer(SFTTrainer):
    """`SFTTrainer` whose model learns from another one with the same vocabulary, of any size.

    Logits of both are kept for the labelled tokens of a micro-batch; they and the teacher are not in the memory plan.
    Evaluation is the cross entropy, as without a teacher.

    Args:
        teacher_model: never changed; put on the student's device by the caller. Or the folder that
            `save_teacher_logits` wrote: then no teacher is in memory.
        student_model: what is trained.
        temperature, alpha_ce, alpha_mse: of `distillation_loss`.
        **kwargs: of `SFTTrainer`.

    Raises:
        OptionError: vocabularies differ, or weights of the losses do not add up.
    """

    def __init__(self, teacher_model: Any, student_model: Any, *args: Any, temperature: float = 2.0,
                 alpha_ce: float = 0.5, alpha_mse: float = 0.0, **kwargs: Any) -> None:
        kept = TeacherLogits(teacher_model) if isinstance(teacher_model, str | Path) else None
        if not temperature > 0 or min(alpha_ce, alpha_mse) < 0 or alpha_ce + alpha_mse > 1:
            raise OptionError("weights of the losses that do not add up", where="temperature, alpha_ce, alpha_mse",
                              found=f"{temperature}, {alpha_ce}, {alpha_mse}",
                              expected="a temperature above 0, and weights from 0 to 1 in all",
                              fix="the rest of 1 is the weight of the right token's cross entropy")
        if kept is None:
            check_fits(teacher_model, student_model)
        super().__init__(student_model, *args, **kwargs)
        self.teacher: Any = accelerate(teacher_model) if kept is None else None
        self.temperature, self.alpha_ce, self.alpha_mse = temperature, alpha_ce, alpha_mse
        self._graphed = False
        pad = padding_id(self.processing_class)
        self.kept = kept
        if kept is not None:
            kept.check(self._rows(), vocabulary_of(student_model))
            self.data_collator: Collator = TaughtCollator(self._packed, pad, kept)
        elif self._own_collator is None:
            self._packed = self._packed and supports_packing(teacher_model) is None
            self.data_collator = Collator(self._packed, pad)
        if self.args.label_smoothing_factor:
            say_once("label_smoothing_factor has no effect: the teacher's probabilities are smooth")

    def _rows(self) -> list[Example]:
        """The rows that batches are made of."""
        if self._own_collator is not None or not isinstance(self.train_dataset, Bins):
            raise OptionError("a teacher's kept logits belong to rows that the trainer joins to batches itself",
                              where="data_collator", found="a collator of your own, or no training data",
                              expected="training data and no data_collator", fix="leave data_collator out")
        return [row for bin_ in self.train_dataset.bins for row in bin_]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.kept is not None:
            self.kept.check(self._rows(), vocabulary_of(self.model))  # train_on_responses_only makes other labels
            return super().train(*args, **kwargs)
        training = self.teacher.training
        self.teacher.eval()
        try:
            if not self._packed:
                return super().train(*args, **kwargs)
            with packed_attention_on(self.teacher):
                return super().train(*args, **kwargs)
        finally:
            self.teacher.train(training)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
                     num_items_in_batch: Tensor | int | None = None) -> Any:
        """Mean of `distillation_loss` over the labelled tokens of the whole accumulated batch."""
        if not model.training or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.tokens += inputs.get("tokens", inputs["labels"].numel())
        positions, targets = labelled_targets(inputs["labels"])
        weights = {"temperature": self.temperature, "alpha_ce": self.alpha_ce, "alpha_mse": self.alpha_mse}
        if self.teacher is None:
            theirs = TopLogits(*inputs["teacher"])
            total = kept_distillation_loss(labelled_logits(model, inputs, positions), theirs, targets, **weights)
        else:
            with torch.no_grad():
                logits = labelled_logits(self.teacher, inputs, positions)
            total = distillation_loss(labelled_logits(model, inputs, positions), logits, targets, **weights)
        count = num_items_in_batch if num_items_in_batch is not None else len(targets)
        loss = total / torch.as_tensor(count).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return loss


def check_fits(teacher_model: Any, student_model: Any) -> None:
    """Raise `OptionError` for a teacher whose logits cannot be put beside the student's."""
    sizes = [vocabulary_of(model) for model in (teacher_model, student_model)]
    if sizes[0] != sizes[1]:
        raise OptionError("teacher and student have different vocabularies", where="teacher_model",
                          found=f"{sizes[0]:,} and {sizes[1]:,} tokens", expected="the same tokens in both",
                          fix="choose a teacher of the student's family")
    if unwrap(teacher_model).device != unwrap(student_model).device:
        raise OptionError("teacher and student are on different devices", where="teacher_model",
                          found=str(unwrap(teacher_model).device), expected=str(unwrap(student_model).device),
                          fix="move the teacher: teacher_model.to(student_model.device)")
