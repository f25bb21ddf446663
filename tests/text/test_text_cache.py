"""The class-text cache: never stale, never different from the model, bounded."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from configs import LABELS
from numerics import TOLERANCES, assert_within
from torch import Tensor, nn

from xclip_fast import XCLIPConfig, create_model
from xclip_fast.reference import XCLIP
from xclip_fast.text import TextCache, get_tokenizer
from xclip_fast.text import cache as module

CONFIG = replace(LABELS, text_layers=2)
TOKENS = get_tokenizer(514)(["moving left", "moving right", "up"])
OTHERS = get_tokenizer(514)(["growing", "shrinking", "still"])
WEIGHTS = ("token_embedding", "positional_embedding", "text_projection", "ln_final", "transformer")


class Counted(XCLIP):
    """A model that counts the texts it encodes."""

    def __init__(self, config: XCLIPConfig) -> None:
        super().__init__(config)
        self.sizes: list[tuple[int, ...]] = []

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.sizes.append(tuple(tokens.shape))
        return super().encode_text(tokens)


@pytest.fixture
def model() -> Counted:
    return Counted(CONFIG)


def assert_fresh(features: Tensor, model: XCLIP, tokens: Tensor) -> None:
    assert_within(features, fresh(model, tokens), TOLERANCES[features.dtype].model, what="text cache")


def fresh(model: XCLIP, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return XCLIP.encode_text(model, tokens)


def assert_known(cache: TextCache, model: Counted, tokens: Tensor) -> None:
    before = len(model.sizes)
    features = cache.encode(model, tokens)
    assert len(model.sizes) == before
    assert_fresh(features, model, tokens)


def assert_encoded(cache: TextCache, model: Counted, tokens: Tensor) -> None:
    before = len(model.sizes)
    features = cache.encode(model, tokens)
    assert len(model.sizes) > before
    assert_fresh(features, model, tokens)


def test_other_labels_give_other_answers(model) -> None:
    cache = TextCache()
    assert_encoded(cache, model, TOKENS)
    assert_encoded(cache, model, OTHERS)
    assert_encoded(cache, model, TOKENS.flip(0))
    for tokens in (TOKENS, OTHERS, TOKENS.flip(0)):
        assert_known(cache, model, tokens)
    assert not torch.equal(cache.encode(model, TOKENS), cache.encode(model, OTHERS))


def test_same_bytes_in_another_shape_are_other_labels(model) -> None:
    cache = TextCache()
    tokens = torch.tensor([[1, 2], [3, 513]])
    assert_encoded(cache, model, tokens)
    assert_encoded(cache, model, tokens.reshape(1, 4))
    assert_known(cache, model, tokens.int())


def by_optimizer(model: XCLIP) -> None:
    optimizer = torch.optim.AdamW(model.transformer.parameters(), lr=1e-2)
    model.encode_text(OTHERS).sum().backward()
    optimizer.step()


def by_load_state_dict(model: XCLIP) -> None:
    torch.manual_seed(1)
    model.load_state_dict(XCLIP(CONFIG).state_dict())


def by_data_copy(model: XCLIP) -> None:
    weight = model.transformer.resblocks[1].mlp.c_fc.weight
    version = weight._version
    weight.data.copy_(torch.randn_like(weight))
    assert weight._version == version


def by_new_data(model: XCLIP) -> None:
    model.text_projection.data = torch.randn_like(model.text_projection)


def by_numpy(model: XCLIP) -> None:
    model.ln_final.bias.detach().numpy()[3] += 1


def by_new_parameter(model: XCLIP) -> None:
    model.positional_embedding = nn.Parameter(torch.randn_like(model.positional_embedding))


def by_new_module(model: XCLIP) -> None:
    model.transformer.resblocks[0] = copy.deepcopy(model.transformer.resblocks[1])


def by_an_inference_mode_write(model: XCLIP) -> None:
    with torch.inference_mode():
        model.ln_final.weight.data.mul_(2)


def by_embedding_row(model: XCLIP) -> None:
    model.token_embedding.weight.data[int(TOKENS[0, 1])] += 1


def by_exchange_of_rows(model: XCLIP) -> None:
    weight = model.transformer.resblocks[0].attn.out_proj.weight
    weight.data.copy_(weight.data.flip(0))


def by_exchange_of_layers(model: XCLIP) -> None:
    first, second = model.transformer.resblocks
    model.transformer.resblocks = nn.ModuleList([second, first])


def by_double(model: XCLIP) -> None:
    model.double()


CHANGES = [
    by_optimizer,
    by_load_state_dict,
    by_data_copy,
    by_new_data,
    by_numpy,
    by_new_parameter,
    by_new_module,
    by_an_inference_mode_write,
    by_embedding_row,
    by_exchange_of_rows,
    by_exchange_of_layers,
    by_double,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_give_fresh_features(model, change) -> None:
    cache = TextCache()
    stale = cache.encode(model, TOKENS)
    change(model)
    assert_encoded(cache, model, TOKENS)
    assert not torch.equal(cache.encode(model, TOKENS).to(stale.dtype), stale)
    assert_known(cache, model, TOKENS)


def test_weights_that_come_back_are_known_again(model) -> None:
    cache = TextCache()
    assert_encoded(cache, model, TOKENS)
    model.text_projection.data.neg_()
    assert_encoded(cache, model, TOKENS)
    model.text_projection.data.neg_()
    assert_known(cache, model, TOKENS)


def test_what_no_text_depends_on_may_change(model) -> None:
    cache = TextCache()
    assert_encoded(cache, model, TOKENS)
    for parameter in (*model.visual.parameters(), *model.mit.parameters(), model.logit_scale):
        parameter.data.add_(1)
    unused = [row for row in range(514) if row not in TOKENS]
    model.token_embedding.weight.data[unused] = float("nan")
    model.positional_embedding.data[TOKENS.shape[1] :] = float("nan")
    assert_known(cache, model, TOKENS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_any_single_bit_is_seen(dtype: torch.dtype) -> None:
    model = XCLIP(replace(CONFIG, text_layers=1)).to(dtype)
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]

    def fingerprint() -> bytes:
        return module._fingerprint(module.text_weights(model, TOKENS))

    start = fingerprint()
    for name, parameter in model.named_parameters():
        if not name.startswith(WEIGHTS):
            continue
        bits = parameter.data.view(integers).flatten()
        row = int(TOKENS[0, 1]) * 64 if name == "token_embedding.weight" else 0
        for place in (row, row + 63 if bits.numel() > row + 63 else row):
            for bit in range(8 * dtype.itemsize):
                bits[place] ^= 1 << bit if bit < 8 * dtype.itemsize - 1 else torch.iinfo(integers).min
                assert fingerprint() != start, (name, place, bit)
                bits[place] ^= 1 << bit if bit < 8 * dtype.itemsize - 1 else torch.iinfo(integers).min
    assert fingerprint() == start


def test_changes_that_cancel_in_a_plain_sum_or_xor_are_seen() -> None:
    weight = torch.randn(512, 512)
    start = module._fingerprint([weight, torch.ones(3)])
    for change in (
        torch.neg,
        lambda x: x.flip(0),
        lambda x: x.flip(1),
        torch.t,
        lambda x: x.roll(1, 1),
        torch.zeros_like,
    ):
        assert module._fingerprint([change(weight), torch.ones(3)]) != start
    assert module._fingerprint([weight, torch.ones(3)]) == start
    assert module._fingerprint([weight.view(256, 1024), torch.ones(3)]) != start
    assert module._fingerprint([weight.view(torch.int32), torch.ones(3)]) != start


def test_layout_and_place_in_memory_do_not_matter() -> None:
    for shape in ((32, 64), (33, 65)):
        weight = torch.randn(shape).bfloat16()
        buffer = torch.cat([torch.zeros(1).bfloat16(), weight.flatten()])
        start = module._fingerprint([weight, weight[0]])
        assert module._fingerprint([buffer[1:].view(shape), weight[0]]) == start
        assert module._fingerprint([weight.t().contiguous().t(), weight[0]]) == start


def test_another_model_has_its_own_features(model) -> None:
    cache = TextCache()
    twin = copy.deepcopy(model)
    fewer_heads = Counted(replace(CONFIG, text_heads=4))
    fewer_heads.load_state_dict(model.state_dict())
    assert_encoded(cache, model, TOKENS)
    assert_encoded(cache, twin, TOKENS)
    assert_encoded(cache, fewer_heads, TOKENS)
    assert not torch.equal(cache.encode(model, TOKENS), cache.encode(fewer_heads, TOKENS))


@pytest.mark.slow
def test_a_new_model_in_the_memory_of_an_old_one_is_another() -> None:
    cache = TextCache()
    for heads in (1, 2, 4, 8):
        torch.manual_seed(0)
        model = Counted(replace(CONFIG, text_heads=heads))
        assert_encoded(cache, model, TOKENS)
        del model
        gc.collect()
    assert len(cache._models) == 0


def test_autocast_has_its_own_features(model) -> None:
    cache = TextCache()
    plain = cache.encode(model, TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        cast = cache.encode(model, TOKENS)
        assert torch.equal(cast, cache.encode(model, TOKENS))
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cache.encode(model, TOKENS), plain)
    assert plain.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays_and_no_gradient_flows(model, training: bool) -> None:
    model.train(training)
    model.visual.train(not training)
    modes = [part.training for part in model.modules()]
    cache = TextCache()
    for _ in range(2):
        features = cache.encode(model, TOKENS)
        assert not features.requires_grad
        assert features.grad_fn is None
    assert [part.training for part in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_features_found_in_inference_mode_can_be_trained_on(model) -> None:
    cache = TextCache()
    with torch.inference_mode():
        cache.encode(model, TOKENS)
    assert_known(cache, model, TOKENS)
    scale = torch.ones(64, requires_grad=True)
    (cache.encode(model, TOKENS) * scale).sum().backward()
    assert scale.grad is not None


def test_writing_into_the_result_does_not_reach_the_cache(model) -> None:
    cache = TextCache()
    for _ in range(2):
        cache.encode(model, TOKENS).zero_()
    assert_known(cache, model, TOKENS)


def test_columns_behind_the_end_of_text_do_not_count(model) -> None:
    cache = TextCache()
    padded = torch.full((len(TOKENS), 77), 7)
    padded[:, : TOKENS.shape[1]] = TOKENS
    assert_encoded(cache, model, TOKENS)
    assert_known(cache, model, padded)
    assert max(length for _, length in model.sizes) == TOKENS.shape[1]


@pytest.mark.slow
def test_ten_thousand_labels_in_bounded_chunks(monkeypatch, model) -> None:
    monkeypatch.setattr(module, "_CHUNK_TOKENS", 2048)
    tokens = get_tokenizer(514)([f"{'x' * (number % 13)}{number}" for number in range(10_000)])
    features = TextCache().encode(model, tokens)
    assert all(rows * length <= 2048 for rows, length in model.sizes)
    assert sum(rows for rows, _ in model.sizes) == 10_000
    # texts of like length go together
    assert sum(rows * length for rows, length in model.sizes) < 0.75 * tokens.numel()
    assert_fresh(features[::25], model, tokens[::25])


def test_the_results_of_chunks_are_not_held(monkeypatch, model) -> None:
    monkeypatch.setattr(module, "_CHUNK_TOKENS", 64)
    held: list[weakref.ref[Tensor]] = []

    def encode(tokens: Tensor) -> Tensor:
        assert sum(one() is not None for one in held) <= 1
        features = Counted.encode_text(model, tokens)
        held.append(weakref.ref(features))
        return features

    monkeypatch.setattr(model, "encode_text", encode)
    tokens = get_tokenizer(514)([f"label {number}" for number in range(100)])
    features = TextCache().encode(model, tokens)
    assert len(held) > 10
    assert_fresh(features, model, tokens)


def test_a_text_longer_than_a_chunk_is_encoded_alone(monkeypatch, model) -> None:
    monkeypatch.setattr(module, "_CHUNK_TOKENS", 3)
    assert_encoded(TextCache(), model, TOKENS)
    assert [rows for rows, _ in model.sizes] == [1, 1, 1]


def test_the_least_recently_used_goes_first(model) -> None:
    size = cache_bytes(TextCache(), model, TOKENS)
    cache = TextCache(max_bytes=2 * size)
    third = TOKENS.flip(0)
    for tokens in (TOKENS, OTHERS, TOKENS, third):
        cache.encode(model, tokens)
    assert_known(cache, model, TOKENS)
    assert_known(cache, model, third)
    assert_encoded(cache, model, OTHERS)
    assert cache._entries.taken == 2 * size


def cache_bytes(cache: TextCache, model: XCLIP, tokens: Tensor) -> int:
    return cache.encode(model, tokens).nbytes


@pytest.mark.parametrize("max_bytes", [0, 1])
def test_what_is_larger_than_the_cache_is_not_kept(model, max_bytes: int) -> None:
    cache = TextCache(max_bytes)
    assert_encoded(cache, model, TOKENS)
    assert_encoded(cache, model, TOKENS)
    assert not cache._entries.taken


def test_a_thousand_weight_updates_keep_within_the_bound(model) -> None:
    cache = TextCache(max_bytes=10_000)
    for step in range(200):
        model.text_projection.data.add_(step + 1)
        cache.encode(model, TOKENS)
    assert cache._entries.taken <= 10_000


def test_a_cache_does_not_keep_a_model_alive() -> None:
    cache = TextCache()
    model = Counted(CONFIG)
    cache.encode(model, TOKENS)
    parameter = torch.utils.weak.WeakTensorKeyDictionary({model.text_projection: 1})
    del model
    gc.collect()
    assert len(parameter) == 0


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_model_that_carries_a_cache_can_be_copied(model, copied) -> None:
    model.cache = TextCache(max_bytes=12345)
    model.cache.encode(model, TOKENS)
    assert copied(model.cache).max_bytes == 12345
    twin = copied(model)
    assert_encoded(twin.cache if twin.cache is not model.cache else TextCache(), twin, TOKENS)
    torch.save(model.state_dict(), io.BytesIO())


def test_threads_share_a_cache(model) -> None:
    cache = TextCache(max_bytes=2000)
    sets = [get_tokenizer(514)([f"label {number}", "x" * number]) for number in range(1, 9)]
    expected = [fresh(model, tokens) for tokens in sets]
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for step in range(40):
                place = (seed + step * 3) % len(sets)
                torch.testing.assert_close(cache.encode(model, sets[place]), expected[place], rtol=1e-5, atol=1e-5)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize(
    "tokens",
    [
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(1, 2, 3, dtype=torch.int64),
        torch.zeros(2, 5),
        torch.zeros(2, 5, dtype=torch.bool),
        torch.zeros(2, 5, dtype=torch.int16),
    ],
)
def test_tokens_of_another_shape_or_dtype_are_refused_as_the_model_does(model, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="tokens must be integers of shape"):
        TextCache().encode(model, tokens)


@pytest.mark.parametrize("wrong", [-1, 514, 49407])
def test_tokens_of_another_vocabulary_are_refused(model, wrong: int) -> None:
    with pytest.raises(ValueError, match=r"token ids must lie in 0\.\.513"):
        TextCache().encode(model, torch.tensor([[512, wrong, 513]]))


def test_no_labels_no_features(model) -> None:
    assert TextCache().encode(model, get_tokenizer(514)([])).shape == (0, 64)


def test_compiled_and_created_models_are_models_too() -> None:
    model = create_model(CONFIG, seed=0)
    features = TextCache().encode(model, TOKENS)
    torch.testing.assert_close(TextCache().encode(torch.compile(model, backend="eager"), TOKENS), features)


@pytest.mark.parametrize("part", ["token_embedding", "transformer", "transformer.resblocks.0.mlp.c_fc", "ln_final"])
def test_what_is_put_on_the_text_tower_counts(model: Counted, part: str) -> None:
    cache, tokens = TextCache(), torch.tensor([[5, 7, 9, 513]])
    before = cache.encode(model, tokens)
    scale = [1.5]
    module = model.get_submodule(part)
    handle = module.register_forward_hook(
        lambda module, given, output: scale[0] * output + scale[0] * output.roll(1, -1)
    )
    changed = cache.encode(model, tokens)
    assert not torch.allclose(changed, before, rtol=1e-3)
    # as an adapter that is switched or trained on: no weight of the tower tells
    scale[0] = -0.5
    assert not torch.allclose(cache.encode(model, tokens), changed, rtol=1e-3)
    assert_fresh(cache.encode(model, tokens), model, tokens)
    handle.remove()
    assert torch.equal(cache.encode(model, tokens), before)


def test_an_embedding_in_a_wrapper_is_encoded_and_not_kept(model: Counted) -> None:
    class Shifted(nn.Module):
        shift = 1.0

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, tokens: Tensor) -> Tensor:
            return self.inner(tokens) + self.shift * torch.linspace(-1, 1, 64)

    Shifted.__module__ = "somebody.adapters"
    model.token_embedding = Shifted(model.token_embedding)
    cache, tokens = TextCache(), torch.tensor([[5, 7, 9, 513]])
    first = cache.encode(model, tokens)
    model.token_embedding.shift = -1.0
    assert not torch.allclose(cache.encode(model, tokens), first, rtol=1e-3)
