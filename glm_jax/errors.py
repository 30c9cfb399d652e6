"""The errors a user can cause. Each carries the exit code its command ends with, and its text is the whole message:
what is wrong, the numbers, and the flag or the change that mends it."""

import reprlib

_brief = reprlib.Repr()  # what a hostile file says is shown on one line, cut to size
_brief.maxstring = _brief.maxother = 120
show = _brief.repr


class GLMError(Exception):
    """Something failed that the user can mend. The command line prints it on one line, without a trace."""

    exit_code = 1


class UsageError(GLMError, ValueError):
    """A wrong argument: an unknown flag value, a mesh that does not divide, an empty prompt."""

    exit_code = 2


class BadInput(GLMError, ValueError):
    """A checkpoint that is there but wrong: truncated, foreign, with tensors too many, too few or of another shape."""

    exit_code = 65


class MissingInput(GLMError, FileNotFoundError):
    """A file or folder that a checkpoint needs is not there."""

    exit_code = 66

    def __str__(self) -> str:  # OSError would print the arguments as a tuple
        return str(self.args[0]) if self.args else ""


class NoSpace(GLMError, OSError):
    """The disk, or the memory of the devices, cannot take it."""

    exit_code = 28

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class IOFailed(GLMError, OSError):
    """The disk, or the network behind it, could not read or write."""

    exit_code = 74

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class DestinationError(GLMError, ValueError):
    """The place to write to exists and is not ours to overwrite."""

    exit_code = 73


class Locked(GLMError):
    """Somebody else is writing there now."""

    exit_code = 75
