import os

from unsloth import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments, is_bfloat16_supported, unsloth_train
from datasets import load_dataset

model, tokenizer = FastLanguageModel.from_pretrained(
    "unsloth/mistral-7b-v0.3-bnb-4bit", max_seq_length=64, dtype=None, load_in_4bit=True
)
model = FastLanguageModel.get_peft_model(
    model,
    r=8,
    target_modules=[
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head",
    ],
    lora_alpha=32,
    use_rslora=True,
    use_gradient_checkpointing="unsloth",
)

dataset = load_dataset("roneneldan/TinyStories", split="train[:50%]")
dataset = dataset.map(lambda rows: {"text": [row + tokenizer.eos_token for row in rows["text"]]}, batched=True)

trainer = UnslothTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=64,
    dataset_num_proc=os.cpu_count(),
    args=UnslothTrainingArguments(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        max_steps=2,
        warmup_ratio=0.1,
        learning_rate=5e-5,
        embedding_learning_rate=5e-6,
        fp16=not is_bfloat16_supported(),
        bf16=is_bfloat16_supported(),
        logging_steps=1,
        optim="adamw_8bit",
        output_dir="outputs",
    ),
)
stats = unsloth_train(trainer)
print(stats.metrics["train_loss"])
rates = sorted({group["initial_lr"] for group in trainer.optimizer.param_groups})
print("learning rates", rates)
model.save_pretrained("lora_model")
