"""jaxalign teaches a language model preferences, in JAX and Flax."""

__version__ = "0.1.0"
