"""LoSparse: weights as low rank plus whole rows (Li et al. 2023, arXiv 2306.11222).

What the neurons of a matrix have in common is kept as low rank, and what is particular to a few of them as whole rows.

* `factors`, `mathematics`: a compressed matrix, what it costs, and the best low-rank part of one;
* `checks`, `calibration`, `own_text`, `plan`, `fit`, `streams`, `oneshot`: without training;
* `masked`, `pruner`, `handle`, `training`: rows that are chosen while the model trains;
* `layer`, `layout`, `dense`: what computes with the result, in the fastest of three forms, and the way back;
* `format`, `saving`, `unmade`: files that transformers opens. Importing this package teaches it how.
"""

from tenfold.compress.losparse import saving as saving
from tenfold.compress.losparse.dense import to_dense
from tenfold.compress.losparse.handle import LoSparse, attach
from tenfold.compress.losparse.layer import install, trim
from tenfold.compress.losparse.layout import settle
from tenfold.compress.losparse.oneshot import compress_once
from tenfold.compress.losparse.own_text import own_text
from tenfold.config.losparse import LoSparseConfig

__all__ = [
    "LoSparse",
    "LoSparseConfig",
    "attach",
    "compress_once",
    "install",
    "own_text",
    "settle",
    "to_dense",
    "trim",
]
