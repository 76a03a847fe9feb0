"""Looks at other processes; each look survives the end of the process."""

from __future__ import annotations

import subprocess

import psutil


def children_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return all descendants of a command; none if it has ended."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def name_of(process: psutil.Process) -> str:
    """Return a process's name; empty if it has ended."""
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def command_of(process: psutil.Process) -> list[str]:
    """Return a process's command line; empty if it has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def is_running(process: psutil.Process) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def open_paths(process: psutil.Process) -> set[str]:
    """Return the paths of a process's open files; empty if it has ended."""
    try:
        return {file.path for file in process.open_files()}
    except psutil.NoSuchProcess:
        return set()


def running() -> dict[int, psutil.Process]:
    """Return the running processes of this machine by their ids."""
    return {process.pid: process for process in psutil.process_iter() if is_running(process)}
