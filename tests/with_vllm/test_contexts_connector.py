"""Contexts that are enabled by vLLM's own --kv-transfer-config, which names our connector."""

import json
import operator

import pytest
import torch
from contexts_harness import ON, serving
from harness import KARA, MODES, asynchronous, engine, greedy, prompts
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from kara_kernels.integrations.vllm.contexts.connector import name_of
from kara_kernels.integrations.vllm.contexts.settings import CONVERSATION
from kara_kernels.integrations.vllm.contexts.worker import ContextWorker

MODULE = "kara_kernels.integrations.vllm.contexts.connector"


def named(settings, **changes):
    given = {"kv_connector": "ContextConnector", "kv_connector_module_path": MODULE, "kv_role": "kv_both"}
    return {**given, "kv_connector_extra_config": settings, **changes}


def configured(model, transfer=None, additional=None):
    """vLLM's configuration, from a command line."""
    words = ["--model", model, "--max-model-len", "512", "--block-size", "32"]
    for option, value in (("--kv-transfer-config", transfer), ("--additional-config", additional)):
        words += [] if value is None else [option, json.dumps(value)]
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    return EngineArgs.from_cli_args(parser.parse_args(words)).create_engine_config()


def told(config):
    """What a configuration says about contexts."""
    transfer = {key: value for key, value in vars(config.kv_transfer_config).items() if key != "engine_id"}
    del transfer["kv_connector_extra_config"]
    classes = config.scheduler_config.scheduler_cls, config.parallel_config.worker_cls
    return transfer, dict(config.additional_config), classes


