"""nano-vLLM: a small, fast and readable inference library for Qwen3-class models."""

from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]
