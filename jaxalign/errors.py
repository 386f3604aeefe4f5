"""The one error that a user's input can cause."""


class InputError(ValueError):
    """Input that cannot be used, in three parts: what was found, what was expected, the line that fixes it.

    The command line prints it without a traceback and exits with status 2.

    >>> raise InputError("model.dtype is 'float8'", "one of float32, bfloat16", "--config.model.dtype=bfloat16")
    Traceback (most recent call last):
    ...
    jaxalign.errors.InputError: found:    model.dtype is 'float8'
    expected: one of float32, bfloat16
    fix:      --config.model.dtype=bfloat16
    """

    def __init__(self, found: str, expected: str, fix: str):
        self.found, self.expected, self.fix = found, expected, fix
        super().__init__(f"found:    {found}\nexpected: {expected}\nfix:      {fix}")
