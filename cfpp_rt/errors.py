"""What can go wrong through no fault of the program. `cfpp` prints these as one line and exits with 2."""


class InputError(ValueError):
    """An argument, file or value that cannot be used. The message names it, what was wanted and what came."""


class CheckpointError(InputError):
    """A weights file that is missing, truncated, unsafe to load, or of other names or shapes."""


class MissingExtraError(ImportError):
    """An optional package is needed. The message gives the pip command that adds it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package '{package}': pip install 'cfpp-rt[{extra}]'")


class NonFiniteError(RuntimeError):
    """The model produced NaN or infinity. The message says at which latent frame and layer."""


class OutOfMemoryError(RuntimeError):
    """The run does not fit in memory. The message says what would."""
