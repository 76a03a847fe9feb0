"""Scorers: functions, rules, judges and reward models."""
