"""What GPUs are handed: scales under which vLLM's kernels compute the checkpoint's experts without rounding twice."""

from types import SimpleNamespace

import pytest
import torch
from gemma4q_kernels.fp8_scaled_mm import E4M3, moe_fp8
from tolerances import FP8_MOE, rms_error

pytestmark = pytest.mark.engine

EXPERTS, INNER, HIDDEN, TOKENS = 4, 24, 48, 33
BOUND = FP8_MOE[torch.float32]


@pytest.fixture
def layer() -> SimpleNamespace:
    """A layer as vLLM has loaded it: gate and up scaled apart, input scales that differ by expert."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(EXPERTS, 2, generator=generator) + 0.5

    def codes(*shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter((torch.randn(shape, generator=generator) * 50).to(E4M3), requires_grad=False)

    def scales(values: torch.Tensor) -> torch.nn.Parameter:
        return torch.nn.Parameter(values, requires_grad=False)

    return SimpleNamespace(
        layer_name="model.layers.0.experts",
        moe_config=SimpleNamespace(
            moe_parallel_config=SimpleNamespace(enable_eplb=False), is_lora_enabled=False, is_act_and_mul=True
        ),
        intermediate_size_per_partition=INNER,
        local_num_experts=EXPERTS,
        w13_weight=codes(EXPERTS, 2 * INNER, HIDDEN),
        w13_weight_scale=scales(factors * 2e-3),
        w13_input_scale=scales(torch.full((EXPERTS,), 0.01)),
        w2_weight=codes(EXPERTS, HIDDEN, INNER),
        w2_weight_scale=scales(torch.rand(EXPERTS, generator=generator) * 1e-3 + 1e-3),
        w2_input_scale=scales(torch.full((EXPERTS,), 0.02)),
    )


def _run(w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    """Every token through every expert; scales [E] or [E, 2] are spread over rows."""
    w2_scale, w13_input, w2_input = rest
    rows = w13_scale.reshape(EXPERTS, -1)
    rows = rows.repeat_interleave(2 * INNER // rows.shape[1], dim=1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(EXPERTS).expand(TOKENS, EXPERTS)
    columns = w2_scale.unsqueeze(1).expand(EXPERTS, HIDDEN).contiguous()
    return moe_fp8(hidden, w13, rows, w2, columns, w13_input, w2_input, torch.ones(TOKENS, EXPERTS), ids)


def _as_stored(layer: SimpleNamespace, w2_input_scale: torch.Tensor) -> torch.Tensor:
    scale = layer.w13_input_scale.max()
    return _run(layer.w13_weight, layer.w13_weight_scale, layer.w2_weight, layer.w2_weight_scale, scale, w2_input_scale)


def test_one_expert_is_unchanged_by_folding(layer: SimpleNamespace) -> None:
    """All experts in the proportion of the first, so that one input scale suits all: the same codes come out."""
    from vllm_gemma4q.fp8_static.moe import fold_up_scale

    layer.w13_weight_scale.data[:] = layer.w13_weight_scale.data[:1]
    expected = _as_stored(layer, layer.w2_input_scale.max())
    w13_scale, w2_scale, w2_input = fold_up_scale(layer.w13_weight_scale, layer.w2_weight_scale, layer.w2_input_scale)
    assert torch.equal(w13_scale[:, 0], w13_scale[:, 1]) and torch.equal(w13_scale[:, 0], layer.w13_weight_scale[:, 0])
    folded = [layer.w13_weight, w13_scale, layer.w2_weight, w2_scale, layer.w13_input_scale.max()]
    assert rms_error(_run(*folded, w2_input.max()), expected) <= BOUND
    folded[3] = layer.w2_weight_scale
    assert rms_error(_run(*folded, w2_input.max()), expected) > BOUND


def _given_to_the_kernel(layer: SimpleNamespace) -> list[torch.Tensor]:
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    from vllm_gemma4q.fp8_static.moe import FoldedFp8MoEMethod

    given: list[torch.Tensor] = []

    class Recorder(FoldedFp8MoEMethod):
        def __init__(self) -> None:  # the upstream method looks for a GPU's kernel
            self.quant_config = Fp8Config(is_checkpoint_fp8_serialized=True, activation_scheme="static")
            self.moe, self.block_quant, self.weight_scale_name = layer.moe_config, False, "weight_scale"

        def _setup_kernel(self, layer: object, *tensors: torch.Tensor) -> None:
            given.extend(tensors)

    Recorder().process_weights_after_loading(layer)  # type: ignore[arg-type]
    return given


def test_what_adapters_meet_has_its_true_scale(layer: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where LoRA is enabled nothing is folded: vLLM rounds gate and up to the larger of their scales."""
    from vllm.model_executor.layers.quantization.utils import fp8_utils

    def rounded(values: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (values / scale).to(E4M3), scale

    monkeypatch.setattr(fp8_utils.ops, "scaled_fp8_quant", rounded)  # GPUs' operation, as it is defined
    layer.moe_config.is_lora_enabled = True
    _, _, w13_scale, w2_scale, _, w2_input = _given_to_the_kernel(layer)
    assert torch.equal(w13_scale, layer.w13_weight_scale.max(dim=1).values)
    assert torch.equal(w2_scale, layer.w2_weight_scale) and torch.equal(w2_input.max(), layer.w2_input_scale.max())


def test_what_the_engines_kernel_is_given(layer: SimpleNamespace) -> None:
    """Weights keep their codes, and the answer moves by what rounding the intermediate elsewhere moves it, no more."""
    expected = _as_stored(layer, layer.w2_input_scale.max())
    elsewhere = _as_stored(layer, layer.w2_input_scale.max() * 1.3)
    stored = layer.w13_weight.data.clone(), layer.w2_weight.data.clone()
    w13, w2, w13_scale, w2_scale, w13_input, w2_input = _given_to_the_kernel(layer)
    assert torch.equal(w13.float(), stored[0].float()) and torch.equal(w2.float(), stored[1].float())
    assert w13_scale.shape == w2_scale.shape == (EXPERTS,)
    got = rms_error(_run(w13, w13_scale, w2, w2_scale, w13_input.max(), w2_input.max()), expected)
    assert 0 < got < 1.5 * rms_error(elsewhere, expected)
    wrong = rms_error(_run(w13, w13_scale, w2, w2_scale * 1.1, w13_input.max(), w2_input.max()), expected)
    assert wrong > 1.5 * rms_error(elsewhere, expected)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0])
