"""What is worth knowing of a run later: for model cards, and to verify exports on the rows it was trained on."""

import tempfile
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from gazelle.data.profile import profile_of
from gazelle.data.report import DataReport
from gazelle.models.hub import check_repository, push_folder
from gazelle.train.facts import RunFacts
from gazelle.train.metrics import last_figures, metrics_path, read_metrics, training_loss
from gazelle.train.prepare import Prepared
from gazelle.train.report import chosen_settings, duration


def run_record(args: TrainingArguments, facts: RunFacts, prepared: Prepared) -> dict[str, Any]:
    """The run as plain lists and strings, without tokens and without rows of the data."""
    data = prepared.report
    metrics = read_metrics(metrics_path(args)) if args.output_dir and metrics_path(args).exists() else []
    losses = training_loss(metrics, 3)
    shown = [("optimizer steps", f"{facts.steps:,}"), ("training time", duration(facts.seconds)),
             ("parameters trained", f"{facts.trainable / 1e6:,.1f} M of {facts.parameters / 1e6:,.1f} M"),
             *([("training loss", losses)] if losses else []),
             *last_figures(metrics),
             *([("stopped by the advisor", facts.stopped)] if facts.stopped else [])]
    profile = profile_of(prepared.train.examples) if prepared.train is not None else None
    return {
        "train": _place(data.train.source if data else ""),
        "eval": _place(data.test.source if data and data.test else ""),
        "format": data.train.format if data else "",
        "columns": args.columns if isinstance(getattr(args, "columns", None), dict) else None,
        "system": getattr(args, "system", None),
        "facts": shown,
        "settings": [(name, str(value)) for name, value in chosen_settings(args, facts) if name != "model"],
        "data_report": _figures(data),
        **({"profile": profile.to_dict()} if profile else {}),  # for `gazelle serve`, which watches for drift
    }


class Pushes:
    """`push_to_hub` for a trainer: adapter or model, tokenizer and a card written from the run, as one commit."""

    args: Any
    model: Any
    is_world_process_zero: Any
    save_model: Any

    def push_to_hub(self, commit_message: str | None = "End of training", blocking: bool = True,
                    token: str | None = None, revision: str | None = None, **kwargs: Any) -> Any:
        """Upload to `hub_model_id`, or to a repository named as the run's folder, and wait for it.

        Args:
            commit_message, revision: of the commit.
            blocking: as in transformers; a push always waits.
            token: else `hub_token`, else that of `hf auth login`.
            **kwargs: what transformers would write into its card. This one says what the run was.

        Returns:
            What huggingface_hub says of the commit; None in all processes but the first.

        Raises:
            HubError: the hub cannot be reached, or refuses; then nothing is committed.
        """
        args = self.args
        name = args.hub_model_id or Path(str(args.output_dir)).resolve().name
        token = token or args.hub_token
        with tempfile.TemporaryDirectory() as folder:
            if self.is_world_process_zero():
                name = check_repository(name, token=token, private=args.hub_private_repo)
            self.save_model(folder, _internal_call=True)
            if not self.is_world_process_zero():
                return None
            return push_folder(Path(folder), name, self.model, token=token, revision=revision or args.hub_revision,
                               commit_message=commit_message, run_folder=Path(str(args.output_dir)))


def _place(source: str) -> str | None:
    """Where rows can be read again, if they came from a file or folder."""
    return str(Path(source).absolute()) if source and Path(source).exists() else None


def _figures(data: DataReport | None) -> list[str]:
    """The report's figures: no first row, which is the user's, and no folders."""
    if data is None:
        return []
    lines = data.lines(warnings=False)
    end = next((number for number, line in enumerate(lines) if line.startswith("first row")), len(lines))
    sources = {split.source: Path(split.source).name for split in (data.train, data.test) if split and split.source}
    figures = []
    for line in lines[:end]:
        shown = line
        for source, name in sources.items():
            shown = shown.replace(source, name)
        figures.append(shown.rstrip())
    return figures
