import copy
import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers
from transformers import BertConfig, BertForMaskedLM, GenerationConfig, RobertaConfig

import yopo
from yopo import UnsupportedModelError, find_ffns
from yopo.moments import read_moments
from yopo.restore import restore_contract
from yopo.writing import can_write, write_tokens

_ENCODER = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


def encoder(name="BertForMaskedLM", **changes):
    kind = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(kind.config_class(**_ENCODER | changes)).eval()


@contextmanager
def prompts_seen(model):
    """Yield a list that fills with what `generate` is given to go on from."""
    seen, generate = [], type(model).generate

    def spy(self, inputs, **kwargs):
        seen.append(inputs)
        return generate(self, inputs, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "generate", spy)
        yield seen


def test_the_same_seed_writes_the_same_text_and_no_global_generator_moves(tiny_model):
    for model in (tiny_model("llama"), encoder()):
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        first = write_tokens(model, sequences=6, length=10, seed=3)["input_ids"]
        again = write_tokens(model, sequences=6, length=10, seed=3)["input_ids"]
        other = write_tokens(model, sequences=6, length=10, seed=4)["input_ids"]
        assert first.shape == (6, 10)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1] == random.getstate()
        assert (states[2] == np.random.get_state()[1]).all()


@pytest.mark.parametrize("length", [3, 500])
def test_text_neither_ends_early_nor_outgrows_the_model(tiny_model, length):
    model = tiny_model("opt", eos_token_id=[2, 7, 9])
    ids = write_tokens(model, sequences=8, length=length)["input_ids"]
    assert ids.shape == (8, min(length, model.config.max_position_embeddings))
    assert not torch.isin(ids[:, 1:], torch.tensor([2, 7, 9])).any()


def test_a_text_begins_as_the_config_says_and_then_with_any_token(tiny_model):
    with_begin = write_tokens(tiny_model("llama", bos_token_id=5), sequences=32, length=6)
    assert (with_begin["input_ids"][:, 0] == 5).all()
    assert len(with_begin["input_ids"][:, 1].unique()) > 12
    without = write_tokens(tiny_model("llama", bos_token_id=None), sequences=32, length=6)
    assert len(without["input_ids"][:, 0].unique()) > 12


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_tokens_come_as_often_as_the_model_likes_them(tiny_model, kind):
    model = tiny_model("opt") if kind == "decoder" else encoder()
    state = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if kind == "decoder":
            norm = model.model.decoder.final_layer_norm
        else:
            norm = model.cls.predictions.transform.LayerNorm
        norm.weight.zero_()
        norm.bias.copy_(state)
        head = model.get_output_embeddings()
        head.weight.copy_(torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) * 0.3)
        expected = head(state)
        fields = model.config.to_dict()
        expected[[i for key, i in fields.items() if "_token_id" in key and i]] = -torch.inf
        expected[model.config.pad_token_id] = -torch.inf
    ids = write_tokens(model, sequences=400, length=22)["input_ids"][:, 2:]
    counts = torch.bincount(ids.flatten(), minlength=64) / ids.numel()
    assert (counts - expected.softmax(-1)).abs().sum() < 0.1


def test_the_generation_config_of_the_model_plays_no_part_and_stays(tiny_model):
    model, same = tiny_model("llama"), tiny_model("llama")
    own = model.generation_config = GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=1, num_beams=3, top_k=2, temperature=0.1,
        forced_bos_token_id=9, forced_eos_token_id=9, max_length=4, do_sample=False,
        eos_token_id=[5, 6], suppress_tokens=[7, 8], min_p=0.5,
    )  # fmt: skip
    before = copy.deepcopy(own.to_dict())
    ids = write_tokens(model, sequences=4, length=12)["input_ids"]
    assert torch.equal(ids, write_tokens(same, sequences=4, length=12)["input_ids"])
    assert model.generation_config is own
    assert own.to_dict() == before


def test_an_encoder_reads_what_the_decoder_wrote(tiny_model):
    model = tiny_model("t5", decoder_start_token_id=0)
    with prompts_seen(model) as prompts:
        inputs = write_tokens(model, sequences=2, length=6)
    assert inputs["input_ids"].shape == inputs["decoder_input_ids"].shape == (2, 6)
    assert (inputs["decoder_input_ids"][:, 0] == 0).all()
    assert len(prompts) == 2
    assert torch.equal(prompts[1], inputs["input_ids"])
    assert not torch.equal(prompts[0], prompts[1])
    moments = read_moments(model, find_ffns(model), inputs)
    assert all(found.tokens > 0 for found in moments.values())


def test_an_encoder_of_another_vocabulary_reads_noise():
    config = transformers.MarianConfig(
        vocab_size=64, decoder_vocab_size=40, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, pad_token_id=0, decoder_start_token_id=0, eos_token_id=1,
        share_encoder_decoder_embeddings=False, tie_word_embeddings=False,
    )  # fmt: skip
    inputs = write_tokens(transformers.MarianMTModel(config).eval(), sequences=8, length=20)
    assert inputs["input_ids"].max() >= 40 > inputs["decoder_input_ids"].max()


