"""Tests of the swap check, with numbers only."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.errors import EngineError
from cluster.weights.manifest import Manifest, Probe
from rollout_actors.engine.swap_check import SwapProof, Verdict, distance

TOKENS = ((4, 5, 6), (7, 8))


def probe(shift: float) -> Probe:
    return [[-2.0 - shift, -4.0], [-8.0 + shift]]


def manifest(version: int, shift: float, previous: float | None) -> Manifest:
    return Manifest(version, "first", (), TOKENS, probe(shift), None if previous is None else probe(previous))


def test_a_swap_is_proved_if_the_engine_is_within_noise() -> None:
    proof = SwapProof("rollout-0", "float32")
    assert proof.check(manifest(0, 0.0, None), probe(1e-6)) is Verdict.PROVED
    assert proof.check(manifest(1, 0.1, 0.0), probe(0.1 + 2e-6)) is Verdict.PROVED


def test_a_swap_is_checksum_only_if_versions_differ_less_than_noise() -> None:
    proof = SwapProof("rollout-0", "float32")
    proof.check(manifest(0, 0.0, None), probe(1e-6))
    assert proof.check(manifest(1, 1e-6, 0.0), probe(1e-6)) is Verdict.CHECKSUM_ONLY


@pytest.mark.parametrize("step", [1e-3, 1.0])
def test_the_error_has_both_distances_if_the_engine_kept_the_old_version(step: float) -> None:
    proof = SwapProof("rollout-0", "float32")
    proof.check(manifest(0, 0.0, None), probe(1e-6))
    with pytest.raises(EngineError, match=r"rollout-0: does not hold version 1: .* away .* from version 0"):
        proof.check(manifest(1, step, 0.0), probe(1e-6))


def test_an_engine_that_missed_its_first_version_is_refused() -> None:
    with pytest.raises(EngineError, match="does not hold version 7"):
        SwapProof("rollout-0", "float32").check(manifest(7, 1e-3, 0.0), probe(0.0))


def test_a_swap_is_checksum_only_if_a_skipped_version_is_the_same() -> None:
    proof = SwapProof("rollout-0", "float32")
    proof.check(manifest(3, 0.5, 0.0), probe(0.5))
    assert proof.check(manifest(5, 0.5, 0.7), probe(0.5)) is Verdict.CHECKSUM_ONLY


def test_the_tolerance_follows_the_noise_of_the_first_swap() -> None:
    noisy, quiet = SwapProof("noisy", "bfloat16"), SwapProof("quiet", "bfloat16")
    noisy.check(manifest(0, 0.0, None), probe(0.1))
    quiet.check(manifest(0, 0.0, None), probe(0.0))
    later = manifest(1, 2.0, 0.0)
    assert noisy.check(later, probe(2.3)) is Verdict.PROVED
    with pytest.raises(EngineError):
        quiet.check(later, probe(2.3))


def test_noise_that_is_too_large_for_the_dtype_is_refused() -> None:
    assert SwapProof("rollout-0", "bfloat16").check(manifest(0, 0.0, None), probe(0.1)) is Verdict.PROVED
    with pytest.raises(EngineError):
        SwapProof("rollout-0", "float32").check(manifest(0, 0.0, None), probe(0.1))


def test_a_probe_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(EngineError):
        SwapProof("rollout-0", "bfloat16").check(manifest(0, 0.0, None), probe(float("nan")))


def test_probes_of_different_lengths_are_infinitely_far_apart() -> None:
    assert distance(probe(0.0), [[-2.0], [-8.0]]) == float("inf")
    with pytest.raises(EngineError):
        SwapProof("rollout-0", "float32").check(replace(manifest(0, 0.0, None), probe=[[]]), probe(0.0))
