"""The one family of errors: each says what was found and what to do about it."""

from __future__ import annotations


class TenfoldError(Exception):
    """Something the user can mend.

    Args:
        problem: what was found, naming the field, file or layer and the value.
        remedy: one command, line or setting that mends it.

    ``exit_code`` is what the command line returns: 2 for bad input, 1 for a failure while working.

    >>> print(ConfigError("rank: -1 is below 1", remedy="give a rank of 1 or more"))
    rank: -1 is below 1
      -> give a rank of 1 or more
    """

    exit_code = 1

    def __init__(self, problem: str, remedy: str | None = None) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return self.problem if self.remedy is None else f"{self.problem}\n  -> {self.remedy}"


class ConfigError(TenfoldError, ValueError):
    """A recipe, a flag or a configuration that cannot be meant."""

    exit_code = 2


class DataError(TenfoldError, ValueError):
    """A data file or row that cannot be read; names file, line and column."""

    exit_code = 2


class ModelError(TenfoldError, ValueError):
    """A model that cannot be opened, or lacks what a method needs."""

    exit_code = 2


class MissingDependencyError(TenfoldError, ImportError):
    """An optional library is absent; the remedy is the one command that installs it."""

    exit_code = 2


class RunError(TenfoldError, RuntimeError):
    """A run folder or a running stage failed."""


class FolderError(RunError):
    """A folder that is not a run, or that is not ours to write into."""

    exit_code = 2
