"""Write a Llama as a GGUF file in fp32, so that the weights are known."""

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaForCausalLM


def to_gguf_order(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """GGUF keeps the two halves of each rotary head interleaved; Llama keeps them apart."""
    return (
        weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """An fp32 file of a Llama, with a tokenizer that is only there to be there."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = (chr(i) for i in range(ord("A"), ord("A") + config.vocab_size - 1))
    writer.add_token_list(["<e>", *tokens])
    writer.add_token_merges(["A B"])
    writer.add_eos_token_id(0)
    state = model.state_dict()
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for i in range(config.num_hidden_layers):
        for ours, theirs in {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }.items():
            names[f"model.layers.{i}.{ours}.weight"] = f"blk.{i}.{theirs}.weight"
    for ours, theirs in names.items():
        tensor = state[ours]
        if ours.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = to_gguf_order(tensor, heads[ours.split(".")[-2]])
        writer.add_tensor(theirs, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
