"""The one kind of error that is a user's to mend: shown as a message, never as a traceback."""


class UserError(Exception):
    """What was wrong, where (file and line, key, stage), and what to do."""
