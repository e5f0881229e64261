"""What the logits behind a row's positions say of the tokens that follow, for consumers that give numpy's arrays."""

from typing import Any

import numpy as np


def judged(row: dict[str, list[int]], logits: "np.ndarray[Any, Any]") -> tuple[list[float], list[int]]:
    """(logarithms of probability of the tokens that follow, the likeliest tokens) from logits [positions, vocabulary].

    Args:
        row: {"ids", "at"}, as the package describes it.
        logits: behind the positions "at".
    """
    following = np.array([row["ids"][at + 1] for at in row["at"]], int)
    wide = logits.astype(np.float64)
    most = wide.max(-1, initial=-np.inf)
    sums = most + np.log(np.exp(wide - most[:, None]).sum(-1))
    return (wide[np.arange(len(following)), following] - sums).tolist(), logits.argmax(-1).tolist()
