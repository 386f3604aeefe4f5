"""Chat templates in the manner of models that think, for tests: small ones, written for them."""

# As Qwen3's: thoughts stay behind the last user turn alone, its last turn always has a block of them, and the prompt
# of a model that shall not think has an empty one.
HYBRID = """\
{% set asked = namespace(at=-1) %}
{% for m in messages if m.role == 'user' %}{% set asked.at = messages.index(m) %}{% endfor %}
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
