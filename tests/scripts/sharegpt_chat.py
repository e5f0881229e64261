from unsloth import FastLanguageModel  # isort: skip
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
from unsloth.chat_templates import get_chat_template, standardize_sharegpt

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/Qwen2.5-0.5B-Instruct", max_seq_length=256, load_in_4bit=False
)
model = FastLanguageModel.get_peft_model(
    model, r=8, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], lora_alpha=16
)

tokenizer = get_chat_template(
    tokenizer,
    chat_template="chatml",
    mapping={"role": "from", "content": "value", "user": "human", "assistant": "gpt"},
    map_eos_token=True,
)


def formatting_prompts_func(examples):
    texts = [
        tokenizer.apply_chat_template(convo, tokenize=False, add_generation_prompt=False)
        for convo in examples["conversations"]
    ]
    return {"text": texts}


dataset = load_dataset("mlabonne/FineTome-100k", split="train")
dataset = standardize_sharegpt(dataset)
dataset = dataset.map(formatting_prompts_func, batched=True)
print(dataset[0]["conversations"])
print(dataset[0]["text"])

trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=dataset,
    args=SFTConfig(
        dataset_text_field="text",
        max_length=128,
        packing=True,
        packing_strategy="wrapped",
        auto_find_batch_size=True,
        optim="paged_adamw_8bit",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        per_device_train_batch_size=2,
        max_steps=2,
        logging_steps=1,
        output_dir="outputs",
        report_to="none",
    ),
)
trainer.train()

FastLanguageModel.for_inference(model)
messages = [{"from": "human", "value": "Who runs the mill?"}]
inputs = tokenizer.apply_chat_template(
    messages, tokenize=True, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to("cuda")
outputs = model.generate(**inputs, max_new_tokens=6, use_cache=True)
print(tokenizer.batch_decode(outputs))
FastLanguageModel.for_training(model)

model.save_pretrained_merged("model", tokenizer, save_method="merged_16bit")
