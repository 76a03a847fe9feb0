"""`antiphon evaluate-rewards` on every form of pairs, in this process and over HTTP, with invalid rows."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import InputError, RewardError
from cluster.scoring import Score, ScoreRequest
from deploy.commands.rewards import evaluate_rewards as module
from deploy.commands.rewards.evaluate_rewards import by_subset, measure_accuracy, parse_columns
from tests.support.chat import assistant, make_tokenizer, user, write_chat_model

PAIRS = [
    {"prompt": "p", "chosen": "aaa", "rejected": "a", "subset": "long"},
    {"prompt": "p", "chosen": "aa", "rejected": "aaaaa", "subset": "short"},
    {"prompt": "p", "chosen": "aa", "rejected": "bb", "subset": "short"},
    {"prompt": "p", "chosen": "aaaa", "rejected": "b", "subset": "long"},
]


class Lengths:
    """Rewards a response by its length, or fails if it contains an x; records the requests."""

    def __init__(self) -> None:
        self.asked: list[ScoreRequest] = []

    async def aclose(self) -> None: ...

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardError]:
        self.asked += requests
        return [
            RewardError("lengths", f"{request.id} has an x")
            if "x" in request.response
            else Score(request.id, float(len(request.response)), {}, "1")
            for request in requests
        ]


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`measure(rows, **options)` returns the report on a file scored by `Lengths`; `asked` has the requests."""
    lengths = Lengths()
    monkeypatch.setattr(module, "reward_source", lambda reward_model, url, scorer: lengths)

    def run(rows: list[Any], **options: Any) -> dict[str, Any]:
        path, report = tmp_path / "pairs.jsonl", tmp_path / "report.json"
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        settings: dict[str, Any] = {
            "reward_model": None,
            "url": "http://x",
            "tokenizer": None,
            "columns": {},
            "strict": False,
        }
        settings["scorer"] = None
        measure_accuracy(path, json_path=report, **(settings | options))
        return {**json.loads(report.read_text()), "asked": lengths.asked}

    return run


def test_accuracy_and_ties_are_reported_by_subset_and_overall(measure: Callable[..., dict[str, Any]]) -> None:
    results = measure(PAIRS)["results"]
    assert list(results) == ["long", "short", "overall"]
    assert {name: (r["num_pairs"], r["accuracy"], r["num_ties"]) for name, r in results.items()} == {
        "long": (2, 1.0, 0),
        "short": (2, 0.25, 1),
        "overall": (4, 0.625, 1),
    }
    assert results["overall"]["margin_mean"] == pytest.approx((2 - 3 + 0 + 3) / 4)


def test_only_the_overall_result_is_reported_without_subsets() -> None:
    assert list(by_subset([1.0], [0.0], [None])) == ["overall"]


def test_invalid_rows_are_left_out_and_listed_by_line(
    measure: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [PAIRS[0], "{not json\n", "\n", {"prompt": "p", "chosen": 3, "rejected": "a"}, PAIRS[1]]
    rows += [{"prompt": "p", "chosen": "x", "rejected": "a"}, {"prompt": "p", "chosen": "a"}]
    report = measure(rows)
    assert report["results"]["overall"]["num_pairs"] == 2
    lines = [(error.partition("pairs.jsonl, ")[2].partition(":")[0]) for error in report["broken"]]
    assert lines == ["line 2", "line 4", "line 7", "line 6"]
    assert "column 'chosen': expected text, got 3" in report["broken"][1]
    assert report["broken"][3].endswith("line 6: lengths: 2-chosen has an x")
    assert "4 rows were left out" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["{not json\n", {"prompt": "p", "chosen": "x", "rejected": "a"}])
def test_an_invalid_row_is_an_error_with_strict(measure: Callable[..., dict[str, Any]], broken: Any) -> None:
    with pytest.raises(InputError, match=r"pairs\.jsonl, line 2"):
        measure([PAIRS[0], broken], strict=True)


