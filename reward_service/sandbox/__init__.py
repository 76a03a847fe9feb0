"""Run untrusted code in a sandboxed process."""
