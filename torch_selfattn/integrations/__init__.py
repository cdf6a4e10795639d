"""The package's attention inside models that were written without it.

* :func:`replace_attention`: all ``nn.MultiheadAttention`` and transformer layers of a model, in
  place;
* :func:`use_in_scaled_dot_product_attention`: calls of ``F.scaled_dot_product_attention`` inside a
  ``with`` block;
* :mod:`~torch_selfattn.integrations.huggingface`: ``attn_implementation="torch_selfattn"`` in
  transformers.

What differs from PyTorch's own, on purpose, everywhere: a query that may attend to no key gives 0,
and dropout draws from another generator (reproducible by ``torch.manual_seed`` all the same).
"""

from . import huggingface
from .modules import replace_attention
from .sdpa import use_in_scaled_dot_product_attention

__all__ = ["huggingface", "replace_attention", "use_in_scaled_dot_product_attention"]
