"""Captions to embeddings: a word-level vocabulary with learned tokens and positions."""

from __future__ import annotations

import difflib

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..errors import InvalidSetting
from ..validation import shown
from .emoji import clean

PAD = 0


class CaptionEncoder(ModelMixin, ConfigMixin):
    """Turn captions into token embeddings and one pooled vector, as FLUX takes them.

    Args:
        vocabulary: the known words; the token of a word is its place in the list plus one, and 0 is padding.
        dim: width of the embeddings.
        max_length: tokens per caption; longer captions are cut.
    """

    @register_to_config
    def __init__(self, vocabulary: list[str], dim: int = 128, max_length: int = 8) -> None:
        super().__init__()
        self.token = nn.Embedding(len(vocabulary) + 1, dim)
        self.position = nn.Parameter(torch.zeros(max_length, dim))
        nn.init.normal_(self.token.weight, std=0.5)
        nn.init.normal_(self.position, std=0.1)
        self._index = {word: number for number, word in enumerate(vocabulary, start=1)}

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        """Token ids, (batch, max_length) int64; the empty caption is all padding.

        Raises:
            InvalidSetting: a caption has a word that is not in the vocabulary; the message names close ones.
        """
        ids = torch.full((len(captions), self.config.max_length), PAD)
        for row, caption in enumerate(captions):
            words = clean(caption).split()
            unknown = [word for word in words if word not in self._index]
            if unknown:
                hints = {word: difflib.get_close_matches(word, self._index, n=3) for word in unknown}
                raise InvalidSetting(
                    f"caption {shown(caption)}: the demo has never seen {', '.join(map(repr, unknown))}; "
                    + "; ".join(
                        f"close to {shown(word)}: {', '.join(near) or 'nothing'}" for word, near in hints.items()
                    )
                )
            tokens = torch.tensor([self._index[word] for word in words[: self.config.max_length]])
            ids[row, : len(tokens)] = tokens
        return ids

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (batch, length, dim) and their mean over the words, (batch, dim)."""
        tokens = self.token(ids) + self.position
        words = (ids != PAD).unsqueeze(-1).to(tokens.dtype)
        pooled = (self.token(ids) * words).sum(1) / words.sum(1).clamp(min=1)
        return tokens, pooled
