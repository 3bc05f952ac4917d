"""Loaded by every Python process of a guarded command: notes and stops whatever would leave this machine.

Notes go to the file in GUARD_LOG, a line `EVENT HOST` each. Loopback, Unix sockets and names of this machine pass.
"""

import ipaddress
import os
import socket
import sys


def _is_local(host: object) -> bool:
    if host in (None, "", b"", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host.decode() if isinstance(host, bytes) else str(host))
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _guard(event: str, arguments: tuple) -> None:
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # Unix sockets have a path
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    if not _is_local(host):
        with open(os.environ["GUARD_LOG"], "a") as log:  # noqa: PTH123 - before pathlib is imported
            log.write(f"{event} {host}\n")
        raise PermissionError(f"{event} {host}: no network here")


sys.addaudithook(_guard)
