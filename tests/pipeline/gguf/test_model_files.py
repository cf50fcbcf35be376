"""What a GGUF file's metadata means, in the words of a model directory's files."""

import itertools
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as HfTokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import InputError, ModelError
from pipeline.gateway.templates import ChatTemplate
from pipeline.gguf.model_files import find_gguf, has_model_file, read_model_file
from pipeline.gguf.vocabulary import PRE_TOKENIZERS
from pipeline.models.config import hash_config, load_config
from pipeline.models.registry import load_shard
from tests.pipeline.gguf.test_header import entry, float_value, gguf_file, size_value, text_value
from tests.pipeline.gguf_files import Types, write_gguf
from tests.pipeline.oracles import randomise

TINY = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TEXTS = (
    "Hello world", "  two  spaces", "naïve café 漢字 🙂", "x = 12345;\n\n\tif (a != b) {}", "a",
    " ", "\n\n\n", "I'll WON'T it's", "<|im_start|>user\nhi<|im_end|>", "100,000.5%",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A directory of one tiny Llama."""
    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    randomise(LlamaForCausalLM(LlamaConfig(**TINY))).save_pretrained(directory)
    return directory


def written(tiny: Path, path: Path, change) -> Path:
    write_gguf(tiny, path, lambda _: Types.F16, change=change)
    return path


@pytest.fixture(scope="module")
def with_tokenizer(tiny, tmp_path_factory):
    """A model with SmolLM2's tokenizer, and SmolLM2's directory."""
    smollm2 = Path(__file__).parents[3] / "models" / "smollm2"
    if not (smollm2 / "tokenizer.json").is_file():
        pytest.skip("no models/smollm2: run scripts/download_model.sh")
    from tests.pipeline.gguf_files import add_tokenizer

    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return written(tiny, path, lambda writer: add_tokenizer(writer, smollm2)), smollm2


def test_a_byte_level_tokenizer_is_the_one_it_was_made_of(with_tokenizer):
    model, smollm2 = with_tokenizer
    own, theirs = Tokenizer(model / "tokenizer.json"), Tokenizer(smollm2 / "tokenizer.json")
    for text in TEXTS:
        ids = own.encode(text)
        assert ids == theirs.encode(text)
        assert own.decode(ids) == theirs.decode(ids)
    assert own.end_token_ids == theirs.end_token_ids
    assert own.special_tokens == theirs.special_tokens


def test_a_chat_template_is_the_one_it_was_made_of(with_tokenizer):
    templates = [ChatTemplate.load(each) for each in with_tokenizer]
    messages = [{"role": "user", "content": "hi"}]
    try:
        assert templates[0].render(messages) == templates[1].render(messages)
    finally:
        for template in templates:
            template.close()


def sentence_pieces(writer: gguf.GGUFWriter, *, has_prefix: bool = True) -> list[str]:
    """A vocabulary of characters, bytes and words with scores as training gives them."""
    words = ["\u2581a", "he", "ll", "hell", "hello", "\u2581hello", "wor", "ld", "world",
             "\u2581world", "lo", "\u2581h", "\u2581w", "or", "el", "\u2581\u2581"]  # fmt: skip
    chars = sorted(set("".join(words)) | set("bcdfgijkmnpqstuvxyz.,!"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    first = len(tokens)
    tokens += [*words, *chars, "[marked]"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(words) + len(chars)), 4]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * first + [-float(i) for i in range(len(tokens) - first)])
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(has_prefix)
    return tokens


def merged(text: str, tokens: list[str], has_prefix: bool) -> list[int]:
    """As llama.cpp: the neighbours whose piece has the best score become one, until none do."""
    ids = {token: index for index, token in enumerate(tokens)}
    symbols = list(("\u2581" if has_prefix else "") + text.replace(" ", "\u2581"))
    while True:
        pairs = [
            (ids[left + right], at)
            for at, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in ids
        ]
        if not pairs:
            break
        _, at = min(pairs)  # scores fall with the ids
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found = []
    for symbol in symbols:
        bytes_of = [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        found += [ids[symbol]] if symbol in ids else bytes_of
    return found


@pytest.mark.parametrize("has_prefix", [True, False])
def test_sentence_pieces_are_merged_by_their_scores(tiny, tmp_path, has_prefix):
    tokens = []
    path = written(
        tiny,
        tmp_path / "model.gguf",
        lambda writer: tokens.extend(sentence_pieces(writer, has_prefix=has_prefix)),
    )
    tokenizer = Tokenizer(path / "tokenizer.json")
    for text in ("hello world", "a hello  worldly hell", "é漢 zoo", "hellohello,world!", "q"):
        ids = tokenizer.encode(text)
        assert list(ids) == [1, *merged(text, tokens, has_prefix)]  # begun by <s>
        assert tokenizer.decode(ids) == text
    assert tokens.index("[marked]") in tokenizer.encode("hello[marked]")
    assert tokenizer.end_token_ids == {2}


def test_a_text_is_ended_and_begun_as_the_metadata_says(tiny, tmp_path):
    def change(writer: gguf.GGUFWriter) -> None:
        sentence_pieces(writer)
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(True)

    tokenizer = Tokenizer(written(tiny, tmp_path / "model.gguf", change) / "tokenizer.json")
    ids = tokenizer.encode("hello")
    assert (ids[0] == 1, ids[-1]) == (False, 2)


# How words are split, by the tokenizers that these names stand for: text -> words.
SPLITS = {
    "gpt-2": {"it's 12345 a": ["it", "'s", "Ġ12345", "Ġa"]},
    "smollm": {"a 123": ["a", "Ġ", "1", "2", "3"]},
    "llama-bpe": {"IT'S 12345\n\n a": ["IT", "'S", "Ġ", "123", "45", "ĊĊ", "Ġa"]},
    "qwen2": {"x12 IT'S": ["x", "1", "2", "ĠIT", "'S"]},
    "tekken": {"HelloWorld 12//\n": ["Hello", "World", "Ġ", "1", "2", "//Ċ"]},
    "gpt-4o": {"HelloWorld's 1234//\n": ["Hello", "World's", "Ġ", "123", "4", "//Ċ"]},
}


@pytest.mark.parametrize("pre", SPLITS)
def test_text_is_split_into_the_words_of_its_kind(tiny, tmp_path, pre):
    tokens = [chr(code) for code in (*range(33, 127), *range(0xA1, 0xAD), *range(0xAE, 0x144))]
    tokens.append("ab")

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_merges(["a b"])

    path = written(tiny, tmp_path / "model.gguf", change)
    tokenizer = HfTokenizer.from_buffer(read_model_file(path / "tokenizer.json", 1 << 28))
    for text, words in SPLITS[pre].items():
        assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == words


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_way_to_split_text_is_one_that_the_library_knows(tiny, tmp_path, pre):
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(["<s>", "</s>", "<pad>", "a", "b", "ab"])
        writer.add_token_merges(["a b"])

    tokenizer = Tokenizer(written(tiny, tmp_path / "model.gguf", change) / "tokenizer.json")
    assert tokenizer.encode("ab")[-1:] == (5,)


def test_llama3s_frequencies_are_told_by_their_factors(tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY | {"head_dim": 64}, rope_parameters=rope))
    randomise(model).save_pretrained(tmp_path / "hf")
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2).float() / 64)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert factors.max() > 7

    def change(writer: gguf.GGUFWriter, factors=factors) -> None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))

    path = written(tmp_path / "hf", tmp_path / "model.gguf", change)
    assert load_config(path) == load_config(tmp_path / "hf")
    load_shard(path, load_config(path), 0, 1, expected_hashes=None)
    odd = written(tmp_path / "hf", tmp_path / "odd.gguf", lambda w: change(w, factors**2))
    with pytest.raises(ModelError, match=r"rope_freqs.weight is not Llama 3's"):
        load_config(odd)


def test_a_directory_of_one_file_is_that_and_of_several_is_asked_which(tmp_path):
    assert find_gguf(tmp_path) == tmp_path
    (tmp_path / "a.gguf").write_bytes(b"")
    assert find_gguf(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(InputError, match=r"2 GGUF files \(a.gguf, b.gguf\): name one"):
        find_gguf(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert find_gguf(tmp_path) == tmp_path


def test_a_file_that_is_replaced_is_read_again(tiny, tmp_path):
    path = written(tiny, tmp_path / "model.gguf", lambda writer: None)
    before = hash_config(path)
    other = written(
        tiny, tmp_path / "other.gguf", lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    )
    other.replace(path)
    assert hash_config(path) == before  # it says the same
    other = written(tiny, tmp_path / "other.gguf", lambda writer: writer.add_eot_token_id(7))
    other.replace(path)
    assert load_config(path).eos_token_ids == (2, 7)


def test_a_file_without_a_tokenizer_says_so(tiny, tmp_path):
    path = written(tiny, tmp_path / "model.gguf", lambda writer: None)
    assert not has_model_file(path / "tokenizer.json")
    with pytest.raises(InputError, match="has no tokenizer in it"):
        Tokenizer(path / "tokenizer.json")


def llama_file(*values: bytes, entries: list[bytes] | None = None) -> bytes:
    entries = [entry("token_embd.weight", (8, 32), 8, 0)] if entries is None else entries
    return gguf_file(entries, [text_value("general.architecture", "llama"), *values], bytes(288))


REFUSED = {
    "an unknown architecture": (
        gguf_file([], [text_value("general.architecture", "mamba")], b""),
        "its architecture 'mamba' is not supported: use a llama",
    ),
    "no architecture": (gguf_file([], [], b""), "general.architecture is missing"),
    "a size that is missing": (llama_file(), r"llama\.attention\.head_count is missing"),
    "a size of another type": (
        llama_file(text_value("llama.attention.head_count", "2")),
        r"llama\.attention\.head_count is no int",
    ),
    "no embedding": (gguf_file([], [text_value("general.architecture", "llama")], b""), "missing"),
    "a softcap": (
        llama_file(float_value("llama.final_logit_softcapping", 30.0)),
        r"llama\.final_logit_softcapping is 30\.0, which is not computed",
    ),
    "a part of a model": (llama_file(size_value("split.count", 3)), "one of 3 parts"),
    "no GGUF": (b"no such thing", "no GGUF file"),
    "a cut file": (llama_file()[:40], "truncated"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, name):
    data, message = REFUSED[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_model_is_told_from_what_is_not_there(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"is no model: of files, those .* end with \.gguf"):
        load_config(tmp_path / "model.bin")
    with pytest.raises(ModelError, match=r"there is no file .*model\.gguf"):
        load_config(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="is it a model directory"):
        load_config(tmp_path / "model")


BAD_TOKENIZERS = {
    "another kind": (lambda w: (w.add_tokenizer_model("bert"), w.add_token_list(["a"])), "'bert'"),
    "an unknown split": (
        lambda w: (
            w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre("odd"), w.add_token_list(["a"]),
            w.add_token_merges(["a a"]),
        ),
        "splits text as 'odd'",
    ),
    "no merges": (
        lambda w: (w.add_tokenizer_model("gpt2"), w.add_token_list(["a"])), "merges are missing",
    ),
    "no scores": (
        lambda w: (w.add_tokenizer_model("llama"), w.add_token_list(["a"])), "scores are missing",
    ),
    "the same token twice": (
        lambda w: (w.add_tokenizer_model("llama"), w.add_token_list(["a", "a"])),
        "two tokens of the same text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TOKENIZERS)
def test_a_tokenizer_that_cannot_be_used_is_refused_in_one_line(tiny, tmp_path, name):
    change, message = BAD_TOKENIZERS[name]
    path = written(tiny, tmp_path / "model.gguf", change)
    with pytest.raises(InputError, match=re.escape(message)):
        Tokenizer(path / "tokenizer.json")
