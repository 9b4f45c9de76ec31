"""Fixtures of the command's tests, for those that need a whole daemon."""

from __future__ import annotations

from tests.cli.conftest import start

__all__ = ["start"]
