"""What users need to test code that is built on homeloop: a clock that jumps, a forced order, leaks, lost wakes,
deadlocks, the contract of a driver.

docs/testing.md has an example of each.
"""

from homeloop.sync.waiting import deadlocks_refused
from homeloop.testing.drivers import DriverReport, check_driver
from homeloop.testing.jumping import JumpingLoop, run_jumping
from homeloop.testing.leaks import leak_check
from homeloop.testing.sequencer import Sequencer
from homeloop.testing.snapshots import snapshot
from homeloop.testing.soak import SoakReport, lost_wake_soak

__all__ = [
    "DriverReport",
    "JumpingLoop",
    "Sequencer",
    "SoakReport",
    "check_driver",
    "deadlocks_refused",
    "leak_check",
    "lost_wake_soak",
    "run_jumping",
    "snapshot",
]
