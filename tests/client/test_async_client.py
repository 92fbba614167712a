"""The asyncio client, against the same small daemon."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from taskd.client import ApiError, AsyncClient, AsyncHandle, ConnectionLost, NoDaemon, TaskFailed
from tests.client.fake_daemon import FakeDaemon, no_descriptors, silent_daemon


@pytest.fixture
async def client(daemon: FakeDaemon) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(daemon.path) as client:
        yield client


async def test_a_handler_returns_what_it_got(client: AsyncClient, daemon: FakeDaemon) -> None:
    handle = await client.submit("echo", value=[1, "ü"])
    assert await handle == [1, "ü"]
    assert await handle.result() == [1, "ü"]
    assert await handle.state() == "succeeded"
    assert await handle.done()
    with pytest.raises(TaskFailed, match="no luck"):
        await (await client.with_options(priority=3).submit("fail"))
    assert [task["asked"].get("priority") for task in daemon.tasks.values()] == [None, 3]


async def test_commands_and_services(client: AsyncClient) -> None:
    handle = await client.submit_command(["print", "hi", "oh"], name="greet")
    assert await handle.output() == b"hi\n"
    assert [(part.stream, part.data) async for part in handle.follow()] == [("stdout", b"hi\n"), ("stderr", b"oh\n")]
    assert (await handle.info()).name == "greet"
    error = await (await client.submit_command("exit 7")).exception()
    assert isinstance(error, TaskFailed)
    assert error.exit_code == 7
    called = await client.submit_http("http://localhost/sum", {"a": 1})
    assert (await called.info()).params == {"a": 1}
    assert (await called.explain()).reason == "Resources"


async def test_waiting_has_an_end(client: AsyncClient, daemon: FakeDaemon) -> None:
    handle = await client.submit("hold")
    with pytest.raises(TimeoutError):
        await handle.result(timeout=0.01)
    assert not await handle.wait(timeout=0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await handle.result()
    assert await handle.cancel()
    assert (await handle.outcome()).state == "cancelled"
    assert (await (await handle.retry()).info()).state == "running"


@pytest.mark.parametrize("timeout", [0, 1e-6, -1])
async def test_a_poll_finds_what_has_ended(client: AsyncClient, timeout: float) -> None:
    assert await (await client.submit("echo", value=1)).result(timeout=timeout) == 1
    assert await (await client.submit("echo")).wait(timeout)
    ended, held = await client.submit("echo"), await client.submit("hold")
    assert await client.wait([held, ended], timeout) == ([ended], [held])
    with pytest.raises(TimeoutError):
        await held.result(timeout)


@pytest.mark.parametrize("timeout", [math.inf, 1e10, 1e300])
async def test_a_wait_may_be_very_long(client: AsyncClient, daemon: FakeDaemon, timeout: float) -> None:
    held = await client.submit("hold")
    values = client.map("echo", [{"value": value} for value in range(5000)], timeout=timeout)
    assert [value async for value in values] == list(range(5000))
    await asyncio.to_thread(daemon.release, "late")
    assert await held.result(timeout=timeout) == "late"


async def test_no_number_is_no_timeout(client: AsyncClient, daemon: FakeDaemon) -> None:
    held = await client.submit("hold")
    with pytest.raises(ValueError, match="not a number of seconds"):
        await held.result(math.nan)
    with pytest.raises(ValueError, match="not a number of seconds"):
        await anext(client.map("echo", [{}], timeout=math.nan))
    assert daemon.requests == ["POST /v1/tasks"]


async def test_a_wait_ends_in_time_where_nobody_leads(client: AsyncClient, daemon: FakeDaemon) -> None:
    handle = await client.submit("hold")
    daemon.refuse("/v1/tasks/wait", 503, "no_leader", times=1000)
    async with AsyncClient(daemon.path, patience=math.inf) as patient:
        with pytest.raises(TimeoutError, match="in time"):
            await AsyncHandle(patient, handle.id).result(timeout=0.1)


async def test_a_wait_ends_in_time_where_the_daemon_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskd.client.call.ANSWER_S", 0.01)
    with silent_daemon(tmp_path / "silent.sock"):
        async with AsyncClient(tmp_path / "silent.sock") as client:
            with pytest.raises(TimeoutError, match="in time"):
                await AsyncHandle(client, "1").result(timeout=0.05)


async def test_map_keeps_the_order_and_bounds_what_is_outside(client: AsyncClient, daemon: FakeDaemon) -> None:
    taken = 0

    def params() -> Iterator[dict[str, int]]:
        nonlocal taken
        for value in range(20_000):
            taken += 1
            yield {"value": value}

    place = 0
    async for value in client.map("echo", params()):
        assert value == place
        assert taken - place <= 22_001
        place += 1
    assert place == 20_000


async def test_map_as_completed(client: AsyncClient, daemon: FakeDaemon) -> None:
    found = [value async for value in client.map("echo", [{"value": value} for value in range(5000)], ordered=False)]
    assert sorted(found) == list(range(5000))
    errors = [error async for error in client.map("fail", [{}], return_exceptions=True)]
    assert isinstance(errors[0], TaskFailed)
    with pytest.raises(TaskFailed):
        async for _ in client.map("fail", [{}]):
            pass


async def test_map_can_be_left_and_goes_on_after_a_break(client: AsyncClient, daemon: FakeDaemon) -> None:
    async with aclosing(client.map("hold", [{}, {}], ordered=False)) as results:
        reading = asyncio.ensure_future(anext(results))
        await asyncio.to_thread(daemon.wait_for, lambda: len(daemon.tasks) == 2)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    daemon.break_stream(0, 3, 0)
    assert [value async for value in client.map("echo", [{"value": n} for n in range(10)])] == list(range(10))
    assert len(daemon.tasks) == 12


async def test_map_waits_where_the_daemon_is_full(client: AsyncClient, daemon: FakeDaemon) -> None:
    daemon.refuse("/v1/tasks", 429, "overloaded", times=2)
    assert len([value async for value in client.map("echo", [{}] * 5000)]) == 5000
    daemon.refuse("/v1/tasks", 429, "overloaded")
    async with AsyncClient(daemon.path, patience=0) as impatient:
        with pytest.raises(ApiError):
            async for _ in impatient.map("echo", [{}]):
                pass


async def test_map_has_a_deadline(client: AsyncClient) -> None:
    with pytest.raises(TimeoutError):
        async for _ in client.map("hold", [{}], timeout=0.05):
            pass


async def test_wait_and_as_completed(client: AsyncClient, daemon: FakeDaemon) -> None:
    handles = await client.submit_many("echo", [{"value": value} for value in range(2500)])
    held = await client.submit("hold")
    assert await client.wait(handles) == (handles, [])
    done, pending = await client.wait([held, *handles], timeout=0.01)
    assert (done, pending) == (handles, [held])
    assert await client.cancel([held]) == 1
    assert [handle async for handle in client.as_completed([held, handles[0]])] == [handles[0], held]


async def test_looking_around(client: AsyncClient) -> None:
    await client.submit_many("echo", [{}] * 1100)
    assert len([task async for task in client.tasks(states=["finished"])]) == 1100
    assert (await client.cluster()).leader_name == "head"
    assert [node.name for node in await client.nodes()] == ["head", "arm"]
    assert (await client.handlers())[0].type == "echo"
    assert (await (await client.handle("last")).info()).is_finished
    with pytest.raises(ApiError, match="there is no task"):
        await client.handle("ffffffff")


async def test_a_task_that_does_not_exist_is_not_waited_for(client: AsyncClient, daemon: FakeDaemon) -> None:
    handle = await client.submit("hold")
    daemon.tasks.clear()
    with pytest.raises(ApiError, match="there is no task"):
        await handle.result()


async def test_one_connection_serves_calls_one_after_the_other(client: AsyncClient, daemon: FakeDaemon) -> None:
    for value in range(20):
        assert await (await client.submit("echo", value=value)) == value
    assert daemon.connections == 1
    await asyncio.gather(*(client.submit("echo") for _ in range(20)))
    assert daemon.connections > 1


async def test_concurrent_calls_take_turns(client: AsyncClient, daemon: FakeDaemon) -> None:
    handles = await asyncio.gather(*(client.submit("echo", value=value) for value in range(300)))
    assert len({handle.id for handle in handles}) == len(daemon.tasks) == 300
    assert daemon.connections <= 32


async def test_calls_that_are_cancelled_give_their_turns_back(client: AsyncClient, daemon: FakeDaemon) -> None:
    await client.cluster()
    calls = [asyncio.ensure_future(client.cluster()) for _ in range(100)]
    for _ in range(3):
        await asyncio.sleep(0)  # Some have begun, some wait.
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await asyncio.gather(*(client.cluster() for _ in range(40)))


async def test_streams_keep_no_calls_out(client: AsyncClient, daemon: FakeDaemon) -> None:
    held = [await client.submit("hold") for _ in range(40)]
    waits = [asyncio.ensure_future(handle.result()) for handle in held]
    await asyncio.to_thread(daemon.wait_for, lambda: daemon.requests.count("POST /v1/tasks/wait") == 40)
    assert (await client.cluster()).health == "ok"
    await asyncio.to_thread(daemon.release, 1)
    assert await asyncio.gather(*waits) == [1] * 40


async def test_a_lack_of_descriptors_is_no_lack_of_a_daemon(client: AsyncClient, daemon: FakeDaemon) -> None:
    waiting = asyncio.ensure_future((await client.submit("hold")).result())  # On the connection that was kept.
    await asyncio.to_thread(daemon.wait_for, lambda: "POST /v1/tasks/wait" in daemon.requests)
    with no_descriptors(), pytest.raises(OSError, match="too many files open to connect"):
        await client.cluster()
    await asyncio.to_thread(daemon.release, 1)
    assert await waiting == 1


async def test_a_restart_of_the_daemon_goes_unnoticed(client: AsyncClient, daemon: FakeDaemon) -> None:
    handle = await client.submit("hold")
    waiting = asyncio.ensure_future(handle.result())
    await asyncio.to_thread(daemon.wait_for, lambda: "POST /v1/tasks/wait" in daemon.requests)
    await asyncio.to_thread(daemon.stop)
    submitting = asyncio.ensure_future(client.submit("echo", value=1))
    await asyncio.sleep(0)
    await asyncio.to_thread(daemon.start)
    assert await (await submitting) == 1
    daemon.release("kept")
    assert await waiting == "kept"


async def test_without_patience_trouble_is_told_at_once(daemon: FakeDaemon) -> None:
    async with AsyncClient(daemon.path, patience=0) as client:
        handle = await client.submit("hold")
        daemon.break_stream(0)
        with pytest.raises(ConnectionLost):
            await handle.result()
        await asyncio.to_thread(daemon.stop)
        with pytest.raises(NoDaemon):
            await client.submit("echo")
    with pytest.raises(ValueError, match="closed"):
        await client.submit("echo")


async def test_who_reads_while_the_client_is_closed_is_told(client: AsyncClient, daemon: FakeDaemon) -> None:
    follow = (await client.submit_command("hold")).follow()
    await asyncio.to_thread(daemon.write, "one")
    assert (await anext(follow)).data == b"one"
    reading = asyncio.ensure_future(anext(follow))
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(ValueError, match="the client is closed"):
        await reading


async def test_no_daemon_is_said_at_once(tmp_path: Path) -> None:
    async with AsyncClient(tmp_path / "none.sock") as client:
        with pytest.raises(NoDaemon, match="taskd start"):
            await client.submit("echo")
