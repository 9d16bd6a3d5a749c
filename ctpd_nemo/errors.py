"""The one exception that stands for bad input."""


class InputError(ValueError):
    """Input that cannot be used: a config value, a file, a folder, a row of data.

    The message is one line that names the place (file and line, folder, or config key), what was found there
    and what was expected. The entry points in ``tools/`` print it without a traceback and exit with status 2.
    """

    def __init__(self, place: str, found: str, expected: str) -> None:
        # A path, an id or a library's own message may hold line breaks.
        super().__init__(" ".join(f"{place}: found {found}; expected {expected}".splitlines()))
        self.place = place
        self.found = found
        self.expected = expected

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, str, str]]:
        # Dataloader workers send exceptions back by pickling; rebuild from the parts, not from the joined message.
        return type(self), (self.place, self.found, self.expected)
