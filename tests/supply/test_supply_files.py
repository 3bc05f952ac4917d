"""Lock, bill of materials and licences agree with pyproject.toml; a bad one, or a poor audit, is noticed."""

import importlib.util
import json
import re
from importlib.metadata import Distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ENVIRONMENT = Path(__file__).resolve().parents[2] / "environment"
FILES = ("lock.txt", "sbom.cdx.json", "LICENSES.md")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """environment/supply.py as a module; it imports its neighbours, as scripts do."""
    monkeypatch.syspath_prepend(str(ENVIRONMENT))
    spec = importlib.util.spec_from_file_location("supply_script", ENVIRONMENT / "supply.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_up_to_date(script: ModuleType) -> None:
    assert script.problems() == []


def test_every_locked_file_has_a_hash(script: ModuleType) -> None:
    lines = [line for line in script.LOCK.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 100
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==\S+ --hash=sha256:[0-9a-f]{64}", line)] == []


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_a_machine(name: str) -> None:
    text = (ENVIRONMENT / name).read_text()
    found = re.findall(
        r"(?:https?|file)://[^\s\"]+", text.replace("http://cyclonedx.org/schema/bom-1.6.schema.json", "")
    )
    assert found == []
    assert re.findall(r"[\"\s](?:/home|/root|/work|/opt|/tmp)/", text) == []


def test_a_missing_requirement_is_noticed(script: ModuleType, tmp_path: Path) -> None:
    without = [line for line in script.LOCK.read_text().splitlines() if not line.startswith(("scipy==", "rich=="))]
    script.LOCK = tmp_path / "lock.txt"
    script.LOCK.write_text("\n".join([*without, "rich==12.0"]))
    assert [line.partition(",")[0] for line in script.problems()] == [
        "lock.txt: rich: got 12.0",
        "lock.txt: scipy is missing",
    ]


def test_a_component_too_many_is_noticed(script: ModuleType, tmp_path: Path) -> None:
    bill = json.loads(script.BILL.read_text())
    bill["components"].append({"name": "leftpad", "version": "1.0"})
    script.BILL = tmp_path / "sbom.cdx.json"
    script.BILL.write_text(json.dumps(bill))
    assert script.problems() == ["sbom.cdx.json: leftpad: listed or needed, not both"]


def distribution(folder: Path, metadata: str, licence: str = "") -> Distribution:
    """An installed distribution with these lines of metadata and this licence file."""
    record = folder / "thing-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.4\nName: thing\nVersion: 1.0\n{metadata}")
    (record / "LICENSE").write_text(licence)
    (record / "RECORD").write_text(f"{record.name}/LICENSE,,\n")
    return Distribution.at(record)


@pytest.mark.parametrize(
    ("metadata", "text", "licence", "allowed"),
    [
        ("License-Expression: GPL-3.0-only\n", "", "GPL-3.0-only", False),
        ("License-Expression: MIT AND GPL-2.0-or-later\n", "", "MIT AND GPL-2.0-or-later", False),
        ("License-Expression: GPL-2.0-only OR MIT\n", "", "GPL-2.0-only OR MIT", True),
        ("License-Expression: (MIT OR GPL-2.0-only) AND BSD-3-Clause\n", "", None, True),
        ("License-Expression: Apache-2.0 WITH LLVM-exception\n", "", None, True),
        ("Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)\n", "", None, False),
        ("Classifier: License :: OSI Approved :: BSD License\n", "", "BSD", True),
        ("License: Apache License 2.0\n", "", "Apache-2.0", True),
        ("", "GNU GENERAL PUBLIC LICENSE\nVersion 3", "GPL", False),
        ("", "Permission is hereby granted, free\nof charge, to any person", "MIT", True),
        ("", "All rights reserved.", "unknown", False),
    ],
)
def test_a_licence_is_found_and_judged(
    script: ModuleType, tmp_path: Path, metadata: str, text: str, licence: str | None, allowed: bool
) -> None:
    found, source = script.licences.licence_of(distribution(tmp_path, metadata, text))
    assert licence is None or found == licence
    assert (script.refused([("thing", "1.0", found, source, "runtime")]) == []) is allowed


def test_terms_that_tests_may_use_are_refused_at_run_time(script: ModuleType) -> None:
    row = ("weights", "1.0", "LicenseRef-Gemma-Terms-of-Use", "its model card")
    assert script.refused([(*row, "dev")]) == []
    assert script.refused([(*row, "runtime")]) == ["weights 1.0: licence LicenseRef-Gemma-Terms-of-Use is not allowed"]


KNOWN: dict[str, Any] = {"name": "rich", "version": "15.0", "vulns": []}
SKIPPED = {"name": "rich", "skip_reason": "Dependency not found on PyPI and could not be audited: rich (15.0)"}


@pytest.mark.parametrize(
    ("dependencies", "code"),
    [
        ([KNOWN], 0),
        ([KNOWN | {"vulns": [{"id": "CVE-2026-1"}]}], 1),
        ([KNOWN, SKIPPED], 3),  # pip-audit itself says "No known vulnerabilities found" and exits with 0
        ([], 3),
        (None, 3),
    ],
)
def test_what_was_not_audited_is_not_called_clean(
    script: ModuleType, dependencies: list[dict[str, Any]] | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    output = "" if dependencies is None else json.dumps({"dependencies": dependencies})
    assert script.verdict(output, "ConnectionError: no such host") == code
    assert ("not measured" in capsys.readouterr().out) == (code == 3)
