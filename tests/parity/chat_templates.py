"""Public chat templates in short form, with the assistant's text marked by `{% generation %}`.

Each one follows the template of the family that names it, as far as turns are concerned. A mark
begins after the text of the generation prompt and ends with the last character that the template
writes for the turn.

`{G}` and `{E}` stand for the marks, `{GP}` for `{% if add_generation_prompt %}`.
"""

import re

_IM = "{{ '<|im_start|>' + m.role + '\\n' }}"
_IM_PROMPT = "{GP}{{ '<|im_start|>assistant\\n' }}{% endif %}"
_CALLS = (
    "{% for c in m.tool_calls %}{% set f = c.function or c %}"
    "{{ '<tool_call>\\n' + {'name': f.name, 'arguments': f.arguments} | tojson + '\\n</tool_call>' }}{% endfor %}"
)
_LAST_QUERY = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' and not m.content.startswith('<tool_response>') %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
_THOUGHT = (
    "{% set thought = m.reasoning_content or '' %}{% set text = m.content or '' %}{% if not thought and '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
)


def _chatml(
    turn="{{ (m.content or '') + '<|im_end|>' + '\\n' }}", before="", prompt=_IM_PROMPT, header=_IM
):
    """ChatML with this text for assistants."""
    other = "{{ m.content + '<|im_end|>' + '\\n' }}"
    return (
        f"{before}{{% for m in messages %}}{header}{{% if m.role == 'assistant' %}}{{G}}{turn}{{E}}{{% else %}}{other}{{% endif %}}{{% endfor %}}"
        f"{prompt}"
    )


def _plain(
    user, assistant, prompt, system="{{ m.content + '\\n\\n' }}", tool=None, before="", after=""
):
    """One line per role; `assistant` has its header before `{G}`."""
    tool = user if tool is None else tool
    return (
        f"{before}{{% for m in messages %}}{{% if m.role == 'system' %}}{system}{{% elif m.role == 'user' %}}{user}"
        f"{{% elif m.role == 'tool' %}}{tool}{{% else %}}{assistant}{{% endif %}}{{% endfor %}}{{GP}}{prompt}{{% endif %}}{after}"
    )


_NO_SYSTEM = "{{ raise_exception('System role not supported') }}"
_ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% endfor %}"
)
_C = "(m.content or '')"

_QWEN3_TURN = (
    "{G}{% if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') }}"
    "{% else %}{{ text }}{% endif %}" + _CALLS + "{{ '<|im_end|>\\n' }}{E}"
)
_QWEN3_TOOL = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
)


def _qwen3(turn=_QWEN3_TURN, prompt="{{ '<|im_start|>assistant\\n' }}", before=_LAST_QUERY):
    return _plain(
        _IM + "{{ m.content + '<|im_end|>\\n' }}",
        _THOUGHT + _IM + turn,
        prompt,
        _IM + "{{ m.content + '<|im_end|>\\n' }}",
        _QWEN3_TOOL,
        before
        + "{% if tools %}{{ '<|im_start|>system\\n# Tools\\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}",
    )


