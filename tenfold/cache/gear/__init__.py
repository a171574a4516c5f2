"""GEAR: a KV cache in 2 to 4 bits (Kang et al. 2024, arXiv 2403.05527).

>>> from tenfold import gear
>>> from tenfold.models.tiny import tiny_model
>>> opened = tiny_model("llama")
>>> ids = opened.tokenizer("some text", return_tensors="pt")
>>> with gear.attach(opened.model, bits=4) as cache:
...     _ = opened.model.generate(**ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
>>> cache.report()["mode"]
'store'
"""

from tenfold.cache.gear.cache import GearCache, attach
from tenfold.cache.gear.recipe import Format, compress, element_bits
from tenfold.config.gear import CacheConfig

__all__ = ["CacheConfig", "Format", "GearCache", "attach", "compress", "element_bits"]
