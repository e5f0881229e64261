"""Recipes: shipped ones load, overrides land where they should, mistakes are named with the nearest right word."""

from pathlib import Path

import pytest
import yaml

from gazelle.base.errors import OptionError
from gazelle.train.recipe import load_recipe

SHIPPED = sorted((Path(__file__).parents[2] / "src" / "gazelle" / "recipes").glob("*.yaml"))
SMALL = {"model": {"name": "m"}, "data": {"train": "rows.jsonl"}}


def write(folder: Path, content: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    recipe = load_recipe(path)
    config = recipe.sft_config()
    assert config.output_dir == recipe.output_dir
    assert path.read_text().startswith("# ")
    assert (recipe.lora is None) == recipe.model.full_finetuning


def test_there_are_at_least_three() -> None:
    assert len(SHIPPED) >= 3


def test_defaults_and_overrides(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL), ["train.learning_rate=1e-4", "lora.r=4", "train.seed=7",
                                                  "data.columns={instruction: q}", "output_dir=there"])
    assert recipe.lora is not None
    assert (recipe.lora.r, recipe.output_dir) == (4, "there")
    assert recipe.data.columns == {"instruction": "q"}
    config = recipe.sft_config()
    assert (config.learning_rate, config.seed) == (1e-4, 7)  # YAML 1.1 reads 1e-4 as a string
    assert config.train_on == "responses"


def test_a_printed_recipe_loads_again(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL))
    assert load_recipe(write(tmp_path, recipe.as_yaml())) == recipe


def test_data_is_found_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    assert load_recipe(write(tmp_path, SMALL)).data.train == str(tmp_path / "rows.jsonl")


def test_lora_null_means_full_fine_tuning(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL | {"lora": None}))
    assert recipe.lora is None
    assert recipe.model.full_finetuning


def test_rows_held_out_are_looked_at(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL), ["data.eval_split=0.1"])
    assert recipe.sft_config().eval_strategy == "epoch"
    recipe = load_recipe(write(tmp_path, SMALL), ["data.eval_split=0.1", "train.eval_strategy=no"])
    assert recipe.sft_config().eval_strategy == "no"  # YAML reads an unquoted no as False


def test_tokens_are_not_written_down(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL), ["train.hub_token=hf_secret"])
    assert recipe.sft_config().hub_token == "hf_secret"
    assert "hf_secret" not in recipe.as_yaml()


def test_a_home_folder_is_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe(write(tmp_path, SMALL), ["output_dir=~/x"]).output_dir == str(tmp_path / "x")


@pytest.mark.parametrize(
    ("content", "overrides", "where", "said"),
    [
        ("a: [1", [], "line 1", "not valid YAML"),
        ("- 1\n", [], "recipe.yaml", "mapping of sections"),
        ({"data": {"train": "x"}}, [], "model", "missing"),
        (SMALL | {"modle": {}}, [], "modle", "did you mean 'model'?"),
        (SMALL | {"lora": {"rank": 3, "r": 2}}, [], "lora.rank", "use one of"),
        (SMALL | {"lora": {"lora_alhpa": 3}}, [], "lora.lora_alhpa", "did you mean 'lora_alpha'?"),
        (SMALL | {"lora": {"r": 0}}, [], "lora.r", "greater than or equal to 1"),
        (SMALL | {"lora": {"r": "many"}}, [], "lora.r", "valid integer"),
        (SMALL | {"model": {"name": "m", "dtype": "float8"}}, [], "model.dtype", "bfloat16"),
        (SMALL | {"train": {"lerning_rate": 1}}, [], "train.lerning_rate", "did you mean 'learning_rate'?"),
        (SMALL | {"train": {"learning_rate": "fast"}}, [], "train.learning_rate", "float"),
        (SMALL | {"train": {"num_train_epochs": [1]}}, [], "train.num_train_epochs", "float"),
        (SMALL | {"train": {"output_dir": "x"}}, [], "train.output_dir", "top level"),
        (SMALL | {"train": {"dataset_format": "text"}}, [], "train.data_format", "under data:"),
        (SMALL | {"train": {"max_length": 5, "max_seq_length": 6}}, [], "train", "one of them"),
        (SMALL | {"model": {"name": "m", "load_in_4bit": True}, "lora": None}, [], "lora", "without an adapter"),
        (SMALL | {"model": {"name": "m", "full_finetuning": True}, "lora": {"r": 4}}, [], "lora", "exclude each other"),
        (SMALL, ["max_steps=4"], "max_steps", "write train.max_steps"),
        (SMALL | {"train": {"r": 8}}, [], "train.r", "write lora.r"),
        (SMALL | {"data": {"train": "x", "output_dir": "y"}}, [], "data.output_dir", "output_dir at the top level"),
        (SMALL, ["train.seed"], "command line", "key=value"),
        (SMALL, ["model.name.x=1"], "command line", "not a section"),
        (SMALL, ["train.seed=[1"], "command line", "not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, content: object, overrides: list[str], where: str, said: str) -> None:
    with pytest.raises(OptionError) as caught:
        load_recipe(write(tmp_path, content), overrides)
    assert where in caught.value.where
    assert said in str(caught.value)
    assert caught.value.fix


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\n")
    with pytest.raises(OptionError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")
