"""The suites that `make peers` runs: which version of whom, how, and for how long at most."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """The tests of one peer, from its source distribution.

    What they need is in requirements/NAME.txt, each with its version; what must fail on our loop, in
    expected/NAME.txt.
    """

    name: str
    version: str
    package: str = ""           # its code, in the root of the source distribution: would hide the installed one
    arguments: tuple[str, ...] = ()
    select: str = ""            # pytest's -k: what can be told by name
    at_least: int = 1           # so many tests pass, give or take what a machine cannot: else something is left out
    limit_s: int = 900          # for one run; then it is ended, and what did not run is named
    without_tests: str = ""     # why there is nothing to run; an error if the distribution has tests after all


# Their own pytest options ask for plugins that change nothing here (coverage, xdist, benchmarks); these replace them.
OPTIONS = ("-o", "addopts=", "-p", "no:cacheprovider", "-q", "-ra", "--tb=short", "--timeout=60")

SUITES = [
    Suite(
        name="anyio", version="4.16.0",
        arguments=("-p", "anyio", "-p", "no:asyncio"),
        select="not trio and not uvloop",
        at_least=1_000,
    ),
    Suite(
        name="uvicorn", version="0.54.0", package="uvicorn",
        arguments=("--ignore=tests/benchmarks",),
        at_least=1_200,
    ),
    Suite(
        name="aiohttp", version="3.14.5", package="aiohttp",
        # The marks as its own options have it. fast: no garbage collection after each of 5,600 tests, 10 minutes less.
        arguments=("-m", "not dev_mode and not autobahn and not internal", "--aiohttp-fast"),
        select="not test_benchmarks",
        at_least=5_000,
    ),
    Suite(
        name="websockets", version="17.4",
        without_tests="its source distributions leave the tests out (MANIFEST.in: prune tests); its client and server "
                      "run on our loop in uvicorn's suite",
    ),
]
