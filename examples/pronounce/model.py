"""A sequence-to-sequence model from letters to phones, built from torch_selfattn's modules."""

import dataclasses
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_selfattn import nn as attention

from .data import BEGIN, END, NUM_LETTER_IDS, NUM_PHONE_IDS, PAD

MAX_PHONES = 32  # the longest pronunciation in the dictionary has 28


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the network; `width` is the D in the shapes below."""

    width: int = 96
    heads: int = 4
    feedforward: int = 256
    encoder_layers: int = 1
    decoder_layers: int = 1
    dropout: float = 0.0


def feedforward(config: Config) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.width, config.feedforward),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.feedforward, config.width),
    )


class LetterConvolution(nn.Module):
    """x + relu(conv(x)) over five letters: "ough" or "tion" before any attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel_size=5, padding=2)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        return x + F.relu(self.conv(x.transpose(1, 2))).transpose(1, 2)


class EncoderLayer(nn.Module):
    """Multi-head dot-product self-attention over the letters, then a feed-forward network."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = attention.MultiHeadAttention(config.width, config.heads, config.dropout)
        self.feedforward_norm = nn.LayerNorm(config.width)
        self.feedforward = feedforward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), lengths))
        return x + self.dropout(self.feedforward(self.feedforward_norm(x)))


class DecoderLayer(nn.Module):
    """Causal self-attention over the phones so far, additive attention to the letters."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = attention.MultiHeadAttention(config.width, config.heads, config.dropout)
        self.letters_norm = nn.LayerNorm(config.width)
        self.letters_attention = attention.AdditiveAttention(config.width)
        self.letters_output = nn.Linear(config.width, config.width)
        self.feedforward_norm = nn.LayerNorm(config.width)
        self.feedforward = feedforward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, memory: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.dropout(self.attention(self.attention_norm(x), None, True))
        y, alignment = self.letters_attention(self.letters_norm(x), memory, lengths)
        x = x + self.dropout(self.letters_output(y))
        return x + self.dropout(self.feedforward(self.feedforward_norm(x))), alignment


class GreedyDecoder(nn.Module):
    """The decoding loop around an `encode` and a `decode` that a subclass provides."""

    # TorchScript sees constants of a class, not of a file.
    pad: Final[int] = PAD
    begin: Final[int] = BEGIN
    end: Final[int] = END
    max_phones: Final[int] = MAX_PHONES

    def greedy(self, letters: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest phone at each step, until every word has ended: ids (B, T), (B, T, L)."""
        memory = self.encode(letters, lengths)
        phones = torch.full([letters.size(0), 1], self.begin, device=letters.device)
        ended = torch.zeros(letters.size(0), dtype=torch.bool, device=letters.device)
        alignment = torch.empty(0)
        for _ in range(self.max_phones):
            logits, alignment = self.decode(phones, memory, lengths)
            following = logits[:, -1].argmax(dim=-1).masked_fill(ended, self.pad)
            phones = torch.cat([phones, following.unsqueeze(1)], dim=1)
            ended = ended | (following == self.end)
            if bool(ended.all()):
                break
        return phones[:, 1:], alignment


class Pronouncer(GreedyDecoder):
    """Letters (B, L) with their lengths (B) to phones (B, T)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.letters = nn.Embedding(NUM_LETTER_IDS, config.width, padding_idx=PAD)
        self.convolution = LetterConvolution(config.width)
        self.position = attention.SinusoidalPositionalEncoding(config.width, 0.5)
        self.encoder = nn.ModuleList([EncoderLayer(config) for _ in range(config.encoder_layers)])
        self.encoder_norm = nn.LayerNorm(config.width)
        self.phones = nn.Embedding(NUM_PHONE_IDS, config.width)
        self.decoder = nn.ModuleList([DecoderLayer(config) for _ in range(config.decoder_layers)])
        self.decoder_norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, NUM_PHONE_IDS)
        self.dropout = nn.Dropout(config.dropout)

    def encode(self, letters: Tensor, lengths: Tensor) -> Tensor:
        """Letter ids (B, L) -> what the decoder attends to (B, L, D)."""
        x = self.dropout(self.position(self.convolution(self.letters(letters))))
        for layer in self.encoder:
            x = layer(x, lengths)
        return self.encoder_norm(x)

    def decode(self, phones: Tensor, memory: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Phone ids so far (B, T) -> logits of the next (B, T, P) and attention (B, T, L)."""
        x = self.dropout(self.position(self.phones(phones)))
        alignment = torch.empty(0)
        for layer in self.decoder:
            x, alignment = layer(x, memory, lengths)
        return self.output(self.decoder_norm(x)), alignment

    def forward(self, letters: Tensor, lengths: Tensor, phones: Tensor) -> Tensor:
        """Logits (B, T, P) of every phone given the ones before it, for training."""
        return self.decode(phones, self.encode(letters, lengths), lengths)[0]

    @staticmethod
    def load(checkpoint: Path) -> "Pronouncer":
        """The model in a checkpoint of train.py."""
        if not checkpoint.is_file():
            raise FileNotFoundError(f"no checkpoint at {checkpoint}: run train.py first")
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model = Pronouncer(Config(**state["config"]))
        model.load_state_dict(state["model"])
        return model
