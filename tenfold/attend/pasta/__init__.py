"""PASTA: a frozen model attends more to what the user marked (Zhang et al. 2023, arXiv 2311.02262).

    marks = pasta.encode(tokenizer, [pasta.from_tags("The sky is green. <mark>Answer in French.</mark> Why?")])
    with pasta.steer(model, marks, profile="default"):
        model.generate(**marks.inputs)

* `steering`: the emphasis itself; `blocks`: which keys it biases at each step;
* `profiles`, `heads`, `search`, `profiling`: which heads, and how they are found;
* `tasks`, `likelihood`, `attention_share`: what steering is measured on.
"""

from tenfold.attend.chat_marks import MessageSpan, from_messages, in_chat
from tenfold.attend.pasta.profiles import Profile, load_profile, save_profile
from tenfold.attend.pasta.steering import Steered, lifts, steer
from tenfold.attend.text_marks import Marked, Marks, TextSpan, encode, from_spans, from_substrings, from_tags

__all__ = [
    "Marked",
    "Marks",
    "MessageSpan",
    "Profile",
    "Steered",
    "TextSpan",
    "encode",
    "from_messages",
    "from_spans",
    "from_substrings",
    "from_tags",
    "in_chat",
    "lifts",
    "load_profile",
    "save_profile",
    "steer",
]
