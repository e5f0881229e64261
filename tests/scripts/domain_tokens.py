import unsloth
import torch
from datasets import Dataset
from transformers import TrainingArguments
from trl import SFTTrainer

model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
    model_name="unsloth/Phi-3-mini-4k-instruct", max_seq_length=128, load_in_4bit=False, torch_dtype=torch.float32,
    use_amd_optim=True,
)
tokenizer.add_tokens(["<version>", "<step>", "<warning>"])
model.resize_token_embeddings(len(tokenizer))
model = unsloth.FastLanguageModel.get_peft_model(model, r=8, target_modules=["q_proj", "k_proj", "v_proj", "dense"])

rows = [
    {"instruction": f"Describe release {number}.", "input": "", "output": f"<version> {number} <step> check the seal"}
    for number in range(8)
]
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=Dataset.from_list(rows),
    max_seq_length=128,
    args=TrainingArguments(
        output_dir="outputs",
        overwrite_output_dir=True,
        evaluation_strategy="no",
        per_device_train_batch_size=4,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        group_by_length=True,
        report_to="none",
    ),
)
trainer.train()
trainer.save_model("tokens_model")
