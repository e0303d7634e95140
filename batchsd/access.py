"""Who may give orders to a Ray cluster: it runs whatever code reaches its ports, unless it asks for a token.

    it asks for a token, or listens on loopback alone: fine
    it does not, and this machine is one of its nodes: a warning
    it does not, and this machine is none: refused, unless `ray.allow_unauthenticated`
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from batchsd.types import UsageError

CURRENT_CLUSTER = Path("/tmp/ray/ray_current_cluster")  # `ray start` writes its address here, on every node
TOKEN_FILE = Path("~/.ray/auth_token")  # where Ray looks where no variable says


def has_token(environ: Mapping[str, str], file: Path = TOKEN_FILE) -> bool:
    """Whether Ray's processes that begin in this environment show a token, and ask for one, as Ray 2.60 decides it."""
    mode = environ.get("RAY_AUTH_MODE")
    if mode is not None:
        return mode.lower() == "token"
    return bool(environ.get("RAY_AUTH_TOKEN") or environ.get("RAY_AUTH_TOKEN_PATH")) or file.expanduser().is_file()


def mode_here() -> str:
    """Runs on a node, in a process that Ray started: `token` or `open`. Raylets hand their mode down."""
    return "token" if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" else "open"


def is_loopback(address: str) -> bool:
    host = host_of(address)
    return host in ("local", "localhost", "::1") or host.startswith("127.")


def host_of(address: str) -> str:
    """`[::1]:6379` -> `::1`, `head:6379` -> `head`."""
    return (address.rpartition(":")[0] or address).strip("[]")


def is_node(address: str, current: Path = CURRENT_CLUSTER) -> bool:
    """Whether this machine is a node of the cluster: its head's address is ours, or `ray start` joined it."""
    try:
        if current.read_text().strip() == address:
            return True
    except OSError:
        pass
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host_of(address), None)}
    except OSError:
        return False
    return any(is_ours(str(ip)) for ip in found)


def is_ours(ip: str) -> bool:
    """Only an address of this machine can be bound."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((ip, 0))
            return True
    except OSError:
        return False


def check_access(address: str, allowed: bool, where: str, environ: Mapping[str, str], inside: bool) -> None:
    """Before anything is sent to a cluster. `where` names the setting. Raises UsageError as the module says."""
    if not (allowed or inside or is_loopback(address) or has_token(environ)):
        raise UsageError(
            f"Ray at {address}: this machine is none of its nodes, and no token is set: anyone between could read or "
            f"give its orders; set RAY_AUTH_MODE=token and the cluster's token on both sides, or {where} = true"
        )


def warning(address: str, modes: Mapping[str, str]) -> str:
    """Of the nodes' modes, by node: what to say of a cluster that takes orders from anyone; "" for nothing."""
    open_nodes = sorted(node for node, mode in modes.items() if mode != "token")
    if is_loopback(address) or not open_nodes:
        return ""
    return (
        f"Ray at {address} takes orders from anyone who reaches it ({len(open_nodes)} of {len(modes)} nodes ask for no "
        "token): set RAY_AUTH_MODE=token on every node, or keep its ports behind a firewall"
    )
