"""Read many damaged files: `python campaign.py FOLDER [--quick] [--seed N] [--times N] [--family NAME] [--case N]`.

Prints one line a family while it works, and at the end a JSON document: files, exit codes and seconds by family, and
every problem with the number that repeats it. Files are the same for the same seed, whatever is run beside them. Those
that made trouble are kept in FOLDER/problems.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# A thread more would have an arena and a stack of its own, and the limit is on the address space.
os.environ |= {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def main() -> int:
    """1 where any file made trouble."""
    from hostile.families import Family, all_families, quick_families

    options = _options()
    work, result = options.folder / "work", {}
    families: dict[str, Family] = (quick_families if options.quick else all_families)(options.folder / "seeds")
    for name, family in families.items():
        count = (family.quick if options.quick else family.files) * options.times
        if (options.family in (None, name)) and count:
            numbers = range(count) if options.case is None else [options.case]
            result[name] = _run(name, family, numbers, options, work)
            print(f"{name}: {json.dumps(result[name])}", file=sys.stderr, flush=True)
    shutil.rmtree(options.folder / "seeds")
    print(json.dumps({"seed": options.seed, "families": result}))
    return any(found["problems"] for found in result.values())


def _run(name: str, family: Any, numbers: Any, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    from hostile.sandbox import run_all

    started, codes, problems = time.perf_counter(), Counter(), []
    for outcome in run_all(list(_cases(name, family, numbers, options.seed)), work):
        codes[str(outcome.code)] += 1
        if outcome.problem:
            problems.append([outcome.number, outcome.problem])
            kept = options.folder / "problems" / f"{name.replace(' ', '-').replace(':', '')}-{outcome.number}"
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir(parents=True)
            next(_cases(name, family, [outcome.number], options.seed)).write(kept)
    seconds = round(time.perf_counter() - started, 2)
    return {"files": len(numbers), "seconds": seconds, "codes": dict(codes), "problems": problems}


def _cases(name: str, family: Any, numbers: Any, seed: int) -> Iterator[Any]:
    from hostile.sandbox import Case

    for number in numbers:

        def write(folder: Path, number: int = number) -> None:
            family.write(Random(f"{seed} {name} {number}"), folder)

        yield Case(number, write, family.readers[number % len(family.readers)])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of them, of the readers that need no large library"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", type=int, default=1, help="that many times as many files")
    parser.add_argument("--family")
    parser.add_argument("--case", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
