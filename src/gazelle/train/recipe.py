"""A run as a YAML file: one section a call, with the names that the call takes.

    model: {name: HuggingFaceTB/SmolLM2-135M-Instruct, max_seq_length: 2048}   # FastLanguageModel.from_pretrained
    lora:  {r: 16}                                                             # FastLanguageModel.get_peft_model
    data:  {train: rows.jsonl}                                                 # SFTTrainer's data arguments
    train: {learning_rate: 2.0e-4, num_train_epochs: 3}                        # SFTConfig
    output_dir: out
"""

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from gazelle.base.errors import OptionError, nearest
from gazelle.train.config import SECRETS, SFTConfig, current_names


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ModelSection(_Section):
    """Arguments of `FastLanguageModel.from_pretrained`."""

    name: str = Field(description="Hub name, local folder, GGUF file, or an adapter's folder.")
    max_seq_length: int | None = Field(None, ge=8, description="Longest row in tokens. Default: 2048, or the model's.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] | None = Field(None, description="Default: by device.")
    load_in_4bit: bool | None = Field(None, description="NF4 base weights. Default: true on a GPU, false on a CPU.")
    load_in_8bit: bool = Field(False, description="int8 base weights.")
    full_finetuning: bool = Field(False, description="Train every weight; needs `lora: null`.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    device_map: str | None = Field(None, description="Device such as cuda:0 or cpu. Default: the best there is.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the checkpoint.")


class LoraSection(_Section):
    """Arguments of `FastLanguageModel.get_peft_model`."""

    r: int = Field(16, ge=1, description="Rank.")
    lora_alpha: float = Field(16, gt=0, description="Scale is lora_alpha / r (/ sqrt(r) with use_rslora).")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: list[str] | str | None = Field(None, description="Linear layers to adapt. Default: all.")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases to train.")
    use_rslora: bool = Field(False, description="Rank-stabilised scale.")
    use_dora: bool = Field(False, description="Weight-decomposed LoRA.")
    layers_to_transform: list[int] | None = Field(None, description="Layers to adapt. Default: all.")
    modules_to_save: list[str] | None = Field(None, description="Modules trained in full and saved beside.")
    use_gradient_checkpointing: bool | Literal["auto", "offload", "unsloth"] = Field(
        "auto", description="Trade time for memory.")
    random_state: int = Field(3407, description="Seed of the adapter's initial values.")


class DataSection(_Section):
    """Where the rows are and how to read them."""

    train: str = Field(description="File, folder or hub name.")
    eval: str | None = Field(None, description="The same, for evaluation.")
    eval_split: float = Field(0.0, ge=0, lt=1, validation_alias=AliasChoices("eval_split", "eval_fraction"),
                              description="Hold out this share of the training rows instead; rows alike stay together.")
    eval_group_column: str | None = Field(None, description="Column whose rows of one value stay together, too.")
    format: str = Field("auto", description="alpaca, sharegpt, messages, prompt-completion, question-answer, text.")
    columns: dict[str, str] | None = Field(None, description="Canonical column name: the file's own.")
    system: str | None = Field(None, description="System turn for rows that have none.")
    train_on: Literal["responses", "all"] = Field("responses", description="Which tokens are learnt.")
    chat_template: str | None = Field(None, description="Shipped template to use instead of the tokenizer's.")


class Recipe(_Section):
    """A whole run."""

    model: ModelSection
    lora: LoraSection | None = Field(default_factory=lambda: LoraSection.model_validate({}))
    data: DataSection
    train: dict[str, Any] = Field(default_factory=dict, description="Fields of SFTConfig.")
    output_dir: str = Field("outputs", description="Folder for the adapter, checkpoints and report.")

    def sft_config(self) -> SFTConfig:
        """The training settings of the recipe."""
        data = self.data
        chosen = dict(self.train)
        if data.eval or data.eval_split:
            chosen.setdefault("eval_strategy", "epoch")  # rows held out are there to be looked at
        return SFTConfig(**chosen, output_dir=self.output_dir, data_format=data.format, columns=data.columns,
                         system=data.system, train_on=data.train_on, chat_template=data.chat_template)

    def lora_options(self) -> dict[str, Any]:
        """Arguments for `get_peft_model`."""
        return self.lora.model_dump() if self.lora is not None else {}

    def as_yaml(self) -> str:
        """The recipe with every default written out, and without tokens."""
        content = self.model_dump()
        content["train"] = {name: value for name, value in self.train.items() if name not in SECRETS}
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with `section.key=value` overrides put over it.

    Relative paths of data and model are looked up in the current folder, then in the recipe's own.

    Raises:
        OptionError: naming file and key, what was found and what is accepted.
    """
    if not path.is_file():
        raise OptionError("no such recipe", where=str(path),
                          found="a folder" if path.is_dir() else "nothing", expected="a YAML file",
                          fix="run `gazelle recipes` to see those that come with gazelle")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        raise OptionError("the recipe is not valid YAML", where=where, found=getattr(error, "problem", None),
                          expected="YAML", fix="check indentation, quotes and colons on that line") from error
    except UnicodeDecodeError as error:
        raise OptionError("the recipe is not UTF-8 text", where=str(path), found=str(error), expected="UTF-8",
                          fix="save the file as UTF-8") from error
    if not isinstance(content, dict):
        raise OptionError("a recipe is a mapping of sections", where=str(path), found=type(content).__name__,
                          expected="model:, data:, …", fix="start from one that `gazelle recipes` shows")
    for override in overrides:
        _override(content, override)
    recipe = parse_recipe(content, str(path))
    recipe.output_dir = str(Path(recipe.output_dir).expanduser())
    for section, key in ((recipe.model, "name"), (recipe.data, "train"), (recipe.data, "eval")):
        value = getattr(section, key)
        if value and not Path(value).exists() and (path.parent / value).exists():
            setattr(section, key, str((path.parent / value).resolve()))
    return recipe


def parse_recipe(content: dict[str, Any], where: str) -> Recipe:
    """A checked recipe from its parsed YAML; `where` names the file in errors."""
    try:
        recipe = Recipe.model_validate(content)
    except pydantic.ValidationError as error:
        raise _readable(error, where) from error
    try:
        recipe.train = current_names(recipe.train)
    except OptionError as error:
        key = "train" if " " in error.found else f"train.{error.found}"
        raise OptionError(error.what, where=f"{where}, {key}", found=error.found, expected=error.expected,
                          fix=_elsewhere(error.found) or error.fix) from error
    if reserved := sorted(recipe.train.keys() & {"output_dir", "system", "train_on", "chat_template", "columns",
                                                 "data_format", "eval_split", "eval_group_column"}):
        raise OptionError("this option stands elsewhere in a recipe", where=f"{where}, train.{reserved[0]}",
                          found=f"train.{reserved[0]}", expected="output_dir at the top level, the others under data:",
                          fix=f"move {reserved[0]} out of train:")
    hints = typing.get_type_hints(SFTConfig)
    for name, value in recipe.train.items():
        recipe.train[name] = _typed(value, hints[name], f"{where}, train.{name}")
    data = recipe.data
    if data.eval and data.eval_split:
        raise OptionError("there are evaluation rows already", where=f"{where}, data.eval_split",
                          found=f"eval: {data.eval} and eval_split: {data.eval_split:g}", expected="one of them",
                          fix="drop data.eval, or eval_split")
    if data.eval_group_column and not data.eval_split:
        raise OptionError("data.eval_group_column has nothing to split", where=f"{where}, data.eval_group_column",
                          found=data.eval_group_column, expected="eval_split above 0", fix="set data.eval_split too")
    model = recipe.model
    if model.full_finetuning and recipe.lora is not None and "lora" in content:
        raise OptionError("full fine-tuning and LoRA exclude each other", where=f"{where}, lora",
                          found="full_finetuning: true and a lora section", expected="one of them",
                          fix="write `lora: null`, or drop full_finetuning")
    if recipe.lora is None and (model.load_in_4bit or model.load_in_8bit):
        raise OptionError("quantised weights cannot be trained without an adapter", where=f"{where}, lora",
                          found="lora: null and quantised weights", expected="a lora section, or weights as they are",
                          fix="drop load_in_4bit and load_in_8bit, or write a lora section")
    if model.full_finetuning or recipe.lora is None:
        model.full_finetuning, recipe.lora = True, None
    return recipe


def _override(content: dict[str, Any], override: str) -> None:
    """Put one `a.b=value` over `content`; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise OptionError("an override is key=value", where="command line", found=override,
                          expected="section.key=value", fix="for example train.learning_rate=1e-4")
    *sections, name = key.split(".")
    target = content
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise OptionError("this key is a value, not a section", where="command line", found=override,
                              expected="section.key=value", fix=f"write {section}=…")
    try:
        target[name] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise OptionError("the value is not valid YAML", where="command line", found=override,
                          expected="a value such as 3, true or [q_proj, v_proj]", fix="quote it") from error


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as the option's type: YAML 1.1 reads 2e-4 as a string, and a quoted number is still a number."""
    plain = {int, float, bool, str, types.NoneType}
    members = set(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else {hint}
    if not members <= plain:
        return value
    try:
        return pydantic.TypeAdapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        names = " or ".join(sorted(member.__name__ for member in members if member is not types.NoneType))
        raise OptionError("a value has the wrong type", where=where, found=repr(value), expected=names,
                          fix="correct the value") from error


def _elsewhere(name: str) -> str:
    """A hint to the section in which an option of this name stands; empty if there is none."""
    if name == "output_dir":
        return "write output_dir at the top level"
    homes = {section: set(kind.model_fields)
             for section, kind in (("model", ModelSection), ("lora", LoraSection), ("data", DataSection))}
    homes["train"] = {option.name for option in dataclasses.fields(SFTConfig) if option.init}
    return next((f"write {section}.{name}" for section, names in homes.items() if name in names), "")


def _readable(error: pydantic.ValidationError, where: str) -> OptionError:
    """The first complaint of pydantic in our words."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if not str(part).startswith(("function-", "literal[", "list["))]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in path[:-1]:
            section = next(kind for kind in (*typing.get_args(section.model_fields[part].annotation),
                                             section.model_fields[part].annotation) if hasattr(kind, "model_fields"))
        return OptionError("no such recipe key", where=f"{where}, {key}", found=path[-1],
                           expected=", ".join(section.model_fields),
                           fix=_elsewhere(path[-1]) or nearest(path[-1], section.model_fields))
    if first["type"] == "missing":
        return OptionError("a recipe key is missing", where=f"{where}, {key}", found="nothing", expected=f"{key}: …",
                           fix="start from a recipe that `gazelle recipes` shows")
    return OptionError("a recipe value cannot be used", where=f"{where}, {key}", found=repr(first["input"]),
                       expected=first["msg"][0].lower() + first["msg"][1:], fix="correct the value")
