"""A row of the table by another library, through TRL's SFTTrainer: python -m benchmarks.peer_step ROW --peer PEER …"""

import sys
from typing import Any

if any(argument.startswith("unsloth") for argument in sys.argv):
    import unsloth  # it changes transformers and TRL, so it comes before them

from benchmarks import measure
from benchmarks.shapes import PEERS, ROWS, Peer, Row, Shape
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--peer", required=True, choices=list(PEERS))
    options = parser.parse_args()
    row = measure.fit(ROWS[options.row], quick=options.quick, tiny=options.tiny)
    peer = PEERS[options.peer]
    shape = peer.shape(row)
    rows = Dataset.from_list(measure.training_rows(row, options.model))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    measure.give_padding(tokenizer)

    meter = measure.Meter()
    if peer.library == "unsloth":
        model, adapter = unsloth_model(options.model, row, shape, peer), None
    else:
        model, adapter = plain_model(options.model, row), lora(shape)
    meter.loaded()
    chosen = measure.settings(row, options.scratch) | {"gradient_checkpointing": peer.checkpointing,
                                                       "use_liger_kernel": peer.library == "liger"}
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=rows, args=SFTConfig(**chosen),
                         peft_config=adapter)
    meter.watch(trainer)
    trainer.train()
    measure.write(options.out, meter.result(row))


def lora(shape: Shape) -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, bias="none", target_modules=shape.targets,
                      task_type="CAUSAL_LM")


def plain_model(folder: str, row: Row) -> Any:
    """As transformers loads it."""
    quantized = None
    if row.storage == "nf4":
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                       bnb_4bit_compute_dtype=measure.DTYPE)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=measure.DTYPE, attn_implementation="sdpa", device_map={"": 0 if measure.ON_GPU else "cpu"},
        quantization_config=quantized)


def unsloth_model(folder: str, row: Row, shape: Shape, peer: Peer) -> Any:
    model, _ = unsloth.FastLanguageModel.from_pretrained(folder, max_seq_length=row.sequence, dtype=measure.DTYPE,
                                                         load_in_4bit=row.storage == "nf4")
    return unsloth.FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, lora_dropout=0, bias="none", target_modules=shape.targets,
        use_gradient_checkpointing="unsloth" if peer.checkpointing else False)


if __name__ == "__main__":
    main()
