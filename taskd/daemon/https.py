"""The API over HTTPS: by one daemon of a machine at a time. The scheduler and the worker of one machine share their
settings, so that both want the port; the other one takes it when the first is gone, with the same certificate and
tokens.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from taskd.api.app import ApiServer, serve_https
from taskd.api.bearers import Bearers
from taskd.api.budgets import Budgets
from taskd.api.https import is_free, own_certificate
from taskd.api.service import Service
from taskd.config import Config, key_path, tokens_path
from taskd.daemon.logs import log
from taskd.errors import AlreadyRunning, ConfigError

RETRY_S = 2.0


class Https:
    """That of one daemon."""

    def __init__(self, service: Service, config: Config, budgets: Budgets) -> None:
        """Raises ConfigError where the certificate cannot be used."""
        self._service = service
        self._api = config.api
        self._budgets = budgets
        self._bearers = Bearers(tokens_path(config), lambda what: log("warning", what))
        if self._api.certificate:
            self._certificate, self._key = Path(self._api.certificate), Path(self._api.certificate_key)
        else:
            self._certificate, self._key = own_certificate(key_path(config).parent)
        self._server: ApiServer | None = None
        self._is_closed = False

    def open(self) -> bool:
        """Serve; False where somebody else has the port. Raises ConfigError."""
        try:
            self._server = serve_https(
                self._service, self._api.listen, self._certificate, self._key, self._bearers,
                body_bytes_max=self._api.body_bytes_max, budgets=self._budgets,
            )  # fmt: skip
        except AlreadyRunning as error:
            log("warning", "the API is not served over HTTPS here, until the port is free", reason=error.message)
            return False
        return True

    async def keep_trying(self) -> None:
        """Serve as soon as the port is free. A certificate that cannot be used by then, as while it is being renewed,
        is waited for: this daemon has tasks that run."""
        said = ""
        while not self._is_closed:
            await asyncio.sleep(RETRY_S)
            try:
                if not self._is_closed and self._is_free() and self.open():
                    return
            except ConfigError as error:
                if error.message != said:
                    said = error.message
                    log("error", "the API is not served over HTTPS here, until that can be used", reason=said)

    def _is_free(self) -> bool:
        return all(is_free(address) for address in self._api.listen)

    async def close(self) -> None:
        """Stop in good order."""
        self._is_closed = True
        if self._server is not None:
            await self._server.close()
