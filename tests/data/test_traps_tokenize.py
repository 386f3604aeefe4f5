"""Tokens that differ before the boundary of a prompt, because of what stands behind it."""

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from jaxalign.data.records import Record
from jaxalign.data.tokenize import Encoder, tokenize_records


def test_trap_a_merge_behind_the_boundary_changes_the_prompts_own_tokens():
    """ "zab" + "c" is z a bc and "zab" + "d" is z ab d: two tokens of each end within the prompt, one is the same."""
    vocab = {token: i for i, token in enumerate(("<s>", "</s>", "z", "a", "b", "c", "d", "bc", "ab"))}
    bpe = Tokenizer(models.BPE(vocab, [("b", "c"), ("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    record = Record(0, "memory", 1, "pair", prompt="zab", chosen="c", rejected="d")
    (example,) = tokenize_records([record], Encoder(tokenizer), append_eos=True)
    words = [tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in (example.prompt, *example.completions)]
    assert words == [["z"], ["a", "bc", "</s>"], ["ab", "d", "</s>"]]
    assert all(mask.all() for mask in example.masks)
