"""Requests made from the description of the API, valid ones and broken ones, as each role, at a real daemon over HTTPS.

Every answer has a status, a type and a form that the description names, no request fails inside, and no role gets what
is not for it. The daemon has no worker: nothing that is submitted here is ever run.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode, openapi
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from taskd.api.routes import ROUTES, openapi_document
from taskd.tokens import TokenFile
from tests.attacks.test_http import RSS_BYTES_MAX, rss_bytes
from tests.integration.cluster import LOOPBACK, Daemon, free_port

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
]  # fmt: skip
ROLES = ("admin", "user", "read-only", "nobody")
EXAMPLES = 5  # Of each operation, role, and kind of data.
TIMEOUT_S = 20.0
UNAUTHORIZED, FORBIDDEN, TOO_MANY = 401, 403, 429
ENDLESS = "/v1/events"  # What it streams, and to whom, is tested elsewhere; a request for it is never answered whole.

DESCRIPTION = openapi.from_dict(json.loads(openapi_document()))
OPERATIONS = {
    f"{operation.method.upper()} {operation.path}": operation
    for operation in (result.ok() for result in DESCRIPTION.get_all_operations())
    if operation.path != ENDLESS
}
ROUTE_OF = {f"{route.method} {route.path}": route for route in ROUTES}


class Target:
    """A scheduler with a token for each role, and something to ask for."""

    def __init__(self, daemon: Daemon, port: int, tokens: dict[str, str]) -> None:
        self._base_url = f"https://127.0.0.1:{port}"
        self._headers = {role: {"Authorization": f"Bearer {token}"} for role, token in tokens.items()}
        self._session = requests.Session()
        self._session.trust_env = False  # No proxy, no other list of authorities.
        (self.task_id,) = daemon.submit({"argv": ["true"], "name": "there", "priority": -1})

    def ask(self, case: Case, role: str) -> requests.Response:
        """Send it, and see that the answer is one that the description allows."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of each request that nobody has checked the certificate.
            answer = case.call(
                self._base_url, session=self._session, headers=self._headers.get(role, {}), timeout=TIMEOUT_S,
                verify=False,  # It has signed its certificate itself; who must notice that is tested elsewhere.
            )  # fmt: skip
        case.validate_response(answer, checks=CHECKS)
        return answer

    def close(self) -> None:
        self._session.close()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    directory = tmp_path_factory.mktemp("openapi")
    port, tokens = free_port(), TokenFile(directory / "tokens.json")
    words = {role: tokens.make(role, role, role, 0.0, 0.0) for role in ("admin", "user", "read-only")}
    env = {**LOOPBACK, "TASKD_API_LISTEN": f"127.0.0.1:{port}", "TASKD_API_TOKENS_FILE": str(tokens.path)}
    daemon = Daemon(directory / "node", directory / "key", "scheduler", "--node-id", "7", env=env)
    daemon.start()
    target = Target(daemon, port, words)
    try:
        yield target
        log = daemon.log.read_text()
        assert "request failed" not in log
        assert "a bug" not in log
        assert rss_bytes(daemon) < RSS_BYTES_MAX
        assert daemon.ok("GET", f"/v1/tasks/{target.task_id}")["name"] == "there"
    finally:
        target.close()
        daemon.stop()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_answers_are_as_described_and_for_whom_they_are(name: str, role: str, target: Target) -> None:
    check(name, role, GenerationMode.POSITIVE, target)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", [name for name in OPERATIONS if ROUTE_OF[name].body or ROUTE_OF[name].parameters])
def test_so_are_answers_to_what_is_broken(name: str, role: str, target: Target) -> None:
    check(name, role, GenerationMode.NEGATIVE, target)


def check(name: str, role: str, mode: GenerationMode, target: Target) -> None:
    """Some requests of one operation, as one role."""
    route = ROUTE_OF[name]

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )  # fmt: skip
    @given(OPERATIONS[name].as_strategy(mode), st.sampled_from(["", target.task_id, "7", "last"]))
    def ask(case: Case, known_id: str) -> None:
        shorten(case)
        if known_id and "{id}" in route.path:
            case.path_parameters = {"id": known_id}
        status = target.ask(case, role).status_code
        if role == "nobody":
            assert status in {UNAUTHORIZED, TOO_MANY}
            return
        assert status != UNAUTHORIZED
        is_for_others = route.needs_admin if role == "user" else route.changes or route.needs_admin
        if role != "admin" and is_for_others:
            assert status == FORBIDDEN

    ask()


def shorten(case: Case) -> None:
    """Wait for nothing: no task ends here."""
    query: dict[str, Any] | None = case.query
    for name in ("wait", "follow", "stream"):
        if query and name in query:
            del query[name]
    if isinstance(case.body, dict) and "timeout" in case.body and case.path.endswith("/wait"):
        case.body["timeout"] = 0.01
