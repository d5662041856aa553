"""The errors that a user can cause. Each message is one line: what is wrong, and what to do."""


class HydraspecError(Exception):
    """A mistake in what was asked for. The command line prints its message and exits with code 2."""


class UnsupportedModel(HydraspecError):
    """The base model cannot be decoded as a tree: it keeps recurrent state, or its masks ignore the tree."""


class CheckpointError(HydraspecError):
    """A model or heads folder is missing, damaged, or made for something else."""


class TreeError(HydraspecError):
    """A tree of child-rank paths is not a tree."""


class DataError(HydraspecError):
    """A data file cannot be read as conversations. The message names the file and the line."""


class RequestError(HydraspecError):
    """A prompt or a limit cannot be served: it is empty, or does not fit the model's context."""
