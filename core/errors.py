"""Errors of the engine. All are `ValueError`s: the input was wrong, and the message says what to do."""


class StagePruneError(ValueError):
    """Base class, so that one `except` catches everything this library refuses."""


class GroupError(StagePruneError):
    """A denoiser whose units cannot be removed, or a group that fails the slice == mask check."""


class ScheduleError(StagePruneError):
    """Stages that do not cover [0, 1], overlap, or ask for a level that the bank lacks."""


class CalibrationError(StagePruneError):
    """Too few data, or a calibration of another model."""


class BankError(StagePruneError):
    """A bank whose tensors do not fit its groups, or that belongs to another denoiser."""


class BundleError(StagePruneError):
    """A bundle folder that is incomplete, damaged, unsafe or of another format version."""


class AllocationError(StagePruneError):
    """A budget that no schedule meets, or a stage that the sampler never visits."""


class SearchError(StagePruneError):
    """Settings that make no search, or a checkpoint of another search."""


class FitnessError(SearchError, AllocationError):
    """A fitness that there is not, or that cannot be computed: of a search, or of an allocation."""


class ExportError(StagePruneError):
    """A level that no plain model of the denoiser's own class can hold, or a folder that must not be overwritten."""
