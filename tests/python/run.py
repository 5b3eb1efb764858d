"""pytest that tells "nothing ran" (77) from "everything passed" (0)."""

import sys

import pytest


class Count:
    passed = 0

    def pytest_runtest_logreport(self, report):
        self.passed += report.when == "call" and report.passed


count = Count()
status = pytest.main(["-q", "-rs", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[count])
nothing = status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) and not count.passed
sys.exit(77 if nothing else int(status))
