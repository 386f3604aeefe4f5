"""InputError: the one exception for input that the user can fix."""

import contextlib
import re
from collections.abc import Callable, Iterator

_SETTING = re.compile(r"--config\.([A-Za-z_][\w.]*)")
# What `data.source.config_line` adds to a line of a config file: the same as a flag, its value quoted for a shell.
_AS_FLAG = re.compile(r""" \(as a flag: (--config\.([\w.]+)=(?:'[^']*'|"[^"]*"|[^\s'"()])+)\)""")


class InputError(ValueError):
    """Input that cannot be used, in three parts: what was found, what was expected, the line that fixes it.

    `within` adds what it is about (a stage, a field, a record) and renames fields of the fix; the text is rendered
    once, where it is shown.  The command line prints it without a traceback and
    exits with status 2.

    Args:
      problem: what was found.
      expected: what it should be.
      fix: the line that repairs it; fields of the configuration are written `--config.FIELD`.
      places: what it is about, the outermost first.

    >>> raise InputError("model.dtype is 'float8'", "one of float32, bfloat16", "--config.model.dtype=bfloat16")
    Traceback (most recent call last):
    ...
    jaxalign.errors.InputError: found:    model.dtype is 'float8'
    expected: one of float32, bfloat16
    fix:      --config.model.dtype=bfloat16
    """

    def __init__(self, problem: str, expected: str, fix: str, places: tuple[str, ...] = ()):
        self.problem, self.expected, self.fix, self.places = problem, expected, fix, places
        super().__init__(problem, expected, fix, places)

    @property
    def found(self) -> str:
        """The problem, with what it is about before it."""
        return ": ".join((*self.places, self.problem))

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the configuration that the fix sets, by their dotted names."""
        return tuple(_SETTING.findall(self.fix))

    def within(self, place: str, rename: Callable[[str], str] = str) -> "InputError":
        """The same error in the terms of an outer caller.

        Args:
          place: what it is about, such as "stage dpo"; "" adds nothing.
          rename: from the name of a field in the fix to the one it has there.
        """
        fix = _SETTING.sub(lambda match: f"--config.{rename(match[1])}", self.fix)
        return InputError(self.problem, self.expected, fix, (place, *self.places) if place else self.places)

    def render(self, flag: Callable[[str], str] = "--config.{}".format, *, file: bool = True) -> str:
        """The text that is shown.

        Args:
          flag: how a field of the configuration is written.
          file: whether there is a config file: without one, fixes are shown as flags alone.
        """
        fix = self.fix if file else _as_flags(self.fix)
        text = f"found:    {self.found}\nexpected: {self.expected}\nfix:      {fix}"
        return _SETTING.sub(lambda match: flag(match[1]), text)

    def __str__(self) -> str:
        return self.render()


def _as_flags(fix: str) -> str:
    """A fix whose lines for a config file are left out where the same is said as a flag.

    >>> _as_flags("data.sources=({'path': 'x'},) (as a flag: --config.data.sources='x y')")
    "--config.data.sources='x y'"
    """
    for match in reversed(list(_AS_FLAG.finditer(fix))):
        start = fix.rfind(f"{match[2]}=(", 0, match.start())
        if start >= 0:
            fix = fix[:start] + match[1] + fix[match.end() :]
    return fix


@contextlib.contextmanager
def named(field: str) -> Iterator[None]:
    """Names the field that a path came from in errors of the block; lower rooms know only `model.path`.

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
        raise error.within(field, lambda name: field if name == "model.path" else name) from error
