"""`SFTConfig`: transformers' TrainingArguments and what fine-tuning adds, with the older names still taken."""

import dataclasses
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from gazelle.adapters.lora import CHECKPOINTING
from gazelle.base.device import default_device
from gazelle.base.errors import OptionError, nearest
from gazelle.base.log import say_once
from gazelle.base.optional import require
from gazelle.base.sizes import parse_bytes
from gazelle.train.eval_options import EvalArguments, graders, settle_evaluation
from gazelle.train.trackers import check_trackers

# Spellings that earlier releases of transformers and TRL took, and what they are called now.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "dataset_format": "data_format",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps",  # which takes a share of the steps as well
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}
# Options that no longer mean anything here: taken with a line in the log, so that older scripts go on running.
DROPPED = {
    "overwrite_output_dir": "an output folder is written to in place",
    "save_safetensors": "safetensors is the only format",
    "group_by_length": "rows are packed without padding, so grouping by length saves nothing",
    "eval_packing": "evaluation rows are packed the way training rows are",
    "dataset_batch_size": "rows are tokenised in batches of a fixed size",
    "dataset_kwargs": "the data set is prepared by gazelle",
    "padding_free": "rows are always packed without padding where the model allows it",
    "assistant_only_loss": 'say train_on="responses" (the default) or train_on="all"',
    "completion_only_loss": 'say train_on="responses" (the default) or train_on="all"',
    "logging_dir": "set it in the environment of the tool that is reported to",
    "fp16_backend": "transformers dropped it",
    "half_precision_backend": "transformers dropped it",
    "push_to_hub_token": "use hub_token",
}


# Options whose values are never written down.
SECRETS = ("hub_token", "push_to_hub_token")
# Paging moves optimizer state between a GPU and its host; on a CPU there is nothing to page.
UNPAGED = {"paged_adamw_8bit": "adamw_8bit", "paged_adamw_32bit": "adamw_torch", "paged_lion_8bit": "lion_8bit",
           "paged_lion_32bit": "lion_32bit"}


