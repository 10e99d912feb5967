"""
Molmo2, the whole network, in one file that needs torch alone.

    pixels of a crop ─► ViT ─► two block outputs, side by side ─► pool 2x2 or 3x3 patches by attention ─► SwiGLU
                                                                                                      │ added
    token ids ─► embedding ──────────────────────────────────────────────────────────────────► x[<image>] +=
                                                                                                      ▼
                                                       decoder blocks (one mask rule) ─► norm ─► head ─► next token

Three published decoders are covered by one `Block` and two switches: `norm_after` (OLMo normalises what a sub-layer
puts out, Qwen3 what it takes in) and `qk_norm` (OLMo over the whole projection, Qwen3 per head). Modules are named
as in the released checkpoints, so that loading one is a dictionary look-up (lib/weights.py).

    python model.py              # parameters of every preset, counted without allocating them

Where to look, in the order in which data passes:

    ViT, VisionBackbone           crops to features of patches to a vector for each <image>; -1 in `pool` is no patch
    Embedding, Molmo2.embed       the two token tables, of which the second is new; features are added at <image>
    is_vision, may_attend         who sees whom: branches not each other, vision tokens each other both ways
    Attention, Block, Decoder     a layer
    ChunkedNLL                    the loss: weight x (nll + z-loss), in chunks; pretrain.train divides it
    Molmo2.parts                  which parameters share a learning rate
    KVCache, Molmo2.generate      keys and values of what was read; images are read once; an answer ends with `stop`
    Replayed                      on CUDA a token's kernels are launched as one graph
    Molmo2.from_pretrained        lib/weights.load: `our_name` maps names, `split_embedding` rows, `fill` draws new ones

Seams: what other files replace in a built model, and by which function. Nothing else is patched from outside.

    model.mask, block.self_attn.attend     lib/flex.install              blocks of the mask on CUDA, for training
    the same two, vision_backbone.forward  ulysses.install               context parallelism; after lib/flex.install
    block.forward                          lib/distributed.shard_model   activation checkpointing; then compile
    vision_backbone.image_vit.forward      sft.cache_features            a frozen ViT encodes each crop once
    linear layers of parts                 lib/lora.install              an adapter beside each; before all others
    all attend, block.forward              lib/budget.count_bytes        memory without numbers, on the meta device

Shapes:  B sequences in the batch, T tokens, N crops, P patches per crop, M visual tokens, K patches pooled into one
         visual token, D width, H heads, G key/value heads, hd head width, S keys, V vocabulary
"""
import contextlib
import math
import warnings
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

EXTRA = 128  # input-only embedding rows after the base vocabulary: what the model reads but never writes
# Their order is the released one: the k-th name has id V + k. Up to <frame_end> all but <|image|> are vision tokens.
READ_ONLY = ("<image_start>", "<image_end>", "<image>", "<image_col>", "<low_res_image_start>", "<|image|>",
             "<image_low>", "<frame_start>", "<frame_end>", "<|video|>")
IMAGE = READ_ONLY.index("<image>")