def _llama3(end="<|eot_id|>", tool="ipython", trim=" | trim", before="{{ bos_token }}"):
    head = "{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}"
    return (
        f"{before}{{% for m in messages %}}{{% set role = '{tool}' if m.role == 'tool' else m.role %}}{head}{{% if m.role == 'assistant' %}}{{G}}"
        "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}{{ '{\"name\": \"' + f.name + '\", \"parameters\": ' }}{{ f.arguments | tojson }}{{ '}' }}"
        f"{{% else %}}{{{{ {_C}{trim} }}}}{{% endif %}}{{{{ '{end}' }}}}{{E}}{{% else %}}{{{{ m.content{trim} + '{end}' }}}}{{% endif %}}{{% endfor %}}"
        "{GP}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    )


def _llama2(
    turn="{{ ' ' + m.content | trim + ' ' + eos_token }}",
    user="[INST] ",
    end=" [/INST]",
    bos="{{ bos_token }}",
):
    return (
        "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set first = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
        "{% else %}{% set rest = messages %}{% set first = '' %}{% endif %}"
        + _ALTERNATE.replace("in messages", "in rest")
        + "{% for m in rest %}"
        f"{{% if m.role == 'user' %}}{bos}{{{{ '{user}' + (first if loop.first else '') + m.content | trim + '{end}' }}}}"
        f"{{% else %}}{{G}}{turn}{{E}}{{% endif %}}{{% endfor %}}"
    )


def _mistral(
    turn,
    space=" ",
    tools="[AVAILABLE_TOOLS]{}[/AVAILABLE_TOOLS]",
    results="[TOOL_RESULTS]{}[/TOOL_RESULTS]",
):
    tools, shown = tools.split("{}"), results.split("{}")
    return (
        "{{ bos_token }}{% set ns = namespace(last=0, system='') %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
        "{% elif m.role == 'system' %}{% set ns.system = m.content + '\\n\\n' %}{% endif %}{% endfor %}{% for m in messages %}"
        f"{{% if m.role == 'user' %}}{{% if tools and loop.index0 == ns.last %}}{{{{ '{tools[0]}' + tools | tojson + '{tools[1]}' }}}}{{% endif %}}"
        f"{{{{ '[INST]{space}' + (ns.system if loop.index0 == ns.last else '') + m.content + '[/INST]' }}}}"
        f"{{% elif m.role == 'tool' %}}{{{{ '{shown[0]}{space}' + {{'content': m.content}} | tojson + '{shown[1]}' }}}}"
        "{% elif m.role == 'assistant' %}{G}{% if m.tool_calls %}{{ '[TOOL_CALLS]"
        + space
        + "[' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
        f"{{{{ ']' + eos_token }}}}{{% else %}}{turn}{{% endif %}}{{E}}{{% endif %}}{{% endfor %}}"
    )


def _gemma(before="{{ bos_token }}", system=None, trim=" | trim"):
    first = "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    return (
        before
        + (system or first)
        + "{% for m in rest %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\\n' }}{% if m.role == 'assistant' %}{G}{{ "
        + _C
        + trim
        + " }}{{ '<end_of_turn>\\n' }}{E}"
        "{% else %}{{ (first if loop.first else '') + (m.content"
        + trim
        + ") + '<end_of_turn>\\n' }}{% endif %}{% endfor %}"
        "{GP}{{ '<start_of_turn>model\\n' }}{% endif %}"
    )


def _deepseek(prompt="{{ '<｜Assistant｜>' }}", turn="{{ text }}", calls=True):
    call = (
        "{% for c in m.tool_calls %}{{ '<｜tool▁call▁begin｜>' + c.function.name + '\\n```json\\n' + c.function.arguments + '\\n```<｜tool▁call▁end｜>' }}{% endfor %}"
        if calls
        else ""
    )
    return (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}"
        "{% elif m.role == 'assistant' %}{% set text = m.content or '' %}{% if '</think>' in text %}{% set text = text.split('</think>')[-1] %}{% endif %}"
        "{% if messages[loop.index0 - 1].role != 'tool' or true %}{{ '<｜Assistant｜>' }}{% endif %}{G}"
        + turn + call + "{{ '<｜end▁of▁sentence｜>' }}{E}{% endif %}{% endfor %}{GP}" + prompt + "{% endif %}"
    )  # fmt: skip


_TAG = "{{ '<|' + m.role + '|>\\n' }}"


