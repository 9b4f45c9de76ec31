"""What the tests of the nbd layer share."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.nbd.certificates import Certificates, make_certificates

# A deadline measures the machine: others may be using it. pytest-timeout bounds each test as a whole.
settings.register_profile("homeloop", deadline=None)
settings.load_profile("homeloop")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """The tests that use it are foreign("openssl")."""
    return make_certificates(tmp_path_factory.mktemp("tls"))
