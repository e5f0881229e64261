"""The calls people type, end to end on the real demo model and checked in plain transformers and PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from gazelle import FastLanguageModel, SFTConfig, SFTTrainer
from gazelle.base.errors import OptionError

QUIET: dict[str, Any] = {"report": False, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-3,
                         "per_device_train_batch_size": 2, "logging_steps": 1}


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def test_train_save_merge_and_load_elsewhere(
    demo_gguf: Path, demo_model: Callable[[], Any], tmp_path: Path
) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(str(demo_gguf), max_seq_length=256, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)
    rows = [{"prompt": "Who runs the mill?", "completion": "Mrs. Okonkwo runs the mill."}] * 4
    SFTTrainer(model, SFTConfig(output_dir=str(tmp_path / "out"), max_steps=4, **QUIET), rows,
               processing_class=tokenizer).train()
    ids = torch.tensor([tokenizer("Who runs the mill? Mrs.")["input_ids"]])
    trained = logits(model, ids)
    assert (trained - logits(demo_model(), ids)).abs().max() > 1  # the adapter does something

    model.save_pretrained(tmp_path / "lora")
    tokenizer.save_pretrained(tmp_path / "lora")
    assert len({file.stat().st_mode for file in (tmp_path / "lora").iterdir()}) == 1
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer, dtype="float32", max_shard_size="200MB")
    model.save_pretrained_merged(str(tmp_path / "bf16"), tokenizer, save_method="merged_16bit")
    model.save_pretrained_merged(str(tmp_path / "lora2"), tokenizer, save_method="lora")

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged, ids) - trained).abs().max() <= 1e-4
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert half.dtype == torch.bfloat16
    assert (logits(half.float(), ids) - trained).norm() <= 0.02 * trained.norm()
    for name in ("lora", "lora2"):
        peft = PeftModel.from_pretrained(demo_model(), tmp_path / name)
        assert torch.equal(logits(peft, ids), trained)
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "lora"), load_in_4bit=False)
    assert torch.equal(logits(again, ids), trained)
    plain = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert plain.eos_token == "<|im_end|>"
    assert plain.pad_token != plain.eos_token
    assert merged.generation_config.eos_token_id in (2, [2])


@pytest.mark.parametrize("when", ["before", "after"])
def test_new_tokens_are_trained_and_saved(
    when: str, demo_gguf: Path, demo_model: Callable[[], Any], tmp_path: Path
) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(str(demo_gguf), max_seq_length=256, load_in_4bit=False)
    tokenizer.add_tokens(["<version>", "<step>"])
    if when == "before":
        model.resize_token_embeddings(len(tokenizer))
    model = FastLanguageModel.get_peft_model(model, r=4)
    if when == "after":
        model.resize_token_embeddings(len(tokenizer))
    new = tokenizer.convert_tokens_to_ids("<step>")
    assert new == len(tokenizer) - 1
    start = model.get_input_embeddings()(torch.tensor([new, 500])).detach().clone()
    rows = [{"prompt": "What comes next?", "completion": "<version> 2 <step> three"}] * 4
    SFTTrainer(model, SFTConfig(output_dir=str(tmp_path / "out"), max_steps=3, **QUIET), rows,
               processing_class=tokenizer).train()
    end = model.get_input_embeddings()(torch.tensor([new, 500])).detach()
    assert not torch.equal(start[0], end[0])
    assert torch.equal(start[1], end[1])

    ids = torch.tensor([tokenizer("<version> 2 <step>")["input_ids"]])
    trained = logits(model, ids)
    model.save_pretrained(tmp_path / "lora")
    tokenizer.save_pretrained(tmp_path / "lora")
    again, tokenizer_again = FastLanguageModel.from_pretrained(str(tmp_path / "lora"), load_in_4bit=False)
    assert tokenizer_again.convert_tokens_to_ids("<step>") == new
    assert torch.allclose(logits(again, ids), trained, atol=1e-5)
    base = demo_model()
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    assert torch.allclose(logits(PeftModel.from_pretrained(base, tmp_path / "lora"), ids), trained, atol=1e-5)
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer, dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged, ids) - trained).abs().max() <= 1e-4


def test_inference_and_training_modes(demo_model: Callable[[], Any]) -> None:
    model = demo_model()
    assert FastLanguageModel.for_training(model).training
    assert not FastLanguageModel.for_inference(model).training
    assert model.config.use_cache is True


def test_unknown_arguments_name_the_nearest(demo_gguf: Path, demo_model: Callable[[], Any]) -> None:
    with pytest.raises(OptionError, match="max_seq_len") as caught:
        FastLanguageModel.from_pretrained(str(demo_gguf), max_seq_len=512)
    assert "max_seq_length" in caught.value.fix
    with pytest.raises(OptionError) as caught:
        FastLanguageModel.get_peft_model(demo_model(), lora_alhpa=3)
    assert "lora_alpha" in caught.value.fix
