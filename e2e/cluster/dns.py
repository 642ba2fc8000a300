"""Cluster DNS from the standard library: A records of Services and pods' host names under cluster.local; no upstream.

Usage: dns.py ADDRESS PKI_FOLDER
"""

from __future__ import annotations

import http.client
import json
import pathlib
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
from typing import Any

ADDRESS, PKI = sys.argv[1], pathlib.Path(sys.argv[2])
ZONE = ["svc", "cluster", "local"]
A, TTL_S = 1, 1
Key = tuple[str, str]  # namespace, name
objects: dict[str, dict[Key, dict[str, Any]]] = {"services": {}, "endpoints": {}}
tls = ssl.create_default_context(cafile=str(PKI / "ca.crt"))
tls.load_cert_chain(PKI / "admin.crt", PKI / "admin.key")


def key(item: dict[str, Any]) -> Key:
    return item["metadata"]["namespace"], item["metadata"]["name"]


def mirror(resource: str) -> None:
    """List and watch one resource for ever; keep the last known state while the API server is away."""
    while True:
        try:
            api = http.client.HTTPSConnection(ADDRESS, 6443, context=tls, timeout=330)
            api.request("GET", f"/api/v1/{resource}")
            listing = json.load(api.getresponse())
            objects[resource] = {key(item): item for item in listing["items"]}
            version = listing["metadata"]["resourceVersion"]
            api.request("GET", f"/api/v1/{resource}?watch=1&timeoutSeconds=300&resourceVersion={version}")
            for line in api.getresponse():
                event = json.loads(line)
                if event["type"] == "ERROR":
                    break
                if event["type"] == "DELETED":
                    objects[resource].pop(key(event["object"]), None)
                else:
                    objects[resource][key(event["object"])] = event["object"]
        except (OSError, ValueError, KeyError, http.client.HTTPException):
            time.sleep(0.3)


def addresses(name: str) -> list[str] | None:
    """The IPv4 addresses of a name; None where there is no such name."""
    labels = name.lower().rstrip(".").split(".")
    if labels[-3:] != ZONE or len(labels) not in (5, 6):
        return None
    service, namespace = labels[-5], labels[-4]
    found = objects["services"].get((namespace, service))
    if found is None:
        return None
    cluster_ip = found["spec"].get("clusterIP")
    if len(labels) == 5 and cluster_ip not in (None, "", "None"):
        return [cluster_ip]
    subsets = objects["endpoints"].get((namespace, service), {}).get("subsets") or []
    pods = [address for subset in subsets for address in subset.get("addresses") or []]
    if len(labels) == 5:
        return [pod["ip"] for pod in pods]
    return [pod["ip"] for pod in pods if pod.get("hostname") == labels[0]] or None


def reply(query: bytes) -> bytes:
    """The answer to one wire-format query. Raises IndexError or struct.error on a malformed one."""
    labels, at = [], 12
    while query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode("latin1"))
        at += 1 + query[at]
    (kind,) = struct.unpack_from(">H", query, at + 1)
    found = addresses(".".join(labels))
    records = [
        struct.pack(">HHHIH", 0xC00C, A, 1, TTL_S, 4) + socket.inet_aton(ip)
        for ip in found or []
        if kind in (A, 255)
    ]
    flags = (
        0x8480 | (query[2] & 1) << 8 | (3 if found is None else 0)
    )  # an answer, authoritative; 3: no such name
    return (
        query[:2]
        + struct.pack(">HHHHH", flags, 1, len(records), 0, 0)
        + query[12 : at + 5]
        + b"".join(records)
    )


class Datagram(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        query, connection = self.request
        try:
            connection.sendto(reply(query), self.client_address)
        except (IndexError, struct.error):
            pass


class Stream(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        try:
            (length,) = struct.unpack(">H", self.rfile.read(2))
            answer = reply(self.rfile.read(length))
            self.wfile.write(struct.pack(">H", len(answer)) + answer)
        except (IndexError, struct.error):
            pass


if __name__ == "__main__":
    for resource in objects:
        threading.Thread(target=mirror, args=(resource,), daemon=True).start()
    socketserver.ThreadingTCPServer.allow_reuse_address = True
    stream = socketserver.ThreadingTCPServer((ADDRESS, 53), Stream)
    threading.Thread(target=stream.serve_forever, daemon=True).start()
    socketserver.ThreadingUDPServer((ADDRESS, 53), Datagram).serve_forever()
