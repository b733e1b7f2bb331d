"""The contests and rules behind the claims about single operators: softmax, norms, attention, GELU, the embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from labkit.experiments.claims import Evidence, Verdict, judge_facts, judge_ratio
from labkit.experiments.contests import Contest, Way, gain, is_faster, median_seconds, peak_bytes
from labkit.experiments.intervals import percentile
from labkit.kernels.activation import gelu
from labkit.kernels.article import LONGEST, OptimizedAttention, materialized_attention
from labkit.kernels.attention_prefill import dense_attention, dense_attention_triton
from labkit.kernels.norm import add_rms_norm
from labkit.models.loading import load_model_for_generate, open_checkpoint
from labkit.probes.profiler import operators

ARTICLE, SDPA, OURS, FLEX = "the article's code", "PyTorch SDPA", "labkit", "FlexAttention"
WRITTEN_OUT, PYTORCH, COMPILED = "written out", "PyTorch", "torch.compile"
ONLY_CUDA = "on CUDA only"


def attention_contests(
    lengths: Sequence[int], device: torch.device, dtype: torch.dtype, heads: int = 6
) -> list[Contest]:
    """Causal attention of one prompt, head dimension 64, in the four ways; ``x`` is its length in tokens."""
    contests = []
    for tokens in lengths:
        generator = torch.Generator(device).manual_seed(tokens)
        shape = (1, heads, tokens, 64)
        q, k, v = (torch.randn(shape, device=device, dtype=dtype, generator=generator) for _ in range(3))
        mask = torch.tril(torch.ones(LONGEST, LONGEST, dtype=torch.bool, device=device))
        ways: dict[str, Way | str] = {
            SDPA: lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            ARTICLE: _article(mask) if tokens <= LONGEST else f"its mask has room for {LONGEST} tokens",
            OURS: dense_attention_triton if device.type == "cuda" else dense_attention,
            FLEX: _flex(tokens, device),
        }
        contests.append(Contest(tokens, (q, k, v), ways))
    return contests


def softmax_contests(lengths: Sequence[int], device: torch.device, dtype: torch.dtype, heads: int = 6) -> list[Contest]:
    """The softmax of causal scores: over all of the square, as the first deployment does it, and row by row over what
    a token may see alone, which is all that is needed. ``x`` is the length in tokens."""
    contests = []
    for tokens in lengths:
        generator = torch.Generator(device).manual_seed(tokens)
        scores = torch.randn(heads, tokens, tokens, device=device, dtype=dtype, generator=generator)
        masked = scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1), -math.inf)
        ways: dict[str, Way | str] = {"all scores": lambda s: s.softmax(-1), "those in sight": _in_sight}
        contests.append(Contest(tokens, (masked,), ways))
    return contests


def layer_norm_contests(
    rows: Sequence[int], device: torch.device, dtype: torch.dtype, width: int = 384
) -> list[Contest]:
    """LayerNorm, which the article names: operator by operator, and in one. ``x``: how many rows of ``width``."""
    contests = []
    for count in rows:
        inputs = _rows(count, width, device, dtype, tensors=1)
        ways: dict[str, Way | str] = {
            WRITTEN_OUT: _layer_norm_written_out,
            PYTORCH: lambda x, w: F.layer_norm(x, (x.shape[-1],), w, eps=1e-6),
            COMPILED: _compiled(_layer_norm_written_out, device),
        }
        contests.append(Contest(count, inputs, ways))
    return contests


def rms_norm_contests(rows: Sequence[int], device: torch.device, dtype: torch.dtype, width: int = 384) -> list[Contest]:
    """Residual sum and RMSNorm, which the model has instead, of rows of ``width``; ``x``: how many rows."""
    contests = []
    for count in rows:
        inputs = _rows(count, width, device, dtype, tensors=2)
        ways: dict[str, Way | str] = {
            WRITTEN_OUT: _rms_norm_written_out,
            PYTORCH: lambda x, r, w: F.rms_norm(x + r, (x.shape[-1],), w, 1e-6),
            OURS: lambda x, r, w: add_rms_norm(x, r, w, 1e-6)[0],
            COMPILED: _compiled(_rms_norm_written_out, device),
        }
        contests.append(Contest(count, inputs, ways))
    return contests


def gelu_contests(rows: Sequence[int], device: torch.device, dtype: torch.dtype, width: int = 1024) -> list[Contest]:
    """GELU (tanh) of rows of ``width``: its formula operator by operator, PyTorch's own, ours; ``x``: how many rows."""
    contests = []
    for count in rows:
        x = torch.randn(count, width, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(count))
        ways: dict[str, Way | str] = {
            WRITTEN_OUT: _gelu_written_out,
            PYTORCH: lambda x: F.gelu(x, approximate="tanh"),
            OURS: gelu,
            COMPILED: _compiled(_gelu_written_out, device),
        }
        contests.append(Contest(count, (x,), ways))
    return contests


