"""The pytest plugin of homeloop: `nbd_server`, `nbd_device` and `faults`. docs/faults.md shows them.

pytest loads this in every run of an environment that has homeloop. So it stands beside the package: nothing of that is
imported before a test asks for one of the fixtures, and nothing is started before it uses it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from homeloop.block.faults import Faults
    from homeloop.testing.nbd_serving import NbdServing, ServedDevice

__all__ = ["faults", "nbd_device", "nbd_server"]


@pytest.fixture
def nbd_server() -> Iterator[NbdServing]:
    """nbd_server(device_or_driver) serves it over NBD until the test ends, and returns its URI."""
    with importlib.import_module("homeloop.testing.nbd_serving").NbdServing() as serving:
        yield serving


@pytest.fixture
def nbd_device(nbd_server: NbdServing) -> Callable[..., ServedDevice]:
    """nbd_device("64M") serves so much memory with faults of its own; see ServedDevice."""
    return nbd_server.device


@pytest.fixture
def faults(nbd_server: NbdServing) -> Iterator[Faults]:
    """Faults for one test; at its end all that stalls is let go, before the server ends."""
    made: Any = importlib.import_module("homeloop.block.faults").Faults()
    yield made
    made.clear()
