"""The version, in a module that the build can import without torch."""

__version__ = "0.1.0"
