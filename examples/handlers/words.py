"""Handlers as a worker loads them: `handlers = ["words"]` and this directory in `handler_path` of its settings."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from taskd import TaskHandler, task

_WORD = re.compile(r"[A-Za-z]+")


@task("count_words")
def count_words(path: str) -> int:
    """Count the words in a text file."""
    return len(_WORD.findall(Path(path).read_text(encoding="utf-8", errors="replace")))


class FrequentWords(TaskHandler):
    """The task interface as a class: the most frequent words of a text file, and how often each occurs."""

    type = "frequent_words"

    def execute(self, params: dict[str, str]) -> dict[str, int]:
        text = Path(params["path"]).read_text(encoding="utf-8", errors="replace")
        return dict(Counter(_WORD.findall(text.lower())).most_common(5))
