"""The language-model head of a Hugging Face model object, fused with its loss while it trains."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gazelle.adapters.unwrap import unwrap
from gazelle.engine.loss import linear_cross_entropy
from gazelle.models.families import FAMILIES, UnsupportedError
from gazelle.models.linears import hooked
from gazelle.models.modes import evaluating


@dataclass(frozen=True)
class Labelled:
    """What is learnt of a batch: `positions` [n] in the tokens laid end to end, and the `targets` [n] they predict."""

    positions: Tensor
    targets: Tensor
    smoothing: float = 0.0


class FusedHead(nn.Module):
    """The part of a causal model's class that replaces the original's forward pass where there are labels."""

    gazelle_logits: tuple[float, float | None]

    def forward(self, *args: Any, gazelle_labelled: Labelled | None = None, **kwargs: Any) -> Any:
        """As the original; with labels in training, the loss alone, and no logits.

        With `gazelle_labelled` the loss is a sum; with `labels` or `shift_labels` it is the mean, or the sum over
        `num_items_in_batch`.
        """
        labels: Any = kwargs.get("labels")
        shifted: Any = kwargs.get("shift_labels")
        learns = self.training and (labels is not None or shifted is not None) and not head_refusal(self)
        asked = gazelle_labelled is not None or learns
        if self.training and torch.is_grad_enabled() and len(args) < 4 and kwargs.get("past_key_values") is None \
                and kwargs.get("use_cache") is None:
            kwargs["use_cache"] = False  # nobody reads a cache made in training, and layers would fill it as of old
        if not asked or args or kwargs.get("return_dict") is False:
            return super().forward(*args, **kwargs)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        for name in ("labels", "shift_labels", "logits_to_keep"):
            kwargs.pop(name, None)
        count = kwargs.pop("num_items_in_batch", None)
        inner: Any = self
        output = inner.model(**kwargs)
        hidden = output.last_hidden_state.flatten(0, 1)
        scale, softcap = self.gazelle_logits
        if gazelle_labelled is not None:
            hidden, targets = hidden[gazelle_labelled.positions], gazelle_labelled.targets
            smoothing = gazelle_labelled.smoothing
        else:
            if shifted is None:
                shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
            shifted = shifted.flatten().to(hidden.device)
            positions = (shifted != -100).nonzero()[:, 0]
            hidden, targets, smoothing = hidden[positions], shifted[positions], 0.0
        loss = linear_cross_entropy(hidden, inner.lm_head.weight, targets, scale=scale, softcap=softcap,
                                    label_smoothing=smoothing)
        if gazelle_labelled is None:
            loss = loss / (len(targets) if count is None else count)
        return CausalLMOutputWithPast(loss=loss, past_key_values=output.past_key_values,
                                      hidden_states=output.hidden_states, attentions=output.attentions)


def has_fused_head(model: Any) -> bool:
    """True if the model, or the one inside its adapter or its distributed wrapper, computes its own loss sums."""
    inner = unwrap(getattr(model, "module", model))
    return isinstance(inner, FusedHead) and not head_refusal(inner)


def head_refusal(inner: Any) -> str:
    """Why the head of a model cannot be fused with its loss as it is now, or nothing. An adapter may change that."""
    head = getattr(inner, "lm_head", None)
    if type(head) is not nn.Linear or head.bias is not None or not hasattr(inner, "model"):
        return "its head is no plain linear layer"
    return "hooks on its head" if hooked(head) else ""


def logits_of(inner: Any) -> tuple[float, float | None]:
    """What a model does to its logits: their scale, and their soft-cap.

    Raises:
        UnsupportedError: something that is not known here.
    """
    config = inner.config.get_text_config()
    scaling = getattr(config, "logits_scaling", 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    if config.model_type not in FAMILIES and not _plain(inner):
        raise UnsupportedError("it does something to its logits that the engine does not know")
    return 1 / scaling, softcap


def _plain(inner: Any) -> bool:
    """True if the logits of two tokens are what the head makes of the last hidden state."""
    if inner.device.type == "meta":
        return False
    ids = torch.tensor([[1, 2]], device=inner.get_input_embeddings().weight.device)
    try:
        with torch.no_grad(), evaluating(inner):
            logits = inner(input_ids=ids, use_cache=False).logits
            own = inner.lm_head(inner.model(input_ids=ids, use_cache=False).last_hidden_state)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    return torch.equal(logits, own)
