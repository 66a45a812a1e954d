"""What is refused before weights are loaded, what is accepted, and what the messages say."""

import logging

import pytest
import vllm
from harness import KARA, configure, engine, greedy, prompts
from vllm.config import VllmConfig

from kara_kernels.integrations.vllm import hook, register, settings
from kara_kernels.integrations.vllm.windows import configure as windows

FP8 = {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": True}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "kv_cache_scheme": FP8}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
NVFP4 = {**MODELOPT, "kv_cache_quant_algo": "NVFP4"}


@pytest.fixture
def warned():
    """Messages of Kara's warnings. vLLM's loggers do not propagate to pytest's."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("vllm.kara").addHandler(handler)
    yield said
    logging.getLogger("vllm.kara").removeHandler(handler)


def overridden(model, overrides, kara=KARA, **options):
    """A configuration of the model as if its config.json had said something else."""
    return configure(model, kara, hf_overrides=overrides, **options)


# --------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"sliding_window": 128}, "sliding windows .*: 128"),
        ({"sliding_window": 128, "layer_types": ["chunked_attention", "sliding_attention"]}, "sliding windows .*: 128"),
        ({"attention_chunk_size": 64}, "chunked attention: 64"),
        ({"attn_logit_softcapping": 30.0}, "soft-capped logits: 30.0"),
        ({"alibi": True}, "ALiBi"),
        ({"attention_sinks": True}, "attention sinks"),
        (
            {"per_layer_config": {"1": {"num_key_value_heads": 4}}},
            "layers of unequal heads: total_num_kv_heads",
        ),
        ({"quantization_config": NVFP4}, "a KV cache quantised to other than fp8 .*: nvfp4"),
    ],
)
def test_models_are_refused_by_their_configuration(model, overrides, words):
    with pytest.raises(ValueError, match=f"kara: expected only supported features, got {words}"):
        overridden(model, overrides)


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ({"sliding_window": None, "attn_logit_softcapping": None, "alibi": False}, {}),
        ({"sliding_window": 128, "layer_types": ["full_attention"] * 3}, {}),
        ({"sliding_window": 128, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}, {}),
        ({"sliding_window": 128}, {"disable_sliding_window": True, "max_model_len": 128}),
        ({"final_logit_softcapping": 30.0}, {}),
        ({"per_layer_config": {"1": {"intermediate_size": 128}}}, {}),
        ({"quantization_config": {**COMPRESSED, "kv_cache_scheme": None}}, {}),
        ({"quantization_config": COMPRESSED}, {"kv_cache_dtype": "bfloat16"}),
        ({"quantization_config": COMPRESSED}, {}),
        ({"quantization_config": MODELOPT}, {}),
    ],
)
def test_what_a_model_does_not_use_is_no_reason_to_refuse_it(model, overrides, options):
    overridden(model, overrides, {**KARA, "window": 64}, **options)


def test_more_ranks_than_kv_heads_are_refused(model):
    config = configure(model, KARA)
    config.parallel_config.tensor_parallel_size = 4
    with pytest.raises(ValueError, match=r"KV heads than tensor-parallel ranks \(--tensor-parallel-size\): 2 and 4"):
        hook.after(config)


def test_no_weights_are_read_before_a_model_is_refused(model, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("vllm.model_executor.model_loader.get_model_loader", load)
    with pytest.raises(ValueError, match="sliding windows"), engine(model, hf_overrides={"sliding_window": 128}):
        pass


def test_layers_are_refused_if_the_configuration_shows_nothing(model, monkeypatch):
    monkeypatch.setattr(windows, "UNSUPPORTED", {})
    refused = pytest.raises(ValueError, match=r"kara: expected plain attention in layer .*, got sliding windows$")
    with refused, engine(model, hf_overrides={"sliding_window": 128}):
        pass


# --------------------------------------------------------------------------------- ring and lengths


def test_a_ring_beyond_its_bound_is_refused_at_once(model):
    refused = r"kara: max_query_gib: .* at most 0.0001 GiB, got .* for 64 sequences .*--max-num-seqs"
    with pytest.raises(ValueError, match=refused):
        configure(model, {**KARA, "max_query_gib": 0.0001}, max_num_seqs=64)


def test_a_ring_that_only_causal_queries_need_is_refused_and_not_thinned(model):
    with pytest.raises(ValueError, match=r"kara: max_query_gib: .* at most 0\.0001 GiB"):
        configure(model, {"attention": "causal", "max_query_gib": 0.0001})


@pytest.mark.parametrize(
    ("kara", "longest"),
    [
        ({}, 64 + 16 + 1 + 2),  # a prompt of one token; the last two tokens are never computed before a plan
        ({"protected": 20}, 64 + 16 + 20 + 2),
        ({"keep": 48}, 64 + 16 + 17 + 2),  # 97 tokens, the first length from 81 on at which dropping 16 frees a block
    ],
)
def test_requests_that_could_never_be_compressed_are_an_error(model, trace, kara, longest):
    """At the shortest length that is accepted, a request is compressed once. With one token less it never would be."""
    kara = {"window": 64, "keep": 32, "tail": 16, **kara}
    with pytest.raises(ValueError, match=rf"kara: window: .* --max-model-len {longest - 1}, got window=64, tail=16"):
        configure(model, kara, max_model_len=longest - 1)
    with engine(model, kara, trace=trace, max_model_len=longest) as one:
        one.generate(prompts(1), greedy(longest - 1))
        assert [event["logical_len"] for event in one.events()] == [longest - 2]


def test_a_model_length_that_vllm_fits_to_its_memory_is_checked_again(model):
    with (
        pytest.raises(ValueError, match=r"kara: window: .* before --max-model-len 64, got"),
        engine(model, KARA, max_model_len=-1, num_gpu_blocks_override=3),
    ):
        pass


# ------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize(
    ("kara", "message"),
    [
        ({"window": 64}, "keep: expected 1..63, got 128 (keep was not set)"),
        ({"query_stride": 300}, "query_stride: expected 1..256, got 300"),
        ({"keep": 300}, "keep: expected 1..255, got 300"),
        ({"windw": 64}, "got windw"),
    ],
)
def test_messages_say_what_was_not_set(model, kara, message):
    with pytest.raises(ValueError, match="kara: ") as caught:
        configure(model, kara)
    assert f"{message} [" in str(caught.value).replace("\n", " ")  # pydantic adds brackets


def test_a_window_that_was_not_set_may_be_shorter_than_a_block(model):
    refused = r"at least one block of 512 tokens, got 256 \(window was not set; .*--block-size"
    with pytest.raises(ValueError, match=refused):
        configure(model, {"keep": 64}, block_size=512, max_model_len=2048)


def test_lengths_that_were_not_set_are_marked(model):
    refused = r"--max-model-len 300, got window=256 \(default\), tail=100, protected=0 \(default\)"
    with pytest.raises(ValueError, match=refused):
        configure(model, {"tail": 100}, max_model_len=300)


# ---------------------------------------------------------------------------------------- misspelt keys


@pytest.mark.parametrize("key", ["Kara", "KARA", "kara_kernels", "kara-kernels", "karra", "kra"])
def test_a_misspelt_key_is_warned_about(model, warned, key):
    for _ in range(2):
        configure(model, KARA, additional_config={key: KARA})
    said = [x for x in warned if repr(key) in x]
    assert said == [f"Kara stays off: --additional-config has the key {key!r}, expected 'kara'"]


@pytest.mark.parametrize("key", ["context", "Contexts"])
def test_contexts_are_spelt_so(model, warned, key):
    configure(model, None, additional_config={key: {}})
    assert f"Kara stays off: --additional-config has the key {key!r}, expected 'contexts'" in warned


@pytest.mark.parametrize("given", [{}, {"kda_prefill_backend": "triton"}, {"data": 1}, {7: 1}])
def test_other_keys_are_others_business(model, warned, given):
    register()
    VllmConfig(additional_config=given)
    assert warned == []


# ------------------------------------------------------------------------------------------------- hash


def hash_of(model, kara, **options):
    register()
    return configure(model, kara, dtype="float32", max_num_seqs=8, **options).compute_hash()


def test_what_is_not_in_the_hash_reuses_what_vllm_keeps_between_starts(model, tmp_path):
    first = hash_of(model, KARA)
    trace = str(tmp_path / "trace")
    for other in ({"keep": 16}, {"trace": trace}, {"pool": "layer"}, {"period": 3}, {"max_query_gib": 3.5}):
        assert hash_of(model, {**KARA, **other}) == first, other


def test_what_takes_memory_is_in_the_hash(model):
    """vLLM keeps the measured memory between starts (VLLM_ENABLE_STARTUP_PLAN), and the ring is part of it."""
    rings = [{}, {"window": 128}, {"tail": 32}, {"query_stride": 4}, {"query_heads": "mean"}, {"query_dtype": "fp8"}]
    hashes = {hash_of(model, {**KARA, **ring}) for ring in rings}
    without = configure(model, None, additional_config={}, dtype="float32", max_num_seqs=8).compute_hash()
    assert len(hashes | {without}) == len(rings) + 1


def test_other_additional_settings_stay_in_the_hash_and_readable(model):
    given = {"kara": KARA, "theirs": {"a": 1}}
    config = configure(model, KARA, additional_config=given)
    assert config.additional_config["theirs"] == {"a": 1}
    other = configure(model, KARA, additional_config={**given, "theirs": {"a": 2}})
    assert config.compute_hash() != other.compute_hash()
    assert given == {"kara": KARA, "theirs": {"a": 1}}


# --------------------------------------------------------------------------------------------- versions


def test_a_version_that_was_only_read_is_warned_about(model, monkeypatch, warned):
    (read,) = [minor for minor, proof in settings.SUPPORTED.items() if proof != "run"]
    monkeypatch.setattr(vllm, "__version__", f"{read}.0")
    for _ in range(2):
        configure(model, KARA)
    said = [x for x in warned if "never run" in x]
    assert said == [f"Kara was never run with vLLM {read}.0; its code was only read. It was run with vLLM 0.32.*"]
