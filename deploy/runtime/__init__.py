"""Ray, services, signals and status of a running command."""
