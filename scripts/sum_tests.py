"""Print one summary line in pytest's form for several runs: scripts/sum_tests.py OUTPUT OUTPUT ...

Each file holds the output of one run. Exits with 1 if a run printed no summary (it broke off), or reports a failure.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_SUMMARY = re.compile(r"^=* ?(\d+ [a-z ]+(?:, \d+ [a-z ]+)*) in ([\d.]+)s(?: \([\d:, days]+\))? ?=*$")
_ORDER = ("failed", "passed", "skipped", "deselected", "xfailed", "xpassed", "warnings", "errors")
_ONE = {"warnings": "warning", "errors": "error"}
_MANY = {one: many for many, one in _ONE.items()}


def read(text: str) -> tuple[Counter[str], float] | None:
    """Return the counts and the seconds of the last summary in a run's output; None if there is no summary."""
    lines = [_COLOUR.sub("", line).strip() for line in text.splitlines()]
    found = [match for line in lines if (match := _SUMMARY.match(line))]
    if not found:
        return None
    counts: Counter[str] = Counter()
    for part in found[-1][1].split(", "):
        number, word = part.split(maxsplit=1)
        counts[_MANY.get(word, word)] += int(number)
    return counts, float(found[-1][2])


def main(paths: list[str]) -> int:
    """Print the summary line; return 1 if a run failed or broke off, or none passed."""
    counts: Counter[str] = Counter()
    seconds, broken = 0.0, False
    for path in paths:
        run = read(Path(path).read_text(errors="replace"))
        if run is None:
            print(f"{path}: the run printed no summary: it broke off", file=sys.stderr)
            counts["errors"] += 1
            broken = True
            continue
        counts += run[0]
        seconds += run[1]
    counts.pop("deselected", None)  # tests left out of one run are in another
    named = ((counts[word], word) for word in _ORDER if counts[word])
    words = ", ".join(f"{count} {_ONE.get(word, word) if count == 1 else word}" for count, word in named)
    print(f"==== {words or 'no tests ran'} in {seconds:.2f}s ====")
    return int(broken or bool(counts["failed"] or counts["errors"]) or not counts["passed"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
