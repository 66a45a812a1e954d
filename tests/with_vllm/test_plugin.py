"""Enabling Kara, and rejected settings: one error at start-up that names what was expected and what it got."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import vllm
from harness import KARA, configure, engine, greedy, make_model, prompts
from vllm.config import VllmConfig
from vllm.utils.import_utils import resolve_obj_by_qualname

from kara_kernels.integrations.vllm import hook, register, settings
from kara_kernels.integrations.vllm.windows import configure as windows
from kara_kernels.integrations.vllm.windows.runner import KaraRunner
from kara_kernels.integrations.vllm.windows.scheduler import KaraAsyncScheduler, KaraScheduler


@pytest.mark.parametrize(
    ("kara", "words"),
    [
        ({"windw": 64}, ["windw", "expected one of ", "window, keep", "trace"]),
        ({"window": "64"}, ["window", "expected an int", "str"]),
        ({"window": 64, "keep": 64}, ["keep", "expected 1..63", "64"]),
        ({"window": 64, "keep": 0}, ["keep", "expected 1..63", "0"]),
        ({"window": 8192, "keep": 64}, ["window", "expected 2..4096", "8192"]),
        ({"window": 16, "keep": 8}, ["window", "at least one block of 32", "16", "--block-size"]),
        ({"window": 64, "keep": 48, "min_freed_blocks": 2}, ["min_freed_blocks", "expected at most 1", "2"]),
        ({"pool": "heads"}, ["pool", "'head', 'layer', 'model'", "'heads'"]),
        ({"tail": -1}, ["tail", "expected 0..", "-1"]),
        ({"tail": 1.5}, ["tail", "expected an int", "float"]),
        ({"chunk_fraction": 2}, ["chunk_fraction", "expected 0.0..1.0", "2"]),
        ({"attention": "sideways"}, ["attention", "'bidirectional', 'causal'", "'sideways'"]),
        ({"attention": "causal", "query_stride": 2}, ["query_stride", "expected 1", "2"]),
        ({"trace": 7}, ["trace", "expected a file name", "int"]),
        ({"trace": "/nowhere/trace"}, ["trace", "can be written", "/nowhere/trace: No such file"]),
        ("on", ["expected an object of settings", "str"]),
    ],
)
def test_settings_are_checked_at_start_up(model, kara, words):
    with pytest.raises(ValueError, match="kara: ") as caught:
        configure(model, kara)
    line = next(line for line in str(caught.value).splitlines() if "kara: " in line)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative",
        ),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "KV connectors"),
        ({"kv_offloading_size": 1.0}, "KV connectors"),  # vLLM converts it to one
        ({"kv_cache_dtype": "int8_per_token_head"}, "a KV cache quantised to other than fp8 .*: int8_per_token_head"),
        ({"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]}, "layers of unequal caches .*: 0"),
        ({"scheduler_cls": "elsewhere.Scheduler"}, "another scheduler .*: elsewhere.Scheduler"),
        ({"runner": "pooling"}, "pooling models"),
    ],
)
def test_unsupported_configurations_are_refused(model, options, words):
    with pytest.raises(ValueError, match=f"kara: expected only supported features, got .*{words}"):
        configure(model, KARA, **options)


def test_unsupported_versions_are_refused(model, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    with pytest.raises(ValueError, match=r"kara: expected vLLM 0\.32\.\* or 0\.33\.\*, got 0\.99\.1"):
        configure(model, KARA)


def test_models_with_sliding_windows_are_refused(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    shape = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 32,
    }
    mistral = make_model(tmp_path)  # for its tokenizer
    MistralForCausalLM(
        MistralConfig(vocab_size=512, num_key_value_heads=2, sliding_window=128, **shape)
    ).save_pretrained(mistral)
    with pytest.raises(ValueError, match=r"kara: .*sliding windows .*: 128"), engine(mistral):
        pass


def layer(**changes):
    impl = {"alibi_slopes": None, "sinks": None, "logits_soft_cap": 0, "scale": 0.125}
    own = {
        "num_heads": 4, "num_kv_heads": 2, "head_size": 32, "attn_type": "decoder", "sliding_window": None,
        "kv_sharing_target_layer_name": None, "kv_cache_dtype": "auto",
    }  # fmt: skip
    impl.update({key: value for key, value in changes.items() if key in impl})
    own.update({key: value for key, value in changes.items() if key not in impl})
    return SimpleNamespace(impl=SimpleNamespace(**impl), **own)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([layer(alibi_slopes=torch.ones(4))], "expected plain attention in layer 0, got ALiBi"),
        ([layer(sliding_window=128)] * 2, "layer 0, got sliding windows"),
        ([layer(sliding_window=128), layer(head_size_v=16)], "layer 1, got values of another size"),
        ([layer(sinks=torch.ones(4))], "attention sinks"),
        ([layer(logits_soft_cap=30.0)], "soft-capped logits"),
        ([layer(kv_sharing_target_layer_name="0")], "cross-layer KV sharing"),
        ([layer(attn_type="encoder_only")], "attention other than a decoder's: encoder_only"),
        ([layer(head_size_v=16)], "values of another size than keys: 16 and 32"),
        ([layer(), layer(num_kv_heads=4)], "the same heads, scale and cache in every layer"),
        ([layer(), layer(scale=1.0)], "the same heads, scale and cache in every layer"),
        ([], "the same heads, scale and cache in every layer, got no layer"),
        ([layer(), layer(kv_cache_dtype="fp8")], "the same heads, scale and cache in every layer"),
        ([layer(kv_cache_dtype="nvfp4")], "a KV cache quantised to other than fp8: nvfp4"),
    ],
)
def test_layers_that_are_not_plain_attention_are_refused(layers, words):
    runner = KaraRunner()
    runner.compilation_config = SimpleNamespace(static_forward_context=dict(zip("0123", layers, strict=False)))
    with pytest.raises(ValueError, match=f"kara: .*{words}"):
        runner._attention_layers()


def test_what_is_recorded_follows_the_memory_unless_it_is_set(model):
    """In four bits, 3 layers of 4 heads of 32 take 216 bytes per query, for 384 tokens of 100 sequences."""
    most = 216 * 384 * 100 / 2**30
    for share, form in ((1.01, ("all", 1)), (0.99, ("all", 2)), (0.49, ("mean", 2)), (0.24, ("mean", 4))):
        config = configure(model, {"max_query_gib": share * most}, max_num_seqs=100)
        policy = settings.settings_of(config).policy
        assert (policy.query_heads, policy.query_stride) == form
    with pytest.raises(ValueError, match="kara: max_query_gib: expected a query ring of at most"):
        configure(model, {"max_query_gib": 0.99 * most, "query_stride": 1}, max_num_seqs=100)


def test_configuring_twice_is_configuring_once(model):
    register()
    register()
    config = configure(model, KARA)
    hook.before(config)
    hook.after(config)
    assert config.scheduler_config.scheduler_cls == windows.SCHEDULERS[0]
    assert config.parallel_config.worker_cls in windows.WORKERS.values()


def test_a_vllm_that_cannot_be_hooked_starts_without_us(monkeypatch, caplog):
    monkeypatch.delattr(VllmConfig, "__post_init__")
    register()
    assert "Kara stays off" in caplog.text


def test_the_environment_report_knows_this_vllm():
    code = [sys.executable, "-m", "kara_kernels", "--json"]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)["vllm"]
    assert vllm.__version__.startswith(said["version"])
    assert said["supported"]
    assert said["registered"]
    assert [resolve_obj_by_qualname(name) for name in said["schedulers"]] == [KaraScheduler, KaraAsyncScheduler]
    for theirs, ours in said["workers"].items():
        assert issubclass(resolve_obj_by_qualname(ours), resolve_obj_by_qualname(theirs))


UNCONFIGURED = """
import json, sys
sys.path[:0] = {path!r}
import conftest
from harness import engine, greedy, prompts
with engine({model!r}, None) as plain:
    served = plain.generate(prompts(5, 40, 77), greedy(200))
    core = plain.scheduler
    print("RESULT", json.dumps([
        [request.tokens for request in served],
        [type(x).__module__ for x in (core, plain.runner, core.kv_cache_manager.coordinator.single_type_managers[0])],
        sorted(name for name in sys.modules if name.startswith("kara_kernels")),
    ]))
