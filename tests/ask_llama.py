"""llama.cpp itself, asked what it computes for a GGUF file; in a process of its own, which may abort."""

import json
import subprocess
import sys
from pathlib import Path

import torch

ASK = """
import json, sys
import xllamacpp

path, prompt, vocabulary, steps = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, 256, 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
for _ in range(steps):
    # The answer leaves out tokens that are no whole character. So one token always wins, and its probabilities are
    # those before that.
    asked = {"prompt": prompt, "n_predict": 1, "n_probs": vocabulary, "temperature": -1.0}
    asked["logit_bias"] = [[PLAIN, 1e4]]
    (step,) = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
    found = {one["id"]: one["logprob"] for one in step["top_logprobs"]}
    assert len(found) == vocabulary and step["id"] == PLAIN
    prompt = [*prompt, max(found, key=found.get)]
    print(json.dumps([found[number] for number in range(vocabulary)]))
"""
PLAIN = 64


def answer(path: Path, prompt: list[int], vocabulary: int, steps: int) -> torch.Tensor:
    """Log-probabilities of all tokens after a prompt and after the most probable answer, [steps, vocabulary].

    Args:
        path: of a GGUF file.
        prompt: ids of tokens.
        vocabulary: how many tokens there are.
        steps: tokens of the answer.
    """
    asked = json.dumps([str(path), prompt, vocabulary, steps])
    code = ASK.replace("PLAIN", str(PLAIN))
    run = subprocess.run([sys.executable, "-c", code, asked], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.tensor([json.loads(line) for line in run.stdout.splitlines()])
