"""The text encoders of SD v1 (CLIP, by transformers) and SD v2 (OpenCLIP), and a tokenizer that needs no network.

The vocabulary is the file that open_clip ships, found without importing open_clip, which would import torchvision.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mu.errors import MuError
from mu.ldm.params import END_TOKEN, START_TOKEN, VOCAB_SIZE, OpenClipParams, TextEncoderParams

OPEN_CLIP_PAD_TOKEN = 0
"""What OpenCLIP fills prompts up with; CLIP repeats its end token instead."""
_SELF_CHECK = ("a photo of a cat", [START_TOKEN, 320, 1125, 539, 320, 2368, END_TOKEN])


class TokenizerError(MuError, RuntimeError):
    """The CLIP tokenizer cannot be built, or is not CLIP's."""


class TextEncoder(nn.Module):
    """Prompts to the last hidden state after the final layer norm.

    State-dict names are CompVis' (`transformer.text_model.…`) whatever release of transformers is installed: older ones
    put the network under `text_model`, newer ones do not.
    """

    def __init__(self, params: TextEncoderParams) -> None:
        super().__init__()
        clip_tokenizer()  # refused here, before gigabytes of weights are read, and not at the first prompt
        self.params = params
        config = CLIPTextConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=params.hidden_size,
            intermediate_size=params.intermediate_size,
            num_hidden_layers=params.num_hidden_layers,
            num_attention_heads=params.num_attention_heads,
            max_position_embeddings=params.max_length,
            hidden_act=params.hidden_act,
            bos_token_id=START_TOKEN,
            eos_token_id=END_TOKEN,
        )
        network = CLIPTextModel(config)
        self.transformer = nn.ModuleDict({"text_model": getattr(network, "text_model", network)})

    pad_token = END_TOKEN

    @property
    def token_embedding(self) -> nn.Embedding:
        embedding = self.transformer["text_model"].get_submodule("embeddings.token_embedding")
        assert isinstance(embedding, nn.Embedding)
        return embedding

    def forward(self, prompts: list[str]) -> Tensor:
        return self.encode(tokenize(prompts, self.params.max_length))  # (B, 77, D)

    def encode(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, 77, D) of tokens (B, 77)."""
        network = self.transformer["text_model"]
        device = next(network.parameters()).device
        return network(input_ids=tokens.to(device)).last_hidden_state  # (B, 77, D)


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a token sees only itself and those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3 D)
        q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=self.heads)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, L, D / heads)
        return self.out_proj(rearrange(out, "b h l d -> b l (h d)"))  # (B, L, D)


class Mlp(nn.Module):
    """Position-wise network with an exact GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))  # (B, L, D)


class ResidualBlock(nn.Module):
    """Attention and position-wise network, each on normalised input, each residual."""

    def __init__(self, params: OpenClipParams) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(params.hidden_size)
        self.attn = CausalSelfAttention(params.hidden_size, params.num_attention_heads)
        self.ln_2 = nn.LayerNorm(params.hidden_size)
        self.mlp = Mlp(params.hidden_size, params.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))  # (B, L, D)
        return x + self.mlp(self.ln_2(x))  # (B, L, D)


class OpenClipNetwork(nn.Module):
    """Tokens (B, L) to the output of the last layer that is run, after the final layer norm: (B, L, D)."""

    def __init__(self, params: OpenClipParams) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCAB_SIZE, params.hidden_size)
        self.positional_embedding = nn.Parameter(torch.empty(params.max_length, params.hidden_size))
        blocks = nn.ModuleList(ResidualBlock(params) for _ in range(params.layers_run))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_final = nn.LayerNorm(params.hidden_size)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding  # (B, L, D)
        blocks = self.transformer["resblocks"]
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            x = block(x)  # (B, L, D)
        return self.ln_final(x)


