"""What is said of a check that the doctor's child does not finish; the checks are made up."""

from __future__ import annotations

import re

import pytest

from fusewright.train.doctor import child
from fusewright.train.doctor.child import CHECKS, ask
from fusewright.train.doctor.imports import NEEDED


def make_up(monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    """Let each check run a line, with its name in ``name``."""
    lines = (
        "import json, os, sys, time",
        "for name in sys.argv[2:]:",
        "    print(json.dumps(dict(name=name)), flush=True)",
        f"    {does}",
        "    found = [dict(name=name, value='works', state='ok', note='', mend='', needed=False)]",
        "    print(json.dumps(dict(name=name, found=found)), flush=True)",
    )
    monkeypatch.setattr(child, "_START", "\n".join(lines))


def test_a_crash_recommends_no_package_that_is_named_like_the_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_up(monkeypatch, "os.abort()")
    known = {"torch", "triton", "bitsandbytes"}
    for name in CHECKS:
        (found,) = ask([name], 60)[name]
        assert found["state"] == "broken"
        assert "SIGABRT" in found["note"]
        assert set(re.findall(r"pip \S+ (?:--\S+ )?([\w-]+)", found["mend"])) <= known, name
        assert bool(found["mend"]) is (name != "packages")
        assert found["needed"] is (name.removeprefix("import ") in NEEDED)
    (found,) = ask(["compiler"], 60)["compiler"]
    assert found["mend"].startswith("sudo apt-get install --reinstall g++")
