"""Runs a test on uvloop, as in production, and on the standard library's event loop."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make an async test one that runs twice."""

    @functools.wraps(test)
    def run(new_loop: Callable[[], asyncio.AbstractEventLoop], **arguments: Any) -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(test(**arguments))

    signature = inspect.signature(test)
    new_loop = inspect.Parameter("new_loop", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    del run.__wrapped__  # type: ignore[attr-defined]
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[new_loop, *signature.parameters.values()]
    )
    loops = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}
    decorated: Callable[..., None] = pytest.mark.parametrize("new_loop", loops.values(), ids=loops.keys())(run)
    return decorated
