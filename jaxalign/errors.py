"""The one error that a user's input can cause."""

import contextlib
from collections.abc import Iterator


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


@contextlib.contextmanager
def named(field: str) -> Iterator[None]:
    """Makes an error in the block speak of the field that a path came from, where lower rooms know `model.path` alone.

    Args:
      field: dotted name of a configuration's field.

    >>> with named("rewards.model"):
    ...     raise InputError("no directory x", "a model", "--config.model.path=DIR")
    Traceback (most recent call last):
    ...
    jaxalign.errors.InputError: found:    rewards.model: no directory x
    expected: a model
    fix:      --config.rewards.model=DIR
    """
    try:
        yield
    except InputError as error:
        if field == "model.path" or error.found.startswith(f"{field}: "):
            raise
        fix = error.fix.replace("--config.model.path=", f"--config.{field}=")
        raise InputError(f"{field}: {error.found}", error.expected, fix) from error