@dataclass
class _SFTArguments(EvalArguments, TrainingArguments):
    """The fields; `SFTConfig` adds the older spellings and the checks."""

    output_dir: str | None = field(default="outputs", metadata={"help": "Folder for adapter, checkpoints and report."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two log lines."})
    report_to: str | list[str] | None = field(default="none", metadata={"help": "tensorboard, wandb, ... or none."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest row in tokens; longer ones are cut. Default: the model's."}
    )
    packing: bool = field(
        default=False, metadata={"help": "Fill each batch entry with as many rows as fit in max_length."}
    )
    packing_strategy: Literal["bfd", "wrapped"] = field(
        default="bfd", metadata={"help": "bfd keeps rows whole; wrapped cuts the stream of tokens at max_length."}
    )
    train_on: Literal["responses", "all"] = field(
        default="responses", metadata={"help": "Which tokens are learnt: what the assistant says, or every token."}
    )
    dataset_text_field: str | None = field(
        default=None, metadata={"help": "Column of raw text to train on, where there are other columns too."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Taken for compatibility: the tokenizer's own threads are faster."}
    )
    data_format: str = field(default="auto", metadata={"help": "alpaca, sharegpt, messages, ... or auto."})
    columns: dict[str, str] | str | None = field(
        default=None, metadata={"help": 'Column map, canonical name to yours: {"instruction": "question"}.'}
    )
    system: str | None = field(default=None, metadata={"help": "System turn for rows that have none."})
    chat_template: str | None = field(
        default=None, metadata={"help": "Name of a shipped template; default: the tokenizer's own."}
    )
    embedding_learning_rate: float | None = field(
        default=None, metadata={"help": "Rate of embedding and head, where they are trained. Default: learning_rate."}
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "LoRA+: the rate of B is this many times that of A, such as 16."}
    )
    engine: bool = field(
        default=True, metadata={"help": "Run the decoder layers on gazelle's engine, where it knows the family."}
    )
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp8"] = field(
        default="auto", metadata={"help": "What to compute in: auto is the model's type; fp8 multiplies frozen weights "
                                          "in 8 bits, on NVIDIA GPUs, Ada or newer (compute "
                                          "capability 8.9)."}
    )
    memory_budget: str | int | None = field(
        default=None, metadata={"help": 'Device memory that training may take, such as "12GB". Default: what is free.'}
    )
    use_gradient_checkpointing: bool | str = field(
        default="auto", metadata={"help": "true, false, offload (layers' inputs wait in host memory), or auto: what "
                                          "the memory budget asks for."}
    )
    step_graph: bool | str = field(
        default="auto", metadata={"help": "Record steps as CUDA graphs: true, false, or auto (small models)."}
    )
    on_spike: Literal["skip", "rollback", "stop"] = field(
        default="skip", metadata={"help": "After a step whose loss or gradient is no number or a spike: skip it, roll "
                                          "back to the last checkpoint and leave out the steps since, or stop."}
    )
    spike_factor: float = field(
        default=10.0, metadata={"help": "A gradient norm this many times the median of late is a spike; 0: none is."}
    )
    advisor: Literal["say", "stop", "off"] = field(
        default="say", metadata={"help": "Name overfitting, divergence and the like with the remedy; stop: and end the "
                                         "run where going on is useless."}
    )
    metrics_port: int | None = field(
        default=None, metadata={"help": "Serve Prometheus metrics of the run on this port of the loopback address."}
    )
    report: bool = field(default=True, metadata={"help": "Write report.html and loss.png when training ends."})
    report_samples: int = field(
        default=3, metadata={"help": "Prompts answered before and after training, shown in the report."}
    )
    report_max_new_tokens: int = field(default=48, metadata={"help": "Longest sample answer in the report, in tokens."})


class SFTConfig(_SFTArguments):
    """Settings of a fine-tuning run.

    Takes every field of `transformers.TrainingArguments`, the fields above, and the names that older releases of
    transformers and TRL used for them.

    Raises:
        OptionError: for a name nobody knows (with the nearest one), or a value that cannot be used.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.tracked_facts: dict[str, Any] = {}  # of the run, for trackers: what the memory plan says
        self.tracked_name: str | None = None  # that was made up for a run without a run_name
        super().__init__(*args, **current_names(kwargs))

    def __post_init__(self) -> None:
        settle_evaluation(self)
        check_values(self)
        if default_device() == "cpu":
            fit_to_cpu(self)
        try:
            super().__post_init__()
        except ValueError as error:
            raise OptionError(str(error).splitlines()[0], where="SFTConfig",
                              fix="change the option named in the message") from error

    def to_dict(self) -> dict[str, Any]:
        """As transformers' own, with functions by their names and without secrets; trackers are given it."""
        hidden = {name: None for name in SECRETS if hasattr(self, name)}
        return super().to_dict() | hidden | {"eval_generate": list(graders(self)) or None} | self.tracked_facts


def fit_to_cpu(config: Any) -> None:
    """Turn off what needs a GPU, each with one line in the log: scripts written for a GPU ask for it as a habit."""
    if config.fp16 or config.bf16:
        say_once(f"{'fp16' if config.fp16 else 'bf16'}=True needs a GPU; training in float32")
        config.fp16 = config.bf16 = False
    if unpaged := UNPAGED.get(optimizer_name(config)):
        say_once(f"a paged optimizer needs a GPU; training with {unpaged}")
        config.optim = unpaged
    config.dataloader_pin_memory = False


def current_names(options: dict[str, Any], known: Set[str] | None = None) -> dict[str, Any]:
    """`options` under the names of today; `known` are those of another class than `SFTConfig`.

    Raises:
        OptionError: when a name is unknown, or given in both spellings.
    """
    if known is None:
        known = {option.name for option in dataclasses.fields(_SFTArguments) if option.init}
    current: dict[str, Any] = {}
    if options.get("warmup_steps") == 0 and "warmup_ratio" in options:
        options = {name: value for name, value in options.items() if name != "warmup_steps"}
    for name, value in options.items():
        if name in DROPPED and name not in known:
            say_once(f"{name} has no effect: {DROPPED[name]}")
            continue
        today = RENAMED.get(name, name)
        if today not in known:
            raise OptionError("no such training option", where=f"SFTConfig({name}=…)", found=name,
                              expected="a field of SFTConfig or transformers.TrainingArguments",
                              fix=nearest(name, known | RENAMED.keys()))
        if today in current:
            raise OptionError(f"{today} is given twice", where="SFTConfig", found=f"{name} and {today}",
                              expected="one of them", fix=f"keep {today}")
        current[today] = value
    return current


def with_options(args: TrainingArguments | None, options: dict[str, Any] | None = None) -> SFTConfig:
    """A new `SFTConfig` with the values of `args` (ours, transformers' or TRL's) and `options` over them.

    Always a new object: what the trainer fills in must not reach a config that the caller uses again.
    """
    known = {option.name for option in dataclasses.fields(_SFTArguments) if option.init}
    taken: dict[str, Any] = {}
    for option in dataclasses.fields(args) if args is not None else ():
        value = getattr(args, option.name, None)
        if option.name == "per_device_eval_batch_size" and value == option.default:
            continue  # nobody asked for transformers' eight, which may take more memory than training does
        if option.name in known:
            taken[option.name] = value
        elif option.init and value != option.default and option.default_factory is dataclasses.MISSING:
            say_once(f"{type(args).__name__}.{option.name} has no effect here"
                     + (f": {DROPPED[option.name]}" if option.name in DROPPED else ""))
    return SFTConfig(**(taken | current_names(options or {})))


def check_values(config: Any) -> None:
    """Raise `OptionError` for a value that would only fail later, in the middle of the work."""
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(config, name) is False:
            setattr(config, name, "no")  # YAML reads an unquoted no as False
    counts = ["per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"]
    if config.max_length is not None:
        counts.append("max_length")
    for name in counts:
        _check(name, getattr(config, name), "a whole number of at least 1", lambda v: isinstance(v, int) and v >= 1)
    _check("learning_rate", config.learning_rate, "a number above 0", lambda v: isinstance(v, int | float) and v > 0)
    for name in ("embedding_learning_rate", "loraplus_lr_ratio"):
        if getattr(config, name) is not None:
            _check(name, getattr(config, name), "a number above 0", lambda v: isinstance(v, int | float) and v > 0)
    by_shape = "galore", "apollo", "lomo", "layerwise", "muon", "grokadamw"
    if any(kind in optimizer_name(config) for kind in by_shape) and (
            config.embedding_learning_rate or config.loraplus_lr_ratio):
        raise OptionError("this optimizer takes one learning rate", where="optim", found=optimizer_name(config),
                          expected="adamw_torch, adamw_8bit or another of that kind",
                          fix="leave embedding_learning_rate and loraplus_lr_ratio out, or choose another optim")
    _check("num_train_epochs", config.num_train_epochs, "a number above 0",
           lambda v: isinstance(v, int | float) and (v > 0 or config.max_steps > 0))
    _check("max_steps", config.max_steps, "-1 (count epochs) or at least 1",
           lambda v: isinstance(v, int) and (v == -1 or v >= 1))
    _check("warmup_steps", config.warmup_steps, "0 or more steps, or a share of them below 1",
           lambda v: isinstance(v, int | float) and v >= 0)
    _check("spike_factor", config.spike_factor, "0, or a number above 1",
           lambda v: isinstance(v, int | float) and (v == 0 or v > 1))
    if config.metrics_port is not None:
        _check("metrics_port", config.metrics_port, "a port, or 0 for any that is free",
               lambda v: isinstance(v, int) and 0 <= v < 2**16)
        require("prometheus_client")
    if str(config.train_sampling_strategy) == "group_by_length":
        say_once("train_sampling_strategy='group_by_length' has no effect: " + DROPPED["group_by_length"])
        config.train_sampling_strategy = "random"
    if config.memory_budget is not None:
        parse_bytes(config.memory_budget, "memory_budget")
    if config.use_gradient_checkpointing not in CHECKPOINTING:
        raise OptionError("a training option has a value that cannot be used", where="use_gradient_checkpointing",
                          found=repr(config.use_gradient_checkpointing),
                          expected="one of " + ", ".join(map(str, CHECKPOINTING)), fix='write "auto"')
    choices = {
        "optim": [kind.value for kind in OptimizerNames], "lr_scheduler_type": [kind.value for kind in SchedulerType],
        "eval_strategy": [kind.value for kind in IntervalStrategy],
        "save_strategy": [kind.value for kind in SaveStrategy],
        "train_sampling_strategy": ["random", "sequential"], "packing_strategy": ["bfd", "wrapped"],
        "train_on": ["responses", "all"], "precision": ["auto", "bf16", "fp16", "fp32", "fp8"],
        "on_spike": ["skip", "rollback", "stop"], "advisor": ["say", "stop", "off"],
    }
    for name, known in choices.items():
        value = getattr(config, name)
        if getattr(value, "value", value) not in known:
            raise OptionError("a training option has a value that cannot be used", where=name, found=repr(value),
                              expected="one of " + ", ".join(known), fix=nearest(str(value), known))
    check_trackers(config.report_to)


def _check(name: str, value: object, expected: str, accepts: Any) -> None:
    if isinstance(value, bool) or not accepts(value):
        raise OptionError("a training option has a value that cannot be used", where=name, found=repr(value),
                          expected=expected, fix=f"set {name} to {expected}")


def optimizer_name(config: TrainingArguments) -> str:
    """The optimizer's name, which transformers may have made a member of its enumeration."""
    return str(getattr(config.optim, "value", config.optim))
