"""Options of evaluation while training: which rows are held out, and how answers are graded."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gazelle.base.errors import OptionError
from gazelle.data.text_metrics import METRICS, TextMetric, metric_name

_TAKEN = ("loss", "perplexity", "runtime")


@dataclass
class EvalArguments:
    """Fields of `SFTConfig`."""

    per_device_eval_batch_size: int | None = field(
        default=None, metadata={"help": "Rows in an evaluation batch. Default: as in training, so that evaluation "
                                        "takes no more memory."}
    )
    eval_split: float = field(
        default=0.0, metadata={"help": "Hold out this share of the training rows; those that share a text, a prompt or "
                                       "eval_group_column stay together."}
    )
    eval_group_column: str | None = field(
        default=None, metadata={"help": "Column, such as document_id, whose rows of one value stay on one side."}
    )
    eval_generate: list[str] | None = field(
        default=None, metadata={"help": "Grade answers at each evaluation: " + ", ".join(METRICS)
                                        + ", or in Python a function of (answer, expected)."}
    )
    eval_samples: int = field(
        default=64, metadata={"help": "Evaluation rows that are answered for eval_generate, drawn once."}
    )
    eval_max_new_tokens: int = field(default=128, metadata={"help": "Longest of these answers, in tokens."})


def graders(config: Any) -> dict[str, Callable[[str, str], float] | None]:
    """What `eval_generate` asks for, by name; None for a metric of the table.

    Raises:
        OptionError: there is no such metric, or a function has no name of its own.
        MissingDependencyError: the package of a metric is not installed.
    """
    asked = config.eval_generate or []
    found: dict[str, TextMetric | None] = {}
    for metric in [asked] if isinstance(asked, str) or callable(asked) else asked:
        if not callable(metric):
            found[metric_name(metric, "eval_generate")] = None
            continue
        name = getattr(metric, "__name__", type(metric).__name__)
        if not name.isidentifier() or name.endswith(_TAKEN):
            raise OptionError("the figure of this function needs a name of its own", where="eval_generate", found=name,
                              expected="a function defined by `def`, not called loss, perplexity or runtime",
                              fix="give it another name")
        found[name] = metric
    return found


def settle_evaluation(config: Any) -> None:
    """Fill in what evaluation leaves to training, and raise `OptionError` for what cannot be used."""
    if config.per_device_eval_batch_size is None:
        config.per_device_eval_batch_size = config.per_device_train_batch_size
    graders(config)
    for name in ("eval_samples", "eval_max_new_tokens"):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise OptionError("a training option has a value that cannot be used", where=name, found=repr(value),
                              expected="a whole number of at least 1", fix=f"set {name} to at least 1")
    share = config.eval_split
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise OptionError("a training option has a value that cannot be used", where="eval_split", found=repr(share),
                          expected="0 (hold out nothing), or a share below 1", fix="for example eval_split=0.1")
    if config.eval_group_column and not share:
        raise OptionError("eval_group_column has nothing to split", where="eval_group_column",
                          found=config.eval_group_column, expected="eval_split above 0", fix="set eval_split too")
    if share and getattr(config.eval_strategy, "value", config.eval_strategy) == "no" and not config.do_eval:
        config.eval_strategy = "epoch"  # rows held out are there to be looked at
    if config.greater_is_better is None and str(config.metric_for_best_model).endswith("perplexity"):
        config.greater_is_better = False


def check_best_metric(config: Any, names: list[str], *, has_metrics: bool) -> None:
    """Raise `OptionError` if the best model is to be chosen by something that no evaluation gives.

    Args:
        names: of the evaluation sets, "" for one without a name.
        has_metrics: `compute_metrics` may give any.
    """
    if graders(config) and has_metrics:
        raise OptionError("compute_metrics and eval_generate exclude each other", where="eval_generate",
                          found="both", expected="one of them", fix="pass a function of (answer, expected) in "
                          "eval_generate, which keeps no logits, or leave eval_generate out")
    best = config.metric_for_best_model
    given = [f"{name}_{figure}" if name else figure for name in names for figure in ("loss", "perplexity",
                                                                                     *graders(config))]
    if best is not None and best.removeprefix("eval_") not in given and not has_metrics:
        raise OptionError("no such metric to choose the best model by", where="metric_for_best_model", found=best,
                          expected=", ".join(f"eval_{name}" for name in given) + ", or what compute_metrics returns",
                          fix="write eval_loss" if "" in names else f"write eval_{given[0]}")
