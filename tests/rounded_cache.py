"""Dense tensors rounded to a step: a stand-in for a lossy cache whose error is known."""

from transformers import DynamicCache

from msa_hf.evaluation.cache_systems import CacheSystem


class RoundedCache(DynamicCache):
    """Rounds keys and values to multiples of `step`; 0 leaves them as they are."""

    def __init__(self, config, step):
        super().__init__(config=config)
        self.step = step

    def update(self, keys, values, layer, *args, **kwargs):
        if self.step:
            keys, values = ((x / self.step).round() * self.step for x in (keys, values))
        return super().update(keys, values, layer, *args, **kwargs)


def rounded(step):
    return CacheSystem(f"rounded {step}", lambda config: RoundedCache(config, step))
