"""Recipes: from a model, and an imatrix where needed, to the type each tensor is asked to have. One file a family."""

from gemma4q_kernels.ggml import QUANTIZABLE_TYPES, type_name

from gguf_mixed.errors import InputError
from gguf_mixed.recipes.base import Choice, Material, Recipe
from gguf_mixed.recipes.contribdynamic import TIERS, contribdynamic
from gguf_mixed.recipes.rank15 import rank15, rank15_legacy
from gguf_mixed.recipes.tiers import STOCK_MIXES, stock, uniform

__all__ = ["RECIPES", "Choice", "Material", "Recipe", "find_recipe"]

RECIPES: dict[str, Recipe] = {
    "rank15": rank15,
    "rank15-legacy": rank15_legacy,
    **{name: contribdynamic(name) for name in TIERS},
    **{f"stock-{mix.lower()}": stock(mix) for mix in STOCK_MIXES},
    **{f"uniform-{type_name(qtype)}": uniform(qtype) for qtype in QUANTIZABLE_TYPES},
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, in any case.

    Raises:
        InputError: there is none.
    """
    try:
        return RECIPES[name.lower()]
    except KeyError:
        fixed = [known for known in RECIPES if not known.startswith(("stock-", "uniform-"))]
        raise InputError(
            f"recipe {name}: unknown, expected {', '.join(fixed)}, stock-MIX (stock-q4_k_m) or uniform-TYPE"
        ) from None
