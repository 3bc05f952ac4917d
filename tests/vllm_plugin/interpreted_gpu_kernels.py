"""vLLM's layers on our INT8 kernels, on CPU tensors; run with TRITON_INTERPRET=1 set before Triton is imported.

Outputs are float32: the interpreter truncates bfloat16 stores. Prints the name of each check that passed.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gemma4q_kernels.grouped_mm import reference as moe_reference
from gemma4q_kernels.int8_scaled_mm import linear, quantize_per_channel
from tolerances import INT8_MOE, INT8_SCALED_MM, rms_error
from vllm_plugin.gpu_kernel_configs import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    activation_format,
    experts_config,
    linear_config,
)

from vllm_gemma4q.quark_int8 import kernels

NAMES = ("weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj")
LINEAR_BOUND, MOE_BOUND = INT8_SCALED_MM[torch.float32], INT8_MOE[torch.float32]
Weights = tuple[torch.Tensor, torch.Tensor]


def linear_layer(n: int, k: int) -> tuple[Any, torch.nn.Module, Weights]:
    """Our kernel, a layer with weights as Quark's scheme registers them, processed, and those weights."""
    from vllm_gemma4q.quark_int8.gpu_linear import Gemma4qInt8LinearKernel

    kernel, layer = Gemma4qInt8LinearKernel(linear_config(), NAMES), torch.nn.Module()
    w_q, w_scale = quantize_per_channel(torch.randn(n, k))
    layer.weight = torch.nn.Parameter(w_q.clone(), requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(w_scale.clone().unsqueeze(1), requires_grad=False)
    kernel.process_weights_after_loading(layer)
    return kernel, layer, (w_q, w_scale)


def check_linear() -> None:
    """Any number of leading dimensions, with and without a bias, no tokens, and a scale that is wrong."""
    kernel, layer, (w_q, w_scale) = linear_layer(33, 176)
    bias = torch.randn(33)
    for shape in ((5, 176), (2, 3, 176), (1, 176)):
        x = torch.randn(shape)
        for added in (None, bias):
            expected = linear(x, w_q, w_scale, added, backend="reference")
            got = kernel.apply_weights(layer, x, added)
            assert got.shape == expected.shape and got.dtype == x.dtype
            assert rms_error(got, expected) <= LINEAR_BOUND
            layer.weight_scale.data *= 1.1
            assert rms_error(kernel.apply_weights(layer, x, added), expected) > LINEAR_BOUND
            layer.weight_scale.data = w_scale.clone().unsqueeze(1)
    assert kernel.apply_weights(layer, torch.randn(0, 176)).shape == (0, 33)


def check_linear_compiles_whole() -> None:
    """Neither a tile nor a number of tokens is traced: one graph serves all."""
    kernel, layer, _ = linear_layer(33, 64)
    compiled = torch.compile(lambda x: kernel.apply_weights(layer, x) + 1, backend="aot_eager", fullgraph=True)
    torch._dynamo.config.error_on_recompile = True
    for rows in (3, 4, 40):
        x = torch.randn(rows, 64)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), kernel.apply_weights(layer, x) + 1)
    torch._dynamo.config.error_on_recompile = False
    torch.library.opcheck(torch.ops.gemma4q.int8_linear, (x, layer.weight, layer.weight_scale, None))


def check_weights_that_do_not_fit_are_refused() -> None:
    from vllm_gemma4q.quark_int8.gpu_linear import Gemma4qInt8LinearKernel

    kernel, layer = Gemma4qInt8LinearKernel(linear_config(), NAMES), torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.ones(4, 8, dtype=torch.int8), requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(torch.ones(3, 1), requires_grad=False)
    try:
        kernel.process_weights_after_loading(layer)
    except ValueError as error:
        assert "w_scale: got torch.float32 (3, 1)" in str(error)
    else:
        raise AssertionError("three scales for four rows")


