"""Puts LoRA on a model through PEFT, with every option checked before anything is changed."""

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gazelle.adapters.targets import resolve_targets
from gazelle.adapters.tokens import embedding_names, new_token_indices
from gazelle.base.errors import OptionError, nearest
from gazelle.base.log import logger
from gazelle.quantize.bnb import is_quantized_linear

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

CHECKPOINTING = (True, False, "auto", "offload", "unsloth")


def add_lora(model: Any, *, r: int = 16, target_modules: str | Sequence[str] | None = None,
             lora_alpha: float = 16, lora_dropout: float = 0.0, bias: str = "none", random_state: int = 3407,
             use_rslora: bool = False, loftq_config: dict[str, Any] | None = None,
             layers_to_transform: int | Sequence[int] | None = None, modules_to_save: Sequence[str] | None = None,
             use_dora: bool = False, use_gradient_checkpointing: bool | str = "auto", **kwargs: Any) -> "PeftModel":
    """Freeze `model` and put trainable low-rank factors on its linear layers (https://arxiv.org/abs/2106.09685).

    Tokens added by `resize_token_embeddings` are trained with it. The factors are float32 where the model is.

    Args:
        model: a causal language model, quantised or not, without an adapter.
        r: rank of the factors.
        target_modules: layer names in any common spelling, a regular expression, or None for all linear layers.
        lora_alpha: the update is scaled by lora_alpha / r, with `use_rslora` by lora_alpha / √r.
        lora_dropout: probability of dropping an input of the factors.
        bias: "none", "all" or "lora_only": which biases are trained.
        random_state: seed of the factors; the program's own random state is left as it was.
        use_rslora: rank-stabilised scaling (https://arxiv.org/abs/2312.03732).
        loftq_config: options of peft.LoftQConfig (https://arxiv.org/abs/2310.08659); None or {} for none.
        layers_to_transform: numbers of the decoder layers to adapt; None for all.
        modules_to_save: modules to train in full and save with the adapter.
        use_dora: train direction and magnitude apart (https://arxiv.org/abs/2402.09353).
        use_gradient_checkpointing: True switches it on, False off; "auto", "offload" and "unsloth" leave it to the
            trainer.
        **kwargs: further options of peft.LoraConfig.

    Raises:
        OptionError: an option that does not exist or cannot be used with this model.
    """
    import peft

    if isinstance(model, peft.PeftModel):
        raise OptionError("the model has an adapter already", where="get_peft_model", found=type(model).__name__,
                          expected="a model without an adapter", fix="go on with this one, or load the model anew")
    _check_numbers(r, lora_alpha, lora_dropout, bias)
    _check_choice("use_gradient_checkpointing", use_gradient_checkpointing, CHECKPOINTING)
    known = {field.name for field in dataclasses.fields(peft.LoraConfig) if field.init}
    if unknown := [name for name in kwargs if name not in known]:
        raise OptionError("LoRA has no such option", where="get_peft_model", found=unknown[0],
                          expected="an option of peft.LoraConfig", fix=nearest(unknown[0], known))
    layers = _layers(model, layers_to_transform)
    targets = resolve_targets(model, target_modules)
    saved = _modules_to_save(model, modules_to_save)
    new_tokens = new_token_indices(model, saved or ())
    _check_embedding(model, targets, new_tokens)
    options: dict[str, Any] = {
        "task_type": "CAUSAL_LM", "r": r, "target_modules": targets, "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout, "bias": bias, "use_rslora": use_rslora, "use_dora": use_dora,
        "layers_to_transform": layers, "modules_to_save": saved, "trainable_token_indices": new_tokens,
        "ensure_weight_tying": _trains_both_ends(model, saved),
    }
    if loftq_config:
        options |= _loftq(model, loftq_config, peft)
    with _seeded(model, random_state):
        adapted = _build(model, peft.LoraConfig(**(options | kwargs)), peft)
    _prepare(adapted, use_gradient_checkpointing)
    adapted.use_gradient_checkpointing = use_gradient_checkpointing  # the trainer asks when it is "auto"
    trainable, total = adapted.get_nb_trainable_parameters()
    logger.info("trainable params: %s || all params: %s || trainable%%: %.4f", f"{trainable:,}", f"{total:,}",
                100 * trainable / total)
    return adapted


