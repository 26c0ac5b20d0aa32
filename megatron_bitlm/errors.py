"""Errors that are the user's to mend: one clear sentence, and an exit status of the command line."""


class BitLMError(ValueError):
    """Bad input or an unavailable feature.

    The message is one sentence that names the file or setting, its value and what to do. The command line prints
    it without a traceback and exits with `exit_status`.
    """

    exit_status = 2


class DivergedError(BitLMError):
    """A run whose training went wrong in a way that starting it again would repeat."""

    exit_status = 65


STOP_EXIT_STATUS = 75
"""Exit status of a run that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h, "please requeue"."""

DIVERGED_EXIT_STATUS = DivergedError.exit_status
"""Exit status of a run that ended by itself because its training went wrong: EX_DATAERR, "do not requeue"."""

HANG_EXIT_STATUS = 124
"""Exit status of a process that made no progress for too long, as of timeout(1): "start again"."""