"""


def test_unconfigured_vllm_behaves_as_without_us(model):
    """Compares an unconfigured plugin with VLLM_PLUGINS without it, each in its own process."""
    results = []
    for plugins in (None, "none"):
        env = {**os.environ, **({} if plugins is None else {"VLLM_PLUGINS": plugins})}
        code = UNCONFIGURED.format(path=[p for p in sys.path if "tests" in p], model=model)
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(json.loads(next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))[7:]))
    with_us, without = results
    assert with_us[0] == without[0]
    assert all(module.startswith("vllm.") for module in with_us[1])
    assert without[2] == []
    # The hook, and nothing behind it.
    room = "kara_kernels.integrations.vllm"
    assert with_us[2] == ["kara_kernels", "kara_kernels.integrations", room, f"{room}.hook"]


def test_memory_in_plenty_and_nothing_to_compress_changes_no_token(model):
    said = []
    for kara in (None, {**KARA, "window": 512, "keep": 256}):
        with engine(model, kara) as one:
            said.append([request.tokens for request in one.generate(prompts(5, 40, 77), greedy(200))])
    assert said[0] == said[1]


def test_the_worker_of_a_gpu_leaves_vllms_worker_of_cpus_alone():
    """Importing that one replaces classes of torch.cuda."""
    code = """
import torch
from vllm.platforms import current_platform
type(current_platform).is_cpu = lambda self: False
event = torch.cuda.Event
from kara_kernels.integrations.vllm.windows.worker import KaraGPUWorker
assert torch.cuda.Event is event
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
