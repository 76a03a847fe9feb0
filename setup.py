"""Build step: copy the example tasks into the package, for `antiphon new`. Everything else is in pyproject.toml."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithTemplates(build_py):
    """Adds the folder `examples` to the built package as `deploy/templates`."""

    def run(self) -> None:
        """Build, then copy the examples; an editable installation reads them from the checkout."""
        super().run()
        if self.editable_mode:
            return
        templates = Path(self.build_lib, "deploy", "templates")
        shutil.rmtree(templates, ignore_errors=True)
        shutil.copytree("examples", templates, ignore=shutil.ignore_patterns("__pycache__", "*.md"))


setup(cmdclass={"build_py": BuildWithTemplates})
