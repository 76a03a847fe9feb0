"""Every error a person may see. Each says where (a key, file or part) and what, and the command's exit code."""

from __future__ import annotations

from collections.abc import Sequence


class AntiphonError(Exception):
    """Base of the tree; printed as ``error: WHERE: WHAT``. Pickles by its two arguments, so it crosses Ray."""

    exit_code = 1

    def __init__(self, where: str, what: str) -> None:
        super().__init__(where, what)
        self.where = where
        self.what = what

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class InputError(AntiphonError):
    """The user's settings, files or arguments are wrong; nothing was started."""

    exit_code = 2


class ActorDied(AntiphonError):
    """A process that the run needs is gone; `where` is its name."""


class DeadlineExceeded(AntiphonError):
    """A wait passed its deadline; `what` names whom it waited for."""


class TrajectoryRefused(AntiphonError):
    """A trajectory broke a rule of the record or of the queue; `where` is its uid."""


class GroupsVoided(AntiphonError):
    """More groups were given up than the run allows; `where` is the last one's first uid."""


class RewardError(AntiphonError):
    """A reward could not be had; `where` is the scorer or the service."""


class RewardUnavailable(RewardError):
    """A reward could not be had now and may be had later: its service is down, busy, silent or answers nonsense.

    `retry_after_s` is how long the service asked to be left alone, where it did.
    """

    def __init__(self, where: str, what: str, retry_after_s: float | None = None) -> None:
        super().__init__(where, what)
        self.args = (where, what, retry_after_s)
        self.retry_after_s = retry_after_s


class NotApplicable(RewardError):
    """A scorer says that it does not judge this item; a composite leaves its part out."""


class EnvironmentFault(AntiphonError):
    """An environment raised, hung or gave something else than its protocol says; `where` is its file and line."""


class WeightsRefused(AntiphonError):
    """Weights that arrived are not the weights that were published; `where` is the tensor or the actor."""


class WeightsLost(WeightsRefused):
    """Weights that were published went with the process that held them; `where` is their version."""


class EngineError(AntiphonError):
    """A generation engine failed or disagrees with the weights it claims; `where` is the actor."""


class LearnerError(AntiphonError):
    """The learner group failed; `where` is the rank, the group or some of the trajectories.

    `uids` are all the trajectories that it is about.
    """

    def __init__(self, where: str, what: str, *, uids: Sequence[str] = ()) -> None:
        super().__init__(where, what)
        self.uids = tuple(uids)


class LearnerDied(LearnerError):
    """A learner's process is gone; `where` is its rank."""


class RecorderError(AntiphonError):
    """The log of a run cannot be written or read, or it holds something else than what happened; `where` is its
    file, or what a record is about."""


class FeedbackRefused(AntiphonError):
    """Feedback that cannot be stored as it is; `where` is the field that is wrong."""


class FeedbackConflict(FeedbackRefused):
    """Feedback that contradicts what is stored."""


class FeedbackUnknown(FeedbackRefused):
    """Feedback that is not there."""


class FeedbackUnavailable(AntiphonError):
    """The store of feedback cannot write or read now (another process holds it, the disk is full); `where` is its
    file."""
