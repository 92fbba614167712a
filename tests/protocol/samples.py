"""Messages of every kind, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from taskd.protocol import messages as msg

unsigned = st.integers(0, (1 << 63) - 1)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ids = st.binary(min_size=16, max_size=16)
times = st.floats(allow_nan=False)
bodies = st.binary(max_size=3000)

epochs = st.integers(0, (1 << 48) - 1)
terms = st.builds(msg.Term, epochs, unsigned, unsigned)
keys = st.builds(msg.AttemptKey, ids, unsigned, terms, unsigned)
many_keys = st.lists(keys, max_size=5).map(tuple)
roles = st.sampled_from([("scheduler",), ("worker",), ("scheduler", "worker")])
nodes = st.builds(msg.NodeInfo, unsigned, names, roles, ids, unsigned, names)
handlers = st.builds(msg.HandlerInfo, names, bodies, names, names)
amounts = st.dictionaries(names, unsigned, max_size=4)
offers = st.builds(
    msg.Offer, st.integers(0, 1_000_000), amounts, st.dictionaries(names, names, max_size=4),
    st.lists(names, max_size=3).map(tuple), st.lists(handlers, max_size=3).map(tuple),
)  # fmt: skip
assignments = st.builds(msg.Assignment, keys, bodies)
moments = st.floats(0, 1e11)
started = st.builds(msg.AttemptStarted, keys, moments)
ended = st.builds(msg.AttemptEnded, keys, st.integers(0, 255), moments, moments, bodies)

dots = st.builds(msg.Dot, terms, unsigned)
many_dots = st.lists(dots, max_size=4).map(tuple)
ids = st.binary(min_size=16, max_size=16)
many_ids = st.lists(ids, max_size=4).map(tuple)
rows = st.builds(
    msg.TaskRow, ids, st.integers(0, 255), st.integers(-1_000_000, 1_000_000), names, names, names, names, times, times,
    times, epochs, unsigned, unsigned, unsigned, bodies, bodies,
)  # fmt: skip
many_rows = st.lists(rows, max_size=3).map(tuple)
many_node_rows = st.lists(
    st.builds(msg.NodeRow, unsigned, names, st.just(("worker",)), st.none() | names, times), max_size=3
).map(tuple)

BY_KIND: dict[type[msg.Message], st.SearchStrategy[msg.Message]] = {
    msg.Hello: st.builds(msg.Hello, unsigned, names, nodes),
    msg.Ping: st.builds(msg.Ping, unsigned, times),
    msg.Pong: st.builds(msg.Pong, unsigned, times),
    msg.Goodbye: st.builds(msg.Goodbye, names),
    msg.Request: st.builds(
        msg.Request, unsigned, names, st.booleans(), st.sampled_from(["GET", "POST"]), names, bodies, st.booleans()
    ),
    msg.RequestPart: st.builds(msg.RequestPart, unsigned, bodies, st.booleans()),
    msg.Response: st.builds(msg.Response, unsigned, st.integers(100, 599), names, bodies, st.booleans()),
    msg.ResponsePart: st.builds(msg.ResponsePart, unsigned, bodies, st.booleans()),
    msg.Taken: st.builds(msg.Taken, unsigned, unsigned),
    msg.Abandon: st.builds(msg.Abandon, unsigned, st.booleans()),
    msg.Leading: st.builds(msg.Leading, st.none() | terms),
    msg.Claim: st.builds(msg.Claim, terms, many_dots),
    msg.Denied: st.builds(msg.Denied, terms, st.none() | terms, st.none() | terms),
    msg.Attach: st.builds(msg.Attach, terms, many_dots),
    msg.Wanted: st.builds(msg.Wanted, terms, many_dots),
    msg.Page: st.builds(
        msg.Page, terms, unsigned, many_rows, many_node_rows, many_dots, st.booleans(), st.none() | many_ids, ids, ids
    ),
    msg.PageTaken: st.builds(msg.PageTaken, terms, unsigned),
    msg.Replicate: st.builds(
        msg.Replicate, terms, unsigned, many_rows, many_node_rows, many_ids, many_dots, st.booleans()
    ),
    msg.Replicated: st.builds(msg.Replicated, terms, unsigned),
    msg.HandOver: st.builds(msg.HandOver, terms, unsigned),
    msg.Register: st.builds(msg.Register, offers, many_keys, many_keys, st.none() | terms),
    msg.Inventory: st.builds(msg.Inventory, unsigned, many_keys),
    msg.Started: st.builds(msg.Started, st.lists(started, max_size=4).map(tuple)),
    msg.Finished: st.builds(msg.Finished, st.lists(ended, max_size=4).map(tuple)),
    msg.Offering: st.builds(msg.Offering, offers),
    msg.Registered: st.builds(msg.Registered, terms),
    msg.Run: st.builds(msg.Run, terms, st.lists(assignments, max_size=4).map(tuple)),
    msg.Cancel: st.builds(msg.Cancel, terms, many_keys),
    msg.Recall: st.builds(msg.Recall, terms, many_keys),
    msg.Acknowledged: st.builds(msg.Acknowledged, terms, many_keys),
}
messages = st.one_of(list(BY_KIND.values()))

_TERM = msg.Term(3, 17, 99)
_KEYS = (msg.AttemptKey(bytes(16), 1, _TERM, 5),)
_DOTS = (msg.Dot(_TERM, 5),)
_ROW = msg.TaskRow(bytes(16), 3, 0, "default", "command", "", "root", 1.0, 1.0, 0.0, 3, 17, 99, 5, b"", b"")
_NODE_ROW = msg.NodeRow(7, "seven", ("worker",), None, 1.0)
_OFFER = msg.Offer(2, {"cpus": 2000}, {"os": "linux"}, ("command",))
ONE_OF_EACH: tuple[msg.Message, ...] = (
    msg.Hello(1, "default", msg.NodeInfo(7, "seven", ("worker",), bytes(16), 1, "1.0")),
    msg.Ping(1, 2.0),
    msg.Pong(1, 2.0),
    msg.Goodbye("bye"),
    msg.Request(1, "root", True, "GET", "/v1/tasks", b"", True),
    msg.RequestPart(1, b"", True),
    msg.Response(1, 200, "application/json", b"{}", True),
    msg.ResponsePart(1, b"", True),
    msg.Taken(1, 1),
    msg.Abandon(1, True),
    msg.Leading(_TERM),
    msg.Claim(_TERM, _DOTS),
    msg.Denied(_TERM, None, _TERM),
    msg.Attach(_TERM, _DOTS),
    msg.Wanted(_TERM, ()),
    msg.Page(_TERM, 1, (_ROW,), (_NODE_ROW,), _DOTS, True, (bytes(16),)),
    msg.PageTaken(_TERM, 1),
    msg.Replicate(_TERM, 1, (_ROW,), (_NODE_ROW,), (bytes(16),), (), True),
    msg.Replicated(_TERM, 1),
    msg.HandOver(_TERM, 1),
    msg.Register(_OFFER, _KEYS, (), None),
    msg.Inventory(1, _KEYS),
    msg.Started((msg.AttemptStarted(_KEYS[0], 1.0),)),
    msg.Finished((msg.AttemptEnded(_KEYS[0], 0, 1.0, 2.0),)),
    msg.Offering(_OFFER),
    msg.Registered(_TERM),
    msg.Run(_TERM, (msg.Assignment(_KEYS[0], b""),)),
    msg.Cancel(_TERM, _KEYS),
    msg.Recall(_TERM, _KEYS),
    msg.Acknowledged(_TERM, _KEYS),
)
