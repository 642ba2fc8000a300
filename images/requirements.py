"""Print the requirements of some extras of pyproject.toml, one a line: `requirements.py pyproject.toml runtime,operator`."""

import sys
import tomllib


def requirements(pyproject: str, extras: list[str]) -> list[str]:
    """The build system's requirements, the base dependencies and those of `extras`. Raises KeyError on an unknown extra."""
    with open(pyproject, "rb") as file:
        document = tomllib.load(file)
    project = document["project"]
    found = [*document["build-system"]["requires"], *project["dependencies"]]
    for extra in extras:
        found += project["optional-dependencies"][extra]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print("\n".join(requirements(sys.argv[1], sys.argv[2].split(","))))
