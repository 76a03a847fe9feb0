"""Names of the files and folders in a run directory."""

from __future__ import annotations

CONFIG, LOCK, FEEDBACK, SERVING = "config.toml", ".lock", "feedback.sqlite", "serving"


ID = ".id"
"""A random text that tells runs of the same name apart."""


INPUTS = "inputs.json"
"""Digests of the run's inputs."""


RECORDS = "records"
"""The folder of the run's journal."""


EVALUATION = "evaluation"


TRAINING, NEXT, REPLACED = ".reward_model.training", ".reward_model.next", ".reward_model.replaced"


ARCHIVE = "reward_models"


PREFERENCES = "feedback.parquet"
"""In TRAINING: a copy of the human preferences at the start of the training."""


FINGERPRINT_FILE = "made_of.json"


HELD_OUT = "preferences_held_out.parquet"


REFERENCE = "reference_logprobs"
"""The folder of the log-probabilities of DPO's reference policy."""
