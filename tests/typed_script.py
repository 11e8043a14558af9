"""What a user may write, and what their type checker should find; no test runs it."""

from nanovllm import LLM, SamplingParams

llm = LLM("x", max_model_len=5, dtype="float32")
out = llm.generate("hello", SamplingParams(max_tokens=3))
text: str = out[0]["text"]
for piece in llm.stream([{"role": "user", "content": "hello"}], enable_thinking=False):
    ids: list[int] = piece["token_ids"]

LLM("x", max_model_length=5)  # finds: max_model_length
LLM("x", max_num_seqs="5")  # finds: incompatible type
print(out[0]["txt"])  # finds: txt
print(next(llm.stream("x"))["logprob"])  # finds: logprob
llm.generate(5)  # finds: incompatible type