def check_old_gpus_are_refused() -> None:
    from vllm_gemma4q.quark_int8.gpu_linear import Gemma4qInt8LinearKernel

    answers = [Gemma4qInt8LinearKernel.is_supported(capability) for capability in (75, 80, 90, None)]
    assert answers == [(False, "needs compute capability 80 or newer, got 75"), *[(True, None)] * 3]


def experts_kernel(activation: str = "gelu_tanh") -> tuple[Any, tuple[torch.Tensor, ...]]:
    """vLLM's whole INT8 kernel on the experts that vLLM selects, and weights."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.oracle import int8

    config = experts_config(activation=MoEActivation(activation))
    backend, cls = int8.select_int8_moe_backend(config)
    assert (backend.value, cls.__name__) == ("TRITON", "Gemma4qInt8Experts")
    layer = []
    for rows, columns in ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)):
        q, scale = quantize_per_channel(torch.randn(EXPERTS * rows, columns) * 0.1)
        layer += [q.view(EXPERTS, rows, columns), scale.view(EXPERTS, rows, 1)]
    quantization = int8.make_int8_moe_quant_config(backend, layer[1], layer[3], per_act_token_quant=True)
    return int8.make_int8_moe_kernel(backend, quantization, config, cls), tuple(layer)


def check_experts() -> None:
    """Through vLLM's preparation and reduction, for both activations, against float64; and with a wrong scale."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    x = torch.randn(9, HIDDEN)
    weights, ids = torch.randn(9, EXPERTS).softmax(dim=1).topk(TOP_K)
    for activation in ("gelu_tanh", "silu"):
        kernel, (w13, w13_scale, w2, w2_scale) = experts_kernel(activation)
        assert kernel.impl.fused_experts.expects_unquantized_inputs

        def run(kernel: Any = kernel, w13: torch.Tensor = w13, w2: torch.Tensor = w2, name: str = activation) -> Any:
            return kernel.apply(
                x, w13, w2, weights, ids.int(), MoEActivation(name), EXPERTS, None, apply_router_weight_on_input=False
            )

        got = run()
        expected = moe_reference.moe_int8(x, w13, w13_scale, w2, w2_scale, weights, ids, activation)
        assert got.dtype == x.dtype and rms_error(got, expected) <= MOE_BOUND
        w2_scale *= 1.1
        assert rms_error(run(), expected) > MOE_BOUND


