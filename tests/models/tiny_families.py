"""A small `config.json` for each family, and for each thing that it may ask for; sizes as in `tiny_models`."""

from tests.models import tiny_models as tiny

_LLAMA_ONLY = ("attention_bias", "mlp_bias", "eos_token_id")


def config(model_type: str, name: str, **changes) -> dict:
    """Of a causal language model."""
    fields = tiny.hf_config(model_type=model_type, architectures=[f"{name}ForCausalLM"])
    return {k: v for k, v in fields.items() if k not in _LLAMA_ONLY} | changes


def neox(**changes) -> dict:
    """GPT-NeoX names its fields otherwise: heads of 8, of which 2 dims turn where nothing is said."""
    other = ("num_key_value_heads", "head_dim", "rms_norm_eps", "mlp_bias", "attention_bias", "rope_parameters")
    fields = tiny.hf_config(model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"])
    kept = {k: v for k, v in fields.items() if k not in other}
    return kept | {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "tie_word_embeddings": False} | changes


def gpt2(**changes) -> dict:
    """GPT-2 has names of its own for everything; as many positions as the rows of these tests."""
    fields = tiny.hf_config(model_type="gpt2", architectures=["GPT2LMHeadModel"])
    kept = ("architectures", "model_type", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
    sizes = {"n_positions": 40, "n_ctx": 40, "n_embd": 32, "n_layer": 3, "n_head": 4, "activation_function": "gelu_new"}
    dropout = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
    return {name: fields[name] for name in kept} | sizes | dropout | {"layer_norm_epsilon": 1e-3} | changes


_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_OLD_ROPE = {"rope_parameters": None, "rope_theta": 1e6}  # as version 4 of transformers writes it
_SOME = ["full_attention", "sliding_attention", "sliding_attention"]
_OTHERS = ["sliding_attention", "full_attention", "sliding_attention"]

_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
_YARN_ALONE = {name: value for name, value in _YARN.items() if name != "rope_theta"}
_MINISTRAL3 = {"beta_fast": 4.0, "beta_slow": 0.5, "mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.3}

_LONG = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [1.2, 4.0, 9.0]}
_SHORT = {"short_factor": [1.1, 2.0], "long_factor": [1.0, 1.0], "attention_factor": 1.3}
_NTK = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0}

CASES = {
    "qwen2": config("qwen2", "Qwen2", sliding_window=8, use_sliding_window=False, max_window_layers=1, **_OLD_ROPE),
    "qwen2_windows": config(
        "qwen2",
        "Qwen2",
        sliding_window=7,
        use_sliding_window=True,
        max_window_layers=1,
        tie_word_embeddings=False,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
    ),
    "qwen3": config("qwen3", "Qwen3", tie_word_embeddings=False, **_OLD_ROPE),
    "qwen3_windows": config(
        "qwen3",
        "Qwen3",
        attention_bias=True,
        sliding_window=5,
        use_sliding_window=True,
        layer_types=_SOME,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=12,
    ),
    "mistral": config("mistral", "Mistral", sliding_window=9, head_dim=12, tie_word_embeddings=False, **_OLD_ROPE),
    "mistral_no_window": config("mistral", "Mistral", sliding_window=None, head_dim=None),
    "mistral_window_1": config("mistral", "Mistral", sliding_window=1),
    "mistral_window_of_the_row": config("mistral", "Mistral", sliding_window=40),
    "ministral": config("ministral", "Ministral", sliding_window=6, layer_types=_OTHERS, tie_word_embeddings=False),
    "qwen3_yarn": config("qwen3", "Qwen3", rope_parameters=None, rope_theta=100.0, rope_scaling=_YARN, head_dim=16),
    "ministral3": config(
        "ministral3", "Ministral3", rope_parameters=_YARN | _MINISTRAL3, head_dim=16, tie_word_embeddings=False
    ),
    "olmo2": config("olmo2", "Olmo2", eos_token_id=2, tie_word_embeddings=False, **_OLD_ROPE),
    "olmo2_biases": config(
        "olmo2", "Olmo2", eos_token_id=2, attention_bias=True, num_attention_heads=5, num_key_value_heads=1, head_dim=10
    ),
    "olmo3": config(
        "olmo3",
        "Olmo3",
        eos_token_id=2,
        sliding_window=6,
        layer_types=_SOME,
        rope_parameters=None,
        rope_theta=5e5,
        rope_scaling=_YARN_ALONE | {"attention_factor": 1.2},
        head_dim=16,
        tie_word_embeddings=False,
    ),
    "olmo3_by_type": config(
        "olmo3",
        "Olmo3",
        eos_token_id=2,
        attention_bias=True,
        sliding_window=5,
        rope_parameters={"full_attention": _YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}},
        num_hidden_layers=4,
        num_key_value_heads=1,
    ),
    "smollm3": config(
        "smollm3",
        "SmolLM3",
        eos_token_id=2,
        mlp_bias=True,  # a key's bias where nothing turns has a gradient of 0
        no_rope_layers=[1, 0, 1, 1],
        rope_parameters=None,
        rope_theta=100.0,
    ),
    "smollm3_windows": config(
        "smollm3",
        "SmolLM3",
        eos_token_id=2,
        no_rope_layer_interval=2,
        use_sliding_window=True,
        sliding_window=6,
        rope_parameters=_YARN,
        tie_word_embeddings=False,
    ),
    "gemma": config("gemma", "Gemma", eos_token_id=2, hidden_act="gelu", head_dim=12, num_key_value_heads=1),
    "gemma2": config(
        "gemma2",
        "Gemma2",
        eos_token_id=2,
        **_GELU,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
        sliding_window=6,
        head_dim=12,
    ),
    "gemma2_uncapped": config(
        "gemma2",
        "Gemma2",
        eos_token_id=2,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        layer_types=_OTHERS,
        sliding_window=5,
        attention_bias=True,
        tie_word_embeddings=False,
        **_GELU,
    ),
    "gemma3": config(
        "gemma3_text",
        "Gemma3",
        eos_token_id=2,
        **_GELU,
        query_pre_attn_scalar=5,
        sliding_window=6,
        sliding_window_pattern=3,
        head_dim=12,
        rope_parameters=None,
        rope_theta=50.0,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        rope_local_base_freq=5.0,
    ),
    "gemma3_by_type": config(
        "gemma3_text",
        "Gemma3",
        eos_token_id=[2, 5],
        **_GELU,
        attention_bias=True,
        final_logit_softcapping=2.0,
        layer_types=_SOME,
        sliding_window=5,
        num_key_value_heads=1,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 70.0},
            "sliding_attention": {"rope_type": "linear", "rope_theta": 8.0, "factor": 3.0},
        },
        tie_word_embeddings=False,
    ),
    "phi3": config("phi3", "Phi3", eos_token_id=2, sliding_window=7, **_OLD_ROPE),
    # Whatever is read is longer than the original length: transformers never changes over to the long factors.
    "phi3_long": config(
        "phi3",
        "Phi3",
        eos_token_id=2,
        rope_parameters=None,
        rope_theta=100.0,
        rope_scaling={"type": "longrope"} | _LONG,
        original_max_position_embeddings=2,
        max_position_embeddings=3,
        partial_rotary_factor=0.75,
        tie_word_embeddings=False,
    ),
    "phi3_short": config(
        "phi3",
        "Phi3",
        eos_token_id=2,
        rope_parameters={"rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.5, **_SHORT},
        original_max_position_embeddings=64,
    ),
    "granite": config(
        "granite",
        "Granite",
        eos_token_id=2,
        embedding_multiplier=6.0,
        attention_multiplier=0.2,
        residual_multiplier=0.6,
        logits_scaling=3.0,
        **_OLD_ROPE,
    ),
    "granite_biases": config(
        "granite",
        "Granite",
        eos_token_id=2,
        attention_bias=True,
        mlp_bias=True,
        attention_multiplier=0.3,
        tie_word_embeddings=False,
    ),
    "gpt_neox": neox(rotary_emb_base=100.0),
    "gpt_neox_serial": neox(
        use_parallel_residual=False,
        hidden_act="gelu_fast",
        attention_bias=False,
        tie_word_embeddings=True,
        rotary_pct=0.5,
        rope_scaling={"type": "linear", "factor": 2.0},
    ),
    "gpt2": gpt2(),
    "gpt2_untied": gpt2(
        tie_word_embeddings=False,
        n_head=16,
        n_inner=48,
        n_positions=100,
        activation_function="gelu",
        scale_attn_weights=False,
    ),
    "llama_dynamic": config("llama", "Llama", rope_parameters=_NTK, max_position_embeddings=32),
    "ministral_all": config("ministral", "Ministral", sliding_window=6, num_key_value_heads=4),
}

