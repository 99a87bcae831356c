"""Errors that yopo raises on purpose.

Each is also a builtin, so that `except ValueError` keeps working for callers who do not know yopo.
"""


class YopoError(Exception):
    """Mark every error that yopo raises on purpose."""


class InvalidArgumentError(YopoError, ValueError):
    """Report an argument outside its allowed values."""


class UnsupportedModelError(YopoError, ValueError):
    """Report a model that yopo cannot prune, and the way out."""


class PolicyMismatchError(YopoError, ValueError):
    """Report a policy that cannot score the rows of this model."""


class PolicyFileError(YopoError, ValueError):
    """Report a policy, plan or report on disk that is missing, damaged, foreign or too new."""


class NotFittedError(YopoError, RuntimeError):
    """Report a pruner asked for rows before it had a policy, or for a report before it pruned."""


def missing_extra(told: str, extra: str) -> YopoError:
    """Return the error that names the extra to install.

    Args:
        told: What needs which package.
        extra: The extra of yopo that brings it.
    """
    return YopoError(
        f'{told}: pip install "yopo-prune[{extra}]" (not "yopo", which is another project).'
    )
