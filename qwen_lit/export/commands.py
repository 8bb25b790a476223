"""Commands that serve an exported model, and a request to it: all of them for one folder, the one of the card."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_lit.names import base_reference, hub_name
from qwen_lit.thinking import Form

if TYPE_CHECKING:
    from qwen_lit.export.card import AdapterFacts

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
PORTS = "vLLM listens on port 8000, SGLang on 30000, Ollama on 11434, llama-server on 8080."


def served_name(run: dict[str, Any], base: str) -> str:
    """What servers call the model: the name of the run's folder, in the letters that all of them take.

    Args:
        run: its configuration.
        base: the base's folder or hub name, for a run whose folder has no such letters.
    """
    for text, end in ((Path(str(run.get("output_dir") or "")).name, ""), (Path(base).name, "-tuned")):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")
        if name != "output" and len(name) > 1 and re.search("[A-Za-z]", name):
            return name + end
    return "tuned"


def merged_section(name: str, gguf: str | None, form: Form | None = None, imported: bool = True) -> list[str]:
    """How the merged model in the card's folder is served.

    Args:
        name: of the model, for requests.
        gguf: its GGUF file in the folder, if there is one.
        form: in which its prompts were trained.
        imported: whether Ollama is known to take what its Modelfile names.
    """
    switch = switched(form)
    ollama = "Ollama, if it reads safetensors of this model; else first write the GGUF file that Modelfile tells of"
    commands = [
        ("in the terminal", "qwen-lit chat ."),
        ("vLLM", f"vllm serve . --served-model-name {name}{switch}"),
        ("SGLang", f"python -m sglang.launch_server --model-path . --served-model-name {name}{switch}"),
        ("Ollama" if imported else ollama, f"ollama create {name} -f Modelfile\nollama run {name}"),
    ]
    if gguf:
        commands.append(("llama.cpp", f"llama-server -m {gguf} --alias {name} --jinja{switched(form, '--chat')}"))
    told = served_form(form)
    return ["Run one of these in the folder of this file:", _block(commands), *told, *request(name)]


def switched(form: Form | None, option: str = "--default-chat") -> str:
    """The option with which a server asks as was trained, after a space; empty where its template does by itself.

    Source: ``--default-chat-template-kwargs`` of vLLM and SGLang, ``--chat-template-kwargs`` of llama-server.
    """
    if form is None or not form.kwargs:
        return ""
    return f" {option}-template-kwargs {shlex.quote(json.dumps(form.kwargs))}"


def served_form(form: Form | None) -> list[str]:
    """In which form it is asked, where there are several."""
    if form is None or not (told := form.told()):
        return []
    kwargs = json.dumps({"chat_template_kwargs": {"enable_thinking": form.enable_thinking}})
    older = f" A server without that option takes it from each request: `{kwargs[1:-1]}`." if form.kwargs else ""
    return [f"It was trained on conversations {form.shares()}: {told}.{older}"]


def adapter_section(
    facts: AdapterFacts, name: str, base: str, path: str, run: dict[str, Any], form: Form | None = None
) -> list[str]:
    """How a server takes the adapter beside its base, or why it does not.

    Args:
        facts: of the adapter.
        name: of the adapter, for requests.
        base: the base's folder or hub name.
        path: of the adapter, seen from the card's folder.
        run: the configuration of the run.
        form: in which its prompts were trained.
    """
    if unserved := facts.unserved():
        return [
            f"vLLM and SGLang do not serve this adapter on its base, because of {', '.join(unserved)}: serve the "
            "merged model."
        ]
    elsewhere = hub_name(base) is not None and run.get("model", {}).get("hub") == "modelscope"
    on_vllm, on_sglang = ("VLLM_USE_MODELSCOPE=True ", "SGLANG_USE_MODELSCOPE=true ") if elsewhere else ("", "")
    base, lora = shlex.quote(base_reference(base)), shlex.quote(f"{name}={path}")
    rank = next((rank for rank in VLLM_RANKS if rank >= facts.rank), facts.rank)
    switch = switched(form)
    served = f"{on_vllm}vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {lora}{switch}"
    commands = [("vLLM", served)]
    if not facts.config.get("use_rslora"):
        server = f"{on_sglang}python -m sglang.launch_server --model-path {base}"
        sglang = f"{server} --served-model-name base --enable-lora"
        title = f"SGLang, where requests call the model base:{name}"
        commands.append((title, f"{sglang} --lora-paths {lora}{switch}"))
    section = ["The adapter alone, on its base, in the folder of this file:", _block(commands)]
    if facts.config.get("use_rslora"):
        section.append("SGLang scales rank-stabilised LoRA (use_rslora) wrongly: serve the merged model with it.")
    return section


def request(name: str) -> list[str]:
    """A request to a server that speaks OpenAI's protocol."""
    body = shlex.quote(json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}]}))
    curl = f"curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d {body}"
    python = (
        "from openai import OpenAI\n\n"
        'client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")\n'
        f'answer = client.chat.completions.create(model="{name}", messages=[{{"role": "user", "content": "Hello"}}])\n'
        "print(answer.choices[0].message.content)"
    )
    return [f"Ask it. {PORTS}", f"```bash\n{curl}\n```", f"```python\n{python}\n```"]


def _block(commands: list[tuple[str, str]]) -> str:
    return "```bash\n" + "\n".join(f"# {title}\n{text}" for title, text in commands) + "\n```"
