"""Run untrusted code in a confined process."""