_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION |= {"image_size": 8, "patch_size": 4}
_UNSAID = ("architectures", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "dtype")


def with_images(case: str, model_type: str, name: str, vision: str, **changes) -> dict:
    """Of a checkpoint with an encoder of images; its text model says what only it can say."""
    text = {field: value for field, value in CASES[case].items() if field not in _UNSAID}
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": model_type,
        "text_config": text,
        "vision_config": {"model_type": vision} | _VISION,
        "image_token_index": 63,
        "tie_word_embeddings": text["tie_word_embeddings"],
        **{field: CASES[case][field] for field in _UNSAID[1:] if field in CASES[case]},
    } | changes


_GEMMA3_IMAGES = {"mm_tokens_per_image": 4, "boi_token_index": 62, "eoi_token_index": 61}
WITH_IMAGES = {
    "gemma3": with_images("gemma3", "gemma3", "Gemma3", "siglip_vision_model", **_GEMMA3_IMAGES),
    "ministral3": with_images("ministral3", "mistral3", "Mistral3", "pixtral", spatial_merge_size=2),
    "mistral_no_window": with_images("mistral_no_window", "mistral3", "Mistral3", "pixtral"),
}
# The text model's tensors in a checkpoint as files have been since the first, and as transformers 5 names its modules.
FORMS = {
    "old": lambda name: f"language_model.{name}",
    "new": lambda name: name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1),
}
