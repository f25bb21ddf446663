"""The one exception type that means "the input is at fault, not the library"."""


class InputError(ValueError):
    """A file, checkpoint, label set or option that cannot be used.

    The message is one line: what was asked, what was found, what to do. The command line prints it and exits with 2.
    """
