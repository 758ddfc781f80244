"""Two model families at any size, as ordinary transformers configurations.

``paper``: OPT with post-LayerNorm, learned positions, GELU, tied embeddings (the architecture of Xu et al., ICASSP 2021).
``llama``: RMSNorm, rotary positions, SwiGLU, tied embeddings. No Transformer code of our own.

The configuration's pad id is the tokenizer's own ``<pad>`` or none: OPT's default of 1, or a pad that is also the boundary (usual for
byte-level tokenizers), would take an ordinary token's embedding out of training.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mixbits.errors import SpecError


class ModelSize(BaseModel):
    """Architecture and size of a model to train from scratch.

    ``dropout`` is on residuals and embeddings and exists for ``paper`` only (None: 0.1 there); Llama has none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Literal["paper", "llama"] = "paper"
    num_layers: int = Field(4, ge=1)
    hidden_size: int = Field(256, ge=4)
    feed_forward_size: int = Field(1024, ge=4)
    num_heads: int = Field(4, ge=1)
    context: int = Field(128, ge=2)
    dropout: float | None = Field(None, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelSize:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.preset == "llama" and self.hidden_size // self.num_heads % 2:
            raise ValueError(
                f"hidden_size / num_heads is {self.hidden_size // self.num_heads}; rotary positions need an even number"
            )
        if self.preset == "llama" and self.dropout:
            raise ValueError("the llama preset has no dropout; leave dropout out or use preset=paper")
        return self


def build_model(size: ModelSize, tokenizer: Any, *, seed: int) -> Any:
    """A freshly initialised causal LM for ``tokenizer``'s vocabulary, in float32, deterministic for ``seed``.

    Raises SpecError when the tokenizer has no eos token.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    if tokenizer.eos_token_id is None:
        raise SpecError("the tokenizer needs an eos token as sentence boundary; set tokenizer.eos_token")
    others = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    boundary = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "max_position_embeddings": size.context,
        "pad_token_id": None if tokenizer.pad_token_id in others else tokenizer.pad_token_id,
        "tie_word_embeddings": True,
        **boundary,
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if size.preset == "paper":
            return OPTForCausalLM(
                OPTConfig(
                    ffn_dim=size.feed_forward_size,
                    word_embed_proj_dim=size.hidden_size,
                    do_layer_norm_before=False,
                    activation_function="gelu",
                    dropout=0.1 if size.dropout is None else size.dropout,
                    attention_dropout=0.0,
                    layerdrop=0.0,
                    **shared,
                )
            )
        return LlamaForCausalLM(
            LlamaConfig(
                intermediate_size=size.feed_forward_size,
                num_key_value_heads=size.num_heads,
                attention_dropout=0.0,
                hidden_act="silu",
                **shared,
            )
        )
