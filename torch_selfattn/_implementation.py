"""Choice of an implementation by name."""

from collections.abc import Iterator
from contextlib import contextmanager

from . import _C


@contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Runs every attention call inside by the implementation of this name.

    The choice holds for the whole process (all threads, forward and backward) until the block
    ends; blocks nest. A call that the implementation does not support raises
    ``NotImplementedError`` with its reason, an unknown name raises ``ValueError`` at the call.
    :func:`torch_selfattn.explain` lists the names.

    A backward pass that runs after the block has ended uses the best implementation again.

    >>> with torch_selfattn.use_implementation("reference"):
    ...     out = torch_selfattn.dot_product_attention(q, k, v)
    """
    previous = _C.set_forced_implementation(name)
    try:
        yield
    finally:
        _C.set_forced_implementation(previous)
