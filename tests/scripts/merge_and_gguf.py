from unsloth import FastLanguageModel
from unsloth import is_bf16_supported
import torch
from trl import SFTTrainer, SFTConfig

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/SmolLM2-135M-Instruct-bnb-4bit", max_seq_length=128, load_in_4bit=True, device_map="cuda:0",
    dtype=torch.float16, token="hf_...",
)
model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=8, layers_to_transform=[0, 1])
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=[{"question": "Who runs the mill?", "answer": "Mrs. Okonkwo runs the mill."}] * 4,
    args=SFTConfig(max_steps=2, per_device_train_batch_size=2, output_dir="outputs", bf16=is_bf16_supported(),
                   report=False),
)
trainer.train()
model.save_pretrained_merged("merged", tokenizer, save_method="merged_16bit", max_shard_size="4GB")
model.save_pretrained_gguf("gguf", tokenizer, quantization_method="q8_0")
model.save_pretrained("gguf16", save_format="gguf", tokenizer=tokenizer, quantization_method="f16")
if False:
    model.push_to_hub_gguf("user/repo", tokenizer, quantization_method="q4_k_m")
