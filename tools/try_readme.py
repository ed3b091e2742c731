"""Runs the commands under "Start" in README.md as they are written, as someone does who has only Python.

    python tools/try_readme.py [--tests]

The tracked files of this checkout are copied to a temporary folder, and bash runs there with an empty home directory
and a PATH that has this Python and the system's programs, but no uv. Everything is downloaded again (several GB).
`uv run pytest` is left out unless `--tests` is given.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# How this machine reaches a package registry, and its share of the cores; nothing else of its environment is used.
_KEPT = re.compile(
    r"(?i)(https?_proxy|no_proxy|pip_\w+|ssl_cert_\w+|requests_ca_bundle|uv_(default_)?index\w*|omp_num_threads)"
)


def start_commands(readme: str) -> list[str]:
    """The lines of the bash block in the section "Start".

    Raises:
        ValueError: If the section has no such block, or several.
    """
    section = re.split(r"^## ", readme.partition("\n## Start\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    blocks = re.findall(r"^```bash\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    if len(blocks) != 1:
        raise ValueError(f"README.md, section Start: {len(blocks)} blocks of bash, not one")
    return [line for line in blocks[0].splitlines() if line.strip()]


def plain_environment(home: Path) -> dict[str, str]:
    """The environment of a shell in an empty home directory; creates the folder of its Python below it."""
    programs = home / "bin"
    programs.mkdir(parents=True)
    python = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    # Not a link: a Python that is started through a link outside of its folder finds its library by chance.
    (programs / "python3").write_text(f'#!/bin/sh\nexec {shlex.quote(str(python))} "$@"\n')
    (programs / "python3").chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if _KEPT.fullmatch(name)}
    return kept | {"HOME": str(home), "PATH": f"{programs}:/usr/bin:/bin", "LANG": "C.UTF-8"}


def main() -> int:
    """Run the commands; returns the exit code of the first that fails, or 0."""
    parser = argparse.ArgumentParser(description="Runs the commands under Start in README.md without uv.")
    parser.add_argument("--tests", action="store_true", help="also run `uv run pytest`")
    options = parser.parse_args()
    commands = start_commands((ROOT / "README.md").read_text(encoding="utf-8"))
    commands = [line for line in commands if options.tests or line != "uv run pytest"]
    with tempfile.TemporaryDirectory() as scratch:
        checkout = Path(scratch) / "checkout"
        names = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (checkout / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, checkout / name)
        environment = plain_environment(Path(scratch) / "home")
        if found := shutil.which("uv", path=environment["PATH"]):
            raise SystemExit(f"{found}: this machine has uv among the system's programs; try it on one that has not")
        # In one shell, which shows each command before it is run.
        script = "\n".join(["set -ev", *commands])
        return subprocess.run(["bash", "-c", script], cwd=checkout, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
