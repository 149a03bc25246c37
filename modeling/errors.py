"""The errors that this package raises on purpose; each message says what to do next."""


class MSAError(Exception):
    """Base of every error that msa_hf raises on purpose."""


class MemoryFormatError(MSAError, ValueError):
    """A saved memory or cache is damaged, cut off, incomplete, or of a format version that this release does
    not read."""


class MemoryMismatchError(MSAError, ValueError):
    """A memory or cache was made by another model, tokenizer or router than the one that now reads it."""


class DocumentError(MSAError, ValueError):
    """A document cannot be read or split."""


class ConversionError(MSAError, ValueError):
    """A checkpoint cannot be converted: unsupported architecture, sliding window, missing files."""


class DataUnavailableError(MSAError, RuntimeError):
    """A model or data package could not be fetched."""
