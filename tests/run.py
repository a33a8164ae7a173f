"Runs every test under pytest, two at a time, and ends with the one line `N passed, N failed[, N skipped]`."

import os
import sys
from pathlib import Path

import pytest


class Counts:
    "Counts outcomes; a failed set-up or tear-down is a failure, and reasons of skips are kept."

    def __init__(self):
        self.passed = set()
        self.failed = set()
        self.skipped = {}

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.skipped:
            self.skipped[report.nodeid] = (
                report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            )
        elif report.when == "call":
            self.passed.add(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)


def main(args):
    here = Path(__file__).parent
    os.chdir(here.parent)
    counts = Counts()
    code = pytest.main(
        [
            "-q",
            "-n",
            "2",
            "--dist",
            "loadgroup",
            "--no-loadscope-reorder",
            "--durations",
            "8",
            "-p",
            "no:cacheprovider",
            *(args or [str(here)]),
        ],
        plugins=[counts],
    )
    passed = counts.passed - counts.failed
    for test, reason in counts.skipped.items():
        print(f"skipped {test}: {reason}")
    print(
        f"{len(passed)} passed, {len(counts.failed)} failed"
        + (f", {len(counts.skipped)} skipped" if counts.skipped else "")
    )
    in_ci = os.environ.get("CI", "").lower() in ("1", "true")
    if in_ci and counts.skipped:
        print("in CI a skip is a failure", file=sys.stderr)
    broken = counts.failed or not passed or int(code) not in (0, 1, 5) or (in_ci and counts.skipped)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
