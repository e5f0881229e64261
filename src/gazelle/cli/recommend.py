"""`gazelle recommend`: a recipe for rows and a model, with reasons."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def recommend_command(data: str, model: str, *, budget: str | None, output: Path) -> None:
    """Print the table of choices, and write the recipe."""
    from gazelle.facade.recommending import check_recipe_path, recommend, write_recipe

    check_recipe_path(output)
    found = recommend(data, model, budget=budget)
    write_recipe(found, output)
    table = Table()
    for column in ("option", "value", "why"):
        table.add_column(column, overflow="fold")
    for choice in found.choices:
        table.add_row(f"{choice.section}.{choice.option}", escape(str(choice.value)), escape(choice.reason))
    console = Console()
    console.print(table)
    for warning in found.report.warnings:
        console.print(f"! {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nrecipe    {output}\ntrain it  gazelle train {output}", markup=False, highlight=False,
                  soft_wrap=True)