def test_scales_that_nobody_wrote_are_refused(layer: SimpleNamespace, value: float) -> None:
    from vllm_gemma4q.errors import InputError
    from vllm_gemma4q.fp8_static.moe import DecodedFp8MoEMethod

    layer.w2_input_scale.data[2] = value
    method = DecodedFp8MoEMethod.__new__(DecodedFp8MoEMethod)
    with pytest.raises(InputError, match=r"tensor model.layers.0.experts.w2_input_scale: got \S+, expected a positive"):
        method.process_weights_after_loading(layer)  # type: ignore[arg-type]


def test_vllm_has_kernels_for_linears_with_a_scale_a_row() -> None:
    """CUTLASS and torch take per-channel weights with static inputs per tensor: nothing is rounded again."""
    from vllm.model_executor.kernels.linear import _POSSIBLE_FP8_KERNELS
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import FP8ScaledMMLinearLayerConfig
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticChannelSym, kFp8StaticTensorSym
    from vllm.platforms.interface import PlatformEnum

    config = FP8ScaledMMLinearLayerConfig(
        weight_quant_key=kFp8StaticChannelSym,
        activation_quant_key=kFp8StaticTensorSym,
        weight_shape=(5376, 21504),
        input_dtype=torch.bfloat16,
        out_dtype=torch.bfloat16,
    )
    able = {kernel.__name__ for kernel in _POSSIBLE_FP8_KERNELS[PlatformEnum.CUDA] if kernel.can_implement(config)[0]}
    assert {"CutlassFP8ScaledMMLinearKernel", "ChannelWiseTorchFP8ScaledMMLinearKernel"} <= able
