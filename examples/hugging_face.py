"""One line for a Hugging Face model: run its experts with moesaic, and compare with the model's own loop.

python examples/hugging_face.py            # the small model beside this file; needs pip install "moesaic[hf]"
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import moesaic.integrations.transformers  # noqa: F401  registers the name

CHECKPOINT = Path(__file__).parent / "tiny_lm"


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, experts_implementation="moesaic", dtype=torch.float32)

    # this model reads and writes bytes; another one would have a tokenizer
    prompt = torch.tensor([list(b"class Parser:\n    def __init__(self")])
    sampling = dict(max_new_tokens=200, do_sample=True, temperature=0.6, top_k=40)
    torch.manual_seed(0)
    with torch.no_grad():
        logits = model(prompt).logits
        text = model.generate(prompt, attention_mask=torch.ones_like(prompt), **sampling)
    print(bytes(text[0].tolist()).decode(errors="replace"))

    model.set_experts_implementation("eager")
    with torch.no_grad():
        difference = (model(prompt).logits - logits).abs().max() / logits.abs().max()
    print(f"\nlargest difference from the model's own loop over experts: {difference:.1e} of the largest logit")


if __name__ == "__main__":
    main()
