"""The platform that a program is compiled for: block and chunk sizes depend on it."""

import jax


def platform() -> str:
    """The platform of the ambient mesh, whose devices may not be there, else of the default device: cpu, gpu, tpu."""
    return getattr(jax.sharding.get_abstract_mesh().abstract_device, "platform", None) or jax.default_backend()
