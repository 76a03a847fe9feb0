"""The section `[dpo]`. Imports neither torch nor ray."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from cluster.config import Section, setting
from learner.learning_rates import Shape


class DpoConfig(Section):
    """Training of the policy on preferences, without a reward model and without sampling.

    The reference policy is the one that the stage starts from: the SFT model, or `model` without the stage `sft`. Its
    log-probabilities are computed once, before the first step. `learner.lora` and the learner's settings of parallelism
    and memory apply.
    """

    loss: Literal["sigmoid", "ipo", "kto"] = setting("sigmoid", may_change="never")
    """`sigmoid`: DPO (arXiv:2305.18290, eq. 7). `ipo`: a squared loss with a finite optimum, also if all annotators
    agree (arXiv:2310.12036, eq. 17); log-probabilities are averaged over tokens. `kto`: responses that are desirable or
    not, without pairs (arXiv:2402.01306, eq. 8): columns prompt, completion and label; a pair is used as one of
    each."""
    beta: float = setting(0.1, may_change="never", gt=0)
    """Weight of staying near the reference policy: a higher value keeps the policy nearer. For `ipo`, tau."""
    num_epochs: int = setting(1, may_change="never", ge=1)
    """Passes over the preferences."""
    num_steps: int | None = setting(None, may_change="never", ge=1)
    """Optimiser steps, instead of `num_epochs`."""
    batch_size: int = setting(64, may_change="never", ge=1)
    """Pairs per optimiser step; for `kto`, responses."""
    learning_rate: float | None = setting(None, may_change="never", gt=0)
    """AdamW's peak learning rate. If unset: 1e-6 for a model of a billion parameters (1e-5 for adapters), and inversely
    proportional to the root of the model's size. The run prints it."""
    learning_rate_schedule: Shape = setting("cosine", may_change="never")
    """After the warm-up, keep the learning rate constant, or decrease it linearly or as a half cosine to
    `final_learning_rate_share` of the peak."""
    warmup_share: float = setting(0.1, may_change="never", ge=0, lt=1)
    """Share of the steps over which the learning rate rises linearly to its peak."""
    final_learning_rate_share: float = setting(0.1, may_change="never", ge=0, le=1)
    """What a linear or cosine schedule ends at, as a share of the peak."""
    label_smoothing: float = setting(0.0, may_change="never", ge=0, lt=0.5)
    """Share of labels assumed to be wrong, with `loss = "sigmoid"`: each pair is also learnt the other way round with
    this weight."""
    desirable_weight: float = setting(1.0, may_change="never", gt=0)
    """Weight of the loss of desirable responses, with `loss = "kto"`. If one label is rarer, give it a higher weight:
    weight times number of the desirable should be 1 to 1.33 times that of the undesirable."""
    undesirable_weight: float = setting(1.0, may_change="never", gt=0)
    """Weight of the loss of undesirable responses, with `loss = "kto"`."""
    max_tokens: int | None = setting(None, may_change="never", ge=2)
    """Maximum tokens of a prompt with its response. If unset: the model's context."""
    long_examples: Literal["error", "drop", "cut"] = setting("error", may_change="never")
    """What to do with a longer pair or response: end with an error, drop it, or cut the end of its responses. It is
    dropped too if no token of them fits, or if what remains is equal. The summary counts them."""
    held_out_share: float = setting(0.05, may_change="never", ge=0, lt=1)
    """Share of the pairs or responses held out from training for `held_out_loss` and `held_out_accuracy`."""
    evaluate_every_steps: int | None = setting(None, may_change="never", ge=1)
    """Optimiser steps between these measurements. If unset: one pass over the preferences. The last step is always
    measured."""
    patience: int | None = setting(None, may_change="never", ge=1)
    """Measurements without a lower `held_out_loss` after which training stops and the weights with the lowest loss are
    kept. If unset, every step is done and the last weights are kept."""
    checkpoint_every_steps: int = setting(100, may_change="always", ge=1)
    """Optimiser steps between checkpoints, from the last of which an interrupted stage resumes."""

    @model_validator(mode="after")
    def _fits_the_loss(self) -> Self:
        used = {"label_smoothing": "sigmoid", "desirable_weight": "kto", "undesirable_weight": "kto"}
        for name, loss in used.items():
            if self.loss != loss and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f'{name}: has no effect with loss = "{self.loss}": remove it, or set loss = "{loss}"')
        if self.patience is not None and not self.held_out_share:
            raise ValueError("patience: needs a held_out_share above 0, whose loss it watches")
        return self
