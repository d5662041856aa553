import os

import pytest

from hydraspec.cli.loading import count_cores


@pytest.mark.parametrize(("text", "cores"), [("150000 100000", 1), ("100 100000", 1), ("max 100000", None), ("", None)])
def test_a_containers_quota_limits_the_threads(tmp_path, text, cores):
    file = tmp_path / "cpu.max"
    file.write_text(text)
    assert count_cores(file) == (cores or len(os.sched_getaffinity(0)))


def test_without_a_quota_all_cores_are_used(tmp_path):
    assert count_cores(tmp_path / "missing") == len(os.sched_getaffinity(0))
