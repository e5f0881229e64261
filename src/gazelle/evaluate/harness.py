"""Tasks of lm-evaluation-harness, its own or those of local files, on models in this process."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gazelle.base.errors import DataError, OptionError, nearest
from gazelle.base.log import logger
from gazelle.base.machine import machine_facts
from gazelle.base.optional import require
from gazelle.evaluate.answerers import Answerer, LocalModel
from gazelle.evaluate.report import table


@dataclass(frozen=True)
class TaskScore:
    """One figure of a task, with its standard error where lm-eval gives one, over `count` examples."""

    model: str
    task: str
    metric: str
    value: float
    error: float | None
    count: int | None


@dataclass(frozen=True)
class TaskReport:
    """What `run_tasks` found."""

    scores: list[TaskScore]
    machine: dict[str, Any]
    settings: dict[str, Any]

    def to_markdown(self) -> str:
        """A table: tasks and metrics down, models across."""
        models = list(dict.fromkeys(score.model for score in self.scores))
        cells = {(score.task, score.metric, score.model): f"{score.value:.4f}" + (
            f" ± {score.error:.4f}" if score.error is not None else "") for score in self.scores}
        lines = list(dict.fromkeys((score.task, score.metric, score.count) for score in self.scores))
        return "# Tasks\n\n" + table(["task", "metric", "examples", *models], [
            [task, metric, str(count or "–"), *(cells.get((task, metric, model), "–") for model in models)]
            for task, metric, count in lines]) + "\n\n± is the standard error.\n"

    def to_json(self) -> str:
        """All figures, with settings and machine."""
        return json.dumps({"settings": self.settings, "machine": self.machine,
                           "scores": [asdict(score) for score in self.scores]}, indent=1, ensure_ascii=False) + "\n"


def run_tasks(models: Mapping[str, Answerer], tasks: Sequence[str], *, include_path: str | Path | None = None,
              limit: int | None = None, num_fewshot: int | None = None, apply_chat_template: bool = False,
              batch_size: int = 16) -> TaskReport:
    """Run tasks with lm-eval.

    Args:
        models: name → model in this process, loaded when it is its turn.
        tasks: names of tasks or groups.
        include_path: a folder with task files of one's own, in lm-eval's format. Such files may name Python functions
            beside them, which are run.
        limit: examples of each task at most; for trying out.
        num_fewshot: examples shown in each prompt; left out, as the task says.
        apply_chat_template: put prompts into the model's chat template.
        batch_size: prompts at a time.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        OptionError: an unknown task, or a model that is not in this process.
        DataError: a task whose data cannot be loaded.
    """
    lm_eval: Any = require("lm_eval")
    local = {name: model for name, model in models.items() if isinstance(model, LocalModel)}
    for name in models:
        if name not in local:
            raise OptionError("lm-eval asks models in this process alone", where="MODEL", found=name,
                              expected="a folder, or a hub name", fix="leave it out, or use --cases")
    manager = _manager(tasks, include_path)
    for model in local.values():
        model.check()
    scores = []
    for name, model in local.items():
        logger.info("asking %s the tasks %s …", name, ", ".join(tasks))
        model.open()
        try:
            scores += _scores(name, _evaluate(lm_eval, model, tasks, manager, limit=limit, num_fewshot=num_fewshot,
                                              apply_chat_template=apply_chat_template, batch_size=batch_size))
        finally:
            model.close()
    return TaskReport(scores, machine_facts(), {"tasks": list(tasks), "limit": limit, "num_fewshot": num_fewshot,
                                                "apply_chat_template": apply_chat_template,
                                                "lm_eval": lm_eval.__version__})


def _manager(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """lm-eval's index of tasks; its own thousands are read only if one of them is asked for."""
    if include_path is not None and not Path(include_path).is_dir():
        raise OptionError("there is no such folder", where="--include-path", found=str(include_path),
                          expected="a folder with task files", fix="check the path")
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if any(task not in manager.all_tasks for task in tasks):
        manager = TaskManager(include_path=folder)
    for task in tasks:
        if task not in manager.all_tasks:
            raise OptionError("no such task", where="--tasks", found=task,
                              expected="a task of lm-eval, or one in --include-path",
                              fix=nearest(task, manager.all_tasks) if len(manager.all_tasks) < 20 else
                              "`lm-eval ls tasks` lists those that lm-eval has")
    return manager


def _evaluate(lm_eval: Any, model: LocalModel, tasks: Sequence[str], manager: Any, *, apply_chat_template: bool,
              batch_size: int, **options: Any) -> dict[str, Any]:
    import datasets
    from lm_eval.models.huggingface import HFLM

    harness_model = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch_size)
    try:
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model=harness_model, tasks=list(tasks), task_manager=manager, log_samples=False,
            apply_chat_template=apply_chat_template, **options)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError("the data of a task cannot be loaded", where=", ".join(tasks), found=str(error),
                        expected="files that the task names, or a data set of the hub",
                        fix="check the task's dataset_path and data_files, and the connection") from error
    return found


def _scores(name: str, found: dict[str, Any]) -> list[TaskScore]:
    """lm-eval writes "metric,filter" and "metric_stderr,filter" beside each other."""
    scores = []
    for task, figures in found["results"].items():
        count = (found.get("n-samples") or {}).get(task, {}).get("effective")
        for key, value in figures.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            scores.append(TaskScore(name, task, metric if kind == "none" else f"{metric} ({kind})", float(value),
                                    float(error) if isinstance(error, int | float) else None, count))
    return scores
