"""
Errors that a user can put right. A command shows them as one line, without a traceback, and ends with exit code 2.
"""


class UserError(Exception):
    """A mistake in a command or around it: the message names the flag or the file, the value, and what to do."""


class BadCheckpoint(UserError, ValueError):
    """A folder of weights that cannot be used: the message names the file and what is wrong with it."""


class BadMedia(UserError):
    """An image or a video that cannot be read or may not be: the message names the file."""


class BadRecord(UserError):
    """A record that cannot be used. `reason` is what it is counted under."""

    def __init__(self, reason, detail=""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
