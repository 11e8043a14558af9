"""A conversation in the terminal: answers come as they are generated, and what was said is kept.

When the conversation has grown too long for the model, its oldest turns are forgotten. An empty
line or Ctrl-D ends it; Ctrl-C ends an answer. A question that the model cannot take is dropped.
"""

import argparse
import sys
from pathlib import Path

from nanovllm import LLM, SamplingParams

TINY_CHECKPOINT = Path(__file__).parents[1] / "assets" / "tiny-qwen3"
Message = dict[str, str]


def fitting(llm: LLM, history: list[Message], max_tokens: int) -> list[Message]:
    """The last messages that leave room for an answer; a system message stays the first."""
    system = history[:1] if history[0]["role"] == "system" else []
    turns = history[len(system) :]
    while len(turns) > 1:
        ids = llm.tokenizer.apply_chat_template(
            system + turns, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        if len(ids) + max_tokens <= llm.config.max_model_len:
            break
        turns = turns[2:]  # a question and its answer
    return system + turns


def answer(llm: LLM, history: list[Message], params: SamplingParams) -> str:
    """Print the answer as it comes, and give it; Ctrl-C ends it."""
    text = ""
    try:
        for piece in llm.stream(history, params):
            print(piece["text"], end="", flush=True)
            text += piece["text"]
    except KeyboardInterrupt:
        print(" [interrupted]", end="")
    print()
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=str(TINY_CHECKPOINT), help="a model directory or a Hub repo id"
    )
    parser.add_argument("--system", help="what the assistant is told first")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer")
    args = parser.parse_args()

    try:
        llm = LLM(args.model)
        max_tokens = min(args.max_tokens, llm.config.max_model_len // 2)
        params = SamplingParams(temperature=args.temperature, max_tokens=max_tokens)
    except (TypeError, ValueError) as error:
        sys.exit(f"chat.py: {error}")
    with llm:
        history = [{"role": "system", "content": args.system}] if args.system else []
        while True:
            try:
                question = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                break
            if not question:
                break
            try:
                asked = [*history, {"role": "user", "content": question}]
                asked = fitting(llm, asked, max_tokens)
                text = answer(llm, asked, params)
            except (TypeError, ValueError) as error:  # most often: the question is too long
                print(f"[this question was dropped: {error}]")
                continue
            history = [*asked, {"role": "assistant", "content": text}]


if __name__ == "__main__":
    main()
