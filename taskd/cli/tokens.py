"""taskd token: who may use this machine's daemon from elsewhere, over HTTPS."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from taskd.cli.output import instant_text, note, print_lines, print_table
from taskd.cli.parameters import Duration
from taskd.errors import ConfigError

if TYPE_CHECKING:
    from taskd.config import Config
    from taskd.tokens import Role, TokenFile

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
_config = click.option("--config", metavar="F", type=click.Path(dir_okay=False), help="The file with the settings.")


@click.group("token")
def token() -> None:
    """Make, list and revoke tokens for HTTPS.

    Where `[api] listen` is set, the daemon of this machine serves HTTPS, to holders of a token only. Making and
    revoking tokens takes effect immediately: nothing need be restarted.
    """


@token.command(
    "create",
    epilog="""\b
Example:
  taskd token create laptop --user ana --output laptop.access
  scp laptop.access laptop:     # and there:
  taskd list --access laptop.access""",
)
@click.argument("name")
@click.option("--user", help="Whose tasks are submitted with it; else the token's name.")
@click.option(
    "--role",
    type=click.Choice(["user", "admin", "read-only"]),
    default="user",
    show_default=True,
    help="user: reads all, and acts on tasks of its own. admin: does everything. read-only: changes nothing.",
)
@click.option("--expires", type=Duration(), metavar="D", help="How long it is valid, such as 90d; else for ever.")
@click.option("--url", metavar="URL", help="Where clients reach this daemon; else this host and its port.")
@click.option("--output", metavar="F", type=click.Path(dir_okay=False), help="Write the access file here, privately.")
@_config
def create(
    name: str, user: str | None, role: Role, expires: float | None, url: str | None, output: str | None,
    config: str | None,
) -> None:  # fmt: skip
    """Make a token, and the file that clients need to use it: URL, fingerprint and token.

    The token is shown only once: this machine keeps a digest of it. Whoever can read the file acts as that user.
    """
    from taskd.private_files import save_private

    user = user or name
    for what, text in (("a token's name", name), ("a user's name", user)):
        if not _NAME.fullmatch(text):
            raise click.UsageError(f"{what} is up to 63 letters, digits, dots, hyphens, underscores and @: {text!r}")
    settings = _settings(config)
    url = (url or _url(settings)).rstrip("/")
    if not re.fullmatch(r"https://[^\s/\"\\]+", url):
        raise click.UsageError(f"a URL looks like https://head.lan:7711, not {url!r}")
    if output is not None and Path(output).exists():
        raise ConfigError(f"{output} is there already: choose another name")
    fingerprint = _fingerprint(settings)
    now_s = time.time()
    secret = _tokens(settings).make(name, user, role, now_s, now_s + expires if expires else 0.0)
    lines = [f'url = "{url}"', f'token = "{secret}"', *([f'fingerprint = "{fingerprint}"'] if fingerprint else [])]
    if output is None:
        click.echo("\n".join(lines))
        note("keep this in a file of yours alone, and use it with --access F or TASKD_ACCESS=F")
    else:
        try:
            save_private(Path(output), "\n".join(lines), force=False)
        except ConfigError:
            _tokens(settings).revoke(name)
            raise
        click.echo(output)
    if not settings.api.listen:
        note('the daemon does not listen yet: set listen = [":7711"] below [api] in its settings, and restart it')


@token.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document a line.")
@_config
def list_tokens(as_json: bool, config: str | None) -> None:
    """List the tokens of this machine's daemon."""
    now_s = time.time()
    tokens = _tokens(_settings(config)).load()
    if as_json:
        print_lines(
            {
                "name": it.name, "user": it.user, "role": it.role, "made": it.made_s, "expires": it.expires_s or None,
                "has_expired": it.is_over(now_s),
            }
            for it in tokens
        )  # fmt: skip
        return
    rows = [
        [it.name, it.user, it.role, instant_text(it.made_s, now_s), _end_text(it.expires_s, now_s)] for it in tokens
    ]
    print_table(["NAME", "USER", "ROLE", "MADE", "EXPIRES"], rows)


def _end_text(expires_s: float, now_s: float) -> str:
    if not expires_s:
        return "never"
    text = instant_text(expires_s, now_s)
    return f"{text} (has expired)" if expires_s <= now_s else text


@token.command("revoke")
@click.argument("name")
@_config
def revoke(name: str, config: str | None) -> None:
    """Revoke a token immediately."""
    _tokens(_settings(config)).revoke(name)
    click.echo(f"revoked {name}")


def _settings(path: str | None) -> Config:
    import os

    from taskd.config import load

    return load(Path(path) if path else None, os.environ, {})


def _tokens(settings: Config) -> TokenFile:
    from taskd.config import tokens_path
    from taskd.tokens import TokenFile

    return TokenFile(tokens_path(settings))


def _url(settings: Config) -> str:
    """Where others reach the daemon, as far as its settings tell."""
    import socket

    from taskd.config import API_PORT_DEFAULT

    host, _, port = (settings.api.listen[0] if settings.api.listen else f":{API_PORT_DEFAULT}").rpartition(":")
    return f"https://{host or socket.gethostname()}:{port}"


def _fingerprint(settings: Config) -> str:
    """Of the certificate that the node makes for itself, made now where it has not been; empty where the operator has
    given one: then a client's own authorities judge it."""
    from taskd.api.https import fingerprint_of, own_certificate
    from taskd.config import key_path

    if settings.api.certificate:
        return ""
    certificate, _ = own_certificate(key_path(settings).parent)
    return fingerprint_of(certificate)
