"""Importing the kernel package costs nothing: no torch, no Triton, no vLLM."""

import subprocess
import sys

HEAVY = ("torch", "triton", "vllm", "numpy")
REPORT = "import sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"


def loaded_after(statement: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", f"{statement}; {REPORT}"], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_package_import_is_free() -> None:
    assert loaded_after("import gemma4q_kernels").isdisjoint(HEAVY)


def test_operations_import_neither_triton_nor_vllm() -> None:
    loaded = loaded_after("from gemma4q_kernels import int8_scaled_mm, grouped_mm; int8_scaled_mm.pack, grouped_mm")
    assert "torch" in loaded
    assert loaded.isdisjoint({"triton", "vllm"})


def test_unknown_names_are_attribute_errors() -> None:
    import gemma4q_kernels

    assert not hasattr(gemma4q_kernels, "int4_scaled_mm")
    assert set(gemma4q_kernels.__all__) <= set(dir(gemma4q_kernels))
