"""What the wheel holds, what importing costs, and that the repository's folders shadow nobody's package."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the tracked sources, so that nothing in the working tree can help it."""
    folder = tmp_path_factory.mktemp("wheel")
    for package in ("vllm_gemma4q", "gguf_mixed", "kernels"):
        shutil.copytree(ROOT / package, folder / "source" / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder / "source"]
    subprocess.run(command, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_has_exactly_the_three_packages(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
    assert tops == {"vllm_gemma4q", "gguf_mixed", "gemma4q_kernels"}


def test_wheel_has_every_module(wheel):
    roots = [(ROOT, "vllm_gemma4q"), (ROOT, "gguf_mixed"), (ROOT / "kernels", "gemma4q_kernels")]
    modules = {str(path.relative_to(root)) for root, package in roots for path in (root / package).rglob("*.py")}
    assert modules <= set(wheel.namelist())


def test_wheel_has_every_tile_table(wheel):
    tables = {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels").rglob("configs/*.json")}
    assert tables and tables <= set(wheel.namelist())


def test_wheel_declares_plugins_and_commands(wheel):
    name = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(name).decode()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for command, target in project["scripts"].items():
        assert f"{command} = {target}" in text
    assert {"gemma4q", "gguf-mixed"} == set(project["scripts"])
    for plugin, target in project["entry-points"]["vllm.general_plugins"].items():
        assert f"{plugin} = {target}" in text


def test_repository_root_does_not_shadow_hugging_face_kernels(tmp_path):
    """vLLM starts processes with the working directory first on sys.path; `kernels/` must lose to a real package."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("WHO = 'Hugging Face'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.WHO)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "Hugging Face"


def test_transformers_does_not_take_the_folder_for_the_package():
    code = "import transformers.utils.import_utils as u; print(u.is_kernels_available())"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("vllm_gemma4q", {"torch", "vllm", "transformers"}),
        ("vllm_gemma4q.plugin", {"torch", "vllm", "transformers"}),
        ("vllm_gemma4q.architecture", {"torch", "vllm", "transformers"}),
        ("vllm_gemma4q.cli", {"vllm", "transformers"}),
        ("gguf_mixed", {"torch", "vllm", "transformers"}),
        ("gguf_mixed.cli", {"vllm", "transformers", "vllm_gemma4q"}),
        ("gemma4q_kernels", {"torch", "triton", "vllm"}),
    ],
)
def test_imports_stay_light(module, never):
    code = f"import sys, {module}; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert never & set(shown.stdout.split()) == set()


@pytest.mark.parametrize("package", ["kernels/gemma4q_kernels", "gguf_mixed"])
def test_imports_go_one_way(package):
    """vllm_gemma4q -> gguf_mixed -> gemma4q_kernels, and only what vLLM loads imports vLLM at module level."""
    for path in (ROOT / package).rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.startswith(("import vllm", "from vllm")), f"{path}: {line}"
