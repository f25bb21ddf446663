"""The cache behind the caches: bounded by size, the least recently used out first, whole in several threads."""

from __future__ import annotations

import threading

from xclip_fast.recent import Recent


def test_the_least_recently_used_goes_first() -> None:
    recent: Recent[str, int] = Recent(2)
    for key in "ab":
        recent.put(key, ord(key))
    assert recent.get("a") == ord("a")
    recent.put("c", 3)
    assert [recent.get(key) for key in "abc"] == [ord("a"), None, 3]


def test_sizes_bound_it_and_what_is_too_large_pushes_nothing_out() -> None:
    recent: Recent[str, bytes] = Recent(10, len)
    recent.put("a", bytes(4))
    recent.put("b", bytes(6))
    recent.put("large", bytes(11))
    assert (recent.get("large"), recent.taken) == (None, 10)
    recent.put("c", bytes(1))
    assert (recent.get("a"), recent.taken) == (None, 7)
    recent.put("d", bytes(10))
    assert (recent.get("b"), recent.get("c"), recent.taken) == (None, None, 10)


def test_a_new_value_takes_the_place_of_an_old_one() -> None:
    recent: Recent[str, bytes] = Recent(10, len)
    for size in (9, 3, 10):
        recent.put("a", bytes(size))
        assert (recent.get("a"), recent.taken) == (bytes(size), size)


def test_no_room_keeps_nothing() -> None:
    recent: Recent[str, int] = Recent(0)
    recent.put("a", 1)
    assert (recent.get("a"), recent.taken) == (None, 0)


def test_threads_keep_the_sum() -> None:
    recent: Recent[int, bytes] = Recent(50, len)

    def work(seed: int) -> None:
        for step in range(2000):
            recent.put((seed * 7 + step) % 13, bytes(step % 17))
            recent.get(step % 13)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert recent.taken == sum(len(recent.get(key) or b"") for key in range(13)) <= 50
