"""Tokens that are known by their text: a file names one that ends an answer, and models stop at several."""

from __future__ import annotations

from collections.abc import Mapping

#: Prefix, suffix and middle of a gap to fill: Qwen, StarCoder and Granite, SantaCoder, DeepSeek, Code Llama.
FIM_TEXTS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<PRE>", "<SUF>", "<MID>"),
)

#: What follows a filled gap in the training text: padding, the next file, the next repository.
FIM_END_TEXTS = frozenset(
    ("<|fim_pad|>", "<fim_pad>", "<fim-pad>", "<|file_sep|>", "<file_sep>", "<|file_separator|>", "<|repo_name|>", "<repo_name>",
     "<reponame>")
)  # fmt: skip

# Written so that nobody's text would hold them as a word.
_ENDS = frozenset(
    ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>",
     "<|EOT|>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<end_of_turn>", "<turn|>", "<|tool_response>",
     "<end_of_utterance>", "<EOT>", "▁<EOT>", "<｜end▁of▁sentence｜>")
)  # fmt: skip

#: These end an answer in every model that has them as control tokens.
END_TEXTS = _ENDS | {"</s>", "<eos>", "[EOT]"}

#: Control tokens in every vocabulary that has them, whatever type the file gives them.
CONTROL_TEXTS = _ENDS | {text for family in FIM_TEXTS for text in family if len(text) > len("<PRE>")} | FIM_END_TEXTS


def end_ids(control: Mapping[str, int]) -> frozenset[int]:
    """Which control tokens (text -> id) end an answer. Where answers are made of several messages, as gpt-oss's are, `<|end|>`
    ends a message and `<|return|>` or `<|call|>` the answer."""
    ends = {text for text in control if text in END_TEXTS}
    if {"<|return|>", "<|call|>"} <= ends:
        ends.discard("<|end|>")
    return frozenset(control[text] for text in ends)
