"""One type for everything, and llama-quantize's own mixes, for sweeps and comparison.

`uniform-TYPE` asks for one type for every quantizable tensor. `stock-MIX` names one of llama-quantize's own types, such
as Q4_K_M: which tensor gets what is decided inside llama.cpp and changes with its version and with whether there is an
imatrix, so the found llama-quantize is asked, by a dry run, and its answer becomes the table.
"""

import re
import subprocess

from gemma4q_kernels.ggml import GGMLQuantizationType

from gguf_mixed.errors import InputError
from gguf_mixed.llama_cpp import find_tool
from gguf_mixed.recipes.base import Choice, Material, Recipe, quantizable

STOCK_MIXES = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "Q2_K", "IQ3_XXS", "IQ3_XS", "Q3_K_S", "IQ3_S",
    "IQ3_M", "Q3_K_M", "Q3_K_L", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K_S", "Q4_K_M", "Q4_1", "Q5_0", "Q5_K_S", "Q5_K_M",
    "Q5_1", "Q6_K", "Q8_0",
)  # fmt: skip
_DRY_RUN_LINE = re.compile(r"^\[ *\d+/ *\d+\] (?P<name>\S+) .*, type = +\w+, size = .*-> .*\((?P<type>\w+)\)$", re.M)


def uniform(qtype: GGMLQuantizationType) -> Recipe:
    """The recipe that asks for `qtype` everywhere."""

    def recipe(material: Material) -> Choice:
        return Choice({tensor.name: qtype for tensor in quantizable(material.inventory)})

    return recipe


def stock(mix: str) -> Recipe:
    """The recipe that copies one of llama-quantize's mixes."""

    def recipe(material: Material) -> Choice:
        found = _dry_run(material, mix)
        return Choice(
            {tensor.name: found.get(tensor.name, tensor.qtype) for tensor in quantizable(material.inventory)},
            {"mix": mix},
        )

    return recipe


def _dry_run(material: Material, mix: str) -> dict[str, GGMLQuantizationType]:
    """Type of every tensor that llama-quantize would convert.

    Raises:
        InputError: no llama-quantize, it stops, or its dry run lists nothing.
    """
    tool = find_tool("llama-quantize", material.llama_cpp)
    options = ["--imatrix", str(material.imatrix_path)] if material.imatrix_path else []
    requantize = ["--allow-requantize"] if material.inventory.already_quantized else []
    command = [str(tool), "--dry-run", *requantize, *options, str(material.inventory.path), mix]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise InputError(f"{tool}: does not run: {error}") from error
    log = finished.stdout + finished.stderr
    found = {match["name"]: GGMLQuantizationType[match["type"].upper()] for match in _DRY_RUN_LINE.finditer(log)}
    if finished.returncode or not found:
        reason = next((line for line in reversed(log.splitlines()) if line.strip()), f"exit {finished.returncode}")
        raise InputError(f"recipe stock-{mix.lower()}: {tool.name} --dry-run tells no types: {reason.strip()}")
    return found
