"""Short reads in few threads: who gets what, and who waits for whom."""

import asyncio
import threading

import pytest
from sqlalchemy.exc import OperationalError

from server.api import reading
from server.api.reading import read, read_together


class Held:
    """Calls that wait until they are let go."""

    def __init__(self):
        self.go = threading.Event()
        self.begun = threading.Semaphore(0)

    def __call__(self):
        self.begun.release()
        assert self.go.wait(30)
        return "held"


def hold_every_thread():
    held = Held()
    waiting = [asyncio.ensure_future(read(held)) for _ in range(reading._THREADS)]
    return held, waiting


async def all_begun(held):
    for _ in range(reading._THREADS):
        assert await asyncio.to_thread(held.begun.acquire, timeout=30)


def test_everyone_gets_their_own_answer_or_error():
    def call(number, *, plus=0):
        if number % 3 == 0:
            raise ValueError(number)
        return number + plus

    async def main():
        asked = (read(call, number, plus=100) for number in range(40))
        return await asyncio.gather(*asked, return_exceptions=True)

    for number, answer in enumerate(asyncio.run(main())):
        if number % 3 == 0:
            assert isinstance(answer, ValueError)
            assert answer.args == (number,)
        else:
            assert answer == number + 100


def test_what_waits_for_the_same_call_is_read_in_one():
    calls = []

    def squares(keys):
        calls.append(sorted(keys))
        return {key: key * key for key in keys if key != 3}

    async def main():
        held, waiting = hold_every_thread()
        await all_begun(held)
        asked = [asyncio.ensure_future(read_together(squares, key)) for key in (1, 2, 3, 2)]
        other = asyncio.ensure_future(read(lambda: "alone"))
        await asyncio.sleep(0)
        held.go.set()
        return await asyncio.gather(*waiting), await asyncio.gather(*asked), await other

    held, answers, other = asyncio.run(main())
    assert held == ["held"] * reading._THREADS
    assert answers == [1, 4, None, 4]  # 3 is not there
    assert calls == [[1, 2, 3]]
    assert other == "alone"


def test_an_error_of_a_shared_call_is_everyones_and_of_nobody_else():
    def fail(keys):
        raise OperationalError("", {}, Exception("no database"))

    async def main():
        held, waiting = hold_every_thread()
        await all_begun(held)
        asked = [asyncio.ensure_future(read_together(fail, key)) for key in (1, 2)]
        fine = asyncio.ensure_future(read_together(lambda keys: dict.fromkeys(keys, "fine"), 1))
        await asyncio.sleep(0)
        held.go.set()
        await asyncio.gather(*waiting)
        return await asyncio.gather(*asked, return_exceptions=True), await fine

    errors, fine = asyncio.run(main())
    assert [str(error.orig) for error in errors] == ["no database"] * 2
    assert fine == "fine"


def test_who_no_longer_waits_takes_nothing_from_those_who_do():
    async def main():
        held, waiting = hold_every_thread()
        await all_begun(held)
        left = asyncio.ensure_future(read(lambda: "for nobody"))
        stays = asyncio.ensure_future(read(lambda: "for somebody"))
        await asyncio.sleep(0)
        left.cancel()
        held.go.set()
        await asyncio.gather(*waiting)
        return await asyncio.gather(left, stays, return_exceptions=True)

    left, stays = asyncio.run(main())
    assert isinstance(left, asyncio.CancelledError)
    assert stays == "for somebody"


def test_a_loop_that_has_ended_holds_up_no_other():
    held = Held()

    async def leave():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read(held), 0.01)

    async def stay():
        waiting = [asyncio.ensure_future(read(lambda: "here")) for _ in range(20)]
        held.go.set()
        return await asyncio.gather(*waiting)

    asyncio.run(leave())
    assert asyncio.run(stay()) == ["here"] * 20


def test_slow_reads_hold_up_others_for_a_moment_only(monkeypatch):
    monkeypatch.setattr(reading, "_LONG_S", 0.02)

    async def main():
        held, slow = hold_every_thread()
        await all_begun(held)
        # Nobody asks after this one: it is seen all the same that it waits.
        assert await asyncio.wait_for(read(lambda: "alone"), 30) == "alone"
        together = [read_together(lambda keys: dict.fromkeys(keys, "all"), key) for key in (1, 2)]
        assert await asyncio.wait_for(asyncio.gather(*together), 30) == ["all", "all"]
        assert not any(waiting.done() for waiting in slow)
        held.go.set()
        return await asyncio.gather(*slow)

    assert asyncio.run(main()) == ["held"] * reading._THREADS


def test_a_slow_read_holds_back_no_answer_that_is_there(monkeypatch):
    monkeypatch.setattr(reading, "_LONG_S", 3600.0)

    async def main():
        first, second = Held(), Held()
        slow = [asyncio.ensure_future(read(held)) for held in (first, second)]
        for held in (first, second):
            assert await asyncio.to_thread(held.begun.acquire, timeout=30)
        fast = asyncio.ensure_future(read(lambda: "fast"))
        third = Held()
        slow.append(asyncio.ensure_future(read(third)))
        await asyncio.sleep(0)
        first.go.set()
        assert await asyncio.wait_for(fast, 30) == "fast"
        for held in (second, third):
            held.go.set()
        return await asyncio.gather(*slow)

    assert asyncio.run(main()) == ["held"] * 3


def test_one_bad_key_is_an_error_for_who_asked_for_it_only():
    def some(keys):
        if 13 in keys:
            raise KeyError(13)
        return {key: f"job {key}" for key in keys}

    async def main():
        held, waiting = hold_every_thread()
        await all_begun(held)
        asked = [asyncio.ensure_future(read_together(some, key)) for key in (1, 13, 2)]
        await asyncio.sleep(0)
        held.go.set()
        await asyncio.gather(*waiting)
        return await asyncio.gather(*asked, return_exceptions=True)

    one, bad, two = asyncio.run(main())
    assert (one, two) == ("job 1", "job 2")
    assert isinstance(bad, KeyError)


def test_a_machine_without_threads_is_an_error_and_not_for_ever(monkeypatch):
    reader = reading._Reader()
    monkeypatch.setattr(reading, "_reader", reader)
    real, fails = reader._threads.submit, [True]

    def submit(work):
        if fails[0]:
            raise RuntimeError("can't start new thread")
        return real(work)

    monkeypatch.setattr(reader._threads, "submit", submit)

    async def main():
        for _ in range(reading._MOST_THREADS + 1):
            with pytest.raises(RuntimeError, match="new thread"):
                await read(lambda: "never")
        fails[0] = False
        return await asyncio.wait_for(read(lambda: "again"), 30)

    assert asyncio.run(main()) == "again"
    assert not reader._waiting


def test_an_error_that_no_future_takes_is_told_all_the_same():
    def stops():
        raise StopIteration

    async def main():
        with pytest.raises(RuntimeError, match="StopIteration"):
            await asyncio.wait_for(read(stops), 30)

    asyncio.run(main())


def test_nothing_is_read_for_who_has_left():
    made = []

    async def main():
        held, waiting = hold_every_thread()
        await all_begun(held)
        left = asyncio.ensure_future(read(lambda: made.append("left")))
        stays = asyncio.ensure_future(read(lambda: made.append("stays")))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0)
        held.go.set()
        await asyncio.gather(*waiting, stays)

    asyncio.run(main())
    assert made == ["stays"]