def embedding_contests(counts: Sequence[int], table: Tensor) -> list[Contest]:
    """Rows of an embedding ``table`` [vocabulary, width] for a step's tokens: looked up at once, and one by one
    through ``functools.lru_cache(1024)`` as the article does; ``x``: how many tokens."""
    cached = lru_cache(maxsize=1024)(lambda token: table[token])
    contests = []
    for count in counts:
        ids = torch.randint(len(table), (count,), generator=torch.Generator().manual_seed(count)).to(table.device)
        ways: dict[str, Way | str] = {
            PYTORCH: lambda ids: F.embedding(ids, table),
            "lru_cache": lambda ids: torch.stack([cached(token) for token in ids.tolist()]),
        }
        contests.append(Contest(count, (ids,), ways))
    return contests


def article_attention_as_printed() -> str:
    """Why the article's attention cannot run as printed: PyTorch's word on its mask of floats; empty if it runs."""
    mask = torch.tril(torch.ones(4, 4))
    try:
        torch.zeros(4, 4).masked_fill_(~mask, -math.inf)
    except TypeError as error:
        return str(error).splitlines()[0]
    return ""


def article_attention_beyond(tokens: int = LONGEST + 1) -> str:
    """What becomes of a prompt longer than its mask, once repaired; empty if it runs."""
    try:
        OptimizedAttention(64, heads=1)(torch.zeros(1, tokens, 64))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def judge_softmax(table: pd.DataFrame, shares_of_pass: Sequence[float]) -> Verdict:
    """C09, at the longest prompt: is work that nobody needs done, and does leaving it out save time?"""
    of_pass = percentile(shares_of_pass, 50, "share")
    longest = int(table["x"].max())
    saved = gain(table, "all scores", "those in sight", longest)
    masked = (longest - 1) / (2 * longest)
    facts: dict[str, bool | None] = {
        f"of {longest} tokens' scores {100 * masked:.0f} % are masked, and take part all the same": masked > 0.25,
        "leaving them out is faster": is_faster(saved),
    }
    evidence = (Evidence.of("softmax, times faster", saved), Evidence.of("share of a forward pass", of_pass))
    return judge_facts("C09", facts, evidence)


def judge_norm(table: pd.DataFrame) -> Verdict:
    """C10, of ``layer_norm_contests`` at the most rows: one operator against the formula written out."""
    return judge_ratio("C10", gain(table, WRITTEN_OUT, PYTORCH, int(table["x"].max())), label="fused, times faster")


def judge_flash(table: pd.DataFrame) -> Verdict:
    """C19, at the longest prompt that the article's code takes: is a fused kernel faster, and how does memory grow?"""
    longest = int(table[(table["way"] == ARTICLE) & (table["note"] == "")]["x"].max())
    faster = gain(table, ARTICLE, SDPA, longest)
    facts = {
        f"a fused kernel is faster at {longest} tokens": faster.low > 1,
        "its memory grows with the length and not with its square": growth(table, SDPA) < 1.5,
        "the products as written keep all scores in memory": growth(table, ARTICLE) > 1.5,
    }
    return judge_facts("C19", facts, (Evidence.of("fused kernel, times faster", faster),))


def judge_article_attention(table: pd.DataFrame) -> Verdict:
    """C20: what a fused kernel would have to be, asked of the article's code."""
    longest = int(table[(table["way"] == ARTICLE) & (table["note"] == "")]["x"].max())
    against = gain(table, SDPA, ARTICLE, longest)
    facts = {
        "it runs as printed": not article_attention_as_printed(),
        f"repaired, it takes more than {LONGEST} tokens": not article_attention_beyond(),
        "it does without all scores in memory": growth(table, ARTICLE) < 1.5,
        "it is as fast as PyTorch's fused kernel": against.high >= 1,
    }
    return judge_facts("C20", facts, (Evidence.of("speed against PyTorch's fused kernel", against),))


