"""The rows to verify exports with and to calibrate quantisers on."""

from pathlib import Path
from typing import Any

from gazelle.base.log import logger
from gazelle.data.load import Loaded, load_conversations
from gazelle.models.record import read_record


def find_rows(folder: Path, data: str | None) -> Loaded | None:
    """Rows to verify with or to calibrate on: of the file `data`, else of the run that left `folder`; None without.

    A run's evaluation rows come before those it was trained on.

    Raises:
        DataError: `data` cannot be read.
    """
    run = read_record(folder).get("run") or {}
    options: dict[str, Any] = {name: run.get(name) for name in ("format", "columns", "system") if run.get(name)}
    if data is not None:
        return load_conversations(data, system=options.get("system"))
    for source, split in ((run.get("eval"), "eval"), (run.get("train"), "train")):
        if source and Path(source).exists():
            return load_conversations(source, split=split, **options)
        if source:
            logger.info("The rows of the run are not at %s any more.", source)
    return None
