"""Calls a user's Python scorer by its signature: that of TRL, OpenRLHF, verl or Antiphon.

The names of the parameters decide the signature, in this order:

- `prompts` and `responses` as the first two: Antiphon's, see the last entry;
- `solution_str` and `ground_truth`: verl's `compute_score(data_source, solution_str, ground_truth, extra_info)`, called
  once per item; returns a number, or a dict of `score`, the reward, and other finite numbers, the parts;
- `solution_strs` and `ground_truths`: verl's function for a batch, with lists `data_sources` and `extra_infos`;
- `queries`: OpenRLHF's `reward_func(queries, prompts, labels)`, where a query is prompt + response; returns a list, a
  tensor or a dict of `rewards`, `scores` and `extra_logs`;
- `completions` or `completion_ids`: TRL's `f(prompts, completions, completion_ids, trainer_state, log_extra,
  log_metric, **columns)`; returns a list of numbers, None if it does not apply. If the prompts are messages (column
  `messages`), prompts are lists of messages, and a completion is a list of one assistant message, or the messages of a
  conversation behind its prompt;
- anything else: Antiphon's `f(prompts, responses, **columns)`, the first two by position, or by name if the function
  does not take two by position; returns a list of numbers.

Each may be sync or async. A data column is passed if the function names it or takes `**columns`; a row without it has
None. A column with the name of one of the arguments above is not passed. Labels are the column `labels`, else `label`,
else `references`; ground truth is `ground_truth`, else verl's `reward_model.ground_truth`, else `references`. Every
item gets its own copy of its columns.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.scoring import ScoreRequest
from reward_service.functions.results import SignatureMismatch

Kind = Literal["ours", "trl", "openrlhf", "verl", "verl_batch"]
MESSAGES, COMPLETION_IDS, CONVERSATION, TRAINER_STATE = "messages", "completion_ids", "conversation", "trainer_state"
OF_RUNS = (MESSAGES, COMPLETION_IDS, CONVERSATION, "finish_reason")
"""Columns that a run adds to those of the data."""
PASSED: dict[Kind, tuple[str, ...]] = {
    "ours": ("prompts", "responses"),
    "trl": ("prompts", "completions", COMPLETION_IDS, TRAINER_STATE, "log_extra", "log_metric"),
    "openrlhf": ("queries", "prompts", "labels"),
    "verl": ("data_source", "solution_str", "ground_truth", "extra_info"),
    "verl_batch": ("data_sources", "solution_strs", "ground_truths", "extra_infos"),
}
"""The arguments of each signature besides data columns."""


@dataclass(frozen=True)
class ColumnParameters:
    """The parameters of a function that take data columns by name."""

    texts: frozenset[str]
    """Leading parameters that take texts by position."""
    named: Mapping[str, bool]
    """The other parameters, each with whether it is required."""
    takes_all: bool
    """Whether the function has `**columns`."""

    def takes(self, name: str) -> bool:
        """Return whether the function takes a column of that name."""
        return name not in self.texts and (self.takes_all or name in self.named)


def column_parameters(function: Callable[..., Any], *, num_texts: int) -> ColumnParameters:
    """Read which columns a function takes; its first `num_texts` parameters take texts by position."""
    return _column_parameters(inspect.signature(function), num_texts)


def _column_parameters(signature: inspect.Signature, num_texts: int) -> ColumnParameters:
    parameters = list(signature.parameters.values())
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    plain = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    named = {p.name: p.default is p.empty for p in plain[num_texts:]}
    return ColumnParameters(frozenset(p.name for p in plain[:num_texts]), named, takes_all)


def required_columns(signature: inspect.Signature, *, num_texts: int) -> list[str]:
    """Return the columns without which a function can't be called; its first `num_texts` parameters take texts."""
    return [name for name, required in _column_parameters(signature, num_texts).named.items() if required]


def signature_kind(function: Callable[..., Any]) -> Kind:
    """Return whose signature the function has, by the names of its parameters."""
    return kind_of(inspect.signature(function))


def kind_of(signature: inspect.Signature) -> Kind:
    """Return whose signature it is, by the names of its parameters."""
    names = tuple(signature.parameters)
    if names[:2] == PASSED["ours"]:
        return "ours"
    if {"solution_str", "ground_truth"} <= set(names):
        return "verl"
    if {"solution_strs", "ground_truths"} <= set(names):
        return "verl_batch"
    if "queries" in names:
        return "openrlhf"
    return "trl" if {"completions", COMPLETION_IDS} & set(names) else "ours"


