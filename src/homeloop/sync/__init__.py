"""Locks, queues and events for any context and for plain threads."""