def _check_numbers(r: Any, alpha: Any, dropout: Any, bias: Any) -> None:
    def refuse(name: str, found: Any, expected: str) -> OptionError:
        return OptionError("a value that cannot be used", where=name, found=repr(found), expected=expected,
                           fix=f"change {name}")

    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise refuse("r", r, "a positive whole number, such as 16")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
        raise refuse("lora_alpha", alpha, "a positive number, such as 16")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise refuse("lora_dropout", dropout, "a number from 0 up to, not including, 1")
    _check_choice("bias", bias, ("none", "all", "lora_only"))


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise OptionError("a value that cannot be used", where=name, found=repr(value),
                          expected="one of " + ", ".join(map(str, choices)), fix=f"change {name}")


def _layers(model: Any, wanted: int | Sequence[int] | None) -> list[int] | None:
    if wanted is None:
        return None
    count = model.config.get_text_config().num_hidden_layers
    layers = [wanted] if isinstance(wanted, int) else list(wanted)
    if wrong := [layer for layer in layers if not isinstance(layer, int) or not 0 <= layer < count]:
        raise OptionError("the model has no such layer", where="layers_to_transform", found=wrong[0],
                          expected=f"0 to {count - 1}", fix="change layers_to_transform")
    return layers


def _modules_to_save(model: torch.nn.Module, wanted: Sequence[str] | None) -> list[str] | None:
    if not wanted:
        return None
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    paths = [name for name, _ in model.named_modules()]
    for name in wanted:
        if not any(path == name or path.endswith("." + name) for path in paths):
            last = {path.rpartition(".")[2] for path in paths} - {""}
            raise OptionError("the model has no such module", where="modules_to_save", found=name,
                              expected="names of modules, such as embed_tokens",
                              fix=nearest(name, {part for part in last if not part.isdecimal()}))
    return wanted


def _check_embedding(model: Any, targets: str | list[str], new_tokens: Any) -> None:
    """New rows are trained by themselves; PEFT cannot put factors on the same module."""
    if not new_tokens:
        return
    rows = new_tokens if isinstance(new_tokens, dict) else {embedding_names(model)[0]: new_tokens}
    for path, _ in model.named_modules():
        name = path.rpartition(".")[2]
        hit = re.fullmatch(targets, path) if isinstance(targets, str) \
            else any(path == target or path.endswith("." + target) for target in targets)
        if hit and name in rows:
            raise OptionError("a module with new tokens cannot have LoRA as well", where="target_modules", found=name,
                              expected=f"targets without {name}, whose new rows are trained anyway",
                              fix=f"leave {name} out, or train it in full with modules_to_save=[{name!r}]")


def _trains_both_ends(model: Any, saved: list[str] | None) -> bool:
    """True if one of two tied embeddings is trained in full: the other has to follow."""
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    return bool(tied and saved and {"embed_tokens", "lm_head"} & set(saved))


def _loftq(model: torch.nn.Module, wanted: dict[str, Any], peft: Any) -> dict[str, Any]:
    if any(is_quantized_linear(module) for module in model.modules()):
        raise OptionError("LoftQ quantises the model itself", where="loftq_config", found="a quantised model",
                          expected="an unquantised one", fix="load with load_in_4bit=False, or leave out loftq_config")
    try:
        return {"init_lora_weights": "loftq", "loftq_config": peft.LoftQConfig(**wanted)}
    except (TypeError, ValueError, ImportError) as error:
        raise OptionError("LoftQ cannot be set up", where="loftq_config", found=str(error),
                          expected="options of peft.LoftQConfig, such as {'loftq_bits': 4}",
                          fix="correct loftq_config, or leave it out") from error


@contextlib.contextmanager
def _seeded(model: torch.nn.Module, seed: int) -> Iterator[None]:
    devices = {weight.device for weight in model.parameters() if weight.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


def _build(model: Any, config: "LoraConfig", peft: Any) -> "PeftModel":
    # Made where the model is: factors made on the host first take a second for a large model.
    place = next(model.parameters()).device
    try:
        with warnings.catch_warnings(), torch.device(place):
            # An adapter on one of two tied ends: merging writes both, so what PEFT warns of does not happen.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            return peft.get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise OptionError("LoRA cannot be put on this model in this way", where="get_peft_model", found=str(error),
                          expected="options that suit the model", fix="change or leave out the option it names"
                          ) from error


def _prepare(model: Any, checkpointing: bool | str) -> None:
    quantized = any(is_quantized_linear(module) for module in model.modules())
    if checkpointing is True:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif checkpointing is False:
        model.gradient_checkpointing_disable()
    if quantized or checkpointing is True:
        # Frozen embeddings give inputs without a gradient, at which reentrant checkpointing would stop.
        model.enable_input_require_grads()
