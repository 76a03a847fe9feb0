"""Checks after every swap that an engine holds the weights of its version.

The manifest contains the learner's log-probabilities on the probe prompts; the engine computes them again after the
swap. Pure arithmetic.
"""

from __future__ import annotations

from enum import StrEnum

from cluster.errors import EngineError
from cluster.weights.manifest import Manifest, Probe

TOLERANCE_FLOOR = {"float32": 5e-6, "float16": 2e-3, "bfloat16": 1e-2}
"""Smallest tolerance, relative to the largest |log-probability| of the probe."""
NOISE_CEILING = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest noise at the first swap, also relative; more than that is another model."""
COARSEST = "bfloat16"
TOLERANCE_OVER_NOISE = 4.0


class Verdict(StrEnum):
    """The result of an accepted swap."""

    PROVED = "proved"
    CHECKSUM_ONLY = "checksum only"


def distance(first: Probe, second: Probe) -> float:
    """Return the largest absolute difference of two probes; infinity if they are not comparable."""
    if [len(prompt) for prompt in first] != [len(prompt) for prompt in second]:
        return float("inf")
    gaps = [abs(a - b) for p, q in zip(first, second, strict=True) for a, b in zip(p, q, strict=True)]
    return max(gaps, default=0.0) if all(gap == gap for gap in gaps) else float("inf")


def magnitude(probe: Probe) -> float:
    """Return the largest |log-probability| of a probe, at least 1: the scale of noise and tolerance."""
    return max([1.0, *(abs(value) for prompt in probe for value in prompt)])


class SwapProof:
    """Checks an engine's swaps, one after the other.

    The first swap measures the noise between engine and learner, which must be small for the engine's dtype; later
    tolerances are a multiple of it. A swap is proved if the engine is within tolerance of its version, and this version
    is more than twice the tolerance away from the previous version and from what the engine held before.
    """

    def __init__(self, actor: str, dtype: str) -> None:
        self._actor = actor
        key = dtype if dtype in TOLERANCE_FLOOR else COARSEST
        self._floor = TOLERANCE_FLOOR[key]
        self._ceiling = NOISE_CEILING[key]
        self._tolerance: float | None = None
        self._held: tuple[tuple[tuple[int, ...], ...], Probe] | None = None

    def check(self, manifest: Manifest, computed: Probe) -> Verdict:
        """Compare the engine's log-probabilities on the probe prompts with those of the manifest.

        Raises EngineError naming actor, version and distances if the engine does not hold the version.
        """
        scale = magnitude(manifest.probe)
        away = distance(computed, manifest.probe)
        allowed = scale * (self._ceiling if self._tolerance is None else self._tolerance)
        if not away <= allowed or self._nearer_to_previous(manifest, computed, away, scale):
            raise EngineError(self._actor, _disagreement(manifest, computed, away, allowed))
        if self._tolerance is None:
            self._tolerance = max(TOLERANCE_OVER_NOISE * away / scale, self._floor)
        verdict = self._verdict(manifest, scale * self._tolerance)
        self._held = (manifest.probe_token_ids, computed)
        return verdict

    def _nearer_to_previous(self, manifest: Manifest, computed: Probe, away: float, scale: float) -> bool:
        """Return whether the engine is nearer to the previous version, if that differs by more than noise."""
        previous = manifest.previous_probe
        if previous is None or distance(manifest.probe, previous) <= 2 * scale * self._floor:
            return False
        return distance(computed, previous) < away

    def _verdict(self, manifest: Manifest, tolerance: float) -> Verdict:
        others = [] if manifest.previous_probe is None else [manifest.previous_probe]
        if self._held is not None and self._held[0] == manifest.probe_token_ids:
            others.append(self._held[1])
        distinguishable = all(distance(manifest.probe, other) > 2 * tolerance for other in others)
        return Verdict.PROVED if distinguishable else Verdict.CHECKSUM_ONLY


def _disagreement(manifest: Manifest, computed: Probe, away: float, allowed: float) -> str:
    what = f"does not hold version {manifest.version}: its probe is {away:.3g} away (allowed {allowed:.3g})"
    if manifest.previous_probe is not None:
        before = distance(computed, manifest.previous_probe)
        what += f", and {before:.3g} from version {manifest.version - 1}"
    return what
