"""Everything QuantPage raises on purpose.

    QuantPageError
    ├── FormatError          a quantization spec or a format name that cannot be
    ├── CacheError           pages, page tables, saved caches
    │   ├── OutOfPages       the pool has no free page left
    │   └── CorruptCache     a saved cache that is truncated, altered, or of another format
    ├── CorruptCalibration   a file of `quantpage calibrate` that is damaged or of another model
    ├── CorruptReport        data of `quantpage report` that is damaged or of another version
    ├── NonFiniteInput       checked mode met a NaN or an infinity (layer, tensor, token)
    ├── NoImplementation     every candidate refused; the message lists each reason
    ├── UnsupportedModel     this model cannot keep its cache in quantized pages, and why
    ├── QueueFull            too many requests wait; ask again later
    ├── EngineStopped        the engine takes no requests any more
    └── Unavailable          a device or a package that this machine does not have

``PartlyPaged`` is a warning: the answer is right, and not all of it comes from quantized pages.

An argument of the wrong shape, type or range is a plain ``ValueError`` that names the
argument, what was expected and what came: "key scale: expected (1, 8, 1), got (8,)".
"""


class QuantPageError(Exception):
    """Base of all errors raised by QuantPage."""


class FormatError(QuantPageError, ValueError):
    """A quantization spec or format name that cannot be."""


class CacheError(QuantPageError):
    """Something is wrong with pages, page tables or a saved cache."""


class OutOfPages(CacheError):
    """The pool has no free page left."""


class CorruptCache(CacheError):
    """A saved cache that is truncated, altered, or of another format."""


class CorruptCalibration(QuantPageError):
    """A file of `quantpage calibrate` that is damaged, of another version or of another model."""


class CorruptReport(QuantPageError):
    """Data of `quantpage report` that is damaged or of another version."""


class NonFiniteInput(QuantPageError, ValueError):
    """A NaN or an infinity was about to be written (checked mode only)."""


class NoImplementation(QuantPageError):
    """Every candidate refused the call."""


class UnsupportedModel(QuantPageError):
    """The model cannot keep its cache in quantized pages."""


class Unavailable(QuantPageError):
    """Something was asked for that this machine does not have: a device, a package."""


class PartlyPaged(UserWarning):
    """Some layers of a model do not read quantized pages; the message says how many and why."""


class QueueFull(QuantPageError):
    """Too many requests wait in an engine's queue."""


class EngineStopped(QuantPageError):
    """The engine takes no requests any more."""
