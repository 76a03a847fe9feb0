"""Define every error that a user may see. Each names where (a key, file or part), what, and the exit code.

AntiphonError
├── InputError                          exit code 2; all others 1
├── ActorDied, DeadlineExceeded
├── TrajectoryRefused, GroupsVoided
├── RewardError
│   ├── RewardUnavailable
│   ├── NotApplicable
│   └── BatchFailed
├── EnvironmentFault, EngineError
├── WeightsRefused
│   └── WeightsLost
├── LearnerError
│   └── LearnerDied
├── RecorderError
├── FeedbackRefused
│   ├── FeedbackConflict
│   └── FeedbackUnknown
└── FeedbackUnavailable
"""

from __future__ import annotations

from collections.abc import Sequence


class AntiphonError(Exception):
    """Base of the tree; printed as ``error: WHERE: WHAT``. Pickles by its two arguments, so it crosses Ray.

    Replaces lone surrogates, which a quoted function may have: neither journal nor terminal can hold them.
    """

    exit_code = 1

    def __init__(self, where: str, what: str) -> None:
        where, what = _unicode(where), _unicode(what)
        super().__init__(where, what)
        self.where = where
        self.what = what

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def _unicode(text: str) -> str:
    """Return the text with U+FFFD in place of each lone surrogate."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message, where a traceback has its cause; else its type's name."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


class InputError(AntiphonError):
    """The user's settings, files or arguments are wrong; nothing was started."""

    exit_code = 2


class ActorDied(AntiphonError):
    """A process that the run needs has died; `where` is its name."""


class DeadlineExceeded(AntiphonError):
    """A wait passed its deadline; `what` names what it waited for."""


class TrajectoryRefused(AntiphonError):
    """A trajectory broke a rule of the record or of the queue; `where` is its uid."""


class GroupsVoided(AntiphonError):
    """More groups were voided than the run allows; `where` is the first uid of the last one."""


class RewardError(AntiphonError):
    """A response could not be scored; `where` is the scorer or the service."""


class RewardUnavailable(RewardError):
    """A response could not be scored now; a retry may succeed: the service is down, busy, silent or wrong.

    `retry_after_s` is how long the service asked clients to wait, or None.
    """

    def __init__(self, where: str, what: str, retry_after_s: float | None = None) -> None:
        super().__init__(where, what)
        self.args = (where, what, retry_after_s)
        self.retry_after_s = retry_after_s


class NotApplicable(RewardError):
    """A scorer does not apply to this response; a composite leaves its part out."""


class BatchFailed(RewardError):
    """A scorer failed on several responses at once; it may be able to score some of them alone."""


class EnvironmentFault(AntiphonError):
    """An environment raised, hung or broke its protocol; `where` is its file and line."""


class WeightsRefused(AntiphonError):
    """Weights that arrived differ from those published; `where` is the tensor or the actor."""


class WeightsLost(WeightsRefused):
    """Published weights were lost with the process that held them; `where` is their version."""


class EngineError(AntiphonError):
    """A generation engine failed or disagrees with the weights it claims; `where` is the actor."""


class LearnerError(AntiphonError):
    """The learner group failed; `where` is the rank, the group or some of the trajectories.

    `uids` are all the trajectories concerned.
    """

    def __init__(self, where: str, what: str, *, uids: Sequence[str] = ()) -> None:
        super().__init__(where, what)
        self.uids = tuple(uids)


class LearnerDied(LearnerError):
    """A learner's process has died; `where` is its rank."""


class RecorderError(AntiphonError):
    """A run's journal cannot be written or read, or contradicts itself; `where` is its file or the record's subject."""


class FeedbackRefused(AntiphonError):
    """Feedback that is invalid; `where` is the wrong field."""


class FeedbackConflict(FeedbackRefused):
    """Feedback that contradicts what is stored."""


class FeedbackUnknown(FeedbackRefused):
    """Feedback that does not exist."""


class FeedbackUnavailable(AntiphonError):
    """The feedback store cannot be read or written now (locked, disk full); `where` is its file."""
