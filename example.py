"""Answer two prompts, with the tiny checkpoint in assets/ or any other model."""

import argparse
import logging
import sys
from pathlib import Path

from nanovllm import LLM, SamplingParams

TINY_CHECKPOINT = Path(__file__).parent / "assets" / "tiny-qwen3"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default=str(TINY_CHECKPOINT), help="a model directory or a Hub repo id"
    )
    args = parser.parse_args()

    logging.basicConfig(format="%(message)s")
    logging.getLogger("nanovllm").setLevel(logging.INFO)  # it says what it is doing
    try:
        llm = LLM(args.model)
    except (TypeError, ValueError) as error:
        sys.exit(f"example.py: {error}")
    questions = ["introduce yourself", "list all prime numbers within 100"]
    conversations = [[{"role": "user", "content": question}] for question in questions]
    outputs = llm.chat(conversations, SamplingParams(temperature=0.6, max_tokens=256))
    for output in outputs:
        prompt = llm.tokenizer.decode(output["prompt_token_ids"])
        print(f"\nPrompt: {prompt!r}\nCompletion: {output['text']!r}")


if __name__ == "__main__":
    main()
