"""Qwen3 (https://arxiv.org/abs/2505.09388) and Qwen2, the dense models, for inference.

Module names follow the checkpoints', so that a tensor's name tells where it goes; projections of
one input are merged. Tokens of all sequences lie in one row [num_tokens, ...]: only attention
knows where one sequence ends.

`forward` is the model as the paper has it. `forward_few` is the same for a decode step of a few
sequences on a GPU, where reading the weights is all that counts: six launches a layer.
"""

import torch
from torch import Tensor, nn

from nanovllm import kernels
from nanovllm.config import ModelConfig
from nanovllm.layers.attention import Attention, Backend
from nanovllm.layers.embed_head import Embedding, LMHead
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import GatedLinear, Linear, MergedLinear
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.utils.context import Context


class Qwen3Attention(nn.Module):
    """Grouped-query attention; Qwen3 norms each head of q and k, Qwen2 has biases instead."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        q_size, kv_size = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.qkv_proj = MergedLinear(
            config.hidden_size,
            {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
            bias=config.qkv_bias,
        )
        self.o_proj = Linear(q_size, config.hidden_size, bias=config.output_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.attn = Attention(config, backend)

    @property
    def norms(self) -> tuple[Tensor | None, Tensor | None]:
        """The weights [head_dim] of q's and k's norm."""
        if self.q_norm is None or self.k_norm is None:
            return None, None
        return self.q_norm.weight, self.k_norm.weight

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        cos_sin: Tensor,
        positions: Tensor,
        context: Context,
        rows: Tensor | None = None,
    ) -> Tensor:
        """x, residual [num_tokens, hidden_size] -> residual (overwritten) + attention of x.

        Args:
            rows: int64, those of the result to compute, in a new tensor; None: all.
        """
        heads = self.attn(self.qkv_proj(x), self.norms, cos_sin, positions, context)
        if rows is not None:
            heads, residual = heads[rows], residual[rows]
        return self.o_proj(heads, residual)


class Qwen3MLP(nn.Module):
    """SiLU-gated MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = GatedLinear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual [num_tokens, hidden_size] -> residual (overwritten) + MLP of x."""
        return self.down_proj(self.gate_up_proj(x), residual)


class Qwen3DecoderLayer(nn.Module):
    """Pre-norm block."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        self.self_attn = Qwen3Attention(config, backend)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        cos_sin: Tensor,
        positions: Tensor,
        context: Context,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The stream x [num_tokens, hidden_size] through the block.

        x may be overwritten, and be the result: who wants to keep a layer's output, clones it.

        Args:
            rows: int64, those of the result to compute; None: all. K and V of all are stored.
        """
        x = self.self_attn(self.input_layernorm(x), x, cos_sin, positions, context, rows)
        return self.mlp(self.post_attention_layernorm(x), x)

    def forward_few(
        self, x: Tensor, cos_sin: Tensor, positions: Tensor, context: Context
    ) -> Tensor:
        """The stream x [num_seqs, hidden_size] through the block, in six launches."""
        from nanovllm.kernels.gemv import linear_add, rms_norm_gate_up, rms_norm_linear

        attention, mlp = self.self_attn, self.mlp
        norm, qkv_proj, o_proj = self.input_layernorm, attention.qkv_proj, attention.o_proj
        qkv = rms_norm_linear(x, norm.weight, norm.eps, qkv_proj.weight, qkv_proj.bias)
        heads = attention.attn(qkv, attention.norms, cos_sin, positions, context)
        x = linear_add(heads, o_proj.weight, x, o_proj.bias)
        norm = self.post_attention_layernorm
        hidden = rms_norm_gate_up(x, norm.weight, norm.eps, mlp.gate_up_proj.weight)
        return linear_add(hidden, mlp.down_proj.weight, x)


class Qwen3Model(nn.Module):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: ModelConfig, backend: Backend, max_positions: int) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = RotaryEmbedding(config.head_dim, max_positions, config.rope_theta)
        self.layers = nn.ModuleList(
            Qwen3DecoderLayer(config, backend) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, positions: Tensor, context: Context) -> Tensor:
        """Embeddings [num_tokens, hidden_size], overwritten, -> normed hidden states.

        Of the positions that `context.logit_rows` names: the others end with the last layer's keys
        and values, since no layer after it attends to them.
        """
        *layers, last_layer = self.layers
        for layer in layers:
            x = layer(x, self.rotary_emb.cos_sin, positions, context)
        x = last_layer(x, self.rotary_emb.cos_sin, positions, context, context.logit_rows)
        return self.norm(x)

    def forward_few(self, x: Tensor, positions: Tensor, context: Context) -> Tensor:
        """`forward` up to the final norm."""
        for layer in self.layers:
            x = layer.forward_few(x, self.rotary_emb.cos_sin, positions, context)
        return x


class Qwen3ForCausalLM(nn.Module):
    """The whole model, parameters in the default dtype on the default device, not initialised.

    Args:
        config: sizes and variants; Qwen2 is Qwen3 with QKV biases and no QK-norm.
        backend: computes attention.
        max_positions: positions 0 .. max_positions - 1 may occur.
    """

    def __init__(self, config: ModelConfig, backend: Backend, max_positions: int) -> None:
        super().__init__()
        self.model = Qwen3Model(config, backend, max_positions)
        self.lm_head = LMHead(config.vocab_size, config.hidden_size)
        self.tie_word_embeddings = config.tie_word_embeddings
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.max_few = 0  # the largest decode step that forward_few takes
        if kernels.usable():
            from nanovllm.kernels.gemv import MAX_TOKENS

            self.max_few = MAX_TOKENS if config.hidden_size <= 2048 else 1

    @torch.inference_mode()
    def forward(
        self, input_ids: Tensor, positions: Tensor, context: Context, out: Tensor | None = None
    ) -> Tensor:
        """Logits of the positions that `context.logit_rows` names.

        Args:
            input_ids, positions: int64 [num_tokens], the tokens of all sequences in a row.

        Returns:
            [num_sampled, vocab_size] in the model's dtype: `out`, if given.
        """
        x = self.model.embed_tokens(input_ids)
        return self.lm_head(self.model(x, positions, context), out=out)

    @torch.inference_mode()
    def decode(
        self, x: Tensor, positions: Tensor, context: Context, out: Tensor | None = None
    ) -> Tensor:
        """A decode step: embeddings [num_seqs, hidden_size] to logits [num_seqs, vocab_size]."""
        if len(x) > self.max_few:
            return self.lm_head(self.model(x, positions, context), out=out)
        from nanovllm.kernels.gemv import rms_norm_linear

        norm = self.model.norm
        x = self.model.forward_few(x, positions, context)
        return rms_norm_linear(x, norm.weight, norm.eps, self.lm_head.weight, out=out)
