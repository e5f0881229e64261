"""gazelle fine-tunes open-weight language models.

The public names below are imported on first use: `import gazelle` itself loads neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gazelle.base.device import is_bfloat16_supported
    from gazelle.base.errors import GazelleError, UserError
    from gazelle.data.chat import apply_chat_template, get_chat_template
    from gazelle.data.sharegpt import standardize_sharegpt, to_sharegpt
    from gazelle.facade.language_model import FastLanguageModel
    from gazelle.facade.scripts.calls import add_new_tokens, unsloth_train
    from gazelle.facade.vllm import prepare_for_vllm
    from gazelle.guard.checker import SafetyChecker
    from gazelle.models.precision import MixedPrecisionConfig
    from gazelle.models.swap import accelerate, explain, restore
    from gazelle.train.config import SFTConfig
    from gazelle.train.responses import train_on_responses_only
    from gazelle.train.strategies.distillation import DistillationTrainer
    from gazelle.train.strategies.order import CurriculumTrainer, DynamicSequenceLengthTrainer
    from gazelle.train.strategies.profile import profile_io
    from gazelle.train.trainer import SFTTrainer

__version__ = "0.1.0"

_HOMES = {
    "CurriculumTrainer": "gazelle.train.strategies.order",
    "DistillationTrainer": "gazelle.train.strategies.distillation",
    "DynamicSequenceLengthTrainer": "gazelle.train.strategies.order",
    "FastLanguageModel": "gazelle.facade.language_model",
    "GazelleError": "gazelle.base.errors",
    "MixedPrecisionConfig": "gazelle.models.precision",
    "SFTConfig": "gazelle.train.config",
    "SFTTrainer": "gazelle.train.trainer",
    "SafetyChecker": "gazelle.guard.checker",
    "UserError": "gazelle.base.errors",
    "accelerate": "gazelle.models.swap",
    "add_new_tokens": "gazelle.facade.scripts.calls",
    "apply_chat_template": "gazelle.data.chat",
    "explain": "gazelle.models.swap",
    "get_chat_template": "gazelle.data.chat",
    "is_bfloat16_supported": "gazelle.base.device",
    "prepare_for_vllm": "gazelle.facade.vllm",
    "profile_io": "gazelle.train.strategies.profile",
    "restore": "gazelle.models.swap",
    "standardize_sharegpt": "gazelle.data.sharegpt",
    "to_sharegpt": "gazelle.data.sharegpt",
    "train_on_responses_only": "gazelle.train.responses",
    "unsloth_train": "gazelle.facade.scripts.calls",
}

__all__ = ["CurriculumTrainer", "DistillationTrainer", "DynamicSequenceLengthTrainer", "FastLanguageModel",
           "GazelleError", "MixedPrecisionConfig", "SFTConfig", "SFTTrainer", "SafetyChecker", "UserError",
           "__version__", "accelerate", "add_new_tokens", "apply_chat_template", "explain", "get_chat_template",
           "is_bfloat16_supported", "prepare_for_vllm", "profile_io", "restore", "standardize_sharegpt",
           "to_sharegpt", "train_on_responses_only", "unsloth_train"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'gazelle' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
