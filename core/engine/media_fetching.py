"""Fetches what an address of the web leads to, and nothing of the network that it stands in.

A name is resolved once, all its addresses are checked, and the connection goes to one of those: a
name that changes its address between check and use gains nothing. Each redirect begins anew.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from quire.core.errors import ConfigError, RequestError

PARAM = "image"
_MAX_REDIRECTS = 4

Resolve = Callable[[str, int], Sequence[str]]
"""(host, port) to the addresses that the name stands for."""


def fetch(
    address: str,
    *,
    allowed_domains: Sequence[str] = (),
    allow_private: bool = False,
    max_bytes: int,
    timeout_s: float,
    resolve: Resolve | None = None,
    transport: Any = None,
) -> bytes:
    """What `address` answers with. `transport`: httpx's, for tests.

    Raises: RequestError if it may not be fetched, does not answer in time, or answers too much.
    """
    try:
        import httpx
    except ImportError as error:
        raise ConfigError('fetching images needs httpx; pip install "quire[vision]"') from error
    deadline = time.monotonic() + timeout_s
    try:
        # Settings of the environment could send the request through a proxy, past the checks.
        with httpx.Client(trust_env=False, transport=transport, timeout=timeout_s) as client:
            for _ in range(_MAX_REDIRECTS + 1):
                url = _checked_url(address, allowed_domains)
                ip = _checked_address(url, allow_private, resolve or resolve_name)
                content, location = _get(client, url, ip, max_bytes, deadline)
                if location is None:
                    return content
                address = urljoin(address, location)
    except httpx.HTTPError as error:
        raise RequestError(
            f"the image could not be fetched: {type(error).__name__}"[:200], param=PARAM
        ) from error
    raise RequestError(f"the image's address leads on {_MAX_REDIRECTS} times", param=PARAM)


def resolve_name(host: str, port: int) -> list[str]:
    """All addresses of a name.

    Raises: RequestError if it has none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RequestError(f"the host {host[:80]!r} is not known", param=PARAM) from error
    return [str(entry[4][0]) for entry in found]


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public network, IPv4 in IPv6 looked into."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def _checked_url(address: str, allowed_domains: Sequence[str]) -> SplitResult:
    """Raises: RequestError for what is no address of the web, or not of an allowed domain."""
    try:
        url = urlsplit(address)
        host, _ = url.hostname, url.port
    except ValueError as error:
        raise RequestError(f"the image's address is broken: {error}", param=PARAM) from error
    if url.scheme not in ("http", "https") or not host:
        raise RequestError("the image's address leads to none of the web", param=PARAM)
    name = host.rstrip(".").lower()
    allowed = [domain.lower().lstrip(".") for domain in allowed_domains]
    if allowed and not any(name == one or name.endswith("." + one) for one in allowed):
        raise RequestError(
            f"images may not be fetched from {host[:80]!r}; this server fetches from "
            f"{', '.join(allowed)}; send a data URL",
            param=PARAM,
        )
    return url


def _checked_address(url: SplitResult, allow_private: bool, resolve: Resolve) -> str:
    """The address to connect to, all of the name's being public.

    Raises: RequestError if one is not.
    """
    host = url.hostname or ""
    addresses = list(resolve(host, url.port or (443 if url.scheme == "https" else 80)))
    if not addresses:
        raise RequestError(f"the host {host[:80]!r} has no address", param=PARAM)
    if not allow_private and not all(map(is_public, addresses)):
        raise RequestError(
            f"the host {host[:80]!r} is of a private network or of this machine, from which "
            "nothing is fetched unless the server runs with --allow-private-media; send a data URL",
            param=PARAM,
        )
    return addresses[0]


def _get(
    client: Any, url: SplitResult, ip: str, max_bytes: int, deadline: float
) -> tuple[bytes, str | None]:
    """The answer's content, or where it leads on."""
    target = f"[{ip}]" if ":" in ip else ip
    port = "" if url.port is None else f":{url.port}"
    direct = url._replace(netloc=f"{target}{port}", fragment="").geturl()
    host = url.hostname or ""
    headers = {"Host": f"{host}{port}", "Accept": "image/*", "User-Agent": "quire"}
    with client.stream(
        "GET", direct, headers=headers, extensions={"sni_hostname": host}
    ) as response:
        if response.is_redirect:
            return b"", str(response.headers.get("location", ""))
        if response.status_code != 200:
            raise RequestError(f"the image's address answers {response.status_code}", param=PARAM)
        return _read(response, max_bytes, deadline), None


def _read(response: Any, max_bytes: int, deadline: float) -> bytes:
    pieces, size = [], 0
    for piece in response.iter_bytes():
        size += len(piece)
        if size > max_bytes:
            raise RequestError(f"the image is over {max_bytes:,} bytes", param=PARAM)
        if time.monotonic() > deadline:
            raise RequestError("the image took too long to fetch", param=PARAM)
        pieces.append(piece)
    return b"".join(pieces)
