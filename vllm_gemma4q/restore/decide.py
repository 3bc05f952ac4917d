"""Decide for every tensor of a quantized checkpoint: keep it, or take it back from the base.

- Linears of the language model that are quantized stay as they are, with their scales.
- Everything else must be the base's, bit for bit: vision tower, embed_vision, router, lm_head, embeddings, norms, and
  linears that are not quantized. What is quantized, differs or is missing comes from the base.

Is the base the right one? Quantized weights must be the base's up to rounding (`MAX_DEVIATION`, a few rows each;
experts one by one, scales by tensor or row), and at most half of the tensors that neither side quantizes may differ.
"""

from dataclasses import dataclass, field

from vllm_gemma4q.checkpoint import TensorInfo
from vllm_gemma4q.checkpoint.rewrite import Progress
from vllm_gemma4q.conformance import FLOAT_DTYPES
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.linears import Linear
from vllm_gemma4q.restore.compare import Files, deviation, span, span_of
from vllm_gemma4q.restore.formats import Format
from vllm_gemma4q.restore.names import canonical, is_fused, module_of
from vllm_gemma4q.restore.units import Pair, Unit, fused_units

QUANTIZED, DIFFERENT, MISSING, LAYOUT = "quantized", "different", "missing", "stored another way"
# Rounding gives 0.03 (E4M3), 0.01 (int8) or 0.1 (4 bits); weights of another model 1.4, rescaled ones mostly > 0.5.
MAX_DEVIATION = 0.25


@dataclass
class Decision:
    """What becomes of each tensor.

    Attributes:
        kept_units: names of the units that stay quantized.
        kept: tensors of the quantized checkpoint that stay, by canonical name.
        restored: tensors of the base that replace something, and why.
    """

    kept_units: set[str] = field(default_factory=set)
    kept: dict[str, TensorInfo] = field(default_factory=dict)
    restored: list[tuple[TensorInfo, str]] = field(default_factory=list)


def decide(both: Pair, form: Format, progress: Progress) -> Decision:
    """Compare both checkpoints.

    Args:
        progress: called with numbers of the base's bytes that were compared.

    Raises:
        InputError: the base is not this checkpoint's (see above), a quantized linear lacks a scale or has another
            shape, or shards that engines fuse are quantized in part.
    """
    with Files() as files:
        decider = _Decider(files, form, progress)
        for unit in both.units.values():
            decider.unit(unit)
        for name, tensor in both.rest.items():
            decider.rest(tensor, both.found.get(name))
    decider.refuse_other_base(both)
    _check_fused(both, decider.decision.kept_units)
    return decider.decision


class _Decider:
    def __init__(self, files: Files, form: Format, progress: Progress) -> None:
        self.files, self.form, self.progress = files, form, progress
        self.decision = Decision()
        self._compared = self._differing = 0

    def unit(self, unit: Unit) -> None:
        if not unit.is_quantized:
            self._unquantized(unit)
            return
        self._check_complete(unit)
        for name, linear in unit.linears.items():
            self._check_base(linear, unit.base_linears[name], unit.others.get(f"{name}.weight_scale"))
        self.decision.kept_units.add(unit.name)
        others = {name: tensor for name, tensor in unit.others.items() if not self.form.is_orphan(name)}
        self.decision.kept |= unit.weights | others

    def rest(self, tensor: TensorInfo, found: TensorInfo | None) -> None:
        """A tensor that is never quantized, and what the quantized checkpoint has in its place."""
        if found is None:
            self._restore(tensor, MISSING)
        elif found.dtype not in FLOAT_DTYPES and tensor.dtype in FLOAT_DTYPES:
            self._restore(tensor, QUANTIZED)
        elif self._are_same(tensor, found):
            self.decision.kept[canonical(found.name)] = found
        else:
            self._restore(tensor, DIFFERENT)

    def refuse_other_base(self, both: Pair) -> None:
        if self._differing * 2 > self._compared:
            raise InputError(
                f"{both.base.folder}: another model: {self._differing} of {self._compared} tensors that neither "
                "side quantizes differ"
            )

    def _check_complete(self, unit: Unit) -> None:
        names = {**unit.weights, **unit.others}
        for name, weight in unit.weights.items():
            if missing := self.form.missing(name, names):
                raise InputError(f"tensor {weight.name}: got {weight.dtype} without the {missing} that it needs")
        for name, linear in unit.linears.items():
            expected = unit.base_linears[name].shape if name in unit.base_linears else None
            if linear.shape != expected:
                raise InputError(f"tensor {linear.tensor.name}: {name}: got {list(linear.shape)}, BASE has {expected}")
        if not any(is_fused(name) for name in unit.weights):
            absent = unit.base_linears.keys() - {module_of(name) for name in unit.weights}
            if absent:
                raise InputError(f"tensor {min(absent)}.weight: missing, while others of {unit.name} are quantized")

    def _check_base(self, linear: Linear, base: Linear, scale: TensorInfo | None) -> None:
        found = None if scale is None else deviation(self.files, linear, scale, base)
        if found is not None and not found <= MAX_DEVIATION:
            raise InputError(
                f"tensor {linear.tensor.name}: is {found:.0%} away from BASE's, expected at most {MAX_DEVIATION:.0%}: "
                "BASE is another model, or weights were rescaled"
            )

    def _unquantized(self, unit: Unit) -> None:
        stored = {canonical(tensor.name): tensor for tensor in unit.base}
        if not unit.weights:
            reason = MISSING
        elif stored.keys() == unit.weights.keys():
            if all(self._are_same(tensor, unit.weights[name]) for name, tensor in stored.items()):
                self.decision.kept |= unit.weights
                return
            reason = DIFFERENT
        else:
            reason = LAYOUT if self._are_same_linears(unit) else DIFFERENT
        for tensor in unit.base:
            self._restore(tensor, reason)

    def _are_same_linears(self, unit: Unit) -> bool:
        return unit.linears.keys() == unit.base_linears.keys() and all(
            linear.tensor.dtype == unit.base_linears[name].tensor.dtype
            and self.files.are_same(span_of(linear), span_of(unit.base_linears[name]))
            for name, linear in unit.linears.items()
        )

    def _are_same(self, tensor: TensorInfo, found: TensorInfo) -> bool:
        if (tensor.dtype, tensor.shape) != (found.dtype, found.shape):
            return False
        same = self.files.are_same(span(tensor), span(found))
        self.progress(tensor.end - tensor.start)
        self._compared += 1
        self._differing += not same
        return same

    def _restore(self, tensor: TensorInfo, reason: str) -> None:
        self.decision.restored.append((tensor, reason))


def _check_fused(both: Pair, kept: set[str]) -> None:
    for group in fused_units(both.architecture, both.units):
        kinds = {unit.name in kept: unit.name for unit in group}
        if len(kinds) == 2:
            raise InputError(
                f"{kinds[False]}: got unquantized weights, expected quantized ones like those of {kinds[True]}: "
                "engines fuse them into one linear"
            )
