"""Every finding on a checkpoint that has the defect, and on none that has not; the commands it names mend it."""

import subprocess

import in_process
import pytest
from doctor.broken_checkpoints import (
    BROKEN,
    MENDED_ELSEWHERE,
    PLUGIN,
    STOCK,
    UNSUPPORTED_BY_STOCK,
    base_of,
    write_broken,
)

from vllm_gemma4q.doctor.diagnose import Verdict, diagnose
from vllm_gemma4q.doctor.engines import Device, parse_engine
from vllm_gemma4q.doctor.subject import open_subject

VERDICTS = {"error": Verdict.FAILS, "warning": Verdict.DEGRADED, "note": Verdict.LOADS}
GOOD = ("bf16-dense", "bf16-moe", "int8-dense", "int8-moe", "int8-text", "int8-fused", "int8-sharded",
        "compressed-tower", "fp8-dense", "fp8-moe", "fp8-channels", "exl3-dense", "exl3-moe")  # fmt: skip


def examine(folder, engine, base=None):
    return diagnose(open_subject(folder, base), parse_engine(engine, Device.CPU))


def found(diagnosis):
    return {(finding.code, finding.severity.value) for finding in diagnosis.findings}


@pytest.mark.parametrize("name", GOOD)
def test_sound_checkpoints_load(name, good):
    diagnosis = examine(good[name], PLUGIN, base_of(name))
    assert diagnosis.verdict is Verdict.LOADS, [finding.line for finding in diagnosis.findings]
    assert {finding.code for finding in diagnosis.findings} <= {
        "head-untied",
        "dead-rule" if name == "int8-text" else "",
    }


@pytest.mark.parametrize("name", GOOD)
def test_sound_checkpoints_without_the_plugin(name, good):
    diagnosis = examine(good[name], STOCK, base_of(name))
    assert diagnosis.verdict is (Verdict.FAILS if name in UNSUPPORTED_BY_STOCK else Verdict.LOADS), diagnosis.findings


@pytest.mark.parametrize(("name", "engine"), [(name, engine) for name, one in BROKEN.items() for engine in one.codes])
def test_a_defect_is_found(name, engine, good, tmp_path):
    code, severity = BROKEN[name].codes[engine]
    base = base_of(BROKEN[name].good)
    before = found(examine(good[BROKEN[name].good], engine, base))
    diagnosis = examine(write_broken(name, good, tmp_path), engine, base)
    assert (code, severity) in found(diagnosis) - before
    finding = next(finding for finding in diagnosis.findings if finding.code == code)
    assert finding.found and finding.expected and finding.reason
    assert finding.fix or severity == "note"
    assert "trust" not in finding.fix
    if BROKEN[name].good not in UNSUPPORTED_BY_STOCK or engine == PLUGIN:
        assert diagnosis.verdict is VERDICTS[max(severity, *(found for _, found in found(diagnosis)), key=_worst)]


def _worst(severity):
    return ["note", "warning", "error"].index(severity)


@pytest.mark.parametrize(
    "name", [name for name in BROKEN if PLUGIN in BROKEN[name].codes and name not in MENDED_ELSEWHERE]
)
def test_the_fix_mends_it(name, good, tmp_path):
    """Where it is `gemma4q restore`, `gemma4q quantize --scheme quark-int8`, `cp` or `rm`."""
    code, _ = BROKEN[name].codes[PLUGIN]
    base = base_of(BROKEN[name].good)
    broken = write_broken(name, good, tmp_path)
    finding = next(finding for finding in examine(broken, PLUGIN, base).findings if finding.code == code)
    words = finding.fix.split()
    if words[0] == "gemma4q":
        assert in_process.gemma4q(*words[1:]).returncode == 0
        mended = next(word for word in words if word.endswith(("-restored", "-again")))
    else:
        subprocess.run(words, check=True)
        mended = broken
    after = examine(mended if words[0] != "gemma4q" else tmp_path / mended.rpartition("/")[2], PLUGIN, base)
    assert code not in {finding.code for finding in after.findings}
    assert after.verdict is Verdict.LOADS, after.findings
