"""Who changed what: the file, its bounds, and what is never in it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from taskd.api.service import ApiRequest, ApiResponse, Caller
from taskd.daemon.audit import AuditLog

NOW_S = 1_800_000_000.25


def record(audit: AuditLog, path: str = "/v1/tasks", status: int = 200, method: str = "POST") -> None:
    caller = Caller("ann", False)
    request = ApiRequest(method, path, {"wait": "5"}, caller, b"secret body", source="pid 7 uid 1000")
    audit.record(request, ApiResponse(status, did="submitted 1"), NOW_S)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_who_and_what_and_nothing_of_the_body(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    record(AuditLog(path, 1 << 20))
    (line,) = lines(path)
    assert line == {
        "at": "2027-01-15T08:00:00.250+00:00", "user": "ann", "is_admin": False, "source": "pid 7 uid 1000",
        "method": "POST", "path": "/v1/tasks", "status": 200, "query": {"wait": "5"}, "did": "submitted 1",
    }  # fmt: skip
    assert "secret" not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o640 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_it_goes_on_where_it_stopped_and_keeps_one_older_file(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    record(AuditLog(path, 1 << 20))
    size = path.stat().st_size
    audit = AuditLog(path, 2 * size)
    record(audit)
    assert len(lines(path)) == 2
    for _ in range(3):
        record(audit)
    assert len(lines(path)) == 1
    assert len(lines(tmp_path / "audit.log.1")) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["audit.log", "audit.log.1"]


def test_a_file_that_was_moved_away_is_begun_anew_after_a_reload(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    audit = AuditLog(path, 1 << 20)
    record(audit)
    path.rename(tmp_path / "moved")
    record(audit)
    assert len(lines(tmp_path / "moved")) == 2
    audit.reopen()
    record(audit)
    assert len(lines(path)) == 1


def test_a_full_disk_stops_nobody_and_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    audit = AuditLog(tmp_path / "audit.log", 1 << 20)
    audit.close()
    audit._fd = os.open("/dev/full", os.O_WRONLY)
    with caplog.at_level(logging.INFO, "taskd"):
        record(audit)
        record(audit)
    assert [it.message for it in caplog.records] == ["the audit file cannot be written"]


def test_all_but_submissions_go_to_the_log_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    audit = AuditLog(tmp_path / "audit.log", 0)
    with caplog.at_level(logging.INFO, "taskd"):
        record(audit)
        record(audit, "/v1/nodes/7/drain")
        record(audit, "/v1/tasks/cancel", status=403)
        record(audit, "/v1/backup", method="GET")
        record(audit, "/v1/backup", status=403, method="GET")
    assert [it.message for it in caplog.records] == ["changed", "change refused", "given", "refused"]
    assert not list(tmp_path.iterdir())


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "audit.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        AuditLog(tmp_path / "audit.log", 1 << 20)
