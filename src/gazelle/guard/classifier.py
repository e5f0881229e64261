"""A text-classification model as a judge of whole texts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gazelle.base.errors import ModelError, OptionError, nearest

# Labels that say a text is fine; whatever else a model says counts against it.
SAFE = frozenset({"safe", "ok", "okay", "neutral", "clean", "benign", "non-toxic", "nontoxic", "not_toxic",
                 "not toxic", "normal", "none", "acceptable", "harmless", "no_injection", "legit", "legitimate",
                 "无害", "正常", "安全"})
_BATCH = 8


class Classifier:
    """The chance that a text is unsafe, by a Hugging Face model or any callable like a pipeline.

    A text longer than the model takes is read in windows that overlap by an eighth; the worst counts.

    Args:
        source: a folder or hub name of a sequence-classification model with safetensors weights, or a callable that
            takes a list of texts and returns for each {"label", "score"} or a list of them.
        labels: those that mean "unsafe". Default: all but those known to mean "safe" (`SAFE`).

    Raises:
        ModelError: no such model, or labels that say nothing ("LABEL_0") without `labels`.
        OptionError: a label that the model does not have.
    """

    def __init__(self, source: "str | Path | Callable[[list[str]], Any]", labels: Sequence[str] | None = None) -> None:
        self._labels = None if labels is None else frozenset([labels] if isinstance(labels, str) else labels)
        self._call: Callable[[list[str]], Any] = source if callable(source) else self._load(str(source))

    def score(self, text: str) -> tuple[float, str]:
        """The chance from 0 to 1 that `text` is unsafe, and the unsafe label that is likeliest ("" for an empty text).

        Raises:
            ModelError: the callable returned something else than labels with scores.
        """
        if not text.strip():
            return 0.0, ""
        (answer,) = self._call([text])
        entries = answer if isinstance(answer, list) else [answer]
        try:
            scores = [(str(entry["label"]), float(entry["score"])) for entry in entries]
        except (TypeError, KeyError, ValueError) as error:
            raise ModelError("the classifier's answer is not understood", where="classifier", found=repr(answer),
                             expected='{"label": ..., "score": ...}, or a list of them',
                             fix="return what a text-classification pipeline returns") from error
        unsafe = [(score, label) for label, score in scores if self._unsafe(label)]
        if len(scores) == 1 and scores[0][0].strip().lower() in SAFE:  # the likeliest label alone is told, a safe one
            return max(0.0, 1 - scores[0][1]), scores[0][0]
        if not all(0 <= score <= 1 for score, _ in unsafe):
            raise ModelError("the classifier's scores are no probabilities", where="classifier", found=repr(answer),
                             expected="scores from 0 to 1", fix='pass function_to_apply="softmax" to the pipeline')
        return max(unsafe, default=(0.0, ""))

    def _unsafe(self, label: str) -> bool:
        return label.strip().lower() not in SAFE if self._labels is None else label in self._labels

    def _load(self, source: str) -> Callable[[list[str]], list[list[dict[str, Any]]]]:
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(source)
            tokenizer = AutoTokenizer.from_pretrained(source)
            names = [str(config.id2label[index]) for index in range(config.num_labels)]
            self._check(source, names)
            model = AutoModelForSequenceClassification.from_pretrained(source, use_safetensors=True).eval()
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, ModelError | OptionError):
                raise
            raise ModelError("the classifier cannot be loaded", where=source, found=str(error),
                             expected="a sequence-classification model with its tokenizer and safetensors weights",
                             fix="check the folder or name") from error
        limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 512, 8192)
        if config.model_type in ("roberta", "xlm-roberta", "camembert"):
            limit = min(limit, config.max_position_embeddings - 2)  # their positions begin behind the padding's
        several = config.problem_type == "multi_label_classification"
        rows = 1 if tokenizer.pad_token_id is None else _BATCH

        @torch.inference_mode()
        def judge(texts: list[str]) -> list[list[dict[str, Any]]]:
            answers = []
            for text in texts:
                windows = tokenizer(text, truncation=True, max_length=limit, stride=limit // 8,
                                    return_overflowing_tokens=True)["input_ids"]
                worst = torch.zeros(len(names))
                for first in range(0, len(windows), rows):
                    some = {"input_ids": windows[first:first + rows]}
                    batch = tokenizer.pad(some, return_tensors="pt") if rows > 1 else {
                        name: torch.tensor(ids) for name, ids in some.items()}
                    logits = model(**batch).logits.float()
                    chances = logits.sigmoid() if several or len(names) == 1 else logits.softmax(-1)
                    worst = torch.maximum(worst, chances.amax(0))
                answers.append([{"label": name, "score": float(chance)}
                                for name, chance in zip(names, worst, strict=True)])
            return answers

        return judge

    def _check(self, source: str, names: list[str]) -> None:
        if self._labels is None:
            if all(name.startswith("LABEL_") for name in names) or (all(map(self._unsafe, names)) and len(names) == 2):
                raise ModelError(
                    "it cannot be told which of the classifier's labels mean unsafe",
                    where=source,
                    found=", ".join(names),
                    expected="labels=",
                    fix=f"pass labels=[{names[-1]!r}], for example",
                )
            return
        for label in sorted(self._labels - set(names)):
            raise OptionError("the classifier has no such label", where="labels", found=label,
                              expected=", ".join(names), fix=nearest(label, names))
