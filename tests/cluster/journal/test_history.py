"""Test the history of a journal: trained steps, the ledger, and what a later command repeated."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cluster.errors import RecorderError
from cluster.journal import events
from cluster.journal.events import Record
from cluster.journal.files import LogFile
from cluster.journal.history import History
from cluster.ledger import PendingGroup, QueueCounts
from cluster.trajectory import PartialResponse, Segment
from tests.cluster.journal.test_recorder import manifest, recorded, ticket, trajectory


def write(folder: Path, *records: Record) -> History:
    numbered = [{"number": number, "time_s": 0.0, **record} for number, record in enumerate(records)]
    log = LogFile(folder / "records-000000.arrows")
    log.append(numbered)
    log.close()
    return History(folder)


def trained(step: int, *groups: int) -> list[Record]:
    return events.train(step, [[trajectory(group)] for group in groups])


def counts(history: History) -> tuple[int, ...]:
    return tuple(asdict(history.counts()).values())[:4]


BEGIN = events.start("one", version=0, group=0, num_steps=4)


def test_a_steps_groups_come_back_in_the_order_they_were_trained_in(tmp_path: Path) -> None:
    history = write(tmp_path, BEGIN, *recorded(0), *recorded(1), *recorded(2), *trained(1, 2, 0), *trained(2, 1))
    assert history.groups(1) == [[replace(trajectory(2), step=1)], [replace(trajectory(0), step=1)]]
    assert history.groups(2) == [[replace(trajectory(1), step=2)]]
    with pytest.raises(RecorderError, match="step 3 is not in the log"):
        history.groups(3)


def test_the_ledger_is_counted_from_the_log(tmp_path: Path) -> None:
    history = write(
        tmp_path,
        BEGIN,
        *recorded(0),
        *recorded(1),
        events.void(ticket(1), "poisoned"),
        *recorded(2),
        *recorded(3),
        *trained(1, 0),
    )
    assert counts(history) == (4, 1, 1, 2)


def test_events_that_a_later_command_repeats_are_dropped(tmp_path: Path) -> None:
    first = [BEGIN, events.publish(manifest(0)), *recorded(0), *trained(1, 0), events.publish(manifest(1))]
    lost = [*recorded(1), *recorded(2), *trained(2, 1), events.publish(manifest(2, "lost"))]
    again = [events.start("two", version=1, group=1, num_steps=6), events.publish(manifest(1, "second")), *recorded(1)]
    history = write(tmp_path, *first, *lost, *again)
    assert history.versions == [0, 1]
    assert counts(history) == (2, 1, 0, 1)
    assert history.lengths == ((0, 4), (1, 6))
    with pytest.raises(RecorderError, match="step 2 is not in the log"):
        history.groups(2)


def test_a_log_that_does_not_say_how_long_its_run_was_to_be_is_read(tmp_path: Path) -> None:
    older = {key: value for key, value in BEGIN.items() if key != "num_steps"}
    assert write(tmp_path, older, *recorded(0), *trained(1, 0)).lengths == ()


def test_settings_of_each_command_come_back_with_the_version_they_follow(tmp_path: Path) -> None:
    first = events.start("one", version=0, group=0, num_steps=4, settings="{}")
    killed = events.start("two", version=1, group=1, num_steps=4, settings='{"lost": 1}')
    again = events.start("three", version=1, group=1, num_steps=4, settings='{"learner": {}}')
    history = write(tmp_path, first, *recorded(0), *trained(1, 0), killed, again, *recorded(1))
    assert history.settings == ((0, "{}"), (1, '{"learner": {}}'))


def test_a_run_resumes_with_nothing_admitted_again(tmp_path: Path) -> None:
    token_ids, logprobs, segments = (
        [5, 6, 7],
        [-1.0, -0.5, -0.25],
        [Segment(3, 0, 2, 11, "a"), Segment(4, 2, 1, 12, "a+1")],
    )
    partial = PartialResponse("7-2-0", token_ids, logprobs, segments)
    history = write(
        tmp_path,
        BEGIN,
        *(*recorded(0), *recorded(1), *trained(1, 0)),
        events.admit(ticket(2)),
        *events.begun((ticket(2), [9], [partial])),
        *(events.admit(ticket(3)), events.void(ticket(3), "poisoned"), events.admit(ticket(4))),
    )
    standing = history.standing(1)
    assert (standing.num_trained, standing.num_void, standing.next_group, standing.next_index) == (1, 1, 5, 5)
    assert standing.ready == ((trajectory(1),),)
    assert standing.open == (PendingGroup(2, 2, (replace(partial, given=[[9], []]),)), PendingGroup(4, 4))
    assert standing.vacant == (3,)


def test_a_conversation_is_kept_with_what_others_said_in_it(tmp_path: Path) -> None:
    segments = [Segment(3, 0, 2, 11, "a"), Segment(3, 2, 1, 12, "a"), Segment(4, 3, 1, 13, "a+1")]
    partial = PartialResponse("7-0-0", [5, 6, 7, 8], [-1.0, -0.5, -0.25, -0.125], segments, None, [[9], [], [1, 2]])
    history = write(tmp_path, BEGIN, events.admit(ticket(0)), *events.begun((ticket(0), [9], [partial])))
    assert history.standing(1).open == (PendingGroup(0, 0, (partial,)),)


def test_a_group_is_finished_once_all_its_responses_are_scored(tmp_path: Path) -> None:
    (group,) = write(tmp_path, BEGIN, *recorded(0)).standing(2).open
    assert [(response.uid, response.finish_reason) for response in group.begun] == [("7-0-0", "length")]


def test_a_versions_checksums_are_those_it_was_published_with_last(tmp_path: Path) -> None:
    other = events.publish(manifest(1, "rebuilt")) | {"checksums": [("w", "other")]}
    history = write(tmp_path, BEGIN, events.publish(manifest(0)), events.publish(manifest(1)), other)
    assert [history.checksums(version) for version in (0, 1)] == [{"w": "sum-0"}, {"w": "other"}]


def test_resampled_groups_are_counted_apart_and_by_place(tmp_path: Path) -> None:
    first, second = ticket(0), replace(ticket(1), admission_index=0)
    records = [
        record for each in (first, second) for record in (events.admit(each), events.void(each, events.EQUAL_REWARDS))
    ]
    history = write(tmp_path, BEGIN, *records, events.admit(ticket(2)), events.void(ticket(2), "poisoned"))
    assert history.counts() == QueueCounts(3, 0, 3, 0, num_resampled=2)
    standing = history.standing(1)
    assert (standing.num_void, standing.num_resampled, dict(standing.resampled)) == (3, 2, {0: 2})
    (tmp_path / "again").mkdir()
    again = write(tmp_path / "again", BEGIN, *records, events.start("two", version=0, group=1, num_steps=4))
    assert again.counts() == QueueCounts(1, 0, 1, 0, num_resampled=1)