def test_it_fails_if_no_pair_can_be_scored(measure: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(InputError, match="no pair could be scored"):
        measure([{"prompt": "p", "chosen": "x", "rejected": "a"}])


def test_columns_can_be_renamed(measure: Callable[..., dict[str, Any]]) -> None:
    row = {"question": "q", "better": "bb", "rejected": "b", "kind": "k", "prompt": "not this"}
    report = measure([row], columns=parse_columns(["prompt=question", "chosen=better", "subset=kind"]))
    assert report["results"]["k"]["accuracy"] == 1.0
    assert {request.prompt for request in report["asked"]} == {"q"}
    for wrong in (["question"], ["prompt=a", "prompt=b"], ["prompt=a", "chosen=a"], ["prompt="]):
        with pytest.raises(InputError, match=r"^--columns: "):
            parse_columns(wrong)


def test_messages_are_rendered_with_the_chat_template(measure: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    row = {"prompt": [user("ab")], "chosen": [assistant("cd")], "rejected": [assistant("c")]}
    with pytest.raises(InputError, match="a tokenizer is needed"):
        measure([row])
    write_chat_model(tmp_path / "model")
    chosen, _ = measure([row], tokenizer=tmp_path / "model")["asked"]
    rendered = make_tokenizer().apply_chat_template([user("ab")], tokenize=False, add_generation_prompt=True)
    assert (chosen.prompt, chosen.response) == (rendered, "cd")


def test_labelled_rows_are_paired(measure: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "p", "completion": text, "label": label} for text, label in (("a", False), ("bb", True), ("c", True))
    ]
    assert measure(rows)["results"]["overall"]["accuracy"] == 1.0
    assert "1 labelled rows have no counterpart" in capsys.readouterr().err


def test_a_reward_model_in_a_folder_gives_its_own_rewards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    folder, path = write_chat_model(tmp_path / "model"), tmp_path / "pairs.parquet"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.save_pretrained(folder)
    rows = [*PAIRS, {"prompt": "p" * 200, "chosen": "a", "rejected": "b", "subset": "long"}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    options: dict[str, Any] = {"url": None, "scorer": None, "tokenizer": None, "columns": {}, "strict": False}
    measure_accuracy(path, reward_model=folder, json_path=tmp_path / "report.json", **options)
    report = json.loads((tmp_path / "report.json").read_text())
    tokenizer, margins = make_tokenizer(), []
    for pair in PAIRS:
        texts = [pair["prompt"] + pair[name] + "<eos>" for name in ("chosen", "rejected")]
        ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
        with torch.no_grad():
            chosen, rejected = (model(input_ids=row).logits.item() for row in ids)
        margins.append(chosen - rejected)
    overall = report["results"]["overall"]
    assert overall["margin_mean"] == pytest.approx(sum(margins) / 4, abs=1e-6)
    assert overall["accuracy"] == sum(margin > 0 for margin in margins) / 4
    assert report["broken"][0].startswith(f"{path}, row 4: ")
    assert "overall" in capsys.readouterr().out


@pytest.fixture
def service() -> Iterator[tuple[str, list[str | None]]]:
    """The URL of a service whose rewards are lengths, and the tokens it received."""
    tokens: list[str | None] = []

    class Face(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            tokens.append(self.headers.get("Authorization"))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            rewards = [
                {"id": i, "reward": float(len(text)), "parts": {}, "error": None}
                for i, text in zip(body["ids"], body["responses"], strict=True)
            ]
            answer = json.dumps({"rewards": rewards, "model_version": "1"}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Face)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", tokens
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_service_receives_the_token(
    service: tuple[str, list[str | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, tokens = service
    monkeypatch.setenv("ANTIPHON_TOKEN", "secret")
    path, report = tmp_path / "pairs.parquet", tmp_path / "report.json"
    pq.write_table(pa.Table.from_pylist(PAIRS), path)
    options: dict[str, Any] = {"reward_model": None, "tokenizer": None, "columns": {}, "strict": False}
    options["scorer"] = None
    measure_accuracy(path, url=url, json_path=report, **options)
    assert json.loads(report.read_text())["results"]["overall"]["accuracy"] == 0.625
    assert set(tokens) == {"Bearer secret"}