def judge_gelu(table: pd.DataFrame) -> Verdict:
    """C21: GELU operator by operator against PyTorch's one operator."""
    return judge_ratio("C21", gain(table, WRITTEN_OUT, PYTORCH, int(table["x"].max())), label="in one, times faster")


def judge_embedding(shares_of_pass: Sequence[float]) -> Verdict:
    """C22: the look-up's share of a forward pass, in per cent of all operators' time; a bottleneck takes a tenth."""
    found = percentile(shares_of_pass, 50, "share")
    return judge_facts("C22", {"the look-up takes a tenth of a pass or more": found.value >= 0.1},
                       (Evidence.of("share of a forward pass", found),))  # fmt: skip


def judge_cache(table: pd.DataFrame) -> Verdict:
    """C29, at the most tokens: the article's cache against the plain look-up."""
    return judge_ratio("C29", gain(table, PYTORCH, "lru_cache", int(table["x"].max())), label="cached, times faster")


def growth(table: pd.DataFrame, way: str) -> float:
    """The power of the length with which a way's memory grows, between its two longest prompts; NaN if it ran once."""
    lengths = sorted(table[(table["way"] == way) & (table["note"] == "")]["x"].unique())[-2:]
    peaks = [peak_bytes(table, way, int(x)) for x in lengths]
    if len(lengths) < 2 or not all(peaks):
        return math.nan
    return math.log(peaks[1] / peaks[0]) / math.log(lengths[1] / lengths[0])  # type: ignore[operator]


def speeds(table: pd.DataFrame) -> pd.DataFrame:
    """One row a way and size, for a figure: way, x, value (median seconds), low, high, bytes."""
    rows = []
    for way, x in table[table["note"] == ""][["way", "x"]].drop_duplicates().itertuples(index=False):
        found = median_seconds(table, way, int(x))
        rows.append((way, int(x), found.value, found.low, found.high, peak_bytes(table, way, int(x))))
    return pd.DataFrame(rows, columns=["way", "x", "value", "low", "high", "bytes"])


def _article(mask: Tensor) -> Way:
    return lambda q, k, v: materialized_attention(q, k, v, mask, q.shape[-1] ** -0.5)


def _in_sight(masked: Tensor) -> Tensor:
    """Blocks of rows, each over the columns that its last row sees."""
    tokens, out, block = masked.shape[-1], torch.zeros_like(masked), 64
    for first in range(0, tokens, block):
        rows = slice(first, min(first + block, tokens))
        out[:, rows, : rows.stop] = masked[:, rows, : rows.stop].softmax(-1)
    return out


def _rows(count: int, width: int, device: torch.device, dtype: torch.dtype, tensors: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(count)
    random = (torch.randn(count, width, device=device, dtype=dtype, generator=generator) for _ in range(tensors))
    return (*random, torch.ones(width, device=device, dtype=dtype))


def _layer_norm_written_out(x: Tensor, weight: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def _rms_norm_written_out(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    total = (x + residual).float()
    return (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def _gelu_written_out(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))


def _compiled(function: Callable[..., Tensor], device: torch.device) -> Way | str:
    return torch.compile(function, dynamic=False) if device.type == "cuda" else ONLY_CUDA


def _flex(tokens: int, device: torch.device) -> Way | str:
    if device.type != "cuda":
        return ONLY_CUDA
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, tokens, tokens, device=device.type)
    attend = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: attend(q, k, v, block_mask=mask)


def eager_pass(model: str, tokens: int, device: torch.device) -> Callable[[], object]:
    """One forward pass of ``model`` as first deployed (``transformers``, eager attention, float32) over a made-up
    prompt."""
    logging.disable_progress_bar()
    loaded = load_model_for_generate(open_checkpoint(model), device, torch.float32, "eager")
    ids = torch.randint(loaded.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    return torch.inference_mode()(lambda: loaded(ids))


def shares(step: Callable[[], object], op: str, repeats: int = 5) -> list[float]:
    """Of the time of all of ``step``'s operators: the share of ``op`` and of what it calls, once a repeat."""
    found = []
    for _ in range(repeats):
        table = operators(step)
        found.append(float(table["total_s"][table["op"] == op].sum() / table["self_s"].sum()))
    return found
