"""The one error a user is meant to read."""


class ConfigError(Exception):
    """A setting that cannot work: the field that holds it, and what was expected and what came.

    Raised before any data is touched; the command line prints it as one line and exits with status 2.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.message = field, message
