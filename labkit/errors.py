"""The errors that a user can provoke and mend."""


class UserError(Exception):
    """Something the user gave or lacks; the message says what is wrong and what to do.

    The command line prints it as one line.
    """
