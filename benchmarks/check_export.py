"""Compare an exported run with its checkpoint on the whole held-out text: token ids and logits.

    python benchmarks/check_export.py runs/quickstart

Ids come from stock AutoTokenizer and from sentencepiece, for every held-out document; logits from stock
AutoModelForCausalLM and from headrace, in float32, for the first 256 tokens of each.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.data import TokenDataset
from headrace.pretrain.saved_run import load_run


def main(run: Path) -> None:
    """Print how many documents differ in their ids, and the largest difference of the logits."""
    model, tokenizer, config = load_run(run)
    stock_tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    stock, problems = AutoModelForCausalLM.from_pretrained(run / "hf", dtype=torch.float32, output_loading_info=True)
    dataset = TokenDataset(config.data.folder, "heldout")
    different, tokens, largest = 0, 0, 0.0
    for index in range(dataset.num_documents):
        ids = dataset.document(index)[1:-1].tolist()
        text = tokenizer.decode(ids)
        different += stock_tokenizer(text, add_special_tokens=False)["input_ids"] != tokenizer.processor.encode(text)
        tokens += len(ids)
        start = torch.tensor([[tokenizer.bos_id, *ids[:255]]])
        with torch.no_grad():
            largest = max(largest, float((stock(start).logits - model(start)).abs().max()))
    print(f"{type(stock).__name__}: missing or unexpected weights: {any(problems.values())}")
    print(f"ids: {different} of {dataset.num_documents} documents ({tokens:,} tokens) differ from sentencepiece")
    print(f"logits: largest difference {largest:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
