"""One zygote for all tests of a session, and the small job that most of them disturb."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.jobs import Job, Zygote, make_job


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture
def job(zygote: Zygote, tmp_path: Path) -> Job:
    return make_job(zygote, tmp_path)


@pytest.fixture(scope="session")
def whole(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The same job, never disturbed."""
    job = make_job(zygote, tmp_path_factory.mktemp("whole"))
    assert job.run() == 0, job.said()
    return job
