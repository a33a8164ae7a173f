"""Run every test under pytest, two at a time, and end with the line `N passed, N failed[, N skipped]`.

Arguments go to pytest: `python tests/run.py tests/test_rules.py -k bots`. In CI a skip is a failure.
"""

import os
import sys
import threading
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EVERY_S = 15.0  # seconds between two lines of progress


class Progress:
    "Count outcomes, and print how far the run is and which tests are slow."

    def __init__(self):
        self.passed = set()
        self.failed = set()
        self.skipped = {}  # test -> reason
        self.started = {}  # running test -> time of its start
        self.total = 0
        self.begun = time.monotonic()
        self.ended = threading.Event()

    def pytest_report_teststatus(self, report):
        "Print no letter for a test that did not fail; the lines of progress stand for them."
        if report.when == "call" and not report.failed:
            return report.outcome, "", report.outcome.upper()
        return None

    def pytest_xdist_node_collection_finished(self, node, ids):
        self.total = len(ids)

    def pytest_collection_finish(self, session):
        self.total = self.total or len(session.items)

    def pytest_runtest_logstart(self, nodeid, location):
        self.started[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid, location):
        self.started.pop(nodeid, None)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)  # a failed set-up or tear-down is a failure
        elif report.skipped:
            reason = report.longrepr
            self.skipped[report.nodeid] = reason[2] if isinstance(reason, tuple) else str(reason)
        elif report.when == "call":
            self.passed.add(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)

    def line(self):
        "Return one line: tests done of all, failures, seconds, and the tests that run now with their seconds."
        now = time.monotonic()
        done = len(self.passed | self.failed | set(self.skipped))
        slow = sorted(((now - begun, name) for name, begun in list(self.started.items())), reverse=True)
        running = ", ".join(f"{name.rpartition('/')[2]} ({seconds:.0f} s)" for seconds, name in slow)
        return f"{done} of {self.total} tests, {len(self.failed)} failed, {now - self.begun:.0f} s; running: {running}"

    def show(self):
        while not self.ended.wait(EVERY_S):
            if self.total:
                print(self.line(), flush=True)


def main(arguments):
    os.chdir(HERE.parent)
    progress = Progress()
    options = ["-q", "-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder", "--durations", "8"]
    shown = threading.Thread(target=progress.show, daemon=True)
    shown.start()
    code = pytest.main([*options, "-p", "no:cacheprovider", *(arguments or [str(HERE)])], plugins=[progress])
    progress.ended.set()

    for test, reason in progress.skipped.items():
        print(f"skipped {test}: {reason}")
    passed = progress.passed - progress.failed
    skipped = f", {len(progress.skipped)} skipped" if progress.skipped else ""
    print(f"{len(passed)} passed, {len(progress.failed)} failed{skipped}")

    in_ci = os.environ.get("CI", "").lower() in ("1", "true")
    if in_ci and progress.skipped:
        print("in CI a skip is a failure", file=sys.stderr)
    broken = progress.failed or not passed or int(code) not in (0, 1, 5) or (in_ci and progress.skipped)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
