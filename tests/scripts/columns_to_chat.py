from datasets import load_dataset
from trl import SFTTrainer
from transformers import TrainingArguments
from unsloth import FastLanguageModel, add_new_tokens
from unsloth import apply_chat_template, standardize_sharegpt, to_sharegpt

model, tokenizer = FastLanguageModel.from_pretrained("unsloth/gemma-2b", max_seq_length=256, load_in_4bit=False)
add_new_tokens(model, tokenizer, new_tokens=["<form>"])
model = FastLanguageModel.get_peft_model(model, r=4)

dataset = load_dataset("vicgalle/alpaca-gpt4", split="train")
dataset = to_sharegpt(
    dataset,
    merged_prompt="{instruction}[[\nYour input is:\n{input}]]",
    output_column_name="output",
    conversation_extension=3,
)
dataset = standardize_sharegpt(dataset)
chat_template = """Below are some instructions that describe some tasks. Write responses.

### Instruction:
{INPUT}

### Response:
{OUTPUT}

### Instruction:
{INPUT}

### Response:
{OUTPUT}"""
dataset = apply_chat_template(dataset, tokenizer=tokenizer, chat_template=chat_template)
print(dataset[0]["text"])
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=256,
    packing=False,
    args=TrainingArguments(per_device_train_batch_size=2, max_steps=2, logging_steps=1, output_dir="outputs"),
)
trainer.train()
messages = [{"role": "user", "content": "Continue the sequence"}]
input_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
print(model.generate(input_ids.to("cuda"), max_new_tokens=4, pad_token_id=tokenizer.eos_token_id).shape)
model.save_pretrained("lora_model")
