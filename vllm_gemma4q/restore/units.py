"""A quantized checkpoint beside its base: which tensors belong together, and which units are quantized."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from vllm_gemma4q.architecture import (
    FUSED_SHARDS,
    Role,
    TextArchitecture,
    is_linear_weight,
    parse_text_architecture,
    role_of,
)
from vllm_gemma4q.checkpoint import Checkpoint, TensorInfo
from vllm_gemma4q.conformance import FLOAT_DTYPES, check_unquantized
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.linears import Linear, linears_of
from vllm_gemma4q.restore.names import canonical, is_weight, unit_of

_TOWERS = frozenset({Role.VISION, Role.EMBED_VISION, Role.AUDIO})


@dataclass
class Unit:
    """What is quantized or not as a whole: one linear of the language model, or all experts of a layer.

    Attributes:
        base: its weights in the base checkpoint.
        weights: its weights in the quantized one, by canonical name.
        others: its scales and the like.
    """

    name: str
    base: list[TensorInfo] = field(default_factory=list)
    weights: dict[str, TensorInfo] = field(default_factory=dict)
    others: dict[str, TensorInfo] = field(default_factory=dict)

    @property
    def is_quantized(self) -> bool:
        """Raises InputError where some weights are quantized and some are not."""
        kinds = {tensor.dtype not in FLOAT_DTYPES: tensor for tensor in self.weights.values()}
        if len(kinds) == 2:
            rounded, kept = kinds[True], kinds[False]
            raise InputError(f"tensor {kept.name}: got {kept.dtype}, expected {rounded.dtype} like {rounded.name}")
        return True in kinds

    @cached_property
    def base_linears(self) -> dict[str, Linear]:
        """The base's linears one by one, by canonical module name."""
        return dict(_linears({canonical(tensor.name): tensor for tensor in self.base}))

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """The quantized checkpoint's, as far as its weights are stored in a layout of unquantized checkpoints."""
        return dict(_linears(self.weights))


def _linears(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Linear]]:
    """Linears by canonical module name; a root is put before each name, for there are checkpoints without one."""
    for name, tensor in tensors.items():
        for linear in linears_of(replace(tensor, name=f"model.{name}")):
            yield canonical(linear.module), replace(linear, tensor=tensor)


@dataclass(frozen=True)
class Pair:
    """A quantized checkpoint and its base.

    Attributes:
        units: by canonical name, in the base's order.
        rest: every other tensor of the base that the result needs, by canonical name.
        found: the quantized checkpoint's tensors that are not in a unit, by canonical name.
    """

    quantized: Checkpoint
    base: Checkpoint
    architecture: TextArchitecture
    units: Mapping[str, Unit]
    rest: Mapping[str, TensorInfo]
    found: Mapping[str, TensorInfo]

    def result_name(self, name: str) -> str:
        """The full name in the result of a tensor with this canonical name."""
        if name in self.rest and role_of(self.rest[name].name) in _TOWERS | {Role.LM_HEAD}:
            return self.rest[name].name
        return self.architecture.root + name


def pair(quantized: Checkpoint, base: Checkpoint) -> Pair:
    """Sort the tensors of both.

    Raises:
        InputError: the base is quantized or incomplete, is another model, or a name is stored under two roots.
    """
    architecture = _same_architecture(quantized, base)
    units: dict[str, Unit] = {}
    rest: dict[str, TensorInfo] = {}
    text_only = "text_config" not in quantized.config
    for name, tensor in _by_canonical_name(base).items():
        if is_linear_weight(tensor.name, tensor.shape):
            units.setdefault(unit_of(name), Unit(unit_of(name))).base.append(tensor)
        elif not (text_only and role_of(tensor.name) in _TOWERS):
            rest[name] = tensor
    found: dict[str, TensorInfo] = {}
    for name, tensor in _by_canonical_name(quantized).items():
        unit = units.get(unit_of(name))
        if unit is None:
            found[name] = tensor
        else:
            (unit.weights if is_weight(name) else unit.others)[name] = tensor
    return Pair(quantized, base, architecture, units, rest, found)


def _same_architecture(quantized: Checkpoint, base: Checkpoint) -> TextArchitecture:
    if "quantization_config" in base.config:
        raise InputError(f"{base.folder}: got a quantized checkpoint, expected the BF16 one as BASE")
    theirs, ours = parse_text_architecture(base.config), parse_text_architecture(quantized.config)
    check_unquantized(theirs, base.tensors)
    expected, got = _shapes(ours), _shapes(theirs)
    for name in [*expected, *got]:
        if expected.get(name) != got.get(name):
            raise InputError(
                f"{base.folder}: another model: tensor {name}: got {_shown(got.get(name))}, "
                f"expected {_shown(expected.get(name))}"
            )
    return ours


def _shapes(architecture: TextArchitecture) -> dict[str, tuple[int, ...]]:
    """By canonical name; without the output layer, which some tools untie."""
    return {canonical(name): shape for name, shape in architecture.shapes() if role_of(name) is not Role.LM_HEAD}


def _shown(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))


def _by_canonical_name(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    result: dict[str, TensorInfo] = {}
    for tensor in checkpoint.tensors.values():
        name = canonical(tensor.name)
        if name in result:
            raise InputError(f"{checkpoint.folder}: tensor {tensor.name}: also stored as {result[name].name}")
        result[name] = tensor
    return result


def fused_units(architecture: TextArchitecture, units: Mapping[str, Unit]) -> Iterator[list[Unit]]:
    """Units that engines fuse into one linear, where more than one of them exists."""
    for layer in architecture.layers:
        for shards in FUSED_SHARDS.values():
            names = [f"layers.{layer.index}.{parent}.{shard}" for parent in ("self_attn", "mlp") for shard in shards]
            group = [units[name] for name in names if name in units]
            if len(group) > 1:
                yield group
