"""Notes beside a trained model how its base was kept in training, so that it is loaded in the same way again, and what
the run was."""

import json
from pathlib import Path
from typing import Any

from gazelle.base.errors import ModelError
from gazelle.base.files import write_text
from gazelle.models.checkpoint import read_json

RECORD = "gazelle.json"
_KINDS: dict[str, type] = {"load_in_4bit": bool, "load_in_8bit": bool, "quant_method": str, "max_seq_length": int,
                           "run": dict}


def record_base(model: Any, folder: str | Path) -> None:
    """Write `gazelle.json` into `folder`, which exists and holds the model or its adapter.

    A model that `load_model` did not make and that was not trained has nothing to record; then no file is written.
    """
    run = getattr(model, "gazelle_run", None)
    record = (getattr(model, "gazelle_loading", None) or {}) | ({"run": run} if run else {})
    if record:
        write_text(Path(folder) / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """What `record_base` wrote, or {}.

    Raises:
        ModelError: the file is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return {}
    record = read_json(path)
    for name, kind in _KINDS.items():
        if name in record and type(record[name]) is not kind:
            raise ModelError("a setting of the wrong kind", where=f"{path}, {name}", found=repr(record[name]),
                             expected=f"a value of type {kind.__name__}", fix="correct the file, or delete it")
    return record
