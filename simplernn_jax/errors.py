"""The one exception for everything a user can put right."""


class UserError(Exception):
    """Bad input or a state of the machine that the user can mend.

    The message is one line: what is wrong, where, and what to do. The scripts
    print it as ``error: MESSAGE`` and exit with code 2 (``command_line.main``).
    """
