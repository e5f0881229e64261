"""`gazelle scan`: what stands in data that should not be learnt."""

import json
from collections.abc import Sequence
from pathlib import Path

import typer

from gazelle.base.errors import OutputError
from gazelle.base.files import disk_errors, write_text

SHOWN = 20


def scan_command(data: str, against: str | None, out: Path | None, fail_on: Sequence[str] | None,
                 threshold: float) -> None:
    """Print counts and the first findings, write all to `out`; exit code 1 if there is anything of `fail_on`."""
    from gazelle.facade.scanning import parse_fail_on, scan_data

    failing = parse_fail_on(",".join(fail_on)) if fail_on else ()
    if out is not None and not out.absolute().parent.is_dir():
        raise OutputError("there is no folder for the report", where=str(out), found=f"nothing at {out.parent}",
                          expected="a file in a folder that exists", fix=f"mkdir -p {out.parent}")
    if out is not None and out.is_dir():
        raise OutputError("the report is one file", where=str(out), found="a folder", expected="a JSON file",
                          fix=f"write --json {out / 'scan.json'}")
    report = scan_data(data, against, threshold=threshold)
    typer.echo(
        f"{report.rows:,} rows" + (f", and {report.against:,} of {against} to look for in them" if against else "")
    )
    for kind, count in report.counts.items():
        typer.echo(f"  {kind:<20}{count:>8,}")
    if not report.counts:
        typer.echo("Nothing was found.")
    for found in report.findings[:SHOWN]:
        place = f" in {found.column}, characters {found.start} to {found.end}" if found.column else ""
        typer.echo(f"{found.where}: {found.kind}{place}: {found.reason}" + (f" ({found.other})" if found.other else ""))
    more = sum(report.counts.values()) - SHOWN
    if more > 0:
        typer.echo(f"… and {more:,} more" + ("" if out else "; --json FILE lists them"))
    if out is not None:
        with disk_errors(out):
            write_text(out, json.dumps(report.to_dict(), ensure_ascii=False, indent=1) + "\n")
    if count := report.failing(failing):
        typer.echo(f"{count:,} findings of --fail-on", err=True)
        raise typer.Exit(1)
