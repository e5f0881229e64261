"""Which block format each tensor of a GGUF file gets: the mixtures that llama.cpp calls q4_k_m and the like.

The facts are those of `llama_tensor_get_type` in llama.cpp's src/llama-quant.cpp, for dense decoders. A file's name
states the format of most of its matrices. The head gets more bits, and in the k formats values (attn_v, or attn_qkv
where they are fused), the way out of attention and out of the MLP do in all or some layers, since errors there cost
most. With an importance matrix, q4_0 and q5_0 have a minimum a block in the first layers' way out of the MLP.
"""

import re
from dataclasses import dataclass

from gazelle.base.errors import OptionError, nearest
from gazelle.quantize.gguf import KINDS

_Rules = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Recipe:
    """One row: the format of most matrices, and what others get.

    Attributes:
        file_type: llama.cpp's number for such a file.
        kind: ggml's format of every matrix for which nothing else is said.
        value, down, out: rules for attn_v, ffn_down and attn_output: the first (layers, kind) that holds counts.
    """

    file_type: int
    kind: str
    value: _Rules = ()
    down: _Rules = ()
    out: _Rules = ()


RECIPES = {
    "f32": Recipe(0, "f32"),
    "f16": Recipe(1, "f16"),
    "bf16": Recipe(32, "bf16"),
    "q4_0": Recipe(2, "q4_0", down=(("first eighth, weighed", "q4_1"),)),
    "q4_1": Recipe(3, "q4_1"),
    "q5_0": Recipe(8, "q5_0", down=(("first eighth, weighed", "q5_1"),)),
    "q5_1": Recipe(9, "q5_1"),
    "q8_0": Recipe(7, "q8_0"),
    "q2_k": Recipe(10, "q2_k", value=(("grouped", "q4_k"), ("all", "q3_k")), down=(("all", "q3_k"),),
                   out=(("all", "q3_k"),)),
    "q3_k_s": Recipe(11, "q3_k"),
    "q3_k_m": Recipe(12, "q3_k", value=(("first 2", "q5_k"), ("all", "q4_k")),
                     down=(("first sixteenth", "q5_k"), ("all", "q4_k")), out=(("all", "q4_k"),)),
    "q3_k_l": Recipe(13, "q3_k", value=(("all", "q5_k"),), down=(("all", "q5_k"),), out=(("all", "q5_k"),)),
    "q4_k_s": Recipe(14, "q4_k", value=(("first 4", "q5_k"),), down=(("first eighth", "q5_k"),)),
    "q4_k_m": Recipe(15, "q4_k", value=(("ends and every third", "q6_k"),), down=(("ends and every third", "q6_k"),)),
    "q5_k_s": Recipe(16, "q5_k"),
    "q5_k_m": Recipe(17, "q5_k", value=(("ends and every third", "q6_k"),), down=(("ends and every third", "q6_k"),)),
    "q6_k": Recipe(18, "q6_k"),
}
# Other spellings: llama.cpp's short ones, and those of Unsloth's scripts.
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m", "not_quantized": "f16", "fast_quantized": "q8_0",
           "quantized": "q4_k_m"}
# For rows that are no multiple of 256 values.
_NARROWER = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_PLAIN = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class Shape:
    """What a recipe asks about a model.

    Attributes:
        layers: how many.
        heads, kv_heads: of queries, and of keys and values.
        tied: there is no output.weight, so token_embd.weight is the head as well.
        seventy_b: llama.cpp knows it as one of its 70B models, whose values are few and get more bits.
        weighed: quantised with an importance matrix.
    """

    layers: int
    heads: int
    kv_heads: int
    tied: bool
    seventy_b: bool = False
    weighed: bool = False


def find_recipes(methods: str | list[str] | tuple[str, ...], where: str = "quantization_method") -> dict[str, Recipe]:
    """Recipes by name, of one name or several ("q4_k_m,q8_0", or a list), in any case, each once.

    Args:
        methods: their names.
        where: what the user typed them as.

    Raises:
        OptionError: no such recipe.
    """
    names = methods.split(",") if isinstance(methods, str) else list(methods)
    found = {}
    for name in names:
        key = str(name).strip().lower()
        key = ALIASES.get(key, key)
        if key not in RECIPES:
            raise OptionError("there is no such GGUF quantisation", where=where, found=name,
                              expected="one or several of " + ", ".join(RECIPES),
                              fix=nearest(key, [*RECIPES, *ALIASES]))
        found[key] = RECIPES[key]
    if not found:
        raise OptionError("no GGUF quantisation is named", where=where, found="nothing",
                          expected="one or several of " + ", ".join(RECIPES), fix='use "q4_k_m" or "q8_0"')
    return found


def kind_of(name: str, shape: tuple[int, ...], recipe: Recipe, model: Shape) -> str:
    """ggml's format, such as "q6_k", for the tensor `name` of `shape` [rows, columns] in a file made by `recipe`."""
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith("_norm.weight"):
        return "f32"
    if recipe.kind in _PLAIN:
        return recipe.kind
    columns = shape[-1]
    if name == "output.weight" or (model.tied and name == "token_embd.weight"):
        kind = "q8_0" if recipe.kind == "q8_0" or columns % KINDS[recipe.kind].block else "q6_k"
    else:
        kind = _by_layer(name, recipe, model)
    if columns % KINDS[kind].block:
        kind = _NARROWER.get(kind, "f16")
    return kind if columns % KINDS[kind].block == 0 else "f16"


def _by_layer(name: str, recipe: Recipe, model: Shape) -> str:
    found = re.fullmatch(r"blk\.(\d+)\.(attn_v|attn_qkv|ffn_down|attn_output)\.weight", name)
    if found is None:
        return recipe.kind
    layer, part = int(found[1]), found[2]
    rules = {"ffn_down": recipe.down, "attn_output": recipe.out}.get(part, recipe.value)
    kind = next((kind for where, kind in rules if _holds(where, layer, model)), recipe.kind)
    if model.seventy_b and part in ("attn_v", "attn_qkv") and kind in ("q3_k", "q4_k"):
        return "q5_k"
    return kind


def _holds(where: str, layer: int, model: Shape) -> bool:
    eighth = model.layers // 8
    return {
        "all": True,
        "grouped": model.heads // model.kv_heads >= 4,
        "first 2": layer < 2,
        "first 4": layer < 4,
        "first eighth": layer < eighth,
        "first eighth, weighed": model.weighed and layer < eighth,
        "first sixteenth": layer < model.layers // 16,
        "ends and every third": layer < eighth or layer >= 7 * model.layers // 8 or (layer - eighth) % 3 == 2,
    }[where]
