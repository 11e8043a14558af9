"""Qwen3 (https://arxiv.org/abs/2505.09388) and Qwen2, the dense models, for inference.

Module names follow the checkpoints', so that a tensor's name tells where it goes; projections of
one input are merged. Tokens of all sequences lie in one row [num_tokens, ...]: only attention
knows where one sequence ends.
"""

import torch
from torch import Tensor, nn

from nanovllm.config import ModelConfig
from nanovllm.layers.activation import silu_and_mul
from nanovllm.layers.attention import Attention, Backend
from nanovllm.layers.embed_head import Embedding, LMHead
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import Linear, MergedLinear
from nanovllm.layers.rotary_embedding import RotaryEmbedding, apply_rotary
from nanovllm.utils.context import Context


class Qwen3Attention(nn.Module):
    """Grouped-query attention; Qwen3 norms each head of q and k, Qwen2 has biases instead."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.sizes = [q_size, kv_size, kv_size]
        self.qkv_proj = MergedLinear(
            config.hidden_size,
            {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
            bias=config.qkv_bias,
        )
        self.o_proj = Linear(q_size, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm
        self.attn = Attention(config.head_dim, backend)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: Context) -> Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, hidden_size]."""
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([size // self.head_dim for size in self.sizes], dim=1)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        return self.o_proj(self.attn(q, k, v, context).flatten(1))


class Qwen3MLP(nn.Module):
    """SiLU-gated MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = MergedLinear(config.hidden_size, {"gate_proj": size, "up_proj": size})
        self.down_proj = Linear(size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, hidden_size]."""
        return self.down_proj(silu_and_mul(self.gate_up_proj(x)))


class Qwen3DecoderLayer(nn.Module):
    """Pre-norm block. Takes and gives (x, residual): the sum of the two is the stream."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        self.self_attn = Qwen3Attention(config, backend)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, context: Context
    ) -> tuple[Tensor, Tensor]:
        """x, residual: [num_tokens, hidden_size] each; residual is None in the first layer."""
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm.forward_add(x, residual)
        x = self.self_attn(x, cos, sin, context)
        x, residual = self.post_attention_layernorm.forward_add(x, residual)
        return self.mlp(x), residual


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

    def forward(self, input_ids: Tensor, positions: Tensor, context: Context) -> Tensor:
        """int64 [num_tokens] each -> [num_tokens, hidden_size]."""
        cos, sin = self.rotary_emb(positions)
        x, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, cos, sin, context)
        x, _ = self.norm.forward_add(x, residual)
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

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, positions: Tensor, context: Context) -> Tensor:
        """Logits of the positions that `context.logit_rows` names.

        Args:
            input_ids, positions: int64 [num_tokens], the tokens of all sequences in a row.

        Returns:
            [num_sampled, vocab_size] in the model's dtype.
        """
        return self.lm_head(self.model(input_ids, positions, context), context)