DIFFERENT = {
    "dtype": ("model_config", "dtype", torch.float16),
    "model": ("model_config", "model", "another"),
    "revision": ("model_config", "revision", "main"),
    "quantization": ("model_config", "quantization", "fp8"),
    "cache": ("cache_config", "cache_dtype", "fp8"),
    "ranks": ("parallel_config", "tensor_parallel_size", 2),
    "configuration": ("model_config.hf_text_config", "rms_norm_eps", 0.5),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_servers_whose_rows_differ_have_different_names(model, monkeypatch, what):
    config = configured(model)
    path, name, value = DIFFERENT[what]
    before = name_of(config, "weights")
    assert name_of(configured(model), "weights") == before != name_of(config, "other weights")
    monkeypatch.setattr(operator.attrgetter(path)(config), name, value)
    assert name_of(config, "weights") != before


@pytest.mark.parametrize("kara", [None, KARA], ids=["alone", "beside windows"])
@pytest.mark.parametrize("shown", ["in full", "without the module", "settings elsewhere", "both", "nothing set"])
def test_both_ways_make_the_same_configuration(model, kara, shown):
    settings = {} if shown == "nothing set" else ON
    windows = {} if kara is None else {"kara": kara}
    expected = told(configured(model, additional={"contexts": settings, **windows}))
    transfer, additional = named(settings), dict(windows)
    if shown == "without the module":
        del transfer["kv_connector_module_path"]
    if shown in ("settings elsewhere", "both"):
        additional["contexts"] = settings
    if shown == "settings elsewhere":
        del transfer["kv_connector_extra_config"]
    config = configured(model, transfer, additional or None)
    assert told(config) == expected
    config.__post_init__()  # vLLM completes some configurations twice
    assert told(config) == expected


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_admits(model, mode):
    document, *questions = prompts(256, 9, 5, seed=3)
    transfer = KVTransferConfig(**named(ON))
    with serving(model, mode=mode, additional_config={}, kv_transfer_config=transfer) as some:
        assert some.manager.min_tokens == ON["min_tokens"]
        some.ask(document + questions[0], context_tokens=256)
        some.forget()
        for question in questions:
            prompt = document + question
            assert some.ask(prompt, context_tokens=256) == [some.judge(prompt, 256)]
        assert some.manager.counts["hits", "ram"] == 1
        some.assert_nothing_leaks()


def test_an_engine_in_a_process_of_its_own_admits(model, monkeypatch):
    """Requests are checked in one process, and admitted in another."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    document, question = prompts(256, 9, seed=4)
    with engine(model, None, kv_transfer_config=KVTransferConfig(**named(ON))) as some:
        assert some.scheduler is None
        with pytest.raises(ValueError, match="context_tokens: expected an int, got str"):
            some.generate([question], greedy(1, extra_args={"kv_transfer_params": {"context_tokens": "all"}}))
        asking = greedy(4, extra_args={"kv_transfer_params": {"context_tokens": 256}})
        some.generate([document + question], asking)
        outputs = some.llm.generate([{"prompt_token_ids": document + question}], asking, use_tqdm=False)
        assert "context" in outputs[0].kv_transfer_params


PLACES = "--additional-config (contexts) and --kv-transfer-config (kv_connector_extra_config)"


@pytest.mark.parametrize(
    ("transfer", "additional", "expected"),
    [
        (named({"floors": 1}), None, "contexts: floors: expected one of ram_gib, "),
        (named({"floor": 2}), None, "contexts: floor: expected 0..1, got 2"),
        (named({"profile": __file__}), None, f"contexts: profile: {__file__}: expected a profile, got "),
        (named({"floor": 2}), {"kara": {}}, "contexts: floor: expected 0..1, got 2"),
        (named({}), {"kara": {"windw": 1}}, "kara: windw: expected one of "),
        (
            named({"floor": 0.9, "alpha": 1.0}),
            {"contexts": {"floor": 0.8, "alpha": 1.0, "min_tokens": 64}},
            f"contexts: expected the same settings in {PLACES}, got others of floor, min_tokens",
        ),
        (named({"floor": 0.9}), {"contexts": 3}, "contexts: expected an object of settings, got int"),
        (named({}, kv_role="kv_producer"), None, "contexts: kv_role: expected kv_both, got kv_producer"),
        (
            named({}, kv_connector="ContextsConnector"),
            None,
            f"contexts: kv_connector: expected ContextConnector of {MODULE}, got ContextsConnector of {MODULE}",
        ),
        (
            named({}, kv_connector_module_path="kara_kernels"),
            None,
            f"contexts: kv_connector: expected ContextConnector of {MODULE}, got ContextConnector of kara_kernels",
        ),
        (
            {"kv_connector": "MultiConnector", "kv_role": "kv_both",
             "kv_connector_extra_config": {"connectors": [named({})]}},
            None,
            f"contexts: kv_connector: expected ContextConnector of {MODULE}, got MultiConnector of vLLM",
        ),
        (
            {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"},
            {"contexts": {}},
            "contexts: expected only supported features, got other KV connectors",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(model, transfer, additional, expected):
    with pytest.raises(ValueError, match="Value error, ") as caught:
        configured(model, transfer, additional)
    lines = [line for line in str(caught.value).splitlines() if "Value error, " in line]
    assert len(lines) == 1
    assert lines[0].partition("Value error, ")[2].startswith(expected)


def test_no_password_is_in_an_error(model):
    one, other = ({"remote": {"url": f"redis://:secret{i}@cache"}} for i in range(2))
    with pytest.raises(ValueError, match="got others of remote") as caught:
        configured(model, named(one), {"contexts": other})
    line = next(line for line in str(caught.value).splitlines() if "got others" in line)
    assert "secret" not in line.partition("[type=")[0]


def test_an_engine_warms_up_what_it_may_be_asked_for(model, monkeypatch):
    """So that no request waits for kernels to be compiled."""
    warmed = []
    monkeypatch.setattr(ContextWorker, "warm_up", lambda _, methods: warmed.append(methods))
    monkeypatch.setattr(ContextWorker, "judge_by", lambda _, judges, methods, longest: warmed.append(longest))
    contexts = {**ON, "methods": ["none/int8", "none/exact"], "conversations": True}
    with engine(model, None, additional_config={"kara": KARA, "contexts": contexts}):
        assert warmed == [["none/int8", "none/exact", CONVERSATION], 1024]


def test_the_connector_says_that_its_plugin_is_missing(model):
    """VLLM_PLUGINS may leave it out. vLLM would still import the connector."""
    config = configured(model, named({}))
    config.additional_config = {}
    from kara_kernels.integrations.vllm.contexts.connector import ContextConnector, KVConnectorRole

    with pytest.raises(ValueError, match="contexts: expected vLLM's plugin kara to be loaded"):
        ContextConnector(config, KVConnectorRole.SCHEDULER, None)


def test_asynchronous_engines_get_their_scheduler(model):
    with asynchronous():
        for additional, expected in ((None, "ContextAsyncScheduler"), ({"kara": KARA}, "BothAsyncScheduler")):
            config = configured(model, named(ON), additional)
            assert config.scheduler_config.scheduler_cls.rpartition(".")[2] == expected
