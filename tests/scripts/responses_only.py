from unsloth import FastLanguageModel
from unsloth.chat_templates import get_chat_template, standardize_sharegpt, train_on_responses_only
from datasets import load_dataset
from transformers import DataCollatorForSeq2Seq, TrainingArguments
from trl import SFTTrainer

model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Qwen3-0.6B", max_seq_length=256, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=8)
tokenizer = get_chat_template(tokenizer, chat_template="qwen-2.5")

dataset = standardize_sharegpt(load_dataset("mlabonne/FineTome-100k", split="train"))
dataset = dataset.map(
    lambda rows: {"text": [tokenizer.apply_chat_template(row, tokenize=False) for row in rows["conversations"]]},
    batched=True,
)
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=256,
    data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer),
    args=TrainingArguments(per_device_train_batch_size=2, max_steps=2, logging_steps=1, output_dir="outputs"),
)
trainer = train_on_responses_only(
    trainer, instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n"
)
space = tokenizer(" ", add_special_tokens=False).input_ids[0]
print(tokenizer.decode(trainer.train_dataset[0]["input_ids"]))
print(tokenizer.decode([space if label == -100 else label for label in trainer.train_dataset[0]["labels"]]))
learnt = tokenizer.decode([label for label in trainer.train_dataset[0]["labels"] if label != -100])
print(f"learnt: {learnt!r}")
trainer.train()
model.save_pretrained_merged("lora", tokenizer, save_method="lora")
