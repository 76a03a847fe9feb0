"""The application: run files, run directories, stages, the PPO ring and the command line."""

import os

# A call to Ray after its end must fail: it would start another Ray that is never stopped. Ray reads this on import.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
