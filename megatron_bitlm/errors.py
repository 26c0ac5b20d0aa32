"""Errors that are the user's to mend: one clear sentence, exit code 2 on the command line."""


class BitLMError(ValueError):
    """Bad input or an unavailable feature.

    The message is one sentence that names the file or setting, its value and what to do. The command line prints
    it without a traceback and exits with status 2.
    """


STOP_EXIT_STATUS = 75
"""Exit status of a run that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h, "please requeue"."""