def num_texts_of(signature: inspect.Signature) -> int:
    """Return how many arguments are passed by position: two to a function of Antiphon's that takes two, else none."""
    if kind_of(signature) != "ours":
        return 0
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    by_position = [
        k for k in kinds if k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ]
    return 2 if len(by_position) >= 2 or inspect.Parameter.VAR_POSITIONAL in kinds else 0


def check_fit(signature: inspect.Signature, columns: Collection[str]) -> None:
    """Raise SignatureMismatch if a call with these data columns can't fit the signature."""
    kind, num_texts = kind_of(signature), num_texts_of(signature)
    parameters = _column_parameters(signature, num_texts)
    if kind == "ours" and not num_texts and not parameters.takes("responses"):
        raise SignatureMismatch("takes neither two texts by position nor the argument responses")
    arguments = () if num_texts else PASSED[kind]
    known = {*arguments} if kind in ("verl", "verl_batch") else {*arguments, *columns}
    missing = [name for name in required_columns(signature, num_texts=num_texts) if name not in known]
    if missing:
        given = ", ".join(sorted(known)) or "no columns"
        raise SignatureMismatch(f"needs {', '.join(map(repr, missing))}; there is {given}")


@dataclass(frozen=True)
class TrainerState:
    """What TRL calls `trainer_state`, as far as a run knows it when it scores a response."""

    global_step: int
    """Number of training steps before the one that trains the response."""
    max_steps: int
    """Number of the run's last step."""


@dataclass
class Call:
    """One call of a function: the items that it scores, its arguments, and what it logged."""

    positions: Sequence[int]
    positional: Sequence[Any]
    named: dict[str, Any]
    logs: dict[str, Any]


@dataclass(frozen=True)
class Unfit:
    """A call that can't be made: the items that it would score, and why."""

    positions: Sequence[int]
    what: str


class CallBuilder:
    """Makes the calls that score requests with a function in its signature.

    Raises SignatureMismatch if the function's parameters can't be read.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        try:
            self._signature = inspect.signature(function)
        except (TypeError, ValueError) as error:
            raise SignatureMismatch(f"its parameters can't be read ({error})") from error
        self.kind = kind_of(self._signature)
        self._by_position = num_texts_of(self._signature)
        self._parameters = _column_parameters(self._signature, self._by_position)
        self._bound = _bound_names(function)

    def calls(self, requests: Sequence[ScoreRequest]) -> list[Call | Unfit]:
        """Return the calls that score the requests; `Unfit` in place of a call that can't be made.

        A verl function is called once per item, a function that takes TRL's state once per step, others once.
        """
        if self.kind == "verl":
            groups = [[position] for position in range(len(requests))]
        elif self.kind == "trl" and self._parameters.takes(TRAINER_STATE):
            groups = _by_state(requests)
        else:
            groups = [list(range(len(requests)))]
        return [self._call(requests, positions) for positions in groups]

    def _call(self, requests: Sequence[ScoreRequest], positions: Sequence[int]) -> Call | Unfit:
        logs: dict[str, Any] = {}
        items = [requests[position] for position in positions]
        try:
            arguments = self._arguments(items, logs)
            check_fit(self._signature, {name for item in items for name in item.columns})
        except SignatureMismatch as error:
            return Unfit(positions, str(error))
        columns = {} if self.kind in ("verl", "verl_batch") else self._columns(items)
        positional = [arguments.pop(name) for name in PASSED["ours"][: self._by_position]]
        named = {name: value for name, value in arguments.items() if self._takes(name)}
        return Call(positions, positional, columns | named, logs)

    def _takes(self, name: str) -> bool:
        return self._parameters.takes(name) and name not in self._bound

    def _arguments(self, items: Sequence[ScoreRequest], logs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments besides data columns."""
        prompts, responses = [item.prompt for item in items], [item.response for item in items]
        if self.kind == "ours":
            return {"prompts": prompts, "responses": responses}
        if self.kind == "trl":
            return self._trl_arguments(items, logs)
        if self.kind == "openrlhf":
            queries = [item.prompt + item.response for item in items]
            return {"queries": queries, "prompts": prompts, "labels": [_copied(_label(item)) for item in items]}
        rows = [_verl_arguments(item) for item in items]
        if self.kind == "verl":
            return rows[0]
        return {f"{name}s": [row[name] for row in rows] for name in PASSED["verl"]}

    def _trl_arguments(self, items: Sequence[ScoreRequest], logs: dict[str, Any]) -> dict[str, Any]:
        """Return TRL's arguments. Raises SignatureMismatch without the token ids that the function requires."""

        def log_extra(column: str, values: Sequence[Any]) -> None:
            logs[column] = list(values)

        def log_metric(name: str, value: Any) -> None:
            logs[name] = value

        arguments: dict[str, Any] = {
            TRAINER_STATE: _trainer_state(items[0]),
            "log_extra": log_extra,
            "log_metric": log_metric,
        }
        if all(item.columns.get(MESSAGES) for item in items):
            arguments["prompts"] = [_copied(item.columns[MESSAGES]) for item in items]
            arguments["completions"] = [_completion(item) for item in items]
        else:
            arguments["prompts"] = [item.prompt for item in items]
            arguments["completions"] = [item.response for item in items]
        if all(item.columns.get(COMPLETION_IDS) is not None for item in items):
            arguments[COMPLETION_IDS] = [list(item.columns[COMPLETION_IDS]) for item in items]
        elif self._parameters.named.get(COMPLETION_IDS):
            raise SignatureMismatch("needs completion_ids, and an item has no column completion_ids")
        return arguments

    def _columns(self, items: Sequence[ScoreRequest]) -> dict[str, list[Any]]:
        """Return the columns that the function takes: one value per item, None if missing."""
        names = dict.fromkeys(name for item in items for name in item.columns if name not in PASSED[self.kind])
        return {
            name: [_copied(item.columns.get(name)) for item in items]
            for name in names
            if name != TRAINER_STATE and self._takes(name)
        }


