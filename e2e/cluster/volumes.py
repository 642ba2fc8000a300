"""Volumes for claims of StorageClass `host`: a folder on the host, writable to every user, gone with its claim.

The hostPath provisioner inside kube-controller-manager makes folders that only root can enter, and these pods are not root.

Usage: volumes.py ADDRESS PKI_FOLDER FOLDER
"""

from __future__ import annotations

import http.client
import json
import pathlib
import shutil
import ssl
import sys
import time
from typing import Any

ADDRESS, PKI, FOLDER = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
CLASS, EVERY_S = "host", 0.3
tls = ssl.create_default_context(cafile=str(PKI / "ca.crt"))
tls.load_cert_chain(PKI / "admin.crt", PKI / "admin.key")


def call(api: http.client.HTTPSConnection, method: str, path: str, body: Any = None) -> dict[str, Any]:
    api.request(method, f"/api/v1/{path}", body and json.dumps(body), {"Content-Type": "application/json"})
    answer: dict[str, Any] = json.load(api.getresponse())
    return answer


def volume(claim: dict[str, Any]) -> dict[str, Any]:
    """A PersistentVolume for one claim; its folder exists when this returns."""
    meta, spec = claim["metadata"], claim["spec"]
    folder = FOLDER / meta["uid"]
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o777)
    reference = {"kind": "PersistentVolumeClaim"} | {key: meta[key] for key in ("namespace", "name", "uid")}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"host-{meta['uid']}"},
        "spec": {
            "storageClassName": CLASS,
            "accessModes": spec["accessModes"],
            "capacity": spec["resources"]["requests"],
            "persistentVolumeReclaimPolicy": "Retain",
            "claimRef": reference,
            "hostPath": {"path": str(folder)},
        },
    }


def round_trip(api: http.client.HTTPSConnection) -> None:
    for claim in call(api, "GET", "persistentvolumeclaims")["items"]:
        if claim["spec"].get("storageClassName") == CLASS and not claim["spec"].get("volumeName"):
            call(api, "POST", "persistentvolumes", volume(claim))
    for found in call(api, "GET", "persistentvolumes")["items"]:
        if (
            found["spec"].get("storageClassName") == CLASS
            and found.get("status", {}).get("phase") == "Released"
        ):
            shutil.rmtree(found["spec"]["hostPath"]["path"], ignore_errors=True)
            call(api, "DELETE", f"persistentvolumes/{found['metadata']['name']}")


while True:
    try:
        connection = http.client.HTTPSConnection(ADDRESS, 6443, context=tls, timeout=30)
        while True:
            round_trip(connection)
            time.sleep(EVERY_S)
    except (OSError, ValueError, KeyError, http.client.HTTPException):
        time.sleep(EVERY_S)
