"""The states of a connection; test_connection.py goes through them."""

from __future__ import annotations

from homeloop.nbd.life import NEXT, State


def test_every_state_leads_to_the_end_and_none_back() -> None:
    order = list(State)
    assert set(NEXT) == set(order)
    for state, following in NEXT.items():
        assert all(order.index(one) > order.index(state) for one in following)
        assert bool(following) == (state is not State.CLOSED)
