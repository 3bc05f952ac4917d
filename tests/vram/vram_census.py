"""What one of vLLM's workers holds: imported there by name, so nothing but the standard library at the top."""

from typing import Any


def census(model: Any) -> dict[str, int]:
    """Bytes of each parameter and each buffer that a checkpoint would have, shared ones once.

    vLLM's CPU linears pack their weights into a private form and leave an empty parameter; what they had follows from
    the sizes that the layer was built with.
    """
    sizes = {}
    for path, module in model.named_modules():  # each once, whatever its names
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name in module._non_persistent_buffers_set or name.startswith("_"):
                continue  # the engine's own, such as the scales of an FP8 cache
            count = tensor.numel()
            if count == 0 and name == "weight":
                rows = getattr(module, "output_size_per_partition", module.output_size)
                count = rows * getattr(module, "input_size_per_partition", module.input_size)
            sizes.setdefault(id(tensor), (f"{path}.{name}", count * tensor.element_size()))
    return dict(sizes.values())
