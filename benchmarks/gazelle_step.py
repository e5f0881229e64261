"""A row of the table by gazelle, as a script of a user's would train it: python -m benchmarks.gazelle_step ROW …"""

from benchmarks import measure
from benchmarks.shapes import GB, ROWS

from gazelle import FastLanguageModel, SFTConfig, SFTTrainer


def main() -> None:
    options = measure.parser(__doc__).parse_args()
    row = measure.fit(ROWS[options.row], quick=options.quick, tiny=options.tiny)
    chosen = measure.settings(row, options.scratch) | {"precision": row.precision, "report": False}
    if row.budget is not None:
        chosen["memory_budget"] = f"{row.budget:g}GiB"
    rows = measure.training_rows(row, options.model)

    meter = measure.Meter()
    model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=row.sequence,
                                                         dtype=measure.DTYPE, load_in_4bit=row.storage == "nf4")
    meter.loaded()
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    measure.give_padding(tokenizer)
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=rows, args=SFTConfig(**chosen))
    meter.watch(trainer)
    trainer.train()

    result = meter.result(row)
    plan = getattr(trainer, "plan", None)
    if plan is not None:
        result["predicted_peak_gb"] = round(plan.predicted_peak / GB, 2)
        result["predicted_step_s"] = plan.predicted_seconds
    measure.write(options.out, result)


if __name__ == "__main__":
    main()
