"""`python -m gazelle.export.consumers NAME REQUEST ANSWER`: a consumer in a process of its own, by files of JSON."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from gazelle.base.errors import UserError


def main(name: str, request_file: str, answer_file: str) -> int:
    """Answer the request in one file in another; logits lie beside it as .npy. 2 if a `UserError` is all there is."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    target = Path(answer_file)
    try:
        given, logits = _answer(name, request)
    except UserError as error:
        target.write_text(json.dumps({"refused": {"what": error.what, "where": error.where, "found": error.found,
                                                  "expected": error.expected, "fix": error.fix}}), encoding="utf-8")
        return 2
    if logits is not None:
        np.save(target.with_suffix(".npy"), logits)
    target.write_text(json.dumps(given), encoding="utf-8")
    return 0


def _answer(name: str, request: dict[str, Any]) -> tuple[dict[str, Any], "np.ndarray[Any, Any] | None"]:
    if name == "llama":
        from gazelle.export.consumers import llama

        return llama.answer(request, Path(request["library"]))
    if name == "ort":
        from gazelle.export.consumers import ort

        return ort.answer(request)
    from gazelle.export.consumers import hf

    return hf.answer(request)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
