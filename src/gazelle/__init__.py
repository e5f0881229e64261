"""gazelle fine-tunes open-weight language models.

The public names below are imported on first use: `import gazelle` itself loads neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gazelle.base.device import is_bfloat16_supported
    from gazelle.base.errors import GazelleError, UserError
    from gazelle.facade.language_model import FastLanguageModel
    from gazelle.facade.vllm import prepare_for_vllm
    from gazelle.models.swap import accelerate, explain, restore
    from gazelle.train.config import SFTConfig
    from gazelle.train.trainer import SFTTrainer

__version__ = "0.1.0"

_HOMES = {
    "FastLanguageModel": "gazelle.facade.language_model",
    "GazelleError": "gazelle.base.errors",
    "SFTConfig": "gazelle.train.config",
    "SFTTrainer": "gazelle.train.trainer",
    "UserError": "gazelle.base.errors",
    "accelerate": "gazelle.models.swap",
    "explain": "gazelle.models.swap",
    "prepare_for_vllm": "gazelle.facade.vllm",
    "restore": "gazelle.models.swap",
    "is_bfloat16_supported": "gazelle.base.device",
}

__all__ = ["FastLanguageModel", "GazelleError", "SFTConfig", "SFTTrainer", "UserError", "__version__",
           "accelerate", "explain", "is_bfloat16_supported", "prepare_for_vllm", "restore"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'gazelle' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
