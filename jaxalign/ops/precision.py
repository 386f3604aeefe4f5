"""Precision rules: reductions in at least float32, and float32 matmuls in full float32 (no TF32 or bfloat16 passes)."""

import jax
import jax.numpy as jnp

from jaxalign.errors import InputError


def at_least_float32(x):
    """`x` in float32, or in float64 where it already is.

    >>> at_least_float32(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def require_dtypes(**fields: str | None) -> None:
    """Refuses float64 where JAX computes in 32 bits: it would silently be float32.

    Args:
      fields: dtypes by the names of the `model` section's fields.

    Raises:
      InputError: naming the field.
    """
    for name, dtype in fields.items():
        if dtype == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
            raise InputError(
                f"model.{name} is float64, and JAX computes in 32 bits at most",
                "float32, or 64 bits switched on for the whole process",
                f"JAX_ENABLE_X64=1 before the command, or --config.model.{name}=float32",
            )


def product_precision(dtype) -> jax.lax.Precision | None:
    """The matmul precision of a dtype: float32 matmuls run in full float32 (no TF32 or bfloat16 passes).

    A TPU multiplies float32 in one bfloat16 pass and an Ampere GPU in TF32 unless told otherwise, to three digits or
    fewer. Who wants that speed asks for bfloat16. `JAX_DEFAULT_MATMUL_PRECISION`, where set, is left to decide.

    >>> product_precision("float32").name, product_precision("bfloat16")
    ('HIGHEST', None)
    """
    chosen = jax.config.jax_default_matmul_precision is not None  # type: ignore[attr-defined]
    return None if chosen or jnp.dtype(dtype) != jnp.float32 else jax.lax.Precision.HIGHEST


def product(equation: str, a, b):
    """`einsum` of two arrays by the rules of this file, summed and given in at least float32.

    >>> product("ij,jk->ik", jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 1), jnp.bfloat16)).dtype
    dtype('float32')
    """
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(equation, a, b, precision=product_precision(a.dtype), preferred_element_type=wide)
