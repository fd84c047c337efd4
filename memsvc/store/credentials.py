"""Who a service is for the store. Passwords come from files or the address, and are never shown."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from quire.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Credentials:
    """Who to be for the server, and how to know it. What is empty is left to the URL and the system."""

    username: str = ""
    password_file: str = ""
    """Its first line is the password."""
    ca_file: str = ""
    """Certificates that sign the server's; with rediss only."""
    certificate_file: str = ""
    """The client's own certificate, and `key_file` its key."""
    key_file: str = ""

    def options(self, *, tls: bool) -> dict[str, Any]:
        """Returns them as the client library takes them.

        Raises:
            ConfigError: a file cannot be read, or is given where it would not be used.
        """
        options: dict[str, Any] = {}
        if self.username:
            options["username"] = self.username
        if self.password_file:
            options["password"] = _first_line(self.password_file)
        files = {
            "store_ca_file": ("ssl_ca_certs", self.ca_file),
            "store_cert_file": ("ssl_certfile", self.certificate_file),
            "store_key_file": ("ssl_keyfile", self.key_file),
        }
        for field, (option, path) in files.items():
            if not path:
                continue
            flag = "--" + field.replace("_", "-")
            if not tls:
                raise ConfigError(f"{flag}: is used only with rediss:// and rediss+cluster://", field=field)
            if not Path(path).is_file():
                raise ConfigError(f"{flag}: no file {path!r}", field=field)
            options[option] = path
        if bool(self.certificate_file) != bool(self.key_file):
            raise ConfigError("--store-cert-file: is used together with --store-key-file", field="store_cert_file")
        return options


def _first_line(path: str) -> str:
    try:
        line = Path(path).read_text().partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--store-password-file: {error}", field="store_password_file") from error
    if not line:
        raise ConfigError(f"--store-password-file: {path!r} is empty", field="store_password_file")
    return line
