"""Short reads in few threads: who gets what, and who waits for whom."""

import asyncio
import threading

import pytest

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
        raise OSError("no database")

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
    assert [str(error) for error in errors] == ["no database"] * 2
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
    monkeypatch.setattr(reading, "_LONG_S", 0.05)

    async def main():
        held, slow = hold_every_thread()
        await all_begun(held)
        first = asyncio.ensure_future(read(lambda: "first"))
        await asyncio.sleep(0.06)
        assert not first.done()  # nobody has looked again
        assert await asyncio.wait_for(read(lambda: "second"), 30) == "second"
        assert await asyncio.wait_for(first, 30) == "first"
        assert not any(waiting.done() for waiting in slow)
        held.go.set()
        return await asyncio.gather(*slow)

    assert asyncio.run(main()) == ["held"] * reading._THREADS
