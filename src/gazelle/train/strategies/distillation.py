"""A small model learns from a large one: from its probabilities for every token, not from the right token alone."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 — the field's name for it
from torch import Tensor

from gazelle.adapters.unwrap import unwrap
from gazelle.base.errors import OptionError
from gazelle.base.log import say_once
from gazelle.models.packed import packed_attention_on, supports_packing
from gazelle.models.swap import accelerate
from gazelle.train.dataset import Collator, labelled_targets
from gazelle.train.loss import NOTES, packed_rows
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


class DistillationTrainer(SFTTrainer):
    """`SFTTrainer` whose model learns from another one with the same vocabulary, of any size.

    Logits of both are kept for the labelled tokens of a micro-batch; they and the teacher are not in the memory plan.
    Evaluation is the cross entropy, as without a teacher.

    Args:
        teacher_model: never changed; put on the student's device by the caller.
        student_model: what is trained.
        temperature, alpha_ce, alpha_mse: of `distillation_loss`.
        **kwargs: of `SFTTrainer`.

    Raises:
        OptionError: vocabularies differ, or weights of the losses do not add up.
    """

    def __init__(self, teacher_model: Any, student_model: Any, *args: Any, temperature: float = 2.0,
                 alpha_ce: float = 0.5, alpha_mse: float = 0.0, **kwargs: Any) -> None:
        sizes = [unwrap(model).get_output_embeddings().weight.shape[0] for model in (teacher_model, student_model)]
        if sizes[0] != sizes[1]:
            raise OptionError("teacher and student have different vocabularies", where="teacher_model",
                              found=f"{sizes[0]:,} and {sizes[1]:,} tokens", expected="the same tokens in both",
                              fix="choose a teacher of the student's family")
        if not temperature > 0 or min(alpha_ce, alpha_mse) < 0 or alpha_ce + alpha_mse > 1:
            raise OptionError("weights of the losses that do not add up", where="temperature, alpha_ce, alpha_mse",
                              found=f"{temperature}, {alpha_ce}, {alpha_mse}",
                              expected="a temperature above 0, and weights from 0 to 1 in all",
                              fix="the rest of 1 is the weight of the right token's cross entropy")
        if unwrap(teacher_model).device != unwrap(student_model).device:
            raise OptionError("teacher and student are on different devices", where="teacher_model",
                              found=str(unwrap(teacher_model).device), expected=str(unwrap(student_model).device),
                              fix="move the teacher: teacher_model.to(student_model.device)")
        super().__init__(student_model, *args, **kwargs)
        self.teacher = accelerate(teacher_model)
        self.temperature, self.alpha_ce, self.alpha_mse = temperature, alpha_ce, alpha_mse
        self._graphed = False
        if self._own_collator is None:
            self._packed = self._packed and supports_packing(self.teacher) is None
            tokenizer = self.processing_class
            pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
            self.data_collator = Collator(self._packed, pad)
        if self.args.label_smoothing_factor:
            say_once("label_smoothing_factor has no effect: the teacher's probabilities are smooth")

    def train(self, *args: Any, **kwargs: Any) -> Any:
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
        with torch.no_grad():
            theirs = labelled_logits(self.teacher, inputs, positions)
        total = distillation_loss(labelled_logits(model, inputs, positions), theirs, targets,
                                  temperature=self.temperature, alpha_ce=self.alpha_ce, alpha_mse=self.alpha_mse)
        count = num_items_in_batch if num_items_in_batch is not None else len(targets)
        loss = total / torch.as_tensor(count).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return loss


def labelled_logits(model: Any, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """[n, V]: a model's logits at positions in the tokens of all rows of a batch."""
    arguments = {name: value for name, value in inputs.items() if name not in NOTES}
    if "cu_seq_lens_q" not in inputs:
        return model(**arguments, use_cache=False).logits.flatten(0, 1)[positions]
    return model(**arguments, gazelle_rows=packed_rows(inputs), logits_to_keep=positions, use_cache=False).logits[0]
