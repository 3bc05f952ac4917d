"""Experts on a GPU: `gemma4q_kernels.grouped_mm` as one of vLLM's INT8 experts. When they are chosen: `kernels.py`.

vLLM calls them inside its own opaque operation, so torch.compile traces nothing here; nothing is tuned or synchronized,
so CUDA graphs capture it. Results do not depend on the other tokens of a batch, nor on timing.

Tokens are quantized here, by the rule of `gemma4q_kernels.int8_scaled_mm`, except where vLLM sends them to other ranks
first: then it quantizes them before, at half the traffic, by a rule that differs in the last place of a scale.

Not done here: LoRA, biases, clamped activations, formats with a batch an expert, more than 512 experts a rank.
"""

import torch
from vllm.model_executor.layers.fused_moe import modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    QuantKey,
    kInt8DynamicTokenSym,
    kInt8StaticChannelSym,
)

from vllm_gemma4q.quark_int8.gpu_linear import Gemma4qInt8LinearKernel
from vllm_gemma4q.quark_int8.kernels import refusal

_MAX_EXPERTS = 512  # whose counts a program that sorts tokens holds in registers


class Gemma4qInt8Experts(mk.FusedMoEExpertsModular):
    """Two grouped multiplications with a gate between them; weights w1 int8 [E, 2I, H], w2 int8 [E, H, I]."""

    @staticmethod
    def is_supported_config(
        cls: type[mk.FusedMoEExperts],
        moe_config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: mk.FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        """Whether they are wanted, run on this machine and fit the layer, or why not."""
        if (reason := refusal(moe_config.moe_backend)) is not None:
            return False, f"kernel {reason}"
        supported, reason = Gemma4qInt8LinearKernel.is_supported()
        if not supported:
            return False, f"kernel {reason}"
        if moe_config.has_bias:
            return False, "kernel does not support biases"
        if moe_config.swiglu_limit is not None:
            return False, f"kernel does not support clamped activations, got swiglu_limit {moe_config.swiglu_limit}"
        if moe_config.num_local_experts > _MAX_EXPERTS:
            return False, f"kernel supports {_MAX_EXPERTS} experts a rank, got {moe_config.num_local_experts}"
        answer: tuple[bool, str | None] = mk.FusedMoEExperts.is_supported_config(
            cls, moe_config, weight_key, activation_key, activation_format
        )
        return answer

    @property
    def expects_unquantized_inputs(self) -> bool:
        return not self.moe_config.moe_parallel_config.use_all2all_kernels

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return Gemma4qInt8LinearKernel.is_supported()[0]

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
        return (weight_key, activation_key) == (kInt8StaticChannelSym, kInt8DynamicTokenSym)

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation in (MoEActivation.GELU_TANH, MoEActivation.SILU)

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        # FlashInfer's exchange hands over tokens in a layout of its own.
        return not (
            moe_parallel_config.use_fi_nvl_two_sided_kernels or moe_parallel_config.use_fi_nvl_one_sided_kernels
        )

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return True

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """No first workspace; gate and up, then the outputs of experts, in the second; the output [M, K]."""
        return (0,), (M, topk, max(N, K)), (M, K)

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Write this rank's weighted sum over experts to `output`, [T, H]."""
        # Imported here: the modules need Triton, which machines without a GPU may lack.
        from gemma4q_kernels.grouped_mm.triton import run_experts
        from gemma4q_kernels.int8_scaled_mm.triton import quantize_per_token

        if a1q_scale is None:
            hidden_states, a1q_scale = quantize_per_token(hidden_states)
        if apply_router_weight_on_input:
            topk_weights = torch.ones_like(topk_weights)
        run_experts(
            hidden_states,
            a1q_scale,
            w1,
            self.w1_scale,
            w2,
            self.w2_scale,
            topk_weights,
            topk_ids,
            output,
            activation=activation.value,
            expert_map=expert_map,
            workspace=workspace2,
        )
