"""pytest-asyncio (1.4 or newer) runs each test on homeloop's loop."""

import homeloop


def pytest_asyncio_loop_factories():
    return {"homeloop": homeloop.new_event_loop}
