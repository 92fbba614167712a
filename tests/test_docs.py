"""What the documents say is there: links lead somewhere, commands and make targets exist, examples are valid.

The settings in docs/configuration.md are compared with the code in test_config.py.
"""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from taskd.sources import Sources

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_COMMAND = re.compile(r"(?:^|[\s;&|(])(?:\$ )?taskd((?: [a-z][a-z-]*){1,2})")
_TARGET = re.compile(r"\bmake ([a-z]+)\b")
_OPTION = re.compile(r"(?<=\s)(--[a-z][a-z-]*)")


class Fence(NamedTuple):
    """A block of code."""

    language: str
    text: str


def fences(text: str) -> list[Fence]:
    return [Fence(*found.groups()) for found in _FENCE.finditer(text)]


def code(text: str) -> Iterator[str]:
    """Every line of code: of blocks that are no output or program, and spans in running text."""
    for fence in fences(text):
        if fence.language in ("sh", "console", "bash"):
            yield from fence.text.replace("\\\n", " ").splitlines()
    yield from _SPAN.findall(_FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """What #fragments the headings of a document answer to."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def documents(pattern: str) -> list[Path]:
    return [path for path in DOCUMENTS if re.search(pattern, path.read_text(), re.MULTILINE)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    for target in _LINK.findall(_FENCE.sub("", path.read_text())):
        if re.match(r"[a-z]+:", target):
            continue  # Of the web: not ours to check, and not reachable everywhere.
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.is_relative_to(ROOT), f"{target} leads out of the project"
        assert linked.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(linked.read_text()), f"{target}: there is no such heading"


@pytest.mark.parametrize("path", documents(r"\btaskd [a-z]"), ids=name_of)
def test_commands_exist_with_their_options(path):
    for line in code(path.read_text()):
        for found in _COMMAND.finditer(line):
            words = found[1].split()
            command, rest = resolve(words, line[found.end(1) :])
            assert command is not None, f"`{line}`: there is no command taskd {' '.join(words)}"
            if not isinstance(command, click.Group):
                known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
                for option in _OPTION.findall(" " + rest.split(" -- ")[0].split("|")[0]):
                    assert option in known | {"--help"}, f"`{line}`: {command.name} has no option {option}"


def resolve(words: list[str], rest: str) -> tuple[click.Command | None, str]:
    """The command that these words call, as deep as groups go, and what follows it on the line."""
    from taskd.cli.main import cli

    command: click.Command | None = cli
    context = click.Context(cli)
    for number, word in enumerate(words):
        if not isinstance(command, click.Group):
            return command, " ".join(words[number:]) + rest
        command = command.get_command(context, word)
        if command is None:
            return None, ""
    return command, rest


@pytest.mark.parametrize("path", documents(r"\bmake [a-z]"), ids=name_of)
def test_make_targets_exist(path):
    known = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for line in code(path.read_text()):
        for target in _TARGET.findall(line):
            assert re.search(rf"^\s*make {target}\b", known, re.MULTILINE), f"`{line}`: there is no make {target}"


@pytest.mark.parametrize("path", documents(r"^```toml$"), ids=name_of)
def test_examples_of_settings_are_valid(path, tmp_path):
    from taskd.config import SETTINGS

    for fence in fences(path.read_text()):
        if fence.language == "toml" and any(section in SETTINGS for section in keys(fence.text)):
            file = tmp_path / "taskd.toml"
            file.write_text(fence.text)
            sources = Sources(SETTINGS)
            sources.read_file(file, must_exist=True)
            sources.check()


def keys(text: str) -> Iterator[str]:
    for section, table in tomllib.loads(text).items():
        if isinstance(table, dict):
            yield from (f"{section}.{name}" for name in table)


@pytest.mark.parametrize("path", documents(r"TASKD_[A-Z]+_"), ids=name_of)
def test_variables_of_settings_exist(path):
    from taskd.config import SETTINGS

    known = {"TASKD_" + key.replace(".", "_").upper() for key in SETTINGS}
    sections = "|".join(dict.fromkeys(key.partition(".")[0].upper() for key in SETTINGS))
    for variable in re.findall(rf"\bTASKD_(?:{sections})_[A-Z_]+\b", path.read_text()):
        assert variable in known, f"there is no setting for {variable}"


def test_every_variable_of_a_command_is_documented():
    from taskd.protocol.messages import AttemptKey, Term
    from taskd.runner.base import Place

    place = Place(Path("/worker"), "/taskd.sock", "00" * 16)
    variables = place.environment(AttemptKey(bytes(16), 1, Term(1, 2, 3), 4), "/private")
    documented = re.findall(r"^\| `(TASKD_\w+)` \|", (ROOT / "docs/commands.md").read_text(), re.MULTILINE)
    assert documented == list(dict.fromkeys(documented))
    assert {*documented} == {*variables}


_FOREIGN = re.compile(r"\bpip install (?:-\S+ )*taskd(?![-\w*])")


def test_nobody_is_sent_to_a_package_index_for_this_program():
    """What has its name there is another program."""
    texts = [*DOCUMENTS, *ROOT.glob("config/*"), *ROOT.glob("taskd/**/*.py")]
    assert [name_of(path) for path in texts if _FOREIGN.search(path.read_text())] == []
    assert _FOREIGN.search("`pip install --upgrade taskd`")
    assert not _FOREIGN.search("pip install ./taskd-*.whl")


def test_the_documents_are_looked_at():
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/configuration.md"} <= {*map(name_of, DOCUMENTS)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("`taskd cluster status`", [["cluster", "status"]]),
        ("the taskd daemon; `TASKD_X=1 taskd start --role worker`", [["start"]]),
        (
            "```sh\n$ taskd run -- sh -c 'exit 7'\nsudo taskd key show --role worker | cat\n```",
            [["run"], ["key", "show"]],
        ),
        ("```python\ntaskd start\n```", []),
        ("`taskd <role>`, `systemctl stop taskd@scheduler`, `pip install taskd`", []),
    ],
)
def test_commands_are_found_in_code_only(text, expected):
    assert [found[1].split() for line in code(text) for found in _COMMAND.finditer(line)] == expected
