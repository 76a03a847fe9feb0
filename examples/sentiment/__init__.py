"""Label market headlines by topic and raise alarms for topics that turn; the costs of errors are asymmetric."""
