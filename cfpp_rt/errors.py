"""Errors with causes outside the program. The command `cfpp` prints each as one line and exits with status 2."""


class InputError(ValueError):
    """An argument, file or value that cannot be used. The message names it, what was wanted and what came."""


class CheckpointError(InputError):
    """A weights file that is missing, truncated, unsafe to load, or has other names or shapes than the model."""


class MissingExtraError(ImportError):
    """An optional package that is not installed. The message gives the pip command that installs it.

    package: name of the package.
    extra: the extra of cfpp-rt that contains it.
    purpose: what needs it.
    """

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package '{package}': pip install 'cfpp-rt[{extra}]'")


class NonFiniteError(RuntimeError):
    """NaN or infinity in the output of the model. The message gives the latent frame and the layer."""


class OutOfMemoryError(RuntimeError):
    """A run that does not fit in memory. The message says what would fit."""
