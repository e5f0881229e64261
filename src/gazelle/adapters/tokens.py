"""New tokens: rows for them in the embeddings, trained and saved with the adapter.

PEFT trains single rows of the embedding (`trainable_token_indices`), so a few new tokens do not cost a copy of it.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from gazelle.base.errors import OptionError

if TYPE_CHECKING:
    from peft import PeftModel


def resize_token_embeddings(model: Any, new_size: int) -> torch.nn.Module:
    """Make room for `new_size` tokens, in place, and train the new ones. Before or after `add_lora`.

    New rows start as the mean of the rows in use. The embedding never shrinks: rows beyond the tokenizer are padding
    that the checkpoint came with. After `add_lora`, the factors keep their values, but are new parameters: call this
    before the trainer is made.

    Args:
        model: the model, with or without an adapter. `model.tokens_in_use`, which `load_model` sets, tells which rows
            are new; without it, those beyond the embedding.
        new_size: `len(tokenizer)`.

    Returns:
        The input embedding.

    Raises:
        OptionError: `new_size` is no positive number, or below `model.tokens_in_use`.
    """
    import peft

    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    rows = base.get_input_embeddings().weight.shape[0]
    in_use = getattr(base, "tokens_in_use", rows)
    if isinstance(new_size, bool) or not isinstance(new_size, int) or new_size < 1:
        raise OptionError("the vocabulary size must be a positive whole number", where="resize_token_embeddings",
                          found=repr(new_size), expected="len(tokenizer)", fix="pass len(tokenizer)")
    if not hasattr(base, "tokens_in_use") and new_size < rows:
        return model.get_input_embeddings()  # which rows are padding is not known here
    if new_size < in_use:
        raise OptionError("tokens cannot be taken away", where="resize_token_embeddings", found=f"{new_size:,}",
                          expected=f"at least the {in_use:,} tokens in use", fix="pass len(tokenizer)")
    if new_size > in_use:
        if isinstance(model, peft.PeftModel):
            _rebuild(model, in_use, new_size, peft)
        else:
            _grow(base, in_use, new_size)
    return model.get_input_embeddings()


def new_token_indices(model: Any, trained_in_full: Collection[str] = ()) -> list[int] | dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices` for the tokens added so far; both ends of the model if they are not tied.

    Ends named in `trained_in_full` are left out, and so is the other if the two are tied.
    """
    added = list(getattr(model, "added_token_ids", ()))
    names = embedding_names(model)
    tied = len(names) > 1 and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    full = set(names) & set(trained_in_full)
    if not added or (tied and full) or len(full) == len(names):
        return None
    if tied or len(names) == 1:
        return added
    return dict.fromkeys([name for name in names if name not in full], added)


def embedding_names(model: Any) -> list[str]:
    """Last parts of the names of the input embedding and, if there is one, of the head."""
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [names[id(end)] for end in ends if end is not None]


def _grow(base: Any, in_use: int, new_size: int) -> None:
    if new_size > base.get_input_embeddings().weight.shape[0]:
        # The class's own: on the object itself may sit a method that comes back here.
        type(base).resize_token_embeddings(base, new_size, mean_resizing=False)
    ends = {id(end.weight): end.weight for end in (base.get_input_embeddings(), base.get_output_embeddings()) if end}
    with torch.no_grad():
        for weight in ends.values():
            weight[in_use:new_size] = weight[:in_use].mean(0, dtype=torch.float32).to(weight.dtype)
    base.added_token_ids = [*getattr(base, "added_token_ids", ()), *range(in_use, new_size)]
    base.tokens_in_use = new_size


def _rebuild(model: "PeftModel", in_use: int, new_size: int, peft: Any) -> None:
    """Take the adapter off, grow, put it on again with the same weights: PEFT cannot add token rows to a live one."""
    if len(model.peft_config) != 1:
        raise OptionError("tokens cannot be added to a model with several adapters", where="resize_token_embeddings",
                          found=", ".join(model.peft_config), expected="one adapter", fix="delete_adapter the others")
    name, config = next(iter(model.peft_config.items()))
    if set(config.modules_to_save or ()) & {"embed_tokens", "lm_head"}:
        raise OptionError("the embedding is trained in full already", where="resize_token_embeddings",
                          found=f"modules_to_save={config.modules_to_save}", expected="tokens added before the adapter",
                          fix="call resize_token_embeddings before get_peft_model")
    training = model.training
    weights = {key: value.clone() for key, value in model.state_dict().items()
               if ".lora_" in key or ".modules_to_save." in key}
    _keep_trained_tokens(model, name, peft)
    base: Any = model.base_model.unload()
    _grow(base, in_use, new_size)
    config.trainable_token_indices = new_token_indices(base)
    config.inference_mode = False
    init, config.init_lora_weights = config.init_lora_weights, True  # the values are put back below
    with torch.random.fork_rng(devices=[]):
        rebuilt = peft.get_peft_model(base, config, adapter_name=name)
    config.init_lora_weights = init
    rebuilt.load_state_dict(weights, strict=False)
    model.base_model = rebuilt.base_model
    model.train(training)


def _keep_trained_tokens(model: "PeftModel", name: str, peft: Any) -> None:
    """Write rows trained so far into the embedding itself, from where the new adapter takes them."""
    for module in model.modules():
        if isinstance(module, peft.tuners.trainable_tokens.TrainableTokensLayer):
            rows = module.trainable_tokens_delta[name].detach()
            weight = module.get_base_layer().weight.data
            weight[module.token_indices[name]] = rows.to(weight.dtype)