@dataclass
class ModelConfig:
    """Sizes of one network. The defaults are OLMo-2-1B and the ViT of all released models (SigLIP 2 so400m/14)."""
    layers: int = 16                # decoder blocks
    width: int = 2048               # D of the decoder
    heads: int = 16                 # H
    kv_heads: int = 16              # G; fewer than heads = grouped-query attention
    head_dim: int = 128             # hd
    mlp: int = 8192                 # inner width of the decoder's SwiGLU
    projector_mlp: int = 0          # inner width of the connector's SwiGLU; 0 = as the decoder's, as released
    vocab: int = 100352             # V: rows of the base table and of the head; the EXTRA rows come on top
    norm_after: bool = True         # True: x + norm(f(x)) (OLMo); False: x + f(norm(x)) (Qwen3)
    qk_norm: str = "full"           # "full": one RMSNorm over all heads (OLMo); "head": per head (Qwen3); "none"
    eps: float = 1e-6               # of every RMSNorm
    rope_theta: float = 5e5
    yarn: dict | None = None        # {"factor", "original", "beta_fast", "beta_slow", "attention_factor"}
    yarn_layers: tuple = ()         # decoder layers that use it; the others keep plain RoPE
    window: int = 0                 # tokens a query looks back in `window_layers`: in plain OLMo-3, never in Molmo2
    window_layers: tuple = ()
    tie: bool = False               # the head is the base embedding table
    max_positions: int = 36864      # written to config.json for other readers; RoPE itself needs no limit
    crop: int = 378                 # side of a crop, pixels
    patch: int = 14                 # side of a patch, pixels
    vit_width: int = 1152
    vit_heads: int = 16
    vit_head_dim: int = 72
    vit_mlp: int = 4304
    vit_eps: float = 1e-6
    vit_features: tuple = (24, 18)  # block outputs handed on, in this order; blocks after the last one do not exist
    point_format: str = "spec"      # how the model was taught to write points and times: "spec" or "released"
    frame_tokens: bool = True       # video frames stand between <frame_start> and <frame_end>, else as images do

    def __post_init__(self):
        self.projector_mlp = self.projector_mlp or self.mlp

    @property
    def patches(self):
        """P, patches of one crop."""
        return (self.crop // self.patch) ** 2

    @property
    def image_token(self):
        """Id of `<image>`, the only token that receives image features."""
        return self.vocab + IMAGE


OLMO3_YARN = dict(factor=8.0, original=8192, beta_fast=32.0, beta_slow=1.0, attention_factor=1.2079441541679836)
QWEN3 = dict(norm_after=False, qk_norm="head", vocab=151936, layers=36, heads=32, kv_heads=8)
PRESETS = {
    "small": ModelConfig(layers=3, width=128, heads=4, kv_heads=4, head_dim=32, mlp=256, vocab=1024, rope_theta=1e4,
                         norm_after=False, qk_norm="head", max_positions=6912, crop=64, patch=8, vit_width=128,
                         vit_heads=4, vit_head_dim=32, vit_mlp=256, vit_features=(1, 0)),
    "1b": ModelConfig(),
    "4b": ModelConfig(**QWEN3, width=2560, mlp=9728, rope_theta=5e6),
    "7b": ModelConfig(layers=32, width=4096, heads=32, kv_heads=32, mlp=11008, vocab=100278, yarn=OLMO3_YARN,
                      yarn_layers=tuple(range(3, 32, 4)), max_positions=65536),
    "8b": ModelConfig(**QWEN3, width=4096, mlp=12288, rope_theta=1e6),
}


# ---- the attention mask: one rule, used by every path --------------------------------------------------------------

def is_vision(tokens, vocab):
    """Which ids are vision tokens (patches, columns, starts and ends): bool, the shape of `tokens`."""
    k = tokens - vocab
    return (k >= 0) & (k <= READ_ONLY.index("<frame_end>")) & (k != READ_ONLY.index("<|image|>"))


def may_attend(q, k, example, branch, vision):
    """The rule. q, k: positions in one sequence (any shapes that broadcast); example, branch, vision: its ids (T,).

    A query sees a key of its own example, in the trunk or in its own branch, if the key is not in the future.
    Vision tokens of one example see each other in both directions, across all its images and frames. A token of padding
    (example 0) sees itself alone: a softmax over nothing is NaN in some kernels, and NaN times a weight of 0 is NaN.
    """
    same_example = (example[q] == example[k]) & (example[q] > 0)
    trunk_or_own_branch = (branch[k] == 0) | (branch[k] == branch[q])
    return same_example & trunk_or_own_branch & ((k <= q) | (vision[q] & vision[k])) | (q == k)


def dense_mask(example, branch, vision, queries=None):
    """The rule for a batch: (B, T) ids -> (B, 1, T, T) bool, True = may attend. For SDPA. queries: only these rows."""
    t = torch.arange(example.shape[1], device=example.device)
    queries = t if queries is None else queries
    masks = [may_attend(queries[:, None], t[None], *ids) for ids in zip(example, branch, vision)]
    return torch.stack(masks)[:, None]


# ---- small parts ---------------------------------------------------------------------------------------------------

def outside_autocast(x):
    """For norms: autocast would give them fp32 copies of bf16 inputs, although their sums are in fp32 anyway."""
    if x.dtype == torch.float32 or x.is_meta:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        with outside_autocast(x):
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        with outside_autocast(x):
            return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def rope_frequencies(cfg, yarn, device=None):
    """Radians per position for each pair of channels: ((hd/2,) fp32, factor on cos and sin). YaRN (arXiv 2309.00071)
    stretches the slow pairs by `factor`, leaves the fast ones alone and blends in between."""
    d = cfg.head_dim
    frequencies = cfg.rope_theta ** (-torch.arange(0, d, 2, dtype=torch.float32, device=device) / d)
    if not yarn:
        return frequencies, 1.0
    # The pair that turns so often over the original context. Pairs below `low` keep their speed; above `high` none
    # finishes a turn.
    pair_with = lambda turns: d * math.log(yarn["original"] / (turns * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))
    low = max(math.floor(pair_with(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair_with(yarn["beta_slow"])), d - 1)
    stretched = ((torch.arange(d // 2, device=device) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequencies / yarn["factor"] * stretched + frequencies * (1 - stretched), yarn["attention_factor"]


def rope_table(cfg, pos, yarn):
    """cos and sin for positions (B, T): two (B, 1, T, hd/2) fp32. Channel i turns with channel i + hd/2."""
    frequencies, factor = rope_frequencies(cfg, yarn, pos.device)
    angle = pos[:, None, :, None].float() * frequencies  # (B, 1, T, hd/2)
    return angle.cos() * factor, angle.sin() * factor


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)  # in fp32 up to here, as cos and sin are


QUERIES = 1024  # of a long prompt, for which a mask is made at a time


def attend(q, k, v, mask=None):
    """softmax(q kᵀ / √hd) v.  q: (B, H, T, hd); k, v: (B, G, S, hd); mask: bool, broadcastable to (B, H, T, S), or
    ids (example, branch, vision) of T = S tokens, from which the mask of a part of the queries is made at a time. The
    mask of a single query is the same for all heads."""
    if isinstance(mask, tuple):
        spans = torch.arange(q.shape[2], device=q.device).split(QUERIES)
        return torch.cat([attend(q[:, :, t], k, v, dense_mask(*mask, t)) for t in spans], 2)
    B, H, T, hd = q.shape
    G = k.shape[1]
    if T == 1:  # heads that share keys are as good as queries of one head
        out = F.scaled_dot_product_attention(q.reshape(B, G, H // G, hd), k, v, attn_mask=mask)
        return out.reshape(B, H, 1, hd)
    if H > G and mask is not None and q.is_cuda:  # no fused kernel takes both
        k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=H != G)


def random_drop(x, p):
    """Dropout with a probability per position. x: (B, T, D); p: (B, T, 1), or None for none."""
    return x if p is None else x * (torch.rand_like(x) >= p) / (1 - p)


# ---- vision: pixels of crops -> features of patches ----------------------------------------------------------------

class MHA(nn.Module):
    """Attention with biases, of the ViT and the pooling: (B, T, dim_in) -> (B, T, heads x head_dim)."""

    def __init__(self, dim_in, heads, head_dim):
        super().__init__()
        dim = heads * head_dim
        self.head_dim = head_dim
        self.wq = nn.Linear(dim_in, dim)
        self.wk = nn.Linear(dim_in, dim)
        self.wv = nn.Linear(dim_in, dim)
        self.wo = nn.Linear(dim, dim)
        self.attend = attend  # a seam

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        q, k, v = self.wq(x), self.wk(context), self.wv(context)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))  # (B, H, T, hd)
        # The published code computes this in fp32 even under bf16. SDPA keeps its softmax and sums in fp32 by itself.
        return self.wo(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))


class ViTMLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.w1 = nn.Linear(cfg.vit_width, cfg.vit_mlp)
        self.w2 = nn.Linear(cfg.vit_mlp, cfg.vit_width)

    def forward(self, x):
        return self.w2(F.gelu(self.w1(x), approximate="tanh"))


class ViTBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.attention = MHA(cfg.vit_width, cfg.vit_heads, cfg.vit_head_dim)
        self.feed_forward = ViTMLP(cfg)
        self.attention_norm = LayerNorm(cfg.vit_width, cfg.vit_eps)
        self.ffn_norm = LayerNorm(cfg.vit_width, cfg.vit_eps)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class ViT(nn.Module):
    """SigLIP 2 without its last blocks and its head: every patch sees every patch of the same crop."""
    AT_ONCE = dict(cpu=1 << 11, cuda=1 << 15)  # patches that are encoded together for an answer: 2 and 44 crops of 27²

    def __init__(self, cfg):
        super().__init__()
        self.features = cfg.vit_features
        self.patch_embedding = nn.Linear(cfg.patch * cfg.patch * 3, cfg.vit_width)  # a patch: (row, column, channel)
        self.positional_embedding = nn.Parameter(torch.zeros(cfg.patches, cfg.vit_width))
        blocks = nn.ModuleList(ViTBlock(cfg) for _ in range(max(cfg.vit_features) + 1))
        self.transformer = nn.ModuleDict({"resblocks": blocks})

    def forward(self, crops):
        """(N, P, patch·patch·3) uint8 or already in [-1, 1] -> (N, P, features · width)."""
        most = max(self.AT_ONCE["cpu" if crops.is_cpu else "cuda"] // crops.shape[1], 1)
        if torch.is_inference_mode_enabled() and len(crops) > most:  # in training all ranks must run the same modules
            return torch.cat([ViT.forward(self, group) for group in crops.split(most)])
        if crops.dtype == torch.uint8:  # pixels travel as bytes, a quarter of the traffic
            crops = (crops.float() / 255 * 2 - 1).to(self.patch_embedding.weight.dtype)
        x = self.patch_embedding(crops)
        x = x + self.positional_embedding.to(x.dtype)  # or fp32 places would make everything after them fp32
        outputs = {}  # those handed on alone: one is half a gigabyte for 384 frames
        for i, block in enumerate(self.transformer["resblocks"]):
            x = block(x)
            if i in self.features:
                outputs[i] = x
        return torch.cat([outputs[i] for i in self.features], -1)


class Projector(nn.Module):
    """SwiGLU from the pooled features into the decoder's width."""

    def __init__(self, cfg):
        super().__init__()
        self.w1 = nn.Linear(cfg.vit_heads * cfg.vit_head_dim, cfg.projector_mlp, bias=False)  # gate
        self.w2 = nn.Linear(cfg.projector_mlp, cfg.width, bias=False)
        self.w3 = nn.Linear(cfg.vit_heads * cfg.vit_head_dim, cfg.projector_mlp, bias=False)  # up

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class VisionBackbone(nn.Module):
    """ViT, then the connector: each visual token gathers K patches by attention (4 of an image, 9 of a frame)."""

    def __init__(self, cfg):
        super().__init__()
        self.image_vit = ViT(cfg)
        self.image_pooling_2d = MHA(len(cfg.vit_features) * cfg.vit_width, cfg.vit_heads, cfg.vit_head_dim)
        self.image_projector = Projector(cfg)

    def forward(self, crops, pool):
        """crops: (N, P, ·); pool: (M, K) indices into the N·P patches, -1 = none -> (M, D)."""
        return self.image_projector(self.gather(self.image_vit(crops).flatten(0, 1), pool))

    def gather(self, patches, pool):
        """patches: (N·P, F) -> (M, ·), one vector of each window."""
        valid = pool >= 0
        windows = patches.index_select(0, pool.clamp(min=0).flatten()).unflatten(0, pool.shape)  # (M, K, F)
        windows = windows * valid[..., None]
        # The query is the mean of the valid patches: a window over the edge of a crop has fewer than K.
        query = windows.sum(1, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None]
        return self.image_pooling_2d(query, windows, valid[:, None, None])[:, 0]  # (M, ·)


def waves(n, dim):
    """Sines and cosines of row and column over an n x n grid, half a turn to 4 turns across it: (n·n, dim)."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, n), torch.linspace(-1, 1, n), indexing="ij")
    frequencies = math.pi / 2 * 2 ** torch.linspace(0, 3, dim // 4)
    angle_x = x.flatten()[:, None] * frequencies  # (n·n, dim/4)
    angle_y = y.flatten()[:, None] * frequencies
    return torch.cat([angle_x.sin(), angle_x.cos(), angle_y.sin(), angle_y.cos()], 1)


# ---- decoder -------------------------------------------------------------------------------------------------------

class Embedding(nn.Module):
    """Two tables, one index: ids below V look up the language model's table, the next EXTRA the read-only tokens."""

    def __init__(self, cfg):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(cfg.vocab, cfg.width))
        self.new_embedding = nn.Parameter(torch.empty(EXTRA, cfg.width))

    def forward(self, tokens):
        V = len(self.embedding)  # two look-ups, as one table of both would be a copy of gigabytes
        x = F.embedding(tokens.clamp(max=V - 1), self.embedding)
        new = F.embedding((tokens - V).clamp(min=0), self.new_embedding)
        return torch.where((tokens < V)[..., None], x, new)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.qk_norm = cfg.qk_norm
        q_width = cfg.heads * cfg.head_dim
        kv_width = cfg.kv_heads * cfg.head_dim
        self.widths = [q_width, kv_width, kv_width]
        self.att_proj = nn.Linear(cfg.width, q_width + 2 * kv_width, bias=False)  # its rows are q, k, v
        self.attn_out = nn.Linear(q_width, cfg.width, bias=False)
        if cfg.qk_norm != "none":
            self.q_norm = RMSNorm(q_width if cfg.qk_norm == "full" else cfg.head_dim, cfg.eps)
            self.k_norm = RMSNorm(kv_width if cfg.qk_norm == "full" else cfg.head_dim, cfg.eps)
        self.attend = attend  # a seam

    def forward(self, x, rope, mask, cache=None):
        q, k, v = self.att_proj(x).split(self.widths, -1)
        if self.qk_norm == "full":  # over all heads at once, so before they are split
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))  # (B, H or G, T, hd)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.attn_out(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.ff_proj = nn.Linear(cfg.width, 2 * cfg.mlp, bias=False)  # its rows are up, then gate: unlike most code
        self.ff_out = nn.Linear(cfg.mlp, cfg.width, bias=False)

    def forward(self, x):
        up, gate = self.ff_proj(x).chunk(2, -1)
        return self.ff_out(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm_after = cfg.norm_after
        self.self_attn = Attention(cfg)
        self.mlp = MLP(cfg)
        self.attn_norm = RMSNorm(cfg.width, cfg.eps)
        self.ff_norm = RMSNorm(cfg.width, cfg.eps)

    def forward(self, x, rope, mask, drop=None, cache=None, wanted=None):
        """(B, T, D) -> (B, T, D), or (n, D) of the tokens `wanted`, n indices into all B·T: only attention needs the
        others."""
        if self.norm_after:
            x = x + random_drop(self.attn_norm(self.self_attn(x, rope, mask, cache)), drop)
        else:
            x = x + random_drop(self.self_attn(self.attn_norm(x), rope, mask, cache), drop)
        if wanted is not None:
            x = x.flatten(0, 1).index_select(0, wanted)
            drop = None if drop is None else drop.flatten(0, 1).index_select(0, wanted)
        if self.norm_after:
            return x + random_drop(self.ff_norm(self.mlp(x)), drop)
        return x + random_drop(self.mlp(self.ff_norm(x)), drop)


class KVCache:
    """Keys and values of one layer for tokens already read, in buffers as long as the answer may get."""

    def __init__(self, cfg, x, length):
        """x: (B, ·, D), of the type and on the device of what will be kept."""
        self.used = 0
        self.k = x.new_empty(len(x), cfg.kv_heads, length, cfg.head_dim)
        self.v = torch.empty_like(self.k)

    def stay(self, used):
        """Make `append` work on the same memory each time, as a CUDA graph must: it takes one token and returns the
        whole buffers. used: (1,), how many tokens are kept. The caller counts, and masks what is not filled yet."""
        self.k[:, :, self.used:] = 0  # masked or not: a weight of 0 times NaN is NaN
        self.v[:, :, self.used:] = 0
        self.used = used

    def append(self, k, v):
        if isinstance(self.used, torch.Tensor):
            return self.k.index_copy_(2, self.used, k), self.v.index_copy_(2, self.used, v)
        end = self.used + k.shape[2]
        self.k[:, :, self.used:end] = k
        self.v[:, :, self.used:end] = v
        self.used = end
        return self.k[:, :, :end], self.v[:, :, :end]


class Decoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.wte = Embedding(cfg)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.ln_f = RMSNorm(cfg.width, cfg.eps)

    def forward(self, x, pos, mask, drop=None, caches=None, key_pos=None, wanted=None):
        """x: (B, T, D) embedded tokens with the image features added -> (B, T, D) after the last norm, or (n, D) of the
        tokens `wanted`, n indices into all B·T: nobody reads what the last MLP makes of the others.
        key_pos: (B, S) positions of all keys, where the cache holds some already."""
        cfg = self.cfg
        plain_rope = rope_table(cfg, pos, None)
        yarn_rope = rope_table(cfg, pos, cfg.yarn) if cfg.yarn_layers else None
        if cfg.window:
            key_pos = pos if key_pos is None else key_pos
            window_mask = mask & (pos[:, None, :, None] - key_pos[:, None, None] < cfg.window)
        for i, block in enumerate(self.blocks):
            rope = yarn_rope if i in cfg.yarn_layers else plain_rope
            layer_mask = window_mask if i in cfg.window_layers else mask
            last = i == cfg.layers - 1
            x = block(x, rope, layer_mask, drop, caches[i] if caches else None, wanted if last else None)
        return self.ln_f(x)


# ---- the loss: only where something is trained on, and never T x V numbers at once ---------------------------------

class ChunkedNLL(torch.autograd.Function):
    """sum_i w_i · (nll_i + z_loss · logsumexp_i²) for n hidden states, `most` numbers of logits at a time,
    or what LOGITS has for the device.

    A large vocabulary makes the logits the biggest tensor of the whole step. As the loss is a plain sum, the gradient
    of a chunk is known as soon as its logits are: it is taken in the forward pass, and nothing of size V is kept.
    """
    LOGITS = dict(cpu=1 << 23, cuda=1 << 27)  # 32 MB stay near a cache; a GPU wants large products: 512 MB

    @staticmethod
    def forward(ctx, x, head, targets, weights, z_loss, most=None):
        ctx.dtype = head.dtype
        head = head.to(x.dtype)  # once: under autocast each product would cast it again
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dhead = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = x.new_zeros((), dtype=torch.float32)
        most = most or ChunkedNLL.LOGITS["cuda" if x.is_cuda else "cpu"]
        size = max(most // len(head), 1)  # hidden states of a chunk
        for begin in range(0, len(x), size):
            chunk = slice(begin, begin + size)
            hidden = x[chunk]
            target, weight = targets[chunk, None], weights[chunk, None]
            logits = (hidden @ head.T).float()  # (size, V)
            lse = logits.logsumexp(1, keepdim=True)
            total += (weight * (lse - logits.gather(1, target) + z_loss * lse ** 2)).sum()
            if dx is None and dhead is None:
                continue
            # d nll = softmax - onehot(target);  d lse² = 2 · lse · softmax. In place: a copy would be 32 MB more.
            grad = logits.sub_(lse).exp_().mul_(weight * (1 + 2 * z_loss * lse))
            grad = grad.scatter_add_(1, target, -weight).to(hidden.dtype)
            if dx is not None:
                dx[chunk] = grad @ head
            if dhead is not None and dhead.dtype == hidden.dtype:
                dhead.addmm_(grad.T, hidden)  # without a second tensor as large as the head
            elif dhead is not None:
                dhead += grad.T @ hidden
            del logits, grad  # or both would still take memory while the next ones are made
        ctx.save_for_backward(dx, dhead)
        return total

    @staticmethod
    def backward(ctx, g):
        dx, dhead = ctx.saved_tensors
        return (None if dx is None else dx * g.to(dx.dtype),
                None if dhead is None else (dhead * g).to(ctx.dtype), None, None, None, None)


# ---- the model -----------------------------------------------------------------------------------------------------

def without_cudnn(device):
    """Keep SDPA on CUDA away from cuDNN, which plans its attention anew for each number of keys, so for each token: in
    bf16 a token took 84 ms, against 15 ms in fp32 (H200, 1b, a prompt of 3,517 tokens)."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def likeliest(p, share):
    """Probabilities (B, V) with zeros for all but the likeliest that together have `share` of 1, the first at least."""
    if share >= 1:
        return p
    ordered, order = p.sort(-1, descending=True)
    likelier = ordered.cumsum(-1) - ordered  # what those before it have together
    return torch.zeros_like(p).scatter(-1, order, ordered * (likelier < share))


def choose(logits, temperature, top_p, generator):
    """The next ids (B,), by logits (B, V): the largest at temperature 0, else drawn from the likeliest ones."""
    if temperature == 0:
        return logits.argmax(-1)
    p = likeliest((logits / temperature).softmax(-1), top_p)
    # As torch.multinomial draws, which would wait for a GPU to see whether these are probabilities.
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)


class Replayed:
    """A function of no arguments that works on the same memory at each call. Its kernels are launched one by one at
    first, then together as a CUDA graph: a token of a small model takes less time than the launches of its kernels."""
    DEVICES = ("cuda",)
    AFTER = 8  # calls. To record takes as long as some of them, and many answers are short
    LONGEST = 8192  # tokens in all. One query over more is faster without a mask, and that kernel cannot be replayed

    def __init__(self, function):
        self.function = function
        self.calls = 0
        self.graph = None

    def record(self):
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU
                self.result = self.function()  # records, computes nothing
            self.graph = graph
        except RuntimeError as e:  # a kernel of this GPU or of this PyTorch that cannot be recorded
            warnings.warn(f"answers without a CUDA graph, which is slower: {e}")

    def __call__(self):
        self.calls += 1
        if self.calls == self.AFTER + 1:
            self.record()
        if self.graph is None:
            return self.function()
        self.graph.replay()
        return self.result


class Molmo2(nn.Module):
    """Molmo2(ModelConfig or preset name). Weights are random; `Molmo2.from_pretrained(folder)` reads a checkpoint."""

    def __init__(self, cfg):
        super().__init__()
        cfg = replace(PRESETS[cfg]) if isinstance(cfg, str) else cfg
        self.cfg = cfg
        self.transformer = Decoder(cfg)
        self.vision_backbone = VisionBackbone(cfg)
        self.lm_head = nn.Linear(cfg.width, cfg.vocab, bias=False)
        if cfg.tie:
            self.lm_head.weight = self.transformer.wte.embedding
        self.residual_dropout = 0.0  # on every position, in training
        self.response_dropout = 0.0  # on top of that where an answer is predicted
        if not self.lm_head.weight.is_meta:  # there normal_ would import PyTorch's compiler, 80 MB, and draw nothing
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, only=None):
        """Random weights from which training starts fast. only: names of the parameters to reset; the others stay."""
        for name, p in self.named_parameters():
            if only is not None and name not in only:
                continue
            if p.ndim == 1:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
            elif name.endswith("positional_embedding"):  # so that the ViT need not learn first what is next to what
                p.copy_(waves(self.cfg.crop // self.cfg.patch, p.shape[1]) / 2)
            else:
                # 0.02 suits widths of thousands. A narrow matrix would shrink its input with it, and image features
                # would be a million times fainter than the embedding they are added to. 1/sqrt(inputs) keeps sizes.
                nn.init.normal_(p, std=0.02 if "wte." in name or p.shape[1] >= 1024 else p.shape[1] ** -0.5)
        if only is not None:  # blocks are new only if everything is
            return
        # What a sub-layer adds starts at zero, or random mixing would drown the pixels and their places at first.
        for block in self.vision_backbone.image_vit.transformer["resblocks"]:
            nn.init.zeros_(block.attention.wo.weight)
            nn.init.zeros_(block.feed_forward.w2.weight)
        for block in self.transformer.blocks:
            norms = [block.attn_norm, block.ff_norm]
            outputs = [block.self_attn.attn_out, block.mlp.ff_out]
            # A norm of zeros has no gradient. So a norm that comes last starts at zero itself.
            for module in norms if self.cfg.norm_after else outputs:
                nn.init.zeros_(module.weight)

    def num_params(self):
        """Parameters, a tied head counted as if it were its own tensor (the released files store it so)."""
        n = sum(p.numel() for p in self.parameters())
        return n + self.lm_head.weight.numel() if self.cfg.tie else n

    def parts(self):
        """{"vit", "connector", "decoder"}: [(name, parameter)] that share a learning rate. The EXTRA rows are new, as
        the connector is, and train with it."""
        parts = {"vit": [], "connector": [], "decoder": []}
        for name, p in self.named_parameters():
            is_new = name.startswith("vision_backbone") or name.endswith("new_embedding")
            part = "vit" if ".image_vit." in name else "connector" if is_new else "decoder"
            parts[part].append((name, p))
        return parts

    def blocks(self):
        """Decoder and ViT blocks: the units of sharding, compilation and activation checkpointing."""
        return [*self.transformer.blocks, *self.vision_backbone.image_vit.transformer["resblocks"]]

    def check(self, tokens, crops, pool, others, features=None):
        """Fail with the numbers in hand before a shape error fails without them."""
        for name, x in others.items():
            assert x is None or x.shape == tokens.shape, f"{name} is {tuple(x.shape)}, tokens {tuple(tokens.shape)}"
        n = int((tokens == self.cfg.image_token).sum())
        m = 0 if pool is None else len(pool)
        assert n == m, f"{n} <image> tokens but {m} pooled windows: was a sequence cut, or media left out?"
        top = int(tokens.max())
        rows = self.cfg.vocab + EXTRA
        assert top < rows, f"token id {top}, but the table has {rows} rows: is this another model's tokenizer?"
        if features is not None:
            assert features.shape == (m, self.cfg.width), f"features are {tuple(features.shape)}, of {m} windows"
        elif m:
            crop = (self.cfg.patches, self.cfg.patch ** 2 * 3)
            assert crops.shape[1:] == crop, f"crops are {tuple(crops.shape)}, expected (N, {crop[0]}, {crop[1]})"
            assert int(pool.max()) < crops.shape[0] * crops.shape[1], "pool points past the last patch"

    def prepare(self, tokens, crops=None, pool=None, weights=None, **others):
        """Check a batch, and find what stands where: the arguments of `forward` with image_at and loss_at, the places
        of <image> tokens and of loss weights among all B·T tokens. On the CPU, since a GPU would be waited for."""
        self.check(tokens, crops, pool, dict(others, weights=weights))
        image_at = (tokens.flatten() == self.cfg.image_token).nonzero()[:, 0]
        loss_at = None if weights is None else (weights.flatten() > 0).nonzero()[:, 0]
        return dict(others, tokens=tokens, crops=crops, pool=pool, weights=weights, image_at=image_at, loss_at=loss_at)

    def embed(self, tokens, crops=None, pool=None, features=None, image_at=None):
        """(B, T) ids and their images -> (B, T, D): image features are added to the `<image>` embedding.
        features: (M, D) of the <image> tokens in row-major order, if the vision backbone has made them before."""
        x = self.transformer.wte(tokens)
        if torch.is_autocast_enabled(x.device.type):  # which leaves a look-up in fp32, and so all that is added to it
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if crops is not None or features is not None:
            # Crops are encoded even if M is 0: under FSDP and context parallelism all ranks run the same modules.
            features = self.vision_backbone(crops, pool) if features is None else features
            if image_at is None:
                image_at = (tokens.flatten() == self.cfg.image_token).nonzero()[:, 0]
            x = x.flatten(0, 1).index_add(0, image_at, features.to(x.dtype))  # (B·T, D)
        return x.view(*tokens.shape, -1)

    def mask(self, tokens, example, branch):
        """Who may attend to whom, in the form that `attend` takes. A seam."""
        return dense_mask(example, branch, is_vision(tokens, self.cfg.vocab))

    def forward(self, tokens, crops=None, pool=None, pos=None, example=None, branch=None, targets=None, weights=None,
                z_loss=0.0, image_at=None, loss_at=None):
        """Logits (B, T, V), or, with targets and weights, the sum of weight · (nll + z_loss · lse²).
        tokens, pos, example, branch, targets: (B, T) int64; weights: (B, T) float; crops: (N, P, patch·patch·3);
        pool: (M, K). Without pos, example and branch each sequence is one plain causal example.
        image_at, loss_at: from `prepare`, which then has checked the batch too."""
        if image_at is None:
            ids = dict(pos=pos, example=example, branch=branch, targets=targets)
            prepared = self.prepare(tokens, crops, pool, weights, **ids)
            image_at, loss_at = prepared["image_at"], prepared["loss_at"]
        pos, example, branch = self.plain(tokens, pos, example, branch)
        mask = self.mask(tokens, example, branch)
        drop = None
        if self.training and (self.residual_dropout or self.response_dropout):
            drop = self.residual_dropout + self.response_dropout * (weights > 0).float()[..., None]  # (B, T, 1)
        x = self.transformer(self.embed(tokens, crops, pool, None, image_at), pos, mask, drop,
                             wanted=None if targets is None else loss_at)
        if targets is None:
            return self.lm_head(x)
        # x: (n, D) where there is a loss. The head, the largest matrix of all, runs nowhere else.
        targets, weights = (y.flatten().index_select(0, loss_at) for y in (targets, weights))
        return ChunkedNLL.apply(x, self.lm_head.weight, targets, weights, z_loss)

    @staticmethod
    def plain(tokens, pos, example, branch):
        """Fill in what a caller left out: positions 0, 1, ..., one example per sequence, no branches."""
        pos = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens) if pos is None else pos
        example = torch.ones_like(tokens) if example is None else example
        branch = torch.zeros_like(tokens) if branch is None else branch
        return pos, example, branch

    @torch.inference_mode()
    def generate(self, tokens, crops=None, pool=None, max_new_tokens=256, temperature=0.0, stop=(), pos=None,
                 example=None, branch=None, generator=None, features=None, top_p=1.0, frequency_penalty=0.0):
        """Continue B prompts; yields (B,) ids a step, on the CPU, as they come. Greedy at temperature 0, else
        drawn from the likeliest ids that have top_p together. A logit loses frequency_penalty each time its id is
        produced. Prompts of different lengths are padded on the right with example = 0. A sequence that has produced an
        id in `stop` repeats it until all have."""
        assert not self.training, "call model.eval() first: dropout would be on"
        self.check(tokens, crops, pool, dict(pos=pos, example=example, branch=branch), features)
        pos, example, branch = self.plain(tokens, pos, example, branch)
        B, T = tokens.shape
        # 1. Read the prompts.
        x = self.embed(tokens, crops, pool, features)
        # All buffers before the first layer runs: between what it makes and frees they would leave gaps of memory.
        caches = [KVCache(self.cfg, x, T + max_new_tokens) for _ in self.transformer.blocks]
        vision = is_vision(tokens, self.cfg.vocab)
        dense = T <= QUERIES or self.cfg.window
        mask = dense_mask(example, branch, vision) if dense else (example, branch, vision)
        each = torch.arange(B, device=tokens.device)
        last = (example > 0).sum(1) - 1
        x = self.transformer(x, pos, mask, caches=caches, wanted=each * T + last)  # (B, D)

        # 2. Go on from each prompt's last token. A new token sees what that one sees, and all new tokens before it.
        next_pos = pos[each, last] + 1
        key_pos = torch.cat([pos, next_pos[:, None] + torch.arange(max_new_tokens, device=tokens.device)], 1)
        keys = torch.arange(T + max_new_tokens, device=tokens.device)
        seen = [may_attend(last[b], keys[:T], example[b], branch[b], vision[b]) for b in range(B)]  # (T,) each
        new_mask = torch.cat([torch.stack(seen), keys.new_ones(B, max_new_tokens, dtype=torch.bool)], 1)[:, None, None]
        replays = x.device.type in Replayed.DEVICES and len(keys) <= Replayed.LONGEST
        if not replays and not self.cfg.window and bool(new_mask.all()):
            new_mask = None  # the fastest attention takes no mask
        ids = torch.empty_like(last)
        n_kept = torch.full_like(last[:1], T)

        def read():
            """Read `ids`, one token of each sequence: logits (B, V) of the next one."""
            if replays:  # the shapes in a graph cannot grow: what is not filled yet is masked
                S = len(keys)
                mask = new_mask & (keys <= n_kept)
            else:
                S = caches[0].used + 1
                mask = None if new_mask is None else new_mask[..., :S]
            with without_cudnn(x.device):
                y = self.transformer(self.embed(ids[:, None]), next_pos[:, None], mask, caches=caches,
                                     key_pos=key_pos[:, :S])
            n_kept.add_(1)
            next_pos.add_(1)
            return self.lm_head(y[:, 0]).float()

        if replays:
            read = Replayed(read)
            for cache in caches:
                cache.stay(n_kept)

        # 3. Token by token.
        stop_ids = torch.tensor(tuple(stop), dtype=torch.long)
        done = torch.zeros(B, dtype=torch.bool)
        said = torch.zeros(B, dtype=torch.long)  # these three on the CPU, for which a GPU is waited for once a token
        penalty = torch.zeros(B, self.cfg.vocab, device=tokens.device)
        logits = self.lm_head(x).float()  # (B, V)
        for n in range(1, max_new_tokens + 1):
            chosen = choose(logits - penalty, temperature, top_p, generator)
            penalty.scatter_add_(1, chosen[:, None], torch.full_like(penalty[:, :1], frequency_penalty))
            said = torch.where(done, said, chosen.cpu())
            done = done | torch.isin(said, stop_ids)
            yield said.clone()
            if n == max_new_tokens or bool(done.all()):
                return
            ids.copy_(chosen)
            logits = read()

    @classmethod
    def from_pretrained(cls, folder, vision=None, dtype=torch.float32):
        """A model from a checkpoint folder of any published layout, its weights in a type. vision: a SigLIP for a plain
        language model."""
        from lib import weights
        return weights.load(folder, vision, dtype)

    def save_pretrained(self, folder, frames=384, tiles=8):
        """Write config.json and model.safetensors as published. What the model was shown at most: frames of a video,
        high-resolution crops (tiles) of an image."""
        from lib import weights
        weights.save(self, folder, frames, tiles)


def empty_model(cfg):
    """A model of a ModelConfig, or of a preset's name, on the meta device: shapes without numbers."""
    with torch.device("meta"):
        return Molmo2(cfg)


if __name__ == "__main__":
    for name in PRESETS:
        model = empty_model(name)
        sizes = {part: sum(p.numel() for _, p in named) for part, named in model.parts().items()}
        print(f"{name:>6} {model.num_params():>14,}  " + "  ".join(f"{part} {n:,}" for part, n in sizes.items()))
