"""`parties`: every test that takes it runs over all kinds of loops and threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.sync import parties as kinds


@pytest.fixture(params=kinds.CASES)
def parties(request: pytest.FixtureRequest) -> Iterator[kinds.Parties]:
    with kinds.parties(request.param) as found:
        yield found
