"""The program that a peer's own Python runs: one cache of one package, measured like ours.

Started by `cache_peers` with the path of a job, a JSON file; prints one line of JSON at the end. Nothing of
msa_hf is imported: `cache_protocol`, `held_bytes` and `decode_speed` are found beside this file, and the rest
is what the peer's environment has.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

RECENT = 128  # tokens that every peer with a recent window keeps as they are
GROUP = 64  # the default of Transformers' QuantizedCache


def make_cache(peer: str, bits: int, config: Any) -> Any:
    """A fresh cache of a peer, made as its documentation says."""
    from transformers import DynamicCache

    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if peer in ("hqq", "quanto"):
        from transformers import QuantizedCache

        # Transformers' documentation recommends axis 1 for HQQ, 0 for quanto.
        axis = 1 if peer == "hqq" else 0
        return QuantizedCache(
            peer,
            config,
            nbits=bits,
            axis_key=axis,
            axis_value=axis,
            q_group_size=GROUP,
            residual_length=RECENT,
        )
    if peer == "turbokv":
        from turboquant import TurboQuantCache

        return TurboQuantCache(config, nbits=bits, residual_length=RECENT, device="cpu")
    if peer == "turboquant":
        from turboquant import TurboQuantCache

        return TurboQuantCache(bits=bits)  # its window of 128 is fixed
    if peer == "turboquant-vllm":
        from turboquant_vllm import CompressedDynamicCache

        cache = DynamicCache()
        CompressedDynamicCache(cache, head_dim=heads, bits=bits, model_config=config)
        return cache
    if peer == "turboquant-kv":
        from turboquant.core import TurboQuantProd
        from turboquant.hf_cache import TurboQuantDynamicCache

        return TurboQuantDynamicCache(config, TurboQuantProd(bits=bits, head_dim=heads, device="cpu", seed=0))
    raise ValueError(f"peer {peer!r} is unknown")


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Every part that the job asks for: {"quality": ..., "speed": ...}, and the versions it ran with."""
    import transformers
    from cache_protocol import marginal_bits
    from decode_speed import dense_states
    from held_bytes import held_bytes

    torch.manual_seed(0)
    torch.set_num_threads(job["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    result: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}

    def fresh() -> Any:
        return make_cache(job["peer"], job["bits"], model.config)

    if "quality" in job["parts"]:
        result["quality"] = _quality(job, model, fresh)
        length = job["prefill"] + job["decoded"]
        states = dense_states(model, job["texts"][0], length)
        short = [(keys.bfloat16(), values.bfloat16()) for keys, values in states]
        weights = list(model.parameters())
        result["bits"] = marginal_bits(
            fresh, short, lambda cache: held_bytes(cache, weights), job["prefill"], job["block"]
        )
    if "speed" in job["parts"]:
        result["speed"] = _speed(job, model, fresh)
    return result


def _quality(job: dict[str, Any], model: Any, fresh: Any) -> list[dict[str, list[float]]]:
    """Divergences per text; first the dense logits of the parent are checked against this process's own."""
    from cache_protocol import diverge, teacher_force
    from safetensors.torch import load_file
    from transformers import DynamicCache

    results = []
    for number, ids in enumerate(job["texts"]):
        dense = load_file(Path(job["dense"]) / f"{number}.safetensors")["logits"]
        targets = ids[job["prefill"] + 1 :]
        if not number:
            cache = DynamicCache(config=model.config)
            own = diverge(teacher_force(model, cache, ids, job["prefill"], job["block"]), dense, targets)
            if not max(own.kl) < 1e-4:
                raise RuntimeError(f"the dense model differs here: KL up to {max(own.kl):.1e}")
        logits = teacher_force(model, fresh(), ids, job["prefill"], job["block"])
        results.append(dataclasses.asdict(diverge(logits, dense, targets)))
    return results


def _speed(job: dict[str, Any], model: Any, fresh: Any) -> list[dict[str, Any]]:
    from decode_speed import decode_speed, dense_states

    states = dense_states(model, job["long"], max(job["contexts"]))
    return [
        dataclasses.asdict(
            decode_speed(
                model,
                fresh,
                job["long"],
                states,
                context=context,
                groups=job["groups"],
                steps=job["steps"],
                largest_kl=float("inf"),
            )
        )
        for context in job["contexts"]
    ]


if __name__ == "__main__":
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
