"""What a container engine changes in the host's network, remembered before and put back after."""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
import shutil

from .console import run, say, succeeds

_FORWARDING = (
    Path("/proc/sys/net/ipv4/ip_forward"),
    Path("/proc/sys/net/ipv6/conf/all/forwarding"),
    Path("/proc/sys/net/ipv6/conf/default/forwarding"),
)
_FAMILIES = {"iptables": "ip", "ip6tables": "ip6"}


def _table_names(saved: str) -> list[str]:
    """Returns the tables in the output of iptables-save."""
    return [line[1:] for line in saved.splitlines() if line.startswith("*")]


@dataclasses.dataclass(frozen=True, slots=True)
class NetworkState:
    """Packet filter, forwarding and interfaces at one moment."""

    filters: Mapping[str, str]
    """Output of `iptables-save` and `ip6tables-save`, by `iptables` and `ip6tables`."""
    forwarding: Mapping[str, str]
    """Content of the kernel's forwarding switches, by path."""
    interfaces: tuple[str, ...]
    """Names of the network interfaces."""

    @classmethod
    def now(cls) -> "NetworkState":
        """Returns the present state. Needs root."""
        tools = [tool for tool in _FAMILIES if shutil.which(f"{tool}-save")]
        return cls(
            filters={tool: run([f"{tool}-save"], timeout=20) for tool in tools},
            forwarding={str(path): path.read_text() for path in _FORWARDING if path.exists()},
            interfaces=tuple(sorted(path.name for path in Path("/sys/class/net").iterdir())),
        )

    def to_json(self) -> str:
        """Returns the state as text, for a later process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "NetworkState":
        """Returns the state that `to_json` wrote."""
        fields = json.loads(text)
        return cls(fields["filters"], fields["forwarding"], tuple(fields["interfaces"]))

    def restore(self) -> None:
        """Removes the engine's bridges and rules. Interfaces that are none of the engine's are left alone."""
        for name in NetworkState.now().interfaces:
            if name not in self.interfaces and name.startswith(("docker", "br-", "veth")):
                # A veth may vanish together with its peer, so failure is no news.
                succeeds(["ip", "link", "delete", name], timeout=20)
        for tool, before in self.filters.items():
            self._restore_filter(tool, before)
        for path, before in self.forwarding.items():
            if Path(path).read_text() != before:
                Path(path).write_text(before)
        say("engine: packet filter, bridges and forwarding are as they were")

    def _restore_filter(self, tool: str, before: str) -> None:
        """Puts one address family's rules back; tables that were not there are removed."""
        new = [name for name in _table_names(run([f"{tool}-save"], timeout=20)) if name not in _table_names(before)]
        if before:
            run([f"{tool}-restore"], timeout=20, stdin=before)
        for name in new:
            if shutil.which("nft") and succeeds(["nft", "delete", "table", _FAMILIES[tool], name], timeout=20):
                continue
            run([tool, "-t", name, "-F"], timeout=20)
            run([tool, "-t", name, "-X"], timeout=20)
            if name == "filter":
                run([tool, "-P", "FORWARD", "ACCEPT"], timeout=20)
