"""Linears on a CPU: vLLM's INT8 kernel, but for weights that it refuses and processors on which it is wrong.

Refused: on processors with AMX vLLM packs int8 weights of which K is a multiple of 32 and N of 16 for an operator of
SGLang's. Its packing, `convert_weight_packed`, takes blocks of 32 rows, and stops at a last one of 16: "Expected N ==
BLOCK_N to be true". N is a rank's: 192 rows are 48 on four ranks. Such weights are oneDNN's here, as those of odd sizes
are in vLLM. Source: vLLM 0.32 `layers/utils.py:check_cpu_sgl_kernel`, `csrc/cpu/sgl-kernels/gemm.cpp:pack_vnni`.

Wrong: without VNNI vLLM's oneDNN sums in saturating 16 bits. There weights stay as they are, and `torch._int_mm` or the
reference multiplies them.
"""

import torch
from gemma4q_kernels.int8_scaled_mm import linear
from gemma4q_kernels.int8_scaled_mm.cpu import OneDnnWeight
from gemma4q_kernels.int8_scaled_mm.problem import Problem
from vllm.model_executor.kernels.linear import CPUInt8ScaledMMLinearKernel, Int8ScaledMMLinearLayerConfig
from vllm.model_executor.utils import replace_parameter
from vllm.utils.torch_utils import direct_register_custom_op

_BLOCK_ROWS = 32


class Gemma4qCpuInt8LinearKernel(CPUInt8ScaledMMLinearKernel):
    """As vLLM's, for weights of any size, on any processor."""

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether it is the scheme of our checkpoints; all others stay with vLLM's."""
        fits = c.is_channelwise and c.input_symmetric and not c.is_static_input_scheme
        return fits, None if fits else "needs a weight scale a channel and symmetric, dynamic activations"

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        _ask_for_amx()
        weight, *_ = self.layer_param_names
        n, k = getattr(layer, weight).shape
        if not OneDnnWeight.can_implement(Problem(torch.device("cpu"), 1, n, k, torch.bfloat16)):
            self.linear_method = self._apply_plain
            self._keep_plain(layer)
        elif n % _BLOCK_ROWS:
            self.linear_method = self._apply_weights_onednn
            self.process_weights_for_onednn(layer)
        else:
            super().process_weights_after_loading(layer)

    def _apply_weights_sgl(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """For x of any shape, as with oneDNN: SGLang's operator takes matrices alone."""
        out: torch.Tensor = super()._apply_weights_sgl(layer, x.reshape(-1, x.shape[-1]), bias)
        return out.reshape(*x.shape[:-1], -1)

    def _keep_plain(self, layer: torch.nn.Module) -> None:
        for name in self.layer_param_names[:2]:
            tensor = getattr(layer, name).data.contiguous()
            replace_parameter(layer, name, torch.nn.Parameter(tensor, requires_grad=False))

    def _apply_plain(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        w_q, w_scale, *_ = self._get_layer_params(layer)
        out: torch.Tensor = torch.ops.gemma4q.int8_linear_on_cpu(x, w_q, w_scale, bias)
        return out


def _ask_for_amx() -> None:
    """Have the system let this process use AMX, where there is AMX.

    vLLM's attention uses it without asking, and Linux ends a process that does (SIGILL). oneDNN asks, whenever a
    weight is given to it; a model that is all int8, of sizes that go elsewhere, may give it none.
    """
    torch.cpu._init_amx()


def _int8_linear(x: torch.Tensor, w_q: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return linear(x, w_q, w_scale, bias)


def _like_output(x: torch.Tensor, w_q: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], w_q.shape[0]))


# Opaque to torch.compile, which cannot trace the choice of a backend.
_LIBRARY = torch.library.Library("gemma4q", "FRAGMENT")  # type: ignore[no-untyped-call]
direct_register_custom_op("int8_linear_on_cpu", _int8_linear, fake_impl=_like_output, target_lib=_LIBRARY)
