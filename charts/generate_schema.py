"""Generate charts/kubeinfer/values.schema.json from the comments of values.yaml; copy the generated CRD into the chart.

    charts/generate_schema.py           writes the files
    charts/generate_schema.py --check   exit status 1 where one of them is stale

A value's type is its default's. `# -- text` above it is the description, `# @schema {...}` is merged into its schema.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from typing import Any

import yaml

CHART = pathlib.Path(__file__).resolve().parent / "kubeinfer"
CRD = CHART.parent.parent / "crds" / "kubeinfer.io_inferencemodels.yaml"
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
# Free-form Kubernetes objects: their fields are the API server's to check
OPEN = {"resources", "affinity"}

Path = tuple[str, ...]


def comments(text: str) -> dict[Path, tuple[str, dict[str, Any]]]:
    """Description and extra schema of each value, by its path. Raises ValueError on a broken @schema comment."""
    found: dict[Path, tuple[str, dict[str, Any]]] = {}
    path: list[tuple[int, str]] = []
    description: list[str] = []
    extra: dict[str, Any] = {}
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith("# @schema "):
            try:
                extra |= json.loads(stripped.removeprefix("# @schema "))
            except json.JSONDecodeError as error:
                raise ValueError(f"values.yaml line {number}: @schema is not JSON: {error}") from None
        elif stripped.startswith("# -- "):
            description = [stripped.removeprefix("# -- ")]
        elif stripped.startswith("#"):
            if description:
                description.append(stripped.removeprefix("#").strip())
        elif match := re.match(r"( *)([A-Za-z][\w-]*):(?: |$)", line):
            indent = len(match[1])
            path = [*(step for step in path if step[0] < indent), (indent, match[2])]
            found[tuple(name for _, name in path)] = (" ".join(description), extra)
            description, extra = [], {}
        else:
            description, extra = [], {}
    return found


def schema(value: Any, path: Path, notes: dict[Path, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """JSON schema of one value. Raises ValueError where its type cannot be told from its default."""
    if type(value) not in TYPES:
        raise ValueError(f"{'.'.join(path)}: the default {value!r} tells no type")
    description, extra = notes.get(path, ("", {}))
    result: dict[str, Any] = {"type": TYPES[type(value)]}
    if description:
        result["description"] = description
    if isinstance(value, dict) and "additionalProperties" not in extra and path[-1:] and path[-1] not in OPEN:
        result["additionalProperties"] = False
    if isinstance(value, dict) and "additionalProperties" not in extra and (not path or path[-1] not in OPEN):
        result["properties"] = {key: schema(inner, (*path, key), notes) for key, inner in value.items()}
    return result | extra


def generate(text: str) -> str:
    """The text of values.schema.json."""
    root = schema(yaml.safe_load(text), (), comments(text))
    # Helm itself adds `global` to every chart's values
    root = {
        "$schema": "https://json-schema.org/draft-07/schema#",
        "title": "Values of the kubeinfer chart",
    } | root
    root["properties"]["global"] = {"type": "object"}
    root["additionalProperties"] = False
    return json.dumps(root, indent=2) + "\n"


def main(check: bool) -> int:
    wanted = {CHART / "values.schema.json": generate((CHART / "values.yaml").read_text())}
    if CRD.exists():
        wanted[CHART / "files" / "inferencemodels.yaml"] = CRD.read_text()
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if check:
            print(f"{path} is stale: run charts/generate_schema.py", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path])
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