class OpenClipTextEncoder(nn.Module):
    """Prompts to embeddings (B, 77, D): as a rule the penultimate layer's output after the final layer norm.

    Layers that are not run are not built. Checkpoints have them, and `text_projection` and `logit_scale`: the model
    keeps those beside it (`LatentDiffusion.carried`), so that a written checkpoint has them again.
    """

    def __init__(self, params: OpenClipParams) -> None:
        super().__init__()
        clip_tokenizer()  # see TextEncoder
        self.params = params
        self.model = OpenClipNetwork(params)

    pad_token = OPEN_CLIP_PAD_TOKEN

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.model.token_embedding

    def forward(self, prompts: list[str]) -> Tensor:
        return self.encode(tokenize(prompts, self.params.max_length, pad_token=self.pad_token))  # (B, 77, D)

    def encode(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, 77, D) of tokens (B, 77)."""
        return self.model(tokens.to(self.model.positional_embedding.device))  # (B, 77, D)


def tokenize(prompts: list[str], max_length: int = 77, *, pad_token: int = END_TOKEN) -> Tensor:
    """CLIP tokens, cut to `max_length` with an end token, and filled up to it with `pad_token`.

    Returns:
        (B, max_length) int64.

    Raises:
        TokenizerError: see `clip_tokenizer`.
    """
    encoded = clip_tokenizer()(
        list(prompts),
        truncation=True,
        max_length=max_length,
        padding="max_length",
        return_attention_mask=True,
    )
    tokens = torch.tensor(encoded["input_ids"], dtype=torch.int64)  # (B, max_length)
    # Of the prompt itself, with its first end token.
    own = torch.tensor(encoded["attention_mask"], dtype=torch.bool)  # (B, max_length)
    return torch.where(own, tokens, pad_token)


def token_ids(prompts: Sequence[str]) -> list[list[int]]:
    """CLIP's tokens of whole prompts, however many they are, with start and end token.

    Raises:
        TokenizerError: see `clip_tokenizer`.
    """
    if not prompts:
        return []
    return [
        list(ids) for ids in clip_tokenizer()(list(prompts), truncation=False, verbose=False)["input_ids"]
    ]


@lru_cache(maxsize=1)
def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, built offline and checked against known tokens.

    Raises:
        TokenizerError: open_clip is not installed, or what was built does not give CLIP's tokens.
    """
    vocab, merges = clip_vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)  # type: ignore[arg-type]  # pairs, not a path
    prompt, expected = _SELF_CHECK
    given = tokenizer(prompt)["input_ids"]
    if len(tokenizer) != VOCAB_SIZE or given != expected or tokenizer.pad_token_id != END_TOKEN:
        raise TokenizerError(
            f"the tokenizer is not CLIP's: {len(tokenizer)} tokens (expected {VOCAB_SIZE}), {prompt!r} gives {given} "
            f"(expected {expected}); install a supported release of transformers (see constraints.txt)"
        )
    return tokenizer


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary, word -> token, and its merges in their order.

    Raises:
        TokenizerError: open_clip is not installed.
    """
    merges = _read_merges()
    symbols = _byte_symbols()
    words = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in merges]
    return {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}, merges


def _read_merges() -> list[tuple[str, str]]:
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise TokenizerError(
            "open_clip is not installed; its vocabulary file is needed: pip install open_clip_torch"
        )
    path = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    if not path.is_file():
        raise TokenizerError(f"open_clip's vocabulary file is missing: {path}; reinstall open_clip_torch")
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    # After a header line; so many that bytes, bytes at a word's end, merges and two specials fill the vocabulary.
    used = lines[1 : 1 + VOCAB_SIZE - 2 * 256 - 2]
    return [(left, right) for left, right in (line.split() for line in used)]


def _byte_symbols() -> list[str]:
    """The 256 printable characters that stand for bytes, in the order of CLIP's vocabulary.

    Bytes that print stand for themselves and come first; the others get the code points from 256 on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = len(set(range(256)) - set(printable))
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(others)]