def _copied(value: Any) -> Any:
    """Return a deep copy; plain data is copied several times faster than by `copy.deepcopy`."""
    if value is None or isinstance(value, str | int | float):
        return value
    if type(value) is list:
        return [_copied(each) for each in value]
    if type(value) is dict:
        return {key: _copied(each) for key, each in value.items()}
    return copy.deepcopy(value)


def _completion(item: ScoreRequest) -> list[Any]:
    """Return the messages behind the prompt: those of the conversation if there was one, else the response."""
    messages, conversation = item.columns[MESSAGES], item.columns.get(CONVERSATION) or []
    if len(conversation) > len(messages) and list(conversation[: len(messages)]) == list(messages):
        return [_copied(message) for message in conversation[len(messages) :]]
    return [{"role": "assistant", "content": item.response}]


def _bound_names(function: Any) -> frozenset[str]:
    """Return the names that a call must not use: `self` of a method, keywords that a partial has set."""
    if isinstance(function, functools.partial):
        return frozenset(function.keywords) | _bound_names(function.func)
    if inspect.ismethod(function):
        return frozenset(list(inspect.signature(function.__func__).parameters)[:1])
    if inspect.isroutine(function):
        return frozenset()
    return _bound_names(function.__call__)


def _by_state(requests: Sequence[ScoreRequest]) -> list[list[int]]:
    """Return the positions of requests with the same trainer state, together."""
    groups: dict[TrainerState | None, list[int]] = {}
    for position, request in enumerate(requests):
        groups.setdefault(_trainer_state(request), []).append(position)
    return list(groups.values())


def _trainer_state(request: ScoreRequest) -> TrainerState | None:
    """Return the state in the column `trainer_state`, which runs add; None outside of a run."""
    state = request.columns.get(TRAINER_STATE)
    if not isinstance(state, Mapping):
        return None
    return TrainerState(int(state.get("global_step", 0)), int(state.get("max_steps", 0)))


def _label(request: ScoreRequest) -> Any:
    return next((request.columns[name] for name in ("labels", "label", "references") if name in request.columns), None)


def _verl_arguments(request: ScoreRequest) -> dict[str, Any]:
    """Return verl's arguments of an item. Raises SignatureMismatch without a ground truth."""
    truth = _ground_truth(request)
    if truth is None:
        what = (
            "needs a ground truth, and the item has neither ground_truth nor references nor reward_model.ground_truth"
        )
        raise SignatureMismatch(what)
    extra = request.columns.get("extra_info")
    conversation = request.columns.get(CONVERSATION)
    arguments = {
        "data_source": request.columns.get("data_source", ""),
        "solution_str": request.response,
        "ground_truth": truth,
        "extra_info": {
            **(extra if isinstance(extra, Mapping) else {}),
            "num_turns": len(conversation) if conversation else None,
            "rollout_reward_scores": {},
        },
    }
    return {name: _copied(value) for name, value in arguments.items()}


def _ground_truth(request: ScoreRequest) -> Any:
    """Return verl's ground truth: the column of that name, else the one inside `reward_model`, else `references`."""
    nested = request.columns.get("reward_model")
    inner = nested.get("ground_truth") if isinstance(nested, Mapping) else None
    own = request.columns.get("ground_truth")
    return next((each for each in (own, inner) if each is not None), request.columns.get("references"))
