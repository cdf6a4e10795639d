"""A sequence-to-sequence model from letters to phones, built from torch_selfattn's modules.

Encoder: multi-head dot-product self-attention over the letters. Decoder: causal multi-head
dot-product self-attention over the phones so far, and additive attention with one head from the
phones to the letters, whose weights are the alignment.

Shapes: B words, L letters, T phones, D = Config.width, P phone ids.
"""

import dataclasses
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_selfattn import nn as attention
from torch_selfattn.nn import KVCache

from .data import BEGIN, END, NUM_LETTER_IDS, NUM_PHONE_IDS, PAD

MAX_PHONES = 32  # the longest pronunciation in the dictionary has 28


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the network."""

    width: int = 96
    heads: int = 4
    feedforward: int = 256
    encoder_layers: int = 1
    decoder_layers: int = 1
    dropout: float = 0.0


class LetterConvolution(nn.Module):
    """x + relu(conv(x)) over five letters: sees "ough" or "tion" before any attention does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel_size=5, padding=2)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        return x + F.relu(self.conv(x.transpose(1, 2))).transpose(1, 2)


class GreedyDecoder(nn.Module):
    """The decoding loop around a `start` and a `step` that a subclass provides."""

    # TorchScript sees constants of a class, not of a file.
    pad: Final[int] = PAD
    begin: Final[int] = BEGIN
    end: Final[int] = END
    max_phones: Final[int] = MAX_PHONES

    def greedy(self, letters: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest phone at each step, until every word has ended.

        letters (B, L), lengths (B) -> phone ids (B, T), attention over the letters (B, T, L).
        """
        caches = self.start(letters, lengths)
        phone = torch.full_like(lengths, self.begin)
        position = torch.zeros_like(lengths)
        ended = torch.zeros_like(lengths, dtype=torch.bool)
        phones: list[Tensor] = []
        alignment: list[Tensor] = []
        for _ in range(self.max_phones):
            logits, weights = self.step(phone, position, caches, lengths)
            # END or a phone, never PAD or BEGIN, which come before END.
            phone = logits[:, self.end :].argmax(dim=-1) + self.end
            phone = phone.masked_fill(ended, self.pad)
            phones.append(phone)
            alignment.append(weights)
            position = position + 1
            ended = ended | (phone == self.end)
            if bool(ended.all()):
                break
        return torch.stack(phones, dim=1), torch.stack(alignment, dim=1)


class Pronouncer(GreedyDecoder):
    """Letters (B, L) with their lengths (B) to phones (B, T)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, dropout = config.width, config.dropout
        self.letters = nn.Embedding(NUM_LETTER_IDS, width, padding_idx=PAD)
        self.convolution = LetterConvolution(width)
        self.phones = nn.Embedding(NUM_PHONE_IDS, width)
        self.position = attention.SinusoidalPositionalEncoding(scale=0.5, dropout=dropout)
        self.encoder = attention.TransformerEncoder(
            attention.TransformerEncoderLayer(
                width,
                config.heads,
                config.feedforward,
                dropout,
                batch_first=True,
                norm_first=True,
            ),
            config.encoder_layers,
            norm=nn.LayerNorm(width),
        )
        self.decoder = attention.TransformerDecoder(
            attention.TransformerDecoderLayer(
                width,
                config.heads,
                config.feedforward,
                dropout,
                batch_first=True,
                norm_first=True,
                cross_score="additive",
                cross_nhead=1,
            ),
            config.decoder_layers,
            norm=nn.LayerNorm(width),
        )
        self.output = nn.Linear(width, NUM_PHONE_IDS)

    def encode(self, letters: Tensor, lengths: Tensor) -> Tensor:
        """Letter ids (B, L) -> what the decoder attends to (B, L, D)."""
        x = self.position(self.convolution(self.letters(letters)))
        return self.encoder(x, key_lengths=lengths)

    def forward(self, letters: Tensor, lengths: Tensor, phones: Tensor) -> Tensor:
        """Logits (B, T, P) of the phone that follows each phone, all in parallel, for training."""
        memory = self.encode(letters, lengths)
        x = self.position(self.phones(phones))
        x = self.decoder(x, memory, tgt_is_causal=True, memory_lengths=lengths)
        return self.output(x)

    def start(self, letters: Tensor, lengths: Tensor) -> list[KVCache]:
        """Encodes the words; the caches hold the letters' keys and values, and no phone yet."""
        return self.decoder.new_cache(self.encode(letters, lengths), self.max_phones)

    def step(
        self, phone: Tensor, position: Tensor, caches: list[KVCache], lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One phone (B) at its position (B) -> logits of the next (B, P), attention (B, L)."""
        x = self.position(self.phones(phone).unsqueeze(1), positions=position.unsqueeze(1))
        y, weights = self.decoder.decode_with_weights(x, caches, position, lengths)
        return self.output(y.squeeze(1)), weights[-1, :, 0, 0]

    @staticmethod
    def load(checkpoint: Path) -> "Pronouncer":
        """The model in a checkpoint of train.py."""
        if not checkpoint.is_file():
            raise FileNotFoundError(f"no checkpoint at {checkpoint}: run train.py first")
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model = Pronouncer(Config(**state["config"]))
        model.load_state_dict(state["model"])
        return model
