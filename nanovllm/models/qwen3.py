"""Qwen3 (https://arxiv.org/abs/2505.09388), for inference, and models that differ in details.

Those are Qwen3-MoE, Qwen2, Llama and Mistral: what each has, ModelConfig says.

Module names follow the checkpoints', so that a tensor's name tells where it goes; projections of
one input are merged. Tokens of all sequences lie in one row [num_tokens, ...]: only attention
knows where one sequence ends.

Each half of a layer adds something to the stream x: its first linear layer is handed the norm that
x goes through before it, its last one what its output is added to. So a layer can do all of it in
one launch where that is faster.

Where several ranks share a model, each has some heads, a part of each MLP and of the vocabulary;
the halves of a layer end with a sum over the ranks, so that x is whole everywhere.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from nanovllm.layers.attention import Attention, Backend
from nanovllm.layers.embed_head import Embedding, LMHead
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import GatedLinear, MergedLinear, RowParallelLinear
from nanovllm.layers.moe import MoE
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.layers.stored_weight import StoredWeight, quantize
from nanovllm.model_config import ModelConfig
from nanovllm.utils.context import Context
from nanovllm.utils.parallel import RankGroup


class Qwen3Attention(nn.Module):
    """Grouped-query attention; Qwen3 norms each head of q and k, others have biases or neither."""

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        rotary_emb: RotaryEmbedding,
        group: RankGroup,
        **options: Any,
    ) -> None:
        super().__init__()
        q_size, kv_size = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.qkv_proj = MergedLinear(
            config.hidden_size,
            {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
            bias=config.qkv_bias,
            **options,
        )
        self.o_proj = RowParallelLinear(
            q_size, config.hidden_size, group, bias=config.output_bias, **options
        )
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, **options)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, **options)
        self.attn = Attention(config, backend, rotary_emb)

    @property
    def qk_norms(self) -> tuple[Tensor | None, Tensor | None]:
        """The weights [head_dim] of q's and k's norm."""
        if self.q_norm is None or self.k_norm is None:
            return None, None
        return self.q_norm.weight, self.k_norm.weight

    def forward(
        self, x: Tensor, norm: RMSNorm, context: Context, rows: Tensor | None = None
    ) -> Tensor:
        """x [num_tokens, hidden_size], overwritten, -> x + attention of norm(x).

        Args:
            rows: int64, those of the result to compute, in a new tensor; None: all.
        """
        qkv = self.qkv_proj(x, norm=norm)
        heads = self.attn(qkv, self.qk_norms, context)
        if rows is not None:
            heads, x = heads[rows], x[rows]
        return self.o_proj(heads, residual=x)


class Qwen3MLP(nn.Module):
    """SiLU-gated MLP."""

    def __init__(self, config: ModelConfig, group: RankGroup, **options: Any) -> None:
        super().__init__()
        hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
        options["bias"] = config.mlp_bias
        self.gate_up_proj = GatedLinear(hidden_size, intermediate_size, **options)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, group, **options)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x [num_tokens, hidden_size], overwritten, -> x + MLP of norm(x)."""
        return self.down_proj(self.gate_up_proj(x, norm=norm), residual=x)


class Qwen3DecoderLayer(nn.Module):
    """Pre-norm block; index: of the layer in the model."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        backend: Backend,
        rotary_emb: RotaryEmbedding,
        group: RankGroup,
        **options: Any,
    ) -> None:
        super().__init__()
        self.self_attn = Qwen3Attention(config, backend, rotary_emb, group, **options)
        has_experts = config.experts is not None and index in config.experts.layers
        mlp = MoE if has_experts else Qwen3MLP
        self.mlp = mlp(config, group, **options)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **options)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **options)
        if config.quantization is not None:
            quantize(self, f"model.layers.{index}", config.quantization)

    def forward(self, x: Tensor, context: Context, rows: Tensor | None = None) -> Tensor:
        """The stream x [num_tokens, hidden_size] through the block.

        x may be overwritten, and be the result: who wants to keep a layer's output, clones it.

        Args:
            rows: int64, those of the result to compute; None: all. K and V of all are stored.
        """
        x = self.self_attn(x, self.input_layernorm, context, rows)
        return self.mlp(x, self.post_attention_layernorm)


class Qwen3Model(nn.Module):
    """Embedding, decoder layers, final norm."""

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        max_positions: int,
        group: RankGroup,
        **options: Any,
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, group, **options)
        self.rotary_emb = RotaryEmbedding(
            config.head_dim, max_positions, config.rope, options.get("device")
        )
        self.layers = nn.ModuleList(
            Qwen3DecoderLayer(config, index, backend, self.rotary_emb, group, **options)
            for index in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **options)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Embeddings [num_tokens, hidden_size], overwritten, through the layers, up to the norm.

        Of the positions that `context.logit_rows` names: the others end with the last layer's keys
        and values, since no layer after it attends to them.
        """
        *layers, last_layer = self.layers
        for layer in layers:
            x = layer(x, context)
        return last_layer(x, context, context.logit_rows)


class Qwen3ForCausalLM(nn.Module):
    """The whole model, or one rank's part, its parameters not initialised.

    Args:
        config: sizes and variants, of the part.
        backend: computes attention.
        max_positions: positions 0 .. max_positions - 1 may occur.
        group: of the ranks that share the model.
        **options: device and dtype of the parameters.
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        max_positions: int,
        group: RankGroup | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        group = RankGroup() if group is None else group
        self.model = Qwen3Model(config, backend, max_positions, group, **options)
        self.lm_head = LMHead(config.vocab_size, config.hidden_size, **options)
        self.tie_word_embeddings = config.tie_word_embeddings
        quantization = config.quantization
        if quantization is not None and quantization.quantizes_head:
            self.lm_head.quantize(quantization._replace(is_stored=False))
        self.unpack()

    def pack(self) -> None:
        """To be called when all parameters are filled: see StoredWeight.pack.

        A tied embedding stays as it is, since its rows are looked up, beside the packed head.
        """
        for weight in self._stored_weights():
            weight.pack()

    def unpack(self) -> None:
        """To be called before parameters are filled."""
        for weight in self._stored_weights():
            weight.unpack()
        if self.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _stored_weights(self) -> Iterator[StoredWeight]:
        return (module for module in self.modules() if isinstance(module, StoredWeight))

    def forward(self, x: Tensor, context: Context, out: Tensor | None = None) -> Tensor:
        """Logits of the positions that `context.logit_rows` names.

        Args:
            x: [num_tokens, hidden_size], the embeddings (`model.embed_tokens`) of the tokens of all
                sequences in a row; overwritten.

        Returns:
            [num_sampled, vocab_size] in the model's dtype (`out`, if given), of the vocabulary the
            rank's part.
        """
        x = self.model(x, context)
        return self.lm_head(x, norm=self.model.norm, out=out)
