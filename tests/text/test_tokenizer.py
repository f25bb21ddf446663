"""The tokenizer against open_clip's, Hugging Face's and a naive one."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
import random
import subprocess
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xclip_fast import VARIANTS, InputError, XCLIPConfig
from xclip_fast.text import Tokenizer, get_tokenizer
from xclip_fast.text import tokenizer as module

START, END = 49406, 49407
TEXTS = [
    "",
    " ",
    "a photo of a cat",
    "playing sports",
    "don't stop, it's 1234 \u20ac!",
    "DON'T WE'LL THEY'RE I'VE I'M HE'D '\u017fo",
    "don\u2019t \u201cquote\u201d",
    "''' 'x 's's !!'s '",
    "tom &amp; jerry &amp;amp;lt; &lt;b&gt; &#39; &notanentity; &",
    "x<y &lt; &amp;lt; &amp;amp;lt; &amp;amp;amp;lt; &amp;amp;amp;amp;lt;",  # ftfy leaves entities beside tags to us
    "caf\u00e9 cafe\u0301 CAFE\u0301",
    "\u0130stanbul \u1e9e stra\u00dfe \ufb01ne \uff21\uff22\uff23\uff11",
    "\u2460 \u2167 \u00bd \u0664\u0665 \u4e00\u4e8c\u4e09",
    "\u97f3\u697d \u0645\u0648\u0633\u064a\u0642\u0649 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001f1eb\U0001f1f7 \U0001f44d\U0001f3fd",
    "\x1b[31mred\x1b[0m a\x00b\x7f \ufeffbom",
    "\u00c3\u00a9t\u00c3\u00a9 l\u2019\u00e9t\u00e9",
    "tab\tnew\nline\r\nnbsp\u00a0wide\u3000zero\u200bwidth\u2028end\x85\x1c",
    "\u1fb3 \u0345x\u0345",
    "snake_case CamelCase x86-64 v1.2.3 a/b\\c @home #tag $5 50% ^_^ ~tilde `code`",
    "=" * 300,
    "a" * 5000,
    "lorem ipsum " * 500,
    "1234567890" * 50,
]


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    pytest.importorskip("open_clip")
    return get_tokenizer(49408)


@pytest.fixture(scope="module")
def open_clip_tokenizer():
    return pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()


@pytest.fixture(scope="module")
def vocabulary() -> Path:
    return Path(pytest.importorskip("open_clip").__file__).with_name("bpe_simple_vocab_16e6.txt.gz")


def assert_same_tokens(tokens: torch.Tensor, padded: torch.Tensor) -> None:
    length = tokens.shape[1]
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, padded[:, :length])
    assert not padded[:, length:].any()


def test_equal_to_open_clip_on_odd_texts(clip, open_clip_tokenizer) -> None:
    assert_same_tokens(clip(TEXTS), open_clip_tokenizer(TEXTS))


@pytest.mark.parametrize("context_length", [2, 3, 10, 77, 200])
def test_equal_to_open_clip_at_any_context_length(clip, open_clip_tokenizer, context_length: int) -> None:
    tokens = clip(TEXTS, context_length)
    assert tokens.shape[1] == context_length
    assert_same_tokens(tokens, open_clip_tokenizer(TEXTS, context_length))


def test_equal_to_open_clip_on_ten_thousand_labels(clip, open_clip_tokenizer) -> None:
    rng = random.Random(0)
    syllables = ["ta", "ri", "son", "ing", "er", "qu", "ble", "xz", "oo", "-", "'s ", " the ", "9", "\u00e9", "!"]
    labels = ["".join(rng.choices(syllables, k=rng.randrange(1, 9))) + f" {number}" for number in range(10_000)]
    assert_same_tokens(clip(labels), open_clip_tokenizer(labels))


# characters newer than Python's own tables have no known kind here
ASSIGNED = st.characters(exclude_categories=("Cs", "Cn")).filter(lambda c: unicodedata.category(c) != "Cn")
MIXED = st.one_of(ASSIGNED, st.sampled_from("'&;sStTrReE dDlLvVmM\u017f\u0345\u0130 \u2019\u00a0aeiou019"))


@settings(max_examples=600, deadline=None, derandomize=True)
@given(text=st.text(MIXED, max_size=40))
@pytest.mark.slow
def test_equal_to_open_clip_on_any_unicode(clip, open_clip_tokenizer, text: str) -> None:
    assert_same_tokens(clip(text), open_clip_tokenizer(text))


def hugging_face_tokenizer(encoder: dict[str, int], merges: list[tuple[str, str]]):
    transformers = pytest.importorskip("transformers")
    vocab = dict(encoder)
    vocab["<|startoftext|>"] = vocab.pop("<start_of_text>")
    vocab["<|endoftext|>"] = vocab.pop("<end_of_text>")
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges)


@pytest.fixture(scope="module")
def hugging_face(open_clip_tokenizer):
    merges = sorted(open_clip_tokenizer.bpe_ranks, key=open_clip_tokenizer.bpe_ranks.get)
    return hugging_face_tokenizer(open_clip_tokenizer.encoder, merges)


# Hugging Face neither repairs text nor resolves entities, and minds the case in contractions
REPAIRED = ("&", "\u2019", "\u017f", "\ufb01", "\uff21", "\x1b", "\u00c3", "\x85", "\u0345")


def test_equal_to_hugging_face(clip, hugging_face) -> None:
    texts = [text for text in TEXTS if not any(mark in text for mark in REPAIRED)]
    assert len(texts) > 12
    tokens = clip(texts)
    for row, text in zip(tokens, texts, strict=True):
        expected = hugging_face(text, truncation=True, max_length=77)["input_ids"]
        assert row[: len(expected)].tolist() == expected, ascii(text)
        assert not row[len(expected) :].any()


def test_vocabulary_from_a_hugging_face_folder(clip, hugging_face, tmp_path: Path) -> None:
    hugging_face.save_pretrained(tmp_path)
    assert torch.equal(get_tokenizer(49408, tmp_path)(TEXTS), clip(TEXTS))


def test_vocabulary_from_merges_txt(clip, open_clip_tokenizer, tmp_path: Path) -> None:
    merges = sorted(open_clip_tokenizer.bpe_ranks, key=open_clip_tokenizer.bpe_ranks.get)
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert torch.equal(get_tokenizer(49408, tmp_path)(TEXTS), clip(TEXTS))


@pytest.mark.parametrize("given", [str, Path])
def test_vocabulary_from_the_file_itself(clip, vocabulary: Path, given) -> None:
    assert torch.equal(get_tokenizer(VARIANTS["B/32"], given(vocabulary))(TEXTS), clip(TEXTS))


def test_vocabulary_unzipped_under_another_name(clip, vocabulary: Path, tmp_path: Path) -> None:
    path = tmp_path / "my words"
    path.write_bytes(gzip.decompress(vocabulary.read_bytes()))
    assert torch.equal(get_tokenizer(49408, path)(TEXTS), clip(TEXTS))


def test_a_replaced_file_is_read_again(vocabulary: Path, tmp_path: Path) -> None:
    path = tmp_path / "merges.txt"
    path.write_bytes(gzip.decompress(vocabulary.read_bytes()))
    get_tokenizer(49408, path)
    path.write_text("broken")
    with pytest.raises(InputError):
        get_tokenizer(49408, path)


def broken_vocabularies(vocabulary: Path) -> dict[str, bytes]:
    packed = vocabulary.read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")
    swapped = [lines[0], lines[2], lines[1], *lines[3:]]
    return {
        "empty": b"",
        "cut": packed[: len(packed) // 2],
        "flipped": packed[:1000] + bytes([packed[1000] ^ 0xFF]) + packed[1001:],
        "other file": b"\x00\x01\x02\xff" * 1000,
        "too few": "\n".join(lines[:1000]).encode(),
        "other order": "\n".join(swapped[:200] + swapped[300:50_000]).encode(),
        "other symbols": "\n".join(["#version: 0.2"] + ["\u2603 x"] * 50_000).encode(),
        "three on a line": "\n".join(["#version: 0.2"] + ["a b c"] * 50_000).encode(),
        "GPT-2's": "\n".join(["#version: 0.2"] + [f"\u0120 {chr(97 + i % 26)}" for i in range(50_000)]).encode(),
    }


BROKEN = [
    "empty",
    "cut",
    "flipped",
    "other file",
    "too few",
    "other order",
    "other symbols",
    "three on a line",
    "GPT-2's",
]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_vocabulary_is_one_clear_line(vocabulary: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "vocabulary"
    path.write_bytes(broken_vocabularies(vocabulary)[kind])
    with pytest.raises(InputError, match=r"vocabulary (cannot be read as|holds another)") as caught:
        get_tokenizer(49408, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"model": {}}', '{"model": {"merges": [1]}}', '{"model": 3}', "[" * 100_000],
    ids=["empty", "open", "list", "no model", "no merges", "number", "no mapping", "deep"],
)
def test_a_broken_tokenizer_json_is_one_clear_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read as"):
        get_tokenizer(49408, tmp_path)


def test_a_vocabulary_is_read_up_to_a_limit(vocabulary: Path, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "vocabulary"
    lines = gzip.decompress(vocabulary.read_bytes()).split(b"\n")[:49_000]
    packed, unpacked = gzip.compress(b"\n".join(lines)), b"\n".join(lines)
    assert len(packed) < 300_000 < len(unpacked)
    for content in (packed, unpacked):
        path.write_bytes(content)
        assert get_tokenizer(49408, path).vocab_size == 49408
    monkeypatch.setattr(module, "_LARGEST_FILE", 300_000)
    for content in (unpacked, packed):
        path.write_bytes(content)
        module._clip_tokenizer.cache_clear()
        with pytest.raises(InputError, match="holds another vocabulary"):
            get_tokenizer(49408, path)


def test_a_missing_vocabulary_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such file"):
        get_tokenizer(49408, tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"merges\.txt, tokenizer\.json in it"):
        get_tokenizer(49408, tmp_path)


@pytest.fixture
def without(monkeypatch):
    """Hides packages from the tokenizer."""
    found = module.importlib.util.find_spec

    def hide(*names: str) -> None:
        module._repair.cache_clear()
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name in names else found(name))

    yield hide
    module._repair.cache_clear()


def test_without_open_clip_the_error_says_what_to_install(without, vocabulary: Path) -> None:
    without("open_clip")
    with pytest.raises(InputError, match="pip install open_clip_torch, or give the path"):
        get_tokenizer(49408)
    assert get_tokenizer(49408, vocabulary)("a photo of a cat").tolist() == [[START, 320, 1125, 539, 320, 2368, END]]


def test_without_ftfy_ordinary_text_is_the_same_and_the_rest_warns_once(without, clip, caplog) -> None:
    plain = [text for text in TEXTS if text.isascii() and text.isprintable() and "&" not in text]
    accents = ["caf\u00e9 &amp; cafe\u0301", "\u97f3\u697d"]
    with_ftfy = clip(plain), clip(accents)
    without("ftfy")
    with caplog.at_level(logging.WARNING, logger="xclip_fast"):
        assert torch.equal(clip(plain), with_ftfy[0])
        assert not caplog.records
        assert torch.equal(clip(accents), with_ftfy[1])
    assert ["pip install ftfy" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("size", [0, 1, 513, 515, 49407, 50257, XCLIPConfig(vocab_size=1000)])
def test_no_tokenizer_for_other_sizes(size) -> None:
    with pytest.raises(InputError, match=r"no tokenizer has \d+ tokens: CLIP's has 49408"):
        get_tokenizer(size)


def test_a_vocabulary_that_nobody_would_read_is_refused() -> None:
    with pytest.raises(InputError, match="reads none: leave it out"):
        get_tokenizer(514, "merges.txt")


def test_the_batch_is_as_long_as_its_longest_text(clip) -> None:
    assert clip("hello world!").tolist() == [[START, 3306, 1002, 256, END]]
    assert clip(["cat", "a photo of a cat", ""]).tolist() == [
        [START, 2368, END, 0, 0, 0, 0],
        [START, 320, 1125, 539, 320, 2368, END],
        [START, END, 0, 0, 0, 0, 0],
    ]


def test_no_text_makes_the_marks_of_its_start_and_end(clip) -> None:
    tokens = clip("<end_of_text> <|endoftext|> <start_of_text> <|startoftext|> x")
    assert (tokens == END).nonzero().tolist() == [[0, tokens.shape[1] - 1]]
    assert (tokens == START).nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("size", [514, 49408])
def test_no_texts_no_rows(size: int, clip) -> None:
    tokens = get_tokenizer(size)([])
    assert tokens.shape == (0, 2)
    assert tokens.dtype == torch.int64


@pytest.mark.parametrize("context_length", [1, 0, -5])
def test_a_context_without_room_for_both_marks_is_refused(context_length: int) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        get_tokenizer(514)("a", context_length)


def test_what_is_no_string_is_refused() -> None:
    with pytest.raises(ValueError, match="texts must be strings, found int"):
        get_tokenizer(514)(["a", 1])


def test_lone_surrogates_are_an_input_error(clip) -> None:
    with pytest.raises(InputError, match="not valid Unicode"):
        clip("caf\udce9")


def test_bytes_are_tokens_without_merges() -> None:
    tokenizer = get_tokenizer(XCLIPConfig(vocab_size=514))
    a, b, exclamation = (ord(letter) - ord("!") for letter in "ab!")
    assert tokenizer(["ab a!", "A"]).tolist() == [
        [512, a, b + 256, a + 256, exclamation + 256, 513],
        [512, a + 256, 513, 0, 0, 0],
    ]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
def test_byte_tokens_spell_the_words(text: str) -> None:
    tokens = get_tokenizer(514)(text, context_length=10_000)[0].tolist()
    assert tokens[0] == 512
    assert tokens[-1] == 513
    order = sorted(range(256), key=byte_rank)
    spelled = b"".join(bytes([order[token % 256]]) + b" " * (token >= 256) for token in tokens[1:-1])
    words = list(module._words(module._clean(text)))
    assert spelled.decode() == "".join(f"{word} " for word in words)


def byte_rank(byte: int) -> int:
    """The rank of a byte in the published table: printable characters first, both parts in order."""
    printable = 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE
    return byte if printable else 256 + byte


def naive_merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """The published algorithm: all places of the best pair at once, again and again."""
    while len(symbols) > 1:
        best = min(pairwise(symbols), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged, place = [], 0
        while place < len(symbols):
            pair = tuple(symbols[place : place + 2]) == best
            merged.append("".join(symbols[place : place + 1 + pair]))
            place += 1 + pair
        symbols = merged
    return symbols


@pytest.mark.parametrize("seed", range(30))
def test_merging_is_the_published_algorithm(seed: int) -> None:
    """Few letters and random merge lists: overlapping pairs, many ways through each word."""
    rng = random.Random(seed)
    symbols = ["a", "b", "c", "a</w>", "b</w>", "c</w>"]
    merges: list[tuple[str, str]] = []
    while len(merges) < 25:
        first, second = rng.choice(symbols), rng.choice(symbols)
        if not first.endswith("</w>") and first + second not in symbols and len(first + second) < 12:
            merges.append((first, second))
            symbols.append(first + second)
    tokenizer = Tokenizer(merges)
    names = {512 + place: first + second for place, (first, second) in enumerate(merges)}
    for letter in "abc":
        names[ord(letter) - ord("!")] = letter
        names[ord(letter) - ord("!") + 256] = letter + "</w>"
    ranks = {pair: place for place, pair in enumerate(merges)}
    for _ in range(60):
        word = "".join(rng.choices("abc", k=rng.randrange(1, 30)))
        expected = naive_merge([*word[:-1], word[-1] + "</w>"], ranks)
        assert [names[token] for token in tokenizer(word)[0, 1:-1].tolist()] == expected


def test_one_huge_word_is_no_denial_of_service(clip) -> None:
    rng = random.Random(0)
    word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=100_000))
    tokens = clip(["x", word])
    assert tokens.shape == (2, 77)
    assert tokens[1, -1] == END


def test_many_words_do_not_grow_the_memory(monkeypatch) -> None:
    monkeypatch.setattr(module, "_KNOWN_WORDS", 100)
    tokenizer = Tokenizer()
    texts = ["".join("abcdefghij"[int(digit)] for digit in str(number)) for number in range(1000)]
    tokens = tokenizer(texts)
    assert len(tokenizer._known) <= 100
    assert torch.equal(tokens, Tokenizer()(texts))


def test_a_tokenizer_can_be_sent_to_another_process(clip) -> None:
    assert torch.equal(pickle.loads(pickle.dumps(clip))(TEXTS), clip(TEXTS))


@pytest.mark.slow
def test_neither_import_nor_use_loads_optional_packages() -> None:
    pytest.importorskip("open_clip")
    script = (
        "import sys, json; from xclip_fast.text import get_tokenizer; get_tokenizer(49408)('a photo & a cat');"
        "print(json.dumps([m for m in ('open_clip', 'transformers', 'tokenizers', 'torchvision') if m in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []
