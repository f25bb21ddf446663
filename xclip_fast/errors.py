"""The one exception type that means "the input is at fault, not the library", and what the exceptions of others say."""


class InputError(ValueError):
    """A file, checkpoint, label set or option that cannot be used.

    The message is one line: what was asked, what was found, what to do. The command line prints it and exits with 2.

    Example:
        >>> import xclip_fast
        >>> try:
        ...     xclip_fast.load_model("missing.pth")
        ... except xclip_fast.InputError as error:
        ...     print(error)
        'missing.pth' does not exist: give a checkpoint file, a folder, a hub id or an open_clip name
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, of Python or torch, says that there is no memory left."""
    # on the CPU torch raises a plain RuntimeError
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def one_line(error: object) -> str:
    """The message of an exception on one line of bounded length; bytes of a file in it can't reach the terminal."""
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(error).split()))
    return text if len(text) <= 200 else text[:197] + "..."
