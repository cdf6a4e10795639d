"""The peer in the table: g2p-en 2.1.0, a GRU encoder and decoder without attention.

Its training split is not documented and its error is the same on our training and test words, so
it has very probably seen the words that we hold out.
"""

from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

NAME = "g2p-en"


def load_peer() -> Callable[[str], list[str]] | None:
    """A function from a word to its phones without stress, or None if g2p-en is not installed."""
    try:
        import nltk
    except ImportError:
        return None
    # Importing g2p_en downloads a tagger and a dictionary. Its network needs neither.
    with mock.patch.object(nltk, "download"):
        try:
            from g2p_en import g2p
        except ImportError:
            return None
    with mock.patch.object(g2p, "cmudict", SimpleNamespace(dict=dict)):
        network = g2p.G2p()

    def pronounce(word: str) -> list[str]:
        phones = (phone.rstrip("012") for phone in network.predict(word))
        return [phone for phone in phones if not phone.startswith("<")]

    return pronounce
