"""Architectures of transformers from small random configurations: language, pictures, sound, mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.zoo.example import Example
from benchmarks.zoo.torchvision_ops import declare_operators

WIDTHS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = WIDTHS | {"vocab_size": 100}
CAUSAL = TEXT | {"max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = CAUSAL | {"num_key_value_heads": 2}
VISION = WIDTHS | {"image_size": 64, "patch_size": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def ids() -> dict[str, Any]:
    return {"input_ids": torch.randint(5, 90, (2, 16))}


def pair() -> dict[str, Any]:
    return {"input_ids": torch.randint(5, 90, (2, 16)), "decoder_input_ids": torch.randint(5, 90, (2, 12))}


def picture(size: int = 64) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def wave() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 2000)}


def whisper() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 16, 60), "decoder_input_ids": torch.randint(5, 90, (2, 8))}


def clip() -> dict[str, Any]:
    return ids() | {"pixel_values": torch.randn(2, 3, 64, 64)}


SPEECH = WIDTHS | {
    "vocab_size": 32, "conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0,
}  # fmt: skip
BART = {
    "vocab_size": 100, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
T5 = {
    "vocab_size": 100, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "num_decoder_layers": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
BEIT = VISION | {"use_relative_position_bias": True}
SWIN = {
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "image_size": 64,
    "patch_size": 4,
}
SEGFORMER = {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32}
CLIP = {
    "text_config": TEXT
    | {"max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
    "vision_config": VISION,
    "projection_dim": 48,
}
BLOOM = {"vocab_size": 100, "hidden_size": 64, "n_layer": 2, "n_head": 4}
GPT_NEO = {
    "vocab_size": 100, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 32,
    "attention_types": [[["global", "local"], 1]], "window_size": 8,
}  # fmt: skip
DISTILBERT = {"vocab_size": 100, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
DEBERTA = TEXT | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
OPT = {k: v for k, v in CAUSAL.items() if k != "intermediate_size"} | {
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
}
MAMBA = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
QWEN_MOE = GROUPED | {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 64,
}  # fmt: skip
GATED = T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CONVNEXT = {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 2, 1]}
YOLOS = VISION | {"image_size": [64, 64], "num_detection_tokens": 5}
WHISPER = BART | {
    "num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 32, "suppress_tokens": None,
    "begin_suppress_tokens": None,
}  # fmt: skip
Inputs = Callable[[], dict[str, Any]]
ENCODERS: dict[str, tuple[str, str, dict[str, Any], Inputs]] = {
    "bert": ("Bert", "ForSequenceClassification", TEXT, ids),
    "bert_lm": ("Bert", "ForMaskedLM", TEXT, ids),
    "roberta": ("Roberta", "ForTokenClassification", CAUSAL | {"pad_token_id": 1}, ids),
    "distilbert": ("DistilBert", "ForSequenceClassification", DISTILBERT, ids),
    "albert": ("Albert", "ForSequenceClassification", TEXT | {"embedding_size": 32}, ids),
    "electra": ("Electra", "ForSequenceClassification", TEXT | {"embedding_size": 32}, ids),
    "mpnet": ("MPNet", "ForSequenceClassification", TEXT, ids),
    "deberta_v2": ("DebertaV2", "ForSequenceClassification", DEBERTA, ids),
    "modernbert": (
        "ModernBert",
        "ForSequenceClassification",
        CAUSAL | {"cls_token_id": 1, "sep_token_id": 2},
        ids,
    ),
}
DECODERS: dict[str, tuple[str, str, dict[str, Any], Inputs]] = {
    "gpt2": ("GPT2", "LMHeadModel", GPT2, ids),
    "gpt_neo": ("GPTNeo", "ForCausalLM", GPT_NEO, ids),
    "gpt_neox": ("GPTNeoX", "ForCausalLM", CAUSAL, ids),
    "gptj": ("GPTJ", "ForCausalLM", GPT2 | {"rotary_dim": 8}, ids),
    "opt": ("OPT", "ForCausalLM", OPT, ids),
    "bloom": ("Bloom", "ForCausalLM", BLOOM, ids),
    "falcon": ("Falcon", "ForCausalLM", CAUSAL | {"new_decoder_architecture": False}, ids),
    "llama": ("Llama", "ForCausalLM", GROUPED, ids),
    "mistral": ("Mistral", "ForCausalLM", GROUPED, ids),
    "qwen2": ("Qwen2", "ForCausalLM", GROUPED, ids),
    "qwen3": ("Qwen3", "ForCausalLM", GROUPED | {"head_dim": 16}, ids),
    "gemma2": ("Gemma2", "ForCausalLM", GROUPED | {"head_dim": 16}, ids),
    "phi": ("Phi", "ForCausalLM", CAUSAL, ids),
    "phi3": ("Phi3", "ForCausalLM", GROUPED, ids),
    "olmo2": ("Olmo2", "ForCausalLM", GROUPED, ids),
    "stablelm": ("StableLm", "ForCausalLM", GROUPED, ids),
    "mamba": ("Mamba", "ForCausalLM", MAMBA, ids),
    # mixtures of experts
    "mixtral": ("Mixtral", "ForCausalLM", GROUPED | EXPERTS, ids),
    "qwen2_moe": ("Qwen2Moe", "ForCausalLM", QWEN_MOE, ids),
}
OTHERS: dict[str, tuple[str, str, dict[str, Any], Inputs]] = {
    # encoder and decoder
    "switch": ("SwitchTransformers", "ForConditionalGeneration", T5 | {"num_experts": 4}, pair),
    "t5": ("T5", "ForConditionalGeneration", T5, pair),
    "t5_gated": ("T5", "ForConditionalGeneration", GATED, pair),
    "bart": ("Bart", "ForConditionalGeneration", BART, pair),
    "pegasus": ("Pegasus", "ForConditionalGeneration", BART, pair),
    # pictures
    "vit": ("ViT", "ForImageClassification", VISION, picture()),
    "deit": ("DeiT", "ForImageClassificationWithTeacher", VISION, picture()),
    "beit": ("Beit", "ForImageClassification", BEIT, picture()),
    "dinov2": ("Dinov2", "ForImageClassification", VISION | {"mlp_ratio": 2}, picture()),
    "segformer": ("Segformer", "ForSemanticSegmentation", SEGFORMER, picture()),
    "convnextv2": ("ConvNextV2", "ForImageClassification", CONVNEXT, picture()),
    "swin": ("Swin", "ForImageClassification", SWIN, picture()),
    "swinv2": ("Swinv2", "ForImageClassification", SWIN, picture()),
    "yolos": ("Yolos", "ForObjectDetection", YOLOS, picture()),
    # sound, and text with pictures
    "wav2vec2": ("Wav2Vec2", "ForCTC", SPEECH, wave),
    "hubert": ("Hubert", "ForCTC", SPEECH, wave),
    "whisper": ("Whisper", "ForConditionalGeneration", WHISPER, whisper),
    "clip": ("CLIP", "Model", CLIP, clip),
}
ARCHITECTURES = ENCODERS | DECODERS | OTHERS
"""Name -> family, class of the model without the family, settings of its configuration, example inputs."""


def transformers_model(name: str) -> Example:
    declare_operators()  # transformers imports torchvision
    import transformers

    transformers.logging.set_verbosity_error()
    family, task, settings, inputs = ARCHITECTURES[name]
    config = getattr(transformers, f"{family}Config")(**settings)
    for part in (config, getattr(config, "text_config", config), getattr(config, "decoder", config)):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    config.return_dict = True
    return Example(getattr(transformers, family + task)(config), (), inputs())
