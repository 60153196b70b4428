"""ModelError, apart from what raises it, so that a config can be checked without importing torch."""


class ModelError(ValueError):
    """A model that cannot be loaded: one line that names the file or key and what to do."""
