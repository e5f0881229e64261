from transformers import AutoModelForCausalLM
from unsloth import DistillationTrainer, FastLanguageModel
from datasets import load_dataset
from trl import SFTConfig

student_model, tokenizer = FastLanguageModel.from_pretrained(
    "unsloth/SmolLM2-135M", max_seq_length=256, load_in_4bit=False
)
student_model = FastLanguageModel.get_peft_model(student_model, r=8)
teacher_model = AutoModelForCausalLM.from_pretrained("unsloth/SmolLM2-135M").cuda()
trainer = DistillationTrainer(
    teacher_model=teacher_model,
    student_model=student_model,
    args=SFTConfig(per_device_train_batch_size=2, max_steps=2, logging_steps=1, output_dir="outputs", report=False),
    train_dataset=load_dataset("yahma/alpaca-cleaned", split="train"),
    tokenizer=tokenizer,
    temperature=2.0,
    alpha_ce=0.5,
    alpha_mse=0.1,
)
trainer.train()
student_model.save_pretrained("student_model")
