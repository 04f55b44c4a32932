"""Studies: questions about routing that a table answers, each measured anew by `moesaic bench NAME`.

`topk` compares ways to select the K largest, `balance` ways to keep experts evenly used, `study_k` how many experts a
token should meet; `tiny_lm` is the text and the language model of the last. `study` is what each leaves behind.
"""

from .study import Study

__all__ = ["Study"]
