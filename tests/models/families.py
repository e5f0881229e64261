"""Small random models of every family of the engine, and the rows to try them on."""

import copy
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from gazelle.quantize.bnb import forbid_repacking

VOCABULARY = 97
SHARED = {"vocab_size": VOCABULARY, "max_position_embeddings": 128, "attn_implementation": "eager", "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": 2}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
             "long_factor": [2.0, 2.1, 2.2, 2.3], "original_max_position_embeddings": 64, "partial_rotary_factor": 0.5}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
                                             "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                             "original_max_position_embeddings": 32}}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "phi3": ("Phi3", {"sliding_window": 6}),
    "phi4-mini": ("Phi3", {"rope_parameters": LONG_ROPE, "max_position_embeddings": 128,
                           "original_max_position_embeddings": 64, "head_dim": 16, "hidden_size": 48,
                           "num_attention_heads": 3, "num_key_value_heads": 1}),
    "gemma": ("Gemma", {"hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2": ("Gemma2", {"sliding_window": 5, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0,
                          "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3Text", {"sliding_window": 5, "query_pre_attn_scalar": 24,
                              "layer_types": ["sliding_attention", "full_attention"]}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "granite": ("Granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7,
                            "attention_multiplier": 0.3}),
}


def make(family: str, seed: int, *, tied: bool = True, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """A random model of two layers, of a shape drawn with `seed`."""
    name, options = FAMILIES[family]
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2])
    shape = {"hidden_size": draw.choice([24, 36, 48]), "intermediate_size": draw.choice([56, 72]),
             "num_hidden_layers": 2, "num_attention_heads": kv_heads * draw.choice([1, 2, 3]),
             "num_key_value_heads": kv_heads, "head_dim": draw.choice([8, 16]), "tie_word_embeddings": tied}
    config = getattr(transformers, f"{name}Config")(**(SHARED | shape | options | sizes))
    torch.manual_seed(seed)
    head_name = "Gemma3ForCausalLM" if family == "gemma3" else f"{name}ForCausalLM"
    model = getattr(transformers, head_name)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms too, and far from their neutral values
            std = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn_like(parameter) * std)
            if parameter.dim() == 1:
                parameter += 1
    return model.to(dtype).train()


def adapt(model: Any, targets: str | list[str] = "all-linear", r: int = 4, alpha: float = 6, **options: Any) -> Any:
    """With LoRA whose factors are both away from zero, so that each has a gradient."""
    adapted = get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, **options))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return adapted.train()


def quantized(folder: Path, family: str = "llama", layers: int = 2, **options: Any) -> Any:
    """An adapted model whose linear layers bitsandbytes keeps, as `options` of `BitsAndBytesConfig` say."""
    make(family, 24, hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
         num_hidden_layers=layers).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options),
                                                 device_map={"": "cpu"}, attn_implementation="eager",
                                                 dtype=torch.float32)
    forbid_repacking(model)
    return adapt(model)


def rows(seed: int = 0, lengths: tuple[int, ...] = (7, 1, 12, 4)) -> list[Tensor]:
    """Rows of random ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def packed(rows: list[Tensor], device: str = "cpu") -> dict[str, Any]:
    """A packed batch in which every other token is learnt."""
    lengths = [len(row) for row in rows]
    labels = torch.cat([torch.cat([row.new_full((1,), -100), row[1:]]) for row in rows])
    labels[::3] = -100
    starts = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    return {"input_ids": torch.cat(rows)[None].to(device), "labels": labels[None].to(device),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to(device),
            "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": max(lengths),
            "max_length_k": max(lengths)}


def reference_loss(model: Any, rows: list[Tensor]) -> Tensor:
    """Sum of the cross entropies by Hugging Face, one row at a time, with the labels of `packed`."""
    labels = packed(rows)["labels"][0].split([len(row) for row in rows])
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    device = next(model.parameters()).device
    total = total.to(device)
    for row, targets in zip(rows, labels, strict=True):
        logits = model(input_ids=row[None].to(device), use_cache=False).logits[0, :-1]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = total + torch.nn.functional.cross_entropy(wide, targets[1:].to(device), reduction="sum",
                                                          ignore_index=-100)
    return total


def gradients(model: Any) -> dict[str, Tensor]:
    """Every gradient by its parameter's name; the model's own are cleared."""
    found = {name: parameter.grad.detach().clone() for name, parameter in model.named_parameters()
             if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def twin(model: Any) -> Any:
    """A copy with its own weights."""
    return copy.deepcopy(model)
