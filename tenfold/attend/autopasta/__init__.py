"""AutoPASTA: a model names the key sentence itself and then attends to it (Zhang et al. 2024, arXiv 2409.10790).

    ask = AutoPasta(model, tokenizer)
    ask("When did Dr. Smith move to Paris?", context).answer

* `answering`: the method; `prompts`: what the model is asked;
* `quote_matching`, `sentences`, `embed`: from what the model quotes to a sentence of the context.
"""

from tenfold.attend.autopasta.answering import MODES, Answer, AutoPasta

__all__ = ["MODES", "Answer", "AutoPasta"]
