"""LLM: the class that users import."""

from nanovllm.engine.llm_engine import LLMEngine


class LLM(LLMEngine):
    """A language model ready to generate: `LLM(model, **options).generate(prompts, params)`."""
