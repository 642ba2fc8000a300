"""Write docs/options.md from the option models: `python docs/generate_options.py [--check]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kubeinfer.options import (
    CacheOptions,
    LogOptions,
    ModelOptions,
    ParallelOptions,
    SchedulerOptions,
    ServerOptions,
)

TARGET = Path(__file__).with_name("options.md")
HEAD = """# Options

Made from `runtime/kubeinfer/options.py` by `make generate`; do not edit. Each option of all groups but the last is a keyword
of `LLM(...)`, a flag of `kubeinfer serve` and, but for the ones marked *, a field of `spec.engine` (in camelCase). Flags take
dashes or underscores; `--config FILE.yaml` reads them from a file, and flags win over it.
"""


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " \\| ".join(str(v) for v in schema["enum"])
    if "anyOf" in schema:
        return " \\| ".join(_type(s) for s in schema["anyOf"] if s.get("type") != "null")
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    return str(schema.get("type", "any"))


def _table(title: str, model: type[BaseModel]) -> str:
    lines = [f"\n## {title}\n", "| option | type | default | what it does |", "|---|---|---|---|"]
    for name, schema in model.model_json_schema()["properties"].items():
        default = schema.get("default")
        shown = (
            ""
            if default in (None, "")
            else f"`{str(default).lower() if isinstance(default, bool) else default}`"
        )
        unit = f" ({schema['unit']})" if "unit" in schema else ""
        short = f" `-{schema['short']}`" if "short" in schema else ""
        star = "\\*" if schema.get("pod") is False else ""
        flag = name.replace("_", "-")
        lines.append(
            f"| `--{flag}`{star}{short} | {_type(schema)}{unit} | {shown} | {schema.get('description', '')} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    text = HEAD + "".join(
        _table(title, model)
        for title, model in (
            ("Model", ModelOptions),
            ("Memory", CacheOptions),
            ("Scheduler", SchedulerOptions),
            ("Parallelism", ParallelOptions),
            ("Log", LogOptions),
            ("Server (flags only)", ServerOptions),
        )
    )
    if "--check" in sys.argv[1:]:
        if not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != text:
            print("docs/options.md is stale: run `make generate`")
            return 1
        return 0
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
