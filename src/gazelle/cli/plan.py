"""`gazelle plan`: what training a model would take, without loading its weights."""

import typer

from gazelle.base.sizes import gigabytes


def plan_command(model: str, *, seq: int | None, batch: int, budget: str | None, r: int, load_in_4bit: bool | None,
                 load_in_8bit: bool, full: bool, optim: str, precision: str, checkpointing: str) -> None:
    """Print the predicted peak by part, the predicted time of a micro-batch, and what each layer would keep."""
    import torch

    from gazelle.base.device import default_device, device_name
    from gazelle.base.errors import OptionError
    from gazelle.facade.planning import plan_model

    device = torch.device(default_device())
    try:
        planned = plan_model(model, tokens_a_row=seq, rows=batch, budget=budget, r=r, load_in_4bit=load_in_4bit,
                             load_in_8bit=load_in_8bit, full_finetuning=full, optim=optim, precision=precision,
                             checkpointing={"true": True, "false": False}.get(checkpointing, checkpointing))
    except OptionError as error:
        if error.where == "memory_budget":
            error.where = "--budget"
        raise
    plan = planned.plan
    typer.echo(f"{model}: {planned.batch.tokens:,} tokens a micro-batch, budget {gigabytes(plan.budget)}\n")
    for name, size in plan.lines():
        typer.echo(f"  {name:<36}{size:>12}")
    typer.echo(f"\n{plan.describe()[0].upper()}{plan.describe()[1:]}.")
    if plan.seconds is not None:
        speed = planned.batch.tokens / plan.seconds
        typer.echo(f"A micro-batch would take {plan.seconds:.2f} s, {speed:,.0f} tokens/s, going by one layer measured "
                   f"on {device_name(str(device))}.")
