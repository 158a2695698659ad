"""Make a release: version, changelog, source distribution, wheel, checksums, commit and tag.

    python .ci/release.py 0.2.0               # signed where Git has a key (user.signingkey)
    python .ci/release.py 0.2.0 --shared      # tries the artifacts with the packages installed here

It needs a clean tree, the package ``build``, and entries under [Unreleased] in CHANGELOG.md. What
it changes is taken back where a step fails. Nothing is pushed or uploaded: the last line says how.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_DIST = ROOT / "dist"
_RECIPE = ".ci/conda/recipe.yaml"
_VERSIONS = {
    "pyproject.toml": r'(?m)^(version = ")[^"]+(")',
    "src/__init__.py": r'(?m)^(__version__ = ")[^"]+(")',
    "README.md": r"(?m)^(Version )\d\S*(,)",
    _RECIPE: r'(?m)^(  version: ")[^"]+(")',
}
"""Where the version is written: a pattern around it."""


def main() -> None:
    """Make the release that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("version")
    parser.add_argument("--shared", action="store_true")
    arguments = parser.parse_args()
    version = arguments.version
    if _git("status", "--porcelain"):
        sys.exit("the tree has changes that are not committed: a release is what is committed")
    if _git("tag", "--list", f"v{version}"):
        sys.exit(f"there is a tag v{version}")
    before = _git("rev-parse", "HEAD")
    try:
        write_version(ROOT, version, datetime.date.today().isoformat())
        artifacts = _build(version)
        smoke = [sys.executable, ".ci/smoke.py", *map(str, artifacts)]
        _run(*smoke, *(["--shared"] if arguments.shared else []))
        write_checksum_of_source(ROOT, next(a for a in artifacts if a.suffix == ".gz"))
        key = _git("config", "user.signingkey", check=False)
        sums = _sums(artifacts, key)
        _git("commit", "--all", "--message", f"Release {version}", *(["--gpg-sign"] if key else []))
        sign = "--sign" if key else "--annotate"
        _git("tag", sign, f"v{version}", "--message", f"fusewright {version}")
    except BaseException:
        _git("reset", "--hard", before)  # the tag comes last, so that there is none
        raise
    uploaded = " ".join(f"dist/{a.name}" for a in artifacts)
    print(
        f"fusewright {version}: tagged v{version}, {'signed' if key else 'not signed: no key'}\n"
        f"  {' '.join(a.name for a in (*artifacts, *sums))} in dist/\n"
        f"to publish: git push --follow-tags && twine upload {uploaded}"
    )


def write_version(root: Path, version: str, date: str) -> None:
    """Write a version wherever it is, and close the section of the changelog under it."""
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        sys.exit(f"{version} is no version: 1.2.3 or 1.2.3rc1")
    for name, pattern in _VERSIONS.items():
        _edit(root / name, pattern, lambda m: f"{m[1]}{version}{m[2]}")
    _edit(
        root / "CHANGELOG.md",
        r"(?m)^## \[Unreleased\]\n(?=\s*###)",
        lambda m: f"## [Unreleased]\n\n## [{version}] - {date}\n",
    )


def write_checksum_of_source(root: Path, source: Path) -> None:
    """Write the checksum of the source distribution into the recipe."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    _edit(root / _RECIPE, r'(?m)^(  sha256: ")[^"]+(")', lambda m: f"{m[1]}{digest}{m[2]}")


def _edit(path: Path, pattern: str, replace: Callable[[re.Match[str]], str]) -> None:
    text = path.read_text(encoding="utf-8")
    changed, count = re.subn(pattern, replace, text)
    if count != 1:
        sys.exit(f"{path}: {count} places look like {pattern}; there must be one")
    path.write_text(changed, encoding="utf-8")


def _build(version: str) -> list[Path]:
    shutil.rmtree(_DIST, ignore_errors=True)
    _run(sys.executable, "-m", "build", "--outdir", str(_DIST), str(ROOT))
    artifacts = sorted(_DIST.iterdir())
    if len(artifacts) != 2 or not all(f"-{version}" in a.name for a in artifacts):
        sys.exit(f"built {', '.join(a.name for a in artifacts)}")
    return artifacts


def _sums(artifacts: list[Path], key: str) -> list[Path]:
    """The file of checksums, and its signature where there is a key."""
    sums = _DIST / "SHA256SUMS"
    lines = (f"{hashlib.sha256(a.read_bytes()).hexdigest()}  {a.name}\n" for a in artifacts)
    sums.write_text("".join(lines), encoding="utf-8")
    if not key:
        return [sums]
    _run("gpg", "--batch", "--yes", "--local-user", key, "--armor", "--detach-sign", str(sums))
    return [sums, sums.with_suffix(".asc")]


def _git(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        sys.exit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")


if __name__ == "__main__":
    main()
