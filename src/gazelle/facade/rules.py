"""The rules of `gazelle recommend`: one function an option, each with its reason in words and its source.

| option | rule | source |
|---|---|---|
| r | the smallest of 16 to 128 with as many trained numbers as tokens to learn | LoRA Without Regret; Tinker's primer |
| lora_alpha | 32 for every r | LoRA Without Regret: with alpha / r the best rate hardly depends on r |
| learning_rate | 5e-5 · 10 · (2000 / hidden size)^p, p by family; 15 for 10 in short runs | LoRA Without Regret; p is |
| | at most 2e-3, beyond which nobody has measured | in Tinker's cookbook |
| num_train_epochs | 3 below 1,000 rows, 2 below 10,000, else 1 | Unsloth's guide: 1 to 3 |
| batch | about 50 updates an epoch, 2 to 16 rows | Unsloth's guide: start at 16; LoRA Without Regret: large ones lose |
| max_seq_length | the longest row, so that none is cut | the data report |
| packing | raw text only | rows lie end to end without it |
| eval_split | none below 100 rows, 10 % below 1,000, 5 % below 10,000, else 500 rows | error of a mean over n rows |
| 4 bits | where 16 would have layers made again, on a GPU | QLoRA (arXiv 2305.14314): as good as 16 bits, but slower |
| schedule | linear to zero, 5 % warm-up | Straight to Zero (arXiv 2502.15938) |

LoRA Without Regret: https://thinkingmachines.ai/blog/lora (Schulman et al., 2025); Tinker's primer and cookbook:
https://tinker-docs.thinkingmachines.ai/lora-primer; Unsloth's guide:
https://unsloth.ai/docs/get-started/fine-tuning-llms-guide/lora-hyperparameters-guide.
"""

import math
from dataclasses import dataclass
from typing import Any

RANKS = (16, 32, 64, 128)
ALPHA = 32
# How the best rate falls with the hidden size, measured on these families. Others get the lower of the two.
FALLS = {"llama": 0.781, "qwen2": 0.0775, "qwen3": 0.0775}
HIGHEST_RATE = 2e-3
UPDATES, MOST_ROWS = 50, 16
WARMUP, LINES, EVALS = 0.05, 40, 5
LEAST_LENGTH = 512  # tokens: room for questions longer than those of training, and it costs nothing


@dataclass(frozen=True)
class Choice:
    """A value for an option of a recipe's section, and why."""

    section: str
    option: str
    value: Any
    reason: str


def rank(labelled: int, numbers_a_rank: int) -> tuple[int, str]:
    """r, from tokens to learn and the adapter's trained numbers for each rank."""
    chosen = next((r for r in RANKS if r * numbers_a_rank >= labelled), RANKS[-1])
    trained = f"{chosen * numbers_a_rank / 1e6:.1f} M trained numbers for {labelled:,} tokens to learn"
    if chosen * numbers_a_rank < labelled:
        return chosen, f"{trained}: the data holds more than an adapter takes in; full fine-tuning may learn more"
    return chosen, f"{trained}; a larger one would learn no more"


def learning_rate(hidden: int, family: str, steps: int) -> tuple[float, str]:
    """Peak rate of LoRA, from the model's hidden size and family and the optimizer steps of the run."""
    short = min(1.0, max(0.0, math.log10(1000 / max(steps, 1))))  # 15 at 100 steps and fewer, 10 from 1,000 on
    times = 10 + 5 * short
    powers = [FALLS[family]] if family in FALLS else list(FALLS.values())
    rate = min(5e-5 * times * (2000 / hidden) ** power for power in powers)
    how = f"{times:.0f} times that of full fine-tuning in a run of {steps:,} steps, for a hidden size of {hidden:,}"
    if family not in FALLS:
        how += f"; for {family} nobody has measured it, so this is the lower of Llama's and Qwen's"
    if rate > HIGHEST_RATE:
        rate, how = HIGHEST_RATE, f"{how}; held at the highest that is known to work"
    return float(f"{rate:.1e}"), how


def epochs(rows: int) -> tuple[int, str]:
    """Passes over the data."""
    for most, count in ((1_000, 3), (10_000, 2)):
        if rows < most:
            return count, f"{rows:,} rows, below {most:,}: they are worth seeing {'twice' if count == 2 else 'again'}"
    return 1, f"{rows:,} rows are enough for one pass; a second one mostly learns them by heart"


def rows_an_update(rows: int) -> tuple[int, str]:
    """Rows of an optimizer step."""
    wanted = 2 ** round(math.log2(max(rows / UPDATES, 1)))
    chosen = min(MOST_ROWS, max(2, wanted))
    if chosen == MOST_ROWS:
        return chosen, "LoRA loses with larger batches, and smaller ones are noisy"
    return chosen, f"{math.ceil(rows / chosen)} updates an epoch; larger batches would leave too few"


def held_out(rows: int) -> tuple[float, str]:
    """Share of the rows to evaluate on."""
    if rows < 100:
        return 0.0, f"{rows:,} rows are too few to give any away; look at the answers instead"
    share = 0.1 if rows < 1_000 else 0.05 if rows < 10_000 else float(f"{500 / rows:.2g}")
    return share, f"{round(rows * share):,} rows show whether what is learnt holds for rows it was not trained on"


def length(longest: int, limit: int | None, *, text: bool, usual: int = 2048) -> tuple[int, str]:
    """Longest row in tokens that is kept whole."""
    if text:
        chosen = min(usual, limit or usual)
        return chosen, f"texts are cut into pieces of {chosen:,} tokens, and none is lost"
    rounded = max(LEAST_LENGTH, math.ceil(longest / 64) * 64)
    if limit and rounded > limit:
        return limit, (f"the longest row has {longest:,} tokens, and the model takes {limit:,}"
                       + (": what is beyond is cut" if longest > limit else ""))
    return rounded, f"the longest row has {longest:,} tokens: none is cut, and short ones are not padded"


def packing(*, text: bool) -> tuple[bool, str]:
    """Whether batches are made of full bins."""
    if text:
        return True, "pieces of texts fill bins of max_length, so that every step sees as many tokens"
    return False, "rows lie end to end without padding anyway, and a batch keeps its number of rows"


def warm_up(steps: int) -> tuple[int, str]:
    """Optimizer steps until the peak rate is reached."""
    return max(1, round(WARMUP * steps)), f"5 % of {steps:,} steps: Adam's averages have to fill first"


def log_every(steps: int) -> tuple[int, str]:
    """Optimizer steps of a log line."""
    return max(1, min(10, steps // LINES)), "lines enough for the advisor to tell a trend from noise"
