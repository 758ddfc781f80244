"""The peer: llama.cpp through llama-cpp-python, run by an interpreter of its own (needs llama-cpp-python, gguf, numpy; no mixbits).

A small server: one JSON command a line on standard input, one JSON answer a line on standard output, so that its turns interleave with
those of the other systems. The GGUF file is written here from the dense weights (F32, then llama.cpp's own quantization of it).
Rotary halves are re-ordered as llama.cpp's converter does. Log-softmax is not done here and not counted, in favour of the peer.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from typing import Any

import gguf
import llama_cpp as ll
import numpy as np

FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q3_K_S": 11, "Q4_K_S": 14, "TQ1_0": 36, "TQ2_0": 37}  # llama_ftype
_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_MODELS: dict[str, Any] = {}


def _log(level: int, text: bytes, data: Any) -> None:
    if level >= 3:
        _SAID.append(text.decode(errors="replace"))


_SAID: list[str] = []
_LOG = ll.llama_log_callback(_log)


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from halves to pairs."""
    rows, cols = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def write(source: str, path: str, config: dict[str, Any]) -> dict[str, Any]:
    """A GGUF file in F32 of the Llama weights in ``source`` (npz, transformers' names)."""
    writer = gguf.GGUFWriter(path, "llama")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(0)
    with np.load(source) as tensors:
        for name in tensors.files:
            value = np.ascontiguousarray(tensors[name], dtype=np.float32)
            if name == "model.embed_tokens.weight":
                target = "token_embd.weight"
            elif name == "model.norm.weight":
                target = "output_norm.weight"
            else:
                _, _, layer, rest = name.split(".", 3)
                short = _NAMES[rest.removesuffix(".weight")]
                target = f"blk.{layer}.{short}.weight"
                if short in ("attn_q", "attn_k"):
                    value = np.ascontiguousarray(_permuted(value, heads))
            writer.add_tensor(target, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"bytes": os.path.getsize(path)}


def quantize(source: str, path: str, kind: str) -> dict[str, Any]:
    """llama.cpp's quantization of a file, with its default choice of types."""
    settings = ll.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = FILE_TYPES[kind], 1
    error = ll.llama_model_quantize(source.encode(), path.encode(), ctypes.byref(settings))
    if error:
        raise RuntimeError(f"llama_model_quantize gave {error}: {''.join(_SAID)[-500:]}")
    return {"bytes": os.path.getsize(path)}


class Loaded:
    """A model with a context for one stream and one for batches of sequences."""

    def __init__(self, path: str, threads: int, sequences: int, length: int, context: int) -> None:
        self.model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"cannot load {path}: {''.join(_SAID)[-500:]}")
        self.vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))
        self.sequences, self.length = sequences, length
        self.one = self._context(threads, 1, context, 512)
        self.many = self._context(threads, sequences, sequences * length, sequences * length)
        self.single, self.batch = ll.llama_batch_init(1, 0, 1), ll.llama_batch_init(sequences * length, 0, 1)

    def _context(self, threads: int, sequences: int, cells: int, batch: int) -> Any:
        settings = ll.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = cells, batch, batch, sequences
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = sequences > 1
        made = ll.llama_init_from_model(self.model, settings)
        if not made:
            raise RuntimeError(f"cannot make a context: {''.join(_SAID)[-500:]}")
        return made

    def _run(self, context: Any, batch: Any) -> None:
        if (error := ll.llama_decode(context, batch)) != 0:
            raise RuntimeError(f"llama_decode gave {error}: {''.join(_SAID)[-500:]}")

    def decode(self, tokens: list[int], warm: int) -> tuple[float, list[np.ndarray]]:
        """Seconds of a step after the first ``warm`` ones, and the logits of each."""
        ll.llama_memory_clear(ll.llama_get_memory(self.one), True)
        batch, logits, started = self.single, [], 0.0
        for i, token in enumerate(tokens):
            if i == warm:
                started = time.perf_counter()
            _set(batch, 0, token, i, 0)
            batch.n_tokens = 1
            self._run(self.one, batch)
            logits.append(ll.llama_get_logits_ith(self.one, 0))
            if i < 4:  # kept for the check; later ones stay where the library has them
                logits[-1] = np.ctypeslib.as_array(logits[-1], (self.vocabulary,)).copy()
        return (time.perf_counter() - started) / (len(tokens) - warm), logits

    def score(self, rows: list[list[int]]) -> float:
        """Seconds until the logits of every position of every sequence are there."""
        ll.llama_memory_clear(ll.llama_get_memory(self.many), True)
        at = 0
        for number, row in enumerate(rows):
            for position, token in enumerate(row):
                _set(self.batch, at, token, position, number)
                at += 1
        self.batch.n_tokens = at
        started = time.perf_counter()
        self._run(self.many, self.batch)
        ll.llama_get_logits_ith(self.many, at - 1)
        return time.perf_counter() - started

    def row_logits(self, at: int) -> np.ndarray:
        """Logits of position ``at`` of the batch scored last."""
        return np.ctypeslib.as_array(ll.llama_get_logits_ith(self.many, at), (self.vocabulary,)).copy()


def _set(batch: Any, at: int, token: int, position: int, sequence: int) -> None:
    batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, position, 1, 1
    batch.seq_id[at][0] = sequence


def answer(command: dict[str, Any]) -> dict[str, Any]:
    """Do one command."""
    do = command["do"]
    if do == "versions":
        from importlib import metadata

        info = ll.llama_print_system_info().decode()
        return {"llama-cpp-python": ll.__version__, "gguf": metadata.version("gguf"), "build": " ".join(info.split())}
    if do == "write":
        return write(command["source"], command["path"], command["config"])
    if do == "quantize":
        return quantize(command["source"], command["path"], command["kind"])
    if do == "load":
        keys = ("threads", "sequences", "length", "context")
        _MODELS[command["kind"]] = Loaded(command["path"], *(command[key] for key in keys))
        return {}
    model = _MODELS[command["kind"]]
    if do == "decode":
        return {"seconds": model.decode(command["tokens"], command["warm"])[0]}
    if do == "score":
        return {"seconds": model.score(command["rows"])}
    if do == "check":
        steps = model.decode(command["tokens"][:4], 0)[1]
        model.score(command["rows"])
        np.savez(command["path"], steps=np.stack(steps), row=model.row_logits(command["at"]))
        return {}
    raise ValueError(f"no command {do!r}")


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints goes to standard error
    ll.llama_log_set(_LOG, ctypes.c_void_p(0))
    ll.llama_backend_init()
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()
