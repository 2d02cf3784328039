"""What the job tells its user, as sentences: the rule, what was given, what is accepted."""

from __future__ import annotations


class JobError(RuntimeError):
    """The job cannot be done as asked; the message says why and what would be accepted."""


class CheckpointError(JobError):
    """A checkpoint directory that cannot be used: names the file, the tensor or the rule."""
