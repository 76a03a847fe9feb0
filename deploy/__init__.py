"""Puts a run on machines: the composition root and the command line."""

import os

# A call to Ray after its end is an error: it would start another Ray, with nobody to end it. Read as ray is imported.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
