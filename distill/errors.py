"""Errors a person can act on: one line that names the value and what is allowed, and one with the next move."""


class UserError(Exception):
    """A failure with a message for the user, a fix, and an exit code."""

    exit_code = 1

    def __init__(self, message: str, *, fix: str = "", exit_code: int | None = None) -> None:
        """Keeps message and next move apart, so that the command line can print both; ``exit_code``: other than the class's."""
        super().__init__(message)
        self.message = message
        self.fix = fix
        self.exit_code = type(self).exit_code if exit_code is None else exit_code

    def __reduce__(self) -> tuple[object, ...]:
        """Survives the trip from a worker process with fix and exit code."""
        return _rebuild, (type(self), self.message, self.fix, self.exit_code)


def _rebuild(kind: type["UserError"], message: str, fix: str, exit_code: int) -> "UserError":
    return kind(message, fix=fix, exit_code=exit_code)


class RecipeError(UserError):
    """The recipe or the command line is wrong; nothing was started."""

    exit_code = 2


class PlanError(UserError):
    """The recipe is legal but cannot run on this many ranks."""

    exit_code = 2


class DataError(UserError):
    """Images are missing, empty or broken."""


class CheckpointError(UserError):
    """Saved state is missing, damaged or belongs to another recipe."""


class SetupError(UserError):
    """The machine lacks something: a device, a library, disk space."""

    exit_code = 3


class RankError(UserError):
    """A rank computes wrong numbers: the job ends, and goes on from the last checkpoint when it is started again."""

    exit_code = 4


class StorageError(UserError):
    """Storage has refused a file for minutes: the job ends, and goes on from the last checkpoint when it is started again."""

    exit_code = 4


class StudentError(Exception):
    """A student failed on one rank and is parked, or trains in smaller micro-batches; this attempt of the job ends, the next goes on like that."""
