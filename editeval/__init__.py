"""editeval: edit a language model fact after fact, and measure what it gained and what it lost."""

__version__ = "0.1.0"
