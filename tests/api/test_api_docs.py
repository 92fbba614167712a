"""The page about the HTTP interface names every route, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from taskd.api.routes import ROUTES

PAGE = Path(__file__).parent.parent.parent / "docs" / "http-api.md"


def test_the_page_names_every_route() -> None:
    named = set(re.findall(r"`(GET|POST) (/[^`?]*)`", PAGE.read_text()))
    assert named == {(route.method, route.path) for route in ROUTES}
