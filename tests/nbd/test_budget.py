"""What all clients may occupy together: nobody waits within the total, and beyond it who has more than its share."""

from __future__ import annotations

import random
import threading

import pytest

from homeloop.nbd.budget import Account, Budget


def test_small_holders_are_not_counted() -> None:
    budget = Budget(100, free_bytes=10)
    accounts = [Account(budget) for _ in range(50)]
    assert not any(account.is_over(10) for account in accounts)
    assert budget.held_bytes == 0


def test_beyond_the_total_who_has_more_than_its_share_waits() -> None:
    budget = Budget(100, free_bytes=10)
    greedy, modest = Account(budget), Account(budget)
    assert not greedy.is_over(100)          # alone it may have all
    assert modest.is_over(20)               # 120 in all
    assert not modest.is_over(10)           # that is free
    assert modest.is_over(20)
    assert greedy.is_over(75)               # 95 in all, and its share is 50
    assert not greedy.is_over(50)
    assert not modest.is_over(40)
    assert modest.is_over(60)
    assert not greedy.is_over(5)
    assert not modest.is_over(100)          # alone again


@pytest.mark.parametrize("threads", [4])
def test_the_sum_is_right_whoever_changes_it(threads: int, seed: int) -> None:
    budget = Budget(1 << 20, free_bytes=16)

    def change(number: int) -> None:
        chance, account = random.Random(seed + number), Account(budget)
        for _ in range(2000):
            account.is_over(chance.randrange(1 << 12))
        account.is_over(0)

    running = [threading.Thread(target=change, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert budget.held_bytes == 0
    assert not Account(budget).is_over(1 << 20)
