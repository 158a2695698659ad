"""The Hugging Face Hub where it does not answer: said at once, and files in the cache are used."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import utils
from huggingface_hub.errors import OfflineModeIsEnabled

from fusewright.errors import RecipeError
from fusewright.train.model import from_pretrained
from fusewright.train.recipe import locate


class _Session:
    """A session of the hub's client, which answers, or fails with a given error."""

    def __init__(self) -> None:
        self.calls = 0
        self.fails: Exception | None = OSError("no route to host")

    def head(self, url: str, timeout: float) -> Any:
        assert url.startswith("http")
        assert timeout <= 15
        self.calls += 1
        if self.fails is not None:
            raise self.fails
        return SimpleNamespace(status_code=404)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> _Session:
    made = _Session()
    monkeypatch.setattr(utils, "get_session", lambda: made)
    monkeypatch.setattr(locate, "_hub", locate._Hub())
    return made


class _Factory:
    """Stands for an Auto class; knows one name."""

    @staticmethod
    def from_pretrained(name: str, **options: Any) -> Any:
        if name != "some/known":
            raise OSError(f"{name} is not there")
        return options


def test_a_model_that_is_not_here(session: _Session) -> None:
    says = r"base_model: a/b is not on this disk, and the .*Hub .* cannot be reached: no route to"
    with pytest.raises(RecipeError, match=says):
        from_pretrained.pretrained(_Factory, "a/b", kind="config")
    assert session.calls == 1


def test_a_model_in_the_cache_is_not_asked_for(session: _Session) -> None:
    found = from_pretrained.pretrained(_Factory, "some/known", kind="other")
    assert found == {"local_files_only": True}
    session.fails = None
    locate._hub.checked_at = float("-inf")
    assert from_pretrained.pretrained(_Factory, "some/known", kind="other") == {}


def test_it_is_asked_once_a_minute_until_it_answers(
    session: _Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    said = [locate.hub_problem() for _ in range(3)]
    assert said[0] is not None
    assert said == [said[0]] * 3
    assert session.calls == 1
    now += 61
    session.fails = None
    assert [locate.hub_problem() for _ in range(3)] == [None] * 3
    now += 61
    session.fails = OSError("gone again")
    assert locate.hub_problem() is None
    assert session.calls == 2


def test_offline_mode_is_said(session: _Session) -> None:
    session.fails = OfflineModeIsEnabled("offline mode is enabled")
    with pytest.raises(RecipeError, match=r"not asked, because HF_HUB_OFFLINE is set; copy"):
        from_pretrained.pretrained(_Factory, "a/b", kind="config")
    found = from_pretrained.pretrained(_Factory, "some/known", kind="other")
    assert found == {"local_files_only": True}
