"""Which type llama.cpp's recipes give each tensor of a model without experts, with a matrix.

Read off ``llama-quant.cpp`` of llama-cpp-python 0.3.36. Tensors are named as mlx-lm names them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

#: Layer, number of layers and whether four query heads or more share a key head -> type.
Rule = Callable[[int, int, bool], str]


def _first(kind: str, others: str, part: int) -> Rule:
    """One type in the first of so many parts of the layers."""
    return lambda layer, layers, _: kind if layer < layers // part else others


def _count(kind: str, others: str, count: int) -> Rule:
    return lambda layer, *_: kind if layer < count else others


def _shared(kind: str, others: str) -> Rule:
    return lambda _, __, wide: kind if wide else others


def _ends(kind: str, others: str) -> Rule:
    """One type in the first and last eighth and in every third layer between."""

    def rule(layer: int, layers: int, _: bool) -> str:
        eighth = layers // 8
        inside = eighth <= layer < 7 * layers // 8
        return others if inside and (layer - eighth) % 3 != 2 else kind

    return rule


def _middle(kind: str, others: str) -> Rule:
    return lambda layer, layers, _: kind if layers // 8 <= layer < 7 * layers // 8 else others


@dataclass(frozen=True)
class Recipe:
    """One of llama.cpp's mixtures.

    Attributes:
        embedding: Type of a tied embedding.
        others: Type of what has no rule.
        rules: Name of a layer -> type or rule.
    """

    embedding: str
    others: str
    rules: Mapping[str, str | Rule] = field(default_factory=dict)


def _two_bits(others: str) -> Recipe:
    rules = {"v_proj": _shared("Q4_K", "IQ3_S"), "down_proj": _first("IQ3_S", others, 8)}
    return Recipe("Q5_K", others, {**rules, "o_proj": "IQ3_S"})


RECIPES = {
    "Q4_K_M": Recipe(
        *("Q6_K", "Q4_K"),
        {"v_proj": _ends("Q6_K", "Q4_K"), "down_proj": _ends("Q6_K", "Q4_K")},
    ),
    "Q4_K_S": Recipe(
        *("Q6_K", "Q4_K"),
        {"v_proj": _count("Q5_K", "Q4_K", 4), "down_proj": _first("Q5_K", "Q4_K", 8)},
    ),
    "IQ4_XS": Recipe("Q6_K", "IQ4_XS", {"v_proj": _shared("Q5_K", "IQ4_XS")}),
    "Q3_K_M": Recipe(
        *("Q6_K", "Q3_K"),
        {
            "v_proj": _count("Q5_K", "Q4_K", 2),
            "down_proj": _first("Q5_K", "Q4_K", 16),
            "o_proj": "Q4_K",
        },
    ),
    "Q3_K_S": Recipe("Q6_K", "Q3_K"),
    "Q2_K": Recipe(
        *("Q6_K", "Q2_K"),
        {"v_proj": _shared("Q4_K", "Q3_K"), "down_proj": "Q3_K", "o_proj": "Q3_K"},
    ),
    "IQ3_M": Recipe(
        *("Q6_K", "IQ3_S"),
        {"v_proj": "Q4_K", "down_proj": _first("Q4_K", "IQ3_S", 8), "o_proj": "Q4_K"},
    ),
    "IQ3_S": Recipe("Q6_K", "IQ3_S", {"v_proj": _shared("Q4_K", "IQ3_S")}),
    "IQ3_XS": Recipe(
        *("Q6_K", "IQ3_S"),
        {
            "v_proj": _shared("Q4_K", "IQ3_S"),
            "q_proj": "IQ3_XXS",
            "k_proj": "IQ3_XXS",
            "gate_proj": _middle("IQ3_XXS", "IQ3_S"),
            "up_proj": _middle("IQ3_XXS", "IQ3_S"),
        },
    ),
    "IQ3_XXS": Recipe(
        *("Q5_K", "IQ3_XXS"),
        {
            "v_proj": _shared("Q4_K", "IQ3_XXS"),
            "q_proj": "IQ2_S",
            "k_proj": "IQ2_S",
            "o_proj": "IQ3_S",
        },
    ),
    "IQ2_M": _two_bits("IQ2_S"),
    "IQ2_S": _two_bits("IQ2_XS"),
}

#: Those tried at a budget, on both sides of its bytes: recipe, then the embedding's type, then +
#: if the head's inputs weight its columns.
NEAR = {
    4.5: ("IQ4_XS/Q4_K+", "Q4_K_S/Q4_K+", "IQ4_XS/Q5_K+"),
    4.0: ("IQ3_M/Q4_K+", "Q3_K_M/Q4_K+", "IQ3_M/Q5_K+", "IQ4_XS/Q4_K+"),
    3.5: ("IQ3_XS/IQ4_XS+", "IQ3_XXS/Q4_K+", "IQ3_XS/Q4_K+", "IQ3_M/Q4_K+"),
    3.0: ("IQ2_S/Q4_K+", "IQ2_M/IQ4_XS+", "IQ2_M/Q4_K+"),
}


def parsed(recipe: str) -> tuple[str, str, bool]:
    """The parts of ``RECIPE[/EMBEDDING][+]``; the recipe's own embedding if none is named."""
    name, _, embedding = recipe.removesuffix("+").partition("/")
    if name not in RECIPES:
        raise SystemExit(f"no recipe {name}; there are {', '.join(RECIPES)}")
    return name, embedding or RECIPES[name].embedding, recipe.endswith("+")


def kind(recipe: str, path: str, layer: int, layers: int, wide: bool) -> str:
    """The type of a layer's weight.

    Args:
        recipe: One of ``RECIPES``.
        path: Path of the module.
        layer: Its layer.
        layers: Layers of the model.
        wide: Whether four query heads or more share a key head.
    """
    known = RECIPES[recipe]
    rule = known.rules.get(path.rsplit(".", 1)[-1], known.others)
    return rule if isinstance(rule, str) else rule(layer, layers, wide)
