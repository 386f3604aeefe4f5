"""Chat templates in the manner of models that think, for tests: small ones, written for them."""

# As Qwen3's: thoughts stay behind the last user turn alone, its last turn always has a block of them, and the prompt
# of a model that shall not think has an empty one.
HYBRID = """\
{% set asked = namespace(at=-1) %}
{% for m in messages %}{% if m.role == 'user' %}{% set asked.at = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- set words = namespace(thought=m.reasoning_content or '', said=m.content) %}
{%- if m.role == 'assistant' and '</think>' in m.content %}
{%- set words.thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set words.said = m.content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{%- if m.role == 'assistant' and loop.index0 > asked.at and (loop.last or words.thought) %}
{{- '<think>\n' + words.thought + '\n</think>\n\n' }}
{%- endif %}
{{- words.said + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}
"""

# The same with marks around what is to be learned: thoughts that the model has had, the answer behind an empty block,
# and no answer whose thoughts are gone.
HYBRID_MARKED = (
    HYBRID.replace("{{- words.said + '<|im_end|>\n' }}", "{{- words.said + '<|im_end|>' }}")
    .replace(
        "{{- '<think>\n' + words.thought + '\n</think>\n\n' }}\n{%- endif %}",
        "{%- if words.thought %}{% generation %}{{- '<think>\n' + words.thought + '\n</think>\n\n' + words.said"
        " + '<|im_end|>' }}{% endgeneration %}\n"
        "{%- else %}{{- '<think>\n\n</think>\n\n' }}{% generation %}{{- words.said + '<|im_end|>' }}{% endgeneration %}"
        "{%- endif %}\n"
        "{%- elif m.role == 'assistant' and not (words.thought and loop.index0 < asked.at) %}"
        "{% generation %}{{- words.said + '<|im_end|>' }}{% endgeneration %}\n"
        "{%- else %}",
    )
    .replace(
        "{{- words.said + '<|im_end|>' }}\n{%- endfor",
        "{{- words.said + '<|im_end|>' }}\n{%- endif %}{{- '\n' }}\n{%- endfor",
    )
)

# As DeepSeek-R1's: the prompt opens the thoughts.
OPENED = """\
{% for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{{- '<think>\n' + (m.thinking or '') + '\n</think>\n\n' }}{% endif %}
{{- m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{% endif %}
"""

# As DeepSeek-V3.1's: one marker opens or closes the thoughts, by a name of the template.
SWITCH = """\
{% for m in messages %}
{{- '<' + m.role + '>' }}
{%- if m.role == 'assistant' %}{{- '</think>' }}{% endif %}
{{- m.content }}
{%- if m.role == 'assistant' %}{{- eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' + ('<think>' if thinking else '</think>') }}{% endif %}
"""

# As gpt-oss's: thoughts and answer are messages of their own, the last of which ends in another way.
CHANNELS = """\
{% for m in messages %}
{%- if m.role == 'assistant' %}
{%- if m.thinking and loop.last %}{{- '<start>assistant<channel>analysis<message>' + m.thinking + '<end>' }}{% endif %}
{{- '<start>assistant<channel>final<message>' + m.content + (eos_token if loop.last else '<end>') }}
{%- else %}{{- '<start>' + m.role + '<message>' + m.content + '<end>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start>assistant' }}{% endif %}
"""
