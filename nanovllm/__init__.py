"""nano-vLLM: a small, fast and readable library for LLM inference."""

from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]
