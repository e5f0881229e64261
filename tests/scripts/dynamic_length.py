from gazelle import DynamicSequenceLengthTrainer, FastLanguageModel, SFTConfig, SFTTrainer
from datasets import load_dataset

model, tokenizer = FastLanguageModel.from_pretrained("unsloth/tinyllama", max_seq_length=2048, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=8)
dataset = load_dataset("yahma/alpaca-cleaned", split="train")
trainer = DynamicSequenceLengthTrainer(
    model=model,
    args=SFTConfig(per_device_train_batch_size=2, max_steps=2, output_dir="outputs", report=False),
    train_dataset=dataset,
    processing_class=tokenizer,
    max_sequence_length=2048,
    min_sequence_length=256,
    length_step=128,
)
trainer.train()
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    args=SFTConfig(max_steps=2, output_dir="outputs_2", loraplus_lr_ratio=16.0, neftune_noise_alpha=5, report=False),
)
trainer.enable_dynamic_batching(max_batch_size=8, timeout=0.1)
trainer.train()
model.save_pretrained("dynamic_model", save_format="safetensors")
