"""Errors quote texts of users' functions: whatever those hold, journal and terminal can write the error."""

from __future__ import annotations

import pickle

from cluster.errors import AntiphonError, EnvironmentFault, RewardUnavailable


def test_an_error_has_no_lone_surrogate() -> None:
    fault = EnvironmentFault("env.py:3", "step raised ValueError: \udce9")
    assert str(fault) == "env.py:3: step raised ValueError: \ufffd"
    assert str(AntiphonError("caf\u00e9 \U0001f600", "\ud83d")) == "caf\u00e9 \U0001f600: \ufffd"


def test_an_error_travels_with_its_texts() -> None:
    error = pickle.loads(pickle.dumps(RewardUnavailable("judge", "busy \ud800", 2.0)))  # noqa: S301
    assert (str(error), error.retry_after_s) == ("judge: busy \ufffd", 2.0)
