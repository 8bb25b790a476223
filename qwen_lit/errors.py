"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """Bad usage or input. The message names the thing, the value and the remedy; the command exits with 2."""
