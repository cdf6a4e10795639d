"""Sphinx: the API reference from the docstrings. ``make docs`` builds it, warnings as errors."""

from importlib import metadata

import torch_selfattn

project = "torch_selfattn"
release = str(torch_selfattn.__version__)
html_title = f"torch_selfattn {release} for torch {metadata.version('torch').partition('+')[0]}"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_show_copyright = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
# The module that defines a function is not the one that users import it from.
add_module_names = False
python_display_short_literal_types = True
napoleon_numpy_docstring = False
