"""Schemes, types and devices that an engine has no code for.

Source: vLLM 0.32 as it was run (CPUs) and read (GPUs); exllamav3 1.4.1.
"""

from collections.abc import Iterator

from vllm_gemma4q.architecture import EXPERTS_PER_LAYER, Role
from vllm_gemma4q.doctor.checks.amx import cpu_has_amx
from vllm_gemma4q.doctor.engines import EXLLAMAV3, LLAMA_CPP, Device, Engine
from vllm_gemma4q.doctor.finding import Finding, Severity
from vllm_gemma4q.doctor.stock import DEPRECATED_METHODS, METHODS, QUANTIZATION_METHODS, method_of
from vllm_gemma4q.doctor.subject import CODES, Scheme, Subject
from vllm_gemma4q.fp8_static.facts import Facts as Fp8Facts
from vllm_gemma4q.module_headers import fused_expert_part

_INSTALL = "pip install vllm-gemma4q"
_HALF = ("float16", "half", "torch.float16")


def check(subject: Subject, engine: Engine) -> Iterator[Finding]:
    """What cannot run at all, and float16."""
    yield from _float16(subject, engine)
    if engine.name == LLAMA_CPP:
        fix = f"convert_hf_to_gguf.py {subject.base_path} --outtype bf16 --outfile MODEL.gguf"
        yield Finding("not-gguf", Severity.ERROR, subject.folder.name, "a folder of safetensors", "a .gguf file",
                      "llama.cpp loads nothing else", fix)  # fmt: skip
    elif engine.name == EXLLAMAV3:
        if subject.scheme not in (Scheme.EXL3, Scheme.UNQUANTIZED):
            yield _no_code("quant_method", str(subject.scheme), "exl3 or none", "ExLlamaV3 has no such scheme",
                           f"gemma4q quantize {subject.base_path} DST --scheme exl3 --bits 4")  # fmt: skip
    elif engine.has_plugin:
        yield from _plugin(subject, engine)
    else:
        yield from _stock(subject, engine)


def _no_code(what: str, found: str, expected: str, reason: str, fix: str) -> Finding:
    return Finding("unsupported", Severity.ERROR, what, found, expected, reason, fix)


def _float16(subject: Subject, engine: Engine) -> Iterator[Finding]:
    text = subject.config.get("text_config") or {}
    values = [place.get(key) for place in (subject.config, text) for key in ("dtype", "torch_dtype")]
    dtype = next((value for value in values if value is not None), None)
    if dtype not in _HALF or engine.name == LLAMA_CPP:
        return
    on_cpu = engine.device is Device.CPU and subject.scheme is Scheme.INT8 and engine.is_vllm
    stops = on_cpu and (engine.has_plugin or cpu_has_amx())  # stock vLLM's other INT8 kernel, without AMX, takes it
    reason = (
        "INT8 kernels for CPUs do not take it" if stops
        else "Gemma's residual stream exceeds 65504, and what is infinite once stays so"
    )  # fmt: skip
    severity = Severity.ERROR if stops else Severity.WARNING
    fix = (
        f"vllm serve {subject.path} --dtype bfloat16"
        if engine.is_vllm
        else f"sed -i s/float16/bfloat16/ {subject.path}/config.json"
    )
    yield Finding("float16", severity, "dtype", str(dtype), "bfloat16", reason, fix)


def _plugin(subject: Subject, engine: Engine) -> Iterator[Finding]:
    yield from _method(subject)
    facts = subject.facts
    if engine.device is Device.GPU and isinstance(facts, Fp8Facts) and facts.channel_experts:
        yield _no_code(f"{subject.architecture.root}{min(facts.channel_experts)}", "one weight scale a row with static "
                       "inputs", "one a weight", "vLLM has no kernel for such experts", subject.requantize)  # fmt: skip


def _stock(subject: Subject, engine: Engine) -> Iterator[Finding]:
    serve = f"{_INSTALL} && vllm serve {subject.path}"
    if subject.scheme is Scheme.EXL3:
        yield _no_code("quant_method", "exl3", "a method of vLLM's", "vLLM has no EXL3", serve)
        return
    yield from _method(subject)
    text = subject.config.get("text_config", subject.config)
    if len(set(text.get(EXPERTS_PER_LAYER) or ())) > 1:
        found = "layers of different numbers of experts"
        yield _no_code(EXPERTS_PER_LAYER, found, "one number", "vLLM builds all layers alike, and stops", serve)
    fused = [name for name, tensor in subject.tensors.items() if fused_expert_part(name) and tensor.dtype in CODES]
    if fused:
        reason = "vLLM has no place for scales of fused experts, and stops"
        yield _no_code(fused[0], "fused quantized experts", "one by one", reason, serve)
    if engine.device is Device.CPU:
        yield from _stock_on_cpu(subject, engine, serve)


def _method(subject: Subject) -> Iterator[Finding]:
    """Methods that are left to vLLM: what it does not know, and what nothing here knows."""
    if subject.scheme is not Scheme.OTHER:
        return
    method, found = method_of(subject.quantization), str(subject.quantization.get("quant_method"))
    if method is None or (method and method not in QUANTIZATION_METHODS):
        reason = "vLLM stops at a method that it does not know"
        yield _no_code("quant_method", found, "a method of vLLM's", reason, subject.requantize)
    elif method in DEPRECATED_METHODS:
        reason = "vLLM is about to drop the method, and stops unless it is told to go on"
        fix = f"vllm serve {subject.path} --allow-deprecated-quantization"
        yield _no_code("quant_method", found, "a method that stays", reason, fix)
    elif method not in METHODS:
        expected = f"one that is checked: {', '.join(METHODS)} or exl3"
        reason = "vLLM may load it; its scales and its list of modules are not checked here"
        yield Finding("not-checked", Severity.NOTE, "quant_method", found, expected, reason)


def _stock_on_cpu(subject: Subject, engine: Engine, serve: str) -> Iterator[Finding]:
    if subject.scheme is Scheme.FP8:
        yield _no_code("quant_method", "static FP8", "another scheme", "vLLM's CPU build lacks the operation", serve)
    is_mixture = subject.architecture.num_experts is not None
    if is_mixture and subject.scheme is Scheme.INT8:
        yield _no_code(Role.EXPERTS.value, "INT8", "another scheme", "vLLM's CPU build has no INT8 experts", serve)
    if is_mixture and engine.expert_parallel and engine.ranks > 1:
        reason = "vLLM's CPU build dies of a segmentation fault"
        yield _no_code("-ep", "expert parallelism on a CPU", "none", reason, serve)
