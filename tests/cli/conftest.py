import sys

import pytest

from hydraspec.cli.main import run


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command line with these words: exit code, standard output, standard error."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hydraspec", *map(str, words)])
        try:
            run()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    return call


def assert_refused(result: tuple[int, str, str], message: str) -> None:
    """One line on standard error that says this, and exit code 2."""
    code, _, err = result
    assert code == 2
    assert err.startswith("hydraspec: ")
    assert err.count("\n") == 1
    assert message in err