def test_a_decoder_whose_beginning_is_not_named_begins_as_t5_does_or_is_refused(tiny_model):
    model = tiny_model("t5")
    inputs = write_tokens(model, sequences=2, length=6)
    assert (inputs["decoder_input_ids"][:, 0] == model.config.pad_token_id).all()
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    with pytest.raises(UnsupportedModelError, match="decoder_start_token_id"):
        write_tokens(model, sequences=2, length=6)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("BertForMaskedLM", {}),
        ("BertForPreTraining", {}),
        ("RobertaForMaskedLM", {}),
        ("ElectraForMaskedLM", {}),
        ("DebertaV2ForMaskedLM", {}),
        ("DistilBertForMaskedLM", {}),
        (
            "ModernBertForMaskedLM",
            {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
             "sep_token_id": 2},
        ),
    ],
)  # fmt: skip
def test_a_masked_language_model_writes_and_reads(name, changes):
    model = encoder(name, **changes)
    ids = write_tokens(model, sequences=3, length=12)["input_ids"]
    assert ids.shape == (3, 12)
    inner = ids
    if "Roberta" in name or "Modern" in name:
        assert (ids[:, 0] == model.config.bos_token_id).all()
        assert (ids[:, -1] == model.config.eos_token_id).all()
        inner = ids[:, 1:-1]
    assert not (inner == model.config.pad_token_id).any()
    moments = read_moments(model, find_ffns(model), {"input_ids": ids})
    assert all(found.tokens == 36 for found in moments.values())


def test_a_masked_language_model_ends_up_with_the_tokens_it_likes():
    model = encoder()
    with torch.no_grad():
        model.get_output_embeddings().bias[20] = 30.0
    assert (write_tokens(model, sequences=4, length=20)["input_ids"] == 20).all()


def test_positions_that_start_behind_the_padding_are_not_overrun():
    model = transformers.RobertaForMaskedLM(
        RobertaConfig(**_ENCODER, max_position_embeddings=20, pad_token_id=1)
    ).eval()
    assert write_tokens(model, sequences=2, length=64)["input_ids"].shape == (2, 18)


def test_an_encoder_is_pruned_by_text_of_its_own(monkeypatch):
    monkeypatch.setitem(write_tokens.__kwdefaults__, "sequences", 4)
    monkeypatch.setitem(write_tokens.__kwdefaults__, "length", 20)
    model = encoder()
    yopo.PolicyPruner().fit(model).prune(model, 0.5)
    assert model.config.intermediate_size == 40
    assert torch.isfinite(model(input_ids=torch.arange(9)[None]).logits).all()


@pytest.mark.parametrize(
    "name", ["BertModel", "BertForSequenceClassification", "ElectraForPreTraining"]
)
def test_models_without_a_head_for_tokens_cannot_write(name):
    assert not can_write(encoder(name))


def test_models_of_pictures_cannot_write():
    small = {key: value for key, value in _ENCODER.items() if key != "vocab_size"}
    config = transformers.ViTConfig(**small, image_size=16, patch_size=8)
    assert not can_write(transformers.ViTForImageClassification(config))


def test_a_model_without_weights_cannot_write():
    with torch.device("meta"):
        assert not can_write(BertForMaskedLM(BertConfig(**_ENCODER)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_a_model_that_writes_nan_or_infinity_is_refused(tiny_model, kind, value):
    model = encoder() if kind == "bert" else tiny_model(kind)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(value)
    with pytest.raises(UnsupportedModelError, match="writes NaN or infinite"):
        write_tokens(model, sequences=2, length=4)


def test_a_precision_that_the_device_cannot_compute_in_is_named_with_the_way_out(
    tiny_model, monkeypatch
):
    model = tiny_model("llama").train()

    def fail(*_, **__):
        raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(UnsupportedModelError, match=r"dtype=torch.float32.*torch.bfloat16"):
        write_tokens(model, sequences=2, length=4)
    assert model.training


def test_other_errors_of_a_model_come_through(tiny_model, monkeypatch):
    model = tiny_model("llama")

    def fail(*_, **__):
        raise RuntimeError("something else")

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(RuntimeError, match="something else"):
        write_tokens(model, sequences=2, length=4)


def test_a_vocabulary_of_one_token_writes_that_token(tiny_model):
    model = tiny_model("llama", vocab_size=1, bos_token_id=None, eos_token_id=None)
    assert (write_tokens(model, sequences=2, length=5)["input_ids"] == 0).all()


def test_tokens_of_pictures_are_never_written(tiny_model):
    model = tiny_model("llama", image_token_id=20, video_token_index=21)
    ids = write_tokens(model, sequences=20, length=40)["input_ids"]
    assert not torch.isin(ids, torch.tensor([20, 21])).any()


def test_evidence_of_a_model_that_writes_one_token_for_ever_does_no_harm(tiny_model):
    model = tiny_model("opt", seed=3)
    with torch.no_grad():
        model.model.decoder.final_layer_norm.weight.zero_()
        model.model.decoder.final_layer_norm.bias.copy_(100 * model.lm_head.weight[30])
    inputs = write_tokens(model, sequences=4, length=30)
    assert (inputs["input_ids"][:, 2:] == 30).float().mean() > 0.9
    for ffn in find_ffns(model):
        moments = read_moments(model, [ffn], inputs)[ffn.name]
        restored = restore_contract(
            moments, ffn.contract_weight(), ffn.contract_bias(), torch.arange(48),
            dtype=torch.float32,
        )  # fmt: skip
        assert restored.error <= restored.error_before
    pruner = yopo.PolicyPruner(evidence=inputs["input_ids"])
    pruner.fit(model).prune(model, 0.5)
    assert torch.isfinite(model(input_ids=inputs["input_ids"]).logits).all()


def test_a_config_that_names_no_limit_sets_none():
    config = transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)
    model = transformers.XLNetLMHeadModel(config).eval()
    assert config.max_position_embeddings == -1
    assert write_tokens(model, sequences=2, length=8)["input_ids"].shape == (2, 8)


def test_a_model_whose_generation_fails_is_refused_with_a_way_out(tiny_model, monkeypatch):
    model = tiny_model("llama")

    def fail(*_, **__):
        raise TypeError("no cache of this kind")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(UnsupportedModelError, match=r"no cache of this kind.*evidence='weights'"):
        write_tokens(model, sequences=2, length=8)
