"""Self-attention for PyTorch as C++/CUDA operators.

Two scores, the scaled dot product and the additive one (``w . tanh(q + k)``), computed in memory
linear in the sequence length, with gradients, masks, windows, padding, grouped heads and dropout.
The operators are ``torch.ops.torch_selfattn.*``; the functions here are their documented,
scriptable fronts, :mod:`torch_selfattn.nn` has the modules, and :mod:`torch_selfattn.reference`
says in plain PyTorch what the operators compute.
"""

from ._load import load_library as _load_library

_C = _load_library()

from . import nn  # noqa: E402 (needs the operators)
from ._implementation import use_implementation  # noqa: E402
from ._registrations import register as _register  # noqa: E402
from ._registrations_positional import register as _register_positional  # noqa: E402
from .functional import (  # noqa: E402
    additive_attention,
    additive_attention_with_lse,
    attention_weights,
    dot_product_attention,
    dot_product_attention_with_lse,
    explain,
    multi_head_attention,
)
from .positional import (  # noqa: E402
    add_learned_encoding,
    add_sinusoidal_encoding,
    alibi_slopes,
    rotary_embedding,
    rotary_tables,
    sinusoidal_encoding,
)

__all__ = [
    "add_learned_encoding",
    "add_sinusoidal_encoding",
    "additive_attention",
    "additive_attention_with_lse",
    "alibi_slopes",
    "attention_weights",
    "cmake_prefix_path",
    "dot_product_attention",
    "dot_product_attention_with_lse",
    "explain",
    "multi_head_attention",
    "nn",
    "rotary_embedding",
    "rotary_tables",
    "sinusoidal_encoding",
    "use_implementation",
]

__version__: str = _C.version
#: Give it to CMake as ``CMAKE_PREFIX_PATH`` to make ``find_package(TorchSelfAttn)`` succeed.
cmake_prefix_path: str = f"{__path__[0]}/share/cmake"

_register()
_register_positional()
