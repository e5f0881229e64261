from unsloth import CurriculumTrainer, FastLanguageModel, MixedPrecisionConfig, profile_io
import torch
from datasets import load_dataset
from transformers import TrainingArguments

model, tokenizer = FastLanguageModel.from_pretrained(
    "unsloth/Meta-Llama-3.1-8B", max_seq_length=256, dtype=torch.float32, load_in_4bit=False
)
model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)
mp = MixedPrecisionConfig(
    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, buffer_dtype=torch.bfloat16, keep_batchnorm_fp32=True
)
model = FastLanguageModel.set_mixed_precision(model, mp)
model.gradient_checkpointing_enable(checkpoint_ratio=0.4, exclude_layers=["lm_head"])
model.enable_incremental_tuning(memory_size=1000, replay_strategy="balanced", regularization=0.01)

trainer = CurriculumTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=load_dataset("yahma/alpaca-cleaned", split="train"),
    difficulty_metric="length",
    start_length=20,
    end_length=60,
    steps=1000,
    args=TrainingArguments(
        per_device_train_batch_size=2, max_steps=3, logging_steps=1, output_dir="outputs", report_to="none"
    ),
)
print(profile_io(trainer))
trainer.train()
trainer.save_model("curriculum_model")
