import argparse

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.sft_config import SFTConfig

parser = argparse.ArgumentParser()
parser.add_argument("--output", required=True)
parser.add_argument("--model", default="meta-llama/Llama-3.2-1B")
arguments = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(arguments.model)
model = AutoModelForCausalLM.from_pretrained(arguments.model, torch_dtype="auto").to("cuda")
dataset = load_dataset("trl-lib/Capybara", split="train")
trainer = SFTTrainer(
    model,
    args=SFTConfig(
        output_dir=arguments.output,
        max_seq_length=128,
        per_device_train_batch_size=2,
        max_steps=2,
        completion_only_loss=False,
        bf16=True,
        gradient_checkpointing=True,
    ),
    train_dataset=dataset,
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules="all-linear"),
)
trainer.train()
trainer.save_model(arguments.output)