def apply_directly(kernel: Any, layer: tuple[torch.Tensor, ...], x: torch.Tensor, **change: Any) -> torch.Tensor:
    """One call of the experts' `apply` with vLLM's buffers, poisoned."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    experts, tokens, top_k = kernel.impl.fused_experts, len(x), change["topk_ids"].shape[1]
    shapes = experts.workspace_shapes(
        tokens, 2 * INTERMEDIATE, HIDDEN, top_k, EXPERTS, EXPERTS, None, MoEActivation.GELU_TANH
    )
    first, second, out = (torch.full(shape, float("nan")) for shape in shapes)
    arguments = {
        "output": out,
        "hidden_states": x,
        "w1": layer[0],
        "w2": layer[2],
        "activation": MoEActivation.GELU_TANH,
        "global_num_experts": EXPERTS,
        "expert_map": None,
        "a1q_scale": None,
        "a2_scale": None,
        "workspace13": first,
        "workspace2": second,
        "expert_tokens_meta": None,
        "apply_router_weight_on_input": False,
    }
    assert experts.apply(**{**arguments, **change}) is None
    return out


def check_experts_of_ranks() -> None:
    """Experts elsewhere contribute zero; tokens quantized before; weights that the input already holds."""
    from gemma4q_kernels.int8_scaled_mm import quantize_per_token

    kernel, layer = experts_kernel()
    x = torch.randn(7, HIDDEN)
    weights, ids = torch.randn(7, EXPERTS).softmax(dim=1).topk(TOP_K)
    expert_map = torch.tensor([0, -1, 1, -1, 2, -1], dtype=torch.int32)
    expected = moe_reference.moe_int8(x, *layer, weights, ids, "gelu_tanh", expert_map)
    routed = {"topk_weights": weights, "topk_ids": ids, "expert_map": expert_map}
    got = apply_directly(kernel, layer, x, **routed)
    assert rms_error(got, expected) <= MOE_BOUND
    assert rms_error(got, moe_reference.moe_int8(x, *layer, weights, ids)) > MOE_BOUND
    x_q, x_scale = quantize_per_token(x)
    assert torch.equal(apply_directly(kernel, layer, x_q, a1q_scale=x_scale, **routed), got)

    one = {"topk_weights": weights[:, :1] * 0.5, "topk_ids": ids[:, :1]}
    expected = moe_reference.moe_int8(x, *layer, torch.ones(7, 1), ids[:, :1])
    on_input, on_output = (
        apply_directly(kernel, layer, x, **one, apply_router_weight_on_input=a) for a in (True, False)
    )
    assert rms_error(on_input, expected) <= MOE_BOUND < rms_error(on_output, expected)


def check_experts_that_are_refused() -> None:
    """Whatever they do not do is left to vLLM's, with a reason."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.quantization.utils import quant_utils as keys

    from vllm_gemma4q.quark_int8.gpu_experts import Gemma4qInt8Experts

    def ask(
        weight: Any = keys.kInt8StaticChannelSym,
        token: Any = keys.kInt8DynamicTokenSym,
        layout: str = "Standard",
        **change: Any,
    ) -> str:
        config = experts_config(**change)
        answer, reason = Gemma4qInt8Experts.is_supported_config(
            Gemma4qInt8Experts, config, weight, token, activation_format(layout)
        )
        assert answer is (reason is None)
        return reason or ""

    assert ask() == "" == ask(activation=MoEActivation.SILU)
    assert "quantization scheme" in ask(weight=keys.kInt8StaticTensorSym, token=keys.kInt8DynamicTensorSym)
    assert "quantization scheme" in ask(token=keys.kInt8DynamicTokenAsym)
    assert "quantization scheme" in ask(weight=None, token=None)
    assert "GELU activation" in ask(activation=MoEActivation.GELU)
    assert ask(layout="BatchedExperts").endswith("activation format")
    assert ask(is_lora_enabled=True) == "kernel does not support LoRA"
    assert ask(has_bias=True) == "kernel does not support biases"
    assert "got swiglu_limit 7.0" in ask(swiglu_limit=7.0)
    assert ask(num_local_experts=513) == "kernel supports 512 experts a rank, got 513"
    exchange = replace(experts_config().moe_parallel_config, dp_size=2, use_ep=True, ep_size=2)
    exchange = replace(exchange, all2all_backend="flashinfer_nvlink_two_sided")
    assert "parallel config" in ask(moe_parallel_config=exchange)


def check_experts_wait_for_a_request() -> None:
    from vllm.model_executor.layers.quantization.utils.quant_utils import kInt8DynamicTokenSym, kInt8StaticChannelSym

    from vllm_gemma4q.quark_int8.gpu_experts import Gemma4qInt8Experts

    def answer(backend: str) -> bool:
        return Gemma4qInt8Experts.is_supported_config(
            Gemma4qInt8Experts,
            experts_config(moe_backend=backend),
            kInt8StaticChannelSym,
            kInt8DynamicTokenSym,
            activation_format(),
        )[0]

    del os.environ[kernels.VARIABLE]
    assert [answer(backend) for backend in ("auto", "triton", "humming")] == [False, True, False]
    os.environ[kernels.VARIABLE] = "0"
    assert [answer(backend) for backend in ("auto", "triton")] == [False, False]
    os.environ[kernels.VARIABLE] = "1"


CHECKS: tuple[Callable[[], None], ...] = (
    check_linear,
    check_linear_compiles_whole,
    check_weights_that_do_not_fit_are_refused,
    check_old_gpus_are_refused,
    check_experts,
    check_experts_of_ranks,
    check_experts_that_are_refused,
    check_experts_wait_for_a_request,
)


def main() -> None:
    os.environ[kernels.VARIABLE] = "1"
    kernels.register()
    torch.manual_seed(0)
    for check in CHECKS:
        check()
        print(check.__name__)


if __name__ == "__main__":
    main()
