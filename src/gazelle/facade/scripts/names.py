"""What scripts import from Unsloth and TRL, where gazelle has it, and what to use instead of the rest."""

_MODEL = "gazelle.facade.language_model:FastLanguageModel"
_TRAINER, _CONFIG = "gazelle.train.trainer:SFTTrainer", "gazelle.train.config:SFTConfig"
_CHAT = {
    "get_chat_template": "gazelle.data.chat:get_chat_template",
    "apply_chat_template": "gazelle.data.chat:apply_chat_template",
    "standardize_sharegpt": "gazelle.data.sharegpt:standardize_sharegpt",
    "standardize_data_formats": "gazelle.data.sharegpt:standardize_sharegpt",
    "to_sharegpt": "gazelle.data.sharegpt:to_sharegpt",
    "train_on_responses_only": "gazelle.train.responses:train_on_responses_only",
}
_TRAINERS = {
    "UnslothTrainer": _TRAINER, "UnslothTrainingArguments": _CONFIG,
    "unsloth_train": "gazelle.facade.scripts.calls:unsloth_train",
}
_STRATEGIES = {
    "CurriculumTrainer": "gazelle.train.strategies.order:CurriculumTrainer",
    "DynamicSequenceLengthTrainer": "gazelle.train.strategies.order:DynamicSequenceLengthTrainer",
    "DistillationTrainer": "gazelle.train.strategies.distillation:DistillationTrainer",
    "MixedPrecisionConfig": "gazelle.models.precision:MixedPrecisionConfig",
    "profile_io": "gazelle.train.strategies.profile:profile_io",
}
_UNSLOTH = {
    "FastLanguageModel": _MODEL, "FastModel": _MODEL, "FastLlamaModel": _MODEL, "FastMistralModel": _MODEL,
    "FastQwen2Model": _MODEL, "FastQwen3Model": _MODEL, "FastGemmaModel": _MODEL, "FastGemma2Model": _MODEL,
    "is_bfloat16_supported": "gazelle.base.device:is_bfloat16_supported",
    "is_bf16_supported": "gazelle.base.device:is_bfloat16_supported",
    "add_new_tokens": "gazelle.facade.scripts.calls:add_new_tokens",
    **_TRAINERS, **_STRATEGIES, **_CHAT,
}
_TRL = {"SFTTrainer": _TRAINER, "SFTConfig": _CONFIG}

# Module -> name -> where gazelle has it.
MODULES: dict[str, dict[str, str]] = {
    "unsloth": _UNSLOTH,
    "unsloth.chat_templates": _CHAT,
    "unsloth.trainer": _TRAINERS | _STRATEGIES | {"SFTTrainer": _TRAINER},
    "unsloth.models": {name: _MODEL for name in _UNSLOTH if name.startswith("Fast")},
    "unsloth.models.loader": {"FastLanguageModel": _MODEL, "FastModel": _MODEL},
    "unsloth.tokenizer_utils": {"add_new_tokens": _UNSLOTH["add_new_tokens"]},
    "unsloth_zoo": {},
    "unsloth_zoo.dataset_utils": {name: _CHAT[name] for name in (
        "train_on_responses_only", "standardize_data_formats", "standardize_sharegpt")},
    "unsloth_zoo.training_utils": {"unsloth_train": _TRAINERS["unsloth_train"]},
    "trl": _TRL,
    "trl.trainer": _TRL,
    "trl.trainer.sft_trainer": {"SFTTrainer": _TRAINER},
    "trl.trainer.sft_config": {"SFTConfig": _CONFIG},
}
ROOTS = tuple(name for name in MODULES if "." not in name)

_PREFERENCES = "supervised fine-tuning: SFTTrainer on the answers that are preferred"
_VISION = "FastLanguageModel, for models of text alone"
_HEADERS = 'train_on_responses_only(trainer, instruction_part="…", response_part="…"), or rows with turns'
_PACKING = "SFTTrainer(packing=True)"
# Names that are known and not there -> what to use instead.
INSTEAD = {
    **dict.fromkeys((
        "DPOTrainer", "DPOConfig", "ORPOTrainer", "ORPOConfig", "KTOTrainer", "KTOConfig", "CPOTrainer", "CPOConfig",
        "GRPOTrainer", "GRPOConfig", "RLOOTrainer", "RLOOConfig", "PPOTrainer", "PPOConfig", "OnlineDPOTrainer",
        "OnlineDPOConfig", "BCOTrainer", "BCOConfig", "XPOTrainer", "NashMDTrainer", "RewardTrainer", "RewardConfig",
        "PRMTrainer", "PRMConfig", "PatchDPOTrainer", "PatchKTOTrainer", "PatchFastRL", "vLLMSamplingParams",
        "AutoModelForCausalLMWithValueHead", "create_reference_model"), _PREFERENCES),
    **dict.fromkeys(("FastVisionModel", "UnslothVisionDataCollator", "FastTextModel"), _VISION),
    "DataCollatorForCompletionOnlyLM": _HEADERS,
    "ConstantLengthDataset": _PACKING,
    "GKDTrainer": "gazelle.DistillationTrainer", "GKDConfig": "gazelle.DistillationTrainer",
    "setup_chat_format": 'get_chat_template(tokenizer, "chatml"), after add_new_tokens if they are missing',
    **dict.fromkeys(("ModelConfig", "ScriptArguments", "TrlParser", "get_peft_config", "get_quantization_config",
                     "get_kbit_device_map"),
                    "a recipe and `gazelle train`, or FastLanguageModel.from_pretrained and get_peft_model"),
    "CHAT_TEMPLATES": "get_chat_template(tokenizer, name)",
    "RawTextDataLoader": "SFTTrainer on the text file itself: it is cut without losing a token",
    "FastSentenceTransformer": "FastLanguageModel: embedding models are not trained here",
}
