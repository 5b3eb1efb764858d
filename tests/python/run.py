"""pytest that tells "nothing ran" (77) from "everything passed" (0)."""

import sys

import pytest


class Count:
    passed = 0

    def pytest_runtest_logreport(self, report):
        self.passed += report.when == "call" and report.passed


def main():
    count = Count()
    status = pytest.main(["-q", "-rs", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[count])
    quiet = status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    return 77 if quiet and not count.passed else int(status)


if __name__ == "__main__":  # ranks that tests spawn import this file
    sys.exit(main())
