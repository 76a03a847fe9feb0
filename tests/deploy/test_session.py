"""What the stages share, where no Ray is needed to tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.run_config import ModelSection, RunConfig
from deploy.session import dtype_of


@pytest.mark.parametrize(
    ("dtype", "folder", "expected"),
    [
        ("auto", {"dtype": "bfloat16"}, "bfloat16"),
        ("auto", {"torch_dtype": "float16"}, "float16"),
        ("auto", {}, "float32"),
        ("float32", {"dtype": "bfloat16"}, "float32"),
    ],
)
def test_engine_and_learner_compute_in_what_is_set_or_what_the_folder_says(
    tmp_path: Path, dtype: str, folder: dict[str, str], expected: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(folder))
    config = RunConfig(model=ModelSection(path=tmp_path, dtype=dtype))  # type: ignore[arg-type]
    assert dtype_of(config, tmp_path) == expected
