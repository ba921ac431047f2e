"""Record mlx-lm's signatures from its wheels on PyPI.

    python compat/record.py 0.33.0        add a release to signatures.json, or refresh it
    python compat/record.py --all         every row of matrix.toml
    python compat/record.py --all --check compare only; exit 1 on a difference

Exit status 2 means that a wheel could not be fetched or read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

# Run as a script, so that this folder is on sys.path.
from mlx_optiq_compat import rows, source
from mlx_optiq_compat import signature as sig
from mlx_optiq_compat.version import release


class FetchError(Exception):
    """A wheel could not be downloaded or read."""


def fetch(version: str) -> dict[str, str]:
    """Download one wheel and read its signatures.

    Returns:
        Target to signature.

    Raises:
        FetchError: pip found no wheel, or it holds no mlx_lm that this Python can parse.
    """
    with tempfile.TemporaryDirectory() as folder:
        requirement = f"mlx-lm=={version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", folder, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(folder).glob("mlx_lm-*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines()
            raise FetchError(f"cannot fetch {requirement}: {lines[-1] if lines else 'no wheel'}")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                wheel.extractall(folder)
            found = source.package_signatures(Path(folder, "mlx_lm"))
        except (zipfile.BadZipFile, SyntaxError) as error:
            raise FetchError(f"cannot read {wheels[0].name}: {error}") from error
        if not found:
            raise FetchError(f"{wheels[0].name} holds none of the modules to record")
        return found


def collapse(by_release: Mapping[str, Mapping[str, str]]) -> tuple[tuple[str, ...], sig.Recorded]:
    """Turn one table per release into the layout of signatures.json.

    Args:
        by_release: Release to target to signature.

    Returns:
        The releases, oldest first, and target to signature to spans of releases.
    """
    releases = tuple(sorted(by_release, key=release))
    holders: dict[str, dict[str, list[str]]] = {}
    for version in releases:
        for target, signature in by_release[version].items():
            holders.setdefault(target, {}).setdefault(signature, []).append(version)
    return releases, {
        target: {text: sig.spans(versions, releases) for text, versions in each.items()}
        for target, each in sorted(holders.items())
    }


def render(releases: Sequence[str], signatures: sig.Recorded) -> str:
    """The text of signatures.json: a line per target, and a line per signature where it changed."""
    blocks: list[str] = []
    for target, each in signatures.items():
        pairs = [f"{json.dumps(text)}: {json.dumps(span)}" for text, span in each.items()]
        steady = len(pairs) == 1
        inner = f"{{{pairs[0]}}}" if steady else "{\n   " + ",\n   ".join(pairs) + "\n  }"
        blocks.append(f"  {json.dumps(target)}: {inner}")
    body = ",\n".join(blocks)
    return f'{{\n "releases": {json.dumps(list(releases))},\n "signatures": {{\n{body}\n }}\n}}\n'


def differences(version: str, old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """One line per target whose recorded signature is not the wheel's."""
    return [
        f"mlx-lm {version}: {target} is {new.get(target, 'missing')}, "
        f"recorded as {old.get(target, 'missing')}"
        for target in sorted({*old, *new})
        if old.get(target) != new.get(target)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when done or equal, 1 when ``--check`` found a difference, 2 when a wheel is missing.
    """
    parser = argparse.ArgumentParser(description="Record mlx-lm's signatures from its wheels.")
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="an mlx-lm release")
    parser.add_argument("--all", action="store_true", help="every row of matrix.toml")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args(argv)
    versions = args.versions + ([row.mlx_lm for row in rows()] if args.all else [])
    if not versions:
        parser.error("name a release, or use --all")

    by_release = {each: sig.of_release(each) for each in sig.recorded()[0]}
    changes: list[str] = []
    for version in versions:
        try:
            fresh = fetch(version)
        except FetchError as error:
            print(f"record.py: {error}", file=sys.stderr)
            return 2
        changes += differences(version, by_release.get(version, {}), fresh)
        by_release[version] = fresh
        print(f"mlx-lm {version}: {len(fresh)} signatures", flush=True)

    if args.check:
        print(*changes or ["signatures.json is up to date"], sep="\n")
        return 1 if changes else 0
    sig.FILE.write_text(render(*collapse(by_release)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
