"""LoSparse: weights as low rank plus structured sparse (arXiv 2306.11222).

Importing it teaches transformers to open compressed models.
"""

from tenfold.compress.losparse import saving as saving
