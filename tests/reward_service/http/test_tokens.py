from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from cluster.errors import InputError
from reward_service.config.service import HttpConfig, RewardServiceConfig
from reward_service.http.tokens import TokenBook, add_token, read_tokens, revoke_token, token_book, with_tokens


def test_tokens_are_accepted_as_bearer_and_as_password(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    token = add_token(path, "ana")
    book = TokenBook("own", path)
    assert book.name_of(b"Bearer own") == "ANTIPHON_TOKEN"
    assert book.name_of(f"bearer {token}".encode()) == "ana"
    assert book.name_of(b"Basic " + base64.b64encode(f"anyone:{token}".encode())) == "ana"
    for wrong in (b"", b"Bearer", b"Bearer ", b"Bearer ow", b"Basic own", b"Basic !", b"Digest own", b"own"):
        assert book.name_of(wrong) is None


def test_file_has_digests_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    token = add_token(path, "ana")
    assert token not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_tokens_can_be_added_and_revoked_while_the_service_runs(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    ana = add_token(path, "ana")
    book = TokenBook(None, path)
    bob = add_token(path, "bob")
    assert book.name_of(f"Bearer {bob}".encode()) == "bob"
    revoke_token(path, "ana")
    revoke_token(path, "bob")
    assert book.name_of(f"Bearer {ana}".encode()) is None
    assert book.is_required


def test_token_can_be_required_before_one_exists(tmp_path: Path) -> None:
    assert TokenBook(None, tmp_path / "none.json", is_required=True).is_required


def test_token_is_required_if_the_settings_name_a_file(tmp_path: Path) -> None:
    own = with_tokens(RewardServiceConfig(), tmp_path)
    assert (own.http.tokens, own.http.require_token) == (tmp_path / "tokens.json", False)
    assert not token_book(own, None).is_required
    named = with_tokens(RewardServiceConfig(http=HttpConfig(tokens=Path("t.json"))), tmp_path)
    assert (named.http.tokens, named.http.require_token) == (Path("t.json").absolute(), True)
    assert token_book(named, None).is_required
    add_token(tmp_path / "tokens.json", "ana")
    assert token_book(own, None).is_required


def test_no_token_is_required_if_none_exists(tmp_path: Path) -> None:
    assert not TokenBook(None, tmp_path / "none.json").is_required


def test_invalid_token_file_admits_no_caller(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    ana = add_token(path, "ana")
    book = TokenBook(None, path)
    for wrong in ("[]", "{", '{"tokens": {"a": "short"}}', '{"tokens": []}', "null"):
        path.write_text(wrong)
        with pytest.raises(InputError, match="not a token file"):
            TokenBook(None, path)
        assert book.name_of(f"Bearer {ana}".encode()) is None
    path.write_text(json.dumps({"tokens": {}}))
    assert read_tokens(path) == {}


def test_token_names_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    add_token(path, "ana")
    for name, what in (
        ("ana", "already"),
        ("", "not a valid"),
        ("a b", "not a valid"),
        ("ANTIPHON_TOKEN", "not a valid"),
    ):
        with pytest.raises(InputError, match=what):
            add_token(path, name)
    with pytest.raises(InputError, match="no token 'bob'"):
        revoke_token(path, "bob")