TEMPLATES = {
    # ChatML and its descendants
    "chatml": _chatml(),
    "chatml, default system prompt": _chatml(before="{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"),
    "chatml, no line break at the end": _chatml("{{ (m.content or '') + '<|im_end|>' }}"),
    "chatml, trimmed": _chatml("{{ (m.content or '') | trim + '<|im_end|>\\n' }}"),
    "chatml, breaks between turns": "{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}" + _IM + "{% if m.role == 'assistant' %}{G}{{ (m.content or '') + '<|im_end|>' }}{E}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}{GP}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}",
    "chatml, no generation prompt but by a tag of its own": _chatml(prompt="{GP}{{ '<|im_start|>' }}{{ 'assistant' }}{{ '\\n' }}{% endif %}"),
    "smollm2": _chatml(before="{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}"),
    "smollm3": _chatml("{% set c = (m.content or '').split('</think>')[-1].lstrip('\\n') %}{{ '<think>\\n\\n</think>\\n' + c + '<|im_end|>\\n' }}"),
    "smollm3, keeps thoughts": _chatml("{{ (m.content or '').lstrip('\\n') + '<|im_end|>\\n' }}"),
    "qwen1.5": _chatml(before="{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{% endif %}"),
    "qwen2": _chatml(before="{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"),
    "qwen2.5": _qwen3("{G}{{ m.content or '' }}" + _CALLS + "{{ '<|im_end|>\\n' }}{E}"),
    "qwen3": _qwen3(),
    "qwen3, thinking off": _qwen3(prompt="{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"),
    "qwen3 instruct 2507": _qwen3("{G}{{ text }}" + _CALLS + "{{ '<|im_end|>\\n' }}{E}"),
    "qwen3 thinking 2507": _qwen3(
        "{% if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\\n' }}{G}{{ thought.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') }}" + _CALLS + "{{ '<|im_end|>\\n' }}{E}"
        "{% else %}{G}{{ text }}" + _CALLS + "{{ '<|im_end|>\\n' }}{E}{% endif %}",
        "{{ '<|im_start|>assistant\\n<think>\\n' }}",
    ),
    "qwen3 coder": _qwen3("{G}{{ text }}{% for c in m.tool_calls %}{{ '<tool_call>\\n<function=' + c.function.name + '>\\n' }}{% for k, v in c.function.arguments.items() %}{{ '<parameter=' + k + '>\\n' + v | string + '\\n</parameter>\\n' }}{% endfor %}{{ '</function>\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{E}"),
    "qwq": _qwen3("{G}{% if loop.last %}{{ m.content or '' }}{% else %}{{ text }}{% endif %}" + _CALLS + "{{ '<|im_end|>\\n' }}{E}"),
    "qwen3.5, no user no conversation": _qwen3(before=_LAST_QUERY + "{% if ns.last < 0 %}{{ raise_exception('No user query found in messages.') }}{% endif %}"),
    "hermes tools": _chatml("{{ m.content or '' }}" + _CALLS + "{{ '<|im_end|>\\n' }}", before="{% if tools %}{{ '<|im_start|>system\\n<tools>' + tools | tojson + '</tools><|im_end|>\\n' }}{% endif %}"),
    "internlm2": "{{ bos_token }}" + _chatml(),
    "internlm": _plain("{{ '<|User|>:' + m.content + '<eoh>\\n' }}", "{{ '<|Bot|>:' }}{G}{{ (m.content or '') + '<eoa>\\n' }}{E}", "{{ '<|Bot|>:' }}"),
    "yi": _chatml(prompt=_IM_PROMPT, before="{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"),
    "lfm2": "{{ bos_token }}" + _chatml("{% set c = m.content or '' %}{% if not loop.last and '</think>' in c %}{% set c = c.split('</think>')[-1] | trim %}{% endif %}{{ c + '<|im_end|>\\n' }}"),
    "stablelm 2": _chatml("{{ (m.content or '') | trim + '<|im_end|>\\n' }}"),
    "minicpm3": _chatml("{{ (m.content or '') + '<|im_end|>\\n' }}" , before="{{ bos_token }}"),
    "nemotron nano, chatml": _chatml("{% set c = m.content or '' %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1].strip() %}{% endif %}{{ '<think></think>' + c.strip() + '<|im_end|>\\n' }}", prompt="{GP}{{ '<|im_start|>assistant\\n' }}{% endif %}"),
    # Llama
    "llama 2": _llama2(),
    "llama 2, one beginning": "{{ bos_token }}" + _llama2(bos=""),
    "llama 3": _llama3(),
    "llama 3.1": _llama3(before="{{ bos_token }}{% if messages[0].role != 'system' %}{{ '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n\\n<|eot_id|>' }}{% endif %}"),
    "llama 3.2, tools in the first user's turn": _llama3(before="{{ bos_token }}{% if tools %}{{ '<|start_header_id|>system<|end_header_id|>\\n\\nEnvironment: ipython\\n' + tools | tojson(indent=4) + '<|eot_id|>' }}{% endif %}"),
    "llama 3, untrimmed": _llama3(trim=""),
    "llama 4": _llama3("<|eot|>", before="{{ bos_token }}").replace("<|start_header_id|>", "<|header_start|>").replace("<|end_header_id|>", "<|header_end|>"),
    "tulu": _plain("{{ '<|user|>\\n' + m.content + '\\n' }}", "{{ '<|assistant|>\\n' }}{G}{{ (m.content or '') + eos_token }}{E}{% if not loop.last %}{{ '\\n' }}{% endif %}", "{{ '<|assistant|>\\n' }}", "{{ '<|system|>\\n' + m.content + '\\n' }}"),
    # Mistral
    "mistral v1": _mistral("{{ (m.content or '') + eos_token }}", " ").replace("+ '[/INST]'", "+ ' [/INST]'"),
    "mistral v1, spaces": _llama2("{{ ' ' + m.content + eos_token }}", bos=""),
    "mistral v3": _mistral("{{ ' ' + (m.content or '') | trim + eos_token }}"),
    "mistral tekken": _mistral("{{ (m.content or '') + eos_token }}", ""),
    "mistral small, system prompt": _plain("{{ '[INST]' + m.content + '[/INST]' }}", "{G}{{ (m.content or '') + eos_token }}{E}", "", "{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}", before="{{ bos_token }}"),
    "magistral": _plain("{{ '[INST]' + m.content + '[/INST]' }}", _THOUGHT + "{G}{% if thought and loop.last %}{{ '[THINK]' + thought + '[/THINK]' }}{% endif %}{{ text + eos_token }}{E}", "", before="{{ bos_token }}"),
    "mixtral, alternating": "{{ bos_token }}" + _ALTERNATE + "{% for m in messages %}{% if m.role == 'user' %}{{ ' [INST] ' + m.content + ' [/INST]' }}{% else %}{G}{{ ' ' + m.content + eos_token }}{E}{% endif %}{% endfor %}",
    # Gemma
    "gemma": _gemma(system="{% if messages[0].role == 'system' %}" + _NO_SYSTEM + "{% endif %}{% set first = '' %}{% set rest = messages %}"),
    "gemma 2, alternating": _gemma(system=_ALTERNATE + "{% set first = '' %}{% set rest = messages %}"),
    "gemma 3": _gemma(),
    "gemma 3, untrimmed": _gemma(trim=""),
    # Microsoft
    "phi 3": _plain("{{ '<|user|>\\n' + m.content + '<|end|>\\n' }}", "{{ '<|assistant|>\\n' }}{G}{{ (m.content or '') + '<|end|>\\n' }}{E}", "{{ '<|assistant|>\\n' }}", "{{ '<|system|>\\n' + m.content + '<|end|>\\n' }}"),
    "phi 3, end of text without a prompt": _plain("{{ '<|user|>\\n' + m.content + '<|end|>\\n' }}", "{{ '<|assistant|>\\n' }}{G}{{ (m.content or '') + '<|end|>\\n' }}{% if loop.last and not add_generation_prompt %}{{ eos_token }}{% endif %}{E}", "{{ '<|assistant|>\\n' }}", ""),
    "phi 4": _plain("{{ '<|im_start|>user<|im_sep|>' + m.content + '<|im_end|>' }}", "{{ '<|im_start|>assistant<|im_sep|>' }}{G}{{ (m.content or '') + '<|im_end|>' }}{E}", "{{ '<|im_start|>assistant<|im_sep|>' }}", "{{ '<|im_start|>system<|im_sep|>' + m.content + '<|im_end|>' }}"),
    "phi 4 mini": "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{G}{{ (m.content or '') + '<|end|>' }}{% if loop.last and not add_generation_prompt %}{{ eos_token }}{% endif %}{E}{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}{GP}{{ '<|assistant|>' }}{% endif %}",
    # Older forms
    "zephyr": "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\\n' + m.content + eos_token }}{% elif m.role == 'system' %}{{ '<|system|>\\n' + m.content + eos_token }}{% elif m.role == 'assistant' %}{{ '<|assistant|>\\n' }}{G}{{ (m.content or '') + eos_token }}{% if true %}{{ '\\n' }}{% endif %}{E}{% endif %}{% if m.role != 'assistant' %}{{ '\\n' }}{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}",
    "vicuna": _plain("{{ 'USER: ' + m.content + ' ' }}", "{{ 'ASSISTANT:' }}{G}{{ ' ' + (m.content or '') + eos_token }}{E}", "{{ 'ASSISTANT:' }}"),
    "alpaca": _plain("{{ '### Instruction:\\n' + m.content + '\\n\\n' }}", "{{ '### Response:\\n' }}{G}{{ (m.content or '') + '\\n\\n' }}{E}", "{{ '### Response:\\n' }}"),
    "alpaca, end token at the very end": _plain("{{ '### Instruction:\\n' + m.content + '\\n\\n' }}", "{{ '### Response:\\n' }}{G}{{ (m.content or '') }}{% if not loop.last or true %}{{ '\\n\\n' }}{% endif %}{% if loop.last %}{{ eos_token }}{% endif %}{E}", "{{ '### Response:\\n' }}"),
    "falcon": "{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}{{ m.role.capitalize() + ': ' }}{% if m.role == 'assistant' %}{G}{{ m.content or '' }}{E}{% else %}{{ m.content }}{% endif %}{% endfor %}{GP}{{ '\\nAssistant: ' }}{% endif %}",
    "falcon 3": _plain("{{ '<|user|>\\n' + m.content + '\\n' }}", "{{ '<|assistant|>\\n' }}{G}{{ (m.content or '') + eos_token }}{E}{% if not loop.last %}{{ '\\n' }}{% endif %}", "{{ '<|assistant|>\\n' }}", "{{ '<|system|>\\n' + m.content + '\\n' }}"),
    "openchat": "{{ bos_token }}{% for m in messages %}{{ 'GPT4 Correct ' + m.role.title() + ':' }}{% if m.role == 'assistant' %}{G}{{ ' ' + (m.content or '') + '<|end_of_turn|>' }}{E}{% else %}{{ ' ' + m.content + '<|end_of_turn|>' }}{% endif %}{% endfor %}{GP}{{ 'GPT4 Correct Assistant:' }}{% endif %}",
    "minicpm": _plain("{{ '<用户>' + m.content.strip() + '<AI>' }}", "{G}{{ (m.content or '').strip() }}{E}", "", "{{ m.content }}"),
    "baichuan": _plain("{{ '<reserved_106>' + m.content }}", "{{ '<reserved_107>' }}{G}{{ m.content or '' }}{E}", "{{ '<reserved_107>' }}"),
    "stablelm zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}{% if m.role == 'assistant' %}{G}{{ (m.content or '') + eos_token + '\\n' }}{E}{% else %}{{ m.content + eos_token + '\\n' }}{% endif %}{% endfor %}{GP}{{ '<|assistant|>\\n' }}{% endif %}",
    "nemotron": _plain("{{ '<extra_id_1>User\\n' + m.content + '\\n' }}", "{{ '<extra_id_1>Assistant\\n' }}{G}{{ (m.content or '') + '\\n' }}{E}", "{{ '<extra_id_1>Assistant\\n' }}", "{{ '<extra_id_0>System\\n' + m.content + '\\n\\n' }}"),
    "solar": _plain("{{ '### User:\\n' + m.content + '\\n\\n' }}", "{{ '### Assistant:\\n' }}{G}{{ (m.content or '') + '\\n\\n' }}{E}", "{{ '### Assistant:\\n' }}", "{{ '### System:\\n' + m.content + '\\n\\n' }}"),
    # Templates with thoughts, tools or rewritten turns
    "deepseek v2": _plain("{{ 'User: ' + m.content + '\\n\\n' }}", "{{ 'Assistant:' }}{G}{{ ' ' + (m.content or '') + eos_token }}{E}", "{{ 'Assistant:' }}", before="{{ bos_token }}"),
    "deepseek v3": _deepseek(),
    "deepseek r1": _deepseek("{{ '<｜Assistant｜><think>\\n' }}"),
    "deepseek v3.1": _deepseek("{{ '<｜Assistant｜></think>' }}", "{% if true %}{{ '' }}{% endif %}{{ text }}"),
    "glm 4": "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + ('observation' if m.role == 'tool' else m.role) + '|>' }}{% if m.role == 'assistant' %}{G}{{ '\\n' + (m.content or '') }}{E}{% else %}{{ '\\n' + m.content }}{% endif %}{% endfor %}{GP}{{ '<|assistant|>' }}{% endif %}",
    "glm 4.5": "{{ '[gMASK]<sop>' }}" + _LAST_QUERY + _plain(
        "{{ '<|user|>\\n' + m.content }}",
        _THOUGHT + "{{ '<|assistant|>' }}{G}{% if loop.index0 > ns.last and thought %}{{ '\\n<think>' + thought.strip() + '</think>' }}{% else %}{{ '\\n<think></think>' }}{% endif %}"
        "{% if text.strip() %}{{ '\\n' + text.strip() }}{% endif %}{% for c in m.tool_calls %}{{ '\\n<tool_call>' + c.function.name }}{% for k, v in c.function.arguments.items() %}{{ '\\n<arg_key>' + k + '</arg_key>\\n<arg_value>' + v | string + '</arg_value>' }}{% endfor %}{{ '\\n</tool_call>' }}{% endfor %}{E}",
        "{{ '<|assistant|>' }}",
        "{{ '<|system|>\\n' + m.content }}",
        "{% if messages[loop.index0 - 1].role != 'tool' %}{{ '<|observation|>' }}{% endif %}{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}",
    ),
    "granite": "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' }}{% if m.role == 'assistant' %}{G}{{ (m.content or '') + '<|end_of_text|>\\n' }}{E}{% else %}{{ m.content + '<|end_of_text|>\\n' }}{% endif %}{% endfor %}{GP}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
    "granite, thoughts": "{% for m in messages %}" + "{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' }}{% if m.role == 'assistant' %}" + _THOUGHT + "{G}{% if m.tool_calls %}{{ '<|tool_call|>' + m.tool_calls | tojson }}{% else %}{{ text }}{% endif %}{{ '<|end_of_text|>\\n' }}{E}{% else %}{{ m.content + '<|end_of_text|>\\n' }}{% endif %}{% endfor %}{GP}{{ '<|start_of_role|>assistant' }}{{ '<|end_of_role|>' }}{% endif %}",
    "olmo": "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}{% if m.role == 'assistant' %}{G}{{ (m.content or '') + eos_token }}{E}{% if not loop.last %}{{ '\\n' }}{% endif %}{% else %}{{ m.content + '\\n' }}{% endif %}{% endfor %}{GP}{{ '<|assistant|>\\n' }}{% endif %}",
    "command r": "{{ bos_token }}{% for m in messages %}{% set name = {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM', 'tool': 'SYSTEM'}[m.role] %}{{ '<|START_OF_TURN_TOKEN|><|' + name + '_TOKEN|>' }}{% if m.role == 'assistant' %}{G}{{ (m.content or '').strip() + '<|END_OF_TURN_TOKEN|>' }}{E}{% else %}{{ m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}{GP}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
    "command a": "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|><|' + m.role | upper + '_TOKEN|>' }}{% if m.role == 'assistant' %}{G}{% if m.tool_calls %}{{ '<|START_ACTION|>' + m.tool_calls | tojson + '<|END_ACTION|>' }}{% else %}{{ '<|START_RESPONSE|>' + (m.content or '') + '<|END_RESPONSE|>' }}{% endif %}{{ '<|END_OF_TURN_TOKEN|>' }}{E}{% else %}{{ m.content + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}{GP}{{ '<|START_OF_TURN_TOKEN|><|ASSISTANT_TOKEN|>' }}{% endif %}",
    "exaone 3.5": "{% for m in messages %}{{ '[|' + m.role + '|]' }}{% if m.role == 'assistant' %}{G}{{ (m.content or '') + '[|endofturn|]\\n' }}{E}{% elif m.role == 'system' %}{{ m.content + '[|endofturn|]\\n' }}{% else %}{{ m.content + '\\n' }}{% endif %}{% endfor %}{GP}{{ '[|assistant|]' }}{% endif %}",
    "exaone deep": "{% for m in messages %}{{ '[|' + m.role + '|]' }}{% if m.role == 'assistant' %}{% set c = m.content or '' %}{% if '</thought>' in c or '</think>' in c %}{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}{G}{{ c + '[|endofturn|]' }}{E}{% if not loop.last %}{{ '\\n' }}{% endif %}{% else %}{{ m.content + '\\n' }}{% endif %}{% endfor %}{GP}{{ '[|assistant|]<thought>\\n' }}{% endif %}",
    "gpt-oss": "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|start|>assistant' }}{G}" + _THOUGHT + "{% if m.tool_calls %}{{ '<|channel|>commentary to=functions.' + m.tool_calls[0].function.name + '<|message|>' + m.tool_calls[0].function.arguments | tojson + '<|call|>' }}{% elif loop.last %}{% if thought %}{{ '<|channel|>analysis<|message|>' + thought + '<|end|><|start|>assistant' }}{% endif %}{{ '<|channel|>final<|message|>' + text + '<|return|>' }}{% else %}{{ '<|channel|>final<|message|>' + text + '<|end|>' }}{% endif %}{E}{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}{GP}{{ '<|start|>assistant' }}{% endif %}",
    "kimi k2": "{% for m in messages %}{{ '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' }}{% if m.role == 'assistant' %}{G}{{ m.content or '' }}{% for c in m.tool_calls %}{{ '<|tool_call_begin|>' + (c.id or 'functions.f:0') + '<|tool_call_argument_begin|>' }}{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}{% endif %}{{ '<|tool_call_end|>' }}{% endfor %}{{ '<|im_end|>' }}{E}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}{GP}{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}",
    "hunyuan": "{% for m in messages %}{% if m.role == 'system' %}{{ '<|startoftext|>' + m.content + '<|extra_4|>' }}{% elif m.role == 'assistant' %}{% set c = m.content or '' %}{% if '<answer>' in c and not loop.last %}{% set c = c.split('<answer>')[-1] %}{% endif %}{% if '</think>' in c and not loop.last %}{% set c = c.split('</think>')[-1] %}{% endif %}{G}{{ c + '<|eos|>' }}{E}{% else %}{{ '<|startoftext|>' + m.content + '<|extra_0|>' }}{% endif %}{% endfor %}",
    "seed-oss": "{% for m in messages %}{{ bos_token + m.role + '\\n' }}{% if m.role == 'assistant' %}" + _THOUGHT + "{G}{% if thought %}{{ '<seed:think>' + thought + '</seed:think>' }}{% endif %}{{ text | trim + eos_token }}{E}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}{GP}{{ bos_token + 'assistant\\n' }}{% endif %}",
    "ernie 4.5": "{{ '<|begin_of_sentence|>' }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\\n' }}{% elif m.role == 'system' %}{{ m.content + '\\n' }}{% elif m.role == 'assistant' %}{{ 'Assistant: ' }}{G}{{ (m.content or '') + '<|end_of_sentence|>' }}{E}{% endif %}{% endfor %}{GP}{{ 'Assistant: ' }}{% endif %}",
    "minimax m2": _plain("{{ ']~b]user\\n' + m.content + '[e~[\\n' }}", "{{ ']~b]ai\\n' }}" + _THOUGHT + "{G}{% if thought and loop.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ text }}{{ '[e~[\\n' }}{E}", "{{ ']~b]ai\\n<think>\\n' }}", "{{ ']~b]system\\n' + m.content + '[e~[\\n' }}").replace("{G}{% if thought and loop.last %}{{ '<think>\\n' + thought", "{% if thought and loop.last %}{{ '<think>\\n' }}{% endif %}{G}{% if thought and loop.last %}{{ thought"),
}  # fmt: skip


def marked(name):
    """The template with the marks of transformers."""
    return (
        TEMPLATES[name]
        .replace("{G}", "{% generation %}")
        .replace("{E}", "{% endgeneration %}")
        .replace("{GP}", "{% if add_generation_prompt %}")
    )


def unmarked(name):
    """The template as the family publishes it, without marks."""
    return re.sub(
        r"\{% (end)?generation %\}",
        lambda m: "{% endif %}" if m[1] else "{% if true %}",
        marked(name),
    )
