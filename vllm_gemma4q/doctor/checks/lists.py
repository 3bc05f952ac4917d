"""The list of modules that are not quantized (`exclude`, `ignored_layers`, `ignore`) against what the file holds.

The plugin goes by the weights, so a wrong list is a note there. Stock vLLM goes by the list as `stock.py` reads it.
"""

import fnmatch
from collections.abc import Callable, Iterator

from vllm_gemma4q.architecture import EXPERT_SHARDS
from vllm_gemma4q.doctor.engines import Engine
from vllm_gemma4q.doctor.finding import Finding, Severity, about
from vllm_gemma4q.doctor.stock import METHODS, Decision, Module, StockList, engine_name, modules
from vllm_gemma4q.doctor.subject import PACKED, Scheme, Subject
from vllm_gemma4q.fp8_static import facts as fp8
from vllm_gemma4q.fp8_static.ignore import IgnoreList
from vllm_gemma4q.module_headers import FLOATS, is_one_expert
from vllm_gemma4q.name_patterns import compile_pattern
from vllm_gemma4q.quark_int8 import facts as int8


def check(subject: Subject, engine: Engine) -> Iterator[Finding]:
    """What the engine makes of the list, and entries that name nothing."""
    method = subject.quantization.get("quant_method")
    if not engine.is_vllm or method not in METHODS:
        return
    stock = StockList(str(method), subject.ignored, _is_multimodal(subject))
    if engine.has_plugin and subject.is_claimed:
        yield from _plugin(subject)
    else:
        yield from _stock(subject, stock)
    yield from _dead(subject, engine, stock)


def _is_multimodal(subject: Subject) -> bool:
    return "text_config" in subject.config


def _plugin(subject: Subject) -> Iterator[Finding]:
    wrong: list[str] = []
    if isinstance(subject.facts, int8.Facts):
        wrong = int8.disagreements(subject.architecture, subject.facts, subject.ignored)
    elif isinstance(subject.facts, fp8.Facts):
        wrong = fp8.disagreements(subject.architecture, subject.facts, IgnoreList(subject.ignored))
    reason = "the plugin goes by the weights; stock vLLM goes by the list (--engine vllm-stock)"
    found = "another kind of weights than the list says"
    yield from about("list-disagrees", Severity.NOTE, wrong, found, "both alike", reason, subject.restore)


def _stock(subject: Subject, stock: StockList) -> Iterator[Finding]:
    mixed: list[str] = []
    virtual: list[str] = []
    misses: list[str] = []
    wrongly: list[str] = []
    for module in modules(subject.architecture, subject.config, list(subject.tensors)):
        decision, stored = stock.decide(module), _stored(subject, module)
        if decision is Decision.MIXED:
            only_values = [name.rpartition(".")[2] for name in stock.absent_shards(module)] == ["v_proj"]
            is_virtual = only_values and not any(shard.endswith("v_proj") for shard in module.shards)
            (virtual if is_virtual else mixed).append(module.name)
        elif decision is Decision.QUANTIZED and stored is False:
            misses.append(module.name)
        elif decision is Decision.IGNORED and stored is True:
            wrongly.append(module.name)
    fix = subject.restore
    yield from about("list-splits-fused", Severity.ERROR, mixed, "some of its shards on the list",
                     "all or none", "vLLM stops: fused shards share one scheme", fix)  # fmt: skip
    yield from about("list-lacks-absent-values", Severity.ERROR, virtual, "q_proj and k_proj on the list",
                     "v_proj too, which this layer does not have", "vLLM stops: it asks for all shards by name, and "
                     "values that are the keys have no tensor", fix)  # fmt: skip
    yield from about("list-misses", Severity.WARNING, misses, "unquantized weights that the list does not cover",
                     "its exact name on the list", "vLLM puts them into quantized parameters and serves garbage; it "
                     "ignores globs and parts of names without a word", fix)  # fmt: skip
    yield from about("list-covers-quantized", Severity.ERROR, wrongly, "quantized weights",
                     "unquantized ones, as the list says", "vLLM has no place for their scales", fix)  # fmt: skip


def _stored(subject: Subject, module: Module) -> bool | None:
    """Whether the file has a module quantized; None where it has nothing, or some of each."""
    kinds = set()
    for shard in module.shards:
        leaves = (".weight", *PACKED)
        names = [shard + leaf for leaf in leaves]
        if module.is_experts:
            names = [f"{shard}.0.{name}{leaf}" for name in EXPERT_SHARDS for leaf in leaves]
            names += [f"{shard}.{name}{leaf}" for name in ("gate_up_proj", "down_proj") for leaf in ("", ".weight")]
        kinds |= {subject.tensors[name].dtype not in FLOATS for name in names if name in subject.tensors}
    return kinds.pop() if len(kinds) == 1 else None


def _dead(subject: Subject, engine: Engine, stock: StockList) -> Iterator[Finding]:
    """Entries that name nothing in the checkpoint, as this engine reads them."""
    names = _known_modules(subject)
    known = [engine_name(name, _is_multimodal(subject)) for name in names]
    exact = set(known)
    if engine.has_plugin and subject.is_claimed:
        is_alive = _plugin_reading(subject, [*names, *known])
        dead = [entry for entry in subject.ignored if not is_alive(entry)]
    else:
        multimodal = _is_multimodal(subject)
        unknown = [entry for entry in subject.ignored if engine_name(entry, multimodal) not in exact]
        dead = [entry for entry in unknown if stock.is_dead(entry, known, multimodal)]
    reason = "it has no effect" + (
        ", for stock vLLM reads no globs and no parts of names" if not engine.has_plugin else ""
    )
    yield from about("dead-rule", Severity.NOTE, dead, "a rule that matches nothing", "the name of a module", reason,
                     subject.restore)  # fmt: skip


def _known_modules(subject: Subject) -> list[str]:
    """Everything that a list may name: modules with tensors, fused ones, experts of a layer, values that are keys."""
    found = {name.rpartition(".")[0]: None for name in subject.tensors if not is_one_expert(name)}
    for name in subject.tensors:
        if ".experts." in name:
            experts = name.partition(".experts.")[0] + ".experts"
            parts = (f".{part}" for part in ("gate_up_proj", "down_proj"))
            first = (f".0.{shard}" for shard in EXPERT_SHARDS)
            found |= dict.fromkeys([experts, *(experts + part for part in (*parts, *first))])
    root = subject.architecture.root
    for layer in subject.architecture.layers:
        prefix = f"{root}layers.{layer.index}."
        found |= dict.fromkeys(
            [f"{prefix}self_attn.qkv_proj", f"{prefix}self_attn.v_proj", f"{prefix}mlp.gate_up_proj"]
        )
    return [*found, "lm_head"]


def _plugin_reading(subject: Subject, names: list[str]) -> Callable[[str], bool]:
    """Whether an entry names anything: Quark's lists hold whole names and patterns, FP8's also parts of names."""
    lines = "\n".join(f".{name}." for name in names)
    exact = set(names)

    def is_alive(entry: str) -> bool:
        if entry.startswith("re:"):
            return any(map(compile_pattern(entry).match, names))
        if any(character in entry for character in "*?["):
            return any(fnmatch.fnmatchcase(name, entry) for name in names)
        return f".{entry.strip('.')}." in lines if subject.scheme is Scheme.FP8 else entry in exact

    return is_alive
