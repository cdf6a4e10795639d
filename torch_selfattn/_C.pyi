"""The compiled module: importing it loads libtorch_selfattn.so, which registers the operators."""

version: str
torch_version: str
cuda: bool
cuda_archs: str

def forced_implementation() -> str:
    """The name that is forced now, "" if none is."""

def set_forced_implementation(name: str) -> str:
    """Forces an implementation by name ("" = the best one) and returns the name before."""
