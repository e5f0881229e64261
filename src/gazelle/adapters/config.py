"""An adapter from a configuration of PEFT's own, exactly as it says."""

from typing import TYPE_CHECKING, Any

from gazelle.base.errors import OptionError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


def add_adapter(model: Any, config: "PeftConfig") -> "PeftModel":
    """Put the adapter that `config` describes on `model`.

    Raises:
        OptionError: `config` is no `peft.PeftConfig`, or the model has an adapter already.
    """
    import peft

    if not isinstance(config, peft.PeftConfig):
        raise OptionError("this is no adapter configuration", where="peft_config", found=type(config).__name__,
                          expected="peft.LoraConfig or another of PEFT's", fix="pass peft.LoraConfig(r=16, …)")
    if isinstance(model, peft.PeftModel):
        raise OptionError("the model has an adapter already", where="peft_config", found=type(model).__name__,
                          expected="a model without an adapter", fix="leave peft_config out")
    adapted = peft.get_peft_model(model, config)
    if getattr(model, "is_quantized", False):
        adapted.enable_input_require_grads()
    return adapted
