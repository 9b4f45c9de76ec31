"""The runtime: contexts with a home, the big lock, coroutines that any thread may wake.

Nothing here has a run-time dependency, and only `core.loop` touches asyncio's private parts.
"""
