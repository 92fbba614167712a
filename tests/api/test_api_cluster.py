"""Nodes, the cluster, events, and what a node tells of itself."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import msgspec
import pytest

from taskd.api.cluster_types import EVENT_KINDS, EventView
from taskd.version import VERSION
from tests.api.fakes import ALICE, NOW_S, ROOT, FakeService, node_view


async def test_nodes(service: FakeService) -> None:
    status, answer = await service.ask("GET", "/v1/nodes")
    assert (status, [node["name"] for node in answer["nodes"]]) == (200, ["head", "worker-a"])
    for name in ("8", "worker-a"):
        status, node = await service.ask("GET", f"/v1/nodes/{name}")
        assert (status, node["node_id"], node["capacity"]) == (200, 8, {"cpus": 2.0})
    status, answer = await service.ask("GET", "/v1/nodes/9")
    assert (status, answer["error"]["code"]) == (404, "not_found")


async def test_nodes_of_one_name(service: FakeService) -> None:
    service.node_views.append(node_view(12, "worker-a"))
    status, answer = await service.ask("GET", "/v1/nodes/worker-a")
    assert (status, answer["error"]["code"]) == (409, "ambiguous")
    assert "8, 12" in answer["error"]["message"]
    assert (await service.ask("GET", "/v1/nodes/12"))[0] == 200


@pytest.mark.parametrize(("body", "reason"), [(None, ""), ({}, ""), ({"reason": "kernel update"}, "kernel update")])
async def test_drain_and_resume(service: FakeService, body: object, reason: str) -> None:
    status, node = await service.ask("POST", "/v1/nodes/worker-a/drain", body, ROOT)
    assert (status, node["state"], node["drain_reason"]) == (200, "drained", reason)
    status, node = await service.ask("POST", "/v1/nodes/8/resume", None, ROOT)
    assert (status, node["state"], node["drain_reason"]) == (200, "up", "")


async def test_drains_that_are_refused(service: FakeService) -> None:
    for what in ("drain", "resume"):
        assert (await service.ask("POST", f"/v1/nodes/8/{what}", {}, ALICE))[0] == 403
        assert (await service.ask("POST", f"/v1/nodes/9/{what}", {}, ROOT))[0] == 404
        assert (await service.ask("POST", f"/v1/nodes/7/{what}", {}, ROOT))[0] == 404
    assert (await service.ask("POST", "/v1/nodes/8/drain", {"why": "x"}, ROOT))[0] == 400
    assert service.nodes_by_id[8].state == "up"


async def test_the_cluster_and_its_handlers(service: FakeService) -> None:
    status, answer = await service.ask("GET", "/v1/cluster")
    assert (status, answer["leader_name"], answer["health"]) == (200, "head", "ok")
    status, answer = await service.ask("GET", "/v1/handlers")
    assert status == 200
    assert answer["handlers"] == [
        {
            "type": "resize",
            "summary": "Resize an image.",
            "version": "1",
            "schema": {"type": "object"},
            "nodes": [8],
            "retries": 0,
            "timeout": 0.0,
        }
    ]


async def test_what_a_node_tells_of_itself(service: FakeService) -> None:
    assert await service.ask("GET", "/healthz") == (200, {"status": "ok"})
    assert await service.ask("GET", "/readyz") == (200, {"ready": True, "why": ""})
    service.is_ready = False
    assert await service.ask("GET", "/readyz") == (503, {"ready": False, "why": "no leader is known"})
    assert await service.ask("GET", "/metrics") == (200, "taskd_is_leader 1\n")
    status, answer = await service.ask("GET", "/")
    assert (status, answer["version"], answer["openapi"]) == (200, VERSION, "/openapi.json")


# -- Events ------------------------------------------------------------------------------------------------------------


async def events_of(service: FakeService, target: str, *sent: EventView) -> list[tuple[str, EventView]]:
    """What a stream passes on of these events: each by its name."""
    response = await service.response("GET", target)
    assert (response.status, response.content_type) == (200, "text/event-stream")
    assert response.stream is not None
    for event in (*sent, None):
        service.event_queue.put_nowait(event)
    text = b"".join([part async for part in response.stream]).decode()
    blocks = text.removesuffix("\n\n").split("\n\n")
    assert blocks[0].startswith("retry: ")
    found = []
    for block in blocks[1:]:
        name, data = block.splitlines()
        found.append((name.removeprefix("event: "), msgspec.json.decode(data.removeprefix("data: "), type=EventView)))
    assert service.open_streams == 0
    return found


async def test_events(service: FakeService) -> None:
    queued = EventView("task.queued", NOW_S, "one")
    lost = EventView("node.lost", NOW_S, node_id=8, detail="two\nlines")
    assert await events_of(service, "/v1/events", queued, lost) == [("task.queued", queued), ("node.lost", lost)]


async def test_events_of_some_kinds_and_tasks(service: FakeService) -> None:
    one, two = await service.add(), await service.add()
    sent = [
        EventView("task.running", NOW_S, one), EventView("task.failed", NOW_S, two), EventView("node.up", NOW_S),
        EventView("leader.changed", NOW_S),
    ]  # fmt: skip
    for query, expected in [
        ("kind=task", sent[:2]),
        ("kind=task.failed,node", sent[1:3]),
        (f"task={one[-6:]}", sent[:1]),
        (f"task={one},{two}&kind=task.failed", sent[1:2]),
    ]:
        assert [event for _, event in await events_of(service, f"/v1/events?{query}", *sent)] == expected
    assert (await service.ask("GET", "/v1/events?task=ffff"))[0] == 404


async def test_kinds_of_events_that_there_are_not_are_refused(service: FakeService) -> None:
    for kind in ("bogus", "task.lost", "TASK", "node.up.x"):
        status, answer = await service.ask("GET", f"/v1/events?kind=node,{kind}")
        assert (status, answer["error"]["field"]) == (400, "kind")
        assert answer["error"]["message"].startswith(f"{kind!r} begins no kind of events: task.scheduled, ")


def test_kinds_of_events_are_those_of_the_document() -> None:
    document = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text()
    named = set(re.findall(r"`((?:task|node|leader|standby|durability)\.[a-z_]+)`", document))
    assert named <= {*EVENT_KINDS}
    assert {kind for kind in EVENT_KINDS if not kind.startswith("task.")} <= named


async def test_a_stream_of_events_listens_before_it_answers(service: FakeService) -> None:
    response = await service.response("GET", "/v1/events")
    assert service.open_streams == 1
    await response.stream.aclose()  # type: ignore[union-attr]
    assert service.open_streams == 0


async def test_a_reader_of_events_leaves_between_two(service: FakeService) -> None:
    response = await service.response("GET", "/v1/events")
    assert response.stream is not None
    await anext(response.stream)
    service.event_queue.put_nowait(EventView("node.up", NOW_S))
    await anext(response.stream)
    await response.stream.aclose()  # type: ignore[attr-defined]
    assert service.open_streams == 0


async def test_a_reader_of_events_leaves(service: FakeService) -> None:
    response = await service.response("GET", "/v1/events")
    assert response.stream is not None
    assert (await anext(response.stream)).startswith(b"retry")
    service.event_queue.put_nowait(EventView("node.up", NOW_S))
    assert b"node.up" in await anext(response.stream)
    reader = asyncio.create_task(anext(response.stream))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert service.open_streams == 0
